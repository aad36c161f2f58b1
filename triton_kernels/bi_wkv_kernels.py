"""Kernels of the bidirectional WKV scan. `bi_wkv.py` has the formula and launches them."""

from __future__ import annotations

from ._triton import quotient, tl, triton, two_floats, wait_for_inputs
from .bi_wkv_exact import LOG2E, combine, exact_tile_sums, first_tokens


@triton.jit
def _add_four(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _load_token(ptrs, i: tl.constexpr, STRIDE_T: tl.constexpr, EVEN: tl.constexpr, offs_t, length, mask_c):
    """Load token i of every segment; without EVEN, zeros beyond `length` and beyond the channels."""
    if EVEN:
        x = tl.load(ptrs + i * (STRIDE_T // 2 if ptrs.dtype.element_ty == tl.uint32 else STRIDE_T))
    else:
        x = tl.load(ptrs + i * STRIDE_T, mask=(offs_t + i < length)[:, None] & mask_c[None, :], other=0.0)
    return x


@triton.jit
def _floats(x, SEGMENTS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Loaded values or words as float32 `[SEGMENTS, BLOCK_C]`."""
    if x.dtype == tl.uint32:
        even, odd = two_floats(x)
        y = tl.reshape(tl.join(even, odd), (SEGMENTS, BLOCK_C))
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def _tile_sums(
    k_ptr, v_ptr, first_c, w, mask_c, length,  # pointers to the tile's first token
    STRIDE_T: tl.constexpr, EVEN: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr,
    SEGMENTS: tl.constexpr, LENGTH: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of a tile of `length` tokens, decayed to the token after it (`_l`) and to the token before it (`_r`)."""
    if EXACT:
        return exact_tile_sums(k_ptr, v_ptr, first_c, w, mask_c, length, STRIDE_T, SEGMENTS, LENGTH, BLOCK_C)
    BLOCK_T: tl.constexpr = SEGMENTS * LENGTH
    offs_t = tl.arange(0, SEGMENTS) * LENGTH
    before = offs_t.to(tl.float32)
    k_ptrs = first_tokens(k_ptr, first_c, STRIDE_T, PACKED, SEGMENTS, LENGTH, BLOCK_C)
    v_ptrs = first_tokens(v_ptr, first_c, STRIDE_T, PACKED, SEGMENTS, LENGTH, BLOCK_C)
    k = ()
    v = ()
    for i in tl.static_range(LENGTH):
        k_i = _floats(_load_token(k_ptrs, i, STRIDE_T, EVEN, offs_t, length, mask_c), SEGMENTS, BLOCK_C)
        k += (k_i if EVEN else tl.where((offs_t + i < length)[:, None], k_i, -1e30),)
        v += (_load_token(v_ptrs, i, STRIDE_T, EVEN, offs_t, length, mask_c),)
    top = tl.full((SEGMENTS, BLOCK_C), -1e30, tl.float32)
    for i in tl.static_range(LENGTH):
        top = tl.maximum(top, k[i])
    m_r = tl.max(top, 0) * LOG2E
    decay = tl.exp2(-w)[None, :]
    num_l = tl.zeros((SEGMENTS, BLOCK_C), tl.float32)
    den_l, num_r, den_r = num_l, num_l, num_l
    fall = num_l + 1.0  # decay from token i to the segment's first
    for i in tl.static_range(LENGTH):
        p = tl.exp2(k[i] * LOG2E - m_r[None, :])
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
    return m_r, num_l, den_l, m_r, num_r, den_r


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
    C: tl.constexpr, STRIDE_T: tl.constexpr, EVEN: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr,
    SEGMENTS: tl.constexpr, LENGTH: tl.constexpr, BLOCK_C: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Store the sums of each tile, and of each group of tiles, decayed to the tokens after and before it."""
    wait_for_inputs(OVERLAP)
    BLOCK_T: tl.constexpr = SEGMENTS * LENGTH
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    first_c = (pid % blocks_c) * BLOCK_C
    offs_c = first_c + tl.arange(0, BLOCK_C)
    group = pid // blocks_c
    mask_c = offs_c < C
    w = tl.load(w_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32) * (scale * LOG2E)
    first = group * TILES_PER_GROUP
    start = first.to(tl.int64) * (BLOCK_T * STRIDE_T)
    k_ptr += b * stride_kb + start
    v_ptr += b * stride_vb + start
    if TILES_PER_GROUP > 1:
        m_left = tl.full((BLOCK_C,), -1e30, tl.float32)  # finite, because inf - inf is NaN
        num_left = tl.zeros((BLOCK_C,), tl.float32)
        den_left = tl.zeros((BLOCK_C,), tl.float32)
        m_right, num_right, den_right = m_left, num_left, num_left
        for tile in range(first, tl.minimum(first + TILES_PER_GROUP, TILES)):
            m_l, num_l, den_l, m_r, num_r, den_r = _tile_sums(
                k_ptr, v_ptr, first_c, w, mask_c, T - tile * BLOCK_T,
                STRIDE_T, EVEN, PACKED, EXACT, SEGMENTS, LENGTH, BLOCK_C,
            )  # fmt: skip
            ptr = tile_ptr + (b * TILES + tile) * 6 * C + offs_c
            _store_state(ptr, C, mask_c, m_l, num_l, den_l, m_r, num_r, den_r)
            m_left -= w * BLOCK_T
            m_left, num_left, den_left = combine(m_left, num_left, den_left, m_l, num_l, den_l)
            m_r -= w * ((tile - first) * BLOCK_T)
            m_right, num_right, den_right = combine(m_right, num_right, den_right, m_r, num_r, den_r)
            k_ptr += BLOCK_T * STRIDE_T
            v_ptr += BLOCK_T * STRIDE_T
    else:  # a loop would wait for w first
        m_left, num_left, den_left, m_right, num_right, den_right = _tile_sums(
            k_ptr, v_ptr, first_c, w, mask_c, T - first * BLOCK_T,
            STRIDE_T, EVEN, PACKED, EXACT, SEGMENTS, LENGTH, BLOCK_C,
        )  # fmt: skip
    ptr = group_ptr + (b * GROUPS + group) * 6 * C + offs_c
    _store_state(ptr, C, mask_c, m_left, num_left, den_left, m_right, num_right, den_right)


@triton.jit
def _add_both_sides(
    ptr, n, here, end, distance, w, scale, C: tl.constexpr, mask_c, m, num_left, den_left, num_right, den_right,
    OWN: tl.constexpr,
):  # fmt: skip
    """Add the states n < end, [N, 6, C], on both sides of `here`, in units of one 2^m.

    The state `here` adds nothing. With OWN it belongs to this tile, and its largest exponent raises m. `w` comes as it
    was loaded, so that the loads of the states do not wait for it.
    """
    left, apart = (n < here)[:, None], ((n != here) & (n < end))[:, None]
    ptr += tl.where(left, 0, 3 * C)
    exponent = tl.load(ptr, mask=(n < end)[:, None] & mask_c[None, :] if OWN else apart & mask_c[None, :], other=-1e30)
    num = tl.load(ptr + C, mask=apart & mask_c[None, :], other=0.0)
    den = tl.load(ptr + 2 * C, mask=apart & mask_c[None, :], other=0.0)
    exponent -= tl.maximum(distance, 0).to(tl.float32)[:, None] * (w.to(tl.float32) * (scale * LOG2E))[None, :]
    new = tl.maximum(m, tl.max(exponent, 0))
    p, kept = tl.exp2(exponent - new[None, :]), tl.exp2(m - new)
    p_left, p_right = tl.where(left, p, 0.0), tl.where(left, 0.0, p)
    num_l, den_l, num_r, den_r = tl.reduce((p_left * num, p_left * den, p_right * num, p_right * den), 0, _add_four)
    return (
        new, num_left * kept + num_l, den_left * kept + den_l, num_right * kept + num_r, den_right * kept + den_r
    )  # fmt: skip


@triton.jit
def _add_all_but_last(num_a, last_num_a, den_a, last_den_a, num_b, last_num_b, den_b, last_den_b):
    """Scan operator for exclusive sums: (0, x) becomes (sum of the earlier x, x), without a subtraction."""
    return num_a + last_num_a + num_b, last_num_b, den_a + last_den_a + den_b, last_den_b


@triton.jit
def _bi_wkv_kernel(
    w_ptr, u_ptr, k_ptr, v_ptr, r_ptr,  # [C], [C], [B, T, C] x 3; the last dim has stride 1
    tile_ptr, group_ptr, y_ptr,  # as the summary kernel wrote them; [B, T, C] contiguous
    T, scale, TILES, GROUPS, TILES_PER_GROUP,
    stride_kb, stride_vb, stride_rb,  # in elements
    C: tl.constexpr, STRIDE_T: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, PACKED: tl.constexpr,
    SEGMENTS: tl.constexpr, LENGTH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute one tile by plain sums: SEGMENTS segments side by side, each a recurrence over LENGTH tokens."""
    BLOCK_T: tl.constexpr = SEGMENTS * LENGTH
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    b = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)  # backwards: the last images are still in L2
    first_c = (pid % blocks_c) * BLOCK_C
    offs_c = first_c + tl.arange(0, BLOCK_C)
    tile = pid // blocks_c
    mask_c = offs_c < C
    start = tile.to(tl.int64) * BLOCK_T
    segment = tl.arange(0, SEGMENTS)
    offs_t = segment * LENGTH  # 32 bits are enough within a tile
    length = tl.minimum(T - start, BLOCK_T).to(tl.int32)
    k_tile, v_tile = k_ptr + (b * stride_kb + start * STRIDE_T), v_ptr + (b * stride_vb + start * STRIDE_T)
    k_ptrs = first_tokens(k_tile, first_c, STRIDE_T, PACKED, SEGMENTS, LENGTH, BLOCK_C)
    v_ptrs = first_tokens(v_tile, first_c, STRIDE_T, PACKED, SEGMENTS, LENGTH, BLOCK_C)
    r_tile = r_ptr + (b * stride_rb + start * STRIDE_T)
    r_ptrs = first_tokens(r_tile, first_c, STRIDE_T, PACKED, SEGMENTS, LENGTH, BLOCK_C)
    group = tile // TILES_PER_GROUP
    group_length = TILES_PER_GROUP * BLOCK_T
    first_tile = group * TILES_PER_GROUP
    last_tile = tl.minimum(first_tile + TILES_PER_GROUP, TILES)
    offs_n = tl.arange(0, BLOCK_N)  # all groups

    # Independent loads come first, so that they overlap the sums of the states. Not timed.
    w = tl.load(w_ptr + offs_c, mask=mask_c, other=0.0)
    # Outputs of a segment are computed in parts, the last part first, because registers hold the sums of one part.
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
    wait_for_inputs(OVERLAP)  # k, v and r were complete before the summary kernel
    m = tl.full((BLOCK_C,), -1e30, tl.float32)
    # Tokens to the left, decayed to the tile's first token; tokens to the right, decayed to its last.
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

    w = w.to(tl.float32) * (scale * LOG2E)
    every_row = tl.broadcast_to(offs_c[None, :], (SEGMENTS, BLOCK_C))  # each thread loads its own: no layout conversion
    w_row = tl.load(w_ptr + every_row, mask=every_row < C, other=0.0)
    u_row = tl.load(u_ptr + every_row, mask=every_row < C, other=0.0)
    w_row = w_row.to(tl.float32) * (scale * LOG2E)
    u_row = u_row.to(tl.float32) * (scale * LOG2E)
    decay = tl.exp2(-w_row)
    zero = tl.zeros((SEGMENTS, BLOCK_C), tl.float32)
    num_l, den_l, num_r, den_r = zero, zero, zero, zero  # sums of each segment, to its right and left
    p = ()
    pv = ()
    num_before = ()  # sums from the segment's start to each part
    den_before = ()
    for i in tl.static_range(LENGTH):
        if i % PART == 0:
            num_before += (num_l,)
            den_before += (den_l,)
        p_i = tl.exp2(_floats(k[i], SEGMENTS, BLOCK_C) * LOG2E - m[None, :])
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
        for i in tl.static_range(PART):  # last token first
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
                den_i += den_i * tl.exp2(_floats(gates[i], SEGMENTS, BLOCK_C) * -LOG2E)  # one division for gate and sum
                if part > 0:
                    r += (_load_token(r_ptrs, (part - 1) * PART + i, STRIDE_T, EVEN, offs_t, length, mask_c),)
            y = quotient(num_i, den_i, y_ptr.dtype.element_ty).to(y_ptr.dtype.element_ty)
            ptrs = y_ptrs + (part * PART + i) * C
            if EVEN:
                tl.store(ptrs, y)
            else:
                tl.store(ptrs, y, mask=(offs_t + part * PART + i < length)[:, None] & mask_c[None, :])
