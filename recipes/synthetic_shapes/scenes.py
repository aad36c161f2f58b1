"""Pictures with known regions: stuff behind, objects made of parts in front, light and camera over all of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from camera import blurred, moved, photograph, relief, soft
from grounds import ground
from materials import receding
from noise import axes, noise
from scipy import ndimage
from shapes import BODIES, SHAPES, Part, object_parts
from textures import colour, texture
from things import THINGS, fringed, marks, thing

SPLIT_AREA = 0.01  # pieces of one surface from this share of the picture on are targets by themselves


@dataclass(frozen=True)
class Scene:
    """
    Attributes:
        image: `[size, size, 3]` uint8 RGB.
        layers: `[size, size]` uint8, the visible part at each pixel.
        targets: sets of parts that make up something worth segmenting: parts, objects, groups, stuff.
        stuff: the parts that are stuff: ground, sky, walls, and pieces of them.
    """

    image: np.ndarray
    layers: np.ndarray
    targets: list[tuple[int, ...]]
    stuff: frozenset[int]


def target_masks(scene: Scene, min_area: float = 0.005, max_area: float = 0.7) -> np.ndarray:
    """`[K, size, size]` bool: the distinct targets whose visible area is in range."""
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
        self.stuff: set[int] = set()

    def background(self) -> None:
        rng = self.rng
        self.ground = ground(rng, self.size)
        label = self.ground.label
        kinds = np.unique(label)
        shared = colour(rng, 0.06)
        for i, k in enumerate(kinds):
            # one in three resembles its neighbours: the boundary is then one of texture alone
            base = np.clip(shared + rng.normal(0, 0.1, 3), 0.02, 0.98) if rng.random() < 0.3 else colour(rng, 0.06)
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
        """What a piece of stuff looks like whose first row is `top`."""
        rng, known = self.rng, self.ground
        if kind in known.skies and rng.random() < 0.8:
            bright = np.clip(rng.uniform(0.6, 0.95) * np.array([rng.uniform(0.6, 1), rng.uniform(0.8, 1), 1]), 0, 1)
            _, y = axes(height, width)
            clouds = np.clip(noise(rng, height, width, (0.1, 0.6)) * 0.5 + rng.normal(-0.3, 0.6), 0, 1)
            sky = bright * (1 + rng.uniform(0, 0.25) * y)[..., None] + clouds[..., None] * rng.uniform(0, 0.4)
            return sky.astype(np.float32)
        if kind in known.planes and known.horizon is not None and rng.random() < 0.85:
            tone = receding(rng, height, width, known.horizon - top, known.planes[kind])
            strength = float(np.exp(rng.uniform(np.log(0.04), np.log(0.4))))
            plane = base * np.exp(np.clip(tone, -3, 3) * strength)[..., None] * rng.normal(1, 0.04, 3)
            return (plane * (1 + 0.05 * noise(rng, height, width))[..., None]).astype(np.float32)
        return texture(rng, height, width, base)

    def add_object(self, parts: list[Part], light: float, like: list[np.ndarray] | None = None) -> list[np.ndarray]:
        """Paint one object; returns its parts' colours, so that the next one may look alike."""
        rng = self.rng
        outline = np.max([p.alpha for p in parts], axis=0)
        rows, columns = np.flatnonzero(outline.max(1) > 0.5), np.flatnonzero(outline.max(0) > 0.5)
        if not len(rows) or not len(columns) or self.parts + len(parts) > 250:
            return []
        y0, y1, x0, x1 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        h, w = y1 - y0, x1 - x0
        if rng.random() < 0.4:
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
        rounded = rng.random() < 0.5
        opacity = rng.uniform(0.35, 0.8) if rng.random() < 0.03 else 1.0  # glass
        motion = int(rng.uniform(0.01, 0.05) * self.size) if rng.random() < 0.03 else 0
        ids, colours, surface = [], [], None
        part_of_colour: dict[int, list[int]] = {}
        for i, part in enumerate(parts):
            if surface is None or part.new_colour:
                base = colour(rng)
                if like:
                    base = np.clip(like[min(len(colours), len(like) - 1)] + rng.normal(0, 0.03, 3), 0.02, 0.98)
                elif camouflaged:
                    base = np.clip(hidden + rng.normal(0, 0.06, 3), 0.02, 0.98)
                elif part.mark and rng.random() < 0.6:
                    base = np.clip(colours[-1] * rng.uniform(0.2, 1.8), 0.02, 0.98)
                elif colours and rng.random() < 0.45:
                    base = np.clip(colours[0] * rng.uniform(0.7, 1.3), 0.02, 0.98)
                colours.append(base)
                surface = texture(rng, h, w, base) * shade[..., None]
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
        cast = soft(alpha, rng.uniform(1, 12) * size / 256)
        dy, dx = int(-np.sin(light) * reach), int(-np.cos(light) * reach)
        shadow = np.zeros_like(cast)
        shadow[max(dy, 0) : size + min(dy, 0), max(dx, 0) : size + min(dx, 0)] = cast[
            max(-dy, 0) : size + min(-dy, 0), max(-dx, 0) : size + min(-dx, 0)
        ]
        self.image *= 1 - rng.uniform(0.2, 0.6) * shadow[..., None]

    def split_pieces(self) -> None:
        """Large pieces of a surface that something cuts apart become targets too, beside their union."""
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


