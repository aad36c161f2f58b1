"""`fastsam-rwkv everything`: masks of everything in many images, resumable."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .errors import ArgumentError
from .outputs import CATEGORY, OutputFolder, add_format_option, add_model_options, add_ray_option, write_coco

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"}  # of the images in a folder


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
    add_format_option(command)
    command.add_argument("--points-per-side", type=int, default=32, metavar="N", help="clicks per side (default 32)")
    command.add_argument("--pred-iou-thresh", type=float, metavar="X", help="default: the model's own")
    command.add_argument("--stability-score-thresh", type=float, metavar="X", help="default: the model's own")
    command.add_argument("--crop-n-layers", type=int, default=0, metavar="N", help="layers of crops (default 0)")
    command.add_argument("--min-mask-region-area", type=int, default=0, metavar="PIXELS", help="needs scipy")
    add_model_options(command)
    add_ray_option(command)
    command.set_defaults(run=run)


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
    output = OutputFolder(args.output, args.format, {str(image): image.name for image in _images(args.images)})
    left = output.missing()
    output.finish(_segment(args, left, output) if left else [], renumber=True)


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


def _segment(args: argparse.Namespace, images: Sequence[str], output: OutputFolder) -> list[str]:
    """Segment images and write the outputs. Return the names of those that failed, which are reported."""
    if args.ray is None:
        job = _Everything(args)
        return output.fill(images, job.results(images), job.write)
    from .ray_jobs import Encoded, distributed

    paths = [os.path.abspath(image) for image in images]  # an actor has another working directory
    return output.fill(images, distributed(partial(_Everything, args), paths, args.ray, args.device), Encoded.write)


class _Everything:
    """Work of the command, by a model of its own."""

    def __init__(self, args: argparse.Namespace) -> None:
        from .modeling.rwkv_sam import RWKVSAM
        from .predictor.automatic import AutomaticMaskGenerator

        self._format = args.format
        self._generator = AutomaticMaskGenerator(
            RWKVSAM.from_pretrained(args.model, device=args.device, dtype=args.dtype),
            args.points_per_side,
            pred_iou_thresh=args.pred_iou_thresh,
            stability_score_thresh=args.stability_score_thresh,
            crop_n_layers=args.crop_n_layers,
            min_mask_region_area=args.min_mask_region_area,
            output_mode="coco_rle" if args.format == "coco" else "uncompressed_rle",
        )
        iou, stability = self._generator.pred_iou_thresh, self._generator.stability_score_thresh
        print(f"masks with a predicted IoU above {iou:g}, stability score at least {stability:g}", file=sys.stderr)

    def results(self, images: Sequence[str]) -> Iterator[tuple[np.ndarray, list[dict[str, Any]]] | Exception]:
        """Yield each image `[H, W, 3]` and its records, or the error of an image that cannot be used."""
        return self._generator.stream(images)

    def write(self, image: str, result: tuple[np.ndarray, list[dict[str, Any]]], stream: BinaryIO) -> int:
        """Write the output of an image and return its number of masks."""
        array, records = result
        size = (array.shape[0], array.shape[1])
        if self._format == "coco":
            pictured = {"id": 1, "file_name": Path(image).name, "height": size[0], "width": size[1]}
            write_coco(stream, [pictured], [_annotation(i, record) for i, record in enumerate(records, 1)])
        elif self._format == "png":
            _draw(stream, array, records)
        else:
            _save_arrays(stream, size, records)
        return len(records)


def _annotation(number: int, record: dict[str, Any]) -> dict[str, Any]:
    """Return a COCO annotation."""
    from .predictor.rle import coco_box_of_record

    fields = {"id": number, "image_id": 1, "category_id": CATEGORY["id"], "iscrowd": 0}
    return {**fields, **record, "bbox": coco_box_of_record(record)}


def _draw(stream: BinaryIO, array: np.ndarray, records: list[dict[str, Any]]) -> None:
    from PIL import Image

    from .visualize import tinted

    largest_first = sorted(records, key=lambda record: -record["area"])
    Image.fromarray(tinted(array, _masks(largest_first, (array.shape[0], array.shape[1])))).save(stream, "PNG")


def _masks(records: Sequence[dict[str, Any]], size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yield the masks of records with run lengths, one at a time."""
    import numpy as np

    from .predictor.rle import mask_of

    for record in records:
        yield mask_of(np.array(record["segmentation"]["counts"]), size)


def _save_arrays(stream: BinaryIO, size: tuple[int, int], records: list[dict[str, Any]]) -> None:
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
