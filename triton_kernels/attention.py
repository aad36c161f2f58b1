"""Multi-head attention of the mask decoder, between a few tokens and a map or among the tokens.

    y = softmax(q k^T / sqrt(d), over the keys in `seen`) v      for each head of d channels

(B * (T + S) * 2 * C) * itemsize bytes and 4 * B * T * S * C operations. The kernel is latency-bound: with few queries
there is one program per head. Keys are split among programs (split-K) and a second kernel combines the partial results.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import tl, triton, wait_for_inputs
from .launch_config import LaunchConfig, Settings, launch_config
from .operator import check_batch, check_counts, contiguous, described, dot_precision, register

COMBINED_ROWS = 16  # rows of a program that combines; a row is a query of a head, and there are about 50


def attention_ref(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, heads: int) -> Tensor:
    """Oracle and CPU path.

    Args:
        q: `[1 or B, T, C]`.
        k, v: `[1 or B, S, C]`.
        seen: `[B, S]` bool, the keys to attend to; None for all.
        heads: Number of heads; divides C.

    Returns:
        `[B, T, C]` in q's dtype.
    """
    B = _check(q, k, v, seen, heads)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2).expand(B, -1, -1, -1) for t in (q, k, v))
    mask = None if seen is None else seen[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def _batch(q: Tensor, k: Tensor) -> int:
    return k.shape[0] if q.shape[0] == 1 else q.shape[0]


def _check(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, heads: int) -> int:
    """Return the batch B, or raise ValueError if the arguments do not fit."""
    B = _batch(q, k)
    fits = q.ndim == 3 and k.shape == v.shape and k.shape[2:] == q.shape[2:] and k.shape[0] in (1, B)
    fits = fits and q.shape[2] % heads == 0
    if not fits or (seen is not None and (seen.shape != (B, k.shape[1]) or seen.dtype != torch.bool)):
        raise ValueError(
            "attention needs q [1 or B, T, C], k and v [1 or B, S, C], a number of heads that divides C, and seen "
            f"[B, S] of booleans or None; got {heads} heads, {described(q=q, k=k, v=v, seen=seen)}"
            + ("" if seen is None else f" of {seen.dtype}")
        )
    return B


@triton.jit(do_not_specialize=["T", "S", "SPAN"])  # a new number of tokens does not recompile
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, seen_ptr,  # [., T, HEADS, D], [., S, HEADS, D] x 2, [B, S]
    y_ptr, state_ptr,  # [B, T, HEADS, D], with several splits [SPLITS, B, T, HEADS, D]; [2, SPLITS, B, T, HEADS]
    T, S, SPAN, to_log2, stride_qb, stride_kb,  # SPAN: keys of a split; batch strides, 0 if shared
    HEADS: tl.constexpr, D: tl.constexpr, HAS_SEEN: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Attend BLOCK_T queries of a head to one split of the keys.

    With several splits, store the numerators, and for each query the largest exponent and the denominator.
    """
    wait_for_inputs(OVERLAP)
    image = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0) % HEADS
    split = (tl.program_id(0) // HEADS) % SPLITS
    offs_t = tl.program_id(0) // (HEADS * SPLITS) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    mask_t, mask_d = offs_t < T, offs_d < D
    channel = head * D + offs_d
    mask = mask_t[:, None] & mask_d[None, :]
    q = tl.load(q_ptr + image * stride_qb + offs_t[:, None] * (HEADS * D) + channel[None, :], mask=mask, other=0.0)

    top = tl.full((BLOCK_T,), float("-inf"), tl.float32)  # running maximum of the exponents
    total = tl.zeros((BLOCK_T,), tl.float32)
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for first in range(split * SPAN, min(S, (split + 1) * SPAN), BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S)
        mask_s = offs_s < min(S, (split + 1) * SPAN)
        offs = image * stride_kb + offs_s[:, None] * (HEADS * D) + channel[None, :]
        k = tl.load(k_ptr + offs, mask=mask_s[:, None] & mask_d[None, :], other=0.0)
        v = tl.load(v_ptr + offs, mask=mask_s[:, None] & mask_d[None, :], other=0.0)
        counts = mask_s
        if HAS_SEEN:
            counts = mask_s & (tl.load(seen_ptr + image * S + offs_s, mask=mask_s, other=0) != 0)
        exponent = tl.dot(q, tl.trans(k), input_precision=PRECISION) * to_log2
        exponent = tl.where(counts[None, :], exponent, float("-inf"))
        new_top = tl.maximum(top, tl.max(exponent, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key seen yet: no inf - inf
        p = tl.exp2(exponent - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top

    row = (image * T + offs_t) * HEADS + head
    if SPLITS == 1:
        y = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # zero if no key is seen
        tl.store(y_ptr + row[:, None] * D + offs_d[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        rows = tl.num_programs(1).to(tl.int64) * T * HEADS
        row += split * rows
        tl.store(y_ptr + row[:, None] * D + offs_d[None, :], acc, mask=mask)
        tl.store(state_ptr + row, top, mask=mask_t)
        tl.store(state_ptr + SPLITS * rows + row, total, mask=mask_t)


@triton.jit
def _combine_kernel(
    parts_ptr, state_ptr, y_ptr,  # [SPLITS, M, D], [2, SPLITS, M], [M, D]
    M,
    D: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Combine the splits' partial results of BLOCK_M rows."""
    wait_for_inputs(OVERLAP)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < M
    mask = mask_m[:, None] & (offs_d < D)[None, :]
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        top = tl.maximum(top, tl.load(state_ptr + split * M + offs_m, mask=mask_m, other=0.0))
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for split in tl.static_range(SPLITS):
        factor = tl.exp2(tl.load(state_ptr + split * M + offs_m, mask=mask_m, other=0.0) - base)
        total += factor * tl.load(state_ptr + (SPLITS + split) * M + offs_m, mask=mask_m, other=1.0)
        part = tl.load(parts_ptr + (split * M + offs_m)[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
        acc += part * factor[:, None]
    y = (acc / tl.where(total == 0.0, 1.0, total)[:, None]).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offs_m[:, None] * D + offs_d[None, :], y, mask=mask)


def choose_blocks(B: int, T: int, S: int, heads: int, dtype: torch.dtype, config: LaunchConfig) -> Settings:
    """Choose blocks of few sizes, which limits compilations, and SPLITS, a power of two.

    Keys are split until there are PROGRAMS programs, or until a split has one block.
    """
    settings = config.settings_for("attention", dtype)
    BLOCK_T, BLOCK_S = (
        min(settings[name], 16 if size <= 16 else 64 if size <= 64 else settings[name])
        for name, size in (("BLOCK_T", T), ("BLOCK_S", S))
    )
    programs, SPLITS = B * heads * -(-T // BLOCK_T), 1
    while 2 * SPLITS * programs <= settings["PROGRAMS"] and 2 * SPLITS * settings["BLOCK_S"] <= S:
        SPLITS *= 2
    return settings | {"BLOCK_T": BLOCK_T, "BLOCK_S": BLOCK_S, "SPLITS": SPLITS}


def attention_triton(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, heads: int, *, config: LaunchConfig | None = None
) -> Tensor:
    """Launch the kernels. Also runs on CPU tensors under TRITON_INTERPRET=1, which is how the tests use it."""
    B = _check(q, k, v, seen, heads)
    check_batch("attention", B)
    (_, T, C), S = q.shape, k.shape[1]
    y = torch.empty((B, T, C), dtype=q.dtype, device=q.device)
    if y.numel() == 0:
        return y
    config = config or launch_config(q.device)
    q, k, v, seen = contiguous(q, k, v, None if seen is None else seen.view(torch.uint8))
    D = C // heads
    settings = choose_blocks(B, T, S, heads, q.dtype, config)
    BLOCK_T, BLOCK_S, SPLITS = settings["BLOCK_T"], settings["BLOCK_S"], settings["SPLITS"]
    BLOCK_D = max(16, triton.next_power_of_2(D))
    SPAN = triton.cdiv(triton.cdiv(S, SPLITS), BLOCK_S) * BLOCK_S
    check_counts("attention", queries=(T + BLOCK_T) * C, keys=SPLITS * SPAN * C)
    parts, state = y, None
    if SPLITS > 1:
        parts = torch.empty((SPLITS, B, T, C), dtype=torch.float32, device=q.device)
        state = torch.empty((2, SPLITS, B, T, heads), dtype=torch.float32, device=q.device)
    to_log2 = D**-0.5 * math.log2(math.e)
    with torch.cuda.device_of(q):
        _attention_kernel[(heads * triton.cdiv(T, BLOCK_T) * SPLITS, B)](
            q, k, v, seen, parts, state, T, S, SPAN, to_log2, T * C * (len(q) > 1), S * C * (len(k) > 1),
            heads, D, seen is not None, SPLITS, dot_precision(q.dtype), BLOCK_T, BLOCK_S, BLOCK_D,
            **config.options(settings),
        )  # fmt: skip
        if SPLITS > 1:
            M = B * T * heads
            _combine_kernel[(triton.cdiv(M, COMBINED_ROWS),)](
                parts, state, y, M, D, SPLITS, COMBINED_ROWS, BLOCK_D, **config.options({"num_warps": 4})
            )
    return y


def _fake(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, heads: int) -> Tensor:
    return torch.empty((_batch(q, k), *q.shape[1:]), dtype=q.dtype, device=q.device)


def _flops(q: tuple[int, ...], k: tuple[int, ...], *_: object, out_shape: tuple[int, ...], **__: object) -> int:
    B, T, C = out_shape
    return 4 * B * T * k[1] * C


attention = register("attention", attention_ref, attention_triton, _fake, _flops)
