"""Model files from the Hugging Face Hub, and what can go wrong on the way, in words."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


class HubError(OSError):
    """A model could not be fetched: no such model, no access, no connection, or no room in the cache."""


def no_model(name: str) -> str:
    """What to say when nothing is where `name` points."""
    return (
        f"no model at {name!r}: expected a folder with {WEIGHTS_FILE}, a .safetensors file, "
        "or a Hub id like 'organisation/name'"
    )


def download_model(
    repo: str,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    token: str | bool | None,
    local_files_only: bool,
) -> tuple[Path, Path]:
    """The config and weights files of one commit, in huggingface_hub's cache.

    Raises:
        HubError: the model, the Hub or the cache cannot be reached; the message says which, and the remedy.
        FileNotFoundError: `repo` is not a Hub id.
    """
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
        raise HubError(f"{repo!r} has no revision {revision or 'main'!r} on the Hub") from error
    except errors.LocalEntryNotFoundError as error:
        if local_files_only or constants.HF_HUB_OFFLINE:
            raise HubError(
                f"{name} of {where} is not in the cache, and the network may not be used "
                "(local_files_only or HF_HUB_OFFLINE); load it once while online"
            ) from error
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise HubError(_rejection(name, where, error.__cause__)) from error
        raise HubError(
            f"{name} of {where} is not in the cache, and the Hub at {constants.ENDPOINT} cannot be reached: "
            f"{_root(error)}. Check the connection, proxy settings or HF_ENDPOINT."
        ) from error
    except errors.EntryNotFoundError as error:
        raise HubError(f"{where} has no {name}: it is not a fastsam-rwkv model") from error
    except errors.HFValidationError as error:
        raise FileNotFoundError(f"{no_model(repo)}. {error}") from error
    except errors.LocalTokenNotFoundError as error:
        raise HubError(f"token=True, but there is no login here: pass the token itself, or log in ({error})") from error
    except errors.HfHubHTTPError as error:
        raise HubError(_rejection(name, where, error)) from error
    except (OSError, RuntimeError) as error:
        # only the machine's own errors have a number: the rest are the network's
        if isinstance(error, OSError) and error.errno and not isinstance(error, (ConnectionError, TimeoutError)):
            raise HubError(
                f"cannot write {where} to the cache {str(cache or constants.HF_HUB_CACHE)!r}: {error}. "
                "Pass cache_dir=... or set HF_HOME to a folder that you may write to and that has room."
            ) from error
        raise HubError(f"downloading {name} of {where} failed: {_root(error)}. Try again.") from error
    except Exception as error:
        # connections that break half way surface as the HTTP library's own exceptions, which differ between releases
        if type(error).__module__.split(".")[0].rstrip("0123456789") not in ("httpx", "httpcore", "requests", "urllib"):
            raise
        raise HubError(
            f"the connection broke while downloading {name} of {where}: {_root(error)}. Try again."
        ) from error


def _rejection(name: str, where: str, error: HfHubHTTPError) -> str:
    status = None if error.response is None else error.response.status_code
    remedy = "the token was refused: pass another one, or log in again" if status in (401, 403) else "try again later"
    return f"the Hub did not give out {name} of {where}, {remedy}: {' '.join(str(error).split())}"


def _root(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"
