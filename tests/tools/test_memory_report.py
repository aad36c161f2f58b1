import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch

from benchmarks.kernels.compile_report import LINEAR
from benchmarks.kernels.cost_sheet import asked
from benchmarks.kernels.operator_calls import OPERATORS, recorded_calls
from fastsam_rwkv.triton_kernels.launch_config import default_settings
from fastsam_rwkv.triton_kernels.operator import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("Triton is not installed: there is no compiled kernel to count", allow_module_level=True)

from tests.ptx.memory_report import _passes, _real, counted

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


def ratios():
    """Return by operator the bytes counted over those of the cost sheet, and the bank conflicts."""
    calls = {name: args for name, _, args, _ in recorded_calls("tiny", 256, 1, torch.device("meta"))}
    wide = recorded_calls("tiny", 1024, 16, torch.device("meta"))
    several = [(f"{name}, several blocks a program", name, args, 2) for name, _, args, _ in wide if name in LINEAR]
    names = (*LINEAR, "bi_wkv", "mbconv", "norm_shift_mix")
    cases = [(name, name, calls[name], 1 << 30) for name in names]
    found = {}
    for case, name, args, blocks in cases + several[-2:]:
        args = tuple(_real(a) for a in args)
        kernels = [counts for _, _, counts in counted(name, args, 90, blocks)]
        moved = 32 * sum(counts["least read"] + counts["least written"] for counts in kernels)
        said = asked(name, args, OPERATORS[name](*args), default_settings())
        found[case] = moved / said, sum(counts["shared"] - counts["least shared"] for counts in kernels)
    return found


def test_counts_agree_with_the_cost_sheet(monkeypatch):
    """Count in another process, because this one interprets kernels."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(ratios).result()
    assert all(0.95 < moved < 1.05 for moved, _ in found.values()), found
    assert found["fused_linear"][1] == found["mbconv"][1] == 0, found
