"""Windows around small targets, which the model then sees enlarged. No PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from .frame import ImageFrame

Box = tuple[float, float, float, float]  # (x1, y1, x2, y2) in the image frame

# Side of a window in longer sides of the target's box, and the largest longer side of a window that "auto" takes, as a
# part of the image's. Chosen on 84 things of COCO among 2, 2.5 and 3.5, and 0.25 to 1.
MARGIN, LARGEST = 3.5, 0.75


def window_around(box: Box, frame: ImageFrame, largest: float = LARGEST) -> ImageFrame | None:
    """Return the frame of a window around a box, or None if the window would be too large.

    The window is a square of MARGIN times the box's longer side, moved into the image and cut to it.

    Args:
        box: Box in the image frame; it may reach beyond the image.
        frame: Frame of the image.
        largest: Part of the image's longer side that the window's longer side may have.
    """
    inside = [np.clip(box[axis::2], 0, frame.original_size[1 - axis]) for axis in (0, 1)]
    side = max(2, math.ceil(MARGIN * max(high - low for low, high in inside)))
    if side > largest * max(frame.original_size):
        return None
    size, offset = [], []
    for (low, high), length in zip(inside, frame.original_size[::-1], strict=True):
        size.append(min(side, length))
        offset.append(int(np.clip(round((low + high - size[-1]) / 2), 0, length - size[-1])))
    return ImageFrame.of((size[1], size[0]), frame.input_size[0], (offset[0], offset[1]))


def outline(low_res_masks: np.ndarray, frame: ImageFrame) -> Box | None:
    """Return the tight box of logits `[n, h, w]` above 0, in the image frame; None if there are none."""
    rows, columns = (np.flatnonzero((low_res_masks > 0).any(axes)) for axes in ((0, 2), (0, 1)))
    if not len(rows):
        return None
    step = frame.input_size[0] / low_res_masks.shape[-1] / frame.scale  # image pixels per low-resolution pixel
    (H, W), (x, y) = frame.original_size, frame.offset
    x1, y1, x2, y2 = (step * float(edge) for edge in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    return x + min(x1, W), y + min(y1, H), x + min(x2, W), y + min(y2, H)


def enclosing(boxes: Iterable[Box]) -> Box:
    """Return the tight box of boxes."""
    x1, y1, x2, y2 = zip(*boxes, strict=True)
    return min(x1), min(y1), max(x2), max(y2)
