"""What the GPU suite measures against: a transformer of the same scale, and the published scan."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsam_rwkv import RWKVSAM, ModelConfig
from fastsam_rwkv.modeling.layers import LN_EPS
from fastsam_rwkv.triton_kernels._triton import tl, triton


class TransformerLayer(nn.Module):
    """Pre-norm attention with six heads and a GeGLU of ratio 2, on a map `[B, H, W, C]`."""

    def __init__(self, dim: int, num_heads: int = 6) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, LN_EPS), nn.LayerNorm(dim, LN_EPS)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, H * W, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H, W, C))
        gate, value = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.gelu(gate) * value)


def transformer(config: ModelConfig) -> RWKVSAM:
    """The same model with a transformer's layers in place of the RWKV ones."""
    model = RWKVSAM(config)
    model.backbone.layers = nn.Sequential(*(TransformerLayer(config.embed_dim) for _ in range(config.depth)))
    return model.eval()


@triton.jit
def _segment_sums_kernel(
    w_ptr, k_ptr, v_ptr, state_ptr,  # [C], [B, T, C] x 2, [B, SEGMENTS, 6, C]
    T, C, SEGMENTS, scale,
    LENGTH: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    segment, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offs_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = offs_c < C
    w = tl.load(w_ptr + offs_c, mask=mask, other=0.0).to(tl.float32) * scale
    m_left = tl.full((BLOCK_C,), -1e30, tl.float32)
    m_right = m_left
    num_left = tl.zeros((BLOCK_C,), tl.float32)
    den_left, num_right, den_right = num_left, num_left, num_left
    for i in range(LENGTH):
        t = segment * LENGTH + i
        inside = mask & (t + 0 * offs_c < T)
        k = tl.load(k_ptr + (b * T + t) * C + offs_c, mask=inside, other=0.0).to(tl.float32)
        k = tl.where(inside, k, -1e30)
        v = tl.load(v_ptr + (b * T + t) * C + offs_c, mask=inside, other=0.0).to(tl.float32)
        m_left -= w
        new = tl.maximum(m_left, k)
        kept, weight = tl.exp(m_left - new), tl.exp(k - new)
        m_left, num_left, den_left = new, num_left * kept + weight * v, den_left * kept + weight
        seen = k - i * w
        new = tl.maximum(m_right, seen)
        kept, weight = tl.exp(m_right - new), tl.exp(seen - new)
        m_right, num_right, den_right = new, num_right * kept + weight * v, den_right * kept + weight
    ptr = state_ptr + (b * SEGMENTS + segment) * 6 * C + offs_c
    tl.store(ptr, m_left, mask=mask)
    tl.store(ptr + C, num_left, mask=mask)
    tl.store(ptr + 2 * C, den_left, mask=mask)
    tl.store(ptr + 3 * C, m_right, mask=mask)
    tl.store(ptr + 4 * C, num_right, mask=mask)
    tl.store(ptr + 5 * C, den_right, mask=mask)


@triton.jit
def _segment_outputs_kernel(
    w_ptr, u_ptr, k_ptr, v_ptr, state_ptr, scratch_ptr, y_ptr,  # scratch [3, B, T, C] float32
    B, T, C, SEGMENTS, scale,
    LENGTH: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    segment, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offs_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = offs_c < C
    w = tl.load(w_ptr + offs_c, mask=mask, other=0.0).to(tl.float32) * scale
    u = tl.load(u_ptr + offs_c, mask=mask, other=0.0).to(tl.float32) * scale
    m = tl.full((BLOCK_C,), -1e30, tl.float32)
    num = tl.zeros((BLOCK_C,), tl.float32)
    den = num
    for other in range(segment + 1, SEGMENTS):
        ptr = state_ptr + (b * SEGMENTS + other) * 6 * C + 3 * C + offs_c
        seen = tl.load(ptr, mask=mask, other=0.0) - w * ((other - segment - 1) * LENGTH)
        new = tl.maximum(m, seen)
        kept, weight = tl.exp(m - new), tl.exp(seen - new)
        num = num * kept + weight * tl.load(ptr + C, mask=mask, other=0.0)
        den = den * kept + weight * tl.load(ptr + 2 * C, mask=mask, other=0.0)
        m = new
    for back in range(LENGTH):
        t = segment * LENGTH + LENGTH - 1 - back
        inside = mask & (t + 0 * offs_c < T)
        place = (b * T + t) * C + offs_c
        tl.store(scratch_ptr + place, m, mask=inside)
        tl.store(scratch_ptr + B * T * C + place, num, mask=inside)
        tl.store(scratch_ptr + 2 * B * T * C + place, den, mask=inside)
        k = tl.where(inside, tl.load(k_ptr + place, mask=inside, other=0.0).to(tl.float32), -1e30)
        v = tl.load(v_ptr + place, mask=inside, other=0.0).to(tl.float32)
        new = tl.maximum(m - w, k)
        kept, weight = tl.exp(m - w - new), tl.exp(k - new)
        m, num, den = new, num * kept + weight * v, den * kept + weight
    m = tl.full((BLOCK_C,), -1e30, tl.float32)
    num = tl.zeros((BLOCK_C,), tl.float32)
    den = num
    for other in range(segment):
        ptr = state_ptr + (b * SEGMENTS + other) * 6 * C + offs_c
        seen = tl.load(ptr, mask=mask, other=0.0) - w * ((segment - 1 - other) * LENGTH)
        new = tl.maximum(m, seen)
        kept, weight = tl.exp(m - new), tl.exp(seen - new)
        num = num * kept + weight * tl.load(ptr + C, mask=mask, other=0.0)
        den = den * kept + weight * tl.load(ptr + 2 * C, mask=mask, other=0.0)
        m = new
    for i in range(LENGTH):
        t = segment * LENGTH + i
        inside = mask & (t + 0 * offs_c < T)
        place = (b * T + t) * C + offs_c
        k = tl.where(inside, tl.load(k_ptr + place, mask=inside, other=0.0).to(tl.float32), -1e30)
        v = tl.load(v_ptr + place, mask=inside, other=0.0).to(tl.float32)
        m_right = tl.load(scratch_ptr + place, mask=inside, other=0.0)
        top = tl.maximum(tl.maximum(m, m_right), k + u)
        left, right, own = tl.exp(m - top), tl.exp(m_right - top), tl.exp(k + u - top)
        y_num = num * left + own * v
        y_num += tl.load(scratch_ptr + B * T * C + place, mask=inside, other=0.0) * right
        y_den = den * left + own
        y_den += tl.load(scratch_ptr + 2 * B * T * C + place, mask=inside, other=0.0) * right
        tl.store(y_ptr + place, (y_num / y_den).to(y_ptr.dtype.element_ty), mask=inside)
        new = tl.maximum(m - w, k)
        kept, weight = tl.exp(m - w - new), tl.exp(k - new)
        m, num, den = new, num * kept + weight * v, den * kept + weight


def segment_scan(w: Tensor, u: Tensor, k: Tensor, v: Tensor, scale: float, length: int = 128) -> Tensor:
    """The bi-WKV in the published kernel's parallelisation, written afresh: the baseline of ours.

    A thread walks through 128 tokens of one channel, once to sum them up and once more for the outputs; what lies to
    either side is added up segment by segment. 512 channels and segments share a block.
    """
    B, T, C = k.shape
    segments, block = triton.cdiv(T, length), min(512, triton.next_power_of_2(C))
    state = torch.empty(B, segments, 6, C, dtype=torch.float32, device=k.device)
    scratch = torch.empty(3, B, T, C, dtype=torch.float32, device=k.device)
    y = torch.empty_like(v)
    grid = (segments, B, triton.cdiv(C, block))
    warps = max(1, block // 32)
    _segment_sums_kernel[grid](w, k, v, state, T, C, segments, scale, length, block, num_warps=warps)
    _segment_outputs_kernel[grid](
        w, u, k, v, state, scratch, y, B, T, C, segments, scale, length, block, num_warps=warps
    )
    return y
