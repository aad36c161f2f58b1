"""Conversion of checkpoints with the published implementation's names."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import MOST_TENSORS, check_values, name_problems, plain_names, read_tensors, save_model, shapes
from .config import ModelConfig
from .errors import CheckpointError, listed, short_repr, shorten
from .hub import WEIGHTS_FILE
from .modeling.rwkv_sam import RWKVSAM

# (pattern, replacement), applied in this order, each to the result of the ones before it
_RENAMES = [
    (r"^backbone\.stem\.norm1\.", "backbone.stem.norm."),
    (r"^backbone\.conv_stages\.0\.", "backbone.stage1."),
    (r"^backbone\.conv_stages\.1\.", "backbone.stage2."),
    (r"^(backbone\.stage\d\.\d+)\.pre_norm\.", r"\1.norm."),
    (r"^(backbone\.stage\d\.\d+)\.conv1_1x1\.", r"\1.expand."),
    (r"^(backbone\.stage\d\.\d+)\.conv2_kxk\.", r"\1.depthwise."),
    (r"^(backbone\.stage\d\.\d+)\.conv3_1x1\.", r"\1.project."),
    (r"^(backbone\.stage\d\.\d+)\.shortcut\.expand\.", r"\1.shortcut."),
    (r"^backbone\.conv_final_pool\.norm\.", "backbone.patch.0."),
    (r"^backbone\.conv_final_pool\.proj\.", "backbone.patch.1."),
    (r"^backbone\.final_norm\.", "backbone.norm."),
    (r"^(backbone\.layers\.\d+)\.layer_scale_", r"\1.scale"),
    (r"^(backbone\.layers\.\d+)\.attn\.", r"\1.spatial_mix."),
    (r"^(backbone\.layers\.\d+)\.mlp\.", r"\1.channel_mix."),
    (r"^(backbone\.layers\.\d+\.\w+)\.spatial_", r"\1."),
    (r"^neck\.out_proj\.", "neck."),
    (r"^pe\.pe_layer\.positional_encoding_gaussian_matrix$", "prompt_encoder.position.frequencies"),
    (r"^pe\.(no_mask_embed|not_a_point_embed)\.weight$", r"prompt_encoder.\1"),
    (r"^pe\.point_embeddings\.(\d+)\.weight$", r"prompt_encoder.label_embed.\1"),
    (r"^pe\.mask_downscaling\.", "prompt_encoder.mask_downscaling."),
    (r"^mask_decoder\.mask_decoder\.", "mask_decoder."),
    (r"^(mask_decoder\.transformer\.layers\.\d+)\.cross_attn_", r"\1."),
    (r"^(mask_decoder\.transformer\.layers\.\d+)\.mlp\.lin1\.", r"\1.mlp.layers.0."),
    (r"^(mask_decoder\.transformer\.layers\.\d+)\.mlp\.lin2\.", r"\1.mlp.layers.1."),
    (r"^mask_decoder\.transformer\.final_attn_token_to_image\.", "mask_decoder.transformer.final_attn."),
    (r"^mask_decoder\.transformer\.norm_final_attn\.", "mask_decoder.transformer.final_norm."),
    (r"^mask_decoder\.(iou_token|mask_tokens)\.weight$", r"mask_decoder.\1"),
    (r"^mask_decoder\.output_upscaling\.", "mask_decoder.upscale."),
    (r"^mask_decoder\.output_hypernetworks_mlps\.", "mask_decoder.mask_mlps."),
    (r"^mask_decoder\.iou_prediction_head\.", "mask_decoder.iou_head."),
    (r"^mask_decoder\.hr_feat_proj\.", "mask_decoder.stage1_proj."),
    (r"^mask_decoder\.mr_feat_proj\.", "mask_decoder.stage2_proj."),
    (r"^mask_decoder\.mix_feat_proj\.0\.", "mask_decoder.mix."),
    (r"^mask_decoder\.mix_feat_proj\.1\.", "mask_decoder.mix_out.0."),
    (r"^mask_decoder\.mix_feat_proj\.3\.", "mask_decoder.mix_out.2."),
]
_TRANSPOSED_CONVS = ("mask_decoder.upscale.0", "mask_decoder.upscale.3", "mask_decoder.stage2_proj.0")
_MAGIC = (b"PK", b"\x80")  # of a zip archive, which torch.save writes, and of a pickle, which it used to write
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")  # in torch's message: the function that the file would have called
_MOST_RECORDS = 100_000  # in an archive: a record for each tensor, and for those of an optimizer
_MOST_PICKLE = 16 << 20  # bytes; the names and shapes of 10,000 tensors take 2 MB
_MOST_TIMES = 2  # the values of all tensors per stored value, because tensors may share memory
_WRAPPERS = ("state_dict", "model_state_dict", "model")


def convert_upstream(
    state_dict: Mapping[str, Any], *, variant: str | None = None, image_size: int = 1024
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Rename and reshape a checkpoint with the published names.

    Widths, depths, the variant and the number of mask outputs follow from the shapes. Rows of the mask tokens and of
    the IoU head that no mask output uses, as in the published single-mask model, are left out.

    Args:
        state_dict: Names to tensors, possibly under "state_dict", "model_state_dict" or "model" with optimizer states
            beside it, possibly with marks of DataParallel, `torch.compile`, FSDP or PEFT in the names.
        variant: Expected variant ("tiny", "small", "base", "large").
        image_size: Side in pixels of the images the model was trained on, for the config.

    Returns:
        The config, and a state dict that `RWKVSAM(config)` loads strictly. Dtypes are kept.

    Raises:
        CheckpointError: Names are missing, unexpected or mis-shaped, the shapes are not those of `variant`, or adapters
            are not merged.
    """
    source = _unwrap(state_dict)
    config = _infer_config(source, image_size)
    _check_storage(source)
    if variant is not None and variant != config.variant:
        raise CheckpointError(f"variant {variant!r} was asked for, but the shapes are those of {config.variant!r}")

    num_masks = 1 + config.num_multimask_outputs
    renamed: dict[str, Tensor] = {}
    for name, tensor in source.items():
        ours = _rename(name)
        module, _, leaf = ours.rpartition(".")
        if module in _TRANSPOSED_CONVS and tensor.ndim == 4:
            tensor = tensor.permute(2, 3, 1, 0).flatten(0, 2)  # [in, out, 2, 2] to [2 * 2 * out, in]
        elif module in _TRANSPOSED_CONVS and leaf == "bias":
            ours = f"{module}.out_bias"
        elif leaf.startswith("mix_") and tensor.ndim == 3:
            tensor = tensor.flatten()
        elif tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
            tensor = tensor.flatten(1)  # a 1x1 convolution is a linear layer here
        elif module in ("prompt_encoder", "prompt_encoder.label_embed"):
            tensor = tensor.flatten()
        elif tensor.ndim and (ours == "mask_decoder.mask_tokens" or ours.startswith("mask_decoder.iou_head.layers.2.")):
            tensor = tensor[:num_masks]
        renamed[ours] = tensor
    weight = renamed.get("mask_decoder.mix.weight")
    if weight is not None and weight.ndim > 1:
        del renamed["mask_decoder.mix.weight"]
        # published order of the input channels: mask, stage 2, stage 1
        for part, chunk in zip(("mix_mask", "mix_stage2", "mix_stage1"), weight.split(32, dim=1), strict=False):
            renamed[f"mask_decoder.{part}.weight"] = chunk
    if (bias := renamed.pop("mask_decoder.mix.bias", None)) is not None:
        renamed["mask_decoder.mix_mask.bias"] = bias
    _check(config, renamed, {_rename(name): name for name in source})
    check_values(source, "the checkpoint")
    for name, parts in _stacks(config).items():
        renamed[name] = torch.stack([renamed.pop(part) for part in parts])
    return config, {name: tensor.contiguous() for name, tensor in renamed.items()}


