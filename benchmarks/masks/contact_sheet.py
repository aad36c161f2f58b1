"""A sheet of masks to look at: truth and answer side by side, with the prompt and a caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from fastsam_rwkv.visualize import overlay

PANEL = 300  # longest side of a picture, in pixels
GAP = 8
LINE = 14


class Cell(NamedTuple):
    """One target.

    Attributes:
        image: `[H, W, 3]` uint8 RGB.
        truth, answer: `[H, W]` bool.
        points: (x, y, label) in the image's pixels.
        boxes: (x1, y1, x2, y2) in the image's pixels.
        caption: what to write below, on as many lines as it takes.
    """

    image: np.ndarray
    truth: np.ndarray
    answer: np.ndarray
    points: Sequence[tuple[float, float, int]]
    boxes: Sequence[tuple[float, float, float, float]]
    caption: str


def draw_sheet(cells: Sequence[Cell], columns: int) -> Image.Image:
    """The cells row by row: on the left the truth, on the right the answer and its prompt."""
    drawn = [draw_cell(cell) for cell in cells]
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


def draw_cell(cell: Cell) -> Image.Image:
    """One cell, of a width that is the same for all."""
    scale = PANEL / max(cell.image.shape[:2])
    size = tuple(max(1, round(side * scale)) for side in reversed(cell.image.shape[:2]))
    image = np.asarray(Image.fromarray(cell.image).resize(size, Image.Resampling.BOX))
    truth, answer = (
        np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)) for mask in (cell.truth, cell.answer)
    )
    points = [((x + 0.5) * scale, (y + 0.5) * scale, label) for x, y, label in cell.points]
    boxes = [[side * scale for side in box] for box in cell.boxes]
    lines = _wrapped(cell.caption, (2 * PANEL + GAP) // 7)
    canvas = Image.new("RGB", (2 * PANEL + GAP, size[1] + LINE * len(lines)), "white")
    nothing = np.zeros_like(truth)  # takes the first colour, a sky's blue
    canvas.paste(overlay(image, np.stack([nothing, truth])), (0, 0))
    canvas.paste(overlay(image, np.stack([nothing, answer]), points, boxes), (PANEL + GAP, 0))
    draw = ImageDraw.Draw(canvas)
    for i, line in enumerate(lines):
        draw.text((0, size[1] + 1 + LINE * i), line, fill="black")
    return canvas


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of ASCII, which every font of Pillow has."""
    text = text.encode("ascii", "replace").decode()
    return [text[first : first + width] for first in range(0, len(text), width)]
