"""The CUDA driver's version, and streams outside PyTorch's pool, neither of which PyTorch offers."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

import torch

NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: work on the legacy default stream does not end a capture


@cache
def _driver() -> ctypes.CDLL | None:
    """Return the driver library, or None on a machine without one."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


def driver_version() -> int:
    """Return the newest CUDA version that the driver supports, such as 12030 for 12.3; 0 without a driver."""
    driver, version = _driver(), ctypes.c_int(0)
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return 0
    return version.value


def create_stream(device: torch.device) -> torch.cuda.Stream:
    """Create a stream of `device` that nobody else has. It is never destroyed.

    `torch.cuda.Stream()` hands out 32 streams in turn, so that a worker's own stream may be the one that records a
    graph. The worker's launches would then be recorded instead of run. On ROCm the stream comes from that pool.

    Raises:
        RuntimeError: The driver refuses.
    """
    driver = _driver()
    if torch.version.hip is not None or driver is None:
        return torch.cuda.Stream(device)
    handle = ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.current_stream().query()  # makes the device's context current in this thread
        error = driver.cuStreamCreate(ctypes.byref(handle), ctypes.c_uint(NON_BLOCKING))
    if error != 0 or handle.value is None:
        raise RuntimeError(f"the CUDA driver created no stream on {device}: error {error}")
    return torch.cuda.ExternalStream(handle.value, device)
