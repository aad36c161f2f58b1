"""`fastsam-rwkv everything`: masks of everything in many images, resumable."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ArgumentError, ImageError, InputError, listed, shorten
from .files import whole_file

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"}  # of the images in a folder
MERGED = "annotations.json"
CATEGORY = {"id": 1, "name": "object", "supercategory": "object"}
FORMATS = {"coco": ".json", "png": ".png", "npz": ".npz"}


def add_command(commands: Any) -> None:
    """Add the command to the subparsers of `fastsam-rwkv`."""
    command = commands.add_parser(
        "everything",
        help="segment everything in images",
        description="Segment everything in images. A second run skips the images that have an output, whatever its "
        "other options are; remove their outputs to segment them again.",
    )
    command.add_argument("images", metavar="IMAGE", nargs="+", help="files, or folders of images")
    command.add_argument(
        "--output", required=True, metavar="DIR", help="folder for one file per image; made if missing"
    )
    command.add_argument(
        "--format",
        choices=list(FORMATS),
        default="coco",
        help=f"coco (default): JSON per image, and {MERGED} of all; png: the image with its masks; npz: arrays",
    )
    command.add_argument("--points-per-side", type=int, default=32, metavar="N", help="clicks per side (default 32)")
    command.add_argument("--pred-iou-thresh", type=float, metavar="X", help="default: the model's own")
    command.add_argument("--stability-score-thresh", type=float, metavar="X", help="default: the model's own")
    command.add_argument("--crop-n-layers", type=int, default=0, metavar="N", help="layers of crops (default 0)")
    command.add_argument("--min-mask-region-area", type=int, default=0, metavar="PIXELS", help="needs scipy")
    add_model_options(command)
    command.set_defaults(run=run)


def add_model_options(command: argparse.ArgumentParser) -> None:
    """Add the options that say which model runs, where and in which dtype."""
    command.add_argument("--model", metavar="MODEL", help="Hub id, folder or .safetensors file; default: the bundled")
    command.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, mps")
    command.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="auto (default): bfloat16 if the device has instructions for it, else float32",
    )


def run(args: argparse.Namespace) -> None:
    """Segment the images, and print one line of JSON for each.

    Raises:
        InputError: The model cannot be used, or some images could not be segmented; the others are done.
        ArgumentError: Wrong arguments.
        OSError: The output cannot be written.
    """
    for name, value, least in (
        ("--points-per-side", args.points_per_side, 1),
        ("--crop-n-layers", args.crop_n_layers, 0),
        ("--min-mask-region-area", args.min_mask_region_area, 0),
    ):
        if value < least:
            raise ArgumentError(f"{name} must be at least {least}, got {value}")
    folder = Path(os.path.expanduser(args.output))
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise ArgumentError(f"--output {str(folder)!r} is not a folder")
    images = list(_images(args.images))
    outputs = _outputs(images, folder, FORMATS[args.format])
    folder.mkdir(parents=True, exist_ok=True)
    left = [image for image in images if not outputs[image].exists()]
    if skipped := len(images) - len(left):
        print(f"{skipped} of {len(images)} images are done already", file=sys.stderr)
    failed = _segment(args, left, outputs) if left else []
    if args.format == "coco" and not failed:
        _merge([outputs[image] for image in images], folder / MERGED)
    if failed:
        raise InputError(f"{len(failed)} of {len(images)} images could not be segmented: {listed(failed)}")


def _images(given: Sequence[str]) -> Iterator[Path]:
    """Yield the images, those of a folder in the order of their names."""
    for name in given:
        path = Path(os.path.expanduser(name))
        if os.path.isdir(path):
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
            if not found:
                raise ArgumentError(f"folder {str(path)!r} holds no image ({', '.join(sorted(SUFFIXES))})")
            yield from found
        else:
            yield path


def _outputs(images: Sequence[Path], folder: Path, suffix: str) -> dict[Path, Path]:
    """Return the output of each image.

    Raises:
        ArgumentError: Two images would have the same, or an image is its own output.
    """
    outputs: dict[Path, Path] = {}
    taken: dict[str, Path] = {str(folder / MERGED): Path(MERGED)} if suffix == ".json" else {}
    for image in dict.fromkeys(images):
        output = folder / f"{image.name}{suffix}"  # the whole name, because a.jpg and a.png may lie side by side
        if (other := taken.get(str(output))) is not None:
            raise ArgumentError(f"{str(image)!r} and {str(other)!r} would both be written to {str(output)!r}")
        taken[str(output)] = image
        outputs[image] = output
    return outputs


def _segment(args: argparse.Namespace, images: Sequence[Path], outputs: dict[Path, Path]) -> list[str]:
    """Segment images and write the outputs. Return the names of those that failed, which are reported."""
    from .modeling.rwkv_sam import RWKVSAM
    from .predictor.automatic import AutomaticMaskGenerator
    from .predictor.image_io import load_image

    generator = AutomaticMaskGenerator(
        RWKVSAM.from_pretrained(args.model, device=args.device, dtype=args.dtype),
        args.points_per_side,
        pred_iou_thresh=args.pred_iou_thresh,
        stability_score_thresh=args.stability_score_thresh,
        crop_n_layers=args.crop_n_layers,
        min_mask_region_area=args.min_mask_region_area,
        output_mode="coco_rle" if args.format == "coco" else "uncompressed_rle",
    )
    thresholds = f"{generator.pred_iou_thresh:g}, stability score at least {generator.stability_score_thresh:g}"
    print(f"masks with a predicted IoU above {thresholds}", file=sys.stderr)
    failed = []
    with ThreadPoolExecutor(1) as reader:  # reads the next image while this one is segmented
        waiting: list[Future[np.ndarray]] = [reader.submit(load_image, images[0])]
        for i, image in enumerate(images):
            if i + 1 < len(images):
                waiting.append(reader.submit(load_image, images[i + 1]))
            start = time.perf_counter()
            try:
                array = waiting.pop(0).result()
            except (ImageError, OSError) as error:
                print(f"fastsam-rwkv: error: {shorten(error)}", file=sys.stderr)
                failed.append(str(image))
                continue
            records = generator.generate(array)
            try:
                _write(outputs[image], args.format, image, array, records)
            except OSError as error:  # a full disk fails for the next images, too
                raise OSError(f"cannot write {str(outputs[image])!r}: {error}") from error
            row = {"image": str(image), "masks": len(records), "seconds": round(time.perf_counter() - start, 2)}
            print(json.dumps(row), flush=True)
    return failed


def _write(file: Path, kind: str, image: Path, array: np.ndarray, records: list[dict[str, Any]]) -> None:
    size = (array.shape[0], array.shape[1])
    with whole_file(file) as stream:
        if kind == "coco":
            stream.write(json.dumps(_coco(image.name, size, records)).encode())
        elif kind == "png":
            from PIL import Image

            from .visualize import tinted

            largest_first = sorted(records, key=lambda record: -record["area"])
            Image.fromarray(tinted(array, _masks(largest_first, size))).save(stream, "PNG")
        else:
            _save_arrays(stream, size, records)


def _coco(name: str, size: tuple[int, int], records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a COCO data set of one image. Boxes have the width of their pixels, not SAM's of one less."""
    annotations = []
    for i, record in enumerate(records):
        x, y, w, h = record.pop("bbox")
        fields = {"id": i + 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "bbox": [x, y, w + 1, h + 1]}
        annotations.append({**fields, **record})
    pictured = {"id": 1, "file_name": name, "height": size[0], "width": size[1]}
    return {"images": [pictured], "categories": [CATEGORY], "annotations": annotations}


