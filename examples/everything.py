"""Draw everything.jpg: all masks of the bundled weights in the images beside this file.

python examples/everything.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fastsam_rwkv import RWKVSAM, AutomaticMaskGenerator
from fastsam_rwkv.visualize import tinted

HERE = Path(__file__).parent
PANEL = 420, 320
# all of them, in order of their names; none is left out for being segmented badly
IMAGES = sorted(file for file in HERE.glob("*.jpg") if file.stem not in ("gallery", "everything"))


def everything(model: RWKVSAM, images: list[Path], columns: int = 3) -> Image.Image:
    """Return one panel for each image, with its masks tinted, small ones over large ones."""
    generator = AutomaticMaskGenerator(model)
    width, height = PANEL
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for i, (file, records) in enumerate(zip(images, generator.generate_images(images), strict=True)):
        print(f"{file.name}: {len(records)} masks")
        masks = [record["segmentation"] for record in sorted(records, key=lambda record: -record["area"])]
        panel = Image.fromarray(tinted(np.asarray(Image.open(file).convert("RGB")), masks))
        panel.thumbnail((width - 6, height - 6))
        x, y = i % columns * width, i // columns * height
        sheet.paste(panel, (x + (width - panel.width) // 2, y + (height - panel.height) // 2))
    return sheet


if __name__ == "__main__":
    everything(RWKVSAM.from_pretrained(), IMAGES).save(HERE / "everything.jpg", quality=88)
