"""Export of a model to two ONNX graphs with `torch.export` and `torch.onnx`."""

from __future__ import annotations

import copy
import importlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export import Dim

from .. import __version__
from ..checkpoint import weights_sha256
from ..modeling.embedding import PACKED
from ..modeling.rwkv_sam import RWKVSAM
from ..triton_kernels.bi_wkv import MAX_BONUS, MAX_DECAY
from . import check
from .configs import write_configs
from .graphs import graphs_of
from .manifest import (
    CONTRACTS,
    DECODER,
    ENCODER,
    PRECISIONS,
    ExportError,
    Manifest,
    describe,
    make_stage,
    reject,
    require,
)  # fmt: skip

if TYPE_CHECKING:
    import onnx_ir

OPSET = 20  # the oldest with Gelu; TensorRT reads it from 10.0 on
OPSETS = (18, 19, 20)
LARGEST_FILE = 1_900_000_000  # bytes; larger weights go to a second file, because protobuf is limited to 2 GiB
# channels and stride of each map of an embedding, in the decoder's order
MAPS = {
    "image_embed": (256, 16), "high_res_feats_0": (32, 4), "high_res_feats_1": (32, 4), "image_embeddings": (PACKED, 16)
}  # fmt: skip
DTYPES = dict(zip(PRECISIONS, (torch.float32, torch.float16), strict=True))

Inputs = dict[str, tuple[torch.Tensor, dict[int, Any]]]  # tensors to trace with, and their dynamic axes


def export_onnx(
    model: RWKVSAM | str | os.PathLike[str] | None,
    folder: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    precision: str = "fp32",
    batch: int | None = None,
    uint8: bool = False,
    contract: str = "sam2",
    single_mask: bool = False,
    configs: bool = False,
    opset: int = OPSET,
    flips: bool = False,
    photo: str | os.PathLike[str] | None = None,
) -> Manifest:
    """Write `encoder.onnx`, `decoder.onnx` and `export.json` after a check against PyTorch.

    Graphs that fail the check go to `folder/rejected`, and the files in `folder` stay as they were. README.md in this
    folder gives the names, shapes, dtypes and frames of inputs and outputs.

    Args:
        model: Model, or an argument of `RWKVSAM.from_pretrained`.
        folder: Folder to write to; created if missing.
        image_size: Side of the model input in pixels, a multiple of 64. By default the model's.
        precision: "fp32" or "fp16". In "fp16" weights and maps are float16; norms, positions and the scan are float32.
        batch: Fixed number of images in a call of the encoder; None for any number. "sam" and "osam" take one image.
        uint8: The encoder takes uint8 `[B, h, w, 3]` with h, w <= image_size. It normalizes and pads. With "sam" the
            input `[h, w, 3]` is uint8 instead of float32. "osam" does not have it.
        contract: The programs that the graphs are for. "sam2": names and positions of SAM 2's exports. "sam": of
            segment-anything's, with coordinates in 1024 pixels, and one mask of the size of the image. "osam": the same
            with the encoder's input as osam and labelme give it.
        single_mask: The decoder returns only the single mask, not the three for ambiguous prompts. With "sam" it
            returns that one whatever the number of points.
        configs: Also write `config.yaml` for AnyLabeling and `x-anylabeling.yaml` for X-AnyLabeling.
        opset: ONNX opset: 18, 19 or 20. Before 20, Gelu is written with Erf.
        flips: Write a sum from the right as a flip, a sum from the left and a flip, for runtimes without `reverse`.
        photo: Image file to check with. By default the one installed with the package.

    Returns:
        The content of `export.json`, with the measured differences in `check`.

    Raises:
        ExportError: An argument cannot be used, a library is missing, or the graphs fail the check.
        CheckpointError, OSError: The model or the image cannot be loaded.
    """
    if precision not in PRECISIONS:
        raise ExportError(f"unknown precision {precision!r}; choose one of {list(PRECISIONS)}")
    if batch is not None and batch < 1:
        raise ExportError(f"batch must be positive, got {batch}; omit it for any number of images")
    if contract not in CONTRACTS:
        raise ExportError(f"unknown contract {contract!r}; choose one of {list(CONTRACTS)}")
    if contract != "sam2" and batch is not None:
        raise ExportError(f"contract {contract!r} takes one image; omit batch {batch}")
    if contract == "osam" and (uint8 or configs):
        raise ExportError("contract 'osam' takes normalized float32 and has no configs; choose 'sam' or omit them")
    if opset not in OPSETS:
        raise ExportError(f"opset must be one of {', '.join(map(str, OPSETS))}, got {opset}")
    require("onnx", "onnxscript", "onnxruntime")
    image = check.load_check_image(photo)
    folder = Path(os.path.expanduser(folder))
    with make_stage(folder) as stage:
        source = None if isinstance(model, RWKVSAM) or model is None else os.fspath(model)
        if not isinstance(model, RWKVSAM):
            model = RWKVSAM.from_pretrained(model)
        S = model.config.image_size if image_size is None else image_size
        if S % 64 or S <= 0:
            raise ExportError(f"image_size must be a multiple of 64, got {S}")
        reference = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
        _check_decays(reference, S)
        exported = copy.deepcopy(reference).to(DTYPES[precision])
        manifest = Manifest(
            version=__version__,
            source=source,
            weights_sha256=weights_sha256(reference),
            config=model.config.to_dict(),
            image_size=S,
            precision=precision,
            batch=batch if contract == "sam2" else 1,
            uint8=uint8,
            contract=contract,
            single_mask=single_mask or model.config.num_multimask_outputs == 0,
            opset=opset,
            exporter={name: importlib.import_module(name).__version__ for name in ("torch", "onnx", "onnxscript")},
        )
        _write_graphs(exported, manifest, stage, flips)
        files = {file.name: describe(file) for file in sorted(stage.iterdir())}
        figures, problems = check.check_folder(stage, manifest, reference, image)
        manifest = replace(manifest, files=files, check=figures)
        manifest.write(stage)
        if problems:
            raise ExportError(f"the graphs differ from PyTorch: {'; '.join(problems)}. They are in {reject(stage)}")
        if configs:
            write_configs(stage, manifest)
        for file in sorted(stage.iterdir()):
            file.replace(folder / file.name)
        return manifest


