"""Building blocks on channels-last maps `[B, H, W, C]`, whose tokens `[B, H*W, C]` are a view of the same memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .triton_kernels._rows import conv_rows, rows_needed, strips
from .triton_kernels.bi_wkv import bi_wkv
from .triton_kernels.mbconv import mbconv
from .triton_kernels.norm_shift_mix import norm_shift_mix

LN_EPS = 1e-6


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` on `[B, H, W, C]`. The permuted views are PyTorch's channels_last layout: nothing is copied."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Upscale2x(nn.Linear):
    """Transposed convolution 2x2 with stride 2 as the matrix product it is: `[B, H, W, C]` to `[B, 2H, 2W, out]`.

    The weight is `[2 * 2 * out, C]`, rows in the order (y, x, out).
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, 4 * out_dim, bias=False)
        self.out_bias = nn.Parameter(torch.zeros(out_dim))

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, _ = x.shape
        y = F.linear(x, self.weight, self.out_bias.repeat(4)).view(B, H, W, 2, 2, -1)
        return y.permute(0, 1, 3, 2, 4, 5).reshape(B, 2 * H, 2 * W, -1)


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(dims[:-1], dims[1:], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class Stem(nn.Module):
    """`[B, H, W, 3]` to `[B, H/2, W/2, dim]`: conv 3x3 s2, LayerNorm, GELU, conv 3x3."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = Conv2d(3, dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(dim, LN_EPS)
        self.conv2 = Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, _ = x.shape
        parts = []
        for rows in strips(H // 2, B * W // 2 * self.norm.normalized_shape[0], x):
            inner = rows_needed(rows, 1, H // 2)
            outer = rows_needed(inner, 2, H)
            y = conv_rows(x[:, outer.start : outer.stop], self.conv1.weight, self.conv1.bias, inner, H, stride=2)
            y = F.gelu(self.norm(y))
            parts.append(conv_rows(y, self.conv2.weight, self.conv2.bias, rows, H // 2, stride=1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class MBConv(nn.Module):
    """Inverted bottleneck with a LayerNorm in front; with stride 2 the shortcut is average-pooled."""

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
        return mbconv(
            x,
            self.norm.weight,
            self.norm.bias,
            self.expand.weight,
            self.expand.bias,
            self.depthwise.weight,
            self.depthwise.bias,
            self.project.weight,
            self.project.bias,
            getattr(self.shortcut, "weight", None),
            getattr(self.shortcut, "bias", None),
            self.stride,
            self.norm.eps,
        )


class SpatialMix(nn.Module):
    """Token mixing: Q-shift, projections, gated bidirectional WKV."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix_k, self.mix_v, self.mix_r = (nn.Parameter(torch.full((dim,), 0.5)) for _ in range(3))
        self.decay = nn.Parameter(torch.linspace(0, 20, dim))  # over the whole sequence
        self.first = nn.Parameter(torch.zeros(dim))
        self.key, self.value, self.receptance, self.output = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """`norm` is the layer's LayerNorm: it is one pass over x with the Q-shift and the mixes."""
        B, H, W, C = x.shape
        T = H * W
        mix = torch.stack([self.mix_k, self.mix_v, self.mix_r])
        to_k, to_v, to_r = norm_shift_mix(x, norm.weight, norm.bias, mix, norm.eps).view(3, B, T, C)
        k, v, r = self.key(to_k), self.value(to_v), self.receptance(to_r)
        return self.output(bi_wkv(self.decay, self.first, k, v, r, 1 / T)).view(B, H, W, C)


class ChannelMix(nn.Module):
    """Gated MLP with squared ReLU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix_k, self.mix_r = (nn.Parameter(torch.full((dim,), 0.5)) for _ in range(2))
        self.key = nn.Linear(dim, 2 * dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """`norm` is the layer's LayerNorm: it is one pass over x with the Q-shift and the mixes."""
        mix = torch.stack([self.mix_k, self.mix_r])
        to_k, to_r = norm_shift_mix(x, norm.weight, norm.bias, mix, norm.eps)
        return torch.sigmoid(self.receptance(to_r)) * self.value(F.relu(self.key(to_k)).square())


class RWKVLayer(nn.Module):
    """Pre-norm residual layer with layer scale: spatial mix, then channel mix."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, LN_EPS), nn.LayerNorm(dim, LN_EPS)
        self.spatial_mix, self.channel_mix = SpatialMix(dim), ChannelMix(dim)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((dim,), 0.1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addcmul(x, self.scale1, self.spatial_mix(x, self.norm1))
        return torch.addcmul(x, self.scale2, self.channel_mix(x, self.norm2))
