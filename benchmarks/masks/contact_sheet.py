"""A sheet of masks to look at: truth and mask side by side, with the prompt and a caption."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from fastsam_rwkv.visualize import overlay

PANEL = 300  # longest side of an image, in pixels
GAP = 8
LINE = 14


class Cell(NamedTuple):
    """One target, its mask and its prompt, with a caption."""

    image: np.ndarray  # [H, W, 3] uint8 RGB
    truth: np.ndarray  # [H, W] bool
    mask: np.ndarray  # [H, W] bool
    points: Sequence[tuple[float, float, int]]  # (x, y, label) in image pixels
    boxes: Sequence[tuple[float, float, float, float]]  # (x1, y1, x2, y2) in image pixels
    caption: str


def draw_sheet(cells: Sequence[Cell], columns: int) -> Image.Image:
    """Draw the cells row by row: the truth on the left, the mask and its prompt on the right."""
    drawn = [_draw_cell(cell) for cell in cells]
    rows = [drawn[first : first + columns] for first in range(0, len(drawn), columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    width = columns * (drawn[0].width + GAP) + GAP
    sheet = Image.new("RGB", (width, sum(heights) + GAP * (len(rows) + 1)), "white")
    y = GAP
    for row, height in zip(rows, heights, strict=True):
        for i, cell in enumerate(row):
            sheet.paste(cell, (GAP + i * (cell.width + GAP), y))
        y += height + GAP
    return sheet


def _draw_cell(cell: Cell) -> Image.Image:
    scale = PANEL / max(cell.image.shape[:2])
    size = tuple(max(1, round(side * scale)) for side in reversed(cell.image.shape[:2]))
    image = np.asarray(Image.fromarray(cell.image).resize(size, Image.Resampling.BOX))
    truth, mask = (np.asarray(Image.fromarray(m).resize(size, Image.Resampling.NEAREST)) for m in cell[1:3])
    points = [((x + 0.5) * scale, (y + 0.5) * scale, label) for x, y, label in cell.points]
    boxes = [[side * scale for side in box] for box in cell.boxes]
    lines = wrap(cell.caption.encode("ascii", "replace").decode(), (2 * PANEL + GAP) // 7)  # every font has ASCII
    canvas = Image.new("RGB", (2 * PANEL + GAP, size[1] + LINE * len(lines)), "white")
    nothing = np.zeros_like(truth)  # takes the first color, a sky's blue
    canvas.paste(overlay(image, np.stack([nothing, truth])), (0, 0))
    canvas.paste(overlay(image, np.stack([nothing, mask]), points, boxes), (PANEL + GAP, 0))
    draw = ImageDraw.Draw(canvas)
    for i, line in enumerate(lines):
        draw.text((0, size[1] + 1 + LINE * i), line, fill="black")
    return canvas