def _check_decays(model: RWKVSAM, image_size: int) -> None:
    """Raise an ExportError if a decay or bonus is beyond the bounds within which the graph's scan is accurate."""
    tokens = (image_size // 16) ** 2
    for i, layer in enumerate(model.backbone.layers):
        for name, bound in {"decay": MAX_DECAY, "first": MAX_BONUS * tokens}.items():
            largest = float(getattr(layer.spatial_mix, name).abs().max())
            if not largest <= bound:
                raise ExportError(
                    f"layer {i} has spatial_mix.{name} {largest:g}, and the graph's scan takes up to {bound:g} at "
                    f"image_size {image_size}; run this model in PyTorch"
                )


def _write_graphs(model: RWKVSAM, manifest: Manifest, folder: Path, flips: bool) -> None:
    S, frame, dtype = manifest.image_size, manifest.frame_size, model.dtype
    images, N, P = manifest.batch or 2, 3, 5  # sizes to trace with; torch.export treats 0 and 1 as constants
    dims: dict[int, Any] = {0: Dim("batch")} if manifest.batch is None else {}
    image = torch.zeros(images, 3, frame, frame)
    if manifest.contract == "sam":
        image = torch.zeros(frame - 32, frame, 3, dtype=torch.uint8 if manifest.uint8 else torch.float32)
        dims = {0: Dim("height", max=frame), 1: Dim("width", max=frame)}
    elif manifest.uint8:
        image = torch.zeros(images, S - 32, S, 3, dtype=torch.uint8)
        dims |= {1: Dim("height", max=S), 2: Dim("width", max=S)}
    encoder, decoder = graphs_of(model, manifest)
    _write(encoder, {manifest.image_input: (image, dims)}, list(manifest.embedding), folder / ENCODER, manifest, flips)

    n, p = Dim("num_prompts"), Dim("num_points")
    inputs: Inputs = {
        name: (torch.zeros(1, channels, S // stride, S // stride, dtype=dtype), {})
        for name, (channels, stride) in MAPS.items()
        if name in manifest.embedding
    }
    inputs |= {
        "point_coords": (torch.zeros(N, P, 2), {0: n, 1: p}),
        "point_labels": (torch.zeros(N, P), {0: n, 1: p}),
        "mask_input": (torch.zeros(N, 1, frame // 4, frame // 4), {0: n}),
        "has_mask_input": (torch.zeros(1), {}),
    }
    outputs = ["low_res_masks", "iou_predictions"]
    if manifest.takes_size:
        inputs["orig_im_size"] = (torch.tensor([frame - 32.0, frame - 1.0]), {})
        outputs = ["masks", "iou_predictions", "low_res_masks"]
    _write(decoder, inputs, outputs, folder / DECODER, manifest, flips)


def _write(graph: nn.Module, inputs: Inputs, outputs: list[str], file: Path, manifest: Manifest, flips: bool) -> None:
    from .translations import TRANSLATIONS, optimize  # imports onnxscript

    tensors, dims = zip(*inputs.values(), strict=True)
    with _quiet(), torch.no_grad():
        program = torch.export.export(graph, tensors, dynamic_shapes=dims, strict=False)
        onnx_program = torch.onnx.export(
            program,
            (),
            opset_version=OPSET,
            custom_translation_table=TRANSLATIONS,
            input_names=list(inputs),
            output_names=outputs,
            optimize=False,
            verbose=False,
        )
    assert onnx_program is not None
    model = onnx_program.model
    optimize(model, manifest.opset, flips)
    _name_axes(model, dims)
    model.metadata_props["fastsam_rwkv"] = manifest.version
    for name in ("image_size", "precision", "weights_sha256"):
        model.metadata_props[name] = str(getattr(manifest, name))
    size = sum(t.const_value.nbytes for t in model.graph.initializers.values() if t.const_value is not None)
    onnx_program.save(str(file), external_data=size > LARGEST_FILE)


def _name_axes(model: onnx_ir.Model, dims: Sequence[dict[int, Any]]) -> None:
    """Replace the exporter's symbols for dynamic axes by the names of `dims`."""
    import onnx_ir

    names = {
        str(value.shape[axis]): dim.__name__
        for value, axes in zip(model.graph.inputs, dims, strict=True)
        for axis, dim in axes.items()
        if value.shape is not None
    }
    for value in (*model.graph.inputs, *(output for node in model.graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = onnx_ir.Shape([names.get(str(n), n if isinstance(n, int) else None) for n in value.shape])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress messages and warnings, but not its errors."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
