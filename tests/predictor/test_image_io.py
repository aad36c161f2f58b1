import io
import os
import pathlib
import socket
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import fastsam_rwkv
from fastsam_rwkv.config import PIXEL_MEAN, PIXEL_STD
from fastsam_rwkv.predictor import image_io
from fastsam_rwkv.predictor.transforms import ImageFrame, load_image, masks_to_image, preprocess

RED = np.full((4, 6, 3), (200, 10, 30), np.uint8)


def photo(height=40, width=60):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1).astype(np.uint8)


def test_arrays_and_files_agree(tmp_path):
    Image.fromarray(photo()).save(tmp_path / "a.png")
    for image in (photo(), Image.fromarray(photo()), tmp_path / "a.png", str(tmp_path / "a.png")):
        assert np.array_equal(load_image(image), photo())


def test_modes_become_rgb(tmp_path):
    gray = photo()[..., 0]
    assert np.array_equal(load_image(gray), np.stack([gray] * 3, -1))
    assert np.array_equal(load_image(gray[..., None]), np.stack([gray] * 3, -1))
    assert np.array_equal(load_image(Image.fromarray(gray)), np.stack([gray] * 3, -1))
    assert load_image(Image.fromarray(RED).convert("P")).shape == (4, 6, 3)
    assert load_image(Image.fromarray(RED).convert("CMYK")).shape == (4, 6, 3)
    assert set(np.unique(load_image(Image.fromarray(gray).convert("1")))) == {0, 255}


def test_transparency_is_laid_on_white():
    rgba = np.dstack([RED, np.zeros((4, 6), np.uint8)])
    rgba[0, 0, 3] = 255
    for image in (rgba, Image.fromarray(rgba)):
        got = load_image(image)
        assert tuple(got[0, 0]) == (200, 10, 30) and tuple(got[1, 1]) == (255, 255, 255)
    gray = Image.new("LA", (2, 1))
    gray.putpixel((1, 0), (7, 255))
    assert load_image(gray)[0].tolist() == [[255] * 3, [7] * 3]
    palette = Image.fromarray(RED[..., 0]).convert("P")
    palette.info["transparency"] = int(np.asarray(palette)[0, 0])
    assert (load_image(palette) == 255).all()


