"""SAM's two-way transformer, and the multi-scale refinement of the masks. Maps are `[B, H, W, C]`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from ..triton_kernels.linears import MOST, linears
from ..triton_kernels.mask_product import mask_product, mask_product_ref
from ..triton_kernels.rows import parts_help, strips
from .layers import (
    LN_EPS,
    MLP,
    PLAIN,
    Attention,
    Conv2d,
    Upscale2x,
    affine,
    fused_conv,
    fused_upscale,
    merged_linears,
    on_gpu,
    plain,
)


class TwoWayLayer(nn.Module):
    """Layer in which tokens attend to themselves and to the image and pass an MLP; then the image attends to them."""

    def __init__(self, dim: int, mlp_dim: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attn = Attention(dim, dim)
        self.token_to_image = Attention(dim, dim // 2)
        self.image_to_token = Attention(dim, dim // 2)
        self.mlp = MLP(dim, mlp_dim, dim)
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(dim) for _ in range(4))

    def forward(
        self, tokens: Tensor, image: Tensor, token_pe: Tensor, image_pe: Tensor, seen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens, seen, None, self.norm1)
        else:
            q = tokens + token_pe
            tokens = self.self_attn(q, q, tokens, seen, tokens, self.norm1)
        placed_image, shared = image + image_pe, self.first and image.shape[0] == 1
        q = tokens + token_pe
        tokens = self.token_to_image(q, placed_image, image, None, tokens, self.norm2, "keys", shared)
        tokens = self.norm3(tokens + self.mlp(tokens))
        k = tokens + token_pe
        image = self.image_to_token(placed_image, k, tokens, seen, image, self.norm4, "queries", shared)
        return tokens, image

    def merged(
        self, tokens: Tensor, image: Tensor, token_pe: Tensor, image_pe: Tensor, seen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Compute the same as `forward`, with the projections of an input in one launch."""
        own, to_image, to_tokens = self.self_attn, self.token_to_image, self.image_to_token
        residual, place = (None, None) if self.first else (tokens, token_pe)
        q, k, v = merged_linears(tokens, (own.q_proj, own.k_proj, own.v_proj), place, 2)
        tokens = own.attend(q, k, v, seen, residual, self.norm1)
        of_image = (to_image.k_proj, to_tokens.q_proj, to_image.v_proj)
        k, image_q, v = merged_linears(image, of_image, image_pe, 2)
        (q,) = merged_linears(tokens, (to_image.q_proj,), token_pe, 1)
        tokens = to_image.attend(q, k, v, None, tokens, self.norm2)
        first, second = self.mlp.layers
        (hidden,) = merged_linears(tokens, (first,), relu=True)
        tokens = self.norm3(tokens + second(hidden))
        k, v = merged_linears(tokens, (to_tokens.k_proj, to_tokens.v_proj), token_pe, 1)
        return tokens, to_tokens.attend(image_q, k, v, seen, image, self.norm4)


class TwoWayTransformer(nn.Module):
    """Two-way layers, and a final attention of the tokens to the image."""

    def __init__(self, dim: int, mlp_dim: int = 2048, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayLayer(dim, mlp_dim, first=i == 0) for i in range(depth))
        self.final_attn = Attention(dim, dim // 2)
        self.final_norm = nn.LayerNorm(dim)

    def forward(
        self, token_pe: Tensor, image: Tensor, image_pe: Tensor, seen: Tensor | None, used: slice
    ) -> tuple[Tensor, Tensor]:
        """Update tokens and image.

        Args:
            token_pe: Tokens `[N, M, dim]`, which also serve as their position encoding.
            image: `[1 or N, h*w, dim]`.
            image_pe: `[h*w, dim]`.
            seen: `[N, M]` bool, False for tokens to ignore; None to use all.
            used: Tokens to return after the first one. The last attention updates no others.

        Returns:
            Tokens `[N, 1 + used, dim]` and image `[N, h*w, dim]`.
        """
        tokens = token_pe
        if on_gpu(tokens) and plain(*self.modules(), kinds=_WITHIN):
            return self._merged(tokens, image, image_pe, seen, used)
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_pe, image_pe, seen)
        tokens, token_pe = (torch.cat([t[:, :1], t[:, used]], dim=1) for t in (tokens, token_pe))
        q = tokens + token_pe
        return self.final_attn(q, image + image_pe, image, None, tokens, self.final_norm, "keys"), image

    def _merged(
        self, token_pe: Tensor, image: Tensor, image_pe: Tensor, seen: Tensor | None, used: slice
    ) -> tuple[Tensor, Tensor]:
        tokens = token_pe
        for layer in self.layers:
            assert isinstance(layer, TwoWayLayer)
            tokens, image = layer.merged(tokens, image, token_pe, image_pe, seen)
        tokens, token_pe = tokens[:, : used.stop], token_pe[:, : used.stop]  # without a copy for one prompt
        k, v = merged_linears(image, (self.final_attn.k_proj, self.final_attn.v_proj), image_pe, 1)
        (q,) = merged_linears(tokens, (self.final_attn.q_proj,), token_pe, 1)
        tokens = self.final_attn.attend(q, k, v, None, tokens, self.final_norm)
        return tokens if used.start == 1 else torch.cat([tokens[:, :1], tokens[:, used]], dim=1), image


