"""Encoder and decoder graphs as modules around the model. They fix layouts and dtypes of inputs and outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..modeling.embedding import ImageEmbedding
from ..modeling.pixels import normalize_values, pad, resize_logits, resize_masks, shrink
from ..modeling.rwkv_sam import RWKVSAM
from ..predictor.frame import ImageFrame
from .manifest import Manifest

SPLIT = 32  # channels of `high_res_feats_0`


class EncoderGraph(nn.Module):
    """Image encoder with channels-first outputs, in SAM 2's order.

    Input: `image`, normalized float32 `[B, 3, S, S]`; RGB uint8 `[B, h, w, 3]` with h, w <= S if `uint8` is set.
    Outputs: `high_res_feats_0` and `high_res_feats_1` `[B, 32, S/4, S/4]`, which are halves of one map, and
    `image_embed` `[B, 256, S/16, S/16]`.
    """

    def __init__(self, model: RWKVSAM, manifest: Manifest) -> None:
        super().__init__()
        self.model = model
        self.input_size = (manifest.image_size, manifest.image_size)
        self.uint8 = manifest.uint8

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pixels = image.permute(0, 3, 1, 2) if self.uint8 else image
        embedding = self.model.encode_image(pixels, self.input_size)
        high_res_feats = embedding.high_res_feats.permute(0, 3, 1, 2)
        return high_res_feats[:, :SPLIT], high_res_feats[:, SPLIT:], embedding.image_embed.permute(0, 3, 1, 2)


class SamEncoderGraph(nn.Module):
    """Image encoder for programs written for segment-anything. It resizes from their 1024 pixels to the model input.

    Input: for "sam" `input_image`, RGB 0..255 `[h, w, 3]`, float32 or uint8, with h, w <= 1024. It is not normalized.
    For "osam" `x`, normalized and padded float32 `[1, 3, 1024, 1024]`.
    Output: `image_embeddings` `[1, 1280, S/16, S/16]`, which is `ImageEmbedding.packed`.
    """

    def __init__(self, model: RWKVSAM, manifest: Manifest) -> None:
        super().__init__()
        self.model = model
        self.image_size, self.frame_size = manifest.image_size, manifest.frame_size
        self.normalized = manifest.contract == "osam"

    def forward(self, image: Tensor) -> Tensor:
        if not self.normalized:
            pixels = normalize_values(image[None].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            image = pad(pixels, (self.frame_size, self.frame_size)).permute(0, 3, 1, 2)
        return self.model.encode_image(shrink(image, self.image_size)).packed()


class _Decoder(nn.Module):
    def __init__(self, model: RWKVSAM, manifest: Manifest) -> None:
        super().__init__()
        self.model = model
        self.image_size, self.frame_size = manifest.image_size, manifest.frame_size
        self.chosen = slice(0, 1) if manifest.single_mask else slice(None)

    def decode(
        self,
        image_embed: Tensor,
        high_res_feats: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return float32 masks and predicted IoUs from channels-last maps. Values of `has_mask_input` <= 0 say no."""
        prompt_encoder, S = self.model.prompt_encoder, self.image_size
        mask = prompt_encoder.mask_downscaling(mask_input.to(self.model.dtype).permute(0, 2, 3, 1))
        dense = torch.where(has_mask_input > 0, mask, prompt_encoder.no_mask_embed)
        tokens = prompt_encoder(point_coords, point_labels.long(), (S, S))
        grid = prompt_encoder.grid(S // 16, S // 16)
        low, iou = self.model.mask_decoder(image_embed + dense, grid, high_res_feats, tokens, self.chosen)
        return low.float(), iou.float()


class DecoderGraph(_Decoder):
    """Prompt encoder and mask decoder for N prompts on one image.

    The inputs after the embedding are those of segment-anything's exported decoder, in the frame of the model input.
    """

    def forward(
        self,
        image_embed: Tensor,
        high_res_feats_0: Tensor,
        high_res_feats_1: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
    ) -> tuple[Tensor, Tensor]:
        high_res_feats = torch.cat([high_res_feats_0, high_res_feats_1], 1)
        image_embed, high_res_feats = (t.permute(0, 2, 3, 1) for t in (image_embed, high_res_feats))
        return self.decode(image_embed, high_res_feats, point_coords, point_labels, mask_input, has_mask_input)


class SamDecoderGraph(_Decoder):
    """segment-anything's exported decoder: coordinates in 1024 pixels, low-resolution masks of 256, one mask a prompt.

    Source: `SamOnnxModel` of segment-anything, with `return_single_mask`.
    """

    def candidates(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return all masks `[N, n, 256, 256]`, their predicted IoUs, and the scores by which SAM chooses, `[N, n]`.

        More than two points, padding included, choose the single mask; fewer the best of the others.
        """
        S, frame = self.image_size, self.frame_size
        grid = self.model.prompt_encoder.grid(S // 16, S // 16)
        image = ImageEmbedding.unpacked(image_embeddings, grid)
        low, iou = self.decode(
            image.image_embed,
            image.high_res_feats,
            point_coords * (S / frame),
            point_labels,
            resize_logits(mask_input, S // 4),
            has_mask_input,
        )
        points = torch.ones_like(point_labels).sum(1, keepdim=True)
        weight = torch.zeros_like(iou[:1])
        weight[:, 0] = 1000.0
        return resize_logits(low, frame // 4), iou, iou + (points - 2.5) * weight

    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
        orig_im_size: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        low, iou, scores = self.candidates(image_embeddings, point_coords, point_labels, mask_input, has_mask_input)
        best = scores.argmax(1, keepdim=True)
        low = low.gather(1, best[..., None, None].expand(-1, -1, *low.shape[2:]))
        return masks_to_size(low, orig_im_size, self.frame_size), iou.gather(1, best), low


@torch.library.custom_op("fastsam_rwkv::masks_to_size", mutates_args=())
def masks_to_size(low_res_masks: Tensor, orig_im_size: Tensor, image_size: int) -> Tensor:
    """Resize mask logits `[N, n, h, w]` to `orig_im_size` `[2]` (H, W), as `resize_masks` does.

    This is an operator because the output shape depends on values. `translations.masks_to_size` restates
    `ImageFrame.of` in the graph.
    """
    H, W = (int(side) for side in orig_im_size)
    frame = ImageFrame.of((H, W), image_size)
    return resize_masks(low_res_masks, frame.input_size, frame.resized_size, frame.original_size)


@masks_to_size.register_fake
def _(low_res_masks: Tensor, orig_im_size: Tensor, image_size: int) -> Tensor:
    context = torch.library.get_ctx()
    return low_res_masks.new_empty(*low_res_masks.shape[:2], context.new_dynamic_size(), context.new_dynamic_size())


def graphs_of(model: RWKVSAM, manifest: Manifest) -> tuple[nn.Module, DecoderGraph | SamDecoderGraph]:
    """Return the encoder and the decoder of the manifest's contract."""
    if manifest.contract == "sam2":
        return EncoderGraph(model, manifest), DecoderGraph(model, manifest)
    return SamEncoderGraph(model, manifest), SamDecoderGraph(model, manifest)
