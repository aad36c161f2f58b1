"""Outlines of objects, drawn as soft masks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from noise import smooth_noise
from PIL import Image, ImageDraw, ImageFont

Points = np.ndarray  # [K, 2] (x, y) in pixels


def fill(size: int, polygons: list[Points], holes: list[Points] | None = None) -> np.ndarray:
    """Coverage `[size, size]` in 0..1 of polygons, antialiased by drawing at twice the size."""
    canvas = Image.new("L", (2 * size, 2 * size))
    draw = ImageDraw.Draw(canvas)
    for points, value in [(p, 255) for p in polygons] + [(p, 0) for p in holes or []]:
        draw.polygon([tuple(p) for p in (points * 2).tolist()], fill=value)
    return np.asarray(canvas.reduce(2), np.float32) / 255


def stroke(size: int, points: Points, width: float) -> np.ndarray:
    """Coverage of a thick line with round ends."""
    canvas = Image.new("L", (2 * size, 2 * size))
    draw = ImageDraw.Draw(canvas)
    draw.line([tuple(p) for p in (points * 2).tolist()], fill=255, width=max(2, round(2 * width)), joint="curve")
    for x, y in (points[0] * 2, points[-1] * 2):
        draw.ellipse([x - width, y - width, x + width, y + width], fill=255)
    return np.asarray(canvas.reduce(2), np.float32) / 255


def place(outline: Points, center: np.ndarray, radius: float, angle: float, aspect: float) -> Points:
    c, s = np.cos(angle), np.sin(angle)
    scaled = outline * (radius * np.array([aspect**0.5, aspect**-0.5]))
    return scaled @ np.array([[c, s], [-s, c]]) + center


OUTLINES = ["ellipse", "blob", "ragged", "polygon", "box", "star"]


def outline(rng: np.random.Generator, organic: bool = False) -> Points:
    """Draw a closed outline of about unit radius: ellipse, blob, polygon or star; if `organic`, mostly round ones."""
    kind = rng.choice(OUTLINES, p=[0.4, 0.4, 0.1, 0.05, 0.05, 0] if organic else [0.15, 0.33, 0.22, 0.12, 0.12, 0.06])
    if kind == "box":
        taper = rng.uniform(0.6, 1.0)
        return np.array([[-1, -1], [1, -1], [taper, 1], [-taper, 1]]) * 0.8
    if kind == "polygon":
        theta = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 9)))
        radii = rng.uniform(0.6, 1.1, len(theta))
    elif kind == "star":
        theta = np.linspace(0, 2 * np.pi, 2 * rng.integers(3, 8), endpoint=False)
        radii = np.where(np.arange(len(theta)) % 2, rng.uniform(0.3, 0.7), 1.0)
    else:
        theta = np.linspace(0, 2 * np.pi, 120, endpoint=False)
        order, amplitude, power = {"ellipse": (1, 0, 1), "blob": (7, 0.55, 1.3), "ragged": (45, 0.4, 1.0)}[str(kind)]
        k = np.arange(2, order + 2)[:, None]
        waves = rng.normal(size=(order, 1)) * np.cos(k * theta + rng.uniform(0, 2 * np.pi, (order, 1)))
        radii = np.exp((waves * amplitude / k**power).sum(0))
    return np.stack([np.cos(theta), np.sin(theta)], -1) * radii[:, None]


Frame = tuple[np.ndarray, float, float, float]  # what `place` takes: center, radius, angle, aspect


@dataclass(frozen=True)
class Part:
    alpha: np.ndarray  # [size, size] in 0..1
    new_color: bool  # or that of the part before it
    tone: float = 1.0  # brightness of this part's surface
    mark: bool = False  # painted on the parts before it, whose it stays
    color: np.ndarray | None = None  # [3] in 0..1 of its surface, or None for one chosen at random


def _at(
    rng: np.random.Generator, size: int, frame: Frame, x: float, y: float, r: float, aspect: float = 1
) -> np.ndarray:
    """A blob at (x, y) of the object's own unit frame."""
    center, radius, angle, stretch = frame
    middle = place(np.array([[x, y]]), center, radius, angle, stretch)[0]
    return fill(size, [place(outline(rng, True), middle, radius * r, angle + rng.normal(0, 0.2), stretch * aspect)])


