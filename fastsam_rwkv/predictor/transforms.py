"""Images to the model's input and masks back to the image, as tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..modeling.pixels import normalize, pad, resize_masks
from .frame import ImageFrame
from .image_io import load_image, resize_image

__all__ = ["ImageFrame", "load_image", "masks_to_image", "preprocess", "resize"]


def preprocess(
    image: np.ndarray,
    image_size: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ImageFrame]:
    """Resize, normalize and pad a uint8 RGB image `[H, W, 3]`.

    Returns:
        Pixels `[1, 3, image_size, image_size]`, normalized, with zeros on the right and below; and the image's frame.
        The longer side is resized to `image_size` (bilinear, antialiased).
    """
    resized, frame = resize(image, image_size, device)
    return pad(normalize(resized.permute(0, 2, 3, 1)), frame.input_size).permute(0, 3, 1, 2).to(dtype), frame


def resize(image: np.ndarray, image_size: int, device: torch.device | str | None = None) -> tuple[Tensor, ImageFrame]:
    """Resize a uint8 RGB image `[H, W, 3]`; `encode_image(pixels, frame.input_size)` normalizes and pads.

    Returns:
        Pixels uint8 `[1, 3, h, w]`, whose longer side is `image_size`, and the image's frame.
    """
    resized, frame = resize_image(image, image_size)
    return torch.from_numpy(resized).to(device).permute(2, 0, 1)[None], frame


def masks_to_image(low_res_masks: Tensor, frame: ImageFrame) -> Tensor:
    """Resize mask logits `[N, n, h, w]` to float32 logits `[N, n, H, W]` in the image frame.

    The result takes 4 bytes per pixel and mask: for many masks of a large image, pass a few at a time.
    """
    return resize_masks(low_res_masks, frame.input_size, frame.resized_size, frame.original_size)
