"""Drawing of masks and prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

COLORS = np.array(
    [[30, 144, 255], [255, 99, 71], [60, 200, 90], [255, 200, 0], [186, 85, 211], [0, 206, 209]], np.float32
)


def overlay(
    image: np.ndarray,
    masks: np.ndarray,
    points: Sequence[tuple[float, float, int]] = (),
    boxes: Sequence[Sequence[float]] = (),
) -> Image.Image:
    """Draw masks, points and boxes on an image.

    Masks are tinted and outlined. Points are green (foreground) or red (background).

    Args:
        image: `[H, W, 3]` uint8 RGB.
        masks: `[n, H, W]` bool.
        points: (x, y, label) in the image frame.
        boxes: (x1, y1, x2, y2) in the image frame.
    """
    canvas = image.astype(np.float32)
    width = max(1, round(max(image.shape[:2]) / 400))
    for i, mask in enumerate(masks):
        color = COLORS[i % len(COLORS)]
        canvas[mask] = canvas[mask] * 0.5 + color * 0.5
        canvas[mask & ~_eroded(mask, width)] = color
    drawing = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(drawing)
    for box in boxes:
        draw.rectangle(list(box), outline="yellow", width=2 * width)
    for x, y, label in points:
        r = 4 * width
        draw.ellipse([x - r, y - r, x + r, y + r], fill="lime" if label else "red", outline="white", width=width)
    return drawing


def _eroded(mask: np.ndarray, steps: int) -> np.ndarray:
    for _ in range(steps):
        padded = np.pad(mask, 1)
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask
