"""Bi-WKV with the published kernel's parallelization, written afresh in Triton: a baseline of the GPU suite.

A thread walks through 128 tokens of one channel, once for the state of the segment and once for its outputs. The states
on either side are added segment by segment. 512 channels share a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _add(m, num, den, log_weight, num_new, den_new):
    """Add exp(log_weight) * (num_new, den_new) to exp(m) * (num, den); the new m is the larger exponent."""
    m_new = tl.maximum(m, log_weight)
    kept, weight = tl.exp(m - m_new), tl.exp(log_weight - m_new)
    return m_new, num * kept + weight * num_new, den * kept + weight * den_new


@triton.jit
def _load(k_ptr, v_ptr, offs, mask):
    k = tl.where(mask, tl.load(k_ptr + offs, mask=mask, other=0.0).to(tl.float32), -1e30)
    return k, tl.load(v_ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _add_state(m, num, den, ptr, C, decay, mask):
    m_state = tl.load(ptr, mask=mask, other=0.0) - decay
    num_state, den_state = tl.load(ptr + C, mask=mask, other=0.0), tl.load(ptr + 2 * C, mask=mask, other=0.0)
    return _add(m, num, den, m_state, num_state, den_state)


@triton.jit
def _segment_state_kernel(
    w_ptr, k_ptr, v_ptr, state_ptr,  # [C], [B, T, C] x 2, [B, SEGMENTS, 6, C]
    T, C, SEGMENTS, scale,
    LENGTH: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    segment, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offs_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = offs_c < C
    w = tl.load(w_ptr + offs_c, mask=mask, other=0.0).to(tl.float32) * scale
    m_left = tl.full((BLOCK_C,), -1e30, tl.float32)
    num_left = tl.zeros((BLOCK_C,), tl.float32)
    den_left, m_right, num_right, den_right = num_left, m_left, num_left, num_left
    for i in range(LENGTH):
        t = segment * LENGTH + i
        k, v = _load(k_ptr, v_ptr, (b * T + t) * C + offs_c, mask & (t + 0 * offs_c < T))
        m_left, num_left, den_left = _add(m_left - w, num_left, den_left, k, v, 1.0)
        m_right, num_right, den_right = _add(m_right, num_right, den_right, k - i * w, v, 1.0)
    ptr = state_ptr + (b * SEGMENTS + segment) * 6 * C + offs_c
    tl.store(ptr, m_left, mask=mask)
    tl.store(ptr + C, num_left, mask=mask)
    tl.store(ptr + 2 * C, den_left, mask=mask)
    tl.store(ptr + 3 * C, m_right, mask=mask)
    tl.store(ptr + 4 * C, num_right, mask=mask)
    tl.store(ptr + 5 * C, den_right, mask=mask)


@triton.jit
def _segment_output_kernel(
    w_ptr, u_ptr, k_ptr, v_ptr, state_ptr, scratch_ptr, y_ptr,  # scratch [3, B, T, C] float32
    B, T, C, SEGMENTS, scale,
    LENGTH: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    segment, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offs_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = offs_c < C
    w = tl.load(w_ptr + offs_c, mask=mask, other=0.0).to(tl.float32) * scale
    u = tl.load(u_ptr + offs_c, mask=mask, other=0.0).to(tl.float32) * scale
    state_ptr += b * SEGMENTS * 6 * C + offs_c
    m = tl.full((BLOCK_C,), -1e30, tl.float32)
    num = tl.zeros((BLOCK_C,), tl.float32)
    den = num
    for other in range(segment + 1, SEGMENTS):
        decay = w * ((other - segment - 1) * LENGTH)
        m, num, den = _add_state(m, num, den, state_ptr + (other * 6 + 3) * C, C, decay, mask)
    for back in range(LENGTH):
        t = segment * LENGTH + LENGTH - 1 - back
        inside = mask & (t + 0 * offs_c < T)
        offs = (b * T + t) * C + offs_c
        tl.store(scratch_ptr + offs, m, mask=inside)
        tl.store(scratch_ptr + B * T * C + offs, num, mask=inside)
        tl.store(scratch_ptr + 2 * B * T * C + offs, den, mask=inside)
        k, v = _load(k_ptr, v_ptr, offs, inside)
        m, num, den = _add(m - w, num, den, k, v, 1.0)
    m = tl.full((BLOCK_C,), -1e30, tl.float32)
    num = tl.zeros((BLOCK_C,), tl.float32)
    den = num
    for other in range(segment):
        decay = w * ((segment - 1 - other) * LENGTH)
        m, num, den = _add_state(m, num, den, state_ptr + other * 6 * C, C, decay, mask)
    for i in range(LENGTH):
        t = segment * LENGTH + i
        inside = mask & (t + 0 * offs_c < T)
        offs = (b * T + t) * C + offs_c
        k, v = _load(k_ptr, v_ptr, offs, inside)
        y_m, y_num, y_den = _add_state(m, num, den, scratch_ptr + offs, B * T * C, 0.0, inside)
        _, y_num, y_den = _add(y_m, y_num, y_den, k + u, v, 1.0)
        tl.store(y_ptr + offs, (y_num / y_den).to(y_ptr.dtype.element_ty), mask=inside)
        m, num, den = _add(m - w, num, den, k, v, 1.0)


def segment_scan(w: Tensor, u: Tensor, k: Tensor, v: Tensor, scale: float, length: int = 128) -> Tensor:
    """Launch the two kernels on w, u `[C]` and k, v `[B, T, C]`; return y `[B, T, C]`."""
    B, T, C = k.shape
    segments, block = triton.cdiv(T, length), min(512, triton.next_power_of_2(C))
    state = torch.empty(B, segments, 6, C, dtype=torch.float32, device=k.device)
    scratch = torch.empty(3, B, T, C, dtype=torch.float32, device=k.device)
    y = torch.empty_like(v)
    grid, warps = (segments, B, triton.cdiv(C, block)), max(1, block // 32)
    _segment_state_kernel[grid](w, k, v, state, T, C, segments, scale, length, block, num_warps=warps)
    _segment_output_kernel[grid](
        w, u, k, v, state, scratch, y, B, T, C, segments, scale, length, block, num_warps=warps
    )
    return y
