"""The quality gate: exported graphs in ONNX Runtime against the model in PyTorch."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import weights_sha256
from ..modeling.embedding import ImageEmbedding
from ..modeling.pixels import normalize, pad
from ..modeling.rwkv_sam import RWKVSAM
from ..predictor.frame import ImageFrame
from ..predictor.image_io import load_image, resize_image
from .feeds import EMBEDDING, decoder_inputs, encoder_input
from .manifest import DECODER, ENCODER, ExportError, Manifest, require

PHOTO = Path(__file__).with_name("photo.jpg")
# Largest difference of logits below 20, least mean IoU of masks on the photograph, largest relative RMS of a map
TOLERANCE = {"fp32": (1e-3, 0.999, 1e-4), "fp16": (None, 0.99, 3e-2)}
LARGE_LOGIT = 20.0


def check_onnx(
    folder: str | os.PathLike[str],
    model: RWKVSAM | str | os.PathLike[str] | None = None,
    photo: str | os.PathLike[str] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Compare the graphs in `folder` with PyTorch, as they were when they were exported.

    Args:
        folder: what `export_onnx` wrote.
        model: the model that was exported, or what `RWKVSAM.from_pretrained` takes; by default the `source` in
            `export.json`.
        photo: the picture to compare on; one that is installed with the package by default.

    Returns:
        The differences, and a sentence for each that is too large.

    Raises:
        ExportError: the folder holds no export, its files were changed, or the model is another one.
    """
    require("onnxruntime")
    manifest = Manifest.read(folder)
    if model is None:
        try:
            model = RWKVSAM.from_pretrained(manifest.source)
        except (OSError, ValueError) as error:
            raise ExportError(
                f"{str(folder)!r} was exported from {manifest.source!r}, which cannot be loaded from here ({error}); "
                "name the model it was made of"
            ) from error
    elif not isinstance(model, RWKVSAM):
        model = RWKVSAM.from_pretrained(model)
    reference = copy.deepcopy(model).cpu().float().eval()
    if weights_sha256(reference) != manifest.weights_sha256:
        source = "one without a name" if manifest.source is None else repr(manifest.source)
        raise ExportError(
            f"{str(folder)!r} was exported from another model ({source}, by fastsam-rwkv {manifest.version}); "
            "name the one it was made of, or export again"
        )
    return check_folder(Path(folder), manifest, reference, picture_to_check_with(photo))


def picture_to_check_with(photo: str | os.PathLike[str] | None) -> np.ndarray:
    """The picture at `photo`, or the installed one."""
    try:
        return load_image(PHOTO if photo is None else photo)
    except (ValueError, TypeError) as error:
        raise ExportError(str(error)) from error


@torch.inference_mode()
def check_folder(
    folder: Path, manifest: Manifest, model: RWKVSAM, picture: np.ndarray
) -> tuple[dict[str, Any], list[str]]:
    """`check_onnx` of a folder whose files are known to be right, on a uint8 picture `[H, W, 3]`."""
    import onnxruntime

    encoder, decoder = (
        onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
        for name in (ENCODER, DECODER)
    )
    figures: dict[str, Any] = {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__}
    images = {"photo": _photo(picture, manifest), "random": _random(manifest)}
    for name, (image, frame) in images.items():
        got = encoder.run(list(EMBEDDING), {"image": image})
        want = model.encode_image(_pixels(image, manifest), frame.input_size)
        maps = (want.image_embed, *want.high_res_feats)
        relative = [_relative_rms(g, w.permute(0, 3, 1, 2)) for g, w in zip(got, maps, strict=True)]
        rows: dict[str, Any] = {"embedding_relative_rms": max(relative), "logits": 0.0, "quality": 0.0}
        ious: list[float] = []
        for inputs in _prompts(frame, manifest.image_size):
            low, quality = _decode(decoder, [g[:1] for g in got], inputs, frame, manifest)
            want_low, want_quality = _decode_torch(model, want[0], inputs, manifest)
            near = np.abs(want_low) < LARGE_LOGIT
            rows["logits"] = max(rows["logits"], float(np.abs(low - want_low)[near].max(initial=0)))
            rows["quality"] = max(rows["quality"], float(np.abs(quality - want_quality).max()))
            ious += _ious(low > 0, want_low > 0)
        rows |= {"mask_iou_mean": float(np.mean(ious)), "mask_iou_least": min(ious), "masks": len(ious)}
        figures[name] = rows
    return figures, _problems(figures, manifest.precision)


