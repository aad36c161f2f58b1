"""Bidirectional WKV scan, the token mixer of RWKV-SAM.

    y_t = (sum_{i != t} exp(k_i - (|t - i| - 1) w) v_i + exp(k_t + u) v_t)
        / (sum_{i != t} exp(k_i - (|t - i| - 1) w)     + exp(k_t + u))

independently for every channel. k and v are read once and y is written once: 3 * B * T * C * itemsize bytes,
which is the bound to compare a benchmark with.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Within these bounds one shift by the largest k keeps every term that can matter inside float32's exponent range.
MAX_DECAY = 40.0
MAX_BONUS = 20.0


def bi_wkv_ref(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Oracle, CPU path and export decomposition: linear in T, differentiable, no loop over tokens.

    Args:
        w: `[C]` decay a token; either sign.
        u: `[C]` bonus of the token itself.
        k: `[B, T, C]` log-weights.
        v: `[B, T, C]` values.

    Returns:
        `[B, T, C]` in v's dtype. Sums are taken in float32, or float64 for float64 input.

    While tracing, where values cannot be looked at, |w| * T <= 40 and |u| <= 20 is assumed.
    """
    T, C = k.shape[1:]
    if k.shape != v.shape or w.shape != (C,) or u.shape != (C,):
        raise ValueError(
            "bi_wkv needs k and v [B, T, C] and w and u [C], got "
            f"k {tuple(k.shape)}, v {tuple(v.shape)}, w {tuple(w.shape)}, u {tuple(u.shape)}"
        )
    if k.numel() == 0:
        return torch.empty_like(v)
    dtype = torch.promote_types(k.dtype, torch.float32)
    w, u, k32, v32 = (t.to(dtype) for t in (w, u, k, v))
    traced = torch.compiler.is_compiling() or w.is_meta
    fits = traced or bool(((w.abs() * T <= MAX_DECAY) & (u.abs() <= MAX_BONUS)).all())
    form = _prefix_sums if fits else _rescaled_doubling
    return form(w, u, k32, v32).to(v.dtype)


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

    p = k.exp().view(B * n, L, C)
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

    y = weighted_sum(p * v.view(B * n, L, C)) / weighted_sum(p)
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
