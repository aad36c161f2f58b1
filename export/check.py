"""Comparison of exported graphs in ONNX Runtime with the model in PyTorch."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import weights_sha256
from ..modeling.rwkv_sam import RWKVSAM
from ..predictor.frame import ImageFrame
from ..predictor.image_io import load_image, resize_image
from .feeds import decoder_inputs, encoder_input, labeled_points
from .graphs import DecoderGraph, SamDecoderGraph, graphs_of
from .manifest import DECODER, ENCODER, OLD_CONTRACTS, ExportError, Manifest, describe, require
from .sessions import Session

PHOTO = Path(__file__).with_name("photo.jpg")
# Largest difference of logits below LARGE_LOGIT; least mean mask IoU on the image; largest relative RMS error of a map
TOLERANCE = {"fp32": (1e-3, 0.999, 1e-4), "fp16": (None, 0.99, 3e-2)}
LARGE_LOGIT = 20.0
TIE = 1e-2  # scores of masks that rounding may exchange


def check_onnx(
    folder: str | os.PathLike[str],
    model: RWKVSAM | str | os.PathLike[str] | None = None,
    photo: str | os.PathLike[str] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Compare the graphs in `folder` with PyTorch float32, as `export_onnx` does.

    Args:
        folder: Folder that `export_onnx` wrote.
        model: Model that was exported, or an argument of `RWKVSAM.from_pretrained`. By default the `source` in
            `export.json`.
        photo: Image file to compare on. By default the one installed with the package.

    Returns:
        The measured differences, as in `check` of `export.json`, and one sentence for each that is too large.

    Raises:
        ExportError: The folder holds no export, its files were changed, or the model is another one. Also if ONNX
            Runtime is missing or cannot run the graphs, or if the image cannot be used.
        FileNotFoundError: The image file does not exist.
    """
    require("onnxruntime")
    manifest, image = Manifest.read(folder), load_check_image(photo)
    reference = _reference(folder, manifest, model)
    return check_folder(Path(os.path.expanduser(folder)), manifest, reference, image)


def adopt_onnx(
    folder: str | os.PathLike[str],
    model: RWKVSAM | str | os.PathLike[str] | None = None,
    photo: str | os.PathLike[str] | None = None,
    *,
    min_mask_iou: float = 0.99,
) -> Manifest:
    """Record graphs of an export that were changed on purpose, such as quantized or simplified ones, after a check.

    Inputs and outputs must be as before. The graphs are compared as `check_onnx` does, but only the mean mask IoU on
    the image has a limit. `export.json` then holds the new sizes and sha256, the measured differences and the limit.

    Args:
        folder: Folder that `export_onnx` wrote, with changed `encoder.onnx` or `decoder.onnx`.
        model: As in `check_onnx`.
        photo: As in `check_onnx`.
        min_mask_iou: Least mean IoU of the masks with PyTorch's, 0 to 1.

    Returns:
        The new content of `export.json`.

    Raises:
        ExportError: As `check_onnx` raises, or the masks differ by more than `min_mask_iou` allows. `export.json` stays
            as it was.
        FileNotFoundError: The image file does not exist.
        OSError: `export.json` cannot be written.
    """
    if not 0 <= min_mask_iou <= 1:
        raise ExportError(f"min_mask_iou must be from 0 to 1, got {min_mask_iou}")
    require("onnxruntime")
    manifest, image = Manifest.read(folder, verify=False), load_check_image(photo)
    reference = _reference(folder, manifest, model)
    folder = Path(os.path.expanduser(folder))
    names = {ENCODER, DECODER, *(file.name for file in folder.glob("*.data"))}
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        raise ExportError(f"{str(folder / missing[0])!r} is missing; put the changed graph there, or export again")
    files = {name: describe(folder / name) for name in sorted(names)}
    manifest = replace(manifest, files=files, check={"min_mask_iou": min_mask_iou})
    figures, problems = check_folder(folder, manifest, reference, image)
    if problems:
        found = (
            f"the graphs differ from PyTorch: {problems[0]}. {str(folder)!r} was not adopted; if such masks do, lower "
        )
        raise ExportError(f"{found}min_mask_iou", f"{found}--min-mask-iou")
    manifest = replace(manifest, check={**figures, **manifest.check})
    manifest.write(folder)
    return manifest


