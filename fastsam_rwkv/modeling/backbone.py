"""Image encoder: two convolution stages, then RWKV layers, then the neck. Maps are `[B, H, W, C]`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..config import ModelConfig
from .layers import LN_EPS, Conv2d, MBConv, RWKVLayer, Stem, fused_conv, plain


class Backbone(nn.Module):
    """Encoder from pixels to the maps of stage 1 (1/4), stage 2 (1/8) and the RWKV layers (1/16)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        stem, dim1, dim2, dim = config.stem_dim, config.stage1_dim, config.stage2_dim, config.embed_dim
        self.stem = Stem(stem)
        self.stage1 = Stage(stem, dim1, config.stage1_depth)
        self.stage2 = Stage(dim1, dim2, config.stage2_depth)
        self.patch = nn.Sequential(nn.LayerNorm(dim2, LN_EPS), Conv2d(dim2, dim, 3, stride=2, padding=1))
        self.layers = nn.Sequential(*(RWKVLayer(dim) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(dim, LN_EPS)

    def forward(
        self,
        pixels: Tensor,
        input_size: tuple[int, int] | None = None,
        before_layers: Callable[[Tensor, Tensor], object] | None = None,
        size: Tensor | None = None,
        normed: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode pixels.

        Args:
            pixels: `[B, h, w, 3]`, uint8 or normalized.
            input_size: `(H, W)` to pad the normalized pixels to with zeros; (h, w) by default.
            before_layers: Called with the maps of stages 1 and 2 before the RWKV layers run.
            size: `[2]` int32, height and width of the part of the pixels that is not padding; None for all.
            normed: Apply the last norm.

        Returns:
            Maps `[B, H/4, W/4, stage1_dim]`, `[B, H/8, W/8, stage2_dim]` and `[B, H/16, W/16, embed_dim]`.
        """
        H, W = pixels.shape[1:3] if input_size is None else input_size
        stage1 = self.stage1(*self.stem(pixels, H, W, size))
        stage2 = self.stage2(stage1)
        if before_layers is not None:
            before_layers(stage1, stage2)
        if plain(self.patch):
            norm, conv = self.patch
            patches = fused_conv(stage2, conv, in_norm=norm)
        else:
            patches = self.patch(stage2)
        final = self.layers(patches)
        return stage1, stage2, self.norm(final) if normed else final


class Stage(nn.Sequential):
    """Convolution stage from `[B, H, W, in_dim]` to `[B, H/2, W/2, out_dim]`."""

    def __init__(self, in_dim: int, out_dim: int, depth: int) -> None:
        super().__init__(MBConv(in_dim, out_dim, 2), *(MBConv(out_dim, out_dim, 1) for _ in range(depth - 1)))

    def forward(self, x: Tensor, in_bias: Tensor | None = None) -> Tensor:
        first, *others = self
        x = first(x, in_bias)
        for block in others:
            x = block(x)
        return x


class Neck(nn.Sequential):
    """Projection of the backbone's final map `[B, h, w, embed_dim]` to the image embedding `[B, h, w, 256]`."""

    def __init__(self, in_dim: int, out_dim: int = 256) -> None:
        super().__init__(
            nn.Linear(in_dim, out_dim, bias=False),
            nn.LayerNorm(out_dim, LN_EPS),
            Conv2d(out_dim, out_dim, 3, padding=1, bias=False),
            nn.LayerNorm(out_dim, LN_EPS),
        )

    def forward(self, x: Tensor, in_norm: nn.Module | None = None) -> Tensor:
        """Project x, after a norm of it if one is given."""
        linear, norm1, conv, norm2 = self
        return fused_conv(fused_conv(x, linear, in_norm=in_norm, norm=norm1), conv, norm=norm2)
