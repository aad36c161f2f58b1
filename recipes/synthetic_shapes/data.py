"""Rendered scenes on disk, and training samples drawn from them: crops, colours, targets and prompts. No torch here."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from PIL import Image
from scenes import render_scene
from scipy import ndimage

MIN_AREA, MAX_AREA = 0.006, 0.7  # of a target: of the padded picture, and of what is not padding
PADDING = (124, 116, 104)  # what normalisation makes zero, as `transforms.preprocess` pads with
NOT_A_POINT, ABSENT = -1, -2  # labels: SAM's padding point, which a prompt without a box ends with; and nothing at all
MOST_TOKENS = 4
BOXES = 0.4  # share of the prompts: on targets of any size alike
SMALL_OFTENER = -0.2  # a target is clicked in proportion to this power of its area: half of them are below 6 %, as half
# of what people outline in photographs is (the regions of BSDS500)


def render_all(folder: Path, count: int, size: int, seed: int, workers: int) -> None:
    """Render `count` scenes of `size` pixels into shards of 250 below `folder`; whole shards that are there are kept.

    Raises:
        ValueError: those that are there are of another size or seed, or drawn by other scripts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "000000.json").exists():
        there = np.load(folder / "000000.images.npy", mmap_mode="r")[0]
        if not np.array_equal(there, render_scene(np.random.default_rng([seed, 0]), size).image):
            raise ValueError(f"{folder} holds scenes of another size, seed or version of these scripts: take another")
    shards = [(folder, first, min(250, count - first), size, seed) for first in range(0, count, 250)]
    start = time.time()
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        for done, _ in enumerate(pool.imap(_render_shard, shards), 1):
            print(f"rendered {done}/{len(shards)} shards, {time.time() - start:.0f} s", file=sys.stderr, flush=True)


def _render_shard(job: tuple[Path, int, int, int, int]) -> None:
    folder, first, count, size, seed = job
    name = folder / f"{first:06d}"
    if name.with_suffix(".json").exists() and len(json.loads(name.with_suffix(".json").read_text())) >= count:
        return
    images = np.empty((count, size, size, 3), np.uint8)
    layers = np.empty((count, size, size), np.uint8)
    targets = []
    for i in range(count):
        scene = render_scene(np.random.default_rng([seed, first + i]), size)
        images[i], layers[i] = scene.image, scene.layers
        targets.append([[int(part) for part in target] for target in scene.targets])
    np.save(name.with_suffix(".images.npy"), images)
    np.save(name.with_suffix(".layers.npy"), layers)
    name.with_suffix(".json").write_text(json.dumps(targets))  # last: it marks the shard as whole


