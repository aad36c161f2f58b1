"""Bidirectional WKV scan, the token mixer of RWKV-SAM.

    y_t = (sum_{i != t} exp(k_i - (|t - i| - 1) w) v_i + exp(k_t + u) v_t)
        / (sum_{i != t} exp(k_i - (|t - i| - 1) w)     + exp(k_t + u))

independently for every channel. k, v (and r) are read once and y is written once: 3 (4) * B * T * C * itemsize bytes,
the bound to compare a benchmark with. The kernels read k and v twice. The first launch sums every tile of tokens and
every group of tiles. In the second, a tile adds the sums on both sides of it and scans its own tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import triton
from .bi_wkv_exact import _bi_wkv_exact_kernel
from .bi_wkv_kernels import _bi_wkv_kernel, _bi_wkv_summary_kernel
from .launch_config import LaunchConfig, Settings, launch_config
from .operator import check_batch, check_counts, contiguous, described, register
from .rows import parts_help

# Within these bounds, subtracting the largest k keeps every term that matters in the range of float32.
MAX_DECAY = 40.0
MAX_BONUS = 20.0
CHANNELS_AT_ONCE = 32  # on a CPU: temporary tensors of 4096 tokens stay in the cache, which doubles the speed
# Largest decay over a tile for plain sums, because rounding grows with it
TILE_DECAY = {torch.float32: 4.0, torch.float16: 20.0, torch.bfloat16: 20.0}


def bi_wkv_ref(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor | None = None,
    scale: float | None = 1.0,
    bound: float | None = None,
) -> Tensor:
    """Oracle and CPU path: linear in T, differentiable, without a loop over tokens.

    Args:
        w: `[C]` decay of a token, of either sign.
        u: `[C]` bonus of the token itself.
        k: `[B, T, C]` log-weights.
        v: `[B, T, C]` values.
        r: `[B, T, C]` or None; the result is multiplied by sigmoid(r).
        scale: Factor of w and u; None for 1 / T, if they are meant for the whole sequence.
        bound: What no |w| and |u| exceeds before scaling; None to read them, for which a GPU is synchronized.

    Returns:
        `[B, T, C]` in v's dtype; accumulated in float32, or in float64 for float64 input.

    Tracing and CUDA-graph capture cannot read values. There, without `bound`, |w| * T <= 40 and |u| <= 20 are assumed.
    """
    _check(w, u, k, v, r)
    if k.numel() == 0:
        return torch.empty_like(v)
    dtype = torch.promote_types(k.dtype, torch.float32)
    scale = 1 / k.shape[1] if scale is None else scale
    plain = _fits(w, u, scale, bound, k.shape[1], MAX_DECAY, unknown=True)
    form = _prefix_sums if plain else _rescaled_doubling
    w, u, k32, v32 = w.to(dtype) * scale, u.to(dtype) * scale, k.to(dtype), v.to(dtype)

    def gated(c: slice) -> Tensor:
        y = form(w[c], u[c], k32[..., c], v32[..., c])
        return (y if r is None else y * torch.sigmoid(r[..., c].to(dtype))).to(v.dtype)

    C = k.shape[2]
    if not parts_help(k) or C <= CHANNELS_AT_ONCE:
        return gated(slice(None))
    return torch.cat([gated(slice(c, c + CHANNELS_AT_ONCE)) for c in range(0, C, CHANNELS_AT_ONCE)], dim=-1)


def _fits(w: Tensor, u: Tensor, scale: float, bound: float | None, tokens: int, most: float, unknown: bool) -> bool:
    """True if the decay over `tokens` is at most `most`, and a bonus at most MAX_BONUS; `unknown` if nothing tells."""
    if bound is not None:
        largest = [bound, bound]
    elif w.is_meta or torch.compiler.is_compiling() or (w.is_cuda and torch.cuda.is_current_stream_capturing()):
        return unknown
    else:
        largest = torch.stack([w.detach().abs().max(), u.detach().abs().max()]).tolist()
    decay, bonus = (abs(scale) * x for x in largest)
    return decay * tokens <= most and bonus <= MAX_BONUS


def _check(w: Tensor, u: Tensor, k: Tensor, v: Tensor, r: Tensor | None) -> None:
    C = k.shape[-1]
    same = all(t.shape == k.shape and t.dtype == k.dtype for t in (v, k if r is None else r))
    if k.ndim != 3 or not same or w.shape != (C,) or u.shape != (C,):
        dtypes = ", ".join(str(t.dtype) for t in (k, v, r) if t is not None)
        raise ValueError(
            "bi_wkv needs k, v (and r) [B, T, C] of one dtype, and w and u [C], got "
            f"{described(w=w, u=u, k=k, v=v, r=r)}, dtypes {dtypes}"
        )


def _prefix_sums(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Exclusive prefix sums over tokens in a chunk and over chunks, each a product with a triangle of ones.

    Factoring out exp(w * position) makes both sums plain. Positions count from the middle of the chunk (and of the row
    of chunks), so that the factors stay within exp(|w| T / 2). Sums are exclusive by construction, because subtracting
    a token would cancel.

    Numerator and denominator are both divided by exp(w) / grow. The sum to the left then needs no factor, and the
    token's own term is its term in that sum times exp(u - w).
    """
    B, T, C = k.shape
    L = 1 << max(0, (T.bit_length() - 1) // 2 - 1)  # chunk length: both levels cost about the same
    n = -(-T // L)
    k = k - k.detach().amax(1, keepdim=True)
    if n * L != T:
        k, v = F.pad(k, (0, 0, 0, n * L - T), value=-torch.inf), F.pad(v, (0, 0, 0, n * L - T))

    p = k.exp().reshape(B * n, L, C)  # copies if tokens are not adjacent in memory
    offset = torch.arange(L, device=k.device, dtype=k.dtype) - (L - 1) / 2
    block = torch.arange(n, device=k.device, dtype=k.dtype) - (n - 1) / 2
    grow = (offset[:, None] * w).exp()  # [L, C]
    grow_n = (block[:, None] * (L * w)).exp()  # [n, C]
    grow_twice, own = grow * grow, (u - w).exp()
    ones, ones_n = k.new_ones(L, L), k.new_ones(n, n)

    def sums(terms: Tensor, scale_n: Tensor, others: Tensor, others_n: Tensor) -> Tensor:
        carry = torch.matmul(others_n, terms.sum(1).view(B, n, C) * scale_n) / scale_n
        return torch.baddbmm(carry.view(B * n, 1, C), others.expand(B * n, L, L), terms)

    def weighted_sum(x: Tensor) -> Tensor:
        to_left, to_right = x * grow, x / grow
        left = sums(to_left, grow_n, ones.tril(-1), ones_n.tril(-1))
        right = sums(to_right, 1 / grow_n, ones.triu(1), ones_n.triu(1))
        return left.addcmul(to_left, own).addcmul(right, grow_twice)

    y = weighted_sum(p * v.reshape(B * n, L, C)) / weighted_sum(p)
    return y.view(B, n * L, C)[:, :T]


def _rescaled_doubling(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Sums for any w and u: log2(T) doubling steps, in which each sum carries its largest exponent."""
    T = k.shape[1]

    def shift(state: tuple[Tensor, Tensor, Tensor], by: int) -> tuple[Tensor, Tensor, Tensor]:
        m, num, den = (s[:, :-by] for s in state)
        pad = (0, 0, by, 0)
        return F.pad(m, pad, value=-torch.inf), F.pad(num, pad), F.pad(den, pad)

    def add(a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        m = torch.maximum(a[0], b[0])
        scale_a, scale_b = (a[0] - m).exp(), (b[0] - m).exp()
        return m, a[1] * scale_a + b[1] * scale_b, a[2] * scale_a + b[2] * scale_b

    def sums_before(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state = (k, v, torch.ones_like(k))
        reach = 1
        while reach < T:
            m, num, den = shift(state, reach)
            state = add(state, (m - reach * w, num, den))
            reach *= 2
        return shift(state, 1)

    left = sums_before(k, v)
    m, num, den = (s.flip(1) for s in sums_before(k.flip(1), v.flip(1)))
    _, num, den = add(add((k + u, v, torch.ones_like(k)), left), (m, num, den))
    return num / den


class Tiles(NamedTuple):
    """Launch settings, and how the tokens are divided: `tiles`, of which `in_group` form one of `groups`."""

    settings: Settings
    tiles: int
    in_group: int
    groups: int


def choose_blocks(T: int, values: int, dtype: torch.dtype, config: LaunchConfig) -> Tiles:
    """Choose the tiles of T tokens. `.large` settings need whole tiles and a group for each: registers are full."""
    settings, large = config.settings_for("bi_wkv", dtype), config.settings_for("bi_wkv", dtype, values)
    large_tile = large["SEGMENTS"] * large["LENGTH"]
    if T % large_tile == 0 and large_tile * large["BLOCK_N"] >= T:
        settings = large
    tiles = -(-T // (settings["SEGMENTS"] * settings["LENGTH"]))
    in_group = 1 << (-(-tiles // settings["BLOCK_N"]) - 1).bit_length()  # a program adds all groups at once
    return Tiles(settings, tiles, in_group, -(-tiles // in_group))


def bi_wkv_triton(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor | None = None,
    scale: float | None = 1.0,
    bound: float | None = None,
    *,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Launch the kernels. Also runs on CPU tensors under TRITON_INTERPRET=1, which is how the tests use it.

    In CUDA-graph capture, without `bound`, the sums are exact, which is slow.
    """
    _check(w, u, k, v, r)
    B, T, C = k.shape
    check_batch("bi_wkv", B)
    y = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if y.numel() == 0:
        return y
    config = config or launch_config(k.device)
    settings, tiles, in_group, groups = choose_blocks(T, k.numel(), k.dtype, config)
    SEGMENTS, LENGTH, BLOCK_C = settings["SEGMENTS"], settings["LENGTH"], settings["BLOCK_C"]
    check_counts("bi_wkv", tokens=settings["BLOCK_N"] * in_group * SEGMENTS * LENGTH)
    scale = 1 / T if scale is None else scale
    plain = _fits(w, u, scale, bound, SEGMENTS * LENGTH, TILE_DECAY[k.dtype], unknown=k.is_meta)
    w, u = contiguous(w, u)
    stride = k.stride(1)
    strides = {t.stride()[1:] for t in (k, v, k if r is None else r)}
    if strides != {(stride, 1)} or stride * SEGMENTS * LENGTH >= 2**31 - C:  # offsets within a tile have 32 bits
        (k, v, r), stride = contiguous(k, v, r), C
    tile_state = torch.empty(B, tiles if in_group > 1 else 0, 6, C, dtype=torch.float32, device=k.device)
    group_state = torch.empty(B, groups, 6, C, dtype=torch.float32, device=k.device)
    blocks_c, even = triton.cdiv(C, BLOCK_C), T % (SEGMENTS * LENGTH) == 0 and C % BLOCK_C == 0
    words = all(t.data_ptr() % 4 == 0 and t.stride(0) % 2 == 0 for t in (k, v, k if r is None else r))
    packed = even and words and k.dtype == torch.bfloat16 and stride % 2 == 0  # a word holds two channels; not timed
    # The summary kernel splits the same tiles into segments of at most 16 tokens, because it holds more per token.
    parts = max(1, LENGTH // 16)
    if not even or in_group > 1 or k.dtype == torch.float32:
        settings = settings | {"maxnreg": 255}  # masks, a loop over tiles and unpacked values need registers
    with torch.cuda.device_of(k):
        _bi_wkv_summary_kernel[(groups * blocks_c, B)](
            w, k, v, tile_state, group_state, T, scale, tiles, groups, in_group, k.stride(0), v.stride(0),
            C, stride, even, packed, not plain, SEGMENTS * parts, LENGTH // parts, BLOCK_C,
            **config.options(settings | {"num_warps": settings["num_warps"] * parts}),
        )  # fmt: skip
        kernel, layout = (_bi_wkv_kernel, (even, packed)) if plain else (_bi_wkv_exact_kernel, ())
        kernel[(tiles * blocks_c, B)](
            w, u, k, v, k if r is None else r, tile_state, group_state, y,
            T, scale, tiles, groups, in_group,
            k.stride(0), v.stride(0), 0 if r is None else r.stride(0),
            C, stride, r is not None, *layout, SEGMENTS, LENGTH, BLOCK_C, settings["BLOCK_N"],
            **config.options(settings),
        )  # fmt: skip
    return y


bi_wkv = register(
    "bi_wkv",
    bi_wkv_ref,
    bi_wkv_triton,
    lambda w, u, k, v, *args: torch.empty(k.shape, dtype=k.dtype, device=k.device),
)
