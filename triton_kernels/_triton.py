"""`triton` and `tl`, or stand-ins if Triton is not installed, and the device functions that kernels share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

NO_KERNELS = ""  # the reason why the references serve on CUDA too; empty if the kernels do
try:
    import triton
    import triton.language as tl

    CAN_OVERLAP = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5)  # Triton 3.4 cannot compile gdc_wait
    if CAN_OVERLAP:
        from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    @triton.jit
    def _probe():
        """Show whether kernels can be defined here."""

except Exception as error:  # kernel files import, and operators call the references: macOS, Windows, no sources
    CAN_OVERLAP = False
    NO_KERNELS = f"Triton does not import ({error})" if isinstance(error, ImportError) else f"no kernels ({error})"
    if isinstance(error, ModuleNotFoundError) and error.name == "triton":
        NO_KERNELS = "Triton is not installed"

    class _Missing:
        constexpr = None

        def jit(self, function: Callable[..., Any] | None = None, **options: object) -> Callable[..., Any]:
            return (lambda f: f) if function is None else function

    triton = tl = _Missing()
HAS_TRITON = not NO_KERNELS


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """Begin a kernel under programmatic dependent launch.

    Wait for the results of the launch before, then let the next launch start. Only tensors that no kernel writes, such
    as weights, may be read earlier.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def add_product(x, weight, acc, PRECISION: tl.constexpr):
    """Return acc + x weight. In float32, each step is accumulated separately to keep precision."""
    if PRECISION == "ieee":
        acc += tl.dot(x, weight, input_precision=PRECISION, max_num_imprecise_acc=1)  # 0 would make it one sum
    else:
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
    return acc


@triton.jit
def add_row(x, row_ptr, offs_n, N: tl.constexpr):
    """Return `[M, BLOCK_N]` float32 x plus a row of N values, or x if there is none."""
    if row_ptr is not None:
        x += tl.load(row_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def quotient(x, y, dtype: tl.constexpr):
    """Return x / y for positive y; in half precision to 2^-21, with a third of the instructions."""
    if dtype == tl.float32:
        return x / y
    root = tl.rsqrt(y)
    return x * root * root


@triton.jit
def two_floats(word):
    """Return the two bfloat16 values of each 32-bit word, with two instructions instead of the three of a cast."""
    return (word << 16).to(tl.float32, bitcast=True), (word & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def multiply_add(a, b, c):
    """Return a b + c; in float16, only compiled for NVIDIA, two values with one instruction."""
    if a.dtype == tl.float16:
        y = tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        y = a * b + c
    return y


@triton.jit
def gelu(x, dtype: tl.constexpr):
    """GELU of x for a result in `dtype`: x Phi(x) = max(x, 0) - |x| Phi(-|x|).

    float32 uses erf, about thirty instructions. Half precision uses a polynomial for log2 Phi(-|x|), fitted over
    [0, 5.5] and falling beyond: eight instructions. Its absolute error is at most 2e-6 for finite x, its relative error
    below 1e-4 if the result exceeds 1e-3.

    For float16 x, only compiled for NVIDIA, nine instructions give two values: Phi(x) = 0.5 + x P(x^2), clamped to
    0..1, with x clamped to finite numbers. The error is 1.4e-3 of max(1, |x|) at most. Its root mean square for normal
    x of deviation 1.5 is 7.7e-4 of GELU's, where rounding to bfloat16 gives 1.65e-3.
    """
    if x.dtype == tl.float16:
        y = tl.inline_asm_elementwise(
            """{
            .reg .b32 x, s, p, c;
            mov.b32 c, 0xFBFFFBFF;
            max.NaN.f16x2 x, $1, c;
            mov.b32 c, 0x7BFF7BFF;
            min.NaN.f16x2 x, x, c;
            mul.rn.f16x2 s, x, x;
            mov.b32 p, 0x00B100B1;
            mov.b32 c, 0x8ECA8ECA;
            fma.rn.f16x2 p, p, s, c;
            mov.b32 c, 0x1EDD1EDD;
            fma.rn.f16x2 p, p, s, c;
            mov.b32 c, 0xABA7ABA7;
            fma.rn.f16x2 p, p, s, c;
            mov.b32 c, 0x364F364F;
            fma.rn.f16x2 p, p, s, c;
            mov.b32 c, 0x38003800;
            fma.rn.sat.f16x2 p, p, x, c;
            mul.rn.f16x2 $0, p, x;
            }""",
            "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    elif dtype == tl.float32:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        t = tl.abs(x)
        p = -0.000441991811 * t + 0.00686555821
        p = p * t - 0.051312726
        p = p * t - 0.460452259
        p = p * t - 1.1506722
        p = p * t - 1.00003195
        y = tl.maximum(x, 0.0) - t * tl.exp2(p)
    return y


@triton.jit
def mean_and_rstd(x, eps, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and 1 / standard deviation of rows of C values, both `[BLOCK_M, 1]`.

    `x` is a tuple of float32 chunks `[BLOCK_M, BLOCK_C]`, zero beyond C. Two passes, because E[x^2] - E[x]^2 cancels.
    """
    CHUNKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    total = x[0]
    for chunk in tl.static_range(1, CHUNKS):
        total += x[chunk]
    mean = (tl.sum(total, 1) / C)[:, None]
    total = tl.zeros_like(x[0])
    for chunk in tl.static_range(CHUNKS):
        centered = x[chunk] - mean
        if (chunk + 1) * BLOCK_C > C:
            centered = tl.where((chunk * BLOCK_C + tl.arange(0, BLOCK_C) < C)[None, :], centered, 0.0)
        total += centered * centered
    return mean, tl.rsqrt(tl.sum(total, 1) / C + eps)[:, None]


@triton.jit
def normalize_rows(x, weight_ptr, bias_ptr, offs_n, mask_n, eps, N: tl.constexpr):
    """LayerNorm of rows of N values in a float32 tensor `[BLOCK_M, BLOCK_N]`, zero beyond N."""
    centered = tl.where(mask_n[None, :], x - (tl.sum(x, 1) / N)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, 1) / N + eps)
    gain = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    shift = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    return centered * rstd[:, None] * gain[None, :] + shift[None, :]
