"""Records beside the times of the GPU suite: versions, commit, clocks and power."""

from __future__ import annotations

import contextlib
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

# Queried from nvidia-smi
VERSIONS = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
STATE = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
CUBLAS = ("nvidia-cublas", "nvidia-cublas-cu13", "nvidia-cublas-cu12")  # packages of PyTorch's builds


def triton_key() -> str:
    """Return the key of Triton's sources and compiler: caches of another one are of no use."""
    try:
        from triton.runtime.cache import triton_key as key
    except ImportError:  # Triton 3.4 to 3.6
        from triton.compiler.compiler import triton_key as key
    return str(key())


def smi(fields: tuple[str, ...], device: int = 0) -> dict[str, str]:
    """Ask nvidia-smi for fields of a GPU; an empty dict if there is none."""
    command = ["nvidia-smi", f"--id={device}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in output.strip().split(",")), strict=False))


def software(root: Path) -> dict[str, str]:
    """Return versions of CUDA's libraries and of Triton's compiler, and the commit of `root`."""
    found = {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    for package in CUBLAS:
        try:
            found["cublas"] = version(package)
        except PackageNotFoundError:
            continue
        break
    with contextlib.suppress(ImportError):  # no Triton; its version is recorded as None
        found["triton_key"] = triton_key()
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return found | {"commit": git.stdout.strip() or "unknown"}