def _kind(rng: np.random.Generator, large: bool) -> str:
    if large and rng.random() < 0.6:
        return str(rng.choice(BODIES))
    if rng.random() < 0.22:
        return str(rng.choice(THINGS))
    return str(rng.choice(list(SHAPES), p=list(SHAPES.values())))


def _object(rng: np.random.Generator, size: int, centre: np.ndarray, radius: float, kind: str) -> list[Part]:
    if kind in THINGS:
        frame = (centre, radius, rng.normal(0, 0.35), float(np.exp(rng.normal(0, 0.35))))
        parts = thing(rng, size, frame, kind)
    else:
        parts = object_parts(rng, size, centre, radius, kind)
    if rng.random() < 0.18:
        parts = [replace(part, alpha=fringed(rng, part.alpha, radius)) for part in parts]
    if rng.random() < 0.3:
        parts += marks(rng, size, np.max([part.alpha for part in parts], axis=0), (centre, radius, 0.0, 1.0))
    return parts


def render_scene(rng: np.random.Generator, size: int = 256) -> Scene:
    """One picture, wholly determined by `rng` and `size`."""
    canvas = _Canvas(rng, size)
    canvas.background()
    light = rng.uniform(0, 2 * np.pi)
    count = int(rng.choice([1, 2, 2, 3, 3, 4, 5, 6, 8]))
    hero = int(rng.integers(count)) if rng.random() < 0.45 else -1  # one large object, others before and behind it
    focus = int(rng.integers(count)) if rng.random() < 0.35 else -1  # depth of field: all before it is out of focus
    standing = canvas.ground.horizon is not None and rng.random() < 0.7
    nearness = np.sort(rng.uniform(0.12, 1.1, count))  # what is far is painted first
    for i in range(count):
        if i == focus:
            canvas.image = blurred(canvas.image, rng.uniform(0.5, 4) * size / 256)
        kind = _kind(rng, i == hero)
        if i == hero:
            radius, centre = size * rng.uniform(0.28, 0.55), rng.normal(0.5, 0.13, 2) * size
            if rng.random() < 0.3:  # a portrait, which the picture cuts off
                radius = size * rng.uniform(0.5, 1.1)
                centre = size * np.array([rng.normal(0.5, 0.15), rng.uniform(0.5, 1.1)])
        else:
            radius = size * np.exp(rng.uniform(np.log(0.06), np.log(0.5)))
            centre = rng.uniform(0.05, 0.95, 2) * size
        if i != hero and standing:  # on the ground, the nearer the larger
            near = nearness[i]
            radius = size * near * rng.uniform(0.1, 0.4)
            feet = canvas.ground.horizon + near * (size - canvas.ground.horizon)
            centre = np.array([rng.uniform(0, 1) * size, feet - radius * rng.uniform(0.5, 1.0)])
        first = canvas.parts
        look = canvas.add_object(_object(rng, size, centre, radius, kind), light)
        if look and rng.random() < 0.15:  # a herd: alike, near each other, one group
            for _ in range(int(rng.integers(1, 7))):
                near = centre + rng.normal(0, 2.2, 2) * radius
                canvas.add_object(_object(rng, size, near, radius * rng.uniform(0.7, 1.2), kind), light, look)
            canvas.targets.append(tuple(range(first, canvas.parts)))
        elif look and rng.random() < 0.15:  # something it holds or wears: a target with it, without it and alone
            near = centre + rng.normal(0, 0.4, 2) * radius
            held = _object(rng, size, near, radius * rng.uniform(0.25, 0.5), _kind(rng, False))
            canvas.add_object(held, light)
            canvas.targets.append(tuple(range(first, canvas.parts)))
    canvas.split_pieces()
    return Scene(photograph(rng, canvas.image), canvas.layers, canvas.targets, frozenset(canvas.stuff))