@dataclass(frozen=True)
class Sample:
    """One picture with N prompts; stacked, a batch of them, with B in front of every shape.

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


class Scenes:
    """Samples by number and size of the picture: these alone decide what is drawn, so a run can be resumed anywhere."""

    def __init__(self, folder: Path, prompts: int, seed: int) -> None:
        self.prompts, self.seed = prompts, seed
        self.shards = []
        for file in sorted(folder.glob("*.json")):
            images = np.load(file.with_suffix(".images.npy"), mmap_mode="r")
            layers = np.load(file.with_suffix(".layers.npy"), mmap_mode="r")
            self.shards.append((images, layers, json.loads(file.read_text())))
        if not self.shards:
            raise FileNotFoundError(f"no rendered scenes in {folder}: run with --render first")
        self.index = [(s, i) for s, shard in enumerate(self.shards) for i in range(len(shard[0]))]

    def __len__(self) -> int:
        return len(self.index)

    def sample(self, number: int, size: tuple[int, int]) -> Sample:
        epoch, position = divmod(number, len(self.index))
        order = np.random.default_rng([self.seed, 1, epoch]).permutation(len(self.index))
        rng = np.random.default_rng([self.seed, 2, number])
        shard, i = self.index[order[position]]
        images, layers, targets = self.shards[shard]
        while True:
            image, masks = _crop(rng, images[i], layers[i], targets[i], size)
            if len(masks):
                break
            i = int(rng.integers(len(images)))
        boxes = int((rng.random(self.prompts) < BOXES).sum())
        areas = masks.mean((1, 2))
        chosen = np.append(
            _choice(rng, np.ones_like(areas), boxes), _choice(rng, areas**SMALL_OFTENER, self.prompts - boxes)
        )
        masks = masks[chosen]
        drawn = [_prompt(rng, mask, boxed=i < boxes) for i, mask in enumerate(masks)]
        coords = np.zeros((len(drawn), MOST_TOKENS, 2), np.float32)
        labels = np.full((len(drawn), MOST_TOKENS), ABSENT)
        for i, (places, meanings) in enumerate(drawn):
            coords[i, : len(places)], labels[i, : len(places)] = places, meanings
        h, w = masks.shape[1:]
        padded = np.full((*size, 3), PADDING, np.uint8)
        padded[:h, :w] = _recolour(rng, image)
        return Sample(padded, np.pad(masks, ((0, 0), (0, size[0] - h), (0, size[1] - w))), coords, labels)

    def batch(self, first: int, count: int, size: tuple[int, int]) -> Sample:
        samples = [self.sample(first + i, size) for i in range(count)]
        return Sample(*(np.stack([getattr(s, f.name) for s in samples]) for f in fields(Sample)))


def _crop(
    rng: np.random.Generator, image: np.ndarray, layers: np.ndarray, targets: list[list[int]], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """A window of the scene that fits into `size` (height, width), and the targets visible in it.

    It has the shape of `size`; in a square, mostly that of a landscape or portrait, which one side is then too long
    for. Windows are seldom enlarged, and then little, for a photograph at that size is sharp; but at sizes above the
    scene's all are.
    """
    side, ratio = max(size), min(size) / max(size)
    wide = size[1] > size[0] if ratio < 1 else rng.random() < 0.65
    if ratio == 1 and rng.random() < 0.7:
        ratio = rng.uniform(0.55, 0.85)
    longer = len(image) * rng.uniform(float(np.clip(0.8 * side / len(image), 0.5, 0.8)), 1)
    shorter = min(len(image), longer * ratio * float(np.exp(rng.uniform(-0.15, 0.15))))  # somewhat squeezed
    h, w = (int(n) for n in ((shorter, longer) if wide else (longer, shorter)))
    y, x = int(rng.integers(len(image) - h + 1)), int(rng.integers(len(image) - w + 1))
    flip = slice(None, None, -1 if rng.random() < 0.5 else 1)
    window = np.s_[y : y + h, x : x + w]
    width, height = (side, round(side * ratio)) if wide else (round(side * ratio), side)
    image = np.asarray(Image.fromarray(image[window]).resize((width, height), Image.Resampling.BILINEAR))[:, flip]
    layers = np.asarray(Image.fromarray(layers[window]).resize((width, height), Image.Resampling.NEAREST))[:, flip]
    areas = np.bincount(layers.ravel(), minlength=256)
    masks, seen = [], set()
    for target in targets:
        visible = tuple(part for part in target if areas[part])
        area = sum(areas[part] for part in visible)
        if visible in seen or area < MIN_AREA * size[0] * size[1] or area > MAX_AREA * layers.size:
            continue
        seen.add(visible)
        table = np.zeros(256, bool)
        table[list(visible)] = True
        masks.append(table[layers])
    return image, np.stack(masks) if masks else np.empty((0, *layers.shape), bool)


def _recolour(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Gain and offset for each channel, now and then grey: cheap, and it makes the picture a new one."""
    values = image.astype(np.float32)
    if rng.random() < 0.08:
        values[:] = values.mean(2, keepdims=True)
    values = values * rng.normal(1, 0.12, 3).clip(0.6, 1.4) + rng.normal(0, 10, 3)
    return values.clip(0, 255).astype(np.uint8)


def _choice(rng: np.random.Generator, often: np.ndarray, count: int) -> np.ndarray:
    """Numbers of `count` targets, each in proportion to `often`; where there are few, some come again."""
    return np.resize(rng.choice(len(often), min(count, len(often)), replace=False, p=often / often.sum()), count)


def _prompt(rng: np.random.Generator, mask: np.ndarray, boxed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Places and labels: a box, now and then with a click; or one click, seldom up to three."""
    if boxed:
        box = _jittered_box(rng, mask).reshape(2, 2)
        if rng.random() < 0.9:
            return box, np.array([2, 3])
        points, labels = _points(rng, mask, 1)
        return np.concatenate([points, box]), np.append(labels, [2, 3])
    points, labels = _points(rng, mask, int(rng.choice([1, 2, 3], p=[0.8, 0.1, 0.1])))
    return np.concatenate([points, [[0, 0]]]), np.append(labels, NOT_A_POINT)


def _jittered_box(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)
    sides = np.tile(box[2:] - box[:2], 2)
    noise = rng.normal(0, 0.03, 4).clip(-0.1, 0.1) * (rng.random() < 0.6)
    return (box + noise * sides).clip(0, np.tile(mask.shape[::-1], 2)).astype(np.float32)


def _points(rng: np.random.Generator, mask: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first point lies inside: mostly at the most interior pixel. Further ones may be background."""
    inside = np.flatnonzero(mask)
    if rng.random() < 0.7:
        step = max(1, max(mask.shape) // 128)  # the distance transform at reduced size is exact enough, and 4x cheaper
        depth = ndimage.distance_transform_edt(np.pad(mask[::step, ::step], 1))[1:-1, 1:-1]
        y, x = np.unravel_index(int(depth.argmax()), depth.shape)
        picked, labels = [int(y * step * mask.shape[1] + x * step)], [1]
        if not mask.flat[picked[0]]:
            picked = [int(rng.choice(inside))]
    else:
        picked, labels = [int(rng.choice(inside))], [1]
    for _ in range(count - 1):
        label = int(rng.random() < 0.5)
        picked.append(int(rng.choice(inside if label else np.flatnonzero(~mask))))
        labels.append(label)
    y, x = np.unravel_index(picked, mask.shape)
    return np.stack([x, y], -1).astype(np.float32), np.array(labels, np.int64)
