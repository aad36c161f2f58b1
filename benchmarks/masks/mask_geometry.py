"""Geometry of masks: boxes, most interior pixels, corrective clicks, IoU and boundaries."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import ndimage

DILATION_RATIO = 0.02  # of the image's diagonal: the published width of a boundary


def tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return (x1, y1, x2, y2) of a mask that is not empty, x2 and y2 exclusive."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def interior_point(mask: np.ndarray) -> tuple[int, int]:
    """Return (x, y) of the pixel farthest (Euclidean) from the outside, the first in row-major order of several.

    Pixels beyond the image's border are outside.
    """
    return deepest(mask)[:2]


def deepest(mask: np.ndarray) -> tuple[int, int, int]:
    """Return the `interior_point` of a mask that is not empty, and its squared distance from the outside."""
    x1, y1, x2, y2 = tight_box(mask)
    distance = ndimage.distance_transform_edt(np.pad(mask[y1:y2, x1:x2], 1))[1:-1, 1:-1]
    squared = np.rint(distance**2).astype(np.int64)  # integers, so that equal distances are equal
    y, x = np.unravel_index(int(squared.argmax()), squared.shape)
    return x1 + int(x), y1 + int(y), int(squared[y, x])


def next_click(mask: np.ndarray, truth: np.ndarray) -> tuple[int, int, int] | None:
    """Return (x, y, label) of the click at the center of the largest error, or None if there is no error.

    The center is the wrong pixel farthest from the border of its error. Its label is 1 if the mask misses it, 0 if the
    mask spills onto it. Of equally large errors the spill comes first.

    Source: RITM (arXiv 2102.06583, `isegm/inference/clicker.py`), which SAM (arXiv 2304.02643, D.1) and SAM 2
    (`sample_one_point_from_error_center`) evaluate with.
    """
    missed, spilled = (deepest(error) if error.any() else (0, 0, 0) for error in (truth & ~mask, mask & ~truth))
    if missed[2] == spilled[2] == 0:
        return None
    return (*missed[:2], 1) if missed[2] > spilled[2] else (*spilled[:2], 0)


def box_mask(shape: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    """Return the filled box, `[H, W]` bool: the pixels whose center lies in it."""
    x1, y1, x2, y2 = box
    y, x = (np.arange(side) + 0.5 for side in shape)
    return ((y >= y1) & (y < y2))[:, None] & (x >= x1) & (x < x2)


def ellipse_mask(shape: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    """Return the ellipse inscribed in the box, `[H, W]` bool: the pixels whose center lies in it."""
    x1, y1, x2, y2 = box
    if x2 <= x1 or y2 <= y1:
        return np.zeros(shape, dtype=bool)
    y, x = (np.arange(side) + 0.5 for side in shape)
    dy, dx = (2 * y - y1 - y2) / (y2 - y1), (2 * x - x1 - x2) / (x2 - x1)
    return dy[:, None] ** 2 + dx**2 <= 1


def grabcut_mask(image: np.ndarray, box: tuple[float, float, float, float], iterations: int = 5) -> np.ndarray:
    """Return GrabCut's mask `[H, W]` bool of an RGB image `[H, W, 3]` for a box, by OpenCV.

    Pixels whose center lies outside the box are background. Without such pixels, or if OpenCV finds no foreground to
    start from, the mask is the filled box.

    Source: Rother, Kolmogorov and Blake, GrabCut (2004).

    Raises:
        ImportError: OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise ImportError("GrabCut needs OpenCV: pip install '.[benchmark]'") from error
    inside = box_mask(image.shape[:2], box)
    if inside.all() or not inside.any():
        return inside
    labels = np.where(inside, cv2.GC_PR_FGD, cv2.GC_BGD).astype(np.uint8)
    cv2.setRNGSeed(0)  # of the k-means that starts the color models
    background, foreground = np.zeros((2, 1, 65))
    cv2.grabCut(image[..., ::-1].copy(), labels, None, background, foreground, iterations, cv2.GC_INIT_WITH_MASK)
    return (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)


def mask_iou(a: Any, b: Any) -> Any:
    """Return the IoU `[...]` of bool masks `[..., H, W]`, numpy arrays or tensors. Two empty masks agree: IoU 1."""
    intersection, union = (a & b).sum((-2, -1)), (a | b).sum((-2, -1))
    empty = union == 0
    return (intersection + empty) / (union + empty)


def boundary(mask: np.ndarray, dilation_ratio: float = DILATION_RATIO) -> np.ndarray:
    """Return the pixels of a bool mask within `d` pixels of its outside, which includes all beyond the image.

    `d` is `dilation_ratio` times the image's diagonal, rounded, at least 1. The boundary is the mask less its erosion
    by a square of 2 d + 1. Boundary IoU is the `mask_iou` of two boundaries.

    Source: Boundary IoU (arXiv 2103.16562); `mask_to_boundary` of bowenc0221/boundary-iou-api.
    """
    d = max(1, round(dilation_ratio * math.hypot(*mask.shape)))
    edge = mask.copy()
    if mask.any():
        x1, y1, x2, y2 = tight_box(mask)
        edge[y1:y2, x1:x2] &= ~_eroded(mask[y1:y2, x1:x2], d)
    return edge


def _eroded(mask: np.ndarray, d: int) -> np.ndarray:
    for _ in range(2):  # along columns; transposed, along rows; transposed back
        count = np.cumsum(np.pad(mask, ((d + 1, d), (0, 0))), axis=0, dtype=np.int32)
        mask = (count[2 * d + 1 :] - count[: -2 * d - 1] == 2 * d + 1).T
    return mask
