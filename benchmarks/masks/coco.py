"""COCO and LVIS annotation files: photographs with an object's box and mask an annotation.

Formats: https://cocodataset.org/#format-data and https://www.lvisdataset.org/dataset. Masks are decoded by pycocotools,
the format's own reference: how it rasterises polygons is the definition that published figures rest on.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.masks.datasets import Entry, Photo, Target, check_size
from fastsam_rwkv.predictor.image_io import load_image

FORMAT = "expected a COCO or LVIS instances file: {'images': [...], 'annotations': [...]} with segmentation and bbox"


def find_annotated(folder: str | Path, annotations: str | Path) -> list[Entry]:
    """The photographs of a folder that an annotation file names and that have an annotation, in its order.

    Annotations of crowds (`iscrowd`) are left out, as they mark more than one object, and so are empty masks.

    Args:
        folder: the images. COCO's are found by `file_name`; LVIS's, which lie in COCO's folders, by the last two parts
            of `coco_url` (val2017/000000397133.jpg) below it, or by the last alone.
        annotations: the JSON file.

    Raises:
        ModuleNotFoundError: pycocotools is not installed.
        FileNotFoundError: no such folder or file, or images lack.
        ValueError: not an annotation file, or nothing in it.
    """
    _pycocotools()
    folder, annotations = Path(folder), Path(annotations)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {str(folder)!r}; expected the images that {str(annotations)!r} names")
    try:
        content = json.loads(annotations.read_bytes())
        images, found = content["images"], content["annotations"]
        of_image = defaultdict(list)
        for annotation in found:
            if not annotation.get("iscrowd", 0):
                if "segmentation" not in annotation:
                    raise KeyError("segmentation")
                of_image[annotation["image_id"]].append(annotation)
        named = [(image, _paths(folder, image)) for image in images if image["id"] in of_image]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{str(annotations)!r} cannot be read ({type(error).__name__}: {error}); {FORMAT}") from error
    if not named:
        raise ValueError(f"{str(annotations)!r} annotates no object in any of its {len(images)} images; {FORMAT}")
    entries = []
    missing = []
    names: Counter[str] = Counter()
    for image, paths in named:
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            missing.append(paths[0])
        else:
            read = partial(read_annotated, path, image, of_image[image["id"]])
            name = path.relative_to(folder).as_posix()
            names[name] += 1  # a file may be listed several times, as where an annotator has an entry each
            suffix = f"#{names[name]}" if names[name] > 1 else ""
            entries.append(Entry(name + suffix, (path,), read))
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(named)} images that {annotations.name!r} annotates lack, first "
            f"{str(missing[0])!r}: give the folder that holds them (for LVIS the one above train2017 and val2017)"
        )
    return entries


def _paths(folder: Path, image: dict[str, Any]) -> list[Path]:
    """Where an image may lie; LVIS 0.5 gives names of 2014, whose last 16 characters are those of 2017."""
    names = []
    if name := image.get("file_name"):
        names += [name, name[-16:]] if name.startswith("COCO_") else [name]
    if "coco_url" in image:
        names += ["/".join(image["coco_url"].split("/")[-2:]), image["coco_url"].split("/")[-1]]
    if not names:
        raise KeyError("file_name or coco_url")
    return [folder / name for name in names]


def read_annotated(path: Path, image: dict[str, Any], annotations: Sequence[dict[str, Any]]) -> Photo:
    """An image and the targets of its annotations: their boxes as annotated, x2 and y2 exclusive.

    Raises:
        ValueError: the picture is damaged, has another size than annotated, or a segmentation cannot be decoded.
    """
    pixels = load_image(path)
    shape = int(image["height"]), int(image["width"])
    check_size(shape, pixels, f"the annotation of {path}")
    found = []
    for annotation in annotations:
        try:
            mask = decode(annotation["segmentation"], *shape)
            x, y, w, h = annotation["bbox"]
        except (KeyError, TypeError, ValueError) as error:
            name = f"annotation {annotation.get('id')!r} of {str(path)!r}"
            raise ValueError(f"{name} cannot be read ({type(error).__name__}: {error}); {FORMAT}") from error
        if mask.any():
            found.append(Target.of(mask, (x, y, x + w, y + h)))
    return Photo(pixels, found)


def decode(segmentation: Any, height: int, width: int) -> np.ndarray:
    """The mask `[height, width]` of a segmentation: polygons [[x1, y1, x2, y2, ...], ...], or a run-length code.

    Run lengths are {"size": [height, width], "counts": numbers, or COCO's compressed string}. Polygons of fewer than
    three points enclose nothing and are left out.

    Raises:
        ValueError: neither of them, or run lengths of another size.
    """
    coco = _pycocotools()
    if isinstance(segmentation, dict):
        if list(segmentation["size"]) != [height, width]:
            raise ValueError(f"run lengths of size {segmentation['size']} in an image of {[height, width]}")
        counts = segmentation["counts"]
        if isinstance(counts, list):
            if sum(counts) != height * width:
                raise ValueError(f"run lengths sum to {sum(counts)} in an image of {height * width} pixels")
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
