"""COCO and LVIS annotation files: photographs whose targets are annotated with box and mask.

Formats: https://cocodataset.org/#format-data and https://www.lvisdataset.org/dataset. pycocotools decodes the masks,
because published figures rest on how it rasterizes polygons.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

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
    try:
        from pycocotools.coco import COCO
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "COCO and LVIS annotation files need pycocotools, which is not installed: pip install pycocotools"
        ) from error
    folder, annotations = Path(folder), Path(annotations)
    try:
        with contextlib.redirect_stdout(None):
            coco = COCO(annotations)
        found = []
        for image in coco.dataset["images"]:
            if objects := [a for a in coco.imgToAnns[image["id"]] if not a.get("iscrowd", 0)]:
                paths = _paths(folder, image)
                found.append((next((p for p in paths if p.is_file()), None), paths[0], image, objects))
        if not found:
            raise ValueError("no object is annotated")
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(annotations)!r} cannot be read ({type(error).__name__}: {error}); {FORMAT}") from error
    if missing := [first for path, first, *_ in found if path is None]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(found)} images that {annotations.name!r} annotates are missing, first "
            f"{str(missing[0])!r}: give the folder that holds them (for LVIS the one above train2017 and val2017)"
        )
    entries = []
    names: Counter[str] = Counter()
    for path, _, image, objects in found:
        name = path.relative_to(folder).as_posix()
        names[name] += 1  # several annotators may each have an entry for a file
        suffix = f"#{names[name]}" if names[name] > 1 else ""
        entries.append(Entry(name + suffix, (path,), partial(_read, coco, path, image, objects)))
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


def _read(coco: Any, path: Path, image: dict[str, Any], annotations: list[dict[str, Any]]) -> Photograph:
    pixels = load_image(path)
    check_size((image["height"], image["width"]), pixels, f"the annotation of {path}")
    targets = []
    for annotation in annotations:
        name = f"annotation {annotation['id']} of {path}"
        try:
            shape = annotation["segmentation"]
            if isinstance(shape, list):  # fewer than three points enclose nothing
                shape = [polygon for polygon in shape if len(polygon) >= 6]
            elif isinstance(shape["counts"], list) and sum(shape["counts"]) != pixels[..., 0].size:
                raise ValueError(f"run lengths sum to {sum(shape['counts'])}")  # pycocotools does not check
            mask = coco.annToMask(annotation | {"segmentation": shape}).astype(bool) if shape else None
            x, y, w, h = annotation["bbox"]
        except Exception as error:  # pycocotools raises many types
            raise ValueError(f"{name} cannot be read ({type(error).__name__}: {error}); {FORMAT}") from error
        if mask is not None and mask.any():
            check_size(mask.shape, pixels, name)
            targets.append(Target.of(mask, (x, y, x + w, y + h)))
    return Photograph(pixels, targets)
