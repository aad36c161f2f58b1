"""Colours and textures with the statistics of natural surfaces."""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image

FIELD = 512


@functools.cache
def _fields() -> list[np.ndarray]:
    """Noise with 1/f^b amplitude spectra, isotropic and stretched: made once a process, always the same."""
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


def smooth_noise(rng: np.random.Generator, height: int, width: int, zoom: tuple[float, float]) -> np.ndarray:
    """`noise` without its finest detail: for outlines, which would fall into crumbs otherwise."""
    coarse = int(rng.choice([6, 12, 24]))
    return resize(noise(rng, max(2, height // coarse), max(2, width // coarse), zoom), height, width)


def noise(rng: np.random.Generator, height: int, width: int, zoom: tuple[float, float] = (0.15, 1.0)) -> np.ndarray:
    """A random window of a random field, `[height, width]` with about unit spread; a small zoom is a coarse texture."""
    field = _fields()[rng.integers(28)]
    if rng.random() < 0.5:
        field = field.T
    side = int(np.clip(FIELD * np.exp(rng.uniform(*np.log(zoom))), 8, FIELD))
    h, w = max(2, side * height // max(height, width)), max(2, side * width // max(height, width))
    y, x = rng.integers(FIELD - h + 1), rng.integers(FIELD - w + 1)
    window = field[y : y + h, x : x + w][:: rng.choice([-1, 1]), :: rng.choice([-1, 1])]
    window = resize(window, height, width)
    return (window - window.mean()) / (window.std() + 1e-3)


# rough centres of natural colours, RGB in 0..1, and how far a surface strays from them
_PALETTE = np.array(
    [
        [0.45, 0.36, 0.26], [0.60, 0.50, 0.36], [0.30, 0.24, 0.18], [0.72, 0.64, 0.50],  # earth, sand, bark
        [0.30, 0.38, 0.18], [0.20, 0.28, 0.13], [0.45, 0.48, 0.25], [0.38, 0.42, 0.32],  # foliage, grass
        [0.55, 0.68, 0.84], [0.78, 0.83, 0.88], [0.35, 0.48, 0.62], [0.24, 0.34, 0.40],  # sky, cloud, water
        [0.50, 0.50, 0.50], [0.30, 0.30, 0.31], [0.70, 0.69, 0.67], [0.12, 0.12, 0.12], [0.90, 0.89, 0.86],  # greys
        [0.78, 0.60, 0.48], [0.50, 0.32, 0.24], [0.64, 0.35, 0.20],  # skin, brick
        [0.75, 0.18, 0.15], [0.88, 0.70, 0.18], [0.18, 0.25, 0.58], [0.80, 0.45, 0.60], [0.15, 0.50, 0.45],  # paint
    ]
)  # fmt: skip


def colour(rng: np.random.Generator) -> np.ndarray:
    base = _PALETTE[rng.integers(20 if rng.random() < 0.8 else len(_PALETTE))]
    return np.clip(base * rng.uniform(0.6, 1.35) + rng.normal(0, 0.05, 3), 0.02, 0.98)


def _pattern(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A repeated pattern in -1..1: stripes, checks, bricks, spots, or ragged two-tone patches."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    period = np.exp(rng.uniform(np.log(5), np.log(60)))
    angle = rng.uniform(0, np.pi)
    warp = noise(rng, height, width, (0.1, 0.4)) * period * rng.choice([0, 0.1, 0.5])
    u = (x * np.cos(angle) + y * np.sin(angle) + warp) * (2 * np.pi / period)
    v = (-x * np.sin(angle) + y * np.cos(angle) + warp) * (2 * np.pi / period * rng.choice([1, 0.5, 1.5]))
    kind = rng.integers(6)
    if kind == 0:
        return np.tanh(np.sin(u) * rng.uniform(0.5, 4))
    if kind == 1:
        return np.tanh(np.sin(u) * np.sin(v) * 4)
    if kind == 2:  # bricks: thin joints
        shifted = u + np.pi * (np.floor(v / (2 * np.pi)) % 2)
        return np.where((np.cos(v) > 0.93) | (np.cos(shifted) > 0.96), -1.0, 0.4).astype(np.float32)
    if kind == 3:
        return np.tanh((np.cos(u) + np.cos(v) - rng.uniform(0, 1.2)) * 3)
    return np.tanh((noise(rng, height, width) - rng.normal(0, 0.5)) * rng.uniform(1, 8))


def texture(rng: np.random.Generator, height: int, width: int, base: np.ndarray | None = None) -> np.ndarray:
    """A surface `[height, width, 3]` in about 0..1."""
    base = colour(rng) if base is None else base
    strength = np.exp(rng.uniform(np.log(0.01), np.log(0.16)))
    tint = rng.normal(1, 0.25, 3)
    surface = base + (noise(rng, height, width) * strength)[..., None] * tint
    if rng.random() < 0.6:
        other = rng.normal(0, 0.5, 3) + 1
        surface = surface + (noise(rng, height, width) * strength * rng.uniform(0.2, 1.0))[..., None] * other
    if rng.random() < 0.3:
        second = colour(rng) if rng.random() < 0.4 else np.clip(base + rng.normal(0, 0.12, 3), 0, 1)
        blend = (_pattern(rng, height, width) * 0.5 + 0.5)[..., None]
        surface = surface + blend * (second - base) * rng.uniform(0.2, 1.0)
    if rng.random() < 0.5:
        y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
        angle = rng.uniform(0, 2 * np.pi)
        ramp = (x * np.cos(angle) + y * np.sin(angle)) * rng.uniform(0.02, 0.3)
        surface = surface * (1 + ramp[..., None])
    return surface.astype(np.float32)
