"""Strided vectors in every operator: launchers must make them contiguous, because kernels assume it."""

import pytest
import test_bi_wkv_kernel
import test_conv_norm
import test_fused_linear
import test_linears
import test_mask_product
import test_mbconv
import test_norm_shift_mix
import test_prompt_tokens
import test_stem
import test_upscale
import torch
from launch_configs import launch

from benchmarks.kernels.operator_calls import OPERATORS
from fastsam_rwkv.triton_kernels.operator import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: kernels cannot run")
CALLS = {
    "bi_wkv": lambda device: test_bi_wkv_kernel.make(1, 6, test_bi_wkv_kernel.MILD, device=device),
    "conv_norm": lambda device: test_conv_norm.make(
        (1, 3, 2), 8, 12, parts="bias in_norm add norm gelu", device=device
    ),
    "fused_linear": lambda device: test_fused_linear.make((2, 3), 8, 5, "gated", device=device),
    "linears": lambda device: test_linears.make("queries, keys and values", device=device),
    "mask_product": lambda device: test_mask_product.make(1, 2, 3, 4, 5, 6, device=device),
    "mbconv": lambda device: test_mbconv.make((1, 2, 4), 6, 9, 2, device=device),
    "norm_shift_mix": lambda device: test_norm_shift_mix.make((1, 2, 3, 8), device=device),
    "prompt_tokens": lambda device: test_prompt_tokens.make(2, 3, 8, 1, device=device),
    "stem": lambda device: test_stem.make((1, 5, 8), 12, 6, 8, "uint8", device=device),
    "upscale": lambda device: test_upscale.make((1, 2, 3), 6, 5, device=device),
}


def test_every_operator_with_vectors_is_tested():
    assert set(CALLS) == set(OPERATORS) - {"attention", "gated_key"}


@pytest.mark.parametrize("name", CALLS)
def test_strided_vectors(name, device):
    args = CALLS[name](device)
    gaps = [torch.stack([t, t + 1], 1)[:, 0] if isinstance(t, torch.Tensor) and t.ndim == 1 else t for t in args]
    assert any(isinstance(t, torch.Tensor) and not t.is_contiguous() for t in gaps)
    torch.testing.assert_close(launch(OPERATORS[name], *gaps), launch(OPERATORS[name], *args))
