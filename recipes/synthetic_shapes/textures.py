"""Colors and textures with the statistics of natural surfaces."""

from __future__ import annotations

import functools

import numpy as np
from materials import material
from noise import FIELD, axes, field_window, noise, smooth_noise
from scipy.spatial import cKDTree


@functools.cache
def _cells() -> list[np.ndarray]:
    """Voronoi cells of random brightness with dark joints, in -1..1. They are the same in every process."""
    rng = np.random.default_rng(11)
    grid = np.stack(np.mgrid[:FIELD, :FIELD], -1).reshape(-1, 2)
    fields = []
    for count, stretch in [(250, 1.0), (900, 1.0), (900, 2.5)]:
        scale = np.array([1.0, stretch])
        distance, nearest = cKDTree(rng.uniform(0, FIELD, (count, 2)) * scale).query(grid * scale, k=2)
        joint = np.clip((distance[:, 1] - distance[:, 0]) / (0.15 * FIELD * (stretch / count) ** 0.5), 0, 1)
        field = (rng.uniform(-1, 1, count)[nearest[:, 0]] + 1) * joint - 1
        fields.append(field.reshape(FIELD, FIELD).astype(np.float32))
    return fields


# natural colors, RGB in 0..1
_PALETTE = np.array(
    [
        [0.45, 0.36, 0.26], [0.60, 0.50, 0.36], [0.30, 0.24, 0.18], [0.72, 0.64, 0.50],  # earth, sand, bark
        [0.30, 0.38, 0.18], [0.20, 0.28, 0.13], [0.45, 0.48, 0.25], [0.38, 0.42, 0.32],  # foliage, grass
        [0.55, 0.68, 0.84], [0.78, 0.83, 0.88], [0.35, 0.48, 0.62], [0.24, 0.34, 0.40],  # sky, cloud, water
        [0.50, 0.50, 0.50], [0.30, 0.30, 0.31], [0.70, 0.69, 0.67], [0.12, 0.12, 0.12], [0.90, 0.89, 0.86],  # grays
        [0.78, 0.60, 0.48], [0.50, 0.32, 0.24], [0.64, 0.35, 0.20],  # skin, brick
        [0.75, 0.18, 0.15], [0.88, 0.70, 0.18], [0.18, 0.25, 0.58], [0.80, 0.45, 0.60], [0.15, 0.50, 0.45],  # paint
    ]
)  # fmt: skip


def color(rng: np.random.Generator, paint: float = 0.2, palette: np.ndarray | None = None) -> np.ndarray:
    """Draw a color of nature, or with probability `paint` of anything; mostly near one of a palette `[K, 3]`."""
    if palette is not None and rng.random() < 0.85:
        return np.clip(
            palette[rng.integers(len(palette))] * rng.uniform(0.75, 1.25) + rng.normal(0, 0.04, 3), 0.02, 0.98
        )
    base = _PALETTE[rng.integers(len(_PALETTE) if rng.random() < paint else 20)]
    return np.clip(base * rng.uniform(0.6, 1.35) + rng.normal(0, 0.05, 3), 0.02, 0.98)


def scene_palette(rng: np.random.Generator) -> np.ndarray:
    """Draw the colors `[K, 3]` that come again and again in one scene: light, dark and between."""
    chosen = np.stack([color(rng, 0.3) for _ in range(int(rng.integers(4, 8)))])
    chosen[0] *= rng.uniform(0.15, 0.4)
    chosen[1] = 1 - (1 - chosen[1]) * rng.uniform(0.1, 0.5)
    return chosen.clip(0.02, 0.98)


