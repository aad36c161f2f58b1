"""Launches with settings of a test, for the device or for the emulated architecture."""

from dataclasses import replace

import interpreter
import torch

from fastsam_rwkv.triton_kernels.launch_config import LaunchConfig, Settings, launch_config
from fastsam_rwkv.triton_kernels.operator import Operator


def config_of(device: torch.device | str, settings: dict[str, Settings] | None = None, **changes: int) -> LaunchConfig:
    """Configuration of `device` in which `settings` replace those of the operators they name."""
    config = launch_config(torch.device(device)).with_settings(settings or {})
    if interpreter.EMULATED_ARCH:
        config = replace(config, arch=interpreter.EMULATED_ARCH)
    return replace(config, **changes)


def launch(operator: Operator, *args, settings: dict[str, Settings] | None = None, changes=None, **kwargs):
    """Launch the kernels of an operator; `changes` replace fields of the launch configuration."""
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    return operator.launcher(*args, config=config_of(device, settings, **(changes or {})), **kwargs)
