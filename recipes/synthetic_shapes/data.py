"""Rendered scenes on disk, and training samples drawn from them: crops, colors, targets and prompts. No torch here."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scenes import render_scene
from scipy import ndimage

MIN_AREA, MAX_AREA = 0.001, 0.7  # of a target, as a share of the image without its padding
MIN_PIXELS = 196  # of a target: a smaller one has under 4 x 4 pixels in the low-resolution mask
PADDING = (124, 116, 104)  # becomes zero when normalized, as the padding of `transforms.preprocess`
NOT_A_POINT, ABSENT = -1, -2  # labels: SAM's padding point after a prompt without a box; no token, as in the package
MOST_TOKENS = 4
BOX, CLICK, STUFF, STUFF_BOX = 0, 1, 2, 3  # a box on a thing, clicks on a thing, clicks on stuff, a box on stuff
KINDS = (0.38, 0.30, 0.24, 0.08)  # shares of the prompts; more boxes on stuff teach to fill the background of a box
FILLED = 0.5  # least share of its box that boxed stuff covers; stuff that covers less gets clicks
WHOLE = 0.8  # share of prompted things that do not touch the frame, and of windows placed around such a thing
OBJECTS = 0.6  # share of prompted things that are whole objects; the others may be parts or groups
PAIRED = 0.5  # share of clicks on stuff that lie in the box of a prompted thing, where the box's answer is the thing
SIZES = (0.01, 0.1)  # bounds between small, medium and large things, as shares of the image
SIZE_SHARES = {BOX: (0.1, 0.5, 0.4), CLICK: (0.5, 0.3, 0.2)}  # small, medium, large; in use, small boxes are zoomed to
ZOOMED = 0.4  # share of windows as `Predictor.predict` takes them for a small box
ZOOM = (2.5, 5.0)  # sides of such a window, in longer sides of the thing in its middle
SMALLEST_ZOOMED = 16  # longer side in pixels of such a thing; smaller ones would be blurs


def render_all(folder: Path, count: int, size: int, seed: int, workers: int, drawings: Path | None = None) -> None:
    """Render `count` scenes of `size` pixels into shards of 250 in `folder`; keep finished shards.

    Raises:
        ValueError: the folder holds scenes of another size or seed, or of another version of the scripts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "000000.json").exists():
        there = np.load(folder / "000000.images.npy", mmap_mode="r")[0]
        if not np.array_equal(there, render_scene(np.random.default_rng([seed, 0]), size, drawings).image):
            raise ValueError(f"{folder} holds scenes of another size, seed or version of these scripts: take another")
    shards = [(folder, first, min(250, count - first), size, seed, drawings) for first in range(0, count, 250)]
    start = time.time()
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        for done, _ in enumerate(pool.imap(_render_shard, shards), 1):
            print(f"rendered {done}/{len(shards)} shards, {time.time() - start:.0f} s", file=sys.stderr, flush=True)


def _render_shard(job: tuple[Path, int, int, int, int, Path | None]) -> None:
    folder, first, count, size, seed, drawings = job
    name = folder / f"{first:06d}"
    if name.with_suffix(".json").exists() and len(json.loads(name.with_suffix(".json").read_text())) >= count:
        return
    images = np.empty((count, size, size, 3), np.uint8)
    layers = np.empty((count, size, size), np.uint8)
    targets = []
    for i in range(count):
        scene = render_scene(np.random.default_rng([seed, first + i]), size, drawings)
        images[i], layers[i] = scene.image, scene.layers
        parts = [[int(part) for part in target] for target in scene.targets]
        targets.append({"targets": parts, "objects": sorted(scene.objects), "stuff": sorted(map(int, scene.stuff))})
    np.save(name.with_suffix(".images.npy"), images)
    np.save(name.with_suffix(".layers.npy"), layers)
    name.with_suffix(".json").write_text(json.dumps(targets))  # written last: it marks the shard as finished


@dataclass(frozen=True)
class Sample:
    """One image with N prompts; or a batch of them, with B in front of every shape.

    Attributes:
        image: `[H, W, 3]` uint8.
        masks: `[N, H, W]` bool.
        coords: `[N, M, 2]` float32 (x, y): points, then the corners of a box or one that stands for no box.
        labels: `[N, M]` int64: 0, 1, box corners 2 and 3, NOT_A_POINT, and ABSENT to fill up with.
    """

    image: np.ndarray
    masks: np.ndarray
    coords: np.ndarray
    labels: np.ndarray