def _problems(figures: dict[str, Any], precision: str) -> list[str]:
    logits, least_iou, relative = TOLERANCE[precision]
    problems = []
    for name in ("photo", "random"):
        row = figures[name]
        if logits is not None and not row["logits"] <= logits:
            problems.append(f"{name}: logits by {row['logits']:.2g}, at most {logits:g}")
        if not row["embedding_relative_rms"] <= relative:
            problems.append(f"{name}: embedding by {row['embedding_relative_rms']:.2g} relative, at most {relative:g}")
    if not figures["photo"]["mask_iou_mean"] >= least_iou:
        problems.append(f"photo: mask IoU {figures['photo']['mask_iou_mean']:.4f}, at least {least_iou}")
    return problems


def _photo(picture: np.ndarray, manifest: Manifest) -> tuple[np.ndarray, ImageFrame]:
    pixels, frame = resize_image(picture, manifest.image_size)
    return np.repeat(encoder_input(pixels, manifest), manifest.batch or 2, axis=0), frame


def _random(manifest: Manifest) -> tuple[np.ndarray, ImageFrame]:
    generator = np.random.default_rng(0)
    S = manifest.image_size
    shape = (manifest.batch or 1, S // 2 if manifest.uint8 else S, S, 3)
    pixels = generator.integers(0, 256, shape, np.uint8)
    frame = ImageFrame.of(shape[1:3], S)
    return np.concatenate([encoder_input(p, manifest) for p in pixels]), frame


def _pixels(image: np.ndarray, manifest: Manifest) -> Tensor:
    if not manifest.uint8:
        return torch.from_numpy(image)
    S = manifest.image_size
    return pad(normalize(torch.from_numpy(image)), (S, S)).permute(0, 3, 1, 2)


def _prompts(frame: ImageFrame, image_size: int) -> list[dict[str, np.ndarray]]:
    """1 and 7 prompts; 1 and 5 points, padding among them; boxes; a mask. In input pixels."""
    generator = np.random.default_rng(1)
    h, w = frame.resized_size
    one = {"point_coords": np.array([[[0.6 * w, 0.6 * h], [0, 0]]]), "point_labels": np.array([[1, -1]])}
    points = generator.uniform(0, 1, (7, 5, 2)) * [w, h]
    labels = generator.choice([-1, 0, 1], (7, 5))
    labels[:, 0], labels[:, -1] = 1, -1
    many = {"point_coords": points, "point_labels": labels}
    corners = np.sort(generator.uniform(0, 1, (7, 2, 2)), axis=1) * [w, h]
    boxes = {"point_coords": corners, "point_labels": np.array([[2, 3]] * 7)}
    mask = 10 * generator.standard_normal((7, 1, image_size // 4, image_size // 4))
    prompts = [one, many, boxes, {**many, "mask_input": mask}]
    return [{name: array.astype(np.float32) for name, array in inputs.items()} for inputs in prompts]


def _decode(
    decoder: Any, embedding: list[np.ndarray], inputs: dict[str, np.ndarray], frame: ImageFrame, manifest: Manifest
) -> tuple[np.ndarray, np.ndarray]:
    feeds = dict(zip(EMBEDDING, embedding, strict=True)) | decoder_inputs(inputs, manifest)
    if manifest.sam_compatible:
        feeds["orig_im_size"] = np.array(frame.original_size, np.float32)
        masks, low, quality = decoder.run(["masks", "low_res_masks", "iou_predictions"], feeds)
        difference = np.abs(masks - frame.masks_to_image(low)).max()
        if not difference <= 1e-3:
            raise ExportError(f"masks at the image's size differ from low_res_masks enlarged by {difference:.2g}")
    else:
        low, quality = decoder.run(["low_res_masks", "iou_predictions"], feeds)
    return low, quality


def _decode_torch(
    model: RWKVSAM, embedding: ImageEmbedding, inputs: dict[str, np.ndarray], manifest: Manifest
) -> tuple[np.ndarray, np.ndarray]:
    """By the model's own interface, where a box is not two points and padding is appended."""
    given = {name: torch.from_numpy(array) for name, array in inputs.items()}
    if (inputs["point_labels"] == 2).any():
        prompts = {"boxes": given["point_coords"].flatten(1)}
    else:  # the last point is the padding that the model appends
        coords, labels = given["point_coords"][:, :-1], given["point_labels"][:, :-1].long()
        prompts = {"point_coords": coords, "point_labels": labels}
    if "mask_input" in given:
        prompts["mask_input"] = given["mask_input"]
    low, quality = model.decode_all(embedding, **prompts)
    n = manifest.num_masks
    return low[:, :n].numpy(), quality[:, :n].numpy()


def _relative_rms(got: np.ndarray, want: Tensor) -> float:
    reference = want.double().numpy()
    return float(np.sqrt(np.mean((got - reference) ** 2) / np.mean(reference**2)))


def _ious(got: np.ndarray, want: np.ndarray) -> list[float]:
    """IoU of every mask; two empty ones agree."""
    both, either = (got & want).sum((2, 3)), (got | want).sum((2, 3))
    return np.where(either == 0, 1.0, both / np.maximum(either, 1)).ravel().tolist()
