"""Drawing of masks and prompts."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw

STRIP = 1 << 21  # pixels drawn at a time, to bound the memory
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
    H, W = image.shape[:2]
    width = max(1, round(max(H, W) / 400))
    drawing = Image.new("RGB", (W, H))
    rows = max(width, STRIP // W)
    for top in range(0, H, rows):
        strip = image[top : top + rows].astype(np.float32)
        above = min(width, top)
        for i, mask in enumerate(masks):
            color = COLORS[i % len(COLORS)]
            around = mask[top - above : top + rows + width]  # the outline depends on `width` rows above and below
            inside = mask[top : top + rows]
            strip[inside] = strip[inside] * 0.5 + color * 0.5
            strip[inside & ~_eroded(around, width)[above : above + len(strip)]] = color
        drawing.paste(Image.fromarray(strip.clip(0, 255).astype(np.uint8)), (0, top))
    draw = ImageDraw.Draw(drawing)
    for box in boxes:
        near = np.clip(box, -4 * width, max(H, W) + 4 * width)  # Pillow draws wrongly beyond 32 bits
        draw.rectangle(near.tolist(), outline="yellow", width=2 * width)
    for x, y, label in points:
        r = 4 * width
        draw.ellipse([x - r, y - r, x + r, y + r], fill="lime" if label else "red", outline="white", width=width)
    return drawing


def tinted(image: np.ndarray, masks: Iterable[np.ndarray]) -> np.ndarray:
    """Return an image with many masks tinted, each over those before it. One mask is in memory at a time.

    Args:
        image: `[H, W, 3]` uint8 RGB.
        masks: `[H, W]` bool each.
    """
    result = image.copy()
    for n, mask in enumerate(masks):
        color = 255 * np.array(colorsys.hsv_to_rgb(n * 0.618034 % 1, 0.8, 1.0))  # neighbors in order differ most
        result[mask] = (image[mask] * 0.45 + color * 0.55).astype(np.uint8)
    return result


def _eroded(mask: np.ndarray, steps: int) -> np.ndarray:
    for _ in range(steps):
        padded = np.pad(mask, 1)
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask
