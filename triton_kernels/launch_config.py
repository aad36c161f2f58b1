"""Launch settings of the kernels: committed JSON, one file a device, over a default that fits any card.

`default.json` maps an operator to its settings; `tuned_<device>.json` holds the same for one device, under `device` its
architecture, and whatever it does not name comes from the default. Nothing is tuned, compiled or asked of the device at
import.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from ._triton import CAN_OVERLAP

FOLDER = Path(__file__).parent
LARGE = 1 << 22  # three images of 1024 x 1024 pixels with the 384 channels of model small
_overrides: dict[str, dict[str, int]] = {}
_assumed_architecture: int | None = None


def device_file(device_name: str) -> Path:
    """`NVIDIA H200` to `tuned_nvidia_h200.json`."""
    return FOLDER / f"tuned_{re.sub(r'[^a-z0-9]+', '_', device_name.lower()).strip('_')}.json"


@cache
def _settings(device_name: str | None) -> dict[str, dict[str, int]]:
    return _default() | ({} if device_name is None else tuned_settings(device_name))


def _default() -> dict[str, dict[str, int]]:
    settings: dict[str, dict[str, int]] = json.loads((FOLDER / "default.json").read_text())
    return settings


def tuned_settings(device_name: str) -> dict[str, dict[str, int]]:
    """What a device's file holds, without what does not say all that this release asks for: it may be of another."""
    file = device_file(device_name)
    if not file.exists():
        return {}
    tuned, default = json.loads(file.read_text()), _default()
    old = {op for op in tuned.keys() - {"device"} if op not in default or default[op].keys() - tuned[op].keys()}
    if old:
        warnings.warn(
            f"{file} was written for another release: {', '.join(sorted(old))} as the default has it. Tune again with "
            "`python -m benchmarks.kernels.tune`, or remove the file.",
            stacklevel=2,
        )
    return {op: settings for op, settings in tuned.items() if op not in old}


@cache
def _device_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


def launch_settings(op: str, device: torch.device, dtype: torch.dtype, values: int = 0) -> dict[str, int]:
    """Tile sizes (`BLOCK_*`), `num_warps`, `num_stages` and `maxnreg` of one operator on one device.

    `<op>.float32`, where there is such an entry, holds for float32, whose products need smaller tiles; `<op>.large`
    for outputs of so many `values` that a GPU is full even with larger tiles, which have less to do for each value.
    """
    settings = _settings(_device_name(device.index) if device.type == "cuda" else None)
    if _overrides:
        settings = settings | _overrides
    special = f"{op}.float32" if dtype == torch.float32 else f"{op}.large" if values >= LARGE else op
    return settings[special if special in settings else op]


def launch_options(settings: dict[str, int], device: torch.device) -> dict[str, int]:
    """Those of the settings that are Triton's own: `maxnreg` is there to keep ptxas from spilling for occupancy.

    Multiplication and addition are fused, as is Triton's default up to 3.9 and will not be from 3.10 on. From Hopper on
    a kernel overlaps the one before it, for which it has an argument OVERLAP (CUDA's programmatic dependent launch).
    """
    own = {name: settings[name] for name in ("num_warps", "num_stages", "maxnreg") if name in settings}
    overlap = CAN_OVERLAP and architecture(device) >= 90
    return own | {"enable_fp_fusion": True, "OVERLAP": overlap} | ({"launch_pdl": True} if overlap else {})


def architecture(device: torch.device) -> int:
    """Compute capability as in sm_90; 0 for what is not an NVIDIA card."""
    if _assumed_architecture is not None:
        return _assumed_architecture
    return _capability(device.index) if device.type == "cuda" and torch.version.hip is None else 0


@cache
def _capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def multiprocessors(device: torch.device) -> int:
    """Those of the device, or of an H200 for what is meant for a card that is not there."""
    return _multiprocessors(device.index) if device.type == "cuda" else 132


@cache
def _multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@contextmanager
def assume_architecture(arch: int) -> Iterator[None]:
    """Within the context kernels are meant for it, whatever device tensors are on: for what compiles without a card."""
    global _assumed_architecture
    before, _assumed_architecture = _assumed_architecture, arch
    try:
        yield
    finally:
        _assumed_architecture = before


def block_that_divides(size: int, block: int) -> int:
    """The block, or where only that divides the size a half, or of 256 and more a quarter: 192 as three times 64."""
    parts = (block, block // 2, block // 4) if block >= 256 else (block, block // 2)
    return next((part for part in parts if size % part == 0), block)


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
