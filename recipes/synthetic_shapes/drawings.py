"""Objects with the outlines and parts of real things, from the drawings that `clipart.py` rasterized."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage
from shapes import Part

PART_AREA = 0.04  # share of the body from which a region is a part; a smaller one is a mark
MARK_AREA = 0.002
MOST_PARTS, MOST_MARKS = 7, 8


@functools.cache
def opened(file: Path) -> np.lib.npyio.NpzFile:
    """Open a file of `clipart.py`, read whole: processes that share an open file move each other's place in it."""
    return np.load(io.BytesIO(file.read_bytes()))


def drawing(rng: np.random.Generator, size: int, center: np.ndarray, radius: float, file: Path) -> list[Part]:
    """Place one drawing on a canvas of `size`, its parts in painting order.

    Its longer side is twice the radius. It is mirrored, turned and stretched at random. In half of the drawings the
    parts have their own colors.
    """
    archive = opened(file)
    number = int(rng.integers(len(archive.files) // 2))
    colors, regions = archive[f"colors_{number}"], archive[f"parts_{number}"]
    areas = np.bincount(regions.ravel())[1:] / (regions > 0).sum()
    means = [ndimage.mean(colors[..., c], regions, np.arange(1, len(areas) + 1)) / 255 for c in range(3)]
    own = rng.random() < 0.5
    placed = _placed(rng, size, regions, center, radius)
    parts: list[Part] = []
    marks: list[Part] = []
    for i, (area, color) in enumerate(zip(areas, np.stack(means, -1), strict=True)):
        tone = color.clip(0.02, 0.98) if own else None
        if i == 0:
            parts.append(Part(placed(np.ones(len(areas) + 1, bool)), True, color=tone))
            continue
        if area < MARK_AREA:
            continue
        only = np.arange(len(areas) + 1) == i + 1
        if area >= PART_AREA and len(parts) < MOST_PARTS and not _thin(regions == i + 1):
            parts.append(Part(placed(only), True, color=tone))
        elif len(marks) < MOST_MARKS:
            marks.append(Part(placed(only), True, color=tone, mark=True))
    return parts + marks


def _thin(region: np.ndarray) -> bool:
    """Return True if little is left of a region without its margin of three pixels: it is made of lines."""
    return bool(ndimage.binary_erosion(region, np.ones((7, 7))).sum() < 0.15 * region.sum())


def _placed(
    rng: np.random.Generator, size: int, regions: np.ndarray, center: np.ndarray, radius: float
) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from a table of regions `[K + 1]` bool to their coverage `[size, size]` in 0..1."""
    height, width = regions.shape
    angle = rng.normal(0, 0.2) if rng.random() < 0.8 else rng.uniform(-np.pi, np.pi)
    aspect = float(np.exp(rng.normal(0, 0.12)))
    scale = 2 * radius / max(height, width)
    c, s = np.cos(angle), np.sin(angle)
    turn = np.array([[c, -s], [s, c]]) @ np.diag([scale * aspect**0.5, scale * aspect**-0.5])
    if rng.random() < 0.5:
        turn = turn @ np.diag([-1.0, 1.0])
    corners = np.array([[x, y] for x in (-width / 2, width / 2) for y in (-height / 2, height / 2)]) @ turn.T + center
    x0, y0 = np.maximum(np.floor(corners.min(0)).astype(int), 0)
    x1, y1 = np.minimum(np.ceil(corners.max(0)).astype(int) + 1, size)
    back = np.linalg.inv(turn)
    source = Image.fromarray(regions)
    empty = x1 - x0 < 2 or y1 - y0 < 2
    if not empty:  # PIL maps output pixels to the source: at twice the size, pixel (u, v) lies at x0 + u / 2
        offset = back @ (np.array([x0, y0]) - center) + np.array([width, height]) / 2
        affine = (back[0, 0] / 2, back[0, 1] / 2, offset[0], back[1, 0] / 2, back[1, 1] / 2, offset[1])
        fine = np.asarray(source.transform((2 * (x1 - x0), 2 * (y1 - y0)), Image.Transform.AFFINE, affine))

    def coverage(table: np.ndarray) -> np.ndarray:
        alpha = np.zeros((size, size), np.float32)
        if not empty:
            chosen = table.copy()
            chosen[0] = False
            m = chosen[fine].astype(np.float32)
            alpha[y0:y1, x0:x1] = (m[::2, ::2] + m[1::2, ::2] + m[::2, 1::2] + m[1::2, 1::2]) / 4
        return alpha

    return coverage
