"""The package without its source files, as PyInstaller and `.pyc`-only installations have it."""

import compileall
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastsam_rwkv
from fastsam_rwkv.triton_kernels.operator import HAS_TRITON, why_no_kernels

SOURCE = Path(fastsam_rwkv.__file__).parent

CODE = """
import sys
sys.path.insert(0, "tests")
import torch
import fastsam_rwkv
from fastsam_rwkv import ModelConfig, RWKVSAM
from fastsam_rwkv.triton_kernels.operator import HAS_TRITON, why_no_kernels
torch.manual_seed(0)
config = ModelConfig("custom", stem_dim=8, stage1_dim=8, stage2_dim=16, embed_dim=36, depth=1)
model = RWKVSAM(config).eval()
low, iou = model(torch.ones(1, 3, 64, 64), boxes=torch.tensor([[1.0, 2.0, 30.0, 40.0]]))
print(fastsam_rwkv.__file__, HAS_TRITON, low.double().sum().item(), why_no_kernels(), sep="|")
"""


def run(folder):
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    result = subprocess.run([sys.executable, "-c", CODE], cwd=folder, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().split("|")


@pytest.fixture
def compiled(tmp_path):
    copy = tmp_path / "fastsam_rwkv"
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("weights", "__pycache__"))
    assert compileall.compile_dir(copy, legacy=True, quiet=1)
    for source in copy.rglob("*.py"):
        source.unlink()
    return tmp_path


def test_the_reference_serves_and_says_why(compiled):
    file, has_triton, total, reason = run(compiled)
    assert file.endswith(".pyc") and has_triton == "False"
    expected = run(SOURCE.parent)
    assert expected[1] == str(HAS_TRITON)
    assert float(total) == pytest.approx(float(expected[2]), rel=1e-5)
    assert ("Python file" in reason or "source" in reason) if HAS_TRITON else "not installed" in reason


def test_kernels_serve_where_they_can_be_defined():
    assert (why_no_kernels() == "") is HAS_TRITON
