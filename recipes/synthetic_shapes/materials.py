"""Surfaces made of many small things: leaves, grass, fur, pebbles, folds, ripples; and planes seen in perspective."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from noise import FIELD, field_window, fields, resize
from PIL import Image, ImageDraw
from scipy import ndimage


def _painted(
    rng: np.random.Generator, count: int, draw: Callable[[ImageDraw.ImageDraw, float, float, float, float], None]
) -> np.ndarray:
    """A tile `[FIELD, FIELD]` of `count` things in random places, those in front brighter."""
    canvas = Image.new("L", (2 * FIELD, 2 * FIELD), 20)
    pen = ImageDraw.Draw(canvas)
    tone = np.sort(rng.beta(2, 2, count))  # what lies deeper gets less light
    turn = rng.normal(0, 1, count)
    for x, y, t, a in zip(*rng.uniform(-20, 2 * FIELD + 20, (2, count)), tone, turn, strict=True):
        draw(pen, x, y, float(np.clip(t + rng.normal(0, 0.12), 0, 1)), a)
    values = np.asarray(canvas.reduce(2), np.float32)
    return (values - values.mean()) / (values.std() + 1e-3)


def _leaves(rng: np.random.Generator, length: float, count: int) -> np.ndarray:
    shape = np.array([[-1, 0], [-0.4, -0.35], [0.3, -0.3], [1, 0], [0.3, 0.3], [-0.4, 0.35]]) * length

    def draw(pen: ImageDraw.ImageDraw, x: float, y: float, tone: float, turn: float) -> None:
        c, s = np.cos(turn * 3), np.sin(turn * 3)
        leaf = (shape * [1, rng.uniform(0.5, 1.3)]) @ np.array([[c, s], [-s, c]]) + [x, y]
        pen.polygon([tuple(p) for p in leaf.tolist()], fill=int(30 + 190 * tone))
        pen.line([tuple(leaf[0]), tuple(leaf[3])], fill=int(50 + 200 * tone), width=1)

    return _painted(rng, count, draw)


def _blades(rng: np.random.Generator, length: float, spread: float, count: int, waves: float) -> np.ndarray:
    """Grass (upright) or, with `waves`, fur, whose direction changes slowly."""
    phase = rng.uniform(0, 2 * np.pi, 2)

    def draw(pen: ImageDraw.ImageDraw, x: float, y: float, tone: float, turn: float) -> None:
        angle = turn * spread - np.pi / 2 + waves * (np.sin(x / 170 + phase[0]) + np.sin(y / 230 + phase[1]))
        reach = length * rng.uniform(0.5, 1.3)
        dx, dy, bend = reach * np.cos(angle), reach * np.sin(angle), rng.normal(0, 0.12) * reach
        middle = (x + dx / 2 + bend, y + dy / 2)
        pen.line([(x, y), middle, (x + dx, y + dy)], fill=int(25 + 210 * tone), width=int(rng.integers(1, 4)))

    return _painted(rng, count, draw)


def _pebbles(rng: np.random.Generator, radius: float, count: int) -> np.ndarray:
    light = rng.uniform(0, 2 * np.pi)

    def draw(pen: ImageDraw.ImageDraw, x: float, y: float, tone: float, turn: float) -> None:
        a = radius * np.exp(rng.normal(0, 0.4))
        b, ground = a * rng.uniform(0.55, 1), 40 + 130 * tone
        pen.ellipse([x - a, y - b, x + a, y + b], fill=int(ground * 0.4))
        for step in (0.9, 0.65, 0.35):  # lit from one side
            mx, my = x + (1 - step) * a * 0.5 * np.cos(light), y + (1 - step) * b * 0.5 * np.sin(light)
            pen.ellipse(
                [mx - step * a, my - step * b, mx + step * a, my + step * b], fill=int(ground * (1.25 - step / 2))
            )

    return _painted(rng, count, draw)


def _folds(rng: np.random.Generator, stretch: float) -> np.ndarray:
    """Ridges: cloth, bark, waves, wrinkles."""
    window = resize(fields()[int(rng.integers(len(fields())))][: int(FIELD / stretch), : FIELD // 2], FIELD, FIELD)
    values = -(np.abs(window) ** 0.7) + 0.3 * window
    return ((values - values.mean()) / values.std()).astype(np.float32)


@functools.cache
def _tiles() -> list[np.ndarray]:
    """Tiles of all materials, of about zero mean and unit spread. They are the same in every process."""
    rng = np.random.default_rng(23)
    tiles = [_leaves(rng, length, count) for length, count in [(14, 9000), (26, 3500), (50, 1100), (90, 420)]]
    tiles += [_blades(rng, length, 0.35, count, 0) for length, count in [(40, 9000), (110, 4000)]]
    tiles += [_blades(rng, length, 0.2, count, 0.7) for length, count in [(24, 16000), (60, 7000), (130, 3500)]]
    tiles += [_blades(rng, 90, 3, 1800, 0)]  # twigs
    tiles += [_pebbles(rng, radius, count) for radius, count in [(9, 9000), (22, 2200), (50, 500)]]
    tiles += [_folds(rng, stretch) for stretch in (1, 2, 4, 4, 8)]
    return tiles


def material(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Lightness `[height, width]` of a random material, of about zero mean and unit spread."""
    tiles = _tiles()
    return field_window(rng, tiles[int(rng.integers(len(tiles)))], height, width, (0.2, 1.0))


def receding(rng: np.random.Generator, height: int, width: int, horizon: float, below: bool = True) -> np.ndarray:
    """Lightness `[height, width]` of a material or a tiling on a plane that recedes to the row `horizon`."""
    rows = np.arange(height, dtype=np.float32) + 0.5
    distance = np.maximum((rows - horizon) if below else (horizon - rows), 1.0)
    depth = height / distance  # 1 near the viewer
    scale = float(np.exp(rng.uniform(np.log(0.4), np.log(2.0))))
    v = depth[:, None] * scale * FIELD * 0.5
    u = (np.arange(width, dtype=np.float32) - rng.uniform(0, width))[None] / width * depth[:, None] * scale * FIELD
    if rng.random() < 0.3:
        period = FIELD / float(rng.integers(6, 40))
        if rng.random() < 0.5:  # planks or furrows
            tone = np.sin(u * (2 * np.pi / period)) * np.ones_like(v)
            tone = np.where(tone > -0.9, np.sin(np.floor(u / period) * 12.9898) * 0.6, -2.0)
        else:  # tiles
            joint = (np.abs(u / period % 1 - 0.5) > 0.46) | (np.abs(v / period % 1 - 0.5) > 0.46)
            tone = np.where(joint, -2.0, np.sin(np.floor(u / period) * 12.9898 + np.floor(v / period) * 78.233))
    else:
        tile = _tiles()[int(rng.integers(len(_tiles())))] if rng.random() < 0.7 else fields()[int(rng.integers(28))]
        where = np.broadcast_arrays(v + rng.uniform(0, FIELD), u + rng.uniform(0, FIELD))
        tone = ndimage.map_coordinates(tile, np.stack(where), order=1, mode="mirror", prefilter=False)
    far = np.clip(distance / (0.25 * height), 0.15, 1)  # detail melts away with distance
    return (tone * far[:, None]).astype(np.float32)