def _merge(files: Sequence[Path], merged: Path) -> None:
    """Write one COCO data set of all images."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, file in enumerate(dict.fromkeys(files), 1):
        data = json.loads(file.read_bytes())
        images.append({**data["images"][0], "id": number})
        for annotation in data["annotations"]:
            annotations.append({**annotation, "id": len(annotations) + 1, "image_id": number})
    with whole_file(merged) as stream:
        stream.write(json.dumps({"images": images, "categories": [CATEGORY], "annotations": annotations}).encode())


def _masks(records: Sequence[dict[str, Any]], size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yield the masks of records with run lengths, one at a time."""
    import numpy as np

    from .predictor.rle import mask_of

    for record in records:
        yield mask_of(np.array(record["segmentation"]["counts"]), size)


def _save_arrays(stream: Any, size: tuple[int, int], records: list[dict[str, Any]]) -> None:
    import numpy as np

    masks = np.zeros((len(records), *size), np.bool_)
    for i, mask in enumerate(_masks(records, size)):
        masks[i] = mask
    np.savez_compressed(
        stream,
        masks=masks,
        predicted_iou=np.array([record["predicted_iou"] for record in records], np.float32),
        stability_score=np.array([record["stability_score"] for record in records], np.float32),
        bbox=np.array([record["bbox"] for record in records], np.int64).reshape(-1, 4),
    )
