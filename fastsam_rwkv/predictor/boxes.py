"""Boxes `[M, 4]` (x1, y1, x2, y2) as numpy arrays."""

from __future__ import annotations

import numpy as np

from .frame import ImageFrame


def box_iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the IoU of one box with each of several, `[M]`; 0 for boxes without area."""
    upper, lower = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    shared = np.prod(np.maximum(lower - upper, 0), axis=1, dtype=np.float64)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1, dtype=np.float64)
    union = np.prod(box[2:] - box[:2], dtype=np.float64) + areas - shared
    return shared / np.maximum(union, 1e-12)


def keep_apart(boxes: np.ndarray, ranks: np.ndarray, threshold: float) -> np.ndarray:
    """Return the rows of greedy non-maximum suppression, the highest rank first.

    A box is dropped if its IoU with a kept one exceeds the threshold. Of equal ranks the first counts as higher.
    """
    left = np.argsort(-ranks, kind="stable")
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        left = left[box_iou(boxes[best], boxes[left]) <= threshold]
    return np.array(kept, np.int64)


def near_edge(boxes: np.ndarray, crop: ImageFrame, size: tuple[int, int], tolerance: float) -> np.ndarray:
    """Tell which boxes come close to an edge of a crop that is not one of the image, of `size` (H, W): `[M]` bool."""
    (x, y), (h, w) = crop.offset, crop.original_size
    inner, outer = np.array([x, y, x + w, y + h]), np.array([0, 0, size[1], size[0]])
    return ((np.abs(boxes - inner) <= tolerance) & (np.abs(boxes - outer) > tolerance)).any(1)
