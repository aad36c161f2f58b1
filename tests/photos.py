"""Images for tests of what takes files."""

import io

import numpy as np
from PIL import Image


def photo(seed=0, H=90, W=120):
    """Return a colorful board with noise, uint8 `[H, W, 3]`."""
    y, x = np.mgrid[:H, :W]
    noise = np.random.default_rng(seed).integers(0, 60, (H, W, 3))
    return (np.stack([x * 190 // W, y * 190 // H, (x // 20 + y // 20) % 2 * 190], -1) + noise).astype(np.uint8)


def png(array):
    """Return the bytes of a file."""
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()
