"""Model files from the Hugging Face Hub."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from .errors import HubError, short_repr

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def no_model(name: str) -> str:
    """Return the message for a `name` at which there is no model."""
    return (
        f"no model at {short_repr(name)}: expected a folder with {WEIGHTS_FILE}, a .safetensors file, "
        "or a Hub id like 'organization/name'"
    )


def download_model(
    repo: str,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    token: str | bool | None,
    local_files_only: bool,
) -> tuple[Path, Path]:
    """Return the config and weights files of one commit, in huggingface_hub's cache.

    Raises:
        HubError: The model, the Hub or the cache cannot be reached.
        FileNotFoundError: `repo` is not a Hub id.
    """
    from huggingface_hub import constants, errors, hf_hub_download  # here: `import fastsam_rwkv` stays fast

    cache = None if cache_dir is None else os.path.expanduser(cache_dir)
    model = f"{repo!r}" + (f" at revision {revision!r}" if revision else "")

    download = partial(hf_hub_download, repo, cache_dir=cache, token=token, local_files_only=local_files_only)
    name = CONFIG_FILE
    try:
        config = Path(download(name, revision=revision))
        name = WEIGHTS_FILE
        return config, Path(download(name, revision=config.parent.name))  # of one commit: a branch may move in between
    except errors.HFValidationError as error:
        raise FileNotFoundError(f"{no_model(repo)}. {error}") from error
    except errors.LocalEntryNotFoundError as error:
        if local_files_only or constants.HF_HUB_OFFLINE:
            raise HubError(
                f"{name} of {model} is not in the cache, and the network is turned off "
                "(local_files_only or HF_HUB_OFFLINE); load the model once while online"
            ) from error
        raise HubError(
            f"{name} of {model} is not in the cache, and the Hub at {constants.ENDPOINT} did not send it: "
            f"{_one_line(_root(error))}. Check the connection, proxy settings or HF_ENDPOINT, and try again."
        ) from error
    except errors.EntryNotFoundError as error:
        raise HubError(f"{model} has no {name}: it is not a fastsam-rwkv model") from error
    except MemoryError:
        raise
    except Exception as error:  # the HTTP library's own types, which differ between releases, among them
        raise HubError(
            f"cannot download {name} of {model}: {_one_line(error)}. If the network failed, try again."
        ) from error


def _root(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _root(error.__cause__)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(".")
