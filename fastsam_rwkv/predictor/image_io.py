"""Decoding and resizing of images. No PyTorch."""

from __future__ import annotations

import io
import os
import stat
import warnings
from fractions import Fraction
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ..errors import ImageError, short_repr, shorten
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


# Decoders of Pillow that read pixels and run no program: never EPS, which starts Ghostscript. The last two are formats
# that well-known plugins register
FORMATS = (
    *("JPEG", "PNG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "PPM", "AVIF", "JPEG2000", "ICO", "PCX", "PSD", "QOI", "SGI"),
    *("TGA", "HEIF", "JXL"),
)
DARKEST = 1 << 14  # 16-bit images have larger values, those of sensors with 8, 10, 12 or 14 bits have not
STRIP = 1 << 22  # pixels converted or resized at a time
LARGE = 1 << 25  # pixels of an image that is resized in strips, because Pillow copies it in 4 bytes per pixel

ImageLike = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
ValueRange = Literal["full", "auto"]


def load_image(image: ImageLike, value_range: ValueRange | None = None) -> np.ndarray:
    """Return an image as a uint8 array `[H, W, 3]`, RGB.

    For paths and PIL images, EXIF orientation is applied and transparency is laid on white. Palette, gray and CMYK
    images become RGB. Files are decoded by the formats in `FORMATS`, whatever their names.

    8-bit values stay as they are. 16-bit values 0..65535 become 0..255. Values of 8, 10, 12 or 14 bits in 16 would
    become black or dark. Therefore an image without a value above 16383 is refused unless it is 0 everywhere.

    Decoding takes up to 20 bytes of memory per pixel of the file. Pillow's limit, `PIL.Image.MAX_IMAGE_PIXELS`, is
    compared with the file's header before that.

    Args:
        image: Path of a regular file, the bytes of a file, PIL image, or array of uint8 or uint16: `[H, W]` or
            `[H, W, 1]` (gray), `[H, W, 3]` (RGB) or `[H, W, 4]` (RGBA).
        value_range: Values that become 0 and 255, unless the image has 8 bits. "full": 0 and 65535, however dark the
            image. "auto": its own smallest and largest value; integers and floats of any size are accepted, and alpha
            is divided by its largest value. By default "full" with the check above.

    Raises:
        FileNotFoundError, OSError: The file does not exist or cannot be opened.
        TypeError: Not an image, or an array of another dtype.
        ImageError: The shape or the values are not those of an image, or the file is damaged, too large, not a regular
            file or not an image.
    """
    if value_range is not None and not (isinstance(value_range, str) and value_range in get_args(ValueRange)):
        raise ImageError(f"value_range must be 'full', 'auto' or None, got {short_repr(value_range)}")
    if isinstance(image, np.ndarray):
        return _from_array(np.asarray(image), value_range)
    if isinstance(image, Image.Image):
        return _from_pil(image, "the PIL image", value_range)
    if isinstance(image, bytes):
        with open_image(io.BytesIO(image), "the image") as opened:
            return _from_pil(opened, "the image", value_range)
    if isinstance(image, (str, os.PathLike)):
        return _from_file(os.path.expanduser(os.fsdecode(image)), value_range)
    if type(image).__module__.partition(".")[0] == "torch":
        raise TypeError("image is a torch.Tensor; pass a uint8 array [H, W, 3], or normalized pixels to encode_image")
    raise TypeError(f"image must be a path, bytes, a PIL image or a uint8 array [H, W, 3], got {type(image).__name__}")


def set_most_pixels(pixels: int) -> None:
    """Let Pillow read images of up to `pixels` pixels in this process."""
    Image.MAX_IMAGE_PIXELS = Fraction(pixels, 2)  # type: ignore[assignment]  # Pillow refuses more than twice this


def open_image(file: BinaryIO, name: str) -> Image.Image:
    """Read the header of an image file of one of `FORMATS`, which may be closed only once the pixels are read.

    Args:
        file: Open for reading.
        name: Of the image, for messages.

    Raises:
        ImageError: The file is damaged, too large for Pillow, or not an image.
    """
    Image.init()
    formats = [format for format in FORMATS if format in Image.OPEN]  # Pillow raises KeyError for others
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large, but below the limit of an error
        try:
            return Image.open(file, formats=formats)
        except UnidentifiedImageError as error:
            raise ImageError(f"{name} is not an image of a format that is read: {', '.join(formats)}") from error
        except Exception as error:  # decoders raise many types, see `_unreadable`
            raise _unreadable(name, error) from error


def resize_image(image: np.ndarray, image_size: int) -> tuple[np.ndarray, ImageFrame]:
    """Resize a uint8 RGB image `[H, W, 3]` so that its longer side is `image_size` (bilinear, antialiased).

    Returns:
        Pixels uint8 `[h, w, 3]`, and the image's frame.
    """
    H, W = image.shape[:2]
    frame = ImageFrame.of((H, W), image_size)
    h, w = frame.resized_size
    if H * W > LARGE:  # along x in strips first; Pillow may take y first, which rounds otherwise by 1
        rows = max(1, STRIP // W)
        strips = (Image.fromarray(image[top : top + rows]) for top in range(0, H, rows))
        resized = [np.asarray(strip.resize((w, strip.height), Image.Resampling.BILINEAR)) for strip in strips]
        image = np.concatenate(resized)
    return np.array(Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR)), frame


def _from_file(path: str, value_range: ValueRange | None) -> np.ndarray:
    name = short_repr(path)
    if path.lower().startswith(("http://", "https://")):
        raise ImageError(f"{name} is a URL; download the image first and pass the file's path")
    if "\0" in path:
        raise ImageError(f"{name} is not a file's name: it has a null character")
    with _open(path, name) as file, open_image(file, name) as image:
        return _from_pil(image, name, value_range)


def _open(path: str, name: str) -> BinaryIO:
    """Open a regular file. Of its errors, only OSError and ImageError leave this function."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError
        if not stat.S_ISREG(mode):  # reading a FIFO or a device may never end
            raise ImageError(f"{name} is not a regular file; copy its content to a file first")
        return open(path, "rb")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise FileNotFoundError(f"no image file at {name}") from error
    except OSError as error:
        raise _with_short_path(error, path) from error
    except UnicodeEncodeError as error:
        raise ImageError(f"{name} is not a file's name: {error}") from error


def _with_short_path(error: OSError, path: str) -> OSError:
    """Return the same error with a path that is not too long to print."""
    return OSError(error.errno, error.strerror, shorten(path, 200))


def _from_pil(image: Image.Image, name: str, value_range: ValueRange | None) -> np.ndarray:
    if 0 in image.size:
        raise ImageError(f"{name} is empty: {image.size[0]}x{image.size[1]} pixels")
    tiles: Any = getattr(image, "tile", None)  # what is to be decoded; empty after load()
    if tiles and image.format not in (None, "MPO", *FORMATS):
        raise ImageError(f"{name} has format {image.format!r}, which is not decoded here; if you trust it, load() it")
    high_bytes = image.mode in ("L", "LA", "RGB", "RGBA") and any(
        _has_sixteen_bits(image, tile[3]) for tile in tiles or ()
    )
    try:
        image.load()
        if image.format != "TIFF":  # Pillow's decoder turns these, and older releases leave the EXIF data as they were
            image = _upright(image)
        if image.mode == "F" or image.mode.startswith("I"):
            return _from_values(np.asarray(image), name, value_range, image.mode)
        if high_bytes:
            _check_high_bytes(image, name, value_range)
        return _rgb(image)
    except ImageError:
        raise
    except Exception as error:  # decoders raise many types, see `_unreadable`
        if isinstance(error, (AssertionError, AttributeError)) and getattr(image, "fp", image) is None:
            raise ImageError(f"{name} was closed before it was read; call its load() before that") from error
        raise _unreadable(name, error) from error


def _rgb(image: Image.Image) -> np.ndarray:
    """Return a loaded image as uint8 `[H, W, 3]`, strip by strip to bound the memory."""
    W, H = image.size
    array = np.empty((H, W, 3), np.uint8)
    transparent = image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info
    rows = max(1, STRIP // W)
    for top in range(0, H, rows):
        strip = image.crop((0, top, W, min(top + rows, H)))
        if transparent:
            strip = strip.convert("RGBA")
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
        array[top : top + rows] = np.asarray(strip.convert("RGB"))
    return array


def _has_sixteen_bits(image: Image.Image, arguments: Any) -> bool:
    """Return True if a tile's decoder, by its arguments, reads 16 bits per value."""
    arguments = arguments if isinstance(arguments, tuple) else (arguments,)
    depth = (65535,) if image.format == "PPM" else ()
    return any(argument in depth or (isinstance(argument, str) and ";16" in argument) for argument in arguments)


def _check_high_bytes(image: Image.Image, name: str, value_range: ValueRange | None) -> None:
    """Check a color image of 16 bits, of which Pillow keeps the high byte only."""
    extrema: Any = image.getextrema()
    colors = [extrema] if image.mode == "L" else extrema[:1] if image.mode == "LA" else extrema[:3]
    byte = max(high for _, high in colors)  # cut off, or for PPM rounded
    if value_range is None and byte * 257 - 128 < DARKEST:
        raise _dark(name, byte * 256 + 255, "no value above ")
    if value_range == "auto":
        raise ImageError(
            f"{name} has 16 bits per color, of which Pillow reads 8, too few for value_range='auto'; "
            "read it with OpenCV's IMREAD_UNCHANGED and pass the array",
            f"{name} has 16 bits per color, which --value-range auto does not scale; convert it to 8 bits first",
        )


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
        problem = f"{name} is too large: {error}"
        return ImageError(
            f"{problem} If you trust it, raise PIL.Image.MAX_IMAGE_PIXELS first.",
            f"{problem} If you trust it, read it with `predict --max-pixels N`.",
        )
    return ImageError(f"{name} is damaged or cut off, or does not convert to RGB: {error}")


def _from_array(array: np.ndarray, value_range: ValueRange | None) -> np.ndarray:
    kind = array.dtype.kind
    deep = (kind == "u" and array.dtype.itemsize == 2) or (kind in "iuf" and value_range == "auto")
    if array.dtype != np.uint8 and not deep:
        remedy = {
            "f": "for values in 0..1 use `(image * 255).round().astype(np.uint8)`",
            "b": "a mask becomes an image by `image.astype(np.uint8) * 255`",
        }.get(kind, "if its values are 0..255 use `image.astype(np.uint8)`")
        raise TypeError(f"image must be uint8, RGB in 0..255, got {short_repr(array.dtype)}; {remedy}")
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
    if array.dtype != np.uint8:
        array = _eight_bits(array, "image", value_range)
    if array.shape[2] == 4:
        return _rgb(Image.fromarray(np.ascontiguousarray(array)))
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def _from_values(values: np.ndarray, name: str, value_range: ValueRange | None, mode: str) -> np.ndarray:
    """Return gray values `[H, W]` of PIL's modes "I", "I;16" and "F" as RGB."""
    if value_range != "auto":
        problem = ""
        if mode == "F":
            problem = f"{name} holds floating-point values"
        elif values.min() < 0 or values.max() > 65535:
            problem = f"{name} holds values {values.min()}..{values.max()}; expected 16 bits, 0..65535"
        if problem:
            raise ImageError(f"{problem}; {_AUTO}", f"{problem}; {_AUTO_OPTION}")
    gray = _eight_bits(values[..., None], name, value_range)
    return np.ascontiguousarray(np.broadcast_to(gray, (*values.shape, 3)))


def _eight_bits(array: np.ndarray, name: str, value_range: ValueRange | None) -> np.ndarray:
    """Scale `[H, W, C]` of real numbers to uint8. The fourth channel is alpha."""
    scaled = np.empty(array.shape, np.uint8)
    for channels in (slice(0, 3), slice(3, 4)):
        values = array[..., channels]
        if not values.size:
            continue
        low, high = values.min(), values.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ImageError(f"{name} holds values that are not finite: {low}..{high}; replace them first")
        if value_range is None and 0 < high < DARKEST:
            raise _dark(name, high)
        alpha = channels.start == 3
        black, white = (0 if alpha else low, high) if value_range == "auto" else (0, 65535)
        rows = max(1, STRIP // values[0].size)
        for top in range(0, len(values), rows):
            part = values[top : top + rows].astype(np.float64) - float(black)
            part *= 255 / (float(white) - float(black)) if white > black else 0
            scaled[top : top + rows, :, channels] = np.rint(part)
    return scaled


_AUTO = "`fastsam_rwkv.load_image(image, value_range='auto')` scales its own range to 0..255"
_AUTO_OPTION = "`predict --value-range auto` scales its own range to 0..255"


def _dark(name: str, largest: Any, no: str = "") -> ImageError:
    """Return the error for 16-bit values of which none is above 16383."""
    problem = (
        f"{name} has 16 bits and {no or 'the largest value '}{largest}: read as 0..65535 it would be dark or black; "
    )
    return ImageError(
        f"{problem}{_AUTO}, value_range='full' reads a dark image; for 8-bit values use `image.astype(np.uint8)`",
        f"{problem}{_AUTO_OPTION}, --value-range full reads a dark image",
    )
