import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastsam_rwkv.triton_kernels.operator import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("Triton is not installed: there is no compiled kernel to count", allow_module_level=True)

from tests.ptx.memory_report import _passes

LANES = np.arange(32)


@pytest.mark.parametrize(
    ("places", "width", "want"),
    [
        (4 * LANES, 4, (1, 1)),
        (8 * LANES, 4, (2, 1)),
        (128 * LANES, 4, (32, 1)),
        (0 * LANES, 4, (1, 1)),  # one word for all lanes
        (2 * LANES, 2, (1, 1)),  # two lanes a word
        (16 * LANES, 16, (4, 4)),
        (128 * LANES, 16, (32, 4)),
    ],
)
def test_bank_conflicts(places, width, want):
    assert _passes(LANES * max(width, 4) // 128, places, width) == want


SCRIPT = """
import torch
from benchmarks.kernels.cost_sheet import asked
from tests.ptx.memory_report import _real, counted
from benchmarks.kernels.operator_calls import recorded_calls
from fastsam_rwkv.triton_kernels.launch_config import shipped_settings

calls = {name: args for name, _, args, _ in recorded_calls("tiny", 256, 1, torch.device("meta"))}
wide = [args for name, _, args, _ in recorded_calls("tiny", 1024, 16, torch.device("meta")) if name == "fused_linear"]
for name, args, blocks in [
    *((name, calls[name], 1 << 30) for name in ("fused_linear", "bi_wkv", "mbconv", "norm_shift_mix")),
    ("fused_linear", wide[-1], 2),  # several blocks a program, and a second launch for the gate
]:
    args = [_real(a) for a in args]
    kernels = counted(name, args, 90, blocks)
    moved = 32 * sum(counts["least read"] + counts["least written"] for _, _, counts in kernels)
    output = torch.ops.fastsam_rwkv.__getattr__(name)(*args)
    conflicts = sum(counts["shared"] - counts["least shared"] for _, _, counts in kernels)
    said = asked(name, tuple(args), output, shipped_settings()["default"])
    print(name if blocks > 2 else "wide", moved / said, conflicts)
"""


def test_counts_agree_with_the_cost_sheet():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command, root = [sys.executable, "-c", SCRIPT], Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    found = {name: (float(moved), conflicts) for name, moved, conflicts in map(str.split, done.stdout.splitlines())}
    assert all(0.95 < moved < 1.05 for moved, _ in found.values()), found
    assert found["fused_linear"][1] == found["mbconv"][1] == "0", found
