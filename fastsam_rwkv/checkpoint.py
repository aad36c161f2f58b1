"""Models on disk and on the Hugging Face Hub: `config.json` beside `model.safetensors`, loaded strictly."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .config import ModelConfig
from .errors import CheckpointError, DeviceError, listed, short_repr, shorten
from .files import whole_file
from .for_transformers import CONFIG_KEYS, as_json, further_files
from .hub import CONFIG_FILE, WEIGHTS_FILE, download_model, no_model

Model = TypeVar("Model", bound=nn.Module)

BUNDLED = Path(__file__).parent / "weights" / "tiny"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_TENSORS = 10_000  # twice those of the largest config
_MOST_HEADER = 4 << 20  # bytes: 400 for each tensor
_MOST_CONFIG = 1 << 20
_STORED_DTYPES = (*DTYPES, torch.float64)
# torch.compile, DataParallel, FSDP, activation checkpointing, PEFT
_MARKS = re.compile(
    r"(?<![^.])(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_model\.model|base_layer)\."
)
_REMEDIES = {  # of names that stand for a value which is computed
    r"\b(?:lora_|ia3_l|hada_|lokr_|oft_|modules_to_save\.|original_module\.)": (
        "adapters that are not merged",
        "save `peft_model.merge_and_unload()`",
    ),
    r"\.parametrizations\.": (
        "parametrized tensors",
        "call torch.nn.utils.parametrize.remove_parametrizations(module, name) first",
    ),
    r"\bweight_(?:orig|mask)$": (
        "pruned or spectrally normalized tensors",
        "call torch.nn.utils.prune.remove(module, name) or torch.nn.utils.remove_spectral_norm(module) first",
    ),
    r"\bweight_[gv]$": (
        "tensors with weight normalization",
        "call torch.nn.utils.remove_weight_norm(module) first",
    ),
    r"\._packed_params\b|\.(?:scale|zero_point)$": ("quantized tensors", "save the model before it is quantized"),
}
_PICKLES = (".pth", ".pt", ".bin", ".ckpt")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)

_MODEL_CARD = """---
library_name: fastsam-rwkv
pipeline_tag: mask-generation
tags:
- segmentation
- rwkv
---

# RWKV-SAM {variant}

A promptable segmenter: an image and a click or a box in, a mask out. Trained at {image_size} pixels;
{parameters:.1f} M parameters; mask outputs: {outputs}.

```python
from fastsam_rwkv import RWKVSAM, Predictor

predictor = Predictor(RWKVSAM.from_pretrained("path/or/hub-id"))
masks, scores, low_res_logits = predictor.predict_image("photo.jpg", point_coords=[[320, 240]])
```

