"""Exact sums of the bidirectional WKV scan for any w and u, in units of the largest term so far.

`bi_wkv.py` launches them if plain sums are not safe: slower by a factor of the tile's length.
"""

from __future__ import annotations

from typing import Any

from ._triton import HAS_TRITON, tl, triton, wait_for_inputs

LOG2E: Any = tl.constexpr(1.4426950408889634) if HAS_TRITON else None  # exponents are powers of two


@triton.jit
def combine(m_a, num_a, den_a, m_b, num_b, den_b):
    """Add two sums, each in units of its own 2^m."""
    m = tl.maximum(m_a, m_b)
    scale_a, scale_b = tl.exp2(m_a - m), tl.exp2(m_b - m)
    return m, num_a * scale_a + num_b * scale_b, den_a * scale_a + den_b * scale_b


@triton.jit
def first_tokens(
    ptr, first_c, STRIDE_T: tl.constexpr, PACKED: tl.constexpr,
    SEGMENTS: tl.constexpr, LENGTH: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Pointers to the first token of every segment of the tile at `ptr`: `[SEGMENTS, BLOCK_C]`.

    With PACKED they point to words of two channels: `[SEGMENTS, BLOCK_C / 2]`.
    """
    offs_t = tl.arange(0, SEGMENTS) * LENGTH  # 32 bits are enough within a tile
    if PACKED:
        offs = offs_t[:, None] * (STRIDE_T // 2) + (first_c // 2 + tl.arange(0, BLOCK_C // 2))[None, :]
        ptrs = ptr.to(tl.pointer_type(tl.uint32)) + offs
    else:
        ptrs = ptr + (offs_t[:, None] * STRIDE_T + (first_c + tl.arange(0, BLOCK_C))[None, :])
    return ptrs


@triton.jit
def _weighted_sums(
    k_ptr, v_ptr, first_c, offset, w, length, mask_c,
    STRIDE_T: tl.constexpr, SEGMENTS: tl.constexpr, LENGTH: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum exp(k) 2^(-distance w) v over a tile, and the same without v, in units of 2^m: three of [BLOCK_C].

    `offset + i` is the distance of token i of every segment, [SEGMENTS].
    """
    offs_t = tl.arange(0, SEGMENTS) * LENGTH
    k_ptrs = first_tokens(k_ptr, first_c, STRIDE_T, False, SEGMENTS, LENGTH, BLOCK_C)
    v_ptrs = first_tokens(v_ptr, first_c, STRIDE_T, False, SEGMENTS, LENGTH, BLOCK_C)
    m = tl.full((SEGMENTS, BLOCK_C), -1e30, tl.float32)
    num = tl.zeros((SEGMENTS, BLOCK_C), tl.float32)
    den = tl.zeros((SEGMENTS, BLOCK_C), tl.float32)
    for i in range(LENGTH):
        real = (offs_t + i < length)[:, None]
        k = tl.load(k_ptrs + i * STRIDE_T, mask=real & mask_c[None, :], other=0.0).to(tl.float32)
        v = tl.load(v_ptrs + i * STRIDE_T, mask=real & mask_c[None, :], other=0.0).to(tl.float32)
        exponent = tl.where(real, k * LOG2E - (offset + i)[:, None] * w[None, :], -1e30)
        new = tl.maximum(m, exponent)
        kept, p = tl.exp2(m - new), tl.where(real, tl.exp2(exponent - new), 0.0)
        m, num, den = new, num * kept + p * v, den * kept + p
    top = tl.max(m, 0)
    scale = tl.exp2(m - top[None, :])
    return top, tl.sum(num * scale, 0), tl.sum(den * scale, 0)


@triton.jit
def exact_tile_sums(
    k_ptr, v_ptr, first_c, w, mask_c, length,  # as `_tile_sums` has them
    STRIDE_T: tl.constexpr, SEGMENTS: tl.constexpr, LENGTH: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of a tile, decayed to the token after it and to the token before it."""
    before = (tl.arange(0, SEGMENTS) * LENGTH).to(tl.float32)
    m_r, num_r, den_r = _weighted_sums(
        k_ptr, v_ptr, first_c, before, w, length, mask_c, STRIDE_T, SEGMENTS, LENGTH, BLOCK_C
    )
    m_l, num_l, den_l = _weighted_sums(  # distances from the other end: -w
        k_ptr, v_ptr, first_c, before - (SEGMENTS * LENGTH - 1), -w, length, mask_c, STRIDE_T, SEGMENTS, LENGTH, BLOCK_C
    )
    return m_l, num_l, den_l, m_r, num_r, den_r


@triton.jit
def _add_states(ptr, wanted, distance, w, C: tl.constexpr, mask_c, m, num, den):
    """Add the stored sums `ptr` [N, C] that are `wanted` [N], decayed over `distance` [N] tokens."""
    mask = wanted[:, None] & mask_c[None, :]
    exponent = tl.load(ptr, mask=mask, other=-1e30)
    more_num = tl.load(ptr + C, mask=mask, other=0.0)
    more_den = tl.load(ptr + 2 * C, mask=mask, other=0.0)
    exponent -= distance.to(tl.float32)[:, None] * w[None, :]
    new = tl.maximum(m, tl.max(exponent, 0))
    p, kept = tl.exp2(exponent - new[None, :]), tl.exp2(m - new)
    return new, num * kept + tl.sum(p * more_num, 0), den * kept + tl.sum(p * more_den, 0)


@triton.jit
def _bi_wkv_exact_kernel(
    w_ptr, u_ptr, k_ptr, v_ptr, r_ptr, tile_ptr, group_ptr, y_ptr,  # as `_bi_wkv_kernel` has them
    T, scale, TILES, GROUPS, TILES_PER_GROUP, stride_kb, stride_vb, stride_rb,
    C: tl.constexpr, STRIDE_T: tl.constexpr, GATED: tl.constexpr,
    SEGMENTS: tl.constexpr, LENGTH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute the output of one tile, adding its tokens one by one."""
    wait_for_inputs(OVERLAP)
    BLOCK_T: tl.constexpr = SEGMENTS * LENGTH
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    b = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)
    offs_c = (pid % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    w = tl.load(w_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32) * (scale * LOG2E)
    u = tl.load(u_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32) * (scale * LOG2E)
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
        m_i, num_i, den_i = combine(
            from_left, num_left[None, :], den_left[None, :], from_right, num_right[None, :], den_right[None, :]
        )
        for j in range(tl.minimum(T - first_token, BLOCK_T)):
            offs = (first_token.to(tl.int64) + j) * STRIDE_T + offs_c
            k_j = tl.load(k_ptr + (b * stride_kb + offs), mask=mask_c, other=0.0).to(tl.float32)[None, :]
            v_j = tl.load(v_ptr + (b * stride_vb + offs), mask=mask_c, other=0.0).to(tl.float32)[None, :]
            apart = tl.abs(place - j)[:, None]
            exponent = k_j * LOG2E + tl.where(apart == 0, u[None, :], (1 - apart) * w[None, :])
            new = tl.maximum(m_i, exponent)
            kept, weight = tl.exp2(m_i - new), tl.exp2(exponent - new)
            m_i, num_i, den_i = new, num_i * kept + weight * v_j, den_i * kept + weight
        token = (first_token + segment * LENGTH + i).to(tl.int64)
        mask = (token < T)[:, None] & mask_c[None, :]
        if GATED:
            r_ptrs = r_ptr + ((b * stride_rb + token * STRIDE_T)[:, None] + offs_c[None, :])
            den_i += den_i * tl.exp2(tl.load(r_ptrs, mask=mask, other=0.0).to(tl.float32) * -LOG2E)
        y_ptrs = y_ptr + (((b * T + token) * C)[:, None] + offs_c[None, :])
        tl.store(y_ptrs, (num_i / den_i).to(y_ptr.dtype.element_ty), mask=mask)
