import numpy as np
import pytest
import torch
from PIL import Image
from small_model import CONFIG, small_model

import fastsam_rwkv
from fastsam_rwkv import ModelConfig, Predictor, PromptError
from fastsam_rwkv.modeling.embedding import ImageEmbedding
from fastsam_rwkv.predictor import answers, base, torch_predictor
from fastsam_rwkv.predictor.frame import ImageFrame
from tests.endurance import same_in_threads


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def predict(model):
    return Predictor(model).predict_image


@pytest.fixture(scope="module")
def photo():
    return np.random.default_rng(0).integers(0, 255, (90, 150, 3), np.uint8)


class DiscModel:
    """Stand-in for a model: its mask is a disc of 20 input pixels around the first point, or the inside of the box."""

    config = ModelConfig.from_name("tiny", image_size=256, num_multimask_outputs=3)
    device, dtype = torch.device("cpu"), torch.float32

    def encode_image(self, pixels, input_size):
        assert pixels.dtype == torch.uint8 and max(pixels.shape[2:]) == 256 and input_size == (256, 256)
        return ImageEmbedding(torch.zeros(1, 16, 16, 256), torch.zeros(16, 16, 256), (None, None), (256, 256))

    def decode_masks(
        self, embedding, point_coords=None, point_labels=None, boxes=None, mask_input=None, multimask_output=False
    ):
        y, x = (torch.arange(64) * 4 + 1.5 for _ in range(2))
        if point_coords is not None:
            px, py = point_coords[:, 0, 0, None, None], point_coords[:, 0, 1, None, None]
            low = 20 - ((x - px) ** 2 + (y[:, None] - py) ** 2).sqrt()
        else:
            x1, y1, x2, y2 = boxes.T[:, :, None, None]
            inside = (
                torch.stack([x - x1, x2 - x], -1).amin(-1),
                torch.stack([y[:, None] - y1, y2 - y[:, None]], -1).amin(-1),
            )
            low = torch.minimum(*torch.broadcast_tensors(*inside))
        n = 3 if multimask_output else 1
        return low[:, None].expand(-1, n, -1, -1), torch.full((len(low), n), 0.5)


@pytest.mark.parametrize("size", [(90, 150), (150, 90), (600, 900), (20, 20)])
def test_masks_are_at_the_prompts(size):
    """Clicks and boxes in the image frame give masks at the same pixels, for any aspect ratio."""
    H, W = size
    image = np.zeros((H, W, 3), np.uint8)
    x, y = 0.7 * W, 0.4 * H
    mask = Predictor(DiscModel()).predict_image(image, point_coords=[[x, y]]).masks[0]
    assert mask.shape == size
    rows, columns = np.nonzero(mask)
    tolerance = 0.015 * max(size) + 1
    assert abs((columns.min() + columns.max()) / 2 - x) < tolerance
    assert abs((rows.min() + rows.max()) / 2 - y) < tolerance
    box = np.array([0.2 * W, 0.1 * H, 0.6 * W, 0.8 * H])
    rows, columns = np.nonzero(Predictor(DiscModel()).predict_image(image, box=box).masks[0])
    got = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    assert np.abs(got - box).max() < tolerance


def test_prompts_are_in_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    Image.fromarray(np.zeros((100, 200, 3), np.uint8)).save(tmp_path / "turned.jpg", exif=exif)
    masks = Predictor(DiscModel()).predict_image(tmp_path / "turned.jpg", point_coords=[[80, 180]]).masks
    assert masks.shape == (1, 200, 100)
    assert masks[0, 180, 80] and not masks[0, 20, 20]


def test_shapes_of_one_prompt_and_of_many(predict, photo):
    masks, scores, low = predict(photo, point_coords=[[10, 20], [30, 40]], point_labels=[1, 0])
    assert masks.shape == (1, 90, 150) and masks.dtype == bool
    assert scores.shape == (1,) and low.shape == (1, 32, 32) and scores.dtype == low.dtype == np.float32
    masks, scores, low = predict(photo, box=[1, 2, 30, 40], point_coords=[[5, 5]], multimask_output=True)
    assert masks.shape == (3, 90, 150) and scores.shape == (3,) and low.shape == (3, 32, 32)
    boxes = [[1, 2, 30, 40], [5, 5, 100, 80]]
    masks, scores, low = predict(photo, box=boxes, multimask_output=True)
    assert masks.shape == (2, 3, 90, 150) and scores.shape == (2, 3) and low.shape == (2, 3, 32, 32)
    masks, _, _ = predict(photo, point_coords=np.full((2, 3, 2), 7.0))
    assert masks.shape == (2, 1, 90, 150)


