"""Pictures of masks and prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

COLOURS = np.array(
    [[30, 144, 255], [255, 99, 71], [60, 200, 90], [255, 200, 0], [186, 85, 211], [0, 206, 209]], np.float32
)


def overlay(
    image: np.ndarray,
    masks: np.ndarray,
    points: Sequence[tuple[float, float, int]] = (),
    boxes: Sequence[Sequence[float]] = (),
) -> Image.Image:
    """The picture with tinted, outlined masks, points (green: object, red: not) and boxes.

    Args:
        image: `[H, W, 3]` uint8 RGB.
        masks: `[n, H, W]` bool.
        points: (x, y, label) in the image's pixels.
        boxes: (x1, y1, x2, y2) in the image's pixels.
    """
    canvas = image.astype(np.float32)
    width = max(1, round(max(image.shape[:2]) / 400))
    for i, mask in enumerate(masks):
        colour = COLOURS[i % len(COLOURS)]
        canvas[mask] = canvas[mask] * 0.5 + colour * 0.5
        canvas[mask & ~_eroded(mask, width)] = colour
    picture = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for box in boxes:
        draw.rectangle(list(box), outline="yellow", width=2 * width)
    for x, y, label in points:
        r = 4 * width
        draw.ellipse([x - r, y - r, x + r, y + r], fill="lime" if label else "red", outline="white", width=width)
    return picture


def _eroded(mask: np.ndarray, steps: int) -> np.ndarray:
    for _ in range(steps):
        padded = np.pad(mask, 1)
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask
