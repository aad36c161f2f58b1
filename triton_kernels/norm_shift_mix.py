"""LayerNorm, Q-shift and the mixes of a token with its neighbours: what stands before an RWKV layer's projections.

    n = LayerNorm(x)                                     over the channels
    s = n of the pixel to the left, right, above, below  for the four quarters of the channels; zero outside the image
    y_j = s + (n - s) * mix_j                            for every j

x is read from memory once, though six times from the cache, and J maps are written:
(1 + J) * B * H * W * C * itemsize bytes, which is the bound to compare a benchmark with. The maps are stacked, so that
the projections are one batched matrix product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import mean_and_rstd, register, tl, triton, wait_for_inputs
from .tuning import block_that_divides, launch_options, launch_settings

MANY_CHANNELS = 512  # beyond, the weights would not fit into registers beside the tokens


def q_shift(x: Tensor) -> Tensor:
    """Quarters of the channels of `[B, H, W, C]` from the left, right, upper and lower neighbour; zero outside.

    Quarters are C // 4 wide; the channels beyond the fourth are not shifted.
    """
    q = x.shape[-1] // 4
    s = torch.empty_like(x)
    for quarter, (axis, source) in enumerate([(2, -1), (2, 1), (1, -1), (1, 1)]):
        of, to = (t[..., quarter * q : (quarter + 1) * q] for t in (x, s))
        size, outside = x.shape[axis], 0 if source < 0 else x.shape[axis] - 1
        to.narrow(axis, max(0, -source), size - 1).copy_(of.narrow(axis, max(0, source), size - 1))
        to.select(axis, outside).zero_()
    s[..., 4 * q :] = x[..., 4 * q :]
    return s


def norm_shift_mix_ref(x: Tensor, weight: Tensor, bias: Tensor, mix: Tensor, eps: float) -> Tensor:
    """Oracle, CPU path and export decomposition.

    Args:
        x: `[B, H, W, C]`.
        weight, bias: `[C]` of the LayerNorm.
        mix: `[J, C]`, the share of the token itself.
        eps: of the LayerNorm.

    Returns:
        `[J, B, H, W, C]` in x's dtype.
    """
    _check(x, weight, bias, mix)
    n = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return torch.lerp(q_shift(n), n, mix[:, None, None, None])


def _check(x: Tensor, weight: Tensor, bias: Tensor, mix: Tensor) -> None:
    C = x.shape[-1]
    if x.ndim != 4 or weight.shape != (C,) or bias.shape != (C,) or mix.ndim != 2 or mix.shape[1] != C:
        raise ValueError(
            "norm_shift_mix needs x [B, H, W, C], weight and bias [C] and mix [J, C], got "
            f"{list(x.shape)}, {list(weight.shape)}, {list(bias.shape)} and {list(mix.shape)}"
        )


@triton.jit
def _statistics(x_ptr, offs_m, mask_m, eps, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and 1 / deviation of the rows offs_m: both `[BLOCK_M, 1]`."""
    CHUNKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    x = ()
    for chunk in tl.static_range(CHUNKS):
        offs_c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = mask_m[:, None] & (offs_c < C)[None, :]
        x += (tl.load(x_ptr + offs_m[:, None] * C + offs_c[None, :], mask=mask, other=0.0).to(tl.float32),)
    return mean_and_rstd(x, eps, C, BLOCK_C)


@triton.jit
def _standardised(x, mean, rstd):
    """(x - mean) / deviation: in half precision, where x has no digits to lose, in one instruction."""
    if x.dtype == tl.float32:
        return (x - mean) * rstd
    return x.to(tl.float32) * rstd - mean * rstd