def test_sixteen_bits(tmp_path):
    values = np.array([[0, 257 * 100, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    for image in (values, values.astype(">u2"), Image.fromarray(values.astype(np.int32)), tmp_path / "deep.png"):
        assert load_image(image)[0, :, 0].tolist() == [0, 100, 255]


def sixteen_bit_rgb(folder, format, values):
    """Write gray values `[H, W]` uint16 as a color image of 16 bits, which Pillow reads and does not write."""
    colors = np.repeat(values[..., None], 3, -1)
    (H, W), file = values.shape, folder / f"rgb.{format}"
    if format == "ppm":
        file.write_bytes(b"P6 %d %d 65535\n" % (W, H) + colors.astype(">u2").tobytes())
    elif format == "png":
        rows = np.hstack([np.zeros((H, 1), np.uint8), colors.astype(">u2").reshape(H, -1).view(np.uint8)])
        chunks = (b"IHDR" + struct.pack(">IIBBBBB", W, H, 16, 2, 0, 0, 0), b"IDAT" + zlib.compress(rows), b"IEND")
        packed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
        file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    else:
        bits, data = 8 + 2 + 9 * 12 + 4, 8 + 2 + 9 * 12 + 4 + 6
        tags = [(256, 3, 1, W), (257, 3, 1, H), (258, 3, 3, bits), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, data)]
        tags += [(277, 3, 1, 3), (278, 3, 1, H), (279, 4, 1, colors.nbytes)]
        directory = struct.pack("<H", 9) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
        samples = struct.pack("<HHH", 16, 16, 16) + colors.astype("<u2").tobytes()
        file.write_bytes(b"II*\0" + struct.pack("<I", 8) + directory + samples)
    return file


GRADIENT = np.tile(np.arange(256, dtype=np.uint16), (64, 1))


@pytest.mark.parametrize("bits", [1, 4, 8, 10, 12, 14])
def test_part_of_sixteen_bits_is_refused_or_scaled(bits, tmp_path):
    values = (GRADIENT.astype(np.uint32) * (2**bits - 1) // 255).astype(np.uint16)
    for suffix in ("png", "tiff"):
        Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    (tmp_path / "a.pgm").write_bytes(b"P5 256 64 65535\n" + values.astype(">u2").tobytes())
    files = [tmp_path / "a.png", tmp_path / "a.tiff", tmp_path / "a.pgm"]
    arrays = [values, values[..., None], values.astype(">u2"), np.repeat(values[..., None], 3, -1)]
    opaque = np.dstack([*[values] * 3, np.full_like(values, 65535)])
    images = [Image.fromarray(values), Image.fromarray(values.astype(np.int32))]
    want = np.rint(values * 255.0 / (2**bits - 1)).astype(np.uint8)
    for image in (*files, *arrays, opaque, *images):
        with pytest.raises(ValueError, match=rf"largest value {2**bits - 1}: .*value_range='auto'"):
            load_image(image)
        scaled = load_image(image, value_range="auto")
        assert scaled.dtype == np.uint8 and np.array_equal(scaled, np.repeat(want[..., None], 3, -1))
        assert load_image(image, value_range="full").max() == round((2**bits - 1) / 257)


def test_the_range_is_used_from_14_bits_on():
    for largest in (1 << 14, 65535):
        assert load_image(np.array([[0, largest]], np.uint16)).max() == round(largest / 257)
    assert not load_image(np.zeros((2, 2), np.uint16)).any()
    thermal = np.array([[7000, 8000, 9000]], np.uint16)
    assert load_image(thermal, value_range="auto")[0, :, 0].tolist() == [0, 128, 255]
    assert not load_image(np.full((2, 2), 99, np.uint16), value_range="auto").any()


def test_alpha_of_sixteen_bits():
    values = np.array([[[0, 0, 0, 4095], [4095, 4095, 0, 4095], [4095, 0, 0, 0]]], np.uint16)
    want = [[0, 0, 0], [255, 255, 0], [255, 255, 255]]
    assert load_image(values, value_range="auto")[0].tolist() == want
    values[..., :3] *= 16
    with pytest.raises(ValueError, match="largest value 4095"):  # would be nearly transparent
        load_image(values)


@pytest.mark.parametrize("format", ["png", "ppm", "tiff"])
def test_sixteen_bits_per_color(format, tmp_path):
    """Pillow keeps the high byte of these files, and 8 to 14 bits would be black."""
    assert load_image(sixteen_bit_rgb(tmp_path, format, GRADIENT * 257)).max() == 255
    for factor in (1, 16, 64):
        file = sixteen_bit_rgb(tmp_path, format, GRADIENT * factor)
        with pytest.raises(ValueError, match="16 bits and no value above .*value_range='auto'"):
            load_image(file)
        with pytest.raises(ValueError, match="16 bits and no value above"), Image.open(file) as image:
            load_image(image)
        assert load_image(file, value_range="full").max() in (255 * factor // 256, round(255 * factor / 257))
        with pytest.raises(ValueError, match="Pillow reads 8") as caught:
            load_image(file, value_range="auto")
        assert "--value-range" in caught.value.command_message
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / f"black.{format}")
    assert load_image(tmp_path / f"black.{format}").max() == 0


def test_auto_scales_integers_and_floats_and_leaves_eight_bits():
    assert np.array_equal(load_image(photo() // 3, value_range="auto"), photo() // 3)
    ramp = np.array([[-1.0, 0.0, 1.0]])
    for image in (ramp, ramp.astype(np.float32), ramp.astype(np.int64), Image.fromarray(ramp.astype(np.float32))):
        assert load_image(image, value_range="auto")[0, :, 0].tolist() == [0, 128, 255]
    wide = Image.fromarray(np.array([[0, 70000]], np.int32))
    assert load_image(wide, value_range="auto")[0, :, 0].tolist() == [0, 255]
    with pytest.raises(ValueError, match="not finite"):
        load_image(ramp * np.nan, value_range="auto")
    for wrong in ("half", True, ["auto"]):
        with pytest.raises(ValueError, match="value_range must be 'full', 'auto' or None"):
            load_image(photo(), value_range=wrong)
    assert fastsam_rwkv.load_image is load_image


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, tmp_path):
    upright = photo(24, 40)
    turn = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = Image.fromarray(upright)
    stored = stored if turn is None else stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(load_image(tmp_path / "turned.png"), upright)


def test_invalid_exif_keeps_the_image(tmp_path):
    """Pillow cannot write a resolution unit that is a 32-bit number, but the orientation is valid."""
    tags = struct.pack("<H", 2) + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHII", 0x0128, 1, 1, 2)
    for name, exif, turned in (
        ("odd", b"Exif\0\0II*\0" + struct.pack("<I", 8) + tags + bytes(4), True),
        ("garbage", b"Exif\0\0garbage", False),
    ):
        Image.fromarray(photo()).save(tmp_path / f"{name}.png", exif=exif)
        want = np.rot90(photo(), -1) if turned else photo()
        assert np.array_equal(load_image(tmp_path / f"{name}.png"), want)


def test_a_closed_image_is_named(tmp_path):
    Image.fromarray(photo()).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        pass
    with pytest.raises(ValueError, match="closed before it was read"):
        load_image(image)


def damaged_jpeg():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()[:4000]


@pytest.mark.parametrize(
    "image, error, message",
    [
        (photo() / 255, TypeError, r"float64.*\(image \* 255\)"),
        (photo() > 3, TypeError, r"bool.*astype\(np.uint8\) \* 255"),
        (photo().astype(np.int64), TypeError, "int64.*0..255"),
        (np.zeros((4, 40, 60), np.uint8), ValueError, r"\[4, 40, 60\]; channels come last"),
        (b"\xff\xd8", ValueError, "not an image of a format"),
        (b"", ValueError, "not an image of a format"),
        (bytearray(4), TypeError, "bytearray"),
        ("HTTPS://example.org/cat.jpg", ValueError, "URL"),
        (Image.fromarray(np.full((2, 2), 70000, np.int32)), ValueError, "70000"),
        (Image.fromarray(photo()[..., 0]).convert("I"), ValueError, "the largest value 250: .*astype"),
        (photo().transpose(2, 0, 1), ValueError, "channels come last"),
        (np.zeros((3, 4, 5, 3), np.uint8), ValueError, r"\[3, 4, 5, 3\]"),
        (np.zeros((5, 4, 2), np.uint8), ValueError, r"\[5, 4, 2\]"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "empty"),
        (Image.new("RGB", (0, 4)), ValueError, "empty: 0x4"),
        (Image.new("F", (4, 4)), ValueError, "floating-point"),
        (torch.zeros(3, 4, 4), TypeError, "torch.Tensor"),
        (None, TypeError, "NoneType"),
        ([[1, 2]], TypeError, "list"),
        ("http://example.org/cat.jpg", ValueError, "URL"),
        ("nothing.jpg", FileNotFoundError, "nothing.jpg"),
        (".", FileNotFoundError, "no image file at '.'"),
    ],
)
def test_values_that_are_not_images_are_refused(image, error, message):
    with pytest.raises(error, match=message):
        load_image(image)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF"])
def test_bytes_of_a_file_are_read_as_the_file(format, tmp_path):
    file = tmp_path / "image"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(photo()).save(file, format, exif=exif)
    found = load_image(file)
    assert found.shape == (60, 40, 3)
    np.testing.assert_array_equal(load_image(file.read_bytes()), found)
    with Image.open(file) as opened:
        np.testing.assert_array_equal(load_image(opened), found)
        np.testing.assert_array_equal(load_image(opened), found)  # loaded by then


def test_damaged_files(tmp_path):
    (tmp_path / "cut.jpg").write_bytes(damaged_jpeg())
    with pytest.raises(ValueError, match="cut.jpg.*damaged or cut off"):
        load_image(tmp_path / "cut.jpg")
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(ValueError, match="text.jpg.*not an image"):
        load_image(tmp_path / "text.jpg")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on cut EXIF data
@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "PPM", "ICO"])
def test_truncated_files_are_named(format, tmp_path):
    """Decoders raise many types, at opening or later. None may fill the rest with gray."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "whole", format, exif=exif)
    data = (tmp_path / "whole").read_bytes()
    for part in (0.002, 0.005, 0.01, 0.02, 0.1, 0.5, 0.97):
        (tmp_path / "cut").write_bytes(data[: max(3, int(len(data) * part))])
        with pytest.raises(ValueError, match="cut'"):
            load_image(tmp_path / "cut")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Ghostscript is gs on POSIX only")
def test_no_program_is_started(tmp_path, monkeypatch):
    """EPS under any name is refused before Pillow's plugin starts Ghostscript."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs", raising=False)  # found at import since Pillow 10.1
    for name in ("photo.jpg", "photo.png", "photo.eps"):
        (tmp_path / name).write_bytes(EPS)
        with pytest.raises(ValueError, match=f"{name}' is not an image of a format that is read: JPEG, PNG"):
            load_image(tmp_path / name)
    with Image.open(tmp_path / "photo.eps") as image, pytest.raises(ValueError, match="'EPS'.*not decoded here"):
        load_image(image)
    assert not (tmp_path / "started").exists()


def test_formats_that_are_read(tmp_path):
    Image.init()
    for format in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "PPM", "JPEG2000", "ICO", "PCX", "SGI", "TGA"):
        Image.fromarray(np.full((16, 16, 3), 40, np.uint8)).save(tmp_path / "any name", format)
        assert np.abs(load_image(tmp_path / "any name").astype(int) - 40).max() < 3, format
    for format in ("JPEG", "MPO"):
        frames = [Image.new("RGB", (16, 16), (color, color, color)) for color in (40, 200)]
        frames[0].save(
            tmp_path / "any name",
            format,
            **({"save_all": True, "append_images": frames[1:]} if format == "MPO" else {}),
        )
        with Image.open(tmp_path / "any name") as image:
            assert image.format == format and abs(int(load_image(image).max()) - 40) < 3


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no FIFO, and no device in a path")
def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(tmp_path / "socket"))
        for name in (tmp_path / "fifo", tmp_path / "link", tmp_path / "socket", "/dev/zero", "/dev/null"):
            with pytest.raises(ValueError, match="not a regular file"):
                load_image(name)


