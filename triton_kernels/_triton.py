"""`triton` and `tl`, or stand-ins where Triton is not installed, and the device functions that kernels share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
    CAN_OVERLAP = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5)  # 3.4 has the two, which do not compile
    if CAN_OVERLAP:
        from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # macOS, Windows: kernel files can be imported all the same, and the reference serves
    HAS_TRITON = CAN_OVERLAP = False

    class _Missing:
        constexpr = None

        def jit(self, function: Callable[..., Any] | None = None, **options: object) -> Callable[..., Any]:
            return (lambda f: f) if function is None else function

    triton = tl = _Missing()


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """What a kernel that may OVERLAP begins with: wait until the launch before it has written all its results, and let
    the launch behind it begin as soon as there is room. What none of ours writes, like weights, may be read earlier."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def add_product(x, weight, acc, PRECISION: tl.constexpr):
    """acc + x weight. In float32, whose digits a long sum costs, the products of a step are added up on their own."""
    if PRECISION == "ieee":
        acc += tl.dot(x, weight, input_precision=PRECISION, max_num_imprecise_acc=1)  # with 0 it would be one sum
    else:
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
    return acc


@triton.jit
def quotient(x, y, dtype: tl.constexpr):
    """x / y, y positive: for half precision to 2^-21, in a third of the instructions."""
    if dtype == tl.float32:
        return x / y
    root = tl.rsqrt(y)
    return x * root * root


@triton.jit
def two_floats(word):
    """The two bfloat16 values in each 32-bit word: one instruction each, where a cast takes three for both."""
    return (word << 16).to(tl.float32, bitcast=True), (word & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def gelu(x, dtype: tl.constexpr):
    """The exact GELU of float32 x for a result in `dtype`.

    x Phi(x) = max(x, 0) - |x| Phi(-|x|). In float32 by erf, some thirty instructions. For half precision log2 of
    Phi(-|x|) is a polynomial (fitted over 0 to 5.5, and falling beyond): eight instructions, absolute error at most
    2e-6 for any finite x, relative error below 1e-4 wherever the result is above 1e-3 in size.
    """
    if dtype == tl.float32:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    t = tl.abs(x)
    p = -0.000441991811 * t + 0.00686555821
    p = p * t - 0.051312726
    p = p * t - 0.460452259
    p = p * t - 1.1506722
    p = p * t - 1.00003195
    return tl.maximum(x, 0.0) - t * tl.exp2(p)


@triton.jit
def mean_and_rstd(x, eps, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of every row of C values, which lie in a tuple of float32 tensors `[BLOCK_M, BLOCK_C]` side by side, zero beyond
    C: the mean and 1 / deviation, both `[BLOCK_M, 1]`. Two passes: E[x^2] - E[x]^2 would cancel."""
    CHUNKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    total = x[0]
    for chunk in tl.static_range(1, CHUNKS):
        total += x[chunk]
    mean = (tl.sum(total, 1) / C)[:, None]
    total = tl.zeros_like(x[0])
    for chunk in tl.static_range(CHUNKS):
        centred = x[chunk] - mean
        if (chunk + 1) * BLOCK_C > C:
            centred = tl.where((chunk * BLOCK_C + tl.arange(0, BLOCK_C) < C)[None, :], centred, 0.0)
        total += centred * centred
    return mean, tl.rsqrt(tl.sum(total, 1) / C + eps)[:, None]


@triton.jit
def normalise_rows(x, weight_ptr, bias_ptr, offs_n, mask_n, eps, N: tl.constexpr):
    """LayerNorm of the rows of N values in a float32 tensor `[BLOCK_M, BLOCK_N]` that is zero beyond them."""
    centred = tl.where(mask_n[None, :], x - (tl.sum(x, 1) / N)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / N + eps)
    gain = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    shift = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    return centred * rstd[:, None] * gain[None, :] + shift[None, :]
