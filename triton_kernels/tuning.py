"""Launch settings of the kernels: committed JSON, one file a device, over a default that fits any card.

`default.json` maps an operator to its settings; `tuned_<device>.json` holds the same for one device, and whatever it
does not name comes from the default. Nothing is tuned, compiled or asked of the device at import.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
_overrides: dict[str, dict[str, int]] = {}


def device_file(device_name: str) -> Path:
    """`NVIDIA H200` to `tuned_nvidia_h200.json`."""
    return FOLDER / f"tuned_{re.sub(r'[^a-z0-9]+', '_', device_name.lower()).strip('_')}.json"


@cache
def _settings(device_name: str | None) -> dict[str, dict[str, int]]:
    settings = json.loads((FOLDER / "default.json").read_text())
    if device_name is not None and (file := device_file(device_name)).exists():
        settings |= json.loads(file.read_text())
    return settings


@cache
def _device_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


def launch_settings(op: str, device: torch.device, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes (`BLOCK_*`), `num_warps`, `num_stages` and `maxnreg` of one operator on one device.

    `<op>.float32`, where there is such an entry, holds for float32, whose products need smaller tiles.
    """
    settings = _settings(_device_name(device.index) if device.type == "cuda" else None)
    if _overrides:
        settings = settings | _overrides
    wide = f"{op}.float32"
    return settings[wide if dtype == torch.float32 and wide in settings else op]


def launch_options(settings: dict[str, int]) -> dict[str, int]:
    """Those of the settings that are Triton's own: `maxnreg` is there to keep ptxas from spilling for occupancy."""
    return {name: settings[name] for name in ("num_warps", "num_stages", "maxnreg") if name in settings}


@contextmanager
def override(settings: dict[str, dict[str, int]]) -> Iterator[None]:
    """Within the context the operators named use these settings, on any device: for tests, tuning and reports."""
    before = dict(_overrides)
    _overrides.update(settings)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def shipped_settings() -> dict[str, dict[str, dict[str, int]]]:
    """Every settings file that ships, by its name: `default` and one a tuned device."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(FOLDER.glob("*.json"))}
