"""Pixels on their way into the model and masks on their way out, as tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import PIXEL_MEAN, PIXEL_STD
from ..triton_kernels.stem import normalized


def normalize(pixels: Tensor) -> Tensor:
    """Convert uint8 `[B, h, w, 3]` to float32 and normalize it; return floating-point pixels as they are."""
    return pixels if pixels.is_floating_point() else normalized(pixels, PIXEL_MEAN, PIXEL_STD)


def normalize_values(pixels: Tensor) -> Tensor:
    """Normalize values of 0..255 of any dtype, `[B, 3, h, w]`, to float32 of that shape."""
    return normalized(pixels.float().permute(0, 2, 3, 1), PIXEL_MEAN, PIXEL_STD).permute(0, 3, 1, 2)


def pad(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Pad `[B, h, w, 3]` with zeros on the right and below to `size` (H, W)."""
    h, w = pixels.shape[1:3]
    return F.pad(pixels, (0, 0, 0, size[1] - w, 0, size[0] - h))


def shrink(pixels: Tensor, side: int) -> Tensor:
    """Resize square normalized pixels `[B, C, h, h]` to `side`.

    By whole numbers with a triangle filter, as Pillow's BILINEAR but for the outermost pixels, and else bilinear. It is
    a convolution, because runtimes of exported graphs disagree about antialiased resizing.
    """
    C, h = pixels.shape[1:3]
    if h == side:
        return pixels
    if h % side:
        return F.interpolate(pixels, (side, side), mode="bilinear", align_corners=False)
    ratio = h // side
    taps = 2 * ratio - ratio % 2
    weights = torch.tensor([1 - abs(j - (taps - 1) / 2) / ratio for j in range(taps)], dtype=pixels.dtype)
    kernel = torch.outer(weights, weights) / weights.sum() ** 2
    edge = (taps - ratio) // 2
    padded = F.pad(pixels, (edge, edge, edge, edge), mode="replicate")
    return F.conv2d(padded, kernel.to(pixels.device).expand(C, 1, -1, -1), stride=ratio, groups=C)


def resize_logits(masks: Tensor, side: int) -> Tensor:
    """Resize square low-resolution logits `[N, n, h, h]` to `side`, bilinear."""
    if masks.shape[-1] == side:
        return masks
    return F.interpolate(masks, (side, side), mode="bilinear", align_corners=False)


def resize_masks(
    low_res_masks: Tensor, input_size: tuple[int, int], resized_size: tuple[int, int], original_size: tuple[int, int]
) -> Tensor:
    """Resize mask logits to the size of the image they belong to.

    The logits are resized to the model input, cropped to the part that the image fills, and resized to the image. Both
    resizes are bilinear without aligned corners. The result takes 4 bytes per pixel and mask.

    Args:
        low_res_masks: `[N, n, h, w]` logits.
        input_size: `(H, W)` of the model input.
        resized_size: `(H, W)` of the image within the model input.
        original_size: `(H, W)` of the image.

    Returns:
        `[N, n, H, W]` float32 logits in the image frame.

    Source: `Sam.postprocess_masks` of segment-anything.
    """
    logits = F.interpolate(low_res_masks.float(), input_size, mode="bilinear", align_corners=False)
    logits = logits[..., : resized_size[0], : resized_size[1]]
    return F.interpolate(logits, original_size, mode="bilinear", align_corners=False)
