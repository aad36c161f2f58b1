"""Launch settings of the kernels, and what launchers must know of the GPU.

`default.json` maps each operator to settings that fit any card. `tuned_<device>.json` replaces entries of it on one
device; its entry `device` holds the architecture. Importing this module reads no file and queries no device.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from ..errors import shorten
from ._triton import CAN_OVERLAP
from .cuda_driver import driver_version

Settings = dict[str, int]
FOLDER = Path(__file__).parent
LARGE = 1 << 22  # values; one image of 1024 x 1024 pixels gives 1.6 million in model small
OVERLAP_ARCH = 90  # programmatic dependent launch exists from Hopper on
OVERLAP_DRIVER = 12030  # and is recorded in CUDA graphs from CUDA 12.3 on
_refused: set[torch.device] = set()  # devices whose driver refused an overlapping launch


@dataclass(frozen=True)
class LaunchConfig:
    """Launch settings of every operator for one GPU. Launchers look it up, or take it as the keyword `config`.

    Attributes:
        settings: Tile sizes, `num_warps`, `num_stages` and `maxnreg` by operator. `<op>.float32` replaces `<op>` in
            float32, and `<op>.large` replaces it for large outputs in half precision.
        arch: Compute capability, 90 for sm_90; 0 without an NVIDIA GPU.
        sms: Number of SMs; 132 (H200) when compiling without a GPU.
        large: Values of a large output.
        overlap: Overlap launches where the architecture can.
    """

    settings: Mapping[str, Settings]
    arch: int = 0
    sms: int = 132
    large: int = LARGE
    overlap: bool = True

    @property
    def overlaps(self) -> bool:
        """True if a launch may start before the previous one ends: programmatic dependent launch."""
        return self.overlap and CAN_OVERLAP and self.arch >= OVERLAP_ARCH

    def without_overlap(self) -> LaunchConfig:
        """Return a copy whose launches do not overlap."""
        return replace(self, overlap=False)

    def settings_for(self, op: str, dtype: torch.dtype, values: int = 0) -> Settings:
        """Settings of an operator for `dtype` and an output of `values` values."""
        special = f"{op}.float32" if dtype == torch.float32 else f"{op}.large" if values >= self.large else op
        return self.settings[special if special in self.settings else op]

    def options(self, settings: Settings) -> dict[str, int]:
        """Keyword arguments of a launch: Triton's own settings, and OVERLAP."""
        own = {name: settings[name] for name in ("num_warps", "num_stages", "maxnreg") if name in settings}
        pdl = {"launch_pdl": True} if self.overlaps else {}  # Triton 3.4 does not know it
        # Triton fuses multiplication and addition by default up to 3.9, and not from 3.10
        return own | {"enable_fp_fusion": True, "OVERLAP": self.overlaps} | pdl

    def with_settings(self, settings: Mapping[str, Settings]) -> LaunchConfig:
        """Return a copy in which `settings` replace those of the operators they name."""
        return replace(self, settings={**self.settings, **settings})


@cache
def launch_config(device: torch.device) -> LaunchConfig:
    """Configuration of a device: tuned settings if there is a file for it, else the default."""
    if device.type != "cuda":
        return LaunchConfig(default_settings())
    properties = torch.cuda.get_device_properties(device)
    arch = 0 if torch.version.hip is not None else 10 * properties.major + properties.minor
    settings = default_settings() | tuned_settings(torch.cuda.get_device_name(device))
    overlap = driver_version() >= OVERLAP_DRIVER and device not in _refused
    return LaunchConfig(settings, arch, properties.multi_processor_count, overlap=overlap)


def stop_overlap(device: torch.device, error: Exception) -> None:
    """Launch without overlap on `device` from now on, because its driver refused."""
    _refused.add(device)
    launch_config.cache_clear()
    warnings.warn(
        f"{device} refuses programmatic dependent launch ({shorten(error, 300)}); launches no longer overlap, "
        "which is slower",
        RuntimeWarning,
        stacklevel=2,
    )


def default_settings(folder: Path = FOLDER) -> dict[str, Settings]:
    """Settings of `default.json`."""
    settings: dict[str, Settings] = json.loads((folder / "default.json").read_text())
    return settings


def tuned_settings(device_name: str, folder: Path = FOLDER) -> dict[str, Settings]:
    """Settings of a device's file, without entries that lack a setting of this release; they warn."""
    file = folder / device_file(device_name).name
    if not file.exists():
        return {}
    tuned, default = json.loads(file.read_text()), default_settings(folder)
    old = {op for op in tuned.keys() - {"device"} if op not in default or default[op].keys() - tuned[op].keys()}
    if old:
        warnings.warn(
            f"{file} was written for another release: {', '.join(sorted(old))} use the default settings. "
            "Tune again with `python -m benchmarks.kernels.tune`, or remove the file.",
            stacklevel=2,
        )
    return {op: settings for op, settings in tuned.items() if op not in old}


def device_file(device_name: str) -> Path:
    """Path of a device's settings file: `tuned_nvidia_h200.json` for `NVIDIA H200`."""
    return FOLDER / f"tuned_{re.sub(r'[^a-z0-9]+', '_', device_name.lower()).strip('_')}.json"


def shipped_settings(folder: Path = FOLDER) -> dict[str, dict[str, Settings]]:
    """Every settings file by its name: `default`, and one for each tuned device."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}


def block_that_divides(size: int, block: int) -> int:
    """Return `block`, or the half of it (or the quarter, from 256 on) that divides `size` if `block` does not."""
    parts = (block, block // 2, block // 4) if block >= 256 else (block, block // 2)
    return next((part for part in parts if size % part == 0), block)
