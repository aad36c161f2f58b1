"""LayerNorm, Q-shift and token mixes: the input of an RWKV layer's projections.

    n = LayerNorm(x)                                     over the channels
    s = n of the pixel to the left, right, above, below  for the four quarters of the channels; zero outside the image
    y_j = s + (n - s) * mix_j                            for every j

x is read from memory once (and three times from caches), and J maps are written: (1 + J) * B * H * W * C * itemsize
bytes, the bound to compare a benchmark with. The maps are stacked, so that the projections are one batched product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import HAS_TRITON, mean_and_rstd, tl, triton, two_floats, wait_for_inputs
from .launch_config import LaunchConfig, Settings, block_that_divides, launch_config
from .operator import MOST_IN_BATCH, check_batch, check_counts, contiguous, described, register

SIDE = 4  # a program computes SIDE x SIDE tokens, with as many tokens around them; not timed
TILE: Any = tl.constexpr(SIDE) if HAS_TRITON else None
MANY_CHANNELS = 512  # beyond this, registers do not hold the weights too, and tokens need eight warps
FEW_PROGRAMS = 512  # at most one wave


def q_shift(x: Tensor) -> Tensor:
    """Take quarters of the channels of `[B, H, W, C]` from the left, right, upper and lower neighbor; zero outside.

    Quarters are C // 4 wide; the remaining channels are not shifted.
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
    """Oracle and CPU path.

    Args:
        x: `[B, H, W, C]`.
        weight, bias: `[C]` of the LayerNorm.
        mix: `[J, C]`, weight of the token itself.
        eps: Epsilon of the LayerNorm.

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
            + described(x=x, weight=weight, bias=bias, mix=mix)
        )


@triton.jit
def _as_words(ptr, PACKED: tl.constexpr):
    """Cast a pointer to bfloat16 values to one to words of two, if PACKED."""
    return ptr.to(tl.pointer_type(tl.uint32)) if PACKED else ptr


@triton.jit
def _floats(x):
    """Values as float32 `(x,)`, or words as `(even, odd)`."""
    return two_floats(x) if x.dtype == tl.uint32 else (x.to(tl.float32),)


@triton.jit
def _in_order(y, dtype: tl.constexpr, PACKED: tl.constexpr, TOKENS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Inverse of `_floats`, in `dtype`."""
    return tl.reshape(tl.join(y[0], y[1]).to(dtype), (TOKENS, BLOCK_C)) if PACKED else y[0].to(dtype)