@triton.jit
def _vector(ptr, offs_c, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """The same values for every row: each thread loads its own, without an exchange."""
    every_row = tl.broadcast_to(offs_c[None, :], (BLOCK_M, BLOCK_C))
    return tl.load(ptr + every_row, mask=every_row < C, other=0.0)


@triton.jit
def _norm_shift_mix_kernel(
    x_ptr, weight_ptr, bias_ptr, mix_ptr, y_ptr,  # [M, C], [C], [C], [J, C], [J, M, C], all contiguous
    M, H, W, eps,  # M = B * H * W
    C: tl.constexpr, J: tl.constexpr, EARLY: tl.constexpr,  # weights are read while the launch before this one ends
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Statistics of the tokens and of their neighbours first; then every channel of a token with the one neighbour
    that it is mixed with, BLOCK_C channels at a time. x is loaded before any store, which loads cannot pass."""
    CHUNKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    QUARTER: tl.constexpr = C // 4
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column, row = token % W, (token // W) % H  # in 32 bits: a 64-bit division is a subroutine with a stack
    offs_m = token.to(tl.int64)
    mask_m = offs_m < M

    weights = ()
    biases = ()
    mixes = ()
    for chunk in tl.static_range(CHUNKS if EARLY else 0):
        offs_c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
        weights += (_vector(weight_ptr, offs_c, C, BLOCK_M, BLOCK_C),)
        biases += (_vector(bias_ptr, offs_c, C, BLOCK_M, BLOCK_C),)
        for j in tl.static_range(J):
            mixes += (_vector(mix_ptr + j * C, offs_c, C, BLOCK_M, BLOCK_C),)
    wait_for_inputs(OVERLAP)
    own = ()
    for chunk in tl.static_range(CHUNKS):
        offs_c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = mask_m[:, None] & (offs_c < C)[None, :]
        own += (tl.load(x_ptr + offs_m[:, None] * C + offs_c[None, :], mask=mask, other=0.0),)
    places = (offs_m - 1, offs_m + 1, offs_m - W, offs_m + W)
    inside = (mask_m & (column > 0), mask_m & (column < W - 1), mask_m & (row > 0), mask_m & (row < H - 1))
    beside = ()
    for chunk in tl.static_range(CHUNKS):
        offs_c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
        x = own[chunk]  # type: ignore[var-annotated]  # mypy: () stays empty
        for side in tl.static_range(4):
            if chunk * BLOCK_C < (side + 1) * QUARTER and (chunk + 1) * BLOCK_C > side * QUARTER:
                quarter = ((offs_c >= side * QUARTER) & (offs_c < (side + 1) * QUARTER))[None, :]
                ptr = x_ptr + places[side][:, None] * C + offs_c[None, :]
                x = tl.where(quarter, tl.load(ptr, mask=inside[side][:, None] & quarter, other=0.0), x)
        beside += (x,)
    wide = ()
    for chunk in tl.static_range(CHUNKS):
        wide += (own[chunk].to(tl.float32),)
    mean, rstd = mean_and_rstd(wide, eps, C, BLOCK_C)
    means = ()
    rstds = ()
    for side in tl.static_range(4):
        one_mean, one_rstd = _statistics(x_ptr, places[side], inside[side], eps, C, BLOCK_C)
        means += (one_mean,)
        rstds += (one_rstd,)

    for chunk in tl.static_range(CHUNKS):
        offs_c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = mask_m[:, None] & (offs_c < C)[None, :]
        if EARLY:
            weight, bias = weights[chunk], biases[chunk]  # type: ignore[var-annotated]  # likewise
        else:
            weight = _vector(weight_ptr, offs_c, C, BLOCK_M, BLOCK_C)
            bias = _vector(bias_ptr, offs_c, C, BLOCK_M, BLOCK_C)
        weight, bias = weight.to(tl.float32), bias.to(tl.float32)
        n = _standardised(own[chunk], mean, rstd) * weight + bias
        s = n
        for side in tl.static_range(4):
            if chunk * BLOCK_C < (side + 1) * QUARTER and (chunk + 1) * BLOCK_C > side * QUARTER:
                quarter = ((offs_c >= side * QUARTER) & (offs_c < (side + 1) * QUARTER))[None, :]
                neighbour = _standardised(beside[chunk], means[side], rstds[side]) * weight + bias
                s = tl.where(quarter, tl.where(inside[side][:, None], neighbour, 0.0), s)
        difference = n - s
        for j in tl.static_range(J):
            share = mixes[chunk * J + j] if EARLY else _vector(mix_ptr + j * C, offs_c, C, BLOCK_M, BLOCK_C)
            y = s + difference * share.to(tl.float32)
            ptr = y_ptr + (j * M + offs_m)[:, None] * C + offs_c[None, :]
            tl.store(ptr, y.to(y_ptr.dtype.element_ty), mask=mask)


def norm_shift_mix_triton(x: Tensor, weight: Tensor, bias: Tensor, mix: Tensor, eps: float) -> Tensor:
    """Launch the kernel. Also runs on CPU tensors under TRITON_INTERPRET=1, which is how the tests use it."""
    _check(x, weight, bias, mix)
    B, H, W, C = x.shape
    J = len(mix)
    y = torch.empty((J, B, H, W, C), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x, weight, bias, mix = (t.contiguous() for t in (x, weight, bias, mix))
    settings = launch_settings("norm_shift_mix", x.device, x.dtype, x.numel())
    M, BLOCK_M = B * H * W, settings["BLOCK_M"]
    BLOCK_C = block_that_divides(C, min(settings["BLOCK_C"], triton.next_power_of_2(C)))
    with torch.cuda.device_of(x):
        _norm_shift_mix_kernel[(triton.cdiv(M, BLOCK_M),)](
            x, weight, bias, mix, y, M, H, W, eps, C, J, C <= MANY_CHANNELS, BLOCK_M, BLOCK_C,
            **launch_options(settings, x.device),
        )  # fmt: skip
    return y


norm_shift_mix = register(
    "norm_shift_mix",
    norm_shift_mix_ref,
    norm_shift_mix_triton,
    lambda x, weight, bias, mix, eps: torch.empty((len(mix), *x.shape), dtype=x.dtype, device=x.device),
)
