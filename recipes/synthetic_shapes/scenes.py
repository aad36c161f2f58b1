"""Scenes with known regions: stuff behind, objects made of parts in front, light and camera over all of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from camera import blurred, moved, photograph, relief, soft
from drawings import drawing
from grounds import ground
from materials import receding
from noise import axes, noise, smooth_noise
from scipy import ndimage
from shapes import BODIES, SHAPES, Part, object_parts, stroke
from textures import color, scene_palette, texture
from things import THINGS, fringed, marks, thing

SPLIT_AREA = 0.01  # share of the image from which a piece of stuff is a target of its own


@dataclass(frozen=True)
class Scene:
    """An image and its regions.

    Attributes:
        image: `[size, size, 3]` uint8 RGB.
        layers: `[size, size]` uint8, the visible part at each pixel.
        targets: sets of parts that make up something worth segmenting: parts, objects, groups, stuff.
        objects: numbers of the targets that are whole objects, neither parts nor groups.
        stuff: the parts that are stuff: ground, sky, walls, and pieces of them.
    """

    image: np.ndarray
    layers: np.ndarray
    targets: list[tuple[int, ...]]
    objects: frozenset[int]
    stuff: frozenset[int]


def target_masks(scene: Scene, min_area: float = 0.005, max_area: float = 0.7) -> np.ndarray:
    """Masks `[K, size, size]` bool of the distinct targets whose visible area is in range."""
    areas = np.bincount(scene.layers.ravel(), minlength=256) / scene.layers.size
    visible = {tuple(p for p in target if areas[p]) for target in scene.targets}
    kept = [t for t in sorted(visible) if min_area <= sum(areas[p] for p in t) <= max_area]
    return np.array([np.isin(scene.layers, t) for t in kept]).reshape(-1, *scene.layers.shape)


class _Canvas:
    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self.rng, self.size = rng, size
        self.image = np.zeros((size, size, 3), np.float32)
        self.layers = np.zeros((size, size), np.uint8)
        self.targets: list[tuple[int, ...]] = []
        self.parts = 0
        self.objects: set[int] = set()
        self.stuff: set[int] = set()
        self.palette = scene_palette(rng)

    def background(self) -> None:
        rng = self.rng
        self.ground = ground(rng, self.size)
        label = self.ground.label
        kinds = np.unique(label)
        shared = color(rng, 0.06, self.palette)
        for i, k in enumerate(kinds):
            # one in three has the color of its neighbors: only texture shows the boundary
            base = (
                np.clip(shared + rng.normal(0, 0.1, 3), 0.02, 0.98)
                if rng.random() < 0.3
                else color(rng, 0.06, self.palette)
            )
            inside = label == k
            rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            inside = inside[box]
            self.image[box][inside] = self._surface(int(k), int(rows[0]), *inside.shape, base)[inside]
            self.layers[box][inside] = i
        self.parts = len(kinds)
        self.stuff = set(range(len(kinds)))
        self.targets += [(i,) for i in range(len(kinds))]
        for i in range(len(kinds) - 1):
            if rng.random() < 0.25:
                self.targets.append((i, i + 1))

    def _surface(self, kind: int, top: int, height: int, width: int, base: np.ndarray) -> np.ndarray:
        """Paint a region of stuff whose first row is `top`."""
        rng, known = self.rng, self.ground
        if kind in known.skies and rng.random() < 0.8:
            bright = np.clip(rng.uniform(0.6, 0.95) * np.array([rng.uniform(0.6, 1), rng.uniform(0.8, 1), 1]), 0, 1)
            _, y = axes(height, width)
            clouds = np.clip(noise(rng, height, width, (0.1, 0.6)) * 0.5 + rng.normal(-0.3, 0.6), 0, 1)
            sky = bright * (1 + rng.uniform(0, 0.25) * y)[..., None] + clouds[..., None] * rng.uniform(0, 0.4)
            return sky.astype(np.float32)
        if kind in known.planes and known.horizon is not None and rng.random() < 0.85:
            tone = receding(rng, height, width, known.horizon - top, known.planes[kind])
            strength = float(np.exp(rng.uniform(np.log(0.08), np.log(0.5))))
            plane = base * np.exp(np.clip(tone, -3, 3) * strength)[..., None] * rng.normal(1, 0.04, 3)
            return (plane * (1 + 0.05 * noise(rng, height, width))[..., None]).astype(np.float32)
        return texture(rng, height, width, base, self.palette, rng.uniform(0.1, 0.7))

    def add_object(self, parts: list[Part], light: float, like: list[np.ndarray] | None = None) -> list[np.ndarray]:
        """Paint one object; return the colors of its parts, for another one that looks alike."""
        rng = self.rng
        outline = np.max([p.alpha for p in parts], axis=0)
        rows, columns = np.flatnonzero(outline.max(1) > 0.5), np.flatnonzero(outline.max(0) > 0.5)
        if not len(rows) or not len(columns) or self.parts + len(parts) > 250:
            return []
        y0, y1, x0, x1 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        h, w = y1 - y0, x1 - x0
        if rng.random() < 0.5:
            self._shadow(outline, light)
        hidden = self.image[y0:y1, x0:x1][outline[y0:y1, x0:x1] > 0.5].mean(0)
        around = self.image[y0:y1, x0:x1].reshape(-1, 3)
        camouflaged = rng.random() < 0.2
        x, y = axes(h, w)
        shade = 1 + rng.uniform(0.1, 0.6) * (x * float(np.cos(light)) + y * float(np.sin(light)))
        if rng.random() < 0.3:
            shade = shade * (1.1 - rng.uniform(0.1, 0.5) * np.clip(x * x + y * y, 0, 1.5))
        if rng.random() < 0.08:  # a highlight
            spot = np.square(x - float(np.cos(light)) * 0.4) + np.square(y - float(np.sin(light)) * 0.4)
            shade = shade + rng.uniform(0.3, 1.2) * np.exp(-spot * rng.uniform(8, 40))
        if rng.random() < 0.3:  # a cast shadow: an edge that belongs to no object
            field = smooth_noise(rng, h, w, (0.05, 0.4)) - rng.normal(0, 0.7)
            shade = shade * (1 - rng.uniform(0.3, 0.7) / (1 + np.exp(-field * rng.uniform(2, 12))))
        rounded = rng.random() < 0.6
        varied = rng.uniform(0.2, 1)
        opacity = rng.uniform(0.35, 0.8) if rng.random() < 0.03 else 1.0  # glass
        motion = int(rng.uniform(0.01, 0.05) * self.size) if rng.random() < 0.03 else 0
        ids, colors, surface = [], [], None
        part_of_color: dict[int, list[int]] = {}
        for i, part in enumerate(parts):
            if surface is None or part.new_color:
                base = color(rng, palette=self.palette)
                if part.color is not None and not camouflaged:
                    base = np.clip(part.color * rng.uniform(0.9, 1.1), 0.02, 0.98)
                elif like:
                    base = np.clip(like[min(len(colors), len(like) - 1)] + rng.normal(0, 0.03, 3), 0.02, 0.98)
                elif camouflaged:
                    base = np.clip(hidden + rng.normal(0, 0.06, 3), 0.02, 0.98)
                elif part.mark and rng.random() < 0.6:
                    base = np.clip(colors[-1] * rng.uniform(0.2, 1.8), 0.02, 0.98)
                elif rng.random() < 0.45:  # a color of the background
                    base = np.clip(around[rng.integers(len(around))] * rng.uniform(0.85, 1.15), 0.02, 0.98)
                elif colors and rng.random() < 0.45:
                    base = np.clip(colors[0] * rng.uniform(0.7, 1.3), 0.02, 0.98)
                colors.append(base)
                if part.mark and surface is not None:  # the surface below shows through paint
                    surface = surface * (0.3 * base / (colors[-2] + 0.05) + 0.2) + 0.5 * base.astype(np.float32)
                else:
                    surface = texture(rng, h, w, base, self.palette, varied) * shade[..., None]
            alpha = part.alpha[y0:y1, x0:x1]
            look = surface * part.tone if part.tone != 1 else surface
            if rounded:
                look = look * relief(rng, alpha, light)[..., None]
            if motion:
                alpha, look = moved(rng, alpha, motion), moved(rng, look, motion)
            window = self.image[y0:y1, x0:x1]
            window += (opacity * alpha)[..., None] * (look - window)
            if part.mark:
                continue
            self.layers[y0:y1, x0:x1][alpha > 0.5] = self.parts + i
            ids.append(self.parts + i)
            part_of_color.setdefault(len(colors), []).append(self.parts + i)
        self.parts += len(parts)
        self.objects.add(len(self.targets))
        self.targets.append(tuple(ids))
        if len(part_of_color) > 1:  # pieces of one color are one part
            pieces = list(part_of_color.values())
            self.targets += [tuple(piece) for piece in pieces]
            if len(pieces) > 2:
                first = int(rng.integers(len(pieces) - 1))
                self.targets.append((*pieces[first], *pieces[first + 1]))
        return colors

    def _shadow(self, alpha: np.ndarray, light: float) -> None:
        """Darken the surroundings of an object: an edge in the image that belongs to no object."""
        size, rng = self.size, self.rng
        reach = rng.uniform(0.02, 0.12) * size
        cast = soft(alpha, rng.uniform(1, 12) * size / 256)
        dy, dx = int(-np.sin(light) * reach), int(-np.cos(light) * reach)
        shadow = np.zeros_like(cast)
        shadow[max(dy, 0) : size + min(dy, 0), max(dx, 0) : size + min(dx, 0)] = cast[
            max(-dy, 0) : size + min(-dy, 0), max(-dx, 0) : size + min(-dx, 0)
        ]
        self.image *= 1 - rng.uniform(0.2, 0.6) * shadow[..., None]

    def split_pieces(self) -> None:
        """Make targets of the large pieces into which an object cuts a region of stuff."""
        for stuff in sorted(self.stuff):
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
            self.stuff.update(fresh)
            self.targets = [(*target, *fresh) if stuff in target else target for target in self.targets]
            self.targets += [(part,) for part in (stuff, *fresh)]


def _kind(rng: np.random.Generator, large: bool, drawn: bool) -> str:
    if drawn and rng.random() < 0.55:
        return "drawing"
    if large and rng.random() < 0.6:
        return str(rng.choice(BODIES))
    if rng.random() < 0.22:
        return str(rng.choice(THINGS))
    return str(rng.choice(list(SHAPES), p=list(SHAPES.values())))


def _object(
    rng: np.random.Generator, size: int, center: np.ndarray, radius: float, kind: str, drawings: Path | None
) -> list[Part]:
    if kind == "drawing":
        assert drawings is not None
        parts = drawing(rng, size, center, radius * 1.1, drawings)
    elif kind in THINGS:
        frame = (center, radius, rng.normal(0, 0.35), float(np.exp(rng.normal(0, 0.35))))
        parts = thing(rng, size, frame, kind)
    else:
        parts = object_parts(rng, size, center, radius, kind)
    if radius > 0.04 * size:
        if kind != "drawing" and rng.random() < 0.18:
            parts = [replace(part, alpha=fringed(rng, part.alpha, radius)) for part in parts]
        if rng.random() < 0.06:  # a cord, a tail, a handle
            ends = center + rng.normal(0, 0.7, (3, 2)) * radius
            parts.insert(0, Part(stroke(size, ends, radius * rng.uniform(0.03, 0.12)), True))
        if rng.random() < 0.35:
            parts += marks(rng, size, np.max([part.alpha for part in parts], axis=0), (center, radius, 0.0, 1.0))
    return parts


def _inside(rng: np.random.Generator, size: int, center: np.ndarray, radius: float) -> tuple[np.ndarray, float]:
    """Move and shrink an object's circle so that the object lies whole within the frame."""
    radius = min(radius, 0.4 * size)
    reach = min(1.2 * radius, 0.47 * size)
    low, high = reach, size - reach
    moved = np.where((center < low) | (center > high), rng.uniform(low, high, 2), center)
    return moved, radius


