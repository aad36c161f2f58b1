"""Cost and dependencies of `import fastsam_rwkv`."""

import subprocess
import sys

import pytest

import fastsam_rwkv


def run(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_needs_no_triton_and_no_heavy_library():
    code = "import sys; sys.modules['triton'] = None; from fastsam_rwkv import RWKVSAM; print(*sys.modules)"
    loaded = set(run(code).split())
    assert not loaded & {"huggingface_hub", "transformers", "torchvision", "torch._dynamo", "scipy"}


def test_import_adds_less_than_half_to_torch():
    """Compare the import with that of torch in one process; the best of three, because machines are noisy."""
    code = (
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); "
        "from fastsam_rwkv import RWKVSAM, Predictor; "
        "print((time.perf_counter() - b) / (b - a))"
    )
    assert any(float(run(code)) < 0.5 for _ in range(3))


def test_errors_config_and_prediction_need_no_torch():
    """Exported models run without torch, and `fastsam-rwkv --help` does not wait for it."""
    names = "Prediction", "ModelConfig", "PromptError", "__version__"
    loaded = run(f"import sys, fastsam_rwkv; [getattr(fastsam_rwkv, n) for n in {names}]; print(*sys.modules)").split()
    assert "torch" not in loaded and "fastsam_rwkv" in loaded
    with pytest.raises(AttributeError, match="no attribute 'Model'"):
        _ = fastsam_rwkv.Model
    assert set(fastsam_rwkv.__all__) <= set(dir(fastsam_rwkv))
    assert all(hasattr(fastsam_rwkv, name) for name in fastsam_rwkv.__all__)


def test_the_kernels_folder_refuses_another_name():
    code = (
        "import importlib.util, fastsam_rwkv.triton_kernels as k; "
        "spec = importlib.util.spec_from_file_location('triton_kernels', k.__file__); "
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError" in result.stderr and "fastsam_rwkv.triton_kernels" in result.stderr