def test_logits_and_masks_agree(predict, photo):
    logits = predict(photo, box=[1, 2, 90, 70], return_logits=True).masks
    assert logits.dtype == np.float32
    assert np.array_equal(logits > 0, predict(photo, box=[1, 2, 90, 70]).masks)


def test_many_prompts_are_decoded_in_chunks(predict, photo, monkeypatch):
    boxes = np.array([[i, i, i + 30, i + 40] for i in range(7)])
    whole = predict(photo, box=boxes)
    monkeypatch.setattr(base, "PROMPTS_AT_ONCE", 3)
    np.testing.assert_allclose(predict(photo, box=boxes).low_res_logits, whole.low_res_logits, atol=1e-4)


def test_masks_are_enlarged_in_chunks(predict, photo, monkeypatch):
    """Float masks in the image frame are bounded in number and fill the rows of one array."""
    boxes = np.array([[i, i, i + 30, i + 40] for i in range(7)])
    prompts = {"box": boxes, "multimask_output": True}
    whole, logits = (predict(photo, **prompts, return_logits=kind).masks for kind in (False, True))
    monkeypatch.setattr(answers, "VALUES_AT_ONCE", 2 * 3 * 128 * 128)
    sizes = []
    enlarge = torch_predictor.masks_to_image
    monkeypatch.setattr(torch_predictor, "masks_to_image", lambda low, f: sizes.append(len(low)) or enlarge(low, f))
    assert np.array_equal(predict(photo, **prompts).masks, whole)
    assert sizes == [2, 2, 2, 1]
    np.testing.assert_allclose(predict(photo, **prompts, return_logits=True).masks, logits, atol=1e-5)


def test_masks_of_a_large_image_are_enlarged_one_by_one_and_in_strips(predict, photo, monkeypatch):
    prompts = {"box": [[1, 2, 30, 40], [20, 20, 140, 80]], "multimask_output": True}
    whole = [predict(photo, **prompts, return_logits=kind) for kind in (False, True)]
    shapes = []
    enlarge = torch_predictor.masks_to_image
    monkeypatch.setattr(torch_predictor, "masks_to_image", lambda low, f: shapes.append(low.shape) or enlarge(low, f))
    monkeypatch.setattr(answers, "STRIP", 7 * 150)
    for most, calls in ((128 * 128, 12), (128 * 128 - 1, 0)):  # one mask, and less than that
        monkeypatch.setattr(answers, "VALUES_AT_ONCE", most)
        for kind, want in zip((False, True), whole, strict=True):
            got = predict(photo, **prompts, return_logits=kind)
            np.testing.assert_allclose(got.masks, want.masks, atol=1e-5)
            assert got.masks.dtype == want.masks.dtype and np.array_equal(got.scores, want.scores)
        assert len(shapes) == calls and all(shape == (1, 1, 32, 32) for shape in shapes)
        shapes.clear()


def test_padding_points_may_be_outside_the_image(predict, photo):
    """SAM's users pad prompts that have fewer points, often with (-1, -1) or (0, 0)."""
    one = predict(photo, point_coords=[[9, 9], [0, 0]], point_labels=[1, -1])
    for place in ([-1, -1], [999, 999]):
        again = predict(photo, point_coords=[[9, 9], place], point_labels=[1, -1])
        np.testing.assert_array_equal(again.low_res_logits, one.low_res_logits)
    box = {"box": [1, 2, 30, 40]}
    assert predict(photo, point_coords=[[-1, -1]], point_labels=[-1], **box).masks.shape == (
        1,
        90,
        150,
    )


def test_prompts_at_the_edge(predict, photo):
    corners = [[0, 0], [150, 90]]
    assert predict(photo, point_coords=corners).masks.shape == (1, 90, 150)
    assert predict(photo, box=[-20, -10, 400, 300]).masks.shape == (
        1,
        90,
        150,
    )  # partly outside, not clipped


def test_points_alone_are_foreground(predict, photo):
    coords = [[9, 9], [30, 30]]
    want = predict(photo, point_coords=coords, point_labels=[1, 1])
    np.testing.assert_array_equal(predict(photo, point_coords=coords).low_res_logits, want.low_res_logits)


