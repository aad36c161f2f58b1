import os

import interpreter  # before any kernel file
import pytest
import torch
from exports import Exports


def pytest_configure():
    """Processes beside each other share the cores, and so do the programs that tests start."""
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
        threads = max(1, (os.cpu_count() or 1) // workers)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty is NaN in every test, so an element that is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def float32_is_float32():
    """cuDNN rounds float32 to tf32 by default: bounds set by what eager PyTorch errs would be loose with that."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="session", autouse=True)
def compiled_and_emulated():
    """What FASTSAM_RWKV_EMULATE asks for."""
    if not interpreter.EMULATED_ARCH:
        yield
        return
    from tests.ptx.emulator import emulated

    with emulated(interpreter.EMULATED_ARCH):
        yield


@pytest.fixture
def device() -> str:
    """Where kernels run: on a GPU, in Triton's interpreter, or compiled and emulated."""
    return "cuda" if torch.cuda.is_available() and not interpreter.EMULATED_ARCH else "cpu"


@pytest.fixture(scope="session")
def exports(tmp_path_factory) -> Exports:
    """Exported folders of a small model, each made when it is first asked for, for all processes."""
    root = tmp_path_factory.getbasetemp()
    return Exports((root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "exports")
