"""Pictures to the model's input as tensors: resized, normalised, padded."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .images import PIXEL_MEAN, PIXEL_STD, ImageFrame, load_image, resize_image
from .triton_kernels.stem import normalised

__all__ = ["PIXEL_MEAN", "PIXEL_STD", "ImageFrame", "load_image", "normalise", "pad", "preprocess", "resize"]


def preprocess(
    image: np.ndarray,
    image_size: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ImageFrame]:
    """Resize, normalise and pad a uint8 RGB image `[H, W, 3]`.

    Returns:
        Pixels `[1, 3, image_size, image_size]`: longest side resized to `image_size` (bilinear, antialiased), mean and
        deviation taken out, zeros to the right and below. And the frame that leads back.
    """
    resized, frame = resize(image, image_size, device)
    return pad(normalise(resized.permute(0, 2, 3, 1)), frame.input_size).permute(0, 3, 1, 2).to(dtype), frame


def resize(image: np.ndarray, image_size: int, device: torch.device | str | None = None) -> tuple[Tensor, ImageFrame]:
    """Only the first step of `preprocess`: `encode_image(pixels, frame.input_size)` does the rest where the model is.

    Returns:
        Pixels uint8 `[1, 3, h, w]`, the longer side `image_size`, and the frame.
    """
    resized, frame = resize_image(image, image_size)
    return torch.from_numpy(resized).to(device).permute(2, 0, 1)[None], frame


def normalise(pixels: Tensor) -> Tensor:
    """uint8 `[B, h, w, 3]` to float32 with mean and deviation taken out; floating-point pixels as they are."""
    return normalised(pixels, PIXEL_MEAN, PIXEL_STD) if pixels.dtype == torch.uint8 else pixels


def pad(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """`[B, h, w, 3]` with zeros to the right and below, up to `size` (H, W)."""
    h, w = pixels.shape[1:3]
    return F.pad(pixels, (0, 0, 0, size[1] - w, 0, size[0] - h))