def test_low_res_logits_serve_as_mask_input(predict, photo):
    first = predict(photo, point_coords=[[30, 30]])
    again = predict(photo, point_coords=[[30, 30]], mask_input=first.low_res_logits)
    assert not np.allclose(again.low_res_logits, first.low_res_logits)
    boxes = np.array([[1, 2, 30, 40], [5, 5, 100, 80]])
    many = predict(photo, box=boxes)
    assert predict(photo, box=boxes, mask_input=many.low_res_logits).masks.shape == (
        2,
        1,
        90,
        150,
    )


def test_predictor_has_the_interface_of_sam_predictor(predict, model, photo):
    predictor = Predictor(model)
    assert not predictor.is_image_set
    with pytest.raises(RuntimeError, match="set_image"):
        predictor.predict(point_coords=np.array([[3, 4]]), point_labels=np.array([1]))
    with pytest.raises(RuntimeError, match="set_image"):
        predictor.get_image_embedding()
    predictor.set_image(photo)
    masks, scores, low = predictor.predict(np.array([[3, 4]]), np.array([1]))  # SAM's default: three masks
    assert masks.shape == (3, 90, 150) and scores.shape == (3,) and low.shape == (3, 32, 32)
    same = predict(photo, point_coords=[[3, 4]], multimask_output=True)
    assert np.array_equal(masks, same.masks)
    best = low[[scores.argmax()]]
    masks, _, _ = predictor.predict(box=np.array([[1, 2, 30, 40]]), mask_input=best, multimask_output=False)
    assert masks.shape == (1, 90, 150)
    assert predictor.predict(box=np.array([[1, 2, 30, 40], [1, 2, 50, 60]]))[0].shape == (2, 3, 90, 150)
    batch_of_one = predictor.predict(np.array([[[3, 4]]]), np.array([[1]]), box=np.array([[1, 2, 30, 40]]))
    assert batch_of_one[0].shape == (1, 3, 90, 150)
    assert predictor.get_image_embedding().shape == (1, 256, 8, 8)
    assert predictor.device == torch.device("cpu")
    predictor.reset_image()
    assert not predictor.is_image_set


def test_bgr_arrays(model, photo):
    rgb, bgr = Predictor(model), Predictor(model)
    rgb.set_image(photo)
    bgr.set_image(photo[..., ::-1], image_format="BGR")
    assert torch.equal(rgb.get_image_embedding(), bgr.get_image_embedding())
    with pytest.raises(ValueError, match="'HSV'"):
        rgb.set_image(photo, image_format="HSV")


def test_a_failed_set_image_keeps_the_previous_image(model, photo):
    predictor = Predictor(model)
    predictor.set_image(photo)
    with pytest.raises(TypeError):
        predictor.set_image(photo / 255)
    assert predictor.is_image_set


@pytest.mark.parametrize("size", [(1, 1), (30, 20000), (20000, 30)])
def test_extreme_images(predict, size):
    masks, scores, _ = predict(np.zeros((*size, 3), np.uint8), point_coords=[[0, 0]])
    assert masks.shape == (1, *size) and np.isfinite(scores).all()


