"""Run lengths of masks, column by column as in COCO: the first run is outside the mask. No PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import ArgumentError


def runs_of(window: np.ndarray, corner: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Return the run lengths `[R]` int64 of a mask that is empty outside a window.

    Args:
        window: `[h, w]` bool.
        corner: (row, column) of its upper left pixel in the image.
        size: `(H, W)` of the image.
    """
    H, W = size
    inside = np.pad(window.T.astype(np.int8), ((0, 0), (1, 1)))  # [w, h + 2]: columns one after the other
    steps = np.diff(inside, axis=1)
    starts, ends = (
        (columns + corner[1]) * H + rows + corner[0] for columns, rows in (np.nonzero(steps == s) for s in (1, -1))
    )
    goes_on = starts[1:] == ends[:-1]  # from the last row of a column to the first row of the next
    starts, ends = np.delete(starts, 1 + np.flatnonzero(goes_on)), np.delete(ends, np.flatnonzero(goes_on))
    edges = np.concatenate([[0], np.stack([starts, ends], axis=1).ravel(), [H * W]])
    runs = np.diff(edges)
    return runs[:-1] if len(runs) > 1 and runs[-1] == 0 else runs


def box_of(runs: np.ndarray, height: int) -> list[int] | None:
    """Return the box (x1, y1, x2, y2) of run lengths, last pixels included; None if the mask is empty.

    Args:
        runs: `[R]` of a mask.
        height: Of the image.
    """
    ends = np.cumsum(runs)
    starts, lasts = ends[:-1:2], ends[1::2] - 1
    if len(starts) == 0:
        return None
    columns, rows = (np.stack([starts // height, lasts // height]), np.stack([starts % height, lasts % height]))
    several = columns[0] != columns[1]  # from one column into another, over the image's first and last row
    top = 0 if several.any() else int(rows.min())
    bottom = height - 1 if several.any() else int(rows.max())
    return [int(columns.min()), top, int(columns.max()), bottom]


def coco_box_of(runs: np.ndarray, height: int) -> list[int]:
    """Return the box (x, y, width, height) of run lengths in pixels, as COCO has it; zeros if the mask is empty."""
    x1, y1, x2, y2 = box_of(runs, height) or (0, 0, -1, -1)
    return [x1, y1, x2 - x1 + 1, y2 - y1 + 1]


def coco_box_of_record(record: Mapping[str, Any]) -> list[int]:
    """Return the box of a generator's record as COCO has it: with the width of its pixels, not SAM's of one less."""
    x, y, w, h = record["bbox"]
    return [x, y, w + 1, h + 1]


def mask_of(runs: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the mask `[H, W]` bool of run lengths."""
    inside = np.arange(len(runs)) % 2 == 1
    return np.ascontiguousarray(np.repeat(inside, runs).reshape(size[1], size[0]).T)


def as_rle(runs: np.ndarray, size: tuple[int, int], compressed: bool) -> dict[str, Any]:
    """Return run lengths as COCO's dict of `size` and `counts`, a list, or a string if `compressed`."""
    return {"size": list(size), "counts": _packed(runs) if compressed else runs.tolist()}


def _packed(runs: np.ndarray) -> str:
    """Return run lengths as COCO's string.

    From the fourth on, a run is stored as its difference from the one before the last. A number has five bits in each
    character, the lowest first; bit 5 says that more follow.
    """
    left = runs.astype(np.int64)
    left[3:] -= runs[1:-2]
    characters = np.zeros((len(left), 13), np.uint8)
    more, place = np.ones(len(left), np.bool_), 0
    while more.any():
        bits, left = left & 31, left >> 5
        goes_on = more & np.where(bits & 16, left != -1, left != 0)
        characters[more, place] = (bits + 32 * goes_on + 48)[more]
        more, place = goes_on, place + 1
    return characters[characters > 0].tobytes().decode()


def scipy_ndimage(option: str = "min_mask_region_area") -> Any:
    """Return `scipy.ndimage`, which the removal of regions needs.

    Raises:
        ArgumentError: scipy is missing; the message names the option.
    """
    try:
        from scipy import ndimage
    except ImportError as error:
        raise ArgumentError(f"{option} needs scipy: pip install scipy") from error
    return ndimage


def without_small_regions(window: np.ndarray, smallest: int) -> np.ndarray:
    """Fill holes and remove separate regions of fewer than `smallest` pixels, 8-connected as in SAM.

    Of a mask whose regions are all smaller, the largest stays. What touches the edge of the window is no hole.

    Raises:
        ArgumentError: scipy is missing.
    """
    ndimage = scipy_ndimage()
    eight = np.ones((3, 3), bool)
    holes, count = ndimage.label(np.pad(~window, 1, constant_values=True), eight)
    areas = np.bincount(holes.ravel(), minlength=count + 1)
    small = areas < smallest
    small[[0, holes[0, 0]]] = False  # the mask itself, and what lies around it
    filled = window | small[holes][1:-1, 1:-1]
    regions, count = ndimage.label(filled, eight)
    areas = np.bincount(regions.ravel(), minlength=count + 1)
    large = areas >= smallest
    large[0] = False
    if count and not large.any():
        large[1 + int(np.argmax(areas[1:]))] = True
    return large[regions]


def without_small_areas(logits: np.ndarray, threshold: float, holes: float, sprinkles: float) -> np.ndarray:
    """Fill holes and remove separate regions, 8-connected, in a copy of logits; for SAM 2's options.

    Args:
        logits: `[h, w]`.
        threshold: Logits above it are inside.
        holes: Regions outside of at most this area get `threshold + 10`.
        sprinkles: Regions inside of at most this area get `threshold - 10`.

    Raises:
        ArgumentError: scipy is missing.
    """
    ndimage = scipy_ndimage("max_hole_area")
    logits = logits.copy()
    for area, value in ((holes, threshold + 10), (sprinkles, threshold - 10)):
        if area <= 0:
            continue
        inside = logits > threshold if value < threshold else logits <= threshold
        regions, count = ndimage.label(inside, np.ones((3, 3), bool))
        small = np.bincount(regions.ravel(), minlength=count + 1) <= area
        small[0] = False  # everything else
        logits[small[regions]] = value
    return logits
