"""Coordinate frames: the pixels of an image, and the model input. No PyTorch.

The model input is a square of `image_size` pixels. The resized image, or a window of it, fills its upper left; the rest
is padding. One factor, `ImageFrame.scale`, maps the image frame to the input frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..errors import short_repr

if TYPE_CHECKING:
    from torch import Tensor

Coords = TypeVar("Coords", np.ndarray, "Tensor")


@dataclass(frozen=True)
class ImageFrame:
    """Position of an image, or of a window of it, in the model input.

    Attributes:
        original_size: `(H, W)` of the image or window.
        resized_size: `(H, W)` of the image within the input; the longer side is the input's.
        input_size: `(S, S)` of the input.
        scale: Input pixels per image pixel, the same for x and y.
        offset: (x, y) of the window's upper left corner in the image; (0, 0) for the whole image.
    """

    original_size: tuple[int, int]
    resized_size: tuple[int, int]
    input_size: tuple[int, int]
    scale: float
    offset: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, original_size: tuple[int, int], image_size: int, offset: tuple[int, int] = (0, 0)) -> ImageFrame:
        """Return the frame of an image of `original_size` (H, W) in an input of `image_size` pixels per side."""
        scale = image_size / max(original_size)
        h, w = (max(1, math.floor(side * scale + 0.5)) for side in original_size)
        return cls(original_size, (h, w), (image_size, image_size), scale, offset)

    @property
    def pixels(self) -> tuple[slice, slice]:
        """Rows and columns of the window in the image."""
        (x, y), (H, W) = self.offset, self.original_size
        return slice(y, y + H), slice(x, x + W)

    def points_to_input(self, coords: Coords) -> Coords:
        """Map `[..., 2]` (x, y) from the image frame to the input frame; a numpy array or a torch.Tensor."""
        return self._to_input(coords)

    def boxes_to_input(self, boxes: Coords) -> Coords:
        """Map `[..., 4]` (x1, y1, x2, y2) from the image frame to the input frame; an array or a torch.Tensor."""
        return self._to_input(boxes)

    def _to_input(self, coords: Coords) -> Coords:
        if isinstance(coords, (list, tuple)):
            raise TypeError(f"coordinates must be a numpy array or a torch.Tensor, got {short_repr(coords)}")
        if self.offset == (0, 0):
            return coords * self.scale
        offset: Any = self.offset * (coords.shape[-1] // 2)  # (x, y) or (x, y, x, y)
        offset = coords.new_tensor(offset) if hasattr(coords, "new_tensor") else np.array(offset)
        return (coords - offset) * self.scale

    def masks_to_image(self, low_res_masks: np.ndarray) -> np.ndarray:
        """Resize mask logits `[N, n, h, w]` to float32 logits `[N, n, H, W]` in the image frame.

        This is `transforms.masks_to_image` in numpy. Both resizes and the crop between them are linear along each
        axis, so that one matrix per axis does all three.
        """
        H, W = self.original_size
        h, w = low_res_masks.shape[2:]
        rows, columns = (self.enlarging(axis, slice(0, side), low) for axis, side, low in ((0, H, h), (1, W, w)))
        return rows @ low_res_masks.astype(np.float32, copy=False) @ columns.T

    def strips_to_image(self, low_res_masks: np.ndarray, values: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Resize mask logits as `masks_to_image`, in strips of the image.

        Args:
            low_res_masks: Logits `[N, n, h, w]`.
            values: Number of logits that a strip may have, if a row has fewer.

        Yields:
            Rows of the image, and their float32 logits `[N, n, rows, W]`.
        """
        H, W = self.original_size
        low_res_masks = low_res_masks.astype(np.float32, copy=False)
        side = max(1, values // W)
        parts = (slice(left, min(left + side, W)) for left in range(0, W, side))
        columns = np.concatenate([self.enlarging(1, part, low_res_masks.shape[3]) for part in parts])
        step = max(1, values // (W * max(1, low_res_masks.shape[0] * low_res_masks.shape[1])))
        for top in range(0, H, step):
            lines = slice(top, min(top + step, H))
            rows = self.enlarging(0, lines, low_res_masks.shape[2])
            used = np.flatnonzero(rows.any(0))
            near = slice(used[0], used[-1] + 1)
            yield lines, rows[:, near] @ (low_res_masks[..., near, :] @ columns.T)

    def enlarging(self, axis: int, part: slice, low: int) -> np.ndarray:
        """Return the matrix `[part, low]` from `low` logits to a part of an axis (0: rows) of the image."""
        resized = self.resized_size[axis]
        return bilinear(self.original_size[axis], resized, part) @ bilinear(self.input_size[axis], low)[:resized]

    def coverage(self, masks: np.ndarray, low_res_size: int) -> np.ndarray:
        """Return how much of each low-resolution pixel lies inside masks of the image.

        Args:
            masks: `[N, H, W]` float32, 1 inside and 0 outside.
            low_res_size: Side of the low-resolution masks.

        Returns:
            Float32 `[N, low_res_size, low_res_size]`, 0..1. Parts outside the image do not count, and pixels in the
            padding have 0.
        """
        step = self.input_size[0] / low_res_size / self.scale  # image pixels per low-resolution pixel
        rows, columns = (_overlap(low_res_size, side, step) for side in self.original_size)
        return rows @ masks @ columns.T


def resample_logits(low_res_masks: np.ndarray, source: ImageFrame, target: ImageFrame, outside: float) -> np.ndarray:
    """Map low-resolution logits `[N, n, h, w]` from one frame to another of the same image and input size.

    Args:
        low_res_masks: Logits in the source's frame.
        source, target: Frames of the image or of windows of it.
        outside: Logit of target pixels whose center lies outside the source's window.

    Returns:
        Float32 logits `[N, n, h, w]` in the target's frame.
    """
    matrices, inside = [], []
    for axis, low in zip((1, 0), low_res_masks.shape[2:], strict=True):  # y, x
        step = source.input_size[0] / low  # input pixels per low-resolution pixel
        place = (np.arange(low) + 0.5) * step / target.scale + target.offset[axis] - source.offset[axis]
        inside.append((place >= 0) & (place <= source.original_size[1 - axis]))
        place = np.clip(place * source.scale / step - 0.5, 0, low - 1)
        support = max(1.0, source.scale / target.scale)  # antialiased if the target is coarser
        weights = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(low)) / support)
        matrices.append((weights / weights.sum(1, keepdims=True)).astype(np.float32))
    rows, columns = matrices
    moved = rows @ low_res_masks.astype(np.float32, copy=False) @ columns.T
    return np.where(inside[0][:, None] & inside[1], moved, np.float32(outside))


def bilinear(size: int, source: int, part: slice | None = None) -> np.ndarray:
    """Return the matrix `[size, source]`, or a part of its rows, of a bilinear resize along one axis.

    Corners are not aligned.
    """
    rows = np.arange(size)[part or slice(None)]
    place = np.maximum((rows + 0.5) * (source / size) - 0.5, 0)
    first = np.minimum(place.astype(np.int64), source - 1)
    weight = (place - first).astype(np.float32)
    matrix = np.zeros((len(rows), source), np.float32)
    matrix[np.arange(len(rows)), first] = 1 - weight
    matrix[np.arange(len(rows)), np.minimum(first + 1, source - 1)] += weight
    return matrix


def _overlap(size: int, source: int, step: float) -> np.ndarray:
    """Return the matrix `[size, source]` that averages over intervals of `step` pixels, cut to the source."""
    edges = np.minimum(np.arange(size + 1) * step, source)
    pixels = np.arange(source)
    shared = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (shared.clip(0) / np.maximum(np.diff(edges), 1e-9)[:, None]).astype(np.float32)
