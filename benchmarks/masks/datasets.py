"""Labeled photographs: the folder layouts of data sets.

Label maps: FOLDER/<id>.jpg with FOLDER/<id>.png, or FOLDER/images/<id>.jpg|png with FOLDER/labels/<id>.png. A region is
all pixels of one label. Each region of 1 % to 60 % of the image is a target.

Masks: one object per image, the pixels whose first channel is above 128, as in SAM-HQ's evaluation (SysCV/sam-hq,
`train/train.py` and `train/utils/misc.py`):

    DIS-VD          im/<id>.jpg           gt/<id>.png            (DIS5K, https://github.com/xuebinqin/DIS)
    COIFT           images/<id>.jpg       masks/<id>.png
    HRSOD           images/<id>.jpg       masks_max255/<id>.png
    ThinObject5K    images_test/<id>.jpg  masks_test/<id>.png    (or images and masks)

COCO and LVIS annotation files: see `coco`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from benchmarks.masks.mask_geometry import interior_point, tight_box
from fastsam_rwkv.predictor.image_io import load_image

MIN_AREA, MAX_AREA = 0.01, 0.6
MASK_FOLDERS = (("im", "gt"), ("images", "masks_max255"), ("images", "masks"), ("images_test", "masks_test"))
LAYOUT = (
    "expected FOLDER/<id>.jpg with FOLDER/<id>.png, or FOLDER/images/<id>.jpg|png with FOLDER/labels/<id>.png, "
    f"or masks of one object: {', '.join(f'FOLDER/{a} with FOLDER/{b}' for a, b in MASK_FOLDERS)}"
)


class Target(NamedTuple):
    """One region to segment."""

    mask: np.ndarray  # [H, W] bool
    box: tuple[float, float, float, float]  # (x1, y1, x2, y2) in image pixels, x2 and y2 exclusive
    point: tuple[int, int]  # (x, y) of the most interior pixel
    area: float  # fraction of the image

    @classmethod
    def of(cls, mask: np.ndarray, box: tuple[float, float, float, float] | None = None) -> Target:
        """Return the target of a mask that is not empty, by default with its tight box."""
        return cls(mask, box or tight_box(mask), interior_point(mask), int(mask.sum()) / mask.size)


class Photograph(NamedTuple):
    """A uint8 RGB image `[H, W, 3]` and its targets."""

    image: np.ndarray
    targets: list[Target]


class Entry(NamedTuple):
    """A labeled photograph that is not read yet."""

    name: str  # unique in its data set
    files: tuple[Path, ...]  # the image, and its labels if they have a file of their own
    read: Callable[[], Photograph]  # raises ValueError or OSError that names the file


def find_photographs(folder: str | Path) -> list[Entry]:
    """List the labeled photographs of a folder of label maps or masks, sorted by name.

    Raises:
        FileNotFoundError: No such folder, no image in it, or an image without labels.
    """
    folder = Path(folder)
    images = labels = folder
    read, suffixes = read_label_map, {".jpg", ".jpeg"}
    for pair in (("images", "labels"), *MASK_FOLDERS):
        if all((folder / name).is_dir() for name in pair):
            images, labels = (folder / name for name in pair)
            read = read_mask if pair in MASK_FOLDERS else read_label_map
            suffixes.add(".png")
            break
    found = [p for p in sorted(images.iterdir()) if p.suffix.lower() in suffixes] if images.is_dir() else []
    if not found:
        raise FileNotFoundError(f"no images in {str(images)!r}; {LAYOUT}")
    pairs = [(p, labels / f"{p.stem}.png") for p in found]
    if missing := [label for _, label in pairs if not label.is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(pairs)} images lack their labels, first {str(missing[0])!r}: add them, or remove "
            f"their images; {LAYOUT}"
        )
    return [Entry(image.name, (image, label), partial(read, image, label)) for image, label in pairs]


def read_label_map(image_path: Path, label_path: Path) -> Photograph:
    """Read an image and the targets of its label map.

    Raises:
        ValueError: A file is damaged, or the label map has several channels or another size than the image.
    """
    image = load_image(image_path)
    mode, label_map = _read_labels(label_path)
    if label_map.ndim != 2:
        raise ValueError(f"label map {str(label_path)!r} must have one channel, got mode {mode!r}")
    check_size(label_map.shape, image, str(label_path))
    return Photograph(image, targets(label_map))


def targets(label_map: np.ndarray) -> list[Target]:
    """Return the regions of `[H, W]` integer labels whose area is 1 % to 60 % of the image, limits included."""
    labels, counts = np.unique(label_map, return_counts=True)
    fits = (counts / label_map.size >= MIN_AREA) & (counts / label_map.size <= MAX_AREA)
    return [Target.of(label_map == label) for label in labels[fits]]


def read_mask(image_path: Path, mask_path: Path) -> Photograph:
    """Read an image and its one target, the pixels whose first channel is above 128.

    Raises:
        ValueError: A file is damaged, or the mask is empty, not 8 bits a channel, or of another size than the image.
    """
    image = load_image(image_path)
    mode, values = _read_labels(mask_path, "RGB")
    if mode.startswith(("I", "F")):
        raise ValueError(f"mask {str(mask_path)!r} must have 8 bits a channel, got mode {mode!r}; save it as mode 'L'")
    check_size(values.shape[:2], image, str(mask_path))
    mask = values[..., 0] > 128
    if not mask.any():
        raise ValueError(
            f"mask {str(mask_path)!r} has no object: nothing above 128, the largest value is {values[..., 0].max()}; "
            "scale masks of 0 and 1 to 0 and 255, or remove this image"
        )
    return Photograph(image, [Target.of(mask)])


def check_size(shape: tuple[int, ...], image: np.ndarray, name: str) -> None:
    """Raise ValueError unless labels `[H, W]` are as large as their image `[H, W, 3]`."""
    if tuple(shape) != image.shape[:2]:
        raise ValueError(
            f"{name!r} is {tuple(shape)}, its image {image.shape[:2]} (height, width; turned upright by EXIF); "
            "labels must have their image's pixels"
        )


def _read_labels(path: Path, mode: str | None = None) -> tuple[str, np.ndarray]:
    try:
        with Image.open(path) as image:
            return image.mode, np.asarray(image.convert(mode) if mode else image)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's decoders raise all of them
        raise ValueError(f"{str(path)!r} is damaged, or not an image: {error}") from error
