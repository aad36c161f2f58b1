"""Geometry of masks: boxes, most interior pixels, corrective clicks, IoU and boundaries. Numpy only."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

DILATION_RATIO = 0.02  # of the image's diagonal: the published width of a boundary
BLOCK = 8  # side of the blocks in which `deepest` looks first
BLOCK_SLACK = 2 * math.sqrt(2) * (BLOCK - 1) / BLOCK  # difference between a pixel's distance and its block's, at most


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
    """Return the `interior_point` of a mask that is not empty, and its squared distance from the outside.

    Exact, and fast on large masks. Distances of blocks select the pixels that may be farthest. Their distances along
    columns are combined along rows, step by step, until no pixel can come closer.
    """
    x1, y1, x2, y2 = tight_box(mask)
    height, width = (-(side + 2) % BLOCK for side in (y2 - y1, x2 - x1))
    inside = np.pad(mask[y1:y2, x1:x2], ((1, 1 + height), (1, 1 + width)))
    in_column = _squared_in_columns(inside)
    rows, columns = (side // BLOCK for side in inside.shape)
    blocks = np.pad(inside.reshape(rows, BLOCK, columns, BLOCK).all((1, 3)), 1)
    far = np.sqrt(_squared_distances(blocks)[1:-1, 1:-1])
    far = far >= far.max() - BLOCK_SLACK - 1e-6
    ys, xs = np.nonzero(inside & far.repeat(BLOCK, 0).repeat(BLOCK, 1))
    squared = in_column[ys, xs]
    step = 1
    while step**2 < squared.max():
        for x in (
            np.maximum(xs - step, 0),
            np.minimum(xs + step, inside.shape[1] - 1),
        ):  # the first and last are outside
            np.minimum(squared, in_column[ys, x] + step**2, out=squared)
        live = squared >= min(int(squared.max()), (step + 1) ** 2)  # later steps cannot bring a pixel below that
        ys, xs, squared = ys[live], xs[live], squared[live]
        step += 1
    first = int(squared.argmax())
    return x1 + int(xs[first]) - 1, y1 + int(ys[first]) - 1, int(squared[first])


def _squared_in_columns(inside: np.ndarray) -> np.ndarray:
    """Return each pixel's squared distance from the outside in its column. The first and last row are outside."""
    row = np.arange(len(inside), dtype=np.int32)[:, None]
    above = row - np.maximum.accumulate(np.where(inside, 0, row), axis=0)
    below = np.minimum.accumulate(np.where(inside, row[-1], row)[::-1], axis=0)[::-1] - row
    return np.minimum(above, below) ** 2


def _squared_distances(inside: np.ndarray) -> np.ndarray:
    """Return each pixel's squared distance from the outside. The outermost rows and columns are outside."""
    in_column = _squared_in_columns(inside)
    squared = in_column.copy()
    step = 1
    while step**2 < squared.max():
        np.minimum(squared[:, step:], in_column[:, :-step] + step**2, out=squared[:, step:])
        np.minimum(squared[:, :-step], in_column[:, step:] + step**2, out=squared[:, :-step])
        step += 1
    return squared


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
