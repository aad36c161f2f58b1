"""Pictures and their coordinate frames, without PyTorch: decoding, resizing, where an image lies in the model's input.

Two frames: the image's pixels, and the model's input, a square of `image_size` pixels in which the resized image fills
the upper left. One factor, `ImageFrame.scale`, leads from the first to the second.
"""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

if TYPE_CHECKING:
    from torch import Tensor

Coords = TypeVar("Coords", np.ndarray, "Tensor")

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
# what makes a picture upright, by its EXIF orientation (CIPA DC-008, tag 0x0112)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageFrame:
    """How an image lies in the model's input.

    Attributes:
        original_size: `(H, W)` of the image.
        resized_size: `(h, w)` it has in the input; the longer one is the input's side.
        input_size: `(S, S)`.
        scale: input pixels per image pixel, the same for x and y.
    """

    original_size: tuple[int, int]
    resized_size: tuple[int, int]
    input_size: tuple[int, int]
    scale: float

    @classmethod
    def of(cls, original_size: tuple[int, int], image_size: int) -> ImageFrame:
        H, W = original_size
        scale = image_size / max(H, W)
        h, w = (max(1, math.floor(side * scale + 0.5)) for side in (H, W))
        return cls(original_size, (h, w), (image_size, image_size), scale)

    def points_to_input(self, coords: Coords) -> Coords:
        """`[..., 2]` (x, y) in image pixels to input pixels; a numpy array or a torch.Tensor."""
        return self._to_input(coords)

    def boxes_to_input(self, boxes: Coords) -> Coords:
        """`[..., 4]` (x1, y1, x2, y2) in image pixels to input pixels; a numpy array or a torch.Tensor."""
        return self._to_input(boxes)

    def _to_input(self, places: Coords) -> Coords:
        if isinstance(places, (list, tuple)):
            raise TypeError(f"coordinates must be a numpy array or a torch.Tensor, got {places!r}")
        return places * self.scale

    def masks_to_image(self, low_res_logits: Tensor) -> Tensor:
        """`[N, n, h, w]` low-resolution logits to float32 logits `[N, n, H, W]` at the image's size.

        That is 4 bytes a pixel and mask: for many masks of a large image, call it for a few at a time.
        """
        import torch.nn.functional as F  # here: exported models use the rest of this class without PyTorch

        logits = F.interpolate(low_res_logits.float(), self.input_size, mode="bilinear", align_corners=False)
        logits = logits[..., : self.resized_size[0], : self.resized_size[1]]
        return F.interpolate(logits, self.original_size, mode="bilinear", align_corners=False)


