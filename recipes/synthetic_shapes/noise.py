"""Random fields with the spectra of natural surfaces, and windows of them."""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image

FIELD = 512


@functools.cache
def fields() -> list[np.ndarray]:
    """Noise with 1/f^b amplitude spectra, isotropic and stretched. It is the same in every process."""
    rng = np.random.default_rng(7)
    fy, fx = np.fft.fftfreq(FIELD)[:, None], np.fft.rfftfreq(FIELD)[None, :]
    fields = []
    for i in range(28):
        stretch = 1.0 if i % 3 else rng.uniform(2, 7)
        frequency = np.hypot(fy * stretch, fx)
        frequency[0, 0] = np.inf
        spectrum = np.fft.rfft2(rng.standard_normal((FIELD, FIELD))) * frequency ** -rng.uniform(0.7, 2.0)
        field = np.fft.irfft2(spectrum, s=(FIELD, FIELD))
        fields.append((field / field.std()).astype(np.float32))
    return fields


def resize(values: np.ndarray, height: int, width: int) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(values, np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def axes(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates x `[1, width]` and y `[height, 1]`, each from -1 to 1 in float32."""
    return np.linspace(-1, 1, width, dtype=np.float32)[None], np.linspace(-1, 1, height, dtype=np.float32)[:, None]


def smooth_noise(rng: np.random.Generator, height: int, width: int, zoom: tuple[float, float]) -> np.ndarray:
    """Draw `noise` without its finest detail, for outlines that stay in one piece."""
    coarse = int(rng.choice([6, 12, 24]))
    return resize(noise(rng, max(2, height // coarse), max(2, width // coarse), zoom), height, width)


def noise(rng: np.random.Generator, height: int, width: int, zoom: tuple[float, float] = (0.15, 1.0)) -> np.ndarray:
    """Draw a window `[height, width]` of a random field, of about unit spread; a small zoom gives a coarse texture."""
    window = field_window(rng, fields()[rng.integers(len(fields()))], height, width, zoom)
    return (window - window.mean()) / (window.std() + 1e-3)


def field_window(
    rng: np.random.Generator, field: np.ndarray, height: int, width: int, zoom: tuple[float, float]
) -> np.ndarray:
    if rng.random() < 0.5:
        field = field.T
    side = int(np.clip(FIELD * np.exp(rng.uniform(*np.log(zoom))), 8, FIELD))
    h, w = max(2, side * height // max(height, width)), max(2, side * width // max(height, width))
    y, x = rng.integers(FIELD - h + 1), rng.integers(FIELD - w + 1)
    window = field[y : y + h, x : x + w][:: rng.choice([-1, 1]), :: rng.choice([-1, 1])]
    return resize(window, height, width)
