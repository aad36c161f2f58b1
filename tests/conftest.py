import interpreter  # noqa: F401  before any kernel file
import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty is NaN in every test, so an element that is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device() -> str:
    """Where kernels run: on a GPU, or in Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"