def _pattern(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A repeated pattern in -1..1: stripes, checks, bricks, spots, cells, or ragged two-tone patches."""
    kind = rng.integers(9)
    if kind > 6:
        return field_window(rng, _cells()[rng.integers(3)], height, width, (0.2, 1.0))
    if kind > 3:
        return np.tanh((noise(rng, height, width) - rng.normal(0, 0.5)) * rng.uniform(1, 8))
    y, x = np.mgrid[:height, :width].astype(np.float32)
    period = np.exp(rng.uniform(np.log(5), np.log(60)))
    angle = rng.uniform(0, np.pi)
    warp = noise(rng, height, width, (0.1, 0.4)) * period * rng.choice([0, 0.1, 0.5])
    u = (x * np.cos(angle) + y * np.sin(angle) + warp) * (2 * np.pi / period)
    v = (-x * np.sin(angle) + y * np.cos(angle) + warp) * (2 * np.pi / period * rng.choice([1, 0.5, 1.5]))
    if kind == 0:
        return np.tanh(np.sin(u) * rng.uniform(0.5, 4))
    if kind == 1:
        return np.tanh(np.sin(u) * np.sin(v) * 4)
    if kind == 2:  # bricks: thin joints
        shifted = u + np.pi * (np.floor(v / (2 * np.pi)) % 2)
        return np.where((np.cos(v) > 0.93) | (np.cos(shifted) > 0.96), -1.0, 0.4).astype(np.float32)
    return np.tanh((np.cos(u) + np.cos(v) - rng.uniform(0, 1.2)) * 3)


def _marked(rng: np.random.Generator, surface: np.ndarray, palette: np.ndarray | None) -> np.ndarray:
    """Add spots, patches or a second tone: edges inside a surface, as strong as those around it, and no region's."""
    height, width = surface.shape[:2]
    if rng.random() < 0.4:
        other = surface * rng.choice([rng.uniform(0.25, 0.7), rng.uniform(1.3, 2.2)])
    else:
        own = surface.mean((0, 1))
        other = surface + ((color(rng, palette=palette) - own) * rng.uniform(0.4, 1.0)).astype(np.float32)
    if rng.random() < 0.4:  # two halves, as a dark back and a light belly
        x, y = axes(height, width)
        angle = rng.uniform(0, 2 * np.pi)
        field = x * float(np.cos(angle)) + y * float(np.sin(angle)) + rng.normal(0, 0.3)
        field = field + smooth_noise(rng, height, width, (0.1, 0.5)) * rng.uniform(0.02, 0.3)
        sharp = float(np.exp(rng.uniform(np.log(2), np.log(40))))
    else:
        field = noise(rng, height, width, (0.06, 0.6)) - rng.uniform(0, 1.3)
        sharp = rng.uniform(2, 12)
    blend = np.clip(field * sharp + 0.5, 0, 1)[..., None]
    return surface + blend * (other - surface)


def texture(
    rng: np.random.Generator,
    height: int,
    width: int,
    base: np.ndarray | None = None,
    palette: np.ndarray | None = None,
    varied: float = 0.5,
) -> np.ndarray:
    """Draw a surface `[height, width, 3]` in about 0..1.

    Args:
        base: its main color, RGB in 0..1, or None for any.
        palette: `[K, 3]`, colors of its scene that marks and patterns mostly take.
        varied: in 0..1, how often it has marks, patterns and materials.
    """
    base = np.asarray(color(rng, palette=palette) if base is None else base, np.float32)  # float64 takes twice the time
    strength = float(np.exp(rng.uniform(np.log(0.02), np.log(0.2))))
    tint = rng.normal(1, 0.15, 3).astype(np.float32)
    surface = base + (noise(rng, height, width) * strength)[..., None] * tint
    if rng.random() < 0.6:
        other = rng.normal(1, 0.3, 3).astype(np.float32)
        surface = surface + (noise(rng, height, width) * strength * rng.uniform(0.2, 1.0))[..., None] * other
    if rng.random() < 0.8:  # grain, dirt, weave: as fine as pixels
        reach = float(np.clip(max(height, width) / FIELD * rng.uniform(0.7, 2), 0.05, 1))
        fine = noise(rng, height, width, (0.9 * reach, reach)) * float(np.exp(rng.uniform(np.log(0.1), np.log(0.6))))
        fine *= 1.6 if reach < 0.25 else 1.0  # small objects show all their detail in few pixels
        surface = surface * np.exp(np.clip(fine, -1, 1))[..., None]
    if rng.random() < 0.3 + 0.5 * varied:  # leaves, fur, pebbles: lightness, and two tones
        tone = material(rng, height, width)
        surface = surface * np.exp(tone * float(np.exp(rng.uniform(np.log(0.1), np.log(0.6)))))[..., None]
        second = color(rng, palette=palette) if rng.random() < 0.3 else base * rng.normal(1, 0.25, 3)
        blend = np.clip(tone * 0.5 + rng.normal(0.3, 0.4), 0, 1)[..., None]
        surface = surface + blend * ((second - base) * rng.uniform(0.0, 0.8)).astype(np.float32)
    if rng.random() < 0.1 + 0.4 * varied:
        near = np.clip(base + rng.normal(0, 0.15, 3), 0, 1)
        second = color(rng, palette=palette) if rng.random() < 0.6 else near
        change = ((second - base) * rng.uniform(0.3, 1.0)).astype(np.float32)
        blend = (_pattern(rng, height, width) * 0.5 + 0.5)[..., None].astype(np.float32)
        surface = surface + blend * change
    for _ in range(int(rng.binomial(3, 0.2 + 0.5 * varied))):
        surface = _marked(rng, surface, palette)
    if rng.random() < 0.5:
        x, y = axes(height, width)
        angle = rng.uniform(0, 2 * np.pi)
        ramp = (x * float(np.cos(angle)) + y * float(np.sin(angle))) * rng.uniform(0.05, 0.4)
        surface = surface * (1 + ramp[..., None])
    return surface