@pytest.mark.skipif(sys.platform == "win32", reason="symlinks need a privilege on Windows")
def test_paths_that_cannot_be_opened(tmp_path, monkeypatch):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "a.png").write_bytes(b"")
    for path, error, message in (
        (tmp_path / "loop", OSError, "symbolic links"),
        ("x" * 100_000, OSError, "too long"),
        ("x/" * 100_000, OSError, "too long"),
        ("https://" + "x" * 100_000, ValueError, "URL"),
        ("a\0b", ValueError, "not a file's name"),
        ("\ud800", ValueError, "not a file's name"),
        (tmp_path / "a.png" / "b", FileNotFoundError, "no image file"),
        (str(tmp_path), FileNotFoundError, "no image file"),
        ("", FileNotFoundError, "no image file"),
    ):
        with pytest.raises(error, match=message) as caught:
            load_image(path)
        assert len(str(caught.value)) < 500
    Image.fromarray(photo()).save(tmp_path / "a.png")

    class BytesPath(os.PathLike):
        def __fspath__(self):
            return os.fsencode(tmp_path / "a.png")

    assert np.array_equal(load_image(BytesPath()), photo())

    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "x" * 1000)

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(PermissionError) as caught:
        load_image(tmp_path / "a.png")
    assert caught.value.errno == 13 and len(str(caught.value)) < 500