Architecture: [arXiv 2406.19369](https://arxiv.org/abs/2406.19369).
"""


def load_model(
    model_class: Callable[[ModelConfig], Model],
    source: str | os.PathLike[str] | None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Model:
    """Build `model_class(config)` and load its weights, in evaluation mode and without gradients.

    Stored tensors may be float64, float32, float16 or bfloat16.

    Args:
        model_class: The model's class, or another function of its config.
        source, device, dtype, revision, cache_dir, token, local_files_only: As in `RWKVSAM.from_pretrained`.

    Raises:
        CheckpointError: The files are not a model this release can load.
        DeviceError: The device or dtype cannot be used.
        FileNotFoundError: Nothing is at `source`, or this installation carries no default weights.
        HubError: The model cannot be fetched.
    """
    target = _check_device(device)
    dtype = _check_dtype(dtype, target)
    config_file, weights_file = locate(source, revision, cache_dir, token, local_files_only)
    config, state_dict = read_checkpoint(config_file, weights_file)
    with torch.device("meta"):
        model = model_class(config)
    check_names(model, state_dict, weights_file)
    # copies, because stored tensors are mapped from the file and would change with it
    copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in state_dict.items()}
    model.load_state_dict(copies, strict=True, assign=True)
    tensors = chain(model.named_parameters(), model.named_buffers())
    if unset := [name for name, tensor in tensors if tensor.is_meta]:
        raise RuntimeError(f"no checkpoint sets {listed(unset)}: buffers must be persistent or made in forward")
    model.requires_grad_(False).to(dtype=dtype)
    converted = {name: t for name, t in model.state_dict().items() if t.dtype != state_dict[name].dtype}
    if overflown := _not_finite(converted):
        remedy = "; torch.bfloat16 and torch.float32 reach further" if dtype == torch.float16 else ""
        raise CheckpointError(f"{str(weights_file)!r} holds values beyond {dtype} in {listed(overflown)}{remedy}")
    return model.to(device=target).eval()


def save_model(
    model_class: Callable[[ModelConfig], nn.Module],
    config: ModelConfig,
    state_dict: Mapping[str, Any],
    folder: str | os.PathLike[str],
) -> None:
    """Write the files that `load_model` reads, each one whole or not at all, and only if it can read them.

    Tensors keep their dtype. An existing model card is kept. Two further files and some keys of `config.json` are for
    transformers: how its processor resizes images, and which class runs the model.

    Args:
        model_class: The class that will load the files, or another function of the config.
        config: Sizes of the model.
        state_dict: Its tensors. Marks of `torch.compile`, DataParallel, FSDP and PEFT are removed from the names.
        folder: Folder to write to; made if necessary.

    Raises:
        CheckpointError: `load_model` could not read the files. Nothing is written.
        OSError: `folder` cannot be written.
    """
    folder = Path(os.path.expanduser(folder))
    written_config = json.dumps(config.to_dict(), indent=2) + "\n"
    with torch.device("meta"):
        model = model_class(_parsed(written_config, "the model's config"))
    tensors = _apart(plain_names(state_dict))
    if problems := name_problems(shapes(model), tensors, {}):
        raise CheckpointError(f"the model is not what its config describes, so that it could not be loaded. {problems}")
    check_values(tensors, "the model")
    card = _MODEL_CARD.format(
        variant=config.variant,
        image_size=config.image_size,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        outputs="1" if not config.num_multimask_outputs else "1 + 3 for ambiguous prompts",
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / CONFIG_FILE, as_json(config.to_dict() | CONFIG_KEYS))
        for name, content in further_files(config).items():
            _write(folder / name, content)
        _write(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt", "config": written_config}))
        if not (folder / "README.md").exists():
            _write(folder / "README.md", card.encode())
    except OSError as error:
        raise OSError(f"cannot write the model to {str(folder)!r}: {error}; use a folder you may write to") from error


def plain_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict without the marks that wrappers put into names, wherever they stand in them.

    Raises:
        CheckpointError: Two names become the same, or a name stands for adapters, parametrizations, pruning or
            quantization.
    """
    plain: dict[str, Any] = {}
    twice = []
    for name, tensor in state_dict.items():
        without = _MARKS.sub("", name)
        if without == "n_averaged":  # of AveragedModel
            continue
        if without in plain:
            twice.append(name)
        plain[without] = tensor
    for pattern, (what, remedy) in _REMEDIES.items():
        if found := [name for name in plain if re.search(pattern, name)]:
            raise CheckpointError(f"the model has {what}: {listed(found, 200)}; {remedy}")
    if twice:
        raise CheckpointError(f"some names occur twice, with and without a wrapper's mark: {listed(twice)}")
    return plain


def _apart(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return dense tensors on the CPU, no two of which share memory, because safetensors refuses that."""
    apart: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.is_quantized or tensor.layout != torch.strided or tensor.is_meta:
            what = f"{tensor.layout} on {tensor.device}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CheckpointError(f"{shorten(name, 80)} is not a dense tensor with values ({what}); it cannot be saved")
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        alone = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        apart[name] = tensor if alone else tensor.clone()
    return apart


def weights_sha256(model: nn.Module, dtype: torch.dtype = torch.float32) -> str:
    """Return a digest of the names and shapes of a model's parameters and buffers, and of their values in `dtype`.

    Marks of wrappers in names do not count.
    """
    digest = hashlib.sha256()
    plain = {_MARKS.sub("", name): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in sorted(plain.items()):
        digest.update(json.dumps([name, list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().to(dtype).contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_checkpoint(config_file: Path | None, weights_file: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read a config, and the tensors without looking at their values, which `check_names` does.

    Args:
        config_file: File of the config; None to read it from the metadata of the weights.
        weights_file: safetensors file.

    Raises:
        CheckpointError: A file cannot be read, or its contents are not a config or tensors.
    """
    metadata, state_dict = read_tensors(weights_file)
    if config_file is None and "config" not in metadata:
        raise CheckpointError(f"no config for {str(weights_file)!r}: none in its metadata, no {CONFIG_FILE} beside it")
    if config_file is None:
        return _parsed(metadata["config"], f"the metadata of {weights_file}"), state_dict
    with config_file.open("rb") as file:
        data = file.read(_MOST_CONFIG + 1)
    return _parsed(data, str(config_file)), state_dict


def _parsed(text: str | bytes, owner: str) -> ModelConfig:
    try:
        if len(text) > _MOST_CONFIG:
            raise ValueError(f"a config is at most {_MOST_CONFIG} bytes")
        data = json.loads(text if isinstance(text, str) else text.decode())
        if not isinstance(data, dict):
            raise ValueError(f"expected a JSON object, got {type(data).__name__}")
        return ModelConfig.from_dict(data)
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{owner}: {shorten(error, 350)}") from error


def read_tensors(weights_file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and the tensors of a safetensors file, mapped from it.

    Raises:
        CheckpointError: The file is damaged, or its header is larger than that of any model.
    """
    with _open(weights_file) as file:
        names = list(file.keys())
        if len(names) > MOST_TENSORS:
            raise CheckpointError(
                f"{str(weights_file)!r} holds {len(names)} tensors, more than the {MOST_TENSORS} of the largest model, "
                f"such as {listed(names[:3], 100)}"
            )
        return file.metadata() or {}, {name: file.get_tensor(name) for name in names}


@contextmanager
def _open(weights_file: Path) -> Iterator[Any]:
    with weights_file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
    if _MOST_HEADER < size < weights_file.stat().st_size:
        raise CheckpointError(
            f"{str(weights_file)!r} has a header of {size} bytes; a model's has at most {_MOST_HEADER}"
        )
    try:
        with safe_open(weights_file, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(
            f"{str(weights_file)!r} is cut off or not a safetensors file ({shorten(error, 80)}); delete it and "
            "fetch it again, for a model from the Hub with `hf download --force-download`"
        ) from error


def check_names(model: nn.Module, state_dict: dict[str, Tensor], file: Path) -> None:
    """Raise a CheckpointError unless `state_dict` has the names and shapes of `model`, and finite values."""
    if problems := name_problems(shapes(model), state_dict, {}):
        raise CheckpointError(f"{str(file)!r} does not fit its config. {problems}")
    check_values(state_dict, repr(str(file)))


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a model's state dict by its name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def name_problems(
    expected: dict[str, tuple[int, ...]], state_dict: Mapping[str, Tensor], published: Mapping[str, str]
) -> str:
    """Return one line that lists what is wrong with a state dict, or an empty string.

    `published` replaces names of the state dict in the message.
    """
    found = {name: tuple(tensor.shape) for name, tensor in state_dict.items() if name in expected}
    odd = [
        f"{shorten(published.get(n, n), 80)} (here {shorten(s, 80)}, expected {expected[n]})"
        for n, s in found.items()
        if s != expected[n]
    ]
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(published.get(name, name) for name in state_dict.keys() - found.keys()),
        "mis-shaped": odd,
    }
    problems = {what: names for what, names in problems.items() if names}
    return "; ".join(f"{len(names)} {what}: {listed(names, 270 // len(problems))}" for what, names in problems.items())


def check_values(tensors: Mapping[str, Tensor], owner: str) -> None:
    """Raise a CheckpointError unless all tensors are finite in float32 and of a dtype that can be loaded.

    Args:
        tensors: Names to tensors.
        owner: Subject of the message, such as the file's name.
    """
    if odd := [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in _STORED_DTYPES]:
        kinds = "float64, float32, float16 or bfloat16"
        raise CheckpointError(f"{owner} has tensors that are not {kinds}: {listed(odd, 250)}")
    if broken := _not_finite(tensors):
        raise CheckpointError(f"{owner} holds NaN or infinite values in {listed(broken)}")
    wide = {name: tensor.float() for name, tensor in tensors.items() if tensor.dtype == torch.float64}
    if broken := _not_finite(wide):
        raise CheckpointError(f"{owner} holds values beyond torch.float32 in {listed(broken)}")


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    # aminmax returns NaN if any element is NaN, in one pass without temporaries
    return [n for n, t in tensors.items() if t.numel() and not torch.isfinite(torch.stack(t.aminmax())).all()]


def _check_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float32
    if isinstance(dtype, str):
        if dtype == "auto":
            return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
        dtype = {str(known).removeprefix("torch."): known for known in DTYPES}.get(dtype, dtype)
    if dtype not in DTYPES:
        raise DeviceError(f"dtype must be 'auto' or one of {', '.join(map(str, DTYPES))}, got {short_repr(dtype)}")
    assert isinstance(dtype, torch.dtype)
    return dtype


def multiplies_bfloat16(device: torch.device) -> bool:
    """True if a device has instructions for products of bfloat16, with which it is faster than in float32.

    CPUs are known by Linux's names for AMX and AVX-512; other systems count as without.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return re.search(r"\b(?:amx_bf16|avx512_bf16)\b", flags) is not None


def _check_device(device: str | torch.device | None) -> torch.device:
    try:
        target = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(f"unknown device {short_repr(device)}; use 'cpu', 'cuda', 'cuda:1' or 'mps'") from error

    def unusable(problem: str, remedy: str = "") -> DeviceError:
        texts = (f"device {str(device)!r}{problem}; use {cpu}{remedy}" for cpu in ("device='cpu'", "--device cpu"))
        return DeviceError(*texts)

    if target.type == "cuda" and not torch.cuda.is_available():
        build = f": this PyTorch ({torch.__version__}) sees no CUDA GPU"
        raise unusable(build, ", or install a CUDA build of PyTorch and the driver")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device {str(device)!r}: there are only {torch.cuda.device_count()} CUDA GPUs")
    if target.type == "meta":
        raise DeviceError("device 'meta' holds no weights; use 'cpu' or 'cuda'")
    try:
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition(". ")[0]  # the rest lists every backend
        raise unusable(f" cannot be used here: {reason}") from error
    return target


def locate(
    source: str | os.PathLike[str] | None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> tuple[Path | None, Path]:
    """Return the config and weights files of a source, and download them if necessary.

    The config file is None if the config is in the metadata of the weights. Local files take precedence over the Hub.
    For a single file its metadata takes precedence over a `config.json` beside it, which may belong to another model;
    in a folder `config.json` does.
    """
    if source is None:
        files = BUNDLED / CONFIG_FILE, BUNDLED / WEIGHTS_FILE
        if missing := [str(file) for file in files if not file.is_file()]:
            raise FileNotFoundError(
                f"this installation carries no default weights (missing: {', '.join(missing)}); "
                "install a wheel that has them, or name a model: a folder, a file or a Hub id"
            )
        return files
    name = os.fspath(source)
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):  # False for a name that cannot be one, where pathlib raises
        beside, weights = path / CONFIG_FILE, path / WEIGHTS_FILE
        if not weights.is_file():
            pickled = ", ".join(sorted(p.name for p in path.iterdir() if p.suffix in _PICKLES))
            remedy = f"; it has {pickled}, which `fastsam-rwkv convert SRC DST` can convert" if pickled else ""
            raise FileNotFoundError(f"folder {str(path)!r} has no {WEIGHTS_FILE}{remedy}")
        return (beside if beside.is_file() else None), weights
    if os.path.isfile(path):
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{str(path)!r} is not a .safetensors file; run `fastsam-rwkv convert SRC DST`")
        beside = path.with_name(CONFIG_FILE)
        with _open(path) as file:
            inside = "config" in (file.metadata() or {})
        return (None if inside or not beside.is_file() else beside), path
    is_path = isinstance(source, os.PathLike) or name.endswith((".safetensors", *_PICKLES))
    if is_path or not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(no_model(name))
    return download_model(name, revision, cache_dir, token, local_files_only)


def _write(file: Path, data: bytes) -> None:
    with whole_file(file) as stream:
        stream.write(data)
