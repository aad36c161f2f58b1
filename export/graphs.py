"""Encoder and decoder graphs as modules around the model. They fix layouts and dtypes of inputs and outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..modeling.pixels import resize_masks
from ..modeling.rwkv_sam import RWKVSAM
from ..predictor.frame import ImageFrame


class EncoderGraph(nn.Module):
    """Image encoder with channels-first outputs.

    Input: `image`, normalized float32 `[B, 3, S, S]`; RGB uint8 `[B, h, w, 3]` with h, w <= S if `uint8` is set.
    Outputs: `image_embed` `[B, 256, S/16, S/16]` and `high_res_feats` `[B, 64, S/4, S/4]`.
    """

    def __init__(self, model: RWKVSAM, image_size: int, uint8: bool) -> None:
        super().__init__()
        self.model = model
        self.input_size = (image_size, image_size)
        self.uint8 = uint8

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        pixels = image.permute(0, 3, 1, 2) if self.uint8 else image
        embedding = self.model.encode_image(pixels, self.input_size)
        return embedding.image_embed.permute(0, 3, 1, 2), embedding.high_res_feats.permute(0, 3, 1, 2)


class DecoderGraph(nn.Module):
    """Prompt encoder and mask decoder for N prompts on one image.

    The inputs after the embedding are those of segment-anything's exported decoder.
    """

    def __init__(self, model: RWKVSAM, image_size: int, sam_compatible: bool, single_mask: bool) -> None:
        super().__init__()
        self.model = model
        self.image_size = image_size
        self.sam_compatible = sam_compatible
        self.chosen = slice(0, 1) if single_mask else slice(None)

    def forward(
        self,
        image_embed: Tensor,
        high_res_feats: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
        orig_im_size: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        prompt_encoder, S = self.model.prompt_encoder, self.image_size
        image_embed, high_res_feats = (t.permute(0, 2, 3, 1) for t in (image_embed, high_res_feats))
        mask = prompt_encoder.mask_downscaling(mask_input.to(self.model.dtype).permute(0, 2, 3, 1))
        dense = torch.where(has_mask_input != 0, mask, prompt_encoder.no_mask_embed)
        tokens = prompt_encoder(point_coords, point_labels.long(), (S, S))
        grid = prompt_encoder.grid(S // 16, S // 16)
        low, iou = self.model.mask_decoder(image_embed + dense, grid, high_res_feats, tokens, self.chosen)
        low, iou = low.float(), iou.float()
        if not self.sam_compatible:
            return low, iou
        assert orig_im_size is not None
        return masks_to_size(low, orig_im_size, S), iou, low


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
