"""Backgrounds: an image divided into regions of stuff, and the row of its horizon."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from noise import noise, smooth_noise


@dataclass(frozen=True)
class Ground:
    """A division of an image into stuff.

    Attributes:
        label: `[size, size]` uint8, 0..K-1.
        horizon: row where planes meet, in pixels, or None where there is no perspective.
        planes: labels that recede toward it; True if the label lies below it.
        skies: labels that are sky.
    """

    label: np.ndarray
    horizon: float | None = None
    planes: dict[int, bool] = field(default_factory=dict)
    skies: tuple[int, ...] = ()


def ground(rng: np.random.Generator, size: int) -> Ground:
    """Draw a background of a random kind."""
    make = [_landscape, _room, _horizons, _cells, _levels, _walls, _plain]
    return make[rng.choice(len(make), p=[0.3, 0.1, 0.25, 0.14, 0.07, 0.07, 0.07])](rng, size)


def _ragged(rng: np.random.Generator, size: int, largest: float) -> np.ndarray:
    """Offsets of an irregular edge along its length, `[size]`, as a share of the image."""
    return noise(rng, 4, size, (0.1, 0.9))[1] * np.exp(rng.uniform(np.log(0.002), np.log(largest)))


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    return y, x


def _landscape(rng: np.random.Generator, size: int) -> Ground:
    """Sky, ground to the horizon, perhaps hills or trees between, a path or water on the ground."""
    y, x = _grid(size)
    horizon = rng.uniform(0.05, 0.7)
    label = (y > horizon + _ragged(rng, size, 0.01)).astype(np.uint8)
    count = 2
    if rng.random() < 0.65:  # behind the horizon, in front of the sky
        for depth in np.sort(rng.uniform(0.02, 0.4, rng.integers(1, 3)))[::-1]:
            ridge = horizon - depth + _ragged(rng, size, 0.12) + rng.normal(0, 0.15) * (x - 0.5)
            label[(label != 1) & (y > ridge)] = count
            count += 1
    if rng.random() < 0.4:  # a road or river to a vanishing point
        vx, left, right = rng.uniform(-0.2, 1.2), *np.sort(rng.uniform(-0.5, 1.5, 2))
        t = np.clip((y - horizon) / (1 - horizon), 0, 1)
        stray = _ragged(rng, size, 0.03)[:, None]
        label[(label == 1) & (x > vx + (left - vx) * t + stray) & (x < vx + (right - vx) * t + stray)] = count
        count += 1
    elif rng.random() < 0.4:  # a shore
        label[(label == 1) & (y > horizon + rng.uniform(0.05, 0.4) + _ragged(rng, size, 0.05))] = count
        count += 1
    on_ground = {k: True for k in (1, count - 1) if ((label == k) & (y < horizon - 0.02)).sum() == 0}
    return Ground(label, horizon * size, on_ground, (0,))


def _room(rng: np.random.Generator, size: int) -> Ground:
    """Back wall, floor, side walls and ceiling; some of them may be out of sight."""
    y, x = _grid(size)
    x0, x1 = rng.uniform(-0.2, 0.4), rng.uniform(0.6, 1.2)
    y0, y1 = rng.uniform(-0.3, 0.3), rng.uniform(0.45, 0.85)
    horizon = rng.uniform(max(y0, 0) + 0.05, y1 - 0.1)
    slope = rng.uniform(0.5, 2.0)
    left, right = (x0 - x) * slope, (x - x1) * slope
    floor, ceiling = y - y1, y0 - y
    label = np.stack([np.zeros_like(x), floor, left, right, ceiling]).argmax(0).astype(np.uint8)
    return Ground(label, horizon * size, {1: True, 4: False})


def _horizons(rng: np.random.Generator, size: int) -> Ground:
    y, x = _grid(size)
    tilt = rng.normal(0, 0.08)
    label = np.zeros((size, size), np.uint8)
    for edge in np.sort(rng.uniform(0.1, 0.95, rng.integers(1, 5))):
        label += y > edge + tilt * (x - 0.5) + _ragged(rng, size, 0.09)
    return Ground(label, skies=(0,) if rng.random() < 0.5 else ())


def _cells(rng: np.random.Generator, size: int) -> Ground:
    y, x = _grid(size)
    count = int(rng.integers(2, 9))
    seeds = rng.uniform(-0.1, 1.1, (count, 2))
    distance = [np.hypot(x - sx, (y - sy) * rng.uniform(0.7, 1.5)) for sx, sy in seeds]
    rough = rng.choice([0.0, 0.03, 0.1])
    fields = [d + rough * smooth_noise(rng, size, size, (0.1, 0.5)) + rng.normal(0, 0.08) for d in distance]
    return Ground(np.stack(fields).argmin(0).astype(np.uint8))


def _levels(rng: np.random.Generator, size: int) -> Ground:
    level = smooth_noise(rng, size, size, (0.03, 0.12))
    return Ground(np.digitize(level, np.sort(rng.normal(0, 0.8, rng.integers(1, 4)))).astype(np.uint8))


def _walls(rng: np.random.Generator, size: int) -> Ground:
    """A street: straight edges meeting in a vanishing point."""
    y, x = _grid(size)
    cx, cy = rng.uniform(0.25, 0.75, 2)
    angles = np.sort(rng.uniform(-np.pi, np.pi, rng.integers(3, 6)))
    label = np.digitize(np.arctan2(y - cy, x - cx), angles) % len(angles)
    if rng.random() < 0.5:
        w, h = rng.uniform(0.08, 0.25, 2)
        label = np.where((abs(x - cx) < w) & (abs(y - cy) < h), len(angles), label)
    return Ground(label.astype(np.uint8))


def _plain(rng: np.random.Generator, size: int) -> Ground:
    return Ground(np.zeros((size, size), np.uint8))