def load_image(image: str | os.PathLike[str] | Image.Image | np.ndarray) -> np.ndarray:
    """A picture as a uint8 array `[H, W, 3]`, RGB.

    Paths and PIL images: EXIF orientation is applied, transparency is laid on white, 16-bit greys are scaled to 8 bits,
    and palette, grey and CMYK pictures become RGB. Arrays: uint8 or uint16, `[H, W]`, `[H, W, 1]` (grey), `[H, W, 3]`
    (RGB) or `[H, W, 4]` (RGBA).

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: not an image, or an array that is neither uint8 nor uint16.
        ValueError: the array's shape is not that of an image; the file is damaged, not a picture, or too large.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Image.Image):
        return _from_pil(image, "the PIL image")
    if isinstance(image, (str, os.PathLike)):
        return _from_file(os.fspath(image))
    if type(image).__module__.partition(".")[0] == "torch":
        raise TypeError("image is a torch.Tensor; pass a uint8 array [H, W, 3], or normalised pixels to encode_image")
    raise TypeError(f"image must be a path, a PIL image or a uint8 array [H, W, 3], got {type(image).__name__}")


def resize_image(image: np.ndarray, image_size: int) -> tuple[np.ndarray, ImageFrame]:
    """A uint8 RGB image `[H, W, 3]`, its longer side resized to `image_size` (bilinear, antialiased); and its frame."""
    frame = ImageFrame.of((image.shape[0], image.shape[1]), image_size)
    h, w = frame.resized_size
    return np.array(Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR)), frame


def _from_file(path: str) -> np.ndarray:
    if path.lower().startswith(("http://", "https://")):
        raise ValueError(f"{path!r} is a URL; download the picture first and pass the file's path")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large, but below the limit of an error
        try:
            picture = Image.open(path)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise FileNotFoundError(f"no image file at {path!r}") from error
        except UnidentifiedImageError as error:
            raise ValueError(f"{path!r} is not a picture that Pillow can read") from error
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the file cannot be opened; Python's message names it
            raise _unreadable(repr(path), error) from error
        with picture:
            return _from_pil(picture, repr(path))


def _from_pil(picture: Image.Image, name: str) -> np.ndarray:
    if 0 in picture.size:
        raise ValueError(f"{name} is empty: {picture.size[0]}x{picture.size[1]} pixels")
    try:
        picture.load()
    except Exception as error:
        if isinstance(error, (AssertionError, AttributeError)) and getattr(picture, "fp", picture) is None:
            raise ValueError(f"{name} was closed before it was read; call its load() before that") from error
        raise _unreadable(name, error) from error
    picture = _upright(picture)
    if picture.mode == "F":
        raise ValueError(f"{name} holds floating-point values; scale them to 0..255 and convert to mode 'L' first")
    if picture.mode.startswith("I"):
        values = np.asarray(picture)
        if picture.mode == "I" and 0 < values.max() <= 255:
            raise ValueError(
                f"{name} has mode 'I' and no value above 255: as 16-bit greys it would be black; "
                "if its values are 0..255 use `Image.fromarray(np.asarray(image).astype(np.uint8))`"
            )
        return _from_array(_sixteen_bits(values, name))
    try:
        if picture.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return np.array(picture.convert("RGB"))
    except ValueError as error:
        raise ValueError(f"{name} has mode {picture.mode!r}, which does not convert to RGB: {error}") from error


def _upright(picture: Image.Image) -> Image.Image:
    try:
        orientation: Any = picture.getexif().get(ExifTags.Base.Orientation)
        turn = _UPRIGHT.get(orientation)
    except Exception:  # Pillow's EXIF reader raises whatever suits it; without an orientation a picture is upright
        return picture
    return picture if turn is None else picture.transpose(turn)


def _unreadable(name: str, error: Exception) -> Exception:
    """What to raise for an exception of Pillow's decoders.

    They raise whatever suits their format: OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error.
    """
    if isinstance(error, MemoryError):
        return error
    if isinstance(error, Image.DecompressionBombError):
        return ValueError(f"{name} is too large: {error} If you trust it, raise PIL.Image.MAX_IMAGE_PIXELS first.")
    return ValueError(f"{name} is damaged or cut off: {error}")


def _sixteen_bits(values: np.ndarray, name: str) -> np.ndarray:
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"{name} holds values {values.min()}..{values.max()}; expected 16 bits, 0..65535")
    return values.astype(np.uint16)


def _from_array(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        array = ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    elif array.dtype != np.uint8:
        remedy = {
            "f": "for values in 0..1 use `(image * 255).round().astype(np.uint8)`",
            "b": "a mask of 0 and 1 becomes a picture by `image.astype(np.uint8) * 255`",
        }.get(array.dtype.kind, "if its values are 0..255 use `image.astype(np.uint8)`")
        raise TypeError(f"image must be uint8, RGB in 0..255, got {array.dtype}; {remedy}")
    shape = list(array.shape)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        hint = ""
        if array.ndim == 3 and shape[0] in (1, 3, 4):
            hint = "; channels come last: `image.transpose(1, 2, 0)`"
        elif array.ndim == 4:
            hint = "; pass the images of a batch one at a time"
        raise ValueError(f"image must be [H, W, 3] (or [H, W], [H, W, 1], [H, W, 4]), got {shape}{hint}")
    if 0 in array.shape:
        raise ValueError(f"image is empty: shape {shape}")
    if array.shape[2] == 4:
        return _from_pil(Image.fromarray(np.ascontiguousarray(array)), "image")
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))
