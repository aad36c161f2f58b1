import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastsam_rwkv.triton_kernels._triton import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: kernels cannot be compiled")

SCRIPT = """
import json, sys, torch
from benchmarks import compile_report
from fastsam_rwkv.triton_kernels import tuning

kernels = compile_report.report([90], (torch.float16,), only=("bi_wkv",))
few = {"bi_wkv": tuning.shipped_settings()["default"]["bi_wkv"] | {"BLOCK_C": 64, "num_warps": 4}}
compile_report.shipped_settings = lambda: {"too few warps": few}
spilled = compile_report.report([90], (torch.float16,), only=("bi_wkv",))
print(json.dumps([[k._asdict() | {"problems": k.problems} for k in found] for found in (kernels, spilled)]))
"""


def test_kernels_compile_for_a_gpu_that_is_not_there():
    """In a process of its own: this one interprets kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    kernels, spilled = json.loads(done.stdout)
    assert {k["name"] for k in kernels} == {"bi_wkv_kernel", "bi_wkv_summary_kernel"}
    assert sum("GATED=True" in k["constants"] for k in kernels) == 1
    for k in kernels:
        assert not k["problems"] and 16 <= k["registers"] <= 255
        assert k["counts"]["other loads"] > 0 and k["counts"]["barriers"] > 0
    assert any("spilled" in problem for k in spilled for problem in k["problems"])


def test_shared_memory_beyond_the_limit_is_a_problem():
    from benchmarks.compile_report import Kernel

    kernel = Kernel("k", "", 120, "float16", "default", 4, 32, 0, 100 << 10, {})
    assert kernel.problems == ["102400 bytes of shared memory, 101376 at most"]
    assert not kernel._replace(arch=90).problems


def test_no_operator_is_left_out():
    from benchmarks.compile_report import operators
    from benchmarks.operator_calls import LAUNCHERS, REFERENCES
    from fastsam_rwkv import triton_kernels

    files = {file.stem for file in Path(triton_kernels.__file__).parent.glob("[!_]*.py")}
    assert set(operators()) == set(REFERENCES) == set(LAUNCHERS) == files - {"tuning"}
