import os

import interpreter  # before any kernel file
import pytest
import torch
from exports import Exports


def pytest_configure():
    """Divide the cores among the worker processes and the programs that tests start."""
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
        threads = max(1, (os.cpu_count() or 1) // workers)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill torch.empty with NaN in every test, so that an element that is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def float32_is_float32():
    """Turn off tf32 in cuDNN, because the error of eager PyTorch sets the tests' bounds."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="session", autouse=True)
def compiled_and_emulated():
    """Run kernels in the PTX emulator if FASTSAM_RWKV_EMULATE names an architecture."""
    if not interpreter.EMULATED_ARCH:
        yield
        return
    from tests.ptx.emulator import emulated

    with emulated(interpreter.EMULATED_ARCH):
        yield


@pytest.fixture
def device() -> str:
    """Return the device kernels run on: CUDA, or the CPU for Triton's interpreter and the PTX emulator."""
    return "cuda" if torch.cuda.is_available() and not interpreter.EMULATED_ARCH else "cpu"


@pytest.fixture(scope="session")
def exports(tmp_path_factory) -> Exports:
    """Return exported folders of a small model, each made once at first use and shared by all processes."""
    root = tmp_path_factory.getbasetemp()
    return Exports((root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "exports")
