"""`fastsam-rwkv predict --prompts`: many images, each with its own prompts, resumable."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .errors import ArgumentError, ImageError, InputError, listed, short_repr, shorten
from .outputs import CATEGORY, OutputFolder, write_coco

if TYPE_CHECKING:
    from .predictor.answers import Prediction


@dataclass
class PromptedImage:
    """An image of a file of prompts.

    Attributes:
        about: COCO's entry of the image: `id`, `file_name` and possibly `height`, `width` and others.
        prompts: `point_coords`, `point_labels`, `box` and `mask_input` as for `predict_image`.
        sources: of each prompt, the `prompt_id` and `category_id` that its masks have; empty if prompts are just
            counted.
    """

    about: dict[str, Any]
    prompts: dict[str, Any]
    sources: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class PromptFile:
    """The content of a file of prompts.

    Attributes:
        images: by name; a name is a path relative to the folder of images, or an absolute one.
        categories: as in COCO.
        unusable: prompts that cannot be used, with the reason. The others can.
    """

    images: dict[str, PromptedImage]
    categories: list[Any]
    unusable: list[str]


def run(args: argparse.Namespace) -> None:
    """Predict the masks, and print one line of JSON for each image.

    Raises:
        InputError: The file of prompts or the model cannot be used, or some images or prompts could not; the others
            are done.
        ArgumentError: Wrong arguments.
        OSError: The output cannot be written.
    """
    for name in ("point", "box", "mask", "overlay", "value_range"):
        if getattr(args, name):
            raise ArgumentError(f"--{name.replace('_', '-')} does not go with --prompts")
    if args.output is None:
        raise ArgumentError("--prompts needs --output DIR, a folder for one file per image")
    file = read_prompts(args.prompts)
    root = Path(os.path.expanduser(args.image or args.prompts.parent))
    if not os.path.isdir(root):
        raise ArgumentError(f"{str(root)!r} is not a folder; with --prompts, give the folder of the images")
    output = OutputFolder(args.output, args.format, {name: _inside(name) for name in file.images})
    for problem in file.unusable:
        print(f"fastsam-rwkv: error: {problem}", file=sys.stderr)
    left = output.missing()
    failed = _predict(args, file, left, root, output) if left else []
    output.finish(failed, file.categories)
    if file.unusable:
        raise InputError(f"{len(file.unusable)} prompts cannot be used: {listed(file.unusable)}")


def _inside(name: str) -> str:
    """Return a name below the folder of outputs, whatever the file of prompts says."""
    path = Path(name)
    return path.name if path.is_absolute() or ".." in path.parts else name


def _predict(
    args: argparse.Namespace, file: PromptFile, names: Sequence[str], root: Path, output: OutputFolder
) -> list[str]:
    items = [(name, file.images[name]) for name in names]
    if args.ray is None:
        job = _Prompted(args, root, file.categories)
        return output.fill(names, job.results(items), lambda name, *rest: job.write((name, file.images[name]), *rest))
    from .ray_jobs import Encoded, distributed

    root = Path(os.path.abspath(root))  # an actor has another working directory
    make = partial(_Prompted, args, root, file.categories)
    return output.fill(names, distributed(make, items, args.ray, args.device, args.max_pixels), Encoded.write)


class _Prompted:
    """Work of the command, by a model of its own. An item is an image's name and its prompts."""

    def __init__(self, args: argparse.Namespace, root: Path, categories: list[Any]) -> None:
        from .modeling.rwkv_sam import RWKVSAM
        from .predictor.torch_predictor import Predictor

        self._predictor = Predictor(RWKVSAM.from_pretrained(args.model, device=args.device, dtype=args.dtype))
        self._args, self._root, self._categories = args, root, categories

    def results(self, items: Sequence[tuple[str, PromptedImage]]) -> Iterator[Prediction | Exception]:
        """Yield the prediction of each image, or the error of an image or a prompt that cannot be used."""
        found = self._predictor.predict_images(
            (self._root / name for name, _ in items),
            (image.prompts for _, image in items),
            multimask_output=self._args.multimask,
            zoom=self._args.zoom,
            errors="return",
        )
        for (_, image), result in zip(items, found, strict=True):
            yield result if isinstance(result, Exception) else _of_its_size(image, result)

    def write(self, item: tuple[str, PromptedImage], result: Prediction, stream: BinaryIO) -> int:
        """Write the output of an image and return its number of masks."""
        name, image = item
        H, W = result.masks.shape[-2:]
        single = result.masks.ndim == 3
        masks, scores = (result.masks[None], result.scores[None]) if single else (result.masks, result.scores)
        sources = image.sources or [{"prompt_id": i, "category_id": CATEGORY["id"]} for i in range(len(masks))]
        if self._args.format == "coco":
            about = {**image.about, "height": H, "width": W}
            write_coco(stream, [about], _annotations(about["id"], sources, masks, scores), self._categories)
        elif self._args.format == "png":
            _draw(stream, self._root / name, image, masks)
        else:
            import numpy as np

            ids = [str(source["prompt_id"]) for source in sources]
            np.savez_compressed(stream, masks=masks, scores=scores, prompt_id=np.array(ids))
        return masks.shape[0] * masks.shape[1]


def _of_its_size(image: PromptedImage, result: Any) -> Any:
    """Return a result, or an error if the file of prompts is about an image of another size."""
    size = result.masks.shape[-2:]
    said = tuple(image.about.get(name, side) for name, side in zip(("height", "width"), size, strict=True))
    if said != size:
        (H, W), (h, w) = size, said
        return ImageError(f"the image has {W}x{H} pixels once it is upright, and its prompts are for {w}x{h}")
    return result


