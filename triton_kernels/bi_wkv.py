"""Bidirectional WKV scan, the token mixer of RWKV-SAM.

    y_t = (sum_{i != t} exp(k_i - (|t - i| - 1) w) v_i + exp(k_t + u) v_t)
        / (sum_{i != t} exp(k_i - (|t - i| - 1) w)     + exp(k_t + u))

independently for every channel. k, v (and r) are read once and y is written once: 3 (4) * B * T * C * itemsize bytes,
which is the bound to compare a benchmark with. The kernels read k and v twice: one launch sums up every tile of tokens,
and every group of tiles; in the second each tile adds up the groups and tiles to either side and then walks through its
own tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import HAS_TRITON, quotient, tl, triton, two_floats, wait_for_inputs
from .launch_config import launch_options, launch_settings
from .operator import check_batch, register
from .rows import parts_help

# Within these bounds one shift by the largest k keeps every term that can matter inside float32's exponent range.
MAX_DECAY = 40.0
MAX_BONUS = 20.0
CHANNELS_AT_ONCE = 32  # on a CPU, where the temporary tensors of 4096 tokens then stay in the cache: twice as fast
# The kernel sums plainly where the decay over a tile stays below this: rounding grows with it.
TILE_DECAY = {torch.float32: 4.0, torch.float16: 20.0, torch.bfloat16: 20.0}
_LOG2E: Any = tl.constexpr(1.4426950408889634) if HAS_TRITON else None  # exponents are kept in powers of two


def bi_wkv_ref(w: Tensor, u: Tensor, k: Tensor, v: Tensor, r: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """Oracle, CPU path and export decomposition: linear in T, differentiable, no loop over tokens.

    Args:
        w: `[C]` decay a token; either sign.
        u: `[C]` bonus of the token itself.
        k: `[B, T, C]` log-weights.
        v: `[B, T, C]` values.
        r: `[B, T, C]`: the result is multiplied by sigmoid(r).
        scale: w and u are multiplied by it; 1 / T for decays that are meant over the whole sequence.

    Returns:
        `[B, T, C]` in v's dtype. Sums are taken in float32, or float64 for float64 input.

    While tracing or recording a CUDA graph, where values cannot be looked at, |w| * T <= 40 and |u| <= 20 is assumed.
    """
    _check(w, u, k, v, r)
    if k.numel() == 0:
        return torch.empty_like(v)
    dtype = torch.promote_types(k.dtype, torch.float32)
    w, u, k32, v32 = w.to(dtype) * scale, u.to(dtype) * scale, k.to(dtype), v.to(dtype)
    unseen = torch.compiler.is_compiling() or w.is_meta or (w.is_cuda and torch.cuda.is_current_stream_capturing())
    fits = unseen or bool(((w.abs() * k.shape[1] <= MAX_DECAY) & (u.abs() <= MAX_BONUS)).all())
    form = _prefix_sums if fits else _rescaled_doubling

    def gated(c: slice) -> Tensor:
        y = form(w[c], u[c], k32[..., c], v32[..., c])
        return (y if r is None else y * torch.sigmoid(r[..., c].to(dtype))).to(v.dtype)

    C = k.shape[2]
    if not parts_help(k) or C <= CHANNELS_AT_ONCE:
        return gated(slice(None))
    return torch.cat([gated(slice(c, c + CHANNELS_AT_ONCE)) for c in range(0, C, CHANNELS_AT_ONCE)], dim=-1)


def _check(w: Tensor, u: Tensor, k: Tensor, v: Tensor, r: Tensor | None) -> None:
    C = k.shape[-1]
    same = all(t.shape == k.shape and t.dtype == k.dtype for t in (v, k if r is None else r))
    if k.ndim != 3 or not same or w.shape != (C,) or u.shape != (C,):
        named = {"k": k, "v": v, "w": w, "u": u} | ({} if r is None else {"r": r})
        raise ValueError(
            "bi_wkv needs k, v (and r) [B, T, C] of one dtype, and w and u [C], got "
            + ", ".join(f"{name} {list(t.shape)} {t.dtype}" for name, t in named.items())
        )


def _prefix_sums(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two exclusive prefix sums, over tokens in a chunk and over chunks, each as a product with a triangle of ones.

    With exp(w * position) taken out, both sums are plain ones. Positions count from the middle of the chunk (and of
    the row of chunks), so that the factors stay within exp(|w| T / 2). Sums are exclusive by construction: taking a
    token out again by subtraction would cancel.

    What is common to numerator and denominator cancels, so both are divided by exp(w) / grow: the sum to the left then
    needs no factor, and the token's own term is its term in that sum times exp(u - w).
    """
    B, T, C = k.shape
    L = 1 << max(0, (T.bit_length() - 1) // 2 - 1)  # chunk length: the two levels then cost about the same
    n = -(-T // L)
    k = k - k.detach().amax(1, keepdim=True)
    if n * L != T:
        k, v = F.pad(k, (0, 0, 0, n * L - T), value=-torch.inf), F.pad(v, (0, 0, 0, n * L - T))

    p = k.exp().reshape(B * n, L, C)  # which copies where tokens do not lie one after the other
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
    """Any w and u: log2(T) doubling steps on sums that each carry their own largest exponent."""
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


@triton.jit
def _combine(m_a, num_a, den_a, m_b, num_b, den_b):
    """The sum of two sums, each in units of its own 2^m."""
    m = tl.maximum(m_a, m_b)
    scale_a, scale_b = tl.exp2(m_a - m), tl.exp2(m_b - m)
    return m, num_a * scale_a + num_b * scale_b, den_a * scale_a + den_b * scale_b


@triton.jit
def _add_four(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _weighted_sums(
    k_ptr, v_ptr, first_c, offset, w, length, mask_c,
    STRIDE_T: tl.constexpr, SEGMENTS: tl.constexpr, LENGTH: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum over a tile of exp(k) * 2^(-distance * w) * v, and without v, in units of 2^m, for any w; all [BLOCK_C].

    offset + i is the distance of token i of every segment, [SEGMENTS].
    """
    offs_t = tl.arange(0, SEGMENTS) * LENGTH
    k_ptrs = _first_tokens(k_ptr, first_c, STRIDE_T, False, SEGMENTS, LENGTH, BLOCK_C)
    v_ptrs = _first_tokens(v_ptr, first_c, STRIDE_T, False, SEGMENTS, LENGTH, BLOCK_C)
    m = tl.full((SEGMENTS, BLOCK_C), -1e30, tl.float32)
    num = tl.zeros((SEGMENTS, BLOCK_C), tl.float32)
    den = tl.zeros((SEGMENTS, BLOCK_C), tl.float32)
    for i in range(LENGTH):
        real = (offs_t + i < length)[:, None]
        k = tl.load(k_ptrs + i * STRIDE_T, mask=real & mask_c[None, :], other=0.0).to(tl.float32)
        v = tl.load(v_ptrs + i * STRIDE_T, mask=real & mask_c[None, :], other=0.0).to(tl.float32)
        exponent = tl.where(real, k * _LOG2E - (offset + i)[:, None] * w[None, :], -1e30)
        new = tl.maximum(m, exponent)
        kept, p = tl.exp2(m - new), tl.where(real, tl.exp2(exponent - new), 0.0)
        m, num, den = new, num * kept + p * v, den * kept + p
    top = tl.max(m, 0)
    scale = tl.exp2(m - top[None, :])
    return top, tl.sum(num * scale, 0), tl.sum(den * scale, 0)


@triton.jit
def _first_tokens(
    ptr, first_c, STRIDE_T: tl.constexpr, PACKED: tl.constexpr,
    SEGMENTS: tl.constexpr, LENGTH: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Pointers to the first token of every segment of the tile at `ptr`: `[SEGMENTS, BLOCK_C]`, or, where two channels
    are read in one word, `[SEGMENTS, BLOCK_C / 2]`."""
    offs_t = tl.arange(0, SEGMENTS) * LENGTH  # 32 bits do within the tile
    if PACKED:
        offs = offs_t[:, None] * (STRIDE_T // 2) + (first_c // 2 + tl.arange(0, BLOCK_C // 2))[None, :]
        ptrs = ptr.to(tl.pointer_type(tl.uint32)) + offs
    else:
        ptrs = ptr + (offs_t[:, None] * STRIDE_T + (first_c + tl.arange(0, BLOCK_C))[None, :])
    return ptrs


@triton.jit
def _load_token(ptrs, i: tl.constexpr, STRIDE_T: tl.constexpr, EVEN: tl.constexpr, offs_t, length, mask_c):
    """Token i of every segment, as `ptrs` point to it; zeros where there is none, unless all come out EVEN."""
    if EVEN:
        x = tl.load(ptrs + i * (STRIDE_T // 2 if ptrs.dtype.element_ty == tl.uint32 else STRIDE_T))
    else:
        x = tl.load(ptrs + i * STRIDE_T, mask=(offs_t + i < length)[:, None] & mask_c[None, :], other=0.0)
    return x


@triton.jit
def _floats(x, SEGMENTS: tl.constexpr, BLOCK_C: tl.constexpr):
    """float32 of what was loaded."""
    if x.dtype == tl.uint32:
        even, odd = two_floats(x)
        y = tl.reshape(tl.join(even, odd), (SEGMENTS, BLOCK_C))
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def _tile_sums(
    k_ptr, v_ptr, first_c, w, mask_c, length,  # the pointers to the tile's first token
    STRIDE_T: tl.constexpr, EVEN: tl.constexpr, PACKED: tl.constexpr, TILE_DECAY: tl.constexpr,
    SEGMENTS: tl.constexpr, LENGTH: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What a tile with `length` tokens left adds to the token right behind it, and to the one right before it."""
    BLOCK_T: tl.constexpr = SEGMENTS * LENGTH
    offs_t = tl.arange(0, SEGMENTS) * LENGTH
    before = offs_t.to(tl.float32)
    k_ptrs = _first_tokens(k_ptr, first_c, STRIDE_T, PACKED, SEGMENTS, LENGTH, BLOCK_C)
    v_ptrs = _first_tokens(v_ptr, first_c, STRIDE_T, PACKED, SEGMENTS, LENGTH, BLOCK_C)
    k = ()
    v = ()
    for i in tl.static_range(LENGTH):
        k_i = _floats(_load_token(k_ptrs, i, STRIDE_T, EVEN, offs_t, length, mask_c), SEGMENTS, BLOCK_C)
        k += (k_i if EVEN else tl.where((offs_t + i < length)[:, None], k_i, -1e30),)
        v += (_load_token(v_ptrs, i, STRIDE_T, EVEN, offs_t, length, mask_c),)
    top = tl.full((SEGMENTS, BLOCK_C), -1e30, tl.float32)
    for i in tl.static_range(LENGTH):
        top = tl.maximum(top, k[i])
    m_r = tl.max(top, 0) * _LOG2E
    decay = tl.exp2(-w)[None, :]
    num_l = tl.zeros((SEGMENTS, BLOCK_C), tl.float32)
    den_l, num_r, den_r = num_l, num_l, num_l
    fall = num_l + 1.0  # of token i as seen from the segment's first
    for i in tl.static_range(LENGTH):
        p = tl.exp2(k[i] * _LOG2E - m_r[None, :])
        pv = p * _floats(v[i], SEGMENTS, BLOCK_C)
        num_l = num_l * decay + pv
        den_l = den_l * decay + p
        num_r += fall * pv
        den_r += fall * p
        fall *= decay
    from_right = tl.exp2(-(BLOCK_T - LENGTH - before)[:, None] * w[None, :])
    from_left = tl.exp2(-before[:, None] * w[None, :])
    num_l, den_l, num_r, den_r = tl.reduce(
        (num_l * from_right, den_l * from_right, num_r * from_left, den_r * from_left), 0, _add_four
    )
    m_l = m_r
    if tl.max(tl.abs(w)) * BLOCK_T > TILE_DECAY * _LOG2E:  # plain sums are not safe, as in the kernel below
        m_r, num_r, den_r = _weighted_sums(
            k_ptr, v_ptr, first_c, before, w, length, mask_c, STRIDE_T, SEGMENTS, LENGTH, BLOCK_C
        )
        m_l, num_l, den_l = _weighted_sums(  # the same distances from the other end: w with the other sign
            k_ptr, v_ptr, first_c, before - (BLOCK_T - 1), -w, length, mask_c, STRIDE_T, SEGMENTS, LENGTH, BLOCK_C
        )
    return m_l, num_l, den_l, m_r, num_r, den_r


@triton.jit
def _store_state(ptr, C: tl.constexpr, mask_c, m_left, num_left, den_left, m_right, num_right, den_right):
    tl.store(ptr, m_left, mask=mask_c)
    tl.store(ptr + C, num_left, mask=mask_c)
    tl.store(ptr + 2 * C, den_left, mask=mask_c)
    tl.store(ptr + 3 * C, m_right, mask=mask_c)
    tl.store(ptr + 4 * C, num_right, mask=mask_c)
    tl.store(ptr + 5 * C, den_right, mask=mask_c)


@triton.jit
def _bi_wkv_summary_kernel(
    w_ptr, k_ptr, v_ptr,  # [C], [B, T, C], [B, T, C]; the last dim has stride 1
    tile_ptr, group_ptr,  # [B, TILES, 6, C], [B, GROUPS, 6, C] float32, contiguous
    T, scale, TILES, GROUPS, TILES_PER_GROUP,
    stride_kb, stride_vb,  # in elements
    C: tl.constexpr, STRIDE_T: tl.constexpr, EVEN: tl.constexpr, PACKED: tl.constexpr, TILE_DECAY: tl.constexpr,
    SEGMENTS: tl.constexpr, LENGTH: tl.constexpr, BLOCK_C: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """What each tile, and each group of tiles, adds to the token right behind it and to the one right before it."""
    wait_for_inputs(OVERLAP)
    BLOCK_T: tl.constexpr = SEGMENTS * LENGTH
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    first_c = (pid % blocks_c) * BLOCK_C
    offs_c = first_c + tl.arange(0, BLOCK_C)
    group = pid // blocks_c
    mask_c = offs_c < C
    w = tl.load(w_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32) * (scale * _LOG2E)
    first = group * TILES_PER_GROUP
    start = first.to(tl.int64) * (BLOCK_T * STRIDE_T)
    k_ptr += b * stride_kb + start
    v_ptr += b * stride_vb + start
    if TILES_PER_GROUP > 1:
        m_left = tl.full((BLOCK_C,), -1e30, tl.float32)  # no infinity: the difference of two would be NaN
        num_left = tl.zeros((BLOCK_C,), tl.float32)
        den_left = tl.zeros((BLOCK_C,), tl.float32)
        m_right, num_right, den_right = m_left, num_left, num_left
        for tile in range(first, tl.minimum(first + TILES_PER_GROUP, TILES)):
            m_l, num_l, den_l, m_r, num_r, den_r = _tile_sums(
                k_ptr, v_ptr, first_c, w, mask_c, T - tile * BLOCK_T,
                STRIDE_T, EVEN, PACKED, TILE_DECAY, SEGMENTS, LENGTH, BLOCK_C,
            )  # fmt: skip
            ptr = tile_ptr + (b * TILES + tile) * 6 * C + offs_c
            _store_state(ptr, C, mask_c, m_l, num_l, den_l, m_r, num_r, den_r)
            m_left -= w * BLOCK_T
            m_left, num_left, den_left = _combine(m_left, num_left, den_left, m_l, num_l, den_l)
            m_r -= w * ((tile - first) * BLOCK_T)
            m_right, num_right, den_right = _combine(m_right, num_right, den_right, m_r, num_r, den_r)
            k_ptr += BLOCK_T * STRIDE_T
            v_ptr += BLOCK_T * STRIDE_T
    else:  # no loop, before which w would be waited for
        m_left, num_left, den_left, m_right, num_right, den_right = _tile_sums(
            k_ptr, v_ptr, first_c, w, mask_c, T - first * BLOCK_T,
            STRIDE_T, EVEN, PACKED, TILE_DECAY, SEGMENTS, LENGTH, BLOCK_C,
        )  # fmt: skip
    ptr = group_ptr + (b * GROUPS + group) * 6 * C + offs_c
    _store_state(ptr, C, mask_c, m_left, num_left, den_left, m_right, num_right, den_right)


@triton.jit
def _add_states(ptr, wanted, distance, w, C: tl.constexpr, mask_c, m, num, den):
    """Add the stored sums `ptr` [N, C] that are `wanted` [N], seen from `distance` [N] tokens farther away."""
    mask = wanted[:, None] & mask_c[None, :]
    exponent = tl.load(ptr, mask=mask, other=-1e30)
    more_num = tl.load(ptr + C, mask=mask, other=0.0)
    more_den = tl.load(ptr + 2 * C, mask=mask, other=0.0)
    exponent -= distance.to(tl.float32)[:, None] * w[None, :]
    new = tl.maximum(m, tl.max(exponent, 0))
    p, kept = tl.exp2(exponent - new[None, :]), tl.exp2(m - new)
    return new, num * kept + tl.sum(p * more_num, 0), den * kept + tl.sum(p * more_den, 0)


@triton.jit
def _add_both_sides(
    ptr, n, here, end, distance, w, scale, C: tl.constexpr, mask_c, m, num_left, den_left, num_right, den_right,
    OWN: tl.constexpr,
):  # fmt: skip
    """The same for both sides at once, in units of one 2^m: the states n < end, [N, 6, C], to either side of `here`.

    The state `here` adds nothing, but if it is the tile's OWN its largest term is at most 2^m, too. w is as it was
    loaded: it is not waited for before the states are under way as well.
    """
    left, apart = (n < here)[:, None], ((n != here) & (n < end))[:, None]
    ptr += tl.where(left, 0, 3 * C)
    exponent = tl.load(ptr, mask=(n < end)[:, None] & mask_c[None, :] if OWN else apart & mask_c[None, :], other=-1e30)
    num = tl.load(ptr + C, mask=apart & mask_c[None, :], other=0.0)
    den = tl.load(ptr + 2 * C, mask=apart & mask_c[None, :], other=0.0)
    exponent -= tl.maximum(distance, 0).to(tl.float32)[:, None] * (w.to(tl.float32) * (scale * _LOG2E))[None, :]
    new = tl.maximum(m, tl.max(exponent, 0))
    p, kept = tl.exp2(exponent - new[None, :]), tl.exp2(m - new)
    p_left, p_right = tl.where(left, p, 0.0), tl.where(left, 0.0, p)
    num_l, den_l, num_r, den_r = tl.reduce((p_left * num, p_left * den, p_right * num, p_right * den), 0, _add_four)
    return (
        new, num_left * kept + num_l, den_left * kept + den_l, num_right * kept + num_r, den_right * kept + den_r
    )  # fmt: skip


@triton.jit
def _add_all_but_last(num_a, last_num_a, den_a, last_den_a, num_b, last_num_b, den_b, last_den_b):
    """Scanned with this, (0, x) becomes (the sum of all x before, x): nothing is taken out again by subtraction."""
    return num_a + last_num_a + num_b, last_num_b, den_a + last_den_a + den_b, last_den_b


@triton.jit
def _store_exact(
    w_ptr, u_ptr, k_ptr, v_ptr, r_ptr, tile_ptr, group_ptr, y_ptr,  # as the kernel below was given them
    T, scale, TILES, GROUPS, TILES_PER_GROUP, stride_kb, stride_vb, stride_rb,
    C: tl.constexpr, STRIDE_T: tl.constexpr, GATED: tl.constexpr,
    SEGMENTS: tl.constexpr, LENGTH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile's output for any w and u: the tile's tokens are added up one by one, in units of the largest so far."""
    BLOCK_T: tl.constexpr = SEGMENTS * LENGTH
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    b = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)
    offs_c = (pid % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    w = tl.load(w_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32) * (scale * _LOG2E)
    u = tl.load(u_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32) * (scale * _LOG2E)
    tile = pid // blocks_c
    first_token = tile * BLOCK_T
    group = tile // TILES_PER_GROUP
    group_length = TILES_PER_GROUP * BLOCK_T
    offs_n = tl.arange(0, BLOCK_N)

    m_left = tl.full((BLOCK_C,), -1e30, tl.float32)
    num_left = tl.zeros((BLOCK_C,), tl.float32)
    den_left = num_left
    m_right, num_right, den_right = m_left, num_left, num_left
    ptr = group_ptr + ((b * GROUPS + offs_n) * (6 * C))[:, None] + offs_c[None, :]
    m_left, num_left, den_left = _add_states(
        ptr, offs_n < group, first_token - (offs_n + 1) * group_length, w, C, mask_c, m_left, num_left, den_left
    )
    m_right, num_right, den_right = _add_states(
        ptr + 3 * C, (offs_n > group) & (offs_n < GROUPS), offs_n * group_length - (first_token + BLOCK_T),
        w, C, mask_c, m_right, num_right, den_right,
    )  # fmt: skip
    if TILES_PER_GROUP > 1:
        end = tl.minimum((group + 1) * TILES_PER_GROUP, TILES)
        for first in range(group * TILES_PER_GROUP, end, BLOCK_N):
            n = first + offs_n
            ptr = tile_ptr + ((b * TILES + n) * (6 * C))[:, None] + offs_c[None, :]
            m_left, num_left, den_left = _add_states(
                ptr, n < tile, (tile - (n + 1)) * BLOCK_T, w, C, mask_c, m_left, num_left, den_left
            )
            m_right, num_right, den_right = _add_states(
                ptr + 3 * C, (n > tile) & (n < end), (n - (tile + 1)) * BLOCK_T, w, C, mask_c,
                m_right, num_right, den_right,
            )  # fmt: skip

    segment = tl.arange(0, SEGMENTS)
    for i in range(LENGTH):
        place = (segment * LENGTH + i).to(tl.float32)
        from_left = m_left[None, :] - place[:, None] * w[None, :]
        from_right = m_right[None, :] - (BLOCK_T - 1 - place)[:, None] * w[None, :]
        m_i, num_i, den_i = _combine(
            from_left, num_left[None, :], den_left[None, :], from_right, num_right[None, :], den_right[None, :]
        )
        for j in range(tl.minimum(T - first_token, BLOCK_T)):
            offs = (first_token.to(tl.int64) + j) * STRIDE_T + offs_c
            k_j = tl.load(k_ptr + (b * stride_kb + offs), mask=mask_c, other=0.0).to(tl.float32)[None, :]
            v_j = tl.load(v_ptr + (b * stride_vb + offs), mask=mask_c, other=0.0).to(tl.float32)[None, :]
            apart = tl.abs(place - j)[:, None]
            exponent = k_j * _LOG2E + tl.where(apart == 0, u[None, :], (1 - apart) * w[None, :])
            new = tl.maximum(m_i, exponent)
            kept, weight = tl.exp2(m_i - new), tl.exp2(exponent - new)
            m_i, num_i, den_i = new, num_i * kept + weight * v_j, den_i * kept + weight
        token = (first_token + segment * LENGTH + i).to(tl.int64)
        mask = (token < T)[:, None] & mask_c[None, :]
        if GATED:
            r_ptrs = r_ptr + ((b * stride_rb + token * STRIDE_T)[:, None] + offs_c[None, :])
            den_i += den_i * tl.exp2(tl.load(r_ptrs, mask=mask, other=0.0).to(tl.float32) * -_LOG2E)
        y_ptrs = y_ptr + (((b * T + token) * C)[:, None] + offs_c[None, :])
        tl.store(y_ptrs, (num_i / den_i).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bi_wkv_kernel(
    w_ptr, u_ptr, k_ptr, v_ptr, r_ptr,  # [C], [C], [B, T, C] x 3; the last dim has stride 1
    tile_ptr, group_ptr, y_ptr,  # as the summary kernel wrote them; [B, T, C] contiguous
    T, scale, TILES, GROUPS, TILES_PER_GROUP,
    stride_kb, stride_vb, stride_rb,  # in elements
    C: tl.constexpr, STRIDE_T: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr,
    PACKED: tl.constexpr, TILE_DECAY: tl.constexpr,
    SEGMENTS: tl.constexpr, LENGTH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """The output of one tile: SEGMENTS stretches of LENGTH tokens, each walked through in registers, side by side."""
    BLOCK_T: tl.constexpr = SEGMENTS * LENGTH
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    b = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)  # backwards: the last images are still in the cache
    first_c = (pid % blocks_c) * BLOCK_C
    offs_c = first_c + tl.arange(0, BLOCK_C)
    tile = pid // blocks_c
    mask_c = offs_c < C
    start = tile.to(tl.int64) * BLOCK_T
    segment = tl.arange(0, SEGMENTS)
    offs_t = segment * LENGTH  # 32 bits do within the tile
    length = tl.minimum(T - start, BLOCK_T).to(tl.int32)
    k_tile, v_tile = k_ptr + (b * stride_kb + start * STRIDE_T), v_ptr + (b * stride_vb + start * STRIDE_T)
    k_ptrs = _first_tokens(k_tile, first_c, STRIDE_T, PACKED, SEGMENTS, LENGTH, BLOCK_C)
    v_ptrs = _first_tokens(v_tile, first_c, STRIDE_T, PACKED, SEGMENTS, LENGTH, BLOCK_C)
    r_tile = r_ptr + (b * stride_rb + start * STRIDE_T)
    r_ptrs = _first_tokens(r_tile, first_c, STRIDE_T, PACKED, SEGMENTS, LENGTH, BLOCK_C)
    group = tile // TILES_PER_GROUP
    group_length = TILES_PER_GROUP * BLOCK_T
    first_tile = group * TILES_PER_GROUP
    last_tile = tl.minimum(first_tile + TILES_PER_GROUP, TILES)
    offs_n = tl.arange(0, BLOCK_N)  # of groups: there are no more

    # All loads that need no other come first, and are under way while the states are added up.
    w = tl.load(w_ptr + offs_c, mask=mask_c, other=0.0)
    u = tl.load(u_ptr + offs_c, mask=mask_c, other=0.0)
    # Outputs come in parts of the segments, the last part first: no more sums are at hand than registers are.
    PART: tl.constexpr = LENGTH if LENGTH < 16 else 16
    LAST: tl.constexpr = LENGTH - PART
    k = ()
    v = ()
    r = ()
    for i in tl.static_range(LENGTH):
        k += (_load_token(k_ptrs, i, STRIDE_T, EVEN, offs_t, length, mask_c),)
        v += (_load_token(v_ptrs, i, STRIDE_T, EVEN, offs_t, length, mask_c),)
        if GATED and i < PART:
            r += (_load_token(r_ptrs, LAST + i, STRIDE_T, EVEN, offs_t, length, mask_c),)
    wait_for_inputs(OVERLAP)  # k, v and r were there before the summary kernel began
    m = tl.full((BLOCK_C,), -1e30, tl.float32)
    # All tokens to the left as seen from the first token of the tile, all to the right as seen from the last.
    num_left = tl.zeros((BLOCK_C,), tl.float32)
    den_left, num_right, den_right = num_left, num_left, num_left
    distance = tl.where(
        offs_n < group, tile * BLOCK_T - (offs_n + 1) * group_length, offs_n * group_length - (tile + 1) * BLOCK_T
    )
    m, num_left, den_left, num_right, den_right = _add_both_sides(
        group_ptr + b * GROUPS * 6 * C + offs_n[:, None] * (6 * C) + offs_c[None, :], offs_n, group, GROUPS, distance,
        w, scale, C, mask_c, m, num_left, den_left, num_right, den_right, TILES_PER_GROUP == 1,
    )  # fmt: skip
    if TILES_PER_GROUP > 1:
        for first in range(first_tile, last_tile, BLOCK_N):
            n = first + offs_n
            distance = tl.where(n < tile, tile - (n + 1), n - (tile + 1)) * BLOCK_T
            m, num_left, den_left, num_right, den_right = _add_both_sides(
                tile_ptr + b * TILES * 6 * C + n[:, None] * (6 * C) + offs_c[None, :], n, tile, last_tile, distance,
                w, scale, C, mask_c, m, num_left, den_left, num_right, den_right, True,
            )  # fmt: skip

    w = w.to(tl.float32) * (scale * _LOG2E)
    u = u.to(tl.float32) * (scale * _LOG2E)
    beyond = tl.maximum(tl.abs(w) * (BLOCK_T / (TILE_DECAY * _LOG2E)), tl.abs(u) * (1.0 / (20.0 * _LOG2E)))
    plain = tl.max(beyond) <= 1.0

    every_row = tl.broadcast_to(offs_c[None, :], (SEGMENTS, BLOCK_C))  # each thread loads its own: no exchange
    w_row = tl.load(w_ptr + every_row, mask=every_row < C, other=0.0)
    u_row = tl.load(u_ptr + every_row, mask=every_row < C, other=0.0)
    w_row = w_row.to(tl.float32) * (scale * _LOG2E)
    u_row = u_row.to(tl.float32) * (scale * _LOG2E)
    decay = tl.exp2(-w_row)
    zero = tl.zeros((SEGMENTS, BLOCK_C), tl.float32)
    num_l, den_l, num_r, den_r = zero, zero, zero, zero  # what each segment adds behind and before itself
    p = ()
    pv = ()
    num_before = ()  # the sums to the left of each part that begin with its segment
    den_before = ()
    for i in tl.static_range(LENGTH):
        if i % PART == 0:
            num_before += (num_l,)
            den_before += (den_l,)
        p_i = tl.exp2(_floats(k[i], SEGMENTS, BLOCK_C) * _LOG2E - m[None, :])
        p += (p_i if EVEN else tl.where((offs_t + i < length)[:, None], p_i, 0.0),)
        pv += (p[i] * _floats(v[i], SEGMENTS, BLOCK_C),)
        num_l = num_l * decay + pv[i]
        den_l = den_l * decay + p[i]
    for i in tl.static_range(LENGTH):
        num_r = num_r * decay + pv[LENGTH - 1 - i]
        den_r = den_r * decay + p[LENGTH - 1 - i]
    exponent = ((segment - (SEGMENTS - 1) / 2) * LENGTH)[:, None] * w_row
    grow, shrink = tl.exp2(exponent), tl.exp2(-exponent)
    step = tl.exp2(w_row * LENGTH)
    num_l, _, den_l, _ = tl.associative_scan((zero, num_l * grow, zero, den_l * grow), 0, _add_all_but_last)
    num_r, _, den_r, _ = tl.associative_scan(
        (zero, num_r * shrink, zero, den_r * shrink), 0, _add_all_but_last, reverse=True
    )
    kept = tl.exp2(-w * (LENGTH * (SEGMENTS - 1) / 2))
    num_l = (num_l * step + (num_left * kept)[None, :]) * shrink
    den_l = (den_l * step + (den_left * kept)[None, :]) * shrink
    num_r = (num_r * step + (num_right * kept)[None, :]) * grow
    den_r = (den_r * step + (den_right * kept)[None, :]) * grow

    y_ptrs = y_ptr + (b * T + start) * C + (offs_t[:, None] * C + offs_c[None, :])
    bonus = tl.exp2(u_row)
    for part in tl.static_range(LAST // PART, -1, -1):
        num = ()
        den = ()
        for i in tl.static_range(PART):  # from the last token to the first
            num += (num_r,)
            den += (den_r,)
            num_r = num_r * decay + pv[part * PART + PART - 1 - i]
            den_r = den_r * decay + p[part * PART + PART - 1 - i]
        if part == 0:
            num_t, den_t = num_l, den_l
        else:
            fall = tl.exp2(w_row * (-part * PART))
            num_t = num_l * fall + num_before[part]
            den_t = den_l * fall + den_before[part]
        gates = r
        r = ()
        for i in tl.static_range(PART):
            num_i = num[PART - 1 - i] + bonus * pv[part * PART + i] + num_t
            den_i = den[PART - 1 - i] + bonus * p[part * PART + i] + den_t
            num_t = num_t * decay + pv[part * PART + i]
            den_t = den_t * decay + p[part * PART + i]
            if GATED:
                den_i += den_i * tl.exp2(_floats(gates[i], SEGMENTS, BLOCK_C) * -_LOG2E)  # one division for both
                if part > 0:
                    r += (_load_token(r_ptrs, (part - 1) * PART + i, STRIDE_T, EVEN, offs_t, length, mask_c),)
            y = quotient(num_i, den_i, y_ptr.dtype.element_ty).to(y_ptr.dtype.element_ty)
            ptrs = y_ptrs + (part * PART + i) * C
            if EVEN:
                tl.store(ptrs, y)
            else:
                tl.store(ptrs, y, mask=(offs_t + part * PART + i < length)[:, None] & mask_c[None, :])

    # In units of 2^top plain sums are safe: a term that underflows is at least exp(18) times smaller than another one
    # of the same output, and far more than that for any but the worst decays and bonuses. Beyond those the output is
    # written over. A branch of its own for either would have the loads wait for w and u.
    if not plain:
        tl.debug_barrier()
        _store_exact(
            w_ptr, u_ptr, k_ptr, v_ptr, r_ptr, tile_ptr, group_ptr, y_ptr,
            T, scale, TILES, GROUPS, TILES_PER_GROUP, stride_kb, stride_vb, stride_rb,
            C, STRIDE_T, GATED, SEGMENTS, LENGTH, BLOCK_C, BLOCK_N,
        )  # fmt: skip


def settings_that_fit(T: int, large: dict[str, int], usual: dict[str, int]) -> dict[str, int]:
    """The large tiles where they come out even and have a group each: there are no registers left for anything else."""
    tile = large["SEGMENTS"] * large["LENGTH"]
    return usual if T % tile or tile * large["BLOCK_N"] < T else large


def bi_wkv_triton(w: Tensor, u: Tensor, k: Tensor, v: Tensor, r: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """Launch the kernels. Also runs on CPU tensors under TRITON_INTERPRET=1, which is how the tests use it."""
    _check(w, u, k, v, r)
    B, T, C = k.shape
    check_batch("bi_wkv", B)
    y = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if y.numel() == 0:
        return y
    usual, large = (launch_settings("bi_wkv", k.device, k.dtype, values) for values in (0, k.numel()))
    settings = settings_that_fit(T, large, usual)
    SEGMENTS, LENGTH, BLOCK_C = settings["SEGMENTS"], settings["LENGTH"], settings["BLOCK_C"]
    w, u = w.contiguous(), u.contiguous()
    given = [t for t in (k, v, r) if t is not None]
    stride = k.stride(1)
    if any(t.stride(2) != 1 or t.stride(1) != stride for t in given) or stride * SEGMENTS * LENGTH >= 2**31 - C:
        k, v, *rest = (t.contiguous() for t in given)  # offsets within a tile have 32 bits
        r, stride = rest[0] if rest else None, C
    tiles = triton.cdiv(T, SEGMENTS * LENGTH)
    tiles_per_group = triton.next_power_of_2(triton.cdiv(tiles, settings["BLOCK_N"]))  # all groups are added in one go
    groups = triton.cdiv(tiles, tiles_per_group)
    tile_state = torch.empty(B, tiles if tiles_per_group > 1 else 0, 6, C, dtype=torch.float32, device=k.device)
    group_state = torch.empty(B, groups, 6, C, dtype=torch.float32, device=k.device)
    blocks_c, even = triton.cdiv(C, BLOCK_C), T % (SEGMENTS * LENGTH) == 0 and C % BLOCK_C == 0
    words = all(t.data_ptr() % 4 == 0 and t.stride(0) % 2 == 0 for t in (k, v, k if r is None else r))
    packed = even and words and k.dtype == torch.bfloat16 and stride % 2 == 0  # two channels are read in one word
    # The summary kernel has the same tiles in segments of at most 16 tokens: it keeps more of a token in registers.
    parts = max(1, LENGTH // 16)
    if not even or tiles_per_group > 1 or k.dtype == torch.float32:
        settings = settings | {"maxnreg": 255}  # masks, a loop over tiles and unpacked values take more
    with torch.cuda.device_of(k):
        _bi_wkv_summary_kernel[(groups * blocks_c, B)](
            w, k, v, tile_state, group_state, T, scale, tiles, groups, tiles_per_group, k.stride(0), v.stride(0),
            C, stride, even, packed, TILE_DECAY[k.dtype], SEGMENTS * parts, LENGTH // parts, BLOCK_C,
            **launch_options(settings | {"num_warps": settings["num_warps"] * parts}, k.device),
        )  # fmt: skip
        _bi_wkv_kernel[(tiles * blocks_c, B)](
            w, u, k, v, k if r is None else r, tile_state, group_state, y,
            T, scale, tiles, groups, tiles_per_group,
            k.stride(0), v.stride(0), 0 if r is None else r.stride(0),
            C, stride, r is not None, even, packed, TILE_DECAY[k.dtype], SEGMENTS, LENGTH, BLOCK_C, settings["BLOCK_N"],
            **launch_options(settings, k.device),
        )  # fmt: skip
    return y


bi_wkv = register(
    "bi_wkv",
    bi_wkv_ref,
    bi_wkv_triton,
    lambda w, u, k, v, r=None, scale=1.0: torch.empty(k.shape, dtype=k.dtype, device=k.device),
)
