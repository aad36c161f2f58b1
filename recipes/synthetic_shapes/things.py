"""Objects with many inner edges: furniture, fences, plants, and outlines of fur or leaves."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw
from shapes import Frame, Part, Points, fill, outline, place, stroke

THINGS = ("cuboid", "table", "shelf", "fence", "plant", "bush", "flower")


def thing(rng: np.random.Generator, size: int, frame: Frame, kind: str) -> list[Part]:
    """Draw an object of a kind of THINGS; return its parts in painting order."""
    return {
        "cuboid": _cuboid, "table": _table, "shelf": _shelf, "fence": _fence, "plant": _plant, "bush": _bush,
        "flower": _flower,
    }[kind](rng, size, frame)  # fmt: skip


def _upright(frame: Frame, aspect: float) -> Frame:
    return frame[0], frame[1], 0.0, aspect


def _faces(rng: np.random.Generator, box: tuple[float, float, float, float], depth: float) -> list[Points]:
    """Front, side and top of a box (x0, y0, x1, y1), seen from a little above and beside, in the unit frame."""
    x0, y0, x1, y1 = box
    dx, dy = depth * rng.choice([-1, 1]), -depth * rng.uniform(0.2, 0.8)
    front = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    edge = front[[1, 2]] if dx > 0 else front[[0, 3]]
    side = np.concatenate([edge, edge[::-1] + [dx, dy]])
    top = np.concatenate([front[[0, 1]], front[[1, 0]] + [dx, dy]])
    return [front, side, top]


def _solid(
    rng: np.random.Generator, size: int, frame: Frame, box: tuple[float, float, float, float], new_color: bool
) -> list[Part]:
    tones = rng.permutation([1.0, rng.uniform(0.5, 0.85), rng.uniform(1.1, 1.4)])
    faces = _faces(rng, box, rng.uniform(0.15, 0.6))
    return [
        Part(fill(size, [place(face, *frame)]), new_color and i == 0, tone=float(tone))
        for i, (face, tone) in enumerate(zip(faces, tones, strict=True))
    ]


def _cuboid(rng: np.random.Generator, size: int, frame: Frame) -> list[Part]:
    frame = (frame[0], frame[1], rng.normal(0, 0.15), frame[3])
    return _solid(rng, size, frame, (-0.7, -0.5, 0.7, 0.8), True)


def _table(rng: np.random.Generator, size: int, frame: Frame) -> list[Part]:
    """A table, or with a back a chair."""
    frame = _upright(frame, rng.uniform(0.7, 1.6))
    width = frame[1] * rng.uniform(0.06, 0.2)
    feet = [(x, rng.uniform(0.75, 1.0)) for x in (-0.75, -0.45, 0.5, 0.8)]
    legs = [Part(stroke(size, place(np.array([[x, 0], [x, y]]), *frame), width), i == 0, tone=rng.uniform(0.6, 1))
            for i, (x, y) in enumerate(feet)]  # fmt: skip
    back = []
    if rng.random() < 0.4:
        panel = np.array([[-0.8, -1.1], [0.8, -1.1], [0.8, -0.1], [-0.8, -0.1]]) + rng.normal(0, 0.06, (4, 2))
        back = [Part(fill(size, [place(panel, *frame)]), True)]
    return [*legs, *back, *_solid(rng, size, frame, (-0.9, -0.1, 0.9, rng.uniform(0, 0.2)), rng.random() < 0.5)]


def _shelf(rng: np.random.Generator, size: int, frame: Frame) -> list[Part]:
    """A frame of boards with contents in some of its fields: a facade, a bookcase, a window."""
    frame = _upright(frame, rng.uniform(0.6, 1.5))
    columns, rows, board = rng.integers(1, 6), rng.integers(1, 6), rng.uniform(0.04, 0.12)
    w, h = (2 - board) / columns, (2 - board) / rows
    cell = np.array([[board, board], [w, board], [w, h], [board, h]])
    fields = [cell + [-1 + i * w, -1 + j * h] for i in range(columns) for j in range(rows)]
    whole = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    parts = [
        Part(fill(size, [place(whole, *frame)]), True),
        Part(fill(size, [place(f, *frame) for f in fields]), True, tone=rng.uniform(0.4, 1)),
    ]
    held = [place((f - f.mean(0)) * rng.uniform(0.4, 0.9, 2) + f.mean(0), *frame) for f in fields if rng.random() < 0.6]
    return [*parts, Part(fill(size, held), True)] if held else parts


def _fence(rng: np.random.Generator, size: int, frame: Frame) -> list[Part]:
    frame = _upright(frame, rng.uniform(1, 3))
    count, width = rng.integers(4, 16), rng.uniform(0.15, 0.6)
    posts = []
    half = width / count
    for x in np.linspace(-1, 1, count):
        post = np.array([[x - half, -0.8], [x, -1], [x + half, -0.8], [x + half, 1], [x - half, 1]])
        posts.append(place(post, *frame))
    rails = [place(np.array([[-1.05, y], [1.05, y], [1.05, y + 0.1], [-1.05, y + 0.1]]), *frame) for y in (-0.5, 0.4)]
    return [Part(fill(size, posts + rails), True)]


def _plant(rng: np.random.Generator, size: int, frame: Frame) -> list[Part]:
    """Long leaves or stalks from one foot, now and then in a pot."""
    frame = _upright(frame, frame[3])
    count, spread = rng.integers(6, 40), rng.uniform(0.3, 1.2)
    width = rng.uniform(0.02, 0.14)
    leaves = []
    t = np.linspace(0, 1, 10)[:, None]
    for angle in rng.normal(-np.pi / 2, spread * 0.6, count):
        tip = rng.uniform(0.8, 1.6) * np.array([np.cos(angle), np.sin(angle)])
        droop = np.array([0.0, rng.uniform(-0.1, 0.6)])
        spine = np.array([0, 0.6]) + tip * t + droop * t**2
        across = np.array([-np.sin(angle), np.cos(angle)]) * width * np.sin(np.pi * np.clip(t, 0.05, 1))
        leaves.append(place(np.concatenate([spine - across, (spine + across)[::-1]]), *frame))
    parts = [Part(fill(size, leaves), True)]
    if rng.random() < 0.4:
        pot = np.array([[-0.4, 0.5], [0.4, 0.5], [0.3, 1.1], [-0.3, 1.1]]) * [rng.uniform(0.6, 1.4), 1]
        parts.append(Part(fill(size, [place(pot, *frame)]), True))
    return parts


def _bush(rng: np.random.Generator, size: int, frame: Frame) -> list[Part]:
    """A crown of single leaves, dense in the middle."""
    leaf = rng.uniform(0.04, 0.16)
    count = int(np.clip(2.5 / leaf**2, 100, 900))
    where = rng.normal(0, 0.42, (count, 2)) if rng.random() < 0.5 else rng.uniform(-0.8, 0.8, (count, 2))
    shape = np.array([[-1, 0], [-0.3, -0.45], [1, 0], [-0.3, 0.45]]) * leaf
    angles = rng.uniform(0, 2 * np.pi, count)
    c, s = np.cos(angles), np.sin(angles)
    turns = np.stack([np.stack([c, s], -1), np.stack([-s, c], -1)], 1)
    parts = [Part(fill(size, [place(p, *frame) for p in shape @ turns + where[:, None]]), True)]
    if rng.random() < 0.4:
        trunk = stroke(size, place(np.array([[0, 0.3], [rng.normal(0, 0.1), 1.3]]), *frame), frame[1] * 0.12)
        parts.insert(0, Part(trunk, True))
    return parts


def _flower(rng: np.random.Generator, size: int, frame: Frame) -> list[Part]:
    count, length = rng.integers(4, 30), rng.uniform(0.5, 1)
    width = min(0.5, 3 / count) * rng.uniform(0.5, 1)
    petals = []
    for angle in np.linspace(0, 2 * np.pi, count, endpoint=False) + rng.normal(0, 0.08, count):
        c, s = np.cos(angle), np.sin(angle)
        petal = np.array([[0, 0], [0.5, -width / 2], [1, 0], [0.5, width / 2]]) * [length, 1]
        petals.append(place(petal @ np.array([[c, s], [-s, c]]), *frame))
    heart = place(outline(rng, True) * rng.uniform(0.12, 0.4), *frame)
    stem = stroke(size, place(np.array([[0, 0], [rng.normal(0, 0.2), 2.0]]), *frame), frame[1] * 0.06)
    parts = [Part(fill(size, petals), True), Part(fill(size, [heart]), True)]
    return [Part(stem, True), *parts] if rng.random() < 0.5 else parts


def marks(rng: np.random.Generator, size: int, outline_alpha: np.ndarray, frame: Frame) -> list[Part]:
    """Draw marks on an object that are no targets: spots, stripes, seams, pockets, letters."""
    parts = []
    for i in range(int(rng.integers(1, 6))):
        middle = place(np.array([rng.normal(0, 0.4, 2)]), *frame)[0]
        reach = frame[1] * np.exp(rng.uniform(np.log(0.05), np.log(0.5)))
        if rng.random() < 0.4:
            ends = middle + rng.normal(0, 1, (int(rng.integers(2, 4)), 2)) * reach
            alpha = stroke(size, ends, reach * rng.uniform(0.05, 0.3))
        else:
            alpha = fill(
                size, [place(outline(rng), middle, reach, rng.uniform(0, 3), float(np.exp(rng.normal(0, 0.5))))]
            )
        parts.append(Part(alpha * outline_alpha, i == 0 or rng.random() < 0.5, mark=True))
    return parts


def fringed(rng: np.random.Generator, alpha: np.ndarray, radius: float) -> np.ndarray:
    """Add fur, feathers or leaves that stand out from an outline."""
    size = len(alpha)
    inside = alpha > 0.5
    edge = inside & ~(np.roll(inside, 1, 0) & np.roll(inside, -1, 0) & np.roll(inside, 1, 1) & np.roll(inside, -1, 1))
    rows, columns = np.nonzero(edge)
    if len(rows) < 8:
        return alpha
    length = radius * np.exp(rng.uniform(np.log(0.03), np.log(0.25)))
    chosen = rng.integers(len(rows), size=int(min(1500, len(rows) * rng.uniform(0.3, 1.5))))
    step = max(1, round(length / 4))
    soft = np.pad(alpha, step, mode="edge")
    y, x = rows[chosen] + step, columns[chosen] + step
    out = np.stack([soft[y, x - step] - soft[y, x + step], soft[y - step, x] - soft[y + step, x]], -1)
    out = out / (np.linalg.norm(out, axis=1, keepdims=True) + 1e-3) + rng.normal(0, 0.5, 2)  # combed one way
    ends = out * (length * rng.uniform(0.3, 1.2, len(chosen)))[:, None] + rng.normal(0, 0.15, out.shape) * length
    canvas = Image.fromarray((alpha * 255).astype(np.uint8)).resize((2 * size, 2 * size), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(canvas)
    width = int(np.clip(rng.uniform(0.1, 0.4) * length, 1, 5))
    for cx, cy, (dx, dy) in zip(columns[chosen], rows[chosen], ends, strict=True):
        pen.line([(2 * cx, 2 * cy), (2 * (cx + dx), 2 * (cy + dy))], fill=255, width=width)
    return np.asarray(canvas.reduce(2), np.float32) / 255
