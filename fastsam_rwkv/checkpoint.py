"""Models on disk and on the Hugging Face Hub: `config.json` beside `model.safetensors`, loaded strictly."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .config import ModelConfig

if TYPE_CHECKING:
    from .model import RWKVSAM

    Model = TypeVar("Model", bound=RWKVSAM)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
BUNDLED = Path(__file__).parent / "weights" / "tiny"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")

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
from fastsam_rwkv import RWKVSAM

model = RWKVSAM.from_pretrained("path/or/hub-id")
masks, scores, low_res_logits = model.predict("photo.jpg", point_coords=[[320, 240]])
```

Architecture: [arXiv 2406.19369](https://arxiv.org/abs/2406.19369).
"""


class CheckpointError(ValueError):
    """The files are there, but they are not a model this release can load."""


class HubError(OSError):
    """A model could not be fetched: no such model, no access, no connection, or no room in the cache."""


def load_model(
    model_class: Callable[[ModelConfig], Model],
    source: str | os.PathLike[str] | None,
    *,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    token: str | bool | None,
    local_files_only: bool,
) -> Model:
    """See `RWKVSAM.from_pretrained`."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
    target = _check_device(device)
    config_file, weights_file = locate(source, revision, cache_dir, token, local_files_only)
    config, state_dict = read_checkpoint(config_file, weights_file)
    with torch.device("meta"):
        model = model_class(config)
    _check_names(model, state_dict, weights_file)
    state_dict = {name: tensor.float() for name, tensor in state_dict.items()}
    model.load_state_dict(state_dict, strict=True, assign=True)
    model.requires_grad_(False)
    return model.to(device=target, dtype=dtype or torch.float32).eval()


def save_model(model: RWKVSAM, folder: str | os.PathLike[str]) -> None:
    """See `RWKVSAM.save_pretrained`. An existing model card is kept."""
    folder = Path(folder)
    config = json.dumps(model.config.to_dict(), indent=2) + "\n"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    card = _MODEL_CARD.format(
        variant=model.config.variant,
        image_size=model.config.image_size,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        outputs="1" if not model.config.num_multimask_outputs else "1 + 3 for ambiguous prompts",
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / CONFIG_FILE, config.encode())
        _write(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt", "config": config}))
        if not (folder / "README.md").exists():
            _write(folder / "README.md", card.encode())
    except OSError as error:
        raise OSError(
            f"cannot write the model to {str(folder)!r}: {error}. Choose a folder you may write to."
        ) from error


def read_checkpoint(config_file: Path | None, weights_file: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config (from its own file, or else from the weights' metadata) and the tensors, which are finite floats."""
    try:
        with safe_open(weights_file, framework="pt") as file:
            metadata = file.metadata() or {}
            state_dict = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(
            f"{str(weights_file)!r} is cut off or not a safetensors file ({error}); delete it and fetch it again"
        ) from error
    config = _read_config(config_file, metadata, weights_file)
    if odd := [f"{name} ({tensor.dtype})" for name, tensor in state_dict.items() if tensor.dtype not in DTYPES]:
        raise CheckpointError(f"{str(weights_file)!r} holds tensors that are not floating point: {_listed(odd)}")
    if broken := [name for name, tensor in state_dict.items() if not torch.isfinite(tensor).all()]:
        raise CheckpointError(f"{str(weights_file)!r} holds NaN or infinite values in {_listed(broken)}")
    return config, state_dict


def _read_config(config_file: Path | None, metadata: dict[str, str], weights_file: Path) -> ModelConfig:
    if config_file is not None:
        name, text = str(config_file), config_file.read_text(encoding="utf-8")
    elif "config" in metadata:
        name, text = f"the metadata of {weights_file}", metadata["config"]
    else:
        raise CheckpointError(
            f"no config for {str(weights_file)!r}: neither in its metadata nor {CONFIG_FILE} beside it"
        )
    try:
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError(f"expected a JSON object, got {type(data).__name__}")
        return ModelConfig.from_dict(data)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{name}: {error}") from error


def _check_names(model: nn.Module, state_dict: dict[str, Tensor], file: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    misshaped = [
        f"{name} (here {tuple(tensor.shape)}, expected {expected[name]})"
        for name, tensor in state_dict.items()
        if name in expected and tuple(tensor.shape) != expected[name]
    ]
    problems = name_problems(expected.keys() - state_dict.keys(), state_dict.keys() - expected.keys(), misshaped)
    if problems:
        raise CheckpointError(f"{str(file)!r} does not fit its config. {problems}")


def name_problems(missing: set[str], unexpected: set[str], misshaped: list[str]) -> str:
    """One line that lists what is wrong with a state dict; empty when nothing is."""
    groups = (("missing", sorted(missing)), ("unexpected", sorted(unexpected)), ("mis-shaped", misshaped))
    return "; ".join(f"{len(names)} {what}: {_listed(names)}" for what, names in groups if names)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _check_device(device: str | torch.device | None) -> torch.device:
    try:
        target = torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}; use 'cpu', 'cuda', 'cuda:1' or 'mps'") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {str(device)!r}: this PyTorch ({torch.__version__}) sees no CUDA GPU; use device='cpu', "
            "or install a CUDA build of PyTorch and the driver"
        )
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {str(device)!r}: there are only {torch.cuda.device_count()} CUDA GPUs")
    return target


