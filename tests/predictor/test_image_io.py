import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from fastsam_rwkv.config import PIXEL_MEAN, PIXEL_STD
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
        (b"\xff\xd8", TypeError, "bytes"),
        ("HTTPS://example.org/cat.jpg", ValueError, "URL"),
        (Image.fromarray(np.full((2, 2), 70000, np.int32)), ValueError, "70000"),
        (Image.fromarray(photo()[..., 0]).convert("I"), ValueError, "mode 'I' and no value above 255.*astype"),
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
