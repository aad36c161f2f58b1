"""Pictures with known regions: stuff behind, objects made of parts in front, light and camera over all of it."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter
from scipy import ndimage
from shapes import Part, object_parts
from textures import axes, colour, noise, resize, smooth_noise, texture

SPLIT_AREA = 0.01  # pieces of one surface from this share of the picture on are targets by themselves


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
    kind = rng.choice(["plain", "horizons", "cells", "levels", "walls"], p=[0.08, 0.47, 0.22, 0.12, 0.11])
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
        field = smooth_noise(rng, size, size, (0.03, 0.12))
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
        self.parts = self.stuff = 0

    def background(self) -> None:
        rng, size = self.rng, self.size
        label = _stuff(rng, size)
        kinds = np.unique(label)
        shared = colour(rng, 0.06)
        for i, k in enumerate(kinds):
            # one in three resembles its neighbours: the boundary is then one of texture alone
            base = np.clip(shared + rng.normal(0, 0.1, 3), 0.02, 0.98) if rng.random() < 0.3 else colour(rng, 0.06)
            inside = label == k
            rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            inside = inside[box]
            self.image[box][inside] = texture(rng, *inside.shape, base)[inside]
            self.layers[box][inside] = i
        self.parts = len(kinds)
        self.stuff = len(kinds)
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
        camouflaged = rng.random() < 0.1
        x, y = axes(h, w)
        shade = 1 + rng.uniform(0, 0.35) * (x * float(np.cos(light)) + y * float(np.sin(light)))
        if rng.random() < 0.3:
            shade = shade * (1.1 - rng.uniform(0.1, 0.5) * np.clip(x * x + y * y, 0, 1.5))
        if rng.random() < 0.08:  # a highlight
            spot = np.square(x - float(np.cos(light)) * 0.4) + np.square(y - float(np.sin(light)) * 0.4)
            shade = shade + rng.uniform(0.3, 1.2) * np.exp(-spot * rng.uniform(8, 40))
        ids, colours, surface = [], [], None
        part_of_colour: dict[int, list[int]] = {}
        for i, part in enumerate(parts):
            if surface is None or part.new_colour:
                base = colour(rng)
                if like:
                    base = np.clip(like[min(len(colours), len(like) - 1)] + rng.normal(0, 0.03, 3), 0.02, 0.98)
                elif camouflaged:
                    base = np.clip(hidden + rng.normal(0, 0.06, 3), 0.02, 0.98)
                elif colours and rng.random() < 0.45:
                    base = np.clip(colours[0] * rng.uniform(0.7, 1.3), 0.02, 0.98)
                colours.append(base)
                surface = texture(rng, h, w, base) * shade[..., None]
            alpha = part.alpha[y0:y1, x0:x1]
            window = self.image[y0:y1, x0:x1]
            window += alpha[..., None] * (surface - window)
            self.layers[y0:y1, x0:x1][alpha > 0.5] = self.parts + i
            ids.append(self.parts + i)
            part_of_colour.setdefault(len(colours), []).append(self.parts + i)
        self.parts += len(parts)
        self.targets.append(tuple(ids))
        if len(part_of_colour) > 1:  # a part is what looks like one: pieces of one colour go together
            pieces = list(part_of_colour.values())
            self.targets += [tuple(piece) for piece in pieces]
            if len(pieces) > 2:
                first = int(rng.integers(len(pieces) - 1))
                self.targets.append((*pieces[first], *pieces[first + 1]))
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

    def split_pieces(self) -> None:
        """Large pieces of a surface that something cuts apart become targets too, beside their union."""
        for stuff in range(self.stuff):
            pieces, count = ndimage.label(self.layers == stuff)
            areas = np.bincount(pieces.ravel(), minlength=count + 1)[1:] / pieces.size
            large = np.flatnonzero(areas >= SPLIT_AREA)
            if len(large) < 2 or self.parts + len(large) > 250:
                continue
            fresh = []
            for piece in large[1:]:
                self.layers[pieces == piece + 1] = self.parts
                fresh.append(self.parts)
                self.parts += 1
            self.targets = [(*target, *fresh) if stuff in target else target for target in self.targets]
            self.targets += [(part,) for part in (stuff, *fresh)]

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
            x, y = axes(size, size)
            image = image * (1 - rng.uniform(0, 0.35) * (x * x + y * y)[..., None])
        image = image * rng.normal(1, 0.05, 3).astype(np.float32)
        grey = image.mean(2, keepdims=True)
        saturation = 0.0 if rng.random() < 0.06 else rng.uniform(0.4, 1.1)
        # a camera sets its exposure by what it sees; highlights and shadows roll off rather than clip
        gain = np.clip(rng.uniform(0.12, 0.28) / (grey.std() + 1e-3), 0.6, 2.0)
        image = (grey - grey.mean()) * gain + (image - grey) * saturation * min(1.0, gain)
        image = image + np.clip(rng.normal(-0.06, 0.1), -0.25, 0.2)
        image = 0.5 + 0.5 * np.tanh(2 * image)
        self.image = image.astype(np.float32)
        if rng.random() < 0.6:
            self.blur(rng.uniform(0.3, 1.3))
        pixels = self.image * 255
        if rng.random() < 0.7:
            channels = 3 if rng.random() < 0.5 else 1
            grain = rng.standard_normal((size, size, channels), np.float32)
            pixels = pixels + grain * float(np.exp(rng.uniform(np.log(0.5), np.log(12))))
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
    light = rng.uniform(0, 2 * np.pi)
    count = int(rng.choice([1, 2, 2, 3, 3, 4, 5, 6, 8]))
    hero = int(rng.integers(count)) if rng.random() < 0.45 else -1  # one large object, others before and behind it
    focus = int(rng.integers(count)) if rng.random() < 0.35 else -1  # depth of field: all before it is out of focus
    for i in range(count):
        if i == focus:
            canvas.blur(rng.uniform(0.5, 3) * size / 256)
        if i == hero:
            radius, centre = size * rng.uniform(0.28, 0.55), rng.normal(0.5, 0.13, 2) * size
        else:
            radius = size * np.exp(rng.uniform(np.log(0.06), np.log(0.5)))
            centre = rng.uniform(0.05, 0.95, 2) * size
        first = canvas.parts
        look = canvas.add_object(object_parts(rng, size, centre, radius), light)
        if look and rng.random() < 0.15:  # a herd: alike, near each other, one group
            for _ in range(int(rng.integers(1, 7))):
                near = centre + rng.normal(0, 2.2, 2) * radius
                canvas.add_object(object_parts(rng, size, near, radius * rng.uniform(0.7, 1.2)), light, look)
            canvas.targets.append(tuple(range(first, canvas.parts)))
        elif look and rng.random() < 0.15:  # something it holds or wears: a target with it, without it and alone
            near = centre + rng.normal(0, 0.4, 2) * radius
            canvas.add_object(object_parts(rng, size, near, radius * rng.uniform(0.25, 0.5)), light)
            canvas.targets.append(tuple(range(first, canvas.parts)))
    canvas.split_pieces()
    return Scene(canvas.camera(), canvas.layers, canvas.targets)