def locate(
    source: str | os.PathLike[str] | None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> tuple[Path | None, Path]:
    """Config and weights files of a source; the config may be in the weights' metadata."""
    if source is None:
        if not (BUNDLED / WEIGHTS_FILE).is_file():
            raise FileNotFoundError(
                f"this installation carries no default weights ({BUNDLED / WEIGHTS_FILE} is missing); "
                "install a wheel that has them, or pass a model: RWKVSAM.from_pretrained('organisation/name')"
            )
        return BUNDLED / CONFIG_FILE, BUNDLED / WEIGHTS_FILE
    path = Path(source).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{str(path)!r} is not a .safetensors file; convert it with `fastsam-rwkv convert SRC DST`"
            )
        beside = path.with_name(CONFIG_FILE)
        return (beside if beside.is_file() else None), path
    name = os.fspath(source)
    is_path = isinstance(source, os.PathLike) or name.endswith(".safetensors") or not _HUB_ID.fullmatch(name)
    if is_path:
        raise FileNotFoundError(
            f"no model at {name!r}: expected a folder with {WEIGHTS_FILE}, a .safetensors file, "
            "or a Hub id like 'organisation/name'"
        )
    return _from_hub(name, revision, cache_dir, token, local_files_only)


def _in_folder(folder: Path) -> tuple[Path | None, Path]:
    config, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    if not weights.is_file():
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".pth", ".pt", ".bin", ".ckpt"))
        remedy = f"; it has {', '.join(pickled)}, which `fastsam-rwkv convert SRC DST` can convert" if pickled else ""
        raise FileNotFoundError(f"folder {str(folder)!r} has no {WEIGHTS_FILE}{remedy}")
    return (config if config.is_file() else None), weights


def _from_hub(
    repo: str,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    token: str | bool | None,
    local_files_only: bool,
) -> tuple[Path, Path]:
    from huggingface_hub import constants, errors, hf_hub_download  # here: `import fastsam_rwkv` stays quick

    cache = None if cache_dir is None else os.fspath(cache_dir)
    where = f"{repo!r}" + (f" at revision {revision!r}" if revision else "")

    def download(name: str, at: str | None) -> Path:
        return Path(
            hf_hub_download(repo, name, revision=at, cache_dir=cache, token=token, local_files_only=local_files_only)
        )

    name = CONFIG_FILE
    try:
        config = download(CONFIG_FILE, revision)
        name = WEIGHTS_FILE
        # the commit the config came from: a branch may move between the two requests
        return config, download(WEIGHTS_FILE, config.parent.name)
    except errors.GatedRepoError as error:
        raise HubError(f"{where} is gated: accept its terms on the Hub, then pass token=... or log in") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"the Hub has no model {repo!r}, or it is private: check the id, or pass token=... "
            "(a folder of that name is not here either)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repo!r} has no revision {revision!r} on the Hub") from error
    except errors.LocalEntryNotFoundError as error:
        if local_files_only or constants.HF_HUB_OFFLINE:
            raise HubError(
                f"{name} of {where} is not in the cache, and the network may not be used "
                "(local_files_only or HF_HUB_OFFLINE); load it once while online"
            ) from error
        raise HubError(
            f"{name} of {where} is not in the cache, and the Hub at {constants.ENDPOINT} cannot be reached: "
            f"{_root(error)}. Check the connection, proxy settings or HF_ENDPOINT."
        ) from error
    except errors.EntryNotFoundError as error:
        raise HubError(f"{where} has no {name}: it is not a fastsam-rwkv model") from error
    except errors.HFValidationError as error:
        raise ValueError(f"{repo!r} is neither an existing path nor a Hub id: {error}") from error
    except OSError as error:
        if error.filename is not None and not isinstance(error, errors.HfHubHTTPError):
            cache = cache or constants.HF_HUB_CACHE
            raise HubError(
                f"cannot write {where} to the cache {str(cache)!r}: {error}. "
                "Pass cache_dir=... or set HF_HOME to a folder you may write to."
            ) from error
        raise HubError(f"downloading {name} of {where} failed: {_root(error)}. Try again.") from error
    except Exception as error:
        # connections that break half way surface as the HTTP library's own exceptions, which differ between releases
        if type(error).__module__.split(".")[0].rstrip("0123456789") not in ("httpx", "httpcore", "requests", "urllib"):
            raise
        raise HubError(
            f"the connection broke while downloading {name} of {where}: {_root(error)}. Try again; it resumes."
        ) from error


def _root(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def _write(file: Path, data: bytes) -> None:
    """All or nothing: a reader never sees half a file."""
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as temporary:
        temporary.write(data)
    os.chmod(temporary.name, 0o644)
    os.replace(temporary.name, file)
