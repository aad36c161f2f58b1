"""The summary of compiled kernels: what fits an SM, and the table."""

import pytest

from benchmarks.kernels import kernel_summary
from benchmarks.kernels.compile_report import Kernel
from fastsam_rwkv.triton_kernels.operator import HAS_TRITON


@pytest.mark.parametrize(
    ("num_warps", "registers", "shared", "warps"),
    [(4, 168, 0, 12), (8, 255, 0, 8), (1, 16, 0, 32), (4, 32, 0, 64), (8, 32, 100 << 10, 16), (8, 64, 226 << 10, 8)],
)
def test_warps_that_fit_an_sm(num_warps, registers, shared, warps):
    assert kernel_summary.warps_of_an_sm(Kernel("k", "", 90, "", "", num_warps, registers, 0, shared, {})) == warps


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: nothing compiles")
def test_calls_of_a_prompt_are_not_those_of_the_encoding(monkeypatch):
    called = set()
    launchers = {name: lambda *_, name=name, **__: called.add(name) for name in kernel_summary.LAUNCHERS}
    monkeypatch.setattr(kernel_summary, "LAUNCHERS", launchers)
    kernel_summary.rows("tiny", 64, 1, 90, prompts=0)
    assert called >= {"stem", "mbconv", "bi_wkv", "fused_linear"} and "prompt_tokens" not in called
    called.clear()
    kernel_summary.rows("tiny", 64, 1, 90, prompts=1)
    assert called == {"attention", "conv_norm", "linears", "mask_product", "prompt_tokens", "upscale"}