def convert_file(
    src: str | os.PathLike[str], dst: str | os.PathLike[str], *, variant: str | None = None, image_size: int = 1024
) -> ModelConfig:
    """Convert a `.pth` (read without executing pickled code) or `.safetensors` file to a model folder.

    Args:
        src: Checkpoint with the published names.
        dst: Folder for `config.json`, `model.safetensors` and a model card.
        variant: Expected variant, checked against the shapes.
        image_size: Side in pixels of the images the model was trained on.

    Raises:
        FileNotFoundError: `src` does not exist.
        CheckpointError: The file cannot be read, its contents do not fit, or the converted model would overwrite it.
    """
    src, dst = (Path(os.path.expanduser(path)) for path in (src, dst))
    if os.path.realpath(src) == os.path.realpath(dst / WEIGHTS_FILE):  # Path.resolve raises for a circle of links
        raise CheckpointError(f"the converted model would overwrite {str(src)!r}; choose another folder")
    config, state_dict = convert_upstream(_read(src), variant=variant, image_size=image_size)
    save_model(RWKVSAM, config, state_dict, dst)
    return config


def _read(path: Path) -> Mapping[str, Any]:
    if not os.path.isfile(path):  # False for a name that cannot be one, where pathlib raises
        raise FileNotFoundError(f"no checkpoint file at {short_repr(str(path))}")
    if path.suffix == ".safetensors":
        return read_tensors(path)[1]
    with path.open("rb") as opened:
        if not opened.read(2).startswith(_MAGIC):
            raise CheckpointError(
                f"{str(path)!r} is not a PyTorch file; it may be a web page or a Git LFS pointer: download it again"
            )
    _check_archive(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = _GLOBAL.search(str(error))
        what = (
            f"holds more than tensors ({shorten(refused[1], 80)})"
            if refused
            else "is damaged, or holds more than tensors,"
        )
        raise CheckpointError(
            f"{str(path)!r} {what} and was not executed. Save its weights alone: "
            "torch.save({'state_dict': checkpoint['state_dict']}, 'weights.pth')"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # the unpickler raises whatever the bytes lead it to
        raise CheckpointError(f"{str(path)!r} is not a readable PyTorch file: {shorten(error, 200)}") from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{str(path)!r} holds a {type(loaded).__name__}, not a dict of tensors")
    return loaded


def _check_archive(path: Path) -> None:
    """Raise a CheckpointError for a zip archive that unpacks to much more than its size."""
    with path.open("rb") as opened:
        if opened.read(1) != b"P":
            return  # a pickle, which is as long as what it holds
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = [(record.filename, record.file_size) for record in archive.infolist()]
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{str(path)!r} is a damaged archive: {shorten(error, 80)}; download it again") from error
    pickles = sum(size for name, size in sizes if name.endswith(".pkl"))
    total = sum(size for _, size in sizes)
    if len(sizes) > _MOST_RECORDS or pickles > _MOST_PICKLE or total > 4 * path.stat().st_size:
        raise CheckpointError(
            f"{str(path)!r} unpacks to {len(sizes)} records of {total} bytes, {pickles} of them without tensors; "
            "a checkpoint does not. Save its weights alone, or download it again."
        )


def _check_storage(tensors: Mapping[str, Tensor]) -> None:
    """Raise a CheckpointError unless tensors are dense and hold about as many values as they show."""
    if odd := [name for name, t in tensors.items() if t.layout != torch.strided or t.is_meta or t.is_quantized]:
        raise CheckpointError(f"tensors that are sparse, quantized or hold no values: {listed(odd)}")
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()}
    if sum(t.nbytes for t in tensors.values()) > _MOST_TIMES * sum(stored.values()):
        raise CheckpointError("the tensors show many more values than they hold, as after `expand`; clone them first")


def _unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(checkpoint.get(wrapper), Mapping):
            checkpoint = checkpoint[wrapper]
            break
    names = list(checkpoint)
    if len(names) > MOST_TENSORS:
        raise CheckpointError(f"the checkpoint holds {len(names)} tensors; the largest model has {MOST_TENSORS}")
    if odd := [n for n in names if not (isinstance(n, str) and isinstance(checkpoint[n], Tensor))]:
        raise CheckpointError(
            f"entries that are not tensors: {listed([short_repr(n) for n in odd])}; expected the model's state dict"
        )
    return plain_names(checkpoint)


def _rename(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _stacks(config: ModelConfig) -> dict[str, list[str]]:
    """Return stacked parameters with the names, in order, of the published parameters they consist of."""
    stacks = {"prompt_encoder.label_embed": [f"prompt_encoder.label_embed.{i}" for i in range(4)]}
    for i in range(config.depth):
        layer = f"backbone.layers.{i}"
        projections = [f"{layer}.spatial_mix.{name}.weight" for name in ("key", "value", "receptance")]
        stacks[f"{layer}.spatial_mix.projections"] = projections
        stacks[f"{layer}.spatial_mix.mix"] = [f"{layer}.spatial_mix.mix_{name}" for name in "kvr"]
        stacks[f"{layer}.channel_mix.mix"] = [f"{layer}.channel_mix.mix_{name}" for name in "kr"]
    return stacks


def _infer_config(source: Mapping[str, Tensor], image_size: int) -> ModelConfig:
    def width(name: str) -> int:
        if name not in source:
            raise CheckpointError(f"{name!r} is missing: these are not the published implementation's names")
        if not source[name].ndim:
            raise CheckpointError(f"{name!r} has a single value; expected a vector or matrix")
        return source[name].shape[0]

    def count(what: str) -> int:
        number = len({m[1] for n in source if (m := re.match(re.escape(what) + r"\.(\d+)\.", n))})
        if not number:
            raise CheckpointError(f"'{what}.*' is missing: the checkpoint holds only part of the model")
        return number

    sizes = {
        "stem_dim": width("backbone.stem.conv1.weight"),
        "stage1_dim": width("backbone.conv_stages.0.0.conv3_1x1.weight"),
        "stage2_dim": width("backbone.conv_stages.1.0.conv3_1x1.weight"),
        "embed_dim": width("backbone.final_norm.weight"),
        "stage1_depth": count("backbone.conv_stages.0"),
        "stage2_depth": count("backbone.conv_stages.1"),
        "depth": count("backbone.layers"),
        "num_multimask_outputs": count("mask_decoder.mask_decoder.output_hypernetworks_mlps") - 1,
    }
    try:
        config = ModelConfig("custom", **sizes)
    except ValueError as error:
        raise CheckpointError(f"the checkpoint's shapes are not those of a model: {error}") from error
    try:
        config = replace(config, image_size=image_size)
    except (ValueError, TypeError) as error:
        raise CheckpointError(str(error)) from error
    for name in ("tiny", "small", "base", "large"):
        named = ModelConfig.from_name(name, image_size=image_size, num_multimask_outputs=config.num_multimask_outputs)
        if {**named.to_dict(), "variant": "custom"} == config.to_dict():
            return named
    return config


def _check(config: ModelConfig, state_dict: Mapping[str, Tensor], published: Mapping[str, str]) -> None:
    with torch.device("meta"):
        expected = shapes(RWKVSAM(config))
    for name, parts in _stacks(config).items():
        expected |= dict.fromkeys(parts, expected.pop(name)[1:])
    if problems := name_problems(expected, state_dict, published):
        raise CheckpointError(f"the checkpoint does not fit the model. {problems}")
