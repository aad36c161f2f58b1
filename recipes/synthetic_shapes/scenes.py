"""Pictures with known regions: stuff behind, objects made of parts in front, light and camera over all of it."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter
from shapes import Part, object_parts
from textures import colour, noise, resize, smooth_noise, texture


@dataclass(frozen=True)
class Scene:
    """
    Attributes:
        image: `[size, size, 3]` uint8 RGB.
        layers: `[size, size]` uint8, the visible part at each pixel.
        targets: sets of parts that make up something worth segmenting: parts, objects, groups, stuff.
    """

    image: np.ndarray
    layers: np.ndarray
    targets: list[tuple[int, ...]]


def target_masks(scene: Scene, min_area: float = 0.005, max_area: float = 0.7) -> np.ndarray:
    """`[K, size, size]` bool: the distinct targets whose visible area is in range."""
    areas = np.bincount(scene.layers.ravel(), minlength=256) / scene.layers.size
    visible = {tuple(p for p in target if areas[p]) for target in scene.targets}
    kept = [t for t in sorted(visible) if min_area <= sum(areas[p] for p in t) <= max_area]
    return np.array([np.isin(scene.layers, t) for t in kept]).reshape(-1, *scene.layers.shape)


def _stuff(rng: np.random.Generator, size: int) -> np.ndarray:
    """A partition of the picture, `[size, size]` 0..K-1."""
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    kind = rng.choice(["plain", "horizons", "cells", "levels", "walls"], p=[0.12, 0.42, 0.24, 0.12, 0.10])
    if kind == "horizons":
        tilt = rng.normal(0, 0.08)
        edges = np.sort(rng.uniform(0.1, 0.95, rng.integers(1, 5)))
        label = np.zeros((size, size), np.uint8)
        for edge in edges:
            ragged = noise(rng, 4, size, (0.1, 0.9))[1] * np.exp(rng.uniform(np.log(0.002), np.log(0.09)))
            label += y > edge + tilt * (x - 0.5) + ragged
        return label
    if kind == "cells":
        count = int(rng.integers(2, 9))
        seeds = rng.uniform(-0.1, 1.1, (count, 2))
        distance = [np.hypot(x - sx, (y - sy) * rng.uniform(0.7, 1.5)) for sx, sy in seeds]
        rough = rng.choice([0.0, 0.03, 0.1])
        field = np.stack(
            [d + rough * smooth_noise(rng, size, size, (0.1, 0.5)) + rng.normal(0, 0.08) for d in distance]
        )
        return field.argmin(0).astype(np.uint8)
    if kind == "levels":
        field = smooth_noise(rng, size, size, (0.05, 0.3))
        return np.digitize(field, np.sort(rng.normal(0, 0.8, rng.integers(1, 4)))).astype(np.uint8)
    if kind == "walls":  # a room or a street: straight edges meeting in a vanishing point
        cx, cy = rng.uniform(0.25, 0.75, 2)
        angles = np.sort(rng.uniform(-np.pi, np.pi, rng.integers(3, 6)))
        label = np.digitize(np.arctan2(y - cy, x - cx), angles) % len(angles)
        if rng.random() < 0.5:
            w, h = rng.uniform(0.08, 0.25, 2)
            label = np.where((abs(x - cx) < w) & (abs(y - cy) < h), len(angles), label)
        return label.astype(np.uint8)
    return np.zeros((size, size), np.uint8)


class _Canvas:
    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self.rng, self.size = rng, size
        self.image = np.zeros((size, size, 3), np.float32)
        self.layers = np.zeros((size, size), np.uint8)
        self.targets: list[tuple[int, ...]] = []
        self.parts = 0

    def background(self) -> None:
        rng, size = self.rng, self.size
        label = _stuff(rng, size)
        kinds = np.unique(label)
        shared = colour(rng)
        for i, k in enumerate(kinds):
            base = np.clip(shared + rng.normal(0, 0.1, 3), 0.02, 0.98) if rng.random() < 0.3 else None
            alpha = (label == k)[..., None]
            self.image = np.where(alpha, texture(rng, size, size, base), self.image)
            self.layers[label == k] = i
        self.parts = len(kinds)
        if len(kinds) > 1:
            self.targets += [(i,) for i in range(len(kinds))]
            for i in range(len(kinds) - 1):
                if rng.random() < 0.25:
                    self.targets.append((i, i + 1))

    def add_object(self, parts: list[Part], light: float, like: list[np.ndarray] | None = None) -> list[np.ndarray]:
        """Paint one object; returns its parts' colours, so that the next one may look alike."""
        rng = self.rng
        outline = np.max([p.alpha for p in parts], axis=0)
        rows, columns = np.flatnonzero(outline.max(1) > 0.5), np.flatnonzero(outline.max(0) > 0.5)
        if not len(rows) or not len(columns) or self.parts + len(parts) > 250:
            return []
        y0, y1, x0, x1 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        h, w = y1 - y0, x1 - x0
        if rng.random() < 0.35:
            self._shadow(outline, light)
        hidden = self.image[y0:y1, x0:x1][outline[y0:y1, x0:x1] > 0.5].mean(0)
        camouflaged = rng.random() < 0.15
        y, x = np.mgrid[-1 : 1 : h * 1j, -1 : 1 : w * 1j]
        shade = 1 + rng.uniform(0, 0.35) * (x * np.cos(light) + y * np.sin(light))
        if rng.random() < 0.3:
            shade = shade * (1.1 - rng.uniform(0.1, 0.5) * np.clip(x * x + y * y, 0, 1.5))
        ids, colours, surface = [], [], None
        part_of_colour: dict[int, list[int]] = {}
        for i, part in enumerate(parts):
            if surface is None or part.new_colour:
                base = colour(rng)
                if like:
                    base = np.clip(like[min(len(colours), len(like) - 1)] + rng.normal(0, 0.03, 3), 0.02, 0.98)
                elif camouflaged:
                    base = np.clip(hidden + rng.normal(0, 0.06, 3), 0.02, 0.98)
                elif colours and rng.random() < 0.3:
                    base = np.clip(colours[0] * rng.uniform(0.7, 1.3), 0.02, 0.98)
                colours.append(base)
                surface = texture(rng, h, w, base)
                if rng.random() < 0.2:  # markings: inside the object, and no region of their own
                    spots = np.clip((noise(rng, h, w, (0.15, 0.6)) - rng.uniform(0.2, 1.2)) * 6, 0, 1)[..., None]
                    surface = surface * (1 - spots) + texture(rng, h, w) * spots
                surface = surface * shade[..., None]
            alpha = part.alpha[y0:y1, x0:x1]
            window = self.image[y0:y1, x0:x1]
            window += alpha[..., None] * (surface - window)
            self.layers[y0:y1, x0:x1][alpha > 0.5] = self.parts + i
            ids.append(self.parts + i)
            part_of_colour.setdefault(len(colours), []).append(self.parts + i)
        self.parts += len(parts)
        self.targets.append(tuple(ids))
        if len(part_of_colour) > 1:  # a part is what looks like one: pieces of one colour go together
            self.targets += [tuple(piece) for piece in part_of_colour.values()]
        return colours

    def _shadow(self, alpha: np.ndarray, light: float) -> None:
        """Darkens what lies around: an edge in the picture that is the edge of nothing."""
        size, rng = self.size, self.rng
        reach = rng.uniform(0.02, 0.12) * size
        small = np.clip(resize(alpha, size // 4, size // 4), 0, 1)
        soft = Image.fromarray((small * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 3)))
        soft = resize(np.asarray(soft, np.float32) / 255, size, size)
        dy, dx = int(-np.sin(light) * reach), int(-np.cos(light) * reach)
        moved = np.zeros_like(soft)
        moved[max(dy, 0) : size + min(dy, 0), max(dx, 0) : size + min(dx, 0)] = soft[
            max(-dy, 0) : size + min(-dy, 0), max(-dx, 0) : size + min(-dx, 0)
        ]
        self.image *= 1 - rng.uniform(0.2, 0.6) * moved[..., None]

    def blur(self, radius: float) -> None:
        picture = Image.fromarray((self.image.clip(0, 1) * 255).astype(np.uint8))
        self.image = np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255

    def camera(self) -> np.ndarray:
        rng, size = self.rng, self.size
        image = self.image
        if rng.random() < 0.5:  # uneven light, shadows of things outside the picture
            light = resize(noise(rng, 16, 16, (0.1, 0.5)), size, size)
            if rng.random() < 0.3:
                light = np.tanh(light * 4)
            image = image * (1 + rng.uniform(0.03, 0.3) * light[..., None])
        if rng.random() < 0.3:
            y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
            image = image * (1 - rng.uniform(0, 0.35) * (x * x + y * y)[..., None])
        grey = image.mean(2, keepdims=True)
        saturation = 0.0 if rng.random() < 0.06 else rng.uniform(0.3, 1.05)
        image = grey + (image - grey) * saturation
        contrast = np.exp(rng.normal(0.05, 0.25))
        image = (image - 0.45) * contrast + 0.45 + rng.normal(0, 0.05)
        image = image * rng.normal(1, 0.06, 3)
        image = np.clip(image, 0.0, 1.0) ** np.exp(rng.normal(0, 0.2))
        self.image = image.astype(np.float32)
        if rng.random() < 0.6:
            self.blur(rng.uniform(0.3, 1.3))
        pixels = self.image * 255
        if rng.random() < 0.7:
            pixels = pixels + rng.normal(0, rng.uniform(1, 12), pixels.shape[: 2 + (rng.random() < 0.5)]).reshape(
                size, size, -1
            )
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        if rng.random() < 0.4:
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=int(rng.integers(30, 90)))
            picture = Image.open(buffer)
        return np.asarray(picture)


def render_scene(rng: np.random.Generator, size: int = 256) -> Scene:
    """One picture, wholly determined by `rng` and `size`."""
    canvas = _Canvas(rng, size)
    canvas.background()
    if rng.random() < 0.2:
        canvas.blur(rng.uniform(0.5, 3) * size / 256)
    light = rng.uniform(0, 2 * np.pi)
    for _ in range(int(rng.choice([1, 1, 2, 2, 3, 4, 5, 7, 9]))):
        radius = size * np.exp(rng.uniform(np.log(0.07), np.log(0.5)))
        centre = rng.uniform(0.05, 0.95, 2) * size
        first = canvas.parts
        look = canvas.add_object(object_parts(rng, size, centre, radius), light)
        if look and rng.random() < 0.12:  # a herd: alike, near each other, one group
            for _ in range(int(rng.integers(1, 7))):
                near = centre + rng.normal(0, 2.2, 2) * radius
                canvas.add_object(object_parts(rng, size, near, radius * rng.uniform(0.7, 1.2)), light, look)
            canvas.targets.append(tuple(range(first, canvas.parts)))
    return Scene(canvas.camera(), canvas.layers, canvas.targets)