def render_scene(rng: np.random.Generator, size: int = 256, drawings: Path | None = None) -> Scene:
    """Draw one scene, determined by `rng`, `size` and the file of drawings, if one is given."""
    canvas = _Canvas(rng, size)
    canvas.background()
    light = rng.uniform(0, 2 * np.pi)
    count = int(rng.choice([1, 2, 2, 3, 3, 4, 5, 6, 8]))
    hero = int(rng.integers(count)) if rng.random() < 0.5 else -1  # number of a large object
    focus = int(rng.integers(count)) if rng.random() < 0.2 else -1  # all that is painted before it is out of focus
    standing = canvas.ground.horizon is not None and rng.random() < 0.7
    nearness = np.sort(rng.uniform(0.12, 1.1, count))  # far objects are painted first
    small = int(rng.integers(0, 9)) if rng.random() < 0.8 else 0
    plan = [(i, False) for i in range(count)] + [(-2, True)] * small
    order = [plan[k] for k in np.argsort(np.append(np.arange(count), rng.uniform(-1, count, small)), kind="stable")]
    for i, tiny in order:
        if i == focus:
            canvas.image = blurred(canvas.image, rng.uniform(0.3, 2.5) * size / 256)
        kind = _kind(rng, i == hero, drawings is not None)
        whole = rng.random() < 0.85
        if tiny:
            radius = size * float(np.exp(rng.uniform(np.log(0.018), np.log(0.06))))
            center = rng.uniform(0.03, 0.97, 2) * size
        elif i == hero:
            radius, center = size * rng.uniform(0.25, 0.5), rng.normal(0.5, 0.13, 2) * size
            if rng.random() < 0.25:  # a portrait, cut by the bottom edge
                whole = False
                radius = size * rng.uniform(0.5, 0.9)
                center = np.array([rng.normal(0.5, 0.1) * size, size * rng.uniform(0.02, 0.2) + 1.1 * radius])
        elif standing:  # on the ground, the nearer the larger
            near = nearness[i]
            radius = size * near * rng.uniform(0.1, 0.4)
            feet = canvas.ground.horizon + near * (size - canvas.ground.horizon)
            center = np.array([rng.uniform(0, 1) * size, feet - radius * rng.uniform(0.5, 1.0)])
        else:
            radius = size * np.exp(rng.uniform(np.log(0.06), np.log(0.45)))
            center = rng.uniform(0.05, 0.95, 2) * size
        if whole:
            center, radius = _inside(rng, size, center, radius)
        first = canvas.parts
        look = canvas.add_object(_object(rng, size, center, radius, kind, drawings), light)
        if look and rng.random() < 0.12:  # a group of similar objects
            for _ in range(int(rng.integers(1, 7))):
                near, its = center + rng.normal(0, 2.2, 2) * radius, radius * rng.uniform(0.7, 1.2)
                if whole:
                    near, its = _inside(rng, size, near, its)
                canvas.add_object(_object(rng, size, near, its, kind, drawings), light, look)
            canvas.targets.append(tuple(range(first, canvas.parts)))
        elif look and rng.random() < 0.15:  # an object that it holds or wears; both together are a target, too
            near, its = center + rng.normal(0, 0.4, 2) * radius, radius * rng.uniform(0.25, 0.5)
            if whole:
                near, its = _inside(rng, size, near, its)
            held = _object(rng, size, near, its, _kind(rng, False, drawings is not None), drawings)
            canvas.add_object(held, light)
            canvas.targets.append(tuple(range(first, canvas.parts)))
    canvas.split_pieces()
    return Scene(
        photograph(rng, canvas.image), canvas.layers, canvas.targets, frozenset(canvas.objects), frozenset(canvas.stuff)
    )