def _reference(
    folder: str | os.PathLike[str], manifest: Manifest, model: RWKVSAM | str | os.PathLike[str] | None
) -> RWKVSAM:
    """Return the model that was exported, in float32 on the CPU."""
    if manifest.contract in OLD_CONTRACTS:
        raise ExportError(f"{str(folder)!r} has format 2, which predictors run but nothing checks; export again")
    if model is None:
        try:
            model = RWKVSAM.from_pretrained(manifest.source)
        except (OSError, ValueError) as error:
            raise ExportError(
                f"{str(folder)!r} was exported from {manifest.source!r}, which cannot be loaded from here ({error}); "
                "pass the model that was exported"
            ) from error
    elif not isinstance(model, RWKVSAM):
        model = RWKVSAM.from_pretrained(model)
    reference = copy.deepcopy(model).cpu().float().eval()
    if weights_sha256(reference) != manifest.weights_sha256:
        source = "source not recorded" if manifest.source is None else repr(manifest.source)
        raise ExportError(
            f"{str(folder)!r} was exported from another model ({source}, by fastsam-rwkv {manifest.version}); "
            "pass the model that was exported, or export again"
        )
    return reference


def load_check_image(photo: str | os.PathLike[str] | None) -> np.ndarray:
    """Load the image file `photo`, by default the installed one, as uint8 `[H, W, 3]` RGB.

    Raises:
        ExportError: The image cannot be decoded.
        FileNotFoundError: The file does not exist.
    """
    try:
        return load_image(PHOTO if photo is None else photo)
    except (ValueError, TypeError) as error:
        raise ExportError(str(error), getattr(error, "command_message", None)) from error


@torch.inference_mode()
def check_folder(
    folder: Path, manifest: Manifest, model: RWKVSAM, image: np.ndarray
) -> tuple[dict[str, Any], list[str]]:
    """Compare the graphs in `folder` with `model`, as `check_onnx` does, without verifying the files.

    Args:
        folder: Folder with the two graphs.
        manifest: Manifest of these graphs.
        model: Float32 model on the CPU, in eval mode.
        image: uint8 `[H, W, 3]` RGB.

    Raises:
        ExportError: ONNX Runtime cannot run the graphs, or their outputs have other shapes. Also if `masks` of a
            decoder that takes `orig_im_size` differ from the enlarged `low_res_masks`.
    """
    import onnxruntime

    encoder, decoder = (Session(folder / name) for name in (ENCODER, DECODER))
    encoder_graph, decoder_graph = graphs_of(model, manifest)
    figures: dict[str, Any] = {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__}
    for name, (encoder_image, frame) in _encoder_inputs(image, manifest).items():
        got = encoder.run(manifest.embedding, {manifest.image_input: encoder_image})
        want = encoder_graph(torch.from_numpy(encoder_image))
        maps = want if isinstance(want, tuple) else (want,)
        _check_shapes(got, maps)
        relative = [_relative_rms(g, w) for g, w in zip(got, maps, strict=True)]
        rows: dict[str, Any] = {"embedding_relative_rms": max(relative), "logits": 0.0, "quality": 0.0}
        ious: list[float] = []
        for inputs in _prompts(frame, manifest.frame_size):
            feeds = decoder_inputs(labeled_points(inputs), manifest)
            low, iou = _decode(decoder, [g[:1] for g in got], feeds, frame, manifest)
            tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
            embedding = {name: m[:1] for name, m in zip(manifest.embedding, maps, strict=True)}
            want_low, want_iou = _wanted(decoder_graph, embedding | tensors, low)
            _check_shapes((low, iou), (want_low, want_iou))
            near = np.abs(want_low) < LARGE_LOGIT
            rows["logits"] = max(rows["logits"], float(np.abs(low - want_low)[near].max(initial=0)))
            rows["quality"] = max(rows["quality"], float(np.abs(iou - want_iou).max()))
            ious += mask_ious(low > 0, want_low > 0)
        rows |= {"mask_iou_mean": float(np.mean(ious)), "mask_iou_least": min(ious), "masks": len(ious)}
        figures[name] = rows
    return figures, _problems(figures, manifest)


def _wanted(graph: DecoderGraph | SamDecoderGraph, inputs: dict[str, Tensor], got: np.ndarray) -> list[np.ndarray]:
    """Return masks and predicted IoUs of PyTorch.

    Where a graph chooses one mask, and the scores of several lie within TIE of the best, the one nearest to `got` is
    taken: rounding may decide between them.
    """
    if isinstance(graph, DecoderGraph):
        return [t.numpy() for t in graph(**inputs)]
    low, iou, scores = (t.numpy() for t in graph.candidates(**inputs))
    distance = np.abs(low - got[:, :1]).mean((2, 3))
    distance[scores < scores.max(1, keepdims=True) - TIE] = np.inf
    chosen = distance.argmin(1)[:, None]
    return [np.take_along_axis(low, chosen[..., None, None], 1), np.take_along_axis(iou, chosen, 1)]