_WITHIN = PLAIN | {TwoWayTransformer, TwoWayLayer, Attention, MLP, nn.ModuleList}


class MaskDecoder(nn.Module):
    """Decoder from an image embedding and prompt tokens to low-resolution mask logits and predicted IoUs.

    `project_image` computes the parts that depend on the image alone: the projected maps of stages 1 and 2, and their
    contribution to the first refinement convolution. Convolution is linear, so its input channels can be split.

    The second refinement convolution's output is only multiplied by the weights of the masks. So it runs with the
    products of those weights and its own: one output per mask instead of 32.
    """

    def __init__(self, config: ModelConfig, dim: int = 256) -> None:
        super().__init__()
        num_masks = 1 + config.num_multimask_outputs
        self.transformer = TwoWayTransformer(dim)
        self.iou_token = nn.Parameter(torch.randn(1, dim))
        self.mask_tokens = nn.Parameter(torch.randn(num_masks, dim))
        self.upscale = nn.Sequential(
            Upscale2x(dim, 64), nn.LayerNorm(64, LN_EPS), nn.GELU(), Upscale2x(64, 32), nn.GELU()
        )
        self.stage1_proj = nn.Sequential(
            Conv2d(config.stage1_dim, 64, 3, padding=1),
            nn.LayerNorm(64, LN_EPS),
            nn.GELU(),
            Conv2d(64, 32, 3, padding=1),
        )
        self.stage2_proj = nn.Sequential(
            Upscale2x(config.stage2_dim, 64), nn.LayerNorm(64, LN_EPS), nn.GELU(), Conv2d(64, 32, 3, padding=1)
        )
        self.mix_mask = Conv2d(32, 64, 3, padding=1)
        self.mix_stage1 = Conv2d(32, 64, 3, padding=1, bias=False)
        self.mix_stage2 = Conv2d(32, 64, 3, padding=1, bias=False)
        self.mix_out = nn.Sequential(nn.LayerNorm(64, LN_EPS), nn.GELU(), Conv2d(64, 32, 3, padding=1))
        self.mask_mlps = nn.ModuleList(MLP(dim, dim, dim, 32) for _ in range(num_masks))
        self.iou_head = MLP(dim, dim, dim, num_masks)

    def project_image(self, stage1: Tensor, stage2: Tensor) -> Tensor:
        """Maps of stage 1 `[B, H/4, W/4, .]` and stage 2 `[B, H/8, W/8, .]` to a map `[B, H/4, W/4, 64]`."""
        if plain(self.stage1_proj, self.stage2_proj):
            conv1, norm1, gelu1, conv2 = self.stage1_proj
            from_stage1 = fused_conv(fused_conv(stage1, conv1, norm=norm1, gelu=gelu1), conv2)
            upscale, norm2, gelu2, conv3 = self.stage2_proj
            from_stage2 = fused_conv(fused_upscale(stage2, upscale, norm2, gelu2), conv3)
        else:
            from_stage1, from_stage2 = self.stage1_proj(stage1), self.stage2_proj(stage2)
        return fused_conv(from_stage1, self.mix_stage1) + fused_conv(from_stage2, self.mix_stage2)

    def forward(
        self,
        image_embed: Tensor,
        image_pe: Tensor,
        high_res_feats: Tensor,
        prompt_tokens: Tensor,
        mask_slice: slice,
        seen: Tensor | None = None,
        keep: Callable[[Tensor], Tensor] | None = None,
        joined: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Decode N prompts on one image.

        Args:
            image_embed: `[1 or N, h, w, 256]`, with the dense embedding of the mask prompt added.
            image_pe: `[h, w, 256]`.
            high_res_feats: Result of `project_image` for the image, B = 1.
            prompt_tokens: `[N, tokens, 256]`.
            mask_slice: Mask outputs to compute.
            seen: `[N, tokens]` bool, False for padding tokens; None if there are none.
            keep: Function from predicted IoUs `[N, n]` to the prompts `[N]` bool whose masks are wanted; None for all.
            joined: `prompt_tokens` and `seen` begin with the decoder's own tokens.

        Returns:
            Mask logits `[N or fewer, n, 4h, 4w]` and predicted IoUs `[N, n]`.
        """
        N, (h, w) = prompt_tokens.shape[0], image_pe.shape[:2]
        if not joined:
            output_tokens = torch.cat([self.iou_token, self.mask_tokens]).expand(N, -1, -1)
            prompt_tokens = torch.cat([output_tokens, prompt_tokens], dim=1)
            seen = None if seen is None else F.pad(seen, (output_tokens.shape[1], 0), value=True)
        chosen = range(len(self.mask_mlps))[mask_slice]
        tokens, image = self.transformer(
            prompt_tokens,
            image_embed.flatten(1, 2),
            image_pe.flatten(0, 1),
            seen,
            slice(1 + chosen.start, 1 + chosen.stop),
        )
        weights, iou = self._heads(tokens, chosen)
        iou = iou[:, mask_slice]
        if keep is not None:
            kept = keep(iou)
            image, weights = image[kept], weights[kept]
            if len(image) == 0:
                return image.new_empty(0, len(chosen), 4 * h, 4 * w), iou
        return self._masks(image.unflatten(1, (h, w)), weights, high_res_feats), iou

    def _heads(self, tokens: Tensor, chosen: range) -> tuple[Tensor, Tensor]:
        """Return the weights of the chosen masks, `[N, n, 32]`, and all predicted IoUs."""
        mlps = [self.iou_head, *(cast(MLP, self.mask_mlps[i]) for i in chosen)]
        if not on_gpu(tokens) or len(mlps) > MOST or not plain(*chain(*(mlp.modules() for mlp in mlps)), kinds=_WITHIN):
            iou, *weights = (mlp(tokens[:, j]) for j, mlp in enumerate(mlps))
            return torch.stack(weights, dim=1), iou
        x = tokens.transpose(0, 1)
        *hidden, (iou_last, *mask_last) = zip(*(mlp.layers for mlp in mlps), strict=True)
        for layers in hidden:
            x = linears(x, None, 0, True, *affine(*layers))
        return linears(x[1:], None, 0, False, *affine(*mask_last)).transpose(0, 1), iou_last(x[0])

    def _masks(self, image: Tensor, weights: Tensor, from_image: Tensor) -> Tensor:
        """Upscale and refine maps `[N, h, w, 256]`; return their products with `weights`: `[N, n, 4h, 4w]`."""
        fused = plain(self.upscale, self.mix_mask, self.mix_out) and plain(*self.upscale, *self.mix_out)

        def masks(image: Tensor, weights: Tensor) -> Tensor:
            if not fused:
                m = self.upscale(image)
                m = m + self.mix_out(self.mix_mask(m) + from_image)
                return (weights @ m.flatten(1, 2).transpose(1, 2)).unflatten(-1, m.shape[1:3])
            conv1, norm1, gelu1, conv2, gelu2 = self.upscale
            norm, gelu, conv = self.mix_out
            assert isinstance(conv, Conv2d) and conv.bias is not None
            m = fused_upscale(fused_upscale(image, conv1, norm1, gelu1), conv2, None, gelu2)
            mixed = fused_conv(m, self.mix_mask, add=from_image, norm=norm, gelu=gelu)
            product = mask_product if on_gpu(m) else mask_product_ref
            return product(weights, m, mixed, conv.weight, conv.bias)

        if not (fused and parts_help(image)):
            return masks(image, weights)
        parts = strips(len(image), from_image[0].numel(), image)  # every prompt has its own maps
        return torch.cat([masks(image[p.start : p.stop], weights[p.start : p.stop]) for p in parts])
