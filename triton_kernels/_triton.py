"""What every kernel file needs: `triton` and `tl`, and `register` to make an operator of a kernel and its reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

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

Function = Callable[..., Any]
MOST_IN_BATCH = 65535
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OF_ANY_DTYPE = ("w", "u")  # parameters of the scan, which it computes with in float32


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


def check_batch(op: str, B: int) -> None:
    """Raise a ValueError where a batch is larger than the second dimension of a CUDA grid may be."""
    if B > MOST_IN_BATCH:
        raise ValueError(f"the {op} kernel takes a batch of at most {MOST_IN_BATCH}, got {B}; split it")


def check_rows(op: str, M: int) -> None:
    """Raise a ValueError where rows are more than 32 bits can count, for kernels that do so."""
    if M >= 1 << 31:
        raise ValueError(f"the {op} kernel takes fewer than 2^31 pixels, got {M}; split the batch")


def checked(op: str, launcher: Function) -> Function:
    """A launcher that is not given what it would misread: tensors of several dtypes, or on several devices."""
    names = tuple(signature(launcher).parameters)

    @wraps(launcher)
    def launch(*args: Any, **kwargs: Any) -> Tensor:
        given = (*zip(names, args, strict=False), *kwargs.items())
        tensors = {name: a for name, a in given if isinstance(a, Tensor)}
        if len({t.device for t in tensors.values()}) > 1:
            where = ", ".join(f"{name} on {t.device}" for name, t in tensors.items())
            raise ValueError(f"{op} needs all its tensors on one device, got {where}")
        dtypes = {n: t.dtype for n, t in tensors.items() if t.is_floating_point() and n not in OF_ANY_DTYPE}
        if len(found := set(dtypes.values())) > 1 or not found <= set(DTYPES):
            what = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
            raise TypeError(f"the {op} kernel needs float32, float16 or bfloat16, the same for all, got {what}")
        return launcher(*args, **kwargs)

    return launch


def in_transform() -> bool:
    """Whether derivatives are being taken forwards, or one of torch.func's transforms is at work, in which tensors do
    not say whether they want a gradient. Under `torch.compile` both are guarded."""
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None


def wants_gradient(tensors: tuple[Any, ...]) -> bool:
    """Whether a derivative of a result may be asked for."""
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        return True
    return in_transform()


def dot_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` treats float32: as PyTorch does by default, without rounding to tf32; half precision as it is."""
    return "ieee" if dtype == torch.float32 else "tf32"


def register(
    name: str, reference: Function, launcher: Function, fake: Function, flops: Function | None = None
) -> Function:
    """Make the operator `fastsam_rwkv::name`: the kernel on CUDA, the reference on any other device.

    `flops` tells PyTorch's FlopCounterMode the operations of a call, from the shapes of its tensors.

    The schema comes from the reference's annotations. The operator has no gradient: where one is asked for, the
    function returned here calls the reference, which is plain PyTorch. What the operator returns is contiguous.
    """

    @wraps(reference)
    def contiguous(*args: Any, **kwargs: Any) -> Tensor:
        return reference(*args, **kwargs).contiguous()

    schema = torch.library.infer_schema(reference, mutates_args=())
    op = torch.library.custom_op(f"fastsam_rwkv::{name}", contiguous, mutates_args=(), schema=schema)
    op.register_fake(fake)
    if HAS_TRITON:
        op.register_kernel("cuda")(checked(name, launcher))
    if flops is not None:
        register_flop_formula(getattr(torch.ops.fastsam_rwkv, name))(flops)

    @wraps(reference)
    def call(*args: Any, **kwargs: Any) -> Tensor:
        return (reference if wants_gradient((*args, *kwargs.values())) else op)(*args, **kwargs)

    return call
