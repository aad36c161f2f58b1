"""Draw gallery.jpg: masks of the bundled weights for clicks and boxes on the images beside this file.

python examples/gallery.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastsam_rwkv import RWKVSAM, Predictor
from fastsam_rwkv.visualize import overlay

HERE = Path(__file__).parent
PANEL = 300, 224
# chosen before any answer was seen; none is left out for being wrong
PROMPTS: list[tuple[str, dict[str, Any]]] = [
    ("astronaut.jpg", {"box": [60, 2, 440, 510]}),
    ("astronaut.jpg", {"point_coords": [[225, 120]]}),
    ("astronaut.jpg", {"box": [352, 90, 512, 330]}),
    ("chelsea.jpg", {"box": [70, 5, 430, 298]}),
    ("chelsea.jpg", {"point_coords": [[178, 118]]}),
    ("chelsea.jpg", {"point_coords": [[215, 90], [250, 230]]}),
    ("coffee.jpg", {"box": [80, 10, 480, 390]}),
    ("coffee.jpg", {"point_coords": [[300, 130]]}),
    ("coffee.jpg", {"point_coords": [[520, 60]]}),
    ("rocket.jpg", {"box": [312, 70, 340, 350]}),
    ("rocket.jpg", {"point_coords": [[326, 200]]}),
    ("rocket.jpg", {"point_coords": [[120, 60]]}),
]


def gallery(model: RWKVSAM, columns: int = 3) -> Image.Image:
    """Return one panel for each of PROMPTS, with the image, the prompt and the single mask."""
    predictor = Predictor(model)
    width, height = PANEL
    rows = -(-len(PROMPTS) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, (name, prompt) in enumerate(PROMPTS):
        image = np.asarray(Image.open(HERE / name).convert("RGB"))
        points = [(x, y, 1) for x, y in prompt.get("point_coords", [])]
        boxes = [prompt["box"]] if "box" in prompt else []
        panel = overlay(image, predictor.predict_image(image, **prompt).masks, points, boxes)
        panel.thumbnail((width - 4, height - 4))
        x, y = i % columns * width, i // columns * height
        sheet.paste(panel, (x + (width - panel.width) // 2, y + (height - panel.height) // 2))
    return sheet


if __name__ == "__main__":
    gallery(RWKVSAM.from_pretrained(device="cpu")).save(HERE / "gallery.jpg", quality=88)
