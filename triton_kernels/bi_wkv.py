"""Bidirectional WKV scan, the token mixer of RWKV-SAM.

    y_t = (sum_{i != t} exp(k_i - (|t - i| - 1) w) v_i + exp(k_t + u) v_t)
        / (sum_{i != t} exp(k_i - (|t - i| - 1) w)     + exp(k_t + u))

independently for every channel. k, v (and r) are read once and y is written once: 3 (4) * B * T * C * itemsize bytes,
which is the bound to compare a benchmark with. The kernels read k and v twice: one launch sums up every tile of tokens,
and every group of tiles; in the second each tile adds up the groups and tiles to either side and then walks through its
own tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import triton
from .bi_wkv_kernels import _bi_wkv_kernel, _bi_wkv_summary_kernel
from .launch_config import launch_options, launch_settings
from .operator import check_batch, register
from .rows import parts_help

# Within these bounds one shift by the largest k keeps every term that can matter inside float32's exponent range.
MAX_DECAY = 40.0
MAX_BONUS = 20.0
CHANNELS_AT_ONCE = 32  # on a CPU, where the temporary tensors of 4096 tokens then stay in the cache: twice as fast
# The kernel sums plainly where the decay over a tile stays below this: rounding grows with it.
TILE_DECAY = {torch.float32: 4.0, torch.float16: 20.0, torch.bfloat16: 20.0}


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
