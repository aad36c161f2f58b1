"""HTTP server for many clients: FastAPI, with encodings and prompts of all clients in batches.

`create_app(model)` returns the application, and `fastsam-rwkv serve` runs it. Needs the extra `serve`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .app import create_app
    from .settings import Settings

__all__ = ["Settings", "create_app"]

_MODULES = {"Settings": "settings", "create_app": "app"}  # imported at first access: the command needs no FastAPI


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
