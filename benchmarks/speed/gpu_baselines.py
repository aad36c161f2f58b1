"""Baselines of the GPU suite: a transformer of the same scale, and an encoder under `torch.compile`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsam_rwkv import RWKVSAM, ModelConfig
from fastsam_rwkv.modeling.layers import LN_EPS


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
    """Build the model with a transformer's layers in place of the RWKV layers."""
    model = RWKVSAM(config)
    model.backbone.layers = nn.Sequential(*(TransformerLayer(config.embed_dim) for _ in range(config.depth)))
    return model.eval()


@contextlib.contextmanager
def compiled_encoder(model: RWKVSAM, **options: Any) -> Iterator[None]:
    """Compile backbone, neck and the decoder's image part with `torch.compile(**options)`, for one input size.

    Earlier compilations are forgotten, because a second size would be compiled for dynamic shapes.
    """
    torch._dynamo.reset()
    options = {"dynamic": False} | options
    decoder = model.mask_decoder
    model.backbone.compile(**options)
    model.neck.compile(**options)
    with mock.patch.object(decoder, "project_image", torch.compile(decoder.project_image, **options)):
        yield