@triton.jit
def _rows(x_ptr, offs_m, mask_m, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load whole rows as a tuple of chunks of BLOCK columns."""
    x = ()
    for chunk in tl.static_range((LENGTH + BLOCK - 1) // BLOCK):
        offs = chunk * BLOCK + tl.arange(0, BLOCK)
        mask = mask_m[:, None] & (offs < LENGTH)[None, :]
        x += (tl.load(x_ptr + offs_m[:, None] * LENGTH + offs[None, :], mask=mask, other=0),)
    return x


@triton.jit
def _vector(ptr, chunk: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr):
    """Load BLOCK columns of a vector for every row; each thread loads its own: no layout conversion."""
    every_row = tl.broadcast_to((chunk * BLOCK + tl.arange(0, BLOCK))[None, :], (TOKENS, BLOCK))
    return tl.load(ptr + every_row, mask=every_row < LENGTH, other=0)


@triton.jit
def _statistics(x, eps, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and 1 / standard deviation of rows, both `[TOKENS, 1]`."""
    pieces = ()
    for chunk in tl.static_range((C + BLOCK_C - 1) // BLOCK_C):
        pieces += _floats(x[chunk])
    return mean_and_rstd(pieces, eps, C, BLOCK_C // 2 if x[0].dtype == tl.uint32 else BLOCK_C)


@triton.jit
def _standardized(x, mean, rstd, dtype: tl.constexpr):
    """Return (x - mean) * rstd; in half precision as one fused multiply-add, which loses nothing there."""
    if dtype == tl.float32:
        return (x - mean) * rstd
    return x * rstd - mean * rstd


@triton.jit
def _bits(x, y):
    """Pack two float32 `[N, 1]` into 64 bits: `[N]`."""
    x, y = x.to(tl.uint32, bitcast=True).to(tl.uint64), y.to(tl.uint32, bitcast=True).to(tl.uint64)
    return tl.reshape((x << 32) | y, (x.shape[0],))


@triton.jit
def _norm_shift_mix_kernel(
    x_ptr, weight_ptr, bias_ptr, mix_ptr, y_ptr,  # [B, H, W, C], [C], [C], [J, C], [J, B, H, W, C], all contiguous
    M, H, W, eps,  # M = B * H * W
    C: tl.constexpr, J: tl.constexpr,
    EARLY: tl.constexpr,  # weights are loaded before the wait
    PACKED: tl.constexpr,  # words of two channels
    BLOCK_C: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute TILE x TILE tokens.

    Threads exchange the statistics of these tokens and of the 4 * TILE tokens around them. Each channel is then mixed
    with that of one neighbor, which is in L1. x is loaded before any store: the compiler cannot move loads above
    stores.
    """
    UNIT: tl.constexpr = 2 if PACKED else 1  # channels in a word
    BLOCK: tl.constexpr = BLOCK_C // UNIT
    LENGTH: tl.constexpr = C // UNIT
    QUARTER: tl.constexpr = C // 4 // UNIT
    CHUNKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    TOKENS: tl.constexpr = TILE * TILE
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    x_ptr, mix_ptr = _as_words(x_ptr, PACKED), _as_words(mix_ptr, PACKED)
    weight_ptr, bias_ptr = _as_words(weight_ptr, PACKED), _as_words(bias_ptr, PACKED)
    vectors = ()
    for chunk in tl.static_range(CHUNKS if EARLY else 0):
        vectors += (_vector(weight_ptr, chunk, LENGTH, BLOCK, TOKENS), _vector(bias_ptr, chunk, LENGTH, BLOCK, TOKENS))
        for m in tl.static_range(J):
            vectors += (_vector(mix_ptr + m * LENGTH, chunk, LENGTH, BLOCK, TOKENS),)
    wait_for_inputs(OVERLAP)

    first_row, first_column = tl.program_id(1) * TILE, tl.program_id(0) * TILE
    image = tl.program_id(2).to(tl.int64) * H * W
    token = tl.arange(0, TOKENS)
    i, j = token // TILE, token % TILE
    row, column = first_row + i, first_column + j
    mask_m = (row < H) & (column < W)
    offs_m = image + row * W + column
    own = _rows(x_ptr, offs_m, mask_m, LENGTH, BLOCK)
    # around them: token j on side i
    row_around = first_row + tl.where(i < 2, j, tl.where(i == 2, -1, TILE))
    column_around = first_column + tl.where(i >= 2, j, tl.where(i == 0, -1, TILE))
    in_image = (row_around >= 0) & (row_around < H) & (column_around >= 0) & (column_around < W)
    around = _rows(x_ptr, image + row_around * W + column_around, in_image, LENGTH, BLOCK)

    mean_around, rstd_around = _statistics(around, eps, C, BLOCK_C)
    mean, rstd = _statistics(own, eps, C, BLOCK_C)
    all_statistics = tl.reshape(tl.join(_bits(mean, rstd), _bits(mean_around, rstd_around)), (2 * TOKENS,))
    sources = (
        tl.where(j > 0, 2 * (token - 1), 2 * i + 1),
        tl.where(j < TILE - 1, 2 * (token + 1), 2 * (TILE + i) + 1),
        tl.where(i > 0, 2 * (token - TILE), 2 * (2 * TILE + j) + 1),
        tl.where(i < TILE - 1, 2 * (token + TILE), 2 * (3 * TILE + j) + 1),
    )
    means = ()
    rstds = ()
    for side in tl.static_range(4):
        both = tl.gather(all_statistics, sources[side], 0)[:, None]
        means += ((both >> 32).to(tl.uint32).to(tl.float32, bitcast=True),)
        rstds += (both.to(tl.uint32).to(tl.float32, bitcast=True),)

    places = (offs_m - 1, offs_m + 1, offs_m - W, offs_m + W)
    inside = (mask_m & (column > 0), mask_m & (column < W - 1), mask_m & (row > 0), mask_m & (row < H - 1))
    beside = ()
    for chunk in tl.static_range(CHUNKS):
        offs = chunk * BLOCK + tl.arange(0, BLOCK)
        x = own[chunk]
        for side in tl.static_range(4):
            if chunk * BLOCK < (side + 1) * QUARTER and (chunk + 1) * BLOCK > side * QUARTER:
                quarter = ((offs >= side * QUARTER) & (offs < (side + 1) * QUARTER))[None, :]
                ptr = x_ptr + places[side][:, None] * LENGTH + offs[None, :]
                x = tl.where(quarter, tl.load(ptr, mask=inside[side][:, None] & quarter, other=0), x)
        beside += (x,)

    for chunk in tl.static_range(CHUNKS):
        offs = chunk * BLOCK + tl.arange(0, BLOCK)
        mean_beside = tl.broadcast_to(mean, (TOKENS, BLOCK))
        rstd_beside = tl.broadcast_to(rstd, (TOKENS, BLOCK))
        there = tl.full((TOKENS, BLOCK), True, tl.int1)
        for side in tl.static_range(4):
            if chunk * BLOCK < (side + 1) * QUARTER and (chunk + 1) * BLOCK > side * QUARTER:
                quarter = ((offs >= side * QUARTER) & (offs < (side + 1) * QUARTER))[None, :]
                mean_beside = tl.where(quarter, means[side], mean_beside)
                rstd_beside = tl.where(quarter, rstds[side], rstd_beside)
                there = tl.where(quarter, inside[side][:, None], there)
        x, neighbor = _floats(own[chunk]), _floats(beside[chunk])
        if EARLY:
            weight = _floats(vectors[chunk * (2 + J)])
            bias = _floats(vectors[chunk * (2 + J) + 1])
        else:
            weight = _floats(_vector(weight_ptr, chunk, LENGTH, BLOCK, TOKENS))
            bias = _floats(_vector(bias_ptr, chunk, LENGTH, BLOCK, TOKENS))
        offs_c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
        for m in tl.static_range(J):
            if EARLY:
                share = _floats(vectors[chunk * (2 + J) + 2 + m])
            else:
                share = _floats(_vector(mix_ptr + m * LENGTH, chunk, LENGTH, BLOCK, TOKENS))
            y = ()
            for u in tl.static_range(UNIT):
                n = _standardized(x[u], mean, rstd, dtype) * weight[u] + bias[u]
                s = _standardized(neighbor[u], mean_beside, rstd_beside, dtype) * weight[u] + bias[u]
                s = tl.where(there, s, 0.0)
                y += (s + (n - s) * share[u],)
            ptr = y_ptr + (m * tl.cast(M, tl.int64) + offs_m)[:, None] * C + offs_c[None, :]
            y = _in_order(y, dtype, PACKED, TOKENS, BLOCK_C)
            tl.store(ptr, y, mask=mask_m[:, None] & (offs_c < C)[None, :])


def choose_blocks(C: int, values: int, dtype: torch.dtype, config: LaunchConfig) -> Settings:
    """Choose the blocks. Many channels need all registers, and wide blocks: narrow ones compile for half a minute."""
    settings = config.settings_for("norm_shift_mix", dtype, values)
    if C > MANY_CHANNELS:
        settings = settings | {"num_warps": 8, "maxnreg": 255, "BLOCK_C": max(256, settings["BLOCK_C"])}
    widest = min(settings["BLOCK_C"], max(32, 1 << (C - 1).bit_length()))
    return settings | {"BLOCK_C": block_that_divides(C, widest)}


def norm_shift_mix_triton(
    x: Tensor, weight: Tensor, bias: Tensor, mix: Tensor, eps: float, *, config: LaunchConfig | None = None
) -> Tensor:
    """Launch the kernel. Also runs on CPU tensors under TRITON_INTERPRET=1, which is how the tests use it.

    With programmatic dependent launch, parameters may be read before the previous launch has ended, because no kernel
    of a model writes them. Other tensors wait, because that launch may be what writes them.
    """
    _check(x, weight, bias, mix)
    B, H, W, C = x.shape
    J = len(mix)
    check_batch("norm_shift_mix", B)
    if H > SIDE * MOST_IN_BATCH:
        raise ValueError(f"the norm_shift_mix kernel takes maps of at most {SIDE * MOST_IN_BATCH} rows, got {H}")
    check_counts("norm_shift_mix", pixels=(H + SIDE) * (W + SIDE))
    y = torch.empty((J, B, H, W, C), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    fixed = all(isinstance(t, torch.nn.Parameter) and t.is_contiguous() for t in (weight, bias, mix))  # or copied below
    x, weight, bias, mix = contiguous(x, weight, bias, mix)
    config = config or launch_config(x.device)
    settings = choose_blocks(C, x.numel(), x.dtype, config)
    grid = (triton.cdiv(W, SIDE), triton.cdiv(H, SIDE), B)
    BLOCK_C = settings["BLOCK_C"]
    EARLY = fixed and C <= MANY_CHANNELS and grid[0] * grid[1] * B <= FEW_PROGRAMS
    aligned = all(t.data_ptr() % 4 == 0 for t in (x, weight, bias, mix))
    PACKED = x.dtype == torch.bfloat16 and C % 8 == 0 and C % BLOCK_C == 0 and aligned
    with torch.cuda.device_of(x):
        _norm_shift_mix_kernel[grid](
            x, weight, bias, mix, y, B * H * W, H, W, eps, C, J, EARLY, PACKED, BLOCK_C,
            **config.options(settings),
        )  # fmt: skip
    return y


norm_shift_mix = register(
    "norm_shift_mix",
    norm_shift_mix_ref,
    norm_shift_mix_triton,
    lambda x, weight, bias, mix, eps: torch.empty((len(mix), *x.shape), dtype=x.dtype, device=x.device),
)
