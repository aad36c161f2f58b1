"""Models on disk and on the Hugging Face Hub: `config.json` beside `model.safetensors`, loaded strictly."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
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
from .errors import CheckpointError, DeviceError
from .hub import CONFIG_FILE, WEIGHTS_FILE, download_model, no_model

Model = TypeVar("Model", bound=nn.Module)

BUNDLED = Path(__file__).parent / "weights" / "tiny"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_STORED_DTYPES = (*DTYPES, torch.float64)
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
    dtype: torch.dtype | None = None,
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
    if dtype is not None and dtype not in DTYPES:
        raise DeviceError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
    target, dtype = _check_device(device), dtype or torch.float32
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


def save_model(model: nn.Module, config: ModelConfig, folder: str | os.PathLike[str]) -> None:
    """Write the files that `load_model` reads, each one whole or not at all.

    Tensors keep their dtype. An existing model card is kept.

    Raises:
        OSError: `folder` cannot be written.
    """
    folder = Path(folder).expanduser()
    written_config = json.dumps(config.to_dict(), indent=2) + "\n"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    card = _MODEL_CARD.format(
        variant=config.variant,
        image_size=config.image_size,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        outputs="1" if not config.num_multimask_outputs else "1 + 3 for ambiguous prompts",
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / CONFIG_FILE, written_config.encode())
        _write(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt", "config": written_config}))
        if not (folder / "README.md").exists():
            _write(folder / "README.md", card.encode())
    except OSError as error:
        raise OSError(f"cannot write the model to {str(folder)!r}: {error}; use a folder you may write to") from error


def weights_sha256(model: nn.Module) -> str:
    """Return a digest of the names, shapes and float32 values of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(json.dumps([name, list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_checkpoint(config_file: Path | None, weights_file: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read a config and finite floating-point tensors.

    Args:
        config_file: File of the config; None to read it from the metadata of the weights.
        weights_file: safetensors file.

    Raises:
        CheckpointError: A file cannot be read, or its contents are not a config or finite floats.
    """
    with _open(weights_file) as file:
        metadata = file.metadata() or {}
        state_dict = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if config_file is None and "config" not in metadata:
        raise CheckpointError(f"no config for {str(weights_file)!r}: none in its metadata, no {CONFIG_FILE} beside it")
    try:
        data = json.loads(metadata["config"] if config_file is None else config_file.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"expected a JSON object, got {type(data).__name__}")
        config = ModelConfig.from_dict(data)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{config_file or f'the metadata of {weights_file}'}: {error}") from error
    check_values(state_dict, repr(str(weights_file)))
    return config, state_dict


@contextmanager
def _open(weights_file: Path) -> Iterator[Any]:
    try:
        with safe_open(weights_file, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(
            f"{str(weights_file)!r} is cut off or not a safetensors file ({error}); delete it and fetch it again, "
            "for a model from the Hub with `hf download --force-download`"
        ) from error


def check_names(model: nn.Module, state_dict: dict[str, Tensor], file: Path) -> None:
    """Raise a CheckpointError unless `state_dict` has the names and shapes of `model`."""
    if problems := name_problems(shapes(model), state_dict, {}):
        raise CheckpointError(f"{str(file)!r} does not fit its config. {problems}")


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a model's state dict by its name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def name_problems(
    expected: dict[str, tuple[int, ...]], state_dict: Mapping[str, Tensor], published: Mapping[str, str]
) -> str:
    """Return one line that lists what is wrong with a state dict, or an empty string.

    `published` replaces names of the state dict in the message.
    """
    shown = {name: published.get(name, name) for name in state_dict}
    found = {name: tuple(tensor.shape) for name, tensor in state_dict.items() if name in expected}
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(shown[name] for name in state_dict.keys() - found.keys()),
        "mis-shaped": [f"{shown[n]} (here {s}, expected {expected[n]})" for n, s in found.items() if s != expected[n]],
    }
    return "; ".join(f"{len(names)} {what}: {listed(names)}" for what, names in problems.items() if names)


def check_values(tensors: Mapping[str, Tensor], owner: str) -> None:
    """Raise a CheckpointError unless all tensors are finite and of a dtype that can be loaded.

    Args:
        tensors: Names to tensors.
        owner: Subject of the message, such as the file's name.
    """
    if odd := [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in _STORED_DTYPES]:
        raise CheckpointError(f"{owner} has tensors that are not float64, float32, float16 or bfloat16: {listed(odd)}")
    if broken := _not_finite(tensors):
        raise CheckpointError(f"{owner} holds NaN or infinite values in {listed(broken)}")


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    # aminmax returns NaN if any element is NaN, in one pass without temporaries
    return [n for n, t in tensors.items() if t.numel() and not torch.isfinite(torch.stack(t.aminmax())).all()]


def listed(names: list[str]) -> str:
    """Return the first ten names and the number of the others."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _check_device(device: str | torch.device | None) -> torch.device:
    try:
        target = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(f"unknown device {device!r}; use 'cpu', 'cuda', 'cuda:1' or 'mps'") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"device {str(device)!r}: this PyTorch ({torch.__version__}) sees no CUDA GPU; use device='cpu', "
            "or install a CUDA build of PyTorch and the driver"
        )
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device {str(device)!r}: there are only {torch.cuda.device_count()} CUDA GPUs")
    if target.type == "meta":
        raise DeviceError("device 'meta' holds no weights; use 'cpu' or 'cuda'")
    try:
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition(". ")[0]  # the rest lists every backend
        raise DeviceError(f"device {str(device)!r} cannot be used here: {reason}. Use device='cpu'.") from error
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
                "install a wheel that has them, or pass a model: RWKVSAM.from_pretrained('organization/name')"
            )
        return files
    name = os.fspath(source)
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        beside, weights = path / CONFIG_FILE, path / WEIGHTS_FILE
        if not weights.is_file():
            pickled = ", ".join(sorted(p.name for p in path.iterdir() if p.suffix in _PICKLES))
            remedy = f"; it has {pickled}, which `fastsam-rwkv convert SRC DST` can convert" if pickled else ""
            raise FileNotFoundError(f"folder {str(path)!r} has no {WEIGHTS_FILE}{remedy}")
        return (beside if beside.is_file() else None), weights
    if path.is_file():
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
    """Write a file atomically: a reader never sees part of it."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        whole = Path(folder) / file.name
        whole.write_bytes(data)
        whole.chmod(0o644)
        os.replace(whole, file)
