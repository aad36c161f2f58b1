"""COCO and LVIS annotation files: photographs whose targets are annotated with box and mask.

Formats: https://cocodataset.org/#format-data and https://www.lvisdataset.org/dataset. pycocotools decodes the masks,
because published figures rest on how it rasterizes polygons.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.masks.datasets import Entry, Photograph, Target, check_size
from fastsam_rwkv.predictor.image_io import load_image

FORMAT = "expected a COCO or LVIS instances file: {'images': [...], 'annotations': [...]} with segmentation and bbox"


def find_annotated(folder: str | Path, annotations: str | Path) -> list[Entry]:
    """List the photographs of a folder that have an annotation, in the order of the annotation file.

    Annotations of crowds (`iscrowd`) are left out, because they mark several objects, and so are empty masks.

    Args:
        folder: Folder of the images. COCO's are found by `file_name`. LVIS's lie in COCO's folders: they are found by
            the last two parts of `coco_url` (val2017/000000397133.jpg), or by the last.
        annotations: JSON file.

    Raises:
        ModuleNotFoundError: pycocotools is not installed.
        FileNotFoundError: No such file, or images are missing.
        ValueError: Not an annotation file, or nothing in it.
    """
    _pycocotools()
    folder, annotations = Path(folder), Path(annotations)
    try:
        content = json.loads(annotations.read_bytes())
        of_image = defaultdict(list)
        for annotation in content["annotations"]:
            if not annotation.get("iscrowd", 0):
                of_image[annotation["image_id"]].append((annotation["segmentation"], annotation["bbox"]))
        named = [(image, _paths(folder, image)) for image in content["images"] if image["id"] in of_image]
        if not named:
            raise ValueError("no object is annotated")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{str(annotations)!r} cannot be read ({type(error).__name__}: {error}); {FORMAT}") from error
    found = [(image, next((p for p in paths if p.is_file()), None), paths[0]) for image, paths in named]
    if missing := [first for _, path, first in found if path is None]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(named)} images that {annotations.name!r} annotates are missing, first "
            f"{str(missing[0])!r}: give the folder that holds them (for LVIS the one above train2017 and val2017)"
        )
    entries = []
    names: Counter[str] = Counter()
    for image, path, _ in found:
        name = path.relative_to(folder).as_posix()
        names[name] += 1  # several annotators may each have an entry for a file
        suffix = f"#{names[name]}" if names[name] > 1 else ""
        entries.append(Entry(name + suffix, (path,), partial(_read, path, image, of_image[image["id"]])))
    return entries


def _paths(folder: Path, image: dict[str, Any]) -> list[Path]:
    """List where an image may lie. LVIS 0.5 has names of 2014, whose last 16 characters are the names of 2017."""
    names = []
    if name := image.get("file_name"):
        names += [name, name[-16:]] if name.startswith("COCO_") else [name]
    if "coco_url" in image:
        names += ["/".join(image["coco_url"].split("/")[-2:]), image["coco_url"].split("/")[-1]]
    if not names:
        raise KeyError("file_name or coco_url")
    return [folder / name for name in names]


def _read(path: Path, image: dict[str, Any], annotations: Sequence[tuple[Any, Sequence[float]]]) -> Photograph:
    """Read an image and its targets, given by segmentation and box (x, y, width, height)."""
    pixels = load_image(path)
    shape = int(image["height"]), int(image["width"])
    check_size(shape, pixels, f"the annotation of {path}")
    targets = []
    for segmentation, (x, y, w, h) in annotations:
        try:
            mask = decode(segmentation, *shape)
        except (KeyError, TypeError, ValueError) as error:
            name = f"annotation of {str(path)!r} at {[x, y, w, h]}"
            raise ValueError(f"{name} cannot be read ({type(error).__name__}: {error}); {FORMAT}") from error
        if mask.any():
            targets.append(Target.of(mask, (x, y, x + w, y + h)))
    return Photograph(pixels, targets)


def decode(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Decode polygons [[x1, y1, x2, y2, ...], ...] or run lengths to a mask `[height, width]`.

    Run lengths are {"size": [height, width], "counts": numbers, or COCO's compressed string}. Polygons of fewer than
    three points enclose nothing and are left out.

    Raises:
        ValueError: Neither of them, or run lengths of another size.
    """
    coco = _pycocotools()
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        total = sum(counts) if isinstance(counts, list) else height * width
        if list(segmentation["size"]) != [height, width] or total != height * width:
            raise ValueError(f"run lengths of size {segmentation['size']}, sum {total}, for {height} x {width} pixels")
        if isinstance(counts, list):
            segmentation = coco.frPyObjects(segmentation, height, width)
    elif isinstance(segmentation, list):
        if any(len(polygon) % 2 for polygon in segmentation):
            raise ValueError("a polygon has an odd number of coordinates")
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]  # a list of 4 would be taken for a box
        if not polygons:
            return np.zeros((height, width), dtype=bool)
        segmentation = coco.merge(coco.frPyObjects(polygons, height, width))
    else:
        raise ValueError(f"a segmentation must be polygons or run lengths, got {type(segmentation).__name__}")
    return coco.decode(segmentation).astype(bool)


def _pycocotools() -> Any:
    try:
        from pycocotools import mask
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "COCO and LVIS annotation files need pycocotools, which is not installed: pip install pycocotools"
        ) from error
    return mask