Window = tuple[slice, slice]  # rows and columns


class Candidate(NamedTuple):
    """A target that a window shows well enough to be prompted.

    Attributes:
        parts: its visible parts.
        area: share of the window.
        stuff: True for ground, sky and walls, False for things.
        object: True for a whole object, False for parts and groups.
        whole: True if it does not touch the window's edge.
        filled: share of its bounding box.
    """

    parts: tuple[int, ...]
    area: float
    stuff: bool
    object: bool
    whole: bool
    filled: float


class View(NamedTuple):
    """A window of a scene and the targets to prompt in it.

    Attributes:
        image: `[h, w, 3]` uint8, not padded.
        layers: `[h, w]` uint8.
        chosen: each with True if a box is to prompt it.
    """

    image: np.ndarray
    layers: np.ndarray
    chosen: list[tuple[Candidate, bool]]

    def mask(self, candidate: Candidate) -> np.ndarray:
        """Mask `[h, w]` bool of a target."""
        table = np.zeros(256, bool)
        table[list(candidate.parts)] = True
        return table[self.layers]


class Labeled(NamedTuple):
    """A folder of labeled images: what `benchmarks.masks.accuracy` reads. Every target counts as a whole thing.

    Attributes:
        entries: its images.
        size: longer side to which images are resized.
    """

    entries: Sequence[Any]
    size: int

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Image `[h, w, 3]` uint8, layers `[h, w]` uint8, and the targets as sets of layers."""
        photograph = self.entries[number].read()
        H, W = photograph.image.shape[:2]
        scale = self.size / max(H, W)
        size = (max(1, round(W * scale)), max(1, round(H * scale)))
        layers, targets = layers_of([target.mask for target in photograph.targets], (H, W))
        image = np.asarray(Image.fromarray(photograph.image).resize(size, Image.Resampling.BILINEAR))
        layers = np.asarray(Image.fromarray(layers).resize(size, Image.Resampling.NEAREST))
        return image, layers, {"targets": targets, "objects": list(range(len(targets))), "stuff": [0]}


def layers_of(masks: Sequence[np.ndarray], shape: tuple[int, int]) -> tuple[np.ndarray, list[list[int]]]:
    """Divide masks that may overlap into layers `[H, W]` uint8, and give each mask as a list of layers.

    Layer 0 is in no mask. Masks that would need more than 255 layers are left out.
    """
    layers, targets = np.zeros(shape, np.uint8), []
    for mask in masks:
        inside, outside = np.unique(layers[mask]).tolist(), set(np.unique(layers[~mask]).tolist())
        cut = [layer for layer in inside if layer == 0 or layer in outside]
        if int(layers.max()) + len(cut) > 255:
            continue
        parts = [layer for layer in inside if layer not in cut]
        for layer in cut:
            new = int(layers.max()) + 1
            parts.append(new)
            layers[mask & (layers == layer)] = new
            for target in targets:
                if layer in target:
                    target.append(new)
        targets.append(parts)
    return layers, targets


class Scenes:
    """Samples by number and image size; these and the seed decide what is drawn.

    Args:
        folders: folders of rendered scenes.
        prompts: prompts per image.
        seed: of the order, windows and prompts.
        labeled: labeled images to draw from, too.
        share: share of the samples that are labeled images.
    """

    def __init__(
        self,
        folders: Path | Sequence[Path],
        prompts: int,
        seed: int,
        labeled: Sequence[Labeled] = (),
        share: float = 0.0,
    ) -> None:
        self.prompts, self.seed, self.share = prompts, seed, share
        self.labeled = [(images, i) for images in labeled for i in range(len(images))]
        self.shards = []
        for folder in [folders] if isinstance(folders, Path) else folders:
            files = sorted(folder.glob("*.json"))
            if not files:
                raise FileNotFoundError(f"no rendered scenes in {folder}: run with --render first")
            for file in files:
                images = np.load(file.with_suffix(".images.npy"), mmap_mode="r")
                layers = np.load(file.with_suffix(".layers.npy"), mmap_mode="r")
                self.shards.append((images, layers, json.loads(file.read_text())))
        self.index = [(s, i) for s, shard in enumerate(self.shards) for i in range(len(shard[0]))]

    def __len__(self) -> int:
        return len(self.index)

    def view(self, number: int, size: tuple[int, int]) -> View:
        """Draw the window and the targets of a sample."""
        return self._view(np.random.default_rng([self.seed, 2, number]), number, size)

    def _view(self, rng: np.random.Generator, number: int, size: tuple[int, int]) -> View:
        if self.labeled and rng.random() < self.share:
            images, i = self.labeled[int(rng.integers(len(self.labeled)))]
            read = images.__getitem__
        else:
            epoch, position = divmod(number, len(self.index))
            order = np.random.default_rng([self.seed, 1, epoch]).permutation(len(self.index))
            shard, i = self.index[order[position]]
            images, layers, scenes = self.shards[shard]

            def read(i: int) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
                return images[i], layers[i], scenes[i]

        while True:
            image, there, scene = read(i)
            image, visible = _crop(rng, image, there, scene, size)
            if candidates := _candidates(visible, scene):
                return View(image, visible, _choose(rng, candidates, self.prompts))
            i = int(rng.integers(len(images)))

    def sample(self, number: int, size: tuple[int, int]) -> Sample:
        rng = np.random.default_rng([self.seed, 2, number])
        view = self._view(rng, number, size)
        masks = np.stack([view.mask(candidate) for candidate, _ in view.chosen])
        drawn = [
            _prompt(rng, mask, boxed, self._paired(rng, masks, view.chosen) if candidate.stuff else None)
            for mask, (candidate, boxed) in zip(masks, view.chosen, strict=True)
        ]
        coords = np.zeros((len(drawn), MOST_TOKENS, 2), np.float32)
        labels = np.full((len(drawn), MOST_TOKENS), ABSENT)
        for n, (places, meanings) in enumerate(drawn):
            coords[n, : len(places)], labels[n, : len(places)] = places, meanings
        h, w = view.layers.shape
        padded = np.full((*size, 3), PADDING, np.uint8)
        padded[:h, :w] = _recolor(rng, view.image)
        return Sample(padded, np.pad(masks, ((0, 0), (0, size[0] - h), (0, size[1] - w))), coords, labels)

    def _paired(
        self, rng: np.random.Generator, masks: np.ndarray, chosen: list[tuple[Candidate, bool]]
    ) -> Window | None:
        """Return rows and columns of a boxed thing for a click on stuff, or None."""
        boxed = [mask for mask, (c, box) in zip(masks, chosen, strict=True) if box and not c.stuff]
        if not boxed or rng.random() >= PAIRED:
            return None
        mask = boxed[int(rng.integers(len(boxed)))]
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)

    def batch(self, first: int, count: int, size: tuple[int, int]) -> Sample:
        samples = [self.sample(first + i, size) for i in range(count)]
        return Sample(*(np.stack([getattr(s, f.name) for s in samples]) for f in fields(Sample)))


def _crop(
    rng: np.random.Generator, image: np.ndarray, layers: np.ndarray, scene: dict[str, Any], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Cut a window out of a scene; return its image `[h, w, 3]` and layers `[h, w]`, which fit into `size`.

    Some windows lie around a small thing and are enlarged, as the predictors zoom. The others are seldom enlarged, and
    then little, because a photograph at that size is sharp; above the scene's size all are. They have the shape of
    `size`; in a square, mostly that of a landscape or portrait, which leaves padding. Most hold one thing whole, chosen
    at random.
    """
    side, ratio = max(size), min(size) / max(size)
    wide = size[1] > size[0] if ratio < 1 else rng.random() < 0.65
    boxes = ndimage.find_objects(layers.astype(np.int16) + 1)
    window = _zoomed(rng, boxes, layers.shape, scene, size) if rng.random() < ZOOMED else None
    if window is None:
        if ratio == 1 and rng.random() < 0.7:
            ratio = rng.uniform(0.55, 0.85)
        longer = max(layers.shape) * rng.uniform(float(np.clip(0.8 * side / max(layers.shape), 0.5, 0.8)), 1)
        shorter = longer * ratio * float(np.exp(rng.uniform(-0.15, 0.15)))  # slightly stretched
        sides = (shorter, longer) if wide else (longer, shorter)
        fit = min(1.0, *(there / wanted for there, wanted in zip(layers.shape, sides, strict=True)))
        window = _around_a_thing(rng, boxes, layers.shape, scene, [max(1, int(fit * length)) for length in sides])
        width, height = (side, round(side * ratio)) if wide else (round(side * ratio), side)
    else:
        height, width = size
    flip = slice(None, None, -1 if rng.random() < 0.5 else 1)
    image = np.asarray(Image.fromarray(image[window]).resize((width, height), Image.Resampling.BILINEAR))[:, flip]
    layers = np.asarray(Image.fromarray(layers[window]).resize((width, height), Image.Resampling.NEAREST))[:, flip]
    return image, layers


