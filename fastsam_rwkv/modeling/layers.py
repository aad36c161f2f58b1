"""Building blocks on channels-last maps `[B, H, W, C]`. Tokens `[B, H*W, C]` are views of the same memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import PIXEL_MEAN, PIXEL_STD
from ..triton_kernels.attention import attention
from ..triton_kernels.bi_wkv import bi_wkv
from ..triton_kernels.conv_norm import conv_norm
from ..triton_kernels.fused_linear import fused_linear
from ..triton_kernels.mbconv import mbconv
from ..triton_kernels.norm_shift_mix import norm_shift_mix
from ..triton_kernels.stem import stem
from ..triton_kernels.upscale import upscale

LN_EPS = 1e-6


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` on `[B, H, W, C]`. The permuted views have PyTorch's channels_last layout and copy nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def affine(*modules: nn.Module | None) -> list[Any]:
    """Return weight and bias of each module, None for a parameter or module that is missing."""
    return [getattr(module, name, None) for module in modules for name in ("weight", "bias")]


def fused_conv(
    x: Tensor,
    conv: Any,
    *,
    in_norm: Any = None,
    add: Tensor | None = None,
    norm: Any = None,
    gelu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Return residual + GELU(norm(conv(in_norm(x)) + add)) in one operation.

    `conv` is a Conv2d, or a Linear, which acts as a 1x1 convolution. The norms are LayerNorms with the same epsilon.
    """
    linear = isinstance(conv, nn.Linear)
    weight, stride = (conv.weight[:, :, None, None], 1) if linear else (conv.weight, conv.stride[0])
    eps = next((n.eps for n in (norm, in_norm) if n is not None), LN_EPS)
    return conv_norm(x, weight, conv.bias, *affine(in_norm), add, *affine(norm), residual, stride, gelu, eps)


class Upscale2x(nn.Linear):
    """Transposed convolution 2x2 with stride 2, an optional LayerNorm, and GELU.

    It maps `[B, H, W, C]` to `[B, 2H, 2W, out]`. The weight is `[2 * 2 * out, C]`, rows in the order (y, x, out).
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, 4 * out_dim, bias=False)
        self.out_bias = nn.Parameter(torch.zeros(out_dim))

    def forward(self, x: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        return upscale(x, self.weight, self.out_bias, *affine(norm), LN_EPS)


class MLP(nn.Module):
    """Linear layers with ReLU between them, for widths `dims`."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(dims[:-1], dims[1:], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class Attention(nn.Module):
    """Multi-head attention whose inner width may be smaller than the width of its input."""

    def __init__(self, dim: int, inner_dim: int, num_heads: int = 8) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, inner_dim) for _ in range(3))
        self.out_proj = nn.Linear(inner_dim, dim)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, residual: Tensor | None, norm: nn.LayerNorm
    ) -> Tensor:
        """Return norm(residual + attention), `[N, T, dim]`.

        Args:
            q: Queries `[N, T, dim]`. N may be 1 if all prompts share the image; so may it for k and v.
            k: Keys `[N, S, dim]`.
            v: Values `[N, S, dim]`.
            seen: `[N, S]` bool, False for keys to ignore; None to use all.
            residual: `[N, T, dim]`; None for zero.
            norm: LayerNorm of the sum.
        """
        y = attention(self.q_proj(q), self.k_proj(k), self.v_proj(v), seen, self.num_heads)
        add = None if residual is None else residual[:, :, None]
        return fused_conv(y[:, :, None], self.out_proj, add=add, norm=norm)[:, :, 0]


class Stem(nn.Module):
    """Stem: conv 3x3 s2, LayerNorm, GELU, conv 3x3."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = Conv2d(3, dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(dim, LN_EPS)
        self.conv2 = Conv2d(dim, dim, 3, padding=1)

    def forward(self, pixels: Tensor, H: int, W: int) -> Tensor:
        """Map pixels `[B, h, w, 3]`, uint8 or normalized, to `[B, H/2, W/2, dim]`; zero-padded to H x W."""
        tensors = affine(self.conv1, self.norm, self.conv2)
        return stem(pixels, PIXEL_MEAN, PIXEL_STD, *tensors, H, W, self.norm.eps)


class MBConv(nn.Module):
    """Inverted bottleneck after a LayerNorm. With stride 2 the shortcut is average-pooled."""

    def __init__(self, in_dim: int, out_dim: int, stride: int) -> None:
        super().__init__()
        hidden = 4 * out_dim
        self.stride = stride
        self.norm = nn.LayerNorm(in_dim, LN_EPS)
        self.expand = nn.Linear(in_dim, hidden)
        self.depthwise = Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden)
        self.project = nn.Linear(hidden, out_dim)
        self.shortcut = nn.Linear(in_dim, out_dim) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        tensors = affine(self.norm, self.expand, self.depthwise, self.project, self.shortcut)
        return mbconv(x, *tensors, self.stride, self.norm.eps)


class SpatialMix(nn.Module):
    """Token mixing: Q-shift, projections, gated bidirectional WKV.

    Key, value and receptance, in this order, share one parameter for their mixes and one for their projections, so
    that each is one launch.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.full((3, dim), 0.5))
        self.decay = nn.Parameter(torch.linspace(0, 20, dim))  # over the whole sequence
        self.first = nn.Parameter(torch.zeros(dim))
        self.projections = nn.Parameter(torch.empty(3, dim, dim).uniform_(-(dim**-0.5), dim**-0.5))  # [3, out, in]
        self.output = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, norm: nn.LayerNorm, scale: Tensor) -> Tensor:
        """Return x + scale * SpatialMix(norm(x)) for x `[B, H, W, C]`."""
        B, H, W, C = x.shape
        T = H * W
        mixed = norm_shift_mix(x, norm.weight, norm.bias, self.mix, norm.eps)
        k, v, r = torch.bmm(mixed.view(3, B * T, C), self.projections.transpose(1, 2)).view(3, B, T, C)
        y = bi_wkv(self.decay, self.first, k, v, r, 1 / T)
        return fused_linear(y.view(B, H, W, C), self.output.weight, False, None, None, scale, x)


class ChannelMix(nn.Module):
    """Gated MLP with squared ReLU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.full((2, dim), 0.5))  # key, receptance
        self.key = nn.Linear(dim, 2 * dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x: Tensor, norm: nn.LayerNorm, scale: Tensor) -> Tensor:
        """Return x + scale * ChannelMix(norm(x)) for x `[B, H, W, C]`."""
        to_k, to_r = norm_shift_mix(x, norm.weight, norm.bias, self.mix, norm.eps)
        k = fused_linear(to_k, self.key.weight, True)
        return fused_linear(k, self.value.weight, False, to_r, self.receptance.weight, scale, x)


class RWKVLayer(nn.Module):
    """Pre-norm residual layer with layer scale: spatial mix, then channel mix."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, LN_EPS), nn.LayerNorm(dim, LN_EPS)
        self.spatial_mix, self.channel_mix = SpatialMix(dim), ChannelMix(dim)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((dim,), 0.1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.spatial_mix(x, self.norm1, self.scale1)
        return self.channel_mix(x, self.norm2, self.scale2)