def disc(H, W):
    y, x = np.mgrid[:H, :W]
    return (x - 0.6 * W) ** 2 + (y - 0.4 * H) ** 2 < (0.3 * min(H, W)) ** 2


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (60, 80), (1500, 2000), (513, 1024)])
@pytest.mark.parametrize("image_size", [128, 512, 1024])
def test_a_mask_becomes_logits_and_a_mask_again(size, image_size):
    frame = ImageFrame.of(size, image_size)
    y, x = np.mgrid[: size[0], : size[1]]
    for mask in (disc(*size), (x < 0.4 * size[1]) & (y > 0.3 * size[0]), np.ones(size, bool)):
        logits = fastsam_rwkv.mask_to_low_res_logits(mask, image_size)
        assert logits.shape == (1, image_size // 4, image_size // 4) and logits.dtype == np.float32
        assert np.abs(logits).max() == pytest.approx(10)
        again = frame.masks_to_image(logits[None])[0, 0] > 0
        assert (again & mask).sum() / (again | mask).sum() >= 0.95


def test_logits_of_a_mask_are_shares_of_the_pixels():
    mask = np.zeros((8, 16), bool)  # with an input of 32 pixels, a low-resolution pixel covers 2 x 2
    mask[:4, :4] = mask[4, 4] = mask[4:6, 6:8] = mask[5, 7] = True
    mask[5, 6] = False
    logits = fastsam_rwkv.mask_to_low_res_logits(mask, 32)[0]
    assert (logits[:2, :2] == 10).all() and logits[2, 2] == -5 and logits[2, 3] == 5
    assert (logits[4:] == -10).all() and (logits[:2, 2:] == -10).all()  # padding, and outside the mask


def test_masks_of_any_dtype_become_logits(model, predict, photo):
    mask = disc(90, 150)
    predictor = Predictor(model)
    want = predictor.mask_to_low_res_logits(mask)
    assert want.shape == (1, 32, 32)
    others = (mask * 1, mask * 255.0, mask.astype(np.uint8) * 255, mask.tolist(), torch.tensor(mask))
    for other in others:
        assert np.array_equal(predictor.mask_to_low_res_logits(other), want)
    many = predictor.mask_to_low_res_logits(np.stack([mask, ~mask]))
    assert many.shape == (2, 1, 32, 32) and np.array_equal(many[0], want)
    assert (predictor.mask_to_low_res_logits(mask & False) == -10).all()
    assert predict(photo, mask_input=want, zoom="never").masks.shape == (1, 90, 150)
    assert predict(photo, mask_input=many).masks.shape == (2, 1, 90, 150)


@pytest.mark.parametrize(
    "mask, message",
    [
        (np.array([[0.0, 0.5]]), r"bool, 0 and 1, or 0 and 255, got values 0..0.5; .*`logits > 0`"),
        (np.array([[-3.0, 4.0]]), "got values -3..4"),
        (np.array([[0, 1, 255]]), "got values 0..255"),
        (np.array([[0, 128]]), "got values 0..128"),
        (np.zeros((2, 2, 2, 2)), r"shape \[2, 2, 2, 2\]"),
        (np.zeros((0, 2)), r"shape \[0, 2\]"),
        ([["a"]], "array of numbers"),
    ],
)
def test_values_that_are_not_masks_are_refused(mask, message):
    with pytest.raises(fastsam_rwkv.PromptError, match=message):
        fastsam_rwkv.mask_to_low_res_logits(mask, 128)
    for image_size in (0, -4, 126, 128.0, "x" * 1000):
        with pytest.raises(fastsam_rwkv.PromptError, match="image_size must be a positive multiple of 4"):
            fastsam_rwkv.mask_to_low_res_logits(np.ones((2, 2)), image_size)


LOW_RES_DISC = disc(32, 32)[None]


@pytest.mark.parametrize(
    "mask_input, message",
    [
        (LOW_RES_DISC, "got a mask of bool; `fastsam_rwkv.mask_to_low_res_logits"),
        (np.zeros((1, 32, 32), bool), "got a mask of bool"),
        (disc(90, 150), "got a mask of bool"),
        (torch.tensor(LOW_RES_DISC), "got a mask of bool"),
        (LOW_RES_DISC.astype(np.uint8), "got a mask of uint8"),
        (LOW_RES_DISC.tolist(), "got a mask of values 0 and 1"),
        (LOW_RES_DISC * 1.0, "got a mask of values 0 and 1"),
        (LOW_RES_DISC * 1, "got a mask of values 0 and 1"),
        (np.ones((1, 32, 32)), "got a mask of values 0 and 1"),
        (LOW_RES_DISC * 255.0, "got a mask of values 0 and 255"),
        (np.stack([LOW_RES_DISC * 20.0 - 10, LOW_RES_DISC * 1.0]), "got a mask of values 0 and 1"),
        (LOW_RES_DISC * 0.7 + 0.1, r"got 0.1..0.8 as of probabilities p; give `np.log"),
    ],
)
def test_masks_and_probabilities_are_no_logits(predict, photo, mask_input, message):
    with pytest.raises(fastsam_rwkv.PromptError, match=message):
        predict(photo, mask_input=mask_input)


@pytest.mark.parametrize("mask_input", [np.zeros((1, 32, 32)), LOW_RES_DISC * 2.0 - 1, np.full((1, 32, 32), 10.0)])
def test_unusual_logits_are_taken(predict, photo, mask_input):
    assert predict(photo, mask_input=mask_input).masks.shape == (1, 90, 150)


class Hostile:
    def __array__(self, *args, **kwargs):
        raise KeyError("x" * 1_000_000)

    __repr__ = __array__


ENDLESS = [3, 4]
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize(
    "value",
    [
        [[10**400, 3]],
        ENDLESS,
        Hostile(),
        {"x": 3},
        "x" * 1_000_000,
        [["x" * 1_000_000] * 2],
        np.array([[3 + 4j, 5]]),
        np.array([["2020-01-01", "2020-01-02"]], "M8[D]"),
        torch.zeros(1, 2, device="meta"),
        torch.zeros(1, 2).to_sparse(),
        [[1, 2]] * 100_000 + [[3]],
    ],
    ids=range(11),
)
@pytest.mark.parametrize("name", ["point_coords", "point_labels", "box", "mask_input"])
def test_any_value_of_a_prompt_is_taken_or_refused_shortly(predict, photo, name, value):
    points = {"point_coords": [[3, 4]]} if name == "point_labels" else {}
    with pytest.raises(fastsam_rwkv.PromptError) as caught:
        predict(photo, **points, **{name: value})
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", ["x" * 1_000_000, np.zeros(3), [1] * 1_000_000, Hostile()], ids=range(4))
def test_any_value_of_an_option_is_refused_shortly(model, photo, value):
    predictor = Predictor(model)
    with pytest.raises(fastsam_rwkv.ImageError, match="image_format must be") as caught:
        predictor.set_image(photo, image_format=value)
    assert len(str(caught.value)) < 500
    with pytest.raises(fastsam_rwkv.PromptError, match="zoom must be") as caught:
        predictor.predict_image(photo, box=[1, 2, 30, 40], zoom=value)
    assert len(str(caught.value)) < 500


NAN = float("nan")


@pytest.mark.parametrize(
    "prompts, message",
    [
        ({}, "no prompt"),
        ({"point_coords": []}, r"shape \[0\]"),
        ({"point_coords": np.zeros((0, 2))}, "hold no point"),
        ({"point_coords": np.zeros((0, 1, 2))}, "empty"),
        ({"point_coords": [[NAN, 3]]}, "finite, got .*nan"),
        ({"point_coords": [[float("inf"), 3]]}, "finite, got .*inf"),
        ({"point_coords": [3, 4]}, r"shape \[2\]"),
        ({"point_coords": [["a", "b"]]}, "array of numbers"),
        ({"point_coords": [[200, 4]]}, r"\[200.0, 4.0\].*150x90"),
        ({"point_coords": [[4, -1]]}, r"\[4.0, -1.0\].*150x90"),
        ({"point_coords": [[3, 4]], "point_labels": [1, 0]}, r"shape \[1\], got \[2\]"),
        ({"point_coords": [[3, 4]], "point_labels": [2]}, "label 2: .*corners of a box as `box`"),
        ({"point_coords": [[3, 4], [5]]}, "array of numbers"),
        ({"point_coords": [[1e300, 4]]}, "finite, got inf at index"),
        ({"point_coords": [[3, 4]], "point_labels": [0.5]}, "label 0.5"),
        ({"point_coords": [[3, 4]], "point_labels": [-1]}, "at least one point"),
        ({"point_labels": [1]}, "without point_coords"),
        ({"box": [30, 10, 20, 40]}, r"\[30.0, 10.0, 20.0, 40.0\].*x1 < x2"),
        ({"box": [10, 40, 20, 40]}, "empty or reversed"),
        ({"box": [NAN, 10, 20, 40]}, "finite"),
        ({"box": [160, 10, 170, 40]}, "lies outside.*150x90"),
        ({"box": [-20, -10, -5, -1]}, "lies outside"),
        ({"box": [1, 2, 3]}, r"shape \[3\]"),
        ({"box": [[[1, 2, 3, 4]]]}, r"box must be \[4\] or \[N, 4\] \(x1, y1, x2, y2\), got shape \[1, 1, 4\]"),
        ({"box": np.zeros((0, 4))}, "box are empty"),
        ({"box": []}, r"got shape \[0\]"),
        ({"box": [[1, 2, 3, 4]] * 2, "point_coords": [[3, 4]]}, "box hold N prompts but point_coords"),
        ({"box": [[1, 2, 3, 4]] * 2, "point_coords": np.ones((3, 1, 2))}, "differ in number"),
        ({"mask_input": np.zeros((1, 16, 16))}, r"\[1, 32, 32\].*got shape \[1, 16, 16\]"),
        ({"mask_input": np.full((1, 32, 32), NAN)}, r"^mask_input must be finite, got nan at index \[0, 0, 0\]$"),
        (
            {"mask_input": np.zeros((3, 32, 32))},
            r"mask_input must be \[1, 32, 32\] or \[N, 1, 32, 32\] logits, got shape \[3, 32, 32\]",
        ),
    ],
)
def test_invalid_prompts_are_named(predict, photo, prompts, message):
    with pytest.raises(ValueError, match=message):
        predict(photo, **prompts)


def test_ragged_points_beside_a_box_are_named(model, photo):
    predictor = Predictor(model)
    predictor.set_image(photo)
    with pytest.raises(ValueError, match="point_coords must be an array of numbers"):
        predictor.predict([[1, 2], [3]], box=[[1, 2, 30, 40]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_prompts_may_be_tensors(predict, photo, dtype):
    box = torch.tensor([8.0, 16.0, 64.0, 80.0]).to(dtype)
    got = predict(photo, box=box.requires_grad_() if dtype.is_floating_point else box)
    want = predict(photo, box=[8, 16, 64, 80]).low_res_logits
    assert np.array_equal(got.low_res_logits, want)
    assert np.array_equal(predict(photo, box=list(box)).low_res_logits, want)
    assert np.array_equal(predict(photo, box=torch.Size([8, 16, 64, 80])).low_res_logits, want)


def test_a_head_on_the_embedding_gets_gradients(model, photo):
    predictor = Predictor(model)
    predictor.set_image(photo)
    head = torch.nn.Conv2d(256, 1, 1)
    head(predictor.get_image_embedding()).sum().backward()
    assert head.weight.grad is not None and head.weight.grad.abs().sum() > 0


def test_multimask_output_needs_a_multimask_model(photo):
    single = small_model(ModelConfig(**{**CONFIG.__dict__, "num_multimask_outputs": 0}))
    with pytest.raises(ValueError, match="num_multimask_outputs=3"):
        Predictor(single).predict_image(photo, box=[1, 2, 30, 40], multimask_output=True)
    predictor = Predictor(single)
    predictor.set_image(photo)
    assert predictor.predict(box=[1, 2, 30, 40])[0].shape == (1, 90, 150)
    with pytest.raises(ValueError, match="num_multimask_outputs=3"):
        predictor.predict(box=[1, 2, 30, 40], multimask_output=True)


def test_the_bundled_model_is_loaded_once_at_first_use(monkeypatch, photo, model):
    loads = []
    monkeypatch.setattr(fastsam_rwkv.RWKVSAM, "from_pretrained", classmethod(lambda cls: loads.append(1) or model))
    predictor = Predictor()
    assert not loads
    for _ in range(2):
        assert predictor.predict_image(photo, point_coords=[[3, 4]]).masks.shape == (1, 90, 150)
    assert len(loads) == 1


@pytest.mark.parametrize(
    "prompt, right",
    [
        ({"point_coords": [[0.5, 0.25]]}, {"point_coords": [[75, 22.5]]}),
        ({"point_coords": [[0.2, 0.3], [0, 0]], "point_labels": [1, -1]}, {"point_coords": [[0, 0], [1, 1]]}),
        ({"box": [0.1, 0.2, 0.9, 1.0]}, {"box": [0, 0, 1, 1]}),
        ({"box": [[0.1, 0.2, 0.9, 1.0], [0, 0, 1, 1]]}, {"box": [[0.1, 0.2, 0.9, 1.5], [0, 0, 1, 1]]}),
    ],
)
def test_coordinates_in_0_to_1_are_refused(prompt, right, predict, photo):
    with pytest.raises(PromptError, match="must be in pixels, got .*multiply x by 150 and y by 90"):
        predict(photo, **prompt)
    predict(photo, **right)  # whole numbers are pixels


def test_an_image_of_two_pixels_takes_any_coordinates(predict):
    predict(np.full((2, 2, 3), 128, np.uint8), point_coords=[[0.5, 0.5]])


def test_threads_share_a_predictor_without_locks(photo):
    assert same_in_threads(Predictor(small_model()), photo, threads=8, predictions=6) == 0
