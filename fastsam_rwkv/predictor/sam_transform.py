"""`Predictor.transform`: segment-anything's `ResizeLongestSide`, by this package's resizing and coordinate frames."""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from .frame import ImageFrame
from .image_io import resize_image


class ResizeLongestSide:
    """Resize images to a longer side of `target_length` pixels, and map coordinates to them.

    Args:
        target_length: Side of the model input in pixels.

    Source: names and arguments of segment-anything's class.
    """

    def __init__(self, target_length: int) -> None:
        self.target_length = target_length

    def get_preprocess_shape(self, oldh: int, oldw: int, long_side_length: int) -> tuple[int, int]:
        """Return the resized size `(h, w)` of an image of oldh x oldw pixels."""
        return ImageFrame.of((oldh, oldw), long_side_length).resized_size

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        """Resize a uint8 RGB image `[H, W, 3]` to `[h, w, 3]`."""
        return resize_image(image, self.target_length)[0]

    def apply_coords(self, coords: np.ndarray, original_size: tuple[int, ...]) -> np.ndarray:
        """Map `[..., 2]` (x, y) from an image of `(H, W)` to the model input, in a new array."""
        return self._frame(original_size).points_to_input(np.asarray(coords, np.float64))

    def apply_boxes(self, boxes: np.ndarray, original_size: tuple[int, ...]) -> np.ndarray:
        """Map `[..., 4]` (x1, y1, x2, y2) from an image of `(H, W)` to the model input: `[N, 4]`."""
        return self._frame(original_size).boxes_to_input(np.asarray(boxes, np.float64).reshape(-1, 4))

    def apply_image_torch(self, image: Tensor) -> Tensor:
        """Resize images `[B, 3, H, W]` to `[B, 3, h, w]` (bilinear, antialiased), in float."""
        size = self.get_preprocess_shape(image.shape[2], image.shape[3], self.target_length)
        return F.interpolate(image.float(), size, mode="bilinear", align_corners=False, antialias=True)

    def apply_coords_torch(self, coords: Tensor, original_size: tuple[int, ...]) -> Tensor:
        """Map `[..., 2]` (x, y) from an image of `(H, W)` to the model input."""
        return self._frame(original_size).points_to_input(coords.float())

    def apply_boxes_torch(self, boxes: Tensor, original_size: tuple[int, ...]) -> Tensor:
        """Map `[..., 4]` (x1, y1, x2, y2) from an image of `(H, W)` to the model input: `[N, 4]`."""
        return self._frame(original_size).boxes_to_input(boxes.float().reshape(-1, 4))

    def _frame(self, original_size: tuple[int, ...]) -> ImageFrame:
        return ImageFrame.of((int(original_size[0]), int(original_size[1])), self.target_length)