def _annotations(image_id: Any, sources: list[dict[str, Any]], masks: Any, scores: Any) -> Iterator[dict[str, Any]]:
    from .predictor.rle import as_rle, coco_box_of, runs_of

    number = 0
    for source, several, their_scores in zip(sources, masks, scores, strict=True):
        for k, (mask, score) in enumerate(zip(several, their_scores, strict=True)):
            number += 1
            runs = runs_of(mask, (0, 0), mask.shape)
            yield {
                "id": number,
                "image_id": image_id,
                **source,
                **({"mask": k} if len(several) > 1 else {}),
                "iscrowd": 0,
                "bbox": coco_box_of(runs, mask.shape[0]),
                "area": int(runs[1::2].sum()),
                "score": float(score),
                "segmentation": as_rle(runs, mask.shape, compressed=True),
            }


def _draw(stream: BinaryIO, path: Path, image: PromptedImage, masks: Any) -> None:
    import numpy as np

    from .predictor.image_io import load_image
    from .visualize import overlay

    coords = np.asarray(image.prompts.get("point_coords", np.empty((0, 2))), np.float64).reshape(-1, 2)
    labels = np.asarray(image.prompts.get("point_labels", np.ones(len(coords))), np.int64).reshape(-1)
    points = [(x, y, label) for (x, y), label in zip(coords.tolist(), labels.tolist(), strict=True) if label >= 0]
    boxes = np.asarray(image.prompts.get("box", np.empty((0, 4))), np.float64).reshape(-1, 4)
    drawing = overlay(load_image(path), masks.reshape(-1, *masks.shape[-2:]), points, boxes.tolist())
    drawing.save(stream, "PNG")


def read_prompts(file: Path) -> PromptFile:
    """Read prompts: COCO annotations, whose boxes are used, or a list of images with prompts as in Python.

    The list has an object for each image: `image`, its name, and `point_coords`, `point_labels`, `box` and `mask_input`
    as for `predict_image`.

    Raises:
        InputError: The file cannot be read, or it is neither.
    """
    try:
        data = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read prompts from {str(file)!r}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{str(file)!r} is not JSON: {shorten(error, 200)}") from error
    try:
        if isinstance(data, dict):
            return _coco(data)
        if isinstance(data, list):
            return _listed(data)
        raise ValueError("it holds neither an object nor a list")
    except ValueError as error:
        raise InputError(
            f"{str(file)!r} holds no prompts: {shorten(error, 200)}. It must be a COCO file with images and "
            'annotations, or a list such as [{"image": "a.jpg", "box": [10, 20, 60, 90]}]'
        ) from error


def _coco(data: dict[str, Any]) -> PromptFile:
    for name in ("images", "annotations"):
        if not isinstance(data.get(name), list):
            raise ValueError(f"{name!r} is not a list")
    images: dict[Any, PromptedImage] = {}
    for about in data["images"]:
        key = _key(about, "id", "an image")
        if not isinstance(about.get("file_name"), str) or not about["file_name"]:
            raise ValueError(f"image {key!r} has no file_name")
        if key in images:
            raise ValueError(f"two images have the id {key!r}")
        images[key] = PromptedImage(about, {"box": []})
    unusable = []
    for number, found in enumerate(data["annotations"]):
        key = _key(found, "image_id", "an annotation")
        if key not in images:
            raise ValueError(f"an annotation is of image {key!r}, which is not there")
        name = found.get("id", number)
        box = found.get("bbox")
        if not (isinstance(box, list) and len(box) == 4 and all(isinstance(v, (int, float)) for v in box)):
            unusable.append(f"annotation {short_repr(name)} has no bbox [x, y, width, height], but {short_repr(box)}")
        elif not (box[2] > 0 and box[3] > 0):
            unusable.append(f"annotation {short_repr(name)} has an empty bbox, {short_repr(box)}")
        else:
            x, y, w, h = box
            images[key].prompts["box"].append([x, y, x + w, y + h])
            images[key].sources.append({"prompt_id": name, "category_id": found.get("category_id", CATEGORY["id"])})
    if without := sum(not image.sources for image in images.values()):
        print(f"{without} of {len(images)} images have no box and are left out", file=sys.stderr)
    categories = data.get("categories")
    return PromptFile(
        _by_name([image for image in images.values() if image.sources]),
        categories if isinstance(categories, list) and categories else [CATEGORY],
        unusable,
    )


def _listed(data: list[Any]) -> PromptFile:
    images = []
    for number, entry in enumerate(data):
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str) or not entry["image"]:
            raise ValueError(f"entry {number} names no image: {short_repr(entry)}")
        prompts = {name: value for name, value in entry.items() if name != "image"}
        images.append(PromptedImage({"id": number + 1, "file_name": entry["image"]}, prompts))
    return PromptFile(_by_name(images), [CATEGORY], [])


def _key(entry: Any, name: str, what: str) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get(name), (int, str)):
        raise ValueError(f"{what} has no {name}: {short_repr(entry)}")
    return entry[name]


def _by_name(images: list[PromptedImage]) -> dict[str, PromptedImage]:
    named: dict[str, PromptedImage] = {}
    for image in images:
        name = image.about["file_name"]
        if name in named:
            raise ValueError(f"image {short_repr(name)} is there twice; give it N prompts at once")
        named[name] = image
    if not named:
        raise ValueError("it names no image")
    return named
