"""Decoding and resizing of images. No PyTorch."""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ..errors import ImageError
from .frame import ImageFrame

# EXIF orientation (CIPA DC-008, tag 0x0112) to the transposition that makes an image upright. Pillow's exif_transpose
# also rewrites the EXIF data, fails on data it cannot write, and the image would stay turned
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(image: str | os.PathLike[str] | Image.Image | np.ndarray) -> np.ndarray:
    """Return an image as a uint8 array `[H, W, 3]`, RGB.

    For paths and PIL images, EXIF orientation is applied, transparency is laid on white, and 16-bit gray is scaled to
    8 bits. Palette, gray and CMYK images become RGB.

    Args:
        image: Path, PIL image, or array of uint8 or uint16: `[H, W]` or `[H, W, 1]` (gray), `[H, W, 3]` (RGB) or
            `[H, W, 4]` (RGBA).

    Raises:
        FileNotFoundError: The file does not exist.
        TypeError: Not an image, or an array that is neither uint8 nor uint16.
        ImageError: The shape is not that of an image, or the file is damaged, too large or not an image.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Image.Image):
        return _from_pil(image, "the PIL image")
    if isinstance(image, (str, os.PathLike)):
        return _from_file(os.fspath(image))
    if type(image).__module__.partition(".")[0] == "torch":
        raise TypeError("image is a torch.Tensor; pass a uint8 array [H, W, 3], or normalized pixels to encode_image")
    raise TypeError(f"image must be a path, a PIL image or a uint8 array [H, W, 3], got {type(image).__name__}")


def resize_image(image: np.ndarray, image_size: int) -> tuple[np.ndarray, ImageFrame]:
    """Resize a uint8 RGB image `[H, W, 3]` so that its longer side is `image_size` (bilinear, antialiased).

    Returns:
        Pixels uint8 `[h, w, 3]`, and the image's frame.
    """
    frame = ImageFrame.of((image.shape[0], image.shape[1]), image_size)
    h, w = frame.resized_size
    return np.array(Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR)), frame


def _from_file(path: str) -> np.ndarray:
    if path.lower().startswith(("http://", "https://")):
        raise ImageError(f"{path!r} is a URL; download the image first and pass the file's path")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large, but below the limit of an error
        try:
            image = Image.open(path)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise FileNotFoundError(f"no image file at {path!r}") from error
        except UnidentifiedImageError as error:
            raise ImageError(f"{path!r} is not an image that Pillow can read") from error
        except Exception as error:  # decoders raise many types, see `_unreadable`
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the file cannot be opened; Python's message names it
            raise _unreadable(repr(path), error) from error
        with image:
            return _from_pil(image, repr(path))


def _from_pil(image: Image.Image, name: str) -> np.ndarray:
    if 0 in image.size:
        raise ImageError(f"{name} is empty: {image.size[0]}x{image.size[1]} pixels")
    try:
        image.load()
    except Exception as error:  # decoders raise many types, see `_unreadable`
        if isinstance(error, (AssertionError, AttributeError)) and getattr(image, "fp", image) is None:
            raise ImageError(f"{name} was closed before it was read; call its load() before that") from error
        raise _unreadable(name, error) from error
    image = _upright(image)
    if image.mode == "F":
        raise ImageError(f"{name} holds floating-point values; scale them to 0..255 and convert to mode 'L' first")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "I" and 0 < values.max() <= 255:
            raise ImageError(
                f"{name} has mode 'I' and no value above 255: read as 16-bit gray it would be black; "
                "if its values are 0..255 use `Image.fromarray(np.asarray(image).astype(np.uint8))`"
            )
        return _from_array(_sixteen_bits(values, name))
    try:
        if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(image.convert("RGB"))
    except ValueError as error:
        raise ImageError(f"{name} has mode {image.mode!r}, which does not convert to RGB: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation: Any = image.getexif().get(ExifTags.Base.Orientation)
        transposition = _UPRIGHT.get(orientation)
    except Exception:  # Pillow's EXIF reader raises many types; without a valid orientation an image is upright
        return image
    return image if transposition is None else image.transpose(transposition)


def _unreadable(name: str, error: Exception) -> Exception:
    """Return the exception to raise for one of Pillow's decoders.

    Depending on the format, a decoder raises OSError, SyntaxError, ValueError, EOFError, RuntimeError or struct.error.
    """
    if isinstance(error, MemoryError):
        return error
    if isinstance(error, Image.DecompressionBombError):
        return ImageError(f"{name} is too large: {error} If you trust it, raise PIL.Image.MAX_IMAGE_PIXELS first.")
    return ImageError(f"{name} is damaged or cut off: {error}")


def _sixteen_bits(values: np.ndarray, name: str) -> np.ndarray:
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(f"{name} holds values {values.min()}..{values.max()}; expected 16 bits, 0..65535")
    return values.astype(np.uint16)


def _from_array(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        array = ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    elif array.dtype != np.uint8:
        remedy = {
            "f": "for values in 0..1 use `(image * 255).round().astype(np.uint8)`",
            "b": "a mask becomes an image by `image.astype(np.uint8) * 255`",
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
        raise ImageError(f"image must be [H, W, 3] (or [H, W], [H, W, 1], [H, W, 4]), got {shape}{hint}")
    if 0 in array.shape:
        raise ImageError(f"image is empty: shape {shape}")
    if array.shape[2] == 4:
        return _from_pil(Image.fromarray(np.ascontiguousarray(array)), "image")
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))