def _bent(rng: np.random.Generator, frame: Frame, ends: list[tuple[float, float]]) -> Points:
    points = np.array(ends, float)
    t = np.linspace(0, len(points) - 1, 12)
    curve = np.stack([np.interp(t, np.arange(len(points)), points[:, i]) for i in range(2)], -1)
    bend = np.sin(np.linspace(0, np.pi, 12))[:, None] * rng.normal(0, 0.15, 2)
    return place(curve + bend, *frame)


BODIES = ("animal", "person", "building", "tree", "vehicle", "stack")
SHAPES = {
    "single": 0.25, "noise": 0.13, "animal": 0.15, "person": 0.13, "building": 0.06, "tree": 0.06, "vehicle": 0.04,
    "letter": 0.03, "stroke": 0.03, "stack": 0.06, "rocks": 0.06,
}  # fmt: skip


def object_parts(rng: np.random.Generator, size: int, center: np.ndarray, radius: float, kind: str) -> list[Part]:
    """Draw an object of a kind of SHAPES; return its parts in painting order."""
    frame = (center, radius, rng.normal(0, 0.35), float(np.exp(rng.normal(0, 0.35))))
    if kind == "noise":
        y, x = np.mgrid[:size, :size]
        distance = np.hypot(x - center[0], (y - center[1]) * rng.uniform(0.6, 1.6)) / radius
        field = 1 - distance + smooth_noise(rng, size, size, (0.1, 0.6)) * rng.uniform(0.1, 0.4)
        return [Part(np.clip(field * radius / 2 + 0.5, 0, 1).astype(np.float32), True)]
    if kind == "animal":
        side = rng.choice([-1, 1])
        parts = [Part(stroke(size, _bent(rng, frame, [(s, 0.3), (s + rng.normal(0, 0.1), 1.1)]), radius * 0.16), i == 0)
                 for i, s in enumerate(rng.uniform(-0.6, 0.6, rng.integers(2, 5)))]  # fmt: skip
        parts.append(Part(_at(rng, size, frame, 0, 0, 0.62, 1.6), rng.random() < 0.4))
        parts.append(Part(stroke(size, _bent(rng, frame, [(side * 0.5, 0), (side * 0.9, -0.5)]), radius * 0.25), False))
        parts.append(Part(_at(rng, size, frame, side * 1.0, -0.6, 0.3), rng.random() < 0.4))
        return parts
    if kind == "person":
        frame = (center, radius, rng.normal(0, 0.15), rng.uniform(0.5, 0.9))
        legs = [Part(stroke(size, _bent(rng, frame, [(s, 0.2), (s * 1.6, 1.2)]), radius * 0.24), i == 0)
                for i, s in enumerate((-0.2, 0.2))]  # fmt: skip
        arms = [Part(stroke(size, _bent(rng, frame, [(s, -0.4), (s * rng.uniform(1, 2.2), rng.uniform(-0.6, 0.4))]),
                            radius * 0.15), i == 0) for i, s in enumerate((-0.35, 0.35))]  # fmt: skip
        torso = Part(_at(rng, size, frame, 0, -0.15, 0.5, 0.7), True)
        x = rng.normal(0, 0.05)
        head = [Part(_at(rng, size, frame, x, -0.85, 0.24, 0.85), True)]
        if rng.random() < 0.7:  # hair or a hat, now and then a face
            head.insert(int(rng.integers(2)), Part(_at(rng, size, frame, x, -0.98, 0.22, 1.0), True))
            eyes = [_at(rng, size, frame, x + side, -0.87, 0.035) for side in (-0.09, 0.09)]
            head.append(Part(np.maximum(*eyes), True, tone=0.3, mark=True))
        return [*legs, torso, *(arms if rng.random() < 0.7 else []), *head]
    if kind == "building":
        frame = (center, radius, 0.0, frame[3])
        wall = place(np.array([[-0.8, -0.5], [0.8, -0.5], [0.8, 1], [-0.8, 1]]), *frame)
        roof = place(np.array([[-0.95, -0.5], [0.95, -0.5], [rng.uniform(-0.3, 0.5), -1.1]]), *frame)
        columns, rows = rng.integers(2, 6), rng.integers(1, 6)
        windows = [
            place(np.array([[0, 0], [w, 0], [w, h], [0, h]]) * 0.55 + [-0.7 + i * w, -0.4 + j * h], *frame)
            for w, h in [(1.45 / columns, 1.3 / rows)] for i in range(columns) for j in range(rows)
        ]  # fmt: skip
        return [Part(fill(size, [wall]), True), Part(fill(size, [roof]), True), Part(fill(size, windows), True)]
    if kind == "tree":
        trunk = stroke(size, _bent(rng, frame, [(0, 1.2), (0, 0)]), radius * rng.uniform(0.1, 0.3))
        crown = [place(outline(rng), place(np.array([rng.normal(0, 0.4, 2) - [0, 0.4]]), *frame)[0], radius * 0.5, 0, 1)
                 for _ in range(rng.integers(1, 7))]  # fmt: skip
        return [Part(trunk, True), Part(fill(size, crown), True)]
    if kind == "vehicle":
        frame = (center, radius, rng.normal(0, 0.1), rng.uniform(1.0, 2.0))
        profile = [[-1, 0], [-0.5, -0.1], [-0.3, -0.5], [0.5, -0.5], [0.7, 0], [1, 0.1], [1, 0.5], [-1, 0.5]]
        body = place(np.array(profile), *frame)
        wheels = [_at(rng, size, (frame[0], radius, 0, 1), x, 0.4, 0.2) for x in (-0.6, 0.6)]
        glass = place(np.array([[-0.25, -0.4], [0.45, -0.4], [0.55, -0.05], [-0.4, -0.05]]), *frame)
        return [Part(fill(size, [body]), True), Part(fill(size, [glass]), True), Part(np.maximum(*wheels), True)]
    if kind == "letter":
        canvas = Image.new("L", (64, 64))
        glyph = "ABCDEFGHJKLMNPRSTUXYZ23456789&?"[rng.integers(31)]
        ImageDraw.Draw(canvas).text((32, 32), glyph, 255, ImageFont.load_default(60), anchor="mm")
        side = max(4, int(2 * radius))
        glyph_mask = np.asarray(canvas.resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
        alpha = np.zeros((size, size), np.float32)
        x, y = int(center[0] - radius), int(center[1] - radius)
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + side, size), min(y + side, size)
        if x1 > x0 and y1 > y0:
            alpha[y0:y1, x0:x1] = glyph_mask[y0 - y : y1 - y, x0 - x : x1 - x]
        return [Part(alpha, True)]
    if kind == "stroke":
        ends = [tuple(rng.uniform(-1.3, 1.3, 2)) for _ in range(rng.integers(2, 5))]
        return [Part(stroke(size, _bent(rng, frame, ends), radius * rng.uniform(0.08, 0.4)), True)]
    if kind == "rocks":  # touching pieces that share an outline
        whole = fill(size, [place(outline(rng), *frame)])
        y, x = np.mgrid[:size, :size].astype(np.float32)
        seeds = center + rng.normal(0, 0.6, (int(rng.integers(3, 9)), 2)) * radius
        rough = smooth_noise(rng, size, size, (0.1, 0.6)) * radius * rng.uniform(0.02, 0.15)
        nearest = np.argmin([np.hypot(x - sx + rough, y - sy - rough) for sx, sy in seeds], axis=0)
        return [Part(whole * (nearest == i), True) for i in range(len(seeds))]
    if kind == "stack":  # overlapping pieces that make up one thing
        pieces = [
            _at(rng, size, frame, *rng.normal(0, 0.45, 2), rng.uniform(0.3, 0.7)) for _ in range(rng.integers(2, 5))
        ]
        return [Part(piece, i == 0 or rng.random() < 0.6) for i, piece in enumerate(pieces)]
    holes = [place(outline(rng), center, radius * rng.uniform(0.2, 0.5), 0, 1)] if rng.random() < 0.06 else []
    return [Part(fill(size, [place(outline(rng), *frame)], holes), True)]