@pytest.mark.parametrize("where", ["open", "load", "convert"])
@pytest.mark.parametrize(
    "error", [KeyError, RuntimeError, RecursionError, PermissionError, OverflowError, struct.error]
)
def test_any_exception_of_a_decoder_becomes_an_image_error(where, error, tmp_path, monkeypatch):
    Image.fromarray(photo()).save(tmp_path / "a.png")

    def broken(*args, **kwargs):
        raise raised("x" * 1_000_000)

    monkeypatch.setattr(
        *{"open": (Image, "open"), "load": ("PIL.ImageFile.ImageFile.load",), "convert": (Image.Image, "convert")}[
            where
        ],
        broken,
    )
    raised = error
    with pytest.raises(fastsam_rwkv.ImageError, match="a.png' is damaged or cut off") as caught:
        load_image(tmp_path / "a.png")
    assert len(str(caught.value)) < 500
    raised = MemoryError
    with pytest.raises(MemoryError):
        load_image(tmp_path / "a.png")


MEASURE = """
import resource, sys
from fastsam_rwkv.predictor import image_io
image_io.Image.init()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pixels = image_io.load_image(sys.argv[1])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (pixels.size / 3))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize("format, most", [("WEBP", 20), ("PNG", 12)])
def test_memory_of_decoding(format, most, tmp_path):
    """Bytes per pixel as load_image documents them; an RGBA image, which needs the most steps."""
    file = tmp_path / "large"
    Image.new("RGBA", (4000, 3000), (9, 9, 9, 99)).save(file, format, **({"method": 0} if format == "WEBP" else {}))
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    command = [sys.executable, "-c", MEASURE, str(file)]
    assert float(subprocess.run(command, capture_output=True, env=environment, check=True).stdout) < most


def test_an_invalid_header_is_named(tmp_path):
    (tmp_path / "a.ppm").write_bytes(b"P6 4x 4 255 " + bytes(48))
    with pytest.raises(ValueError, match="a.ppm' is damaged"):
        load_image(tmp_path / "a.ppm")


def test_decompression_bomb(tmp_path, monkeypatch):
    Image.fromarray(photo()).save(tmp_path / "large.png")  # 2400 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="large.png.*too large.*2400.*2000.*MAX_IMAGE_PIXELS"):
        load_image(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # Pillow warns here; that is no error
    assert load_image(tmp_path / "large.png").shape == (40, 60, 3)


@pytest.mark.parametrize(
    "size, resized",
    [
        ((100, 200), (64, 128)),
        ((200, 100), (128, 64)),
        ((1, 1), (128, 128)),
        ((30, 20000), (1, 128)),
        ((3, 4), (96, 128)),
    ],
)
def test_frame(size, resized):
    frame = ImageFrame.of(size, 128)
    assert frame.resized_size == resized and frame.input_size == (128, 128)
    low_res_masks = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    masks = masks_to_image(low_res_masks, frame)
    assert masks.shape == (2, 1, *size)
    np.testing.assert_allclose(frame.masks_to_image(low_res_masks.numpy()), masks, atol=1e-5)


@pytest.mark.parametrize("size", [(100, 200), (200, 100), (1, 1), (30, 2000)])
@pytest.mark.parametrize("values", [1, 999, 10**9])
def test_strips_are_the_whole(size, values):
    frame = ImageFrame.of(size, 128)
    low_res_masks = np.random.default_rng(0).normal(size=(2, 3, 32, 32))
    strips = list(frame.strips_to_image(low_res_masks, values))
    assert [strip.start for strip, _ in strips] == [0, *(strip.stop for strip, _ in strips[:-1])]
    assert all(logits.size <= values or logits.shape[2] == 1 for _, logits in strips)
    whole = np.concatenate([logits for _, logits in strips], 2)
    np.testing.assert_allclose(whole, frame.masks_to_image(low_res_masks), atol=1e-5)


def test_memory_of_masks_is_bounded():
    """Logits of one strip at a time, and matrices of the two axes."""
    frame = ImageFrame.of((3000, 5000), 1024)
    low_res_masks = np.zeros((1, 1, 256, 256), np.float32)
    tracemalloc.start()
    for _, logits in frame.strips_to_image(low_res_masks, 1 << 20):
        assert logits.shape[3] == 5000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80 << 20  # the mask has 60 MB, and one of 10 times as many rows needs no more


@pytest.mark.parametrize("size", [(90, 150), (150, 90), (40, 40), (300, 7), (7, 300)])
@pytest.mark.parametrize("image_size", [64, 128])
def test_an_image_resized_in_strips_is_the_same(size, image_size, monkeypatch):
    image = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
    want, _ = image_io.resize_image(image, image_size)
    monkeypatch.setattr(image_io, "LARGE", 1)
    for strip in (1, 13 * size[1]):
        monkeypatch.setattr(image_io, "STRIP", strip)
        for array in (image, np.asfortranarray(image), image[::-1][::-1]):
            resized = image_io.resize_image(array, image_size)[0].astype(int)
            np.testing.assert_allclose(resized, want.astype(int), atol=1)
            assert np.array_equal(load_image(array), image)


def test_sides_round_half_up():
    assert ImageFrame.of((5, 128), 64).resized_size == (3, 64)  # 2.5, which round() takes to 2


def test_one_scale_for_both_axes_in_numpy_and_torch():
    frame = ImageFrame.of((30, 200), 128)  # 19.2 rows become 19, yet y is scaled like x
    for array in (np.array, torch.tensor):
        points, boxes = (
            frame.points_to_input(array([[50.0, 25.0]])),
            frame.boxes_to_input(array([[0.0, 5.0, 100.0, 30.0]])),
        )
        assert type(points) is type(boxes) is type(array([0.0]))
        assert points.tolist() == [[32.0, 16.0]]
        assert boxes.ravel().tolist() == pytest.approx([0, 3.2, 64, 19.2])
    for to_input in (frame.points_to_input, frame.boxes_to_input):
        with pytest.raises(TypeError, match=r"numpy array or a torch.Tensor, got \[\[50.0"):
            to_input([[50.0, 25.0, 60.0, 35.0]])
        with pytest.raises(TypeError) as caught:
            to_input([[50.0, 25.0, 60.0, 35.0]] * 100_000)
        assert len(str(caught.value)) < 500


def test_preprocess_normalizes_then_pads():
    image = np.full((10, 20, 3), (50, 100, 150), np.uint8)
    pixels, frame = preprocess(image, 64)
    assert pixels.shape == (1, 3, 64, 64) and frame.resized_size == (32, 64)
    want = (torch.tensor([50.0, 100.0, 150.0]) - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    torch.testing.assert_close(pixels[0, :, :32].mean((1, 2)), want)
    assert (pixels[0, :, 32:] == 0).all()


def test_a_point_maps_to_the_input_and_back():
    """A disc around a point in the input frame surrounds the point in the image frame."""
    frame = ImageFrame.of((300, 450), 128)
    x, y = frame.points_to_input(torch.tensor([333.0, 111.0])).tolist()
    v, u = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    logits = 6.0 - ((u * 4 + 1.5 - x) ** 2 + (v * 4 + 1.5 - y) ** 2)[None, None] / 16
    mask = masks_to_image(logits, frame)[0, 0] > 0
    rows, columns = torch.nonzero(mask, as_tuple=True)
    assert abs(columns.float().mean() - 333) < 2 and abs(rows.float().mean() - 111) < 2


def test_the_home_folder_in_paths(tmp_path, monkeypatch):
    Image.fromarray(np.full((4, 5, 3), 7, np.uint8)).save(tmp_path / "x.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert load_image("~/x.png").shape == (4, 5, 3)
    with pytest.raises(FileNotFoundError, match="y.png"):
        load_image(pathlib.Path("~/y.png"))