def _around_a_thing(
    rng: np.random.Generator,
    boxes: list[Window | None],
    shape: tuple[int, int],
    scene: dict[str, Any],
    sides: list[int],
) -> Window:
    """Place a window of given height and width, in most cases so that it holds one thing whole."""
    focus = None
    if rng.random() < WHOLE:
        spans = [
            span
            for span in _whole_things(boxes, shape, scene)
            if all(part.stop - part.start + 2 <= length for part, length in zip(span, sides, strict=True))
        ]
        focus = spans[int(rng.integers(len(spans)))] if spans else None
    found = []
    for axis, length in enumerate(sides):
        first, last = 0, shape[axis] - length
        if focus:
            first, last = max(first, focus[axis].stop + 1 - length), min(last, focus[axis].start - 1)
        start = int(rng.integers(first, last + 1))
        found.append(slice(start, start + length))
    return found[0], found[1]


def _zoomed(
    rng: np.random.Generator,
    boxes: list[Window | None],
    shape: tuple[int, int],
    scene: dict[str, Any],
    size: tuple[int, int],
) -> Window | None:
    """Place a window around a whole thing as `predictor.zoom` does, with a varied margin; None if no thing fits."""
    spans = _whole_things(boxes, shape, scene)
    longest = [max(part.stop - part.start for part in span) for span in spans]
    fitting = [i for i, n in enumerate(longest) if n >= SMALLEST_ZOOMED and n * ZOOM[0] <= min(shape)]
    if not fitting:
        return None
    span = spans[fitting[int(rng.integers(len(fitting)))]]
    extent = [part.stop - part.start for part in span]
    longer = min(max(extent) * float(np.exp(rng.uniform(*np.log(ZOOM)))), min(shape))
    sides = [longer * length / max(size) for length in size]
    wider = max(1.0, *(part / side for part, side in zip(extent, sides, strict=True)))
    sides = [int(min(side * wider, length)) for side, length in zip(sides, shape, strict=True)]
    starts = [
        int(np.clip((part.start + part.stop - side) // 2, 0, length - side))
        for part, side, length in zip(span, sides, shape, strict=True)
    ]
    rows, columns = (slice(start, start + side) for start, side in zip(starts, sides, strict=True))
    return rows, columns


def _whole_things(boxes: list[Window | None], shape: tuple[int, int], scene: dict[str, Any]) -> list[Window]:
    """Rows and columns of the scene's things that do not touch its frame."""
    stuff, found = set(scene["stuff"]), []
    for target in scene["targets"]:
        parts = [boxes[part] for part in target if part < len(boxes) and boxes[part]]
        if not parts or stuff.issuperset(target):
            continue
        rows, columns = _union(parts)
        if min(rows.start, columns.start) > 0 and rows.stop < shape[0] and columns.stop < shape[1]:
            found.append((rows, columns))
    return found


def _union(windows: Iterable[Window]) -> Window:
    """The smallest window that holds all of them."""
    rows, columns = (
        slice(min(s.start for s in spans), max(s.stop for s in spans)) for spans in zip(*windows, strict=True)
    )
    return rows, columns


def _candidates(layers: np.ndarray, scene: dict[str, Any]) -> list[Candidate]:
    """The distinct targets of a window that are neither too small nor too large."""
    areas = np.bincount(layers.ravel(), minlength=256)
    edge = set(np.concatenate([layers[0], layers[-1], layers[:, 0], layers[:, -1]]).tolist())
    stuff, found = set(scene["stuff"]), {}
    boxes = ndimage.find_objects(layers.astype(np.int16) + 1)
    for number, target in enumerate(scene["targets"]):
        parts = tuple(sorted(part for part in target if areas[part]))
        area = int(areas[list(parts)].sum())
        if max(MIN_PIXELS, MIN_AREA * layers.size) <= area <= MAX_AREA * layers.size:
            is_object = number in scene["objects"] or (parts in found and found[parts].object)
            of_stuff, whole = stuff.issuperset(parts), edge.isdisjoint(parts)
            rows, columns = _union(boxes[part] for part in parts)
            filled = area / ((rows.stop - rows.start) * (columns.stop - columns.start))
            found[parts] = Candidate(parts, area / layers.size, of_stuff, is_object, whole, filled)
    return list(found.values())


def _choose(rng: np.random.Generator, candidates: list[Candidate], count: int) -> list[tuple[Candidate, bool]]:
    """Draw `count` targets, each with True if a box is to prompt it; things first. Targets may come again."""
    things = [c for c in candidates if not c.stuff]
    stuff = [c for c in candidates if c.stuff]
    chosen: list[tuple[Candidate, bool]] = []
    for kind in np.sort(rng.choice(4, count, p=KINDS)).tolist():
        of_stuff = (kind in (STUFF, STUFF_BOX) and bool(stuff)) or not things
        if of_stuff:
            left = [c for c in stuff if c.filled >= FILLED] if kind == STUFF_BOX else stuff
            kind = kind if left else STUFF
            left = left or stuff
        else:
            kind = min(kind, CLICK)
            size = int(rng.choice(3, p=SIZE_SHARES[kind]))
            whole = bool(rng.random() < WHOLE)
            left = [c for c in things if c.whole == whole] or things
            if rng.random() < OBJECTS:
                left = [c for c in left if c.object] or left
            left = [c for c in left if int(np.digitize(c.area, SIZES)) == size] or left
        taken = {c.parts for c, _ in chosen}
        left = [c for c in left if c.parts not in taken] or left
        chosen.append((left[int(rng.integers(len(left)))], kind == (STUFF_BOX if of_stuff else BOX)))
    return chosen


def _recolor(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Give each channel a random gain and offset, and make one image in twelve gray."""
    values = image.astype(np.float32)
    if rng.random() < 0.08:
        values[:] = values.mean(2, keepdims=True)
    values = values * rng.normal(1, 0.12, 3).clip(0.6, 1.4) + rng.normal(0, 10, 3)
    return values.clip(0, 255).astype(np.uint8)


def _prompt(
    rng: np.random.Generator, mask: np.ndarray, boxed: bool, within: Window | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Draw points and labels of a prompt: a box, one time in ten with a click; or one to three clicks.

    The first click lies in the window `within`, if the target reaches into it.
    """
    if boxed:
        box = _jittered_box(rng, mask).reshape(2, 2)
        if rng.random() < 0.9:
            return box, np.array([2, 3])
        points, labels = _points(rng, mask, 1)
        return np.concatenate([points, box]), np.append(labels, [2, 3])
    points, labels = _points(rng, mask, int(rng.choice([1, 2, 3], p=[0.8, 0.1, 0.1])))
    if within is not None and mask[within].any():
        y, x = np.argwhere(mask[within])[int(rng.integers(mask[within].sum()))]
        points[0] = x + within[1].start, y + within[0].start
    return np.concatenate([points, [[0, 0]]]), np.append(labels, NOT_A_POINT)


def _jittered_box(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)
    sides = np.tile(box[2:] - box[:2], 2)
    noise = rng.normal(0, 0.03, 4).clip(-0.1, 0.1) * (rng.random() < 0.6)
    return (box + noise * sides).clip(0, np.tile(mask.shape[::-1], 2)).astype(np.float32)


def _points(rng: np.random.Generator, mask: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw points: the first inside, mostly at the most interior pixel; further ones may be background."""
    inside = np.flatnonzero(mask)
    picked = [int(rng.choice(inside))]
    if rng.random() < 0.7:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        step = max(1, max(part.shape) // 96)  # a distance transform at reduced size is exact enough
        depth = ndimage.distance_transform_edt(np.pad(part[::step, ::step], 1))[1:-1, 1:-1]
        y, x = np.unravel_index(int(depth.argmax()), depth.shape)
        y, x = rows[0] + y * step, columns[0] + x * step
        if mask[y, x]:
            picked = [int(y * mask.shape[1] + x)]
    labels = [1]
    for _ in range(count - 1):
        label = int(rng.random() < 0.5)
        picked.append(int(rng.choice(inside if label else np.flatnonzero(~mask))))
        labels.append(label)
    y, x = np.unravel_index(picked, mask.shape)
    return np.stack([x, y], -1).astype(np.float32), np.array(labels, np.int64)