def _check_shapes(got: Sequence[np.ndarray], want: Sequence[np.ndarray | Tensor]) -> None:
    shapes = [[list(array.shape) for array in arrays] for arrays in (got, want)]
    if shapes[0] != shapes[1]:
        raise ExportError(f"the graphs' outputs have shapes {shapes[0]}, not {shapes[1]}; export again")


def _problems(figures: dict[str, Any], manifest: Manifest) -> list[str]:
    logits, least_iou, relative = TOLERANCE[manifest.precision]
    if "min_mask_iou" in manifest.check:  # adopted graphs
        logits, least_iou, relative = None, manifest.check["min_mask_iou"], float("inf")
    problems = []
    for name in ("photo", "random"):
        row = figures[name]
        if logits is not None and not row["logits"] <= logits:
            problems.append(f"{name}: logits differ by {row['logits']:.2g}, limit {logits:g}")
        if not (error := row["embedding_relative_rms"]) <= relative:
            problems.append(f"{name}: embedding differs by {error:.2g} relative, limit {relative:g}")
    if not (iou := figures["photo"]["mask_iou_mean"]) >= least_iou:
        problems.append(f"photo: mean mask IoU is {iou:.4f}, limit {least_iou}")
    return problems


def _encoder_inputs(image: np.ndarray, manifest: Manifest) -> dict[str, tuple[np.ndarray, ImageFrame]]:
    """Return the encoder's inputs and frames for copies of the image, and for random pixels."""
    S = manifest.frame_size
    pixels, frame = resize_image(image, S)
    h = S // 2 if manifest.uint8 or manifest.contract == "sam" else S
    noise = np.random.default_rng(0).integers(0, 256, (manifest.batch or 1, h, S, 3), np.uint8)
    random = [encoder_input(p, manifest) for p in noise]
    return {
        "photo": (encoder_input(pixels, manifest, manifest.batch or 2), frame),
        "random": (random[0] if len(random) == 1 else np.concatenate(random), ImageFrame.of((h, S), S)),
    }


def _prompts(frame: ImageFrame, image_size: int) -> list[dict[str, np.ndarray]]:
    """Return `Prompts.inputs` of a click, 7 x 4 points, 7 boxes, and 7 x 4 points with masks."""
    generator = np.random.default_rng(1)
    h, w = frame.resized_size
    click = {"point_coords": np.array([[[0.6 * w, 0.6 * h]]]), "point_labels": np.array([[1]])}
    points = generator.uniform(0, 1, (7, 5, 2))[:, :4] * [w, h]  # the fifth is padding, which decoders append
    labels = generator.choice([-1, 0, 1], (7, 5))[:, :4]
    labels[:, 0] = 1
    many = {"point_coords": points, "point_labels": labels}
    boxes = np.sort(generator.uniform(0, 1, (7, 2, 2)), axis=1) * [w, h]
    mask = 10 * generator.standard_normal((7, 1, image_size // 4, image_size // 4))
    prompts = [click, many, {"boxes": boxes.reshape(7, 4)}, {**many, "mask_input": mask}]
    return [{n: a if n == "point_labels" else a.astype(np.float32) for n, a in inputs.items()} for inputs in prompts]


def _decode(
    decoder: Session, embedding: list[np.ndarray], feeds: dict[str, np.ndarray], frame: ImageFrame, manifest: Manifest
) -> tuple[np.ndarray, np.ndarray]:
    feeds = dict(zip(manifest.embedding, embedding, strict=True)) | feeds
    if manifest.takes_size:
        feeds["orig_im_size"] = np.array(frame.original_size, np.float32)
        masks, low, iou = decoder.run(["masks", "low_res_masks", "iou_predictions"], feeds)
        difference = np.abs(masks - frame.masks_to_image(low)).max()
        if not difference <= 1e-3:
            raise ExportError(f"masks differ from the enlarged low_res_masks by {difference:.2g}, limit 0.001")
    else:
        low, iou = decoder.run(["low_res_masks", "iou_predictions"], feeds)
    return low, iou


def _relative_rms(got: np.ndarray, want: Tensor) -> float:
    reference = want.double().numpy()
    return float(np.sqrt(np.mean((got - reference) ** 2) / np.mean(reference**2)))


def mask_ious(got: np.ndarray, want: np.ndarray) -> list[float]:
    """Return the IoU of each pair of masks, bool `[..., H, W]`, as a flat list. Two empty masks have IoU 1."""
    both, either = (got & want).sum((-2, -1)), (got | want).sum((-2, -1))
    return np.where(either == 0, 1.0, both / np.maximum(either, 1)).ravel().tolist()
