"""Results of commands for many images: a file for each, resumable, and one COCO file of all."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .errors import ArgumentError, InputError, listed, shorten
from .files import whole_file

if TYPE_CHECKING:
    import argparse

MERGED = "annotations.json"
CATEGORY = {"id": 1, "name": "object", "supercategory": "object"}
FORMATS = {"coco": ".json", "png": ".png", "npz": ".npz"}


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


def add_ray_option(command: argparse.ArgumentParser, prefix: str = "") -> None:
    command.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help=f"{prefix}work on the Ray cluster at ADDRESS, such as auto or host:port; without ADDRESS, on one that is "
        "started here. All its nodes must see the images and the model (extra: ray)",
    )


def add_format_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--format",
        choices=list(FORMATS),
        default="coco",
        help=f"coco (default): JSON per image, and {MERGED} of all; png: the image with its masks; npz: arrays",
    )


class OutputFolder:
    """A folder with one file for each image.

    Args:
        folder: Where the files go; it is made when the first is written.
        format: One of `FORMATS`.
        names: For each image, the name by which its file is called.

    Raises:
        ArgumentError: `folder` is a file, or two images would have the same output.
    """

    def __init__(self, folder: str, format: str, names: Mapping[str, str]) -> None:
        self.folder, self.format = Path(os.path.expanduser(folder)), format
        if os.path.lexists(self.folder) and not os.path.isdir(self.folder):
            raise ArgumentError(f"--output {str(self.folder)!r} is not a folder")
        self.files: dict[str, Path] = {}
        taken: dict[str, str] = {str(self.folder / MERGED): MERGED} if format == "coco" else {}
        for image, name in names.items():
            file = self.folder / f"{name}{FORMATS[format]}"  # the whole name: a.jpg and a.png may lie side by side
            if (other := taken.get(str(file))) is not None:
                raise ArgumentError(f"{image!r} and {other!r} would both be written to {str(file)!r}")
            taken[str(file)] = image
            self.files[image] = file

    def missing(self) -> list[str]:
        """Return the images that have no output yet, and say how many have."""
        left = [image for image, file in self.files.items() if not file.exists()]
        if skipped := len(self.files) - len(left):
            print(f"{skipped} of {len(self.files)} images are done already", file=sys.stderr)
        return left

    def fill(
        self, images: Sequence[str], results: Iterable[Any], write: Callable[[str, Any, BinaryIO], int]
    ) -> list[str]:
        """Write the results of images in the background, print one line of JSON for each, and show the progress.

        Args:
            images: Some of the images.
            results: A result for each, or the error of an image that cannot be used.
            write: Writes the result of an image to a binary stream, and returns its number of masks.

        Returns:
            The images that could not be used. Their errors are printed.

        Raises:
            OSError: An output cannot be written, as on a full disk, which fails for the next images, too.
        """
        from tqdm import tqdm

        from .predictor.background import in_background

        def written(item: tuple[str, Any]) -> int | Exception:
            image, result = item
            if isinstance(result, Exception):
                return result
            file = self.files[image]
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                with whole_file(file) as stream:
                    return write(image, result, stream)
            except OSError as error:
                raise OSError(f"cannot write {str(file)!r}: {error}") from error

        failed = []
        with tqdm(total=len(images), unit="image", disable=None) as bar:  # None: only on a terminal
            done = in_background(written, zip(images, results, strict=True))
            for image, count in zip(images, done, strict=True):
                if isinstance(count, Exception):
                    cause = shorten(count.__cause__ or count)
                    text = cause if image in cause else f"{image}: {cause}"
                    tqdm.write(f"fastsam-rwkv: error: {' '.join(text.split())}", file=sys.stderr)
                    failed.append(image)
                else:
                    tqdm.write(json.dumps({"image": image, "masks": count}), file=sys.stdout)
                    sys.stdout.flush()
                bar.update()
        return failed

    def finish(self, failed: Sequence[str], categories: Sequence[Any] = (CATEGORY,), renumber: bool = False) -> None:
        """Write the COCO file of all images that are done.

        Args:
            failed: What could not be used.
            categories: Of the data set.
            renumber: Count images from 1 instead of keeping their ids.

        Raises:
            InputError: Something failed; the message names it.
        """
        done = [file for file in self.files.values() if file.exists()]
        if self.format == "coco" and done:
            images: list[dict[str, Any]] = []
            annotations: list[dict[str, Any]] = []
            for file in done:
                data = json.loads(file.read_bytes())
                image = data["images"][0]
                if renumber:
                    image["id"] = len(images) + 1
                images.append(image)
                for found in data["annotations"]:
                    annotations.append({**found, "id": len(annotations) + 1, "image_id": image["id"]})
            with whole_file(self.folder / MERGED) as stream:
                write_coco(stream, images, annotations, categories)
        if failed:
            raise InputError(f"{len(failed)} of {len(self.files)} images could not be segmented: {listed(failed)}")


def write_coco(
    stream: BinaryIO,
    images: Sequence[Mapping[str, Any]],
    annotations: Iterable[Any],
    categories: Sequence[Any] = (CATEGORY,),
) -> None:
    """Write a COCO data set."""
    data = {"images": images, "categories": categories, "annotations": list(annotations)}
    stream.write(json.dumps(data).encode())
