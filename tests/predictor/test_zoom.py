import numpy as np
import pytest
from small_model import small_model

from fastsam_rwkv import Predictor
from fastsam_rwkv.errors import PromptError
from fastsam_rwkv.predictor import base
from fastsam_rwkv.predictor.base import ImagePredictor
from fastsam_rwkv.predictor.frame import ImageFrame, resample_logits
from fastsam_rwkv.predictor.prompts import OUTSIDE
from fastsam_rwkv.predictor.zoom import outline, window_around

FRAME = ImageFrame.of((300, 400), 256)


class Threshold(ImagePredictor):
    """Stand-in for a model: its mask is all bright pixels of its input, at a quarter of the size."""

    image_size, has_multimask = 256, True

    def __init__(self):
        self.embedded, self.inputs = [], []
        super().__init__()

    def embed(self, pixels, frame):
        self.embedded.append(frame)
        padded = np.zeros((256, 256))
        padded[: pixels.shape[0], : pixels.shape[1]] = pixels[..., 0]
        return padded.reshape(64, 4, 64, 4).mean((1, 3)) / 12.75 - 10

    def decode(self, embedding, inputs, multimask_output):
        self.inputs.append(inputs)
        N, n = len(next(iter(inputs.values()))), 3 if multimask_output else 1
        return np.broadcast_to(embedding, (N, n, 64, 64)).astype(np.float32), np.full((N, n), 0.5, np.float32)

    def enlarge(self, low_res_masks, frame, return_logits):
        logits = frame.masks_to_image(low_res_masks)
        return logits if return_logits else logits > 0

    def to_numpy(self, low_res_masks):
        return low_res_masks


@pytest.fixture
def image():
    """A bright square of 10 pixels and a bright rectangle of 130 x 100 on black."""
    image = np.zeros((300, 400, 3), np.uint8)
    image[40:50, 350:360] = image[150:250, 60:190] = 255
    return image


SMALL, LARGE = [348, 38, 362, 52], [55, 145, 195, 255]


@pytest.mark.parametrize(
    ("box", "size", "offset"),
    [
        ((200, 100, 240, 120), (140, 140), (150, 40)),
        ((0, 10, 40, 20), (140, 140), (0, 0)),  # moved into the image
        ((380, 290, 420, 330), (70, 70), (330, 230)),  # the box is cut to the image first
        ((10, 0, 50, 110), None, None),  # 385 of 400 pixels
    ],
)
def test_window(box, size, offset):
    window = window_around(box, FRAME)
    assert (window and window.original_size, window and window.offset) == (size, offset)


def test_window_of_any_size():
    assert window_around((10, 0, 50, 110), FRAME, largest=1).original_size == (300, 385)
    assert window_around((0, 0, 400, 300), FRAME, largest=1) is None
    assert window_around((200, 100, 200.4, 100.4), FRAME).original_size == (2, 2)


def test_a_window_maps_points_and_boxes_to_its_input():
    window = ImageFrame.of((50, 100), 256, (30, 20))
    points = np.array([[30.0, 20.0], [130.0, 70.0]], np.float32)
    assert window.points_to_input(points).tolist() == [[0, 0], [256, 128]]
    assert window.boxes_to_input(points.reshape(1, 4)).tolist() == [[0, 0, 256, 128]]


def test_logits_move_between_frames():
    window = ImageFrame.of((100, 100), 256, (150, 120))
    y, x = (np.mgrid[:64, :64] + 0.5) * 100 / 64
    plane = ((x - 60) / 5 + (y - 40) / 7)[None, None]  # 0 at (210, 160) of the image
    whole = resample_logits(plane, window, FRAME, OUTSIDE)
    place = (np.arange(64) + 0.5) * 400 / 64
    expected = (place - 210) / 5 + (place[:, None] - 160) / 7
    covered, inner = ((np.abs(place - 170) < half)[:, None] & (np.abs(place - 200) < half) for half in (50, 40))
    assert np.abs(whole - expected)[..., inner].max() < 0.1
    assert (whole[..., ~covered] == OUTSIDE).all() and (whole[..., covered] != OUTSIDE).all()
    back = resample_logits(whole, FRAME, window, OUTSIDE)
    assert np.abs(back - plane)[..., 12:52, 12:52].max() < 0.1
    same = resample_logits(plane, FRAME, FRAME, OUTSIDE)  # 48 of 64 rows hold the image
    assert np.array_equal(same[..., :48, :], plane.astype(np.float32)[..., :48, :])


def test_outline():
    window = ImageFrame.of((100, 100), 256, (150, 120))
    low = np.full((2, 64, 64), -1.0)
    low[0, 10:12, 30] = low[1, 11, 30:40] = 1
    assert outline(low, window) == (150 + 30 * 100 / 64, 120 + 10 * 100 / 64, 150 + 40 * 100 / 64, 120 + 12 * 100 / 64)
    assert outline(low * 0, window) is None


def test_a_small_target_is_encoded_anew(image):
    predictor = Threshold()
    found = predictor.predict_image(image, box=SMALL, return_logits=True)
    (window,) = predictor.embedded  # the whole image is not needed
    assert window.original_size == (49, 49)
    assert np.array_equal(found.masks[0] > 0, (image[..., 0] > 0) & (np.arange(400) > 200))
    outside = np.ones((300, 400), bool)
    outside[window.pixels] = False
    assert (found.masks[0][outside] == OUTSIDE).all()
    assert outline(found.low_res_logits, FRAME) == pytest.approx((350, 40, 360, 50), abs=6.25)
    x1, y1, x2, y2 = predictor.inputs[0]["boxes"][0]
    assert (x2 - x1, y2 - y1) == pytest.approx((14 * 256 / 49,) * 2)
    never = predictor.predict_image(image, box=SMALL, zoom="never")
    assert predictor.embedded[1] == FRAME and never.masks[0, 155:245, 65:185].all()
    assert not np.array_equal(never.masks[0, :100], found.masks[0, :100] > 0)  # coarser


def test_each_prompt_has_its_view(image):
    predictor = Threshold()
    masks, scores, low = predictor.predict_image(image, box=[LARGE, SMALL, LARGE], multimask_output=True)
    assert masks.shape == (3, 3, 300, 400) and scores.shape == (3, 3) and low.shape == (3, 3, 64, 64)
    assert [len(inputs["boxes"]) for inputs in predictor.inputs] == [2, 1]
    assert predictor.embedded[0] == FRAME and len(predictor.embedded) == 2
    assert masks[0, 0, 200, 100] and masks[2, 2, 200, 100] and not masks[1, :, 200, 100].any()
    assert masks[:, :, 45, 355].all()


def test_predict_keeps_windows(image, monkeypatch):
    predictor = Threshold()
    predictor.set_image(image)
    image[:] = 0  # the caller's array, not the predictor's
    assert predictor.predict(box=SMALL).masks[0].sum() > 10_000 and len(predictor.embedded) == 1
    for _ in range(2):
        assert predictor.predict(box=SMALL, zoom="auto").masks[0].sum() == 100
    assert len(predictor.embedded) == 2
    monkeypatch.setattr(base, "WINDOWS_KEPT", 1)
    predictor.predict(box=[40, 40, 50, 50], zoom="auto")
    predictor.predict(box=SMALL, zoom="auto")
    predictor.predict(box=LARGE, zoom="auto")
    assert len(predictor.embedded) == 4  # the image's own embedding is never dropped


def test_always(image):
    predictor = Threshold()
    predictor.predict_image(image, box=[100, 100, 210, 190], zoom="always")
    assert predictor.embedded[0].original_size == (300, 385)
    predictor.predict_image(image, box=[0, 0, 400, 300], zoom="always")
    assert predictor.embedded[1] == FRAME  # no window is smaller


def test_clicks_zoom_to_the_mask_before(image):
    predictor = Threshold()
    predictor.set_image(image)
    mask_input = predictor.predict(box=SMALL, multimask_output=False, zoom="auto").low_res_logits
    click = {"point_coords": [[355, 45]], "point_labels": [1], "multimask_output": False, "zoom": "auto"}
    assert predictor.predict(mask_input=mask_input, **click).masks.sum() == 100
    window = predictor.embedded[-1]
    assert window != FRAME and outline(predictor.inputs[-1]["mask_input"][0], window) is not None
    far = {"point_coords": [[355, 45], [20, 280]], "point_labels": [1, 1]}
    assert predictor.predict(mask_input=mask_input, **click | far).masks.sum() > 10_000  # the window would be too large
    background = {"point_coords": [[355, 45], [20, 280], [362, 52]], "point_labels": [1, 0, 0]}
    assert predictor.predict(mask_input=mask_input, **click | background).masks.sum() == 100
    assert predictor.inputs[-1]["point_labels"].tolist() == [[1, -1, 0]]  # the second lies outside the window
    boxed = predictor.predict(box=SMALL, **click | far)
    assert boxed.masks.sum() > 10_000  # so does a point that belongs to the object
    nothing = np.full_like(mask_input, -5)
    assert predictor.predict(mask_input=nothing, **click).masks.sum() > 10_000


def test_the_model_sees_the_window():
    """A window's masks are those of the window as an image of its own."""
    model = small_model()
    image = np.random.default_rng(0).integers(0, 255, (200, 300, 3), np.uint8)
    box = np.array([150.0, 60, 180, 90])
    found = Predictor(model).predict_image(image, box=box, return_logits=True)
    window = window_around(tuple(box), ImageFrame.of((200, 300), model.config.image_size))
    crop = np.ascontiguousarray(image[window.pixels])
    shift = np.array([*window.offset, *window.offset])
    alone = Predictor(model).predict_image(crop, box=box - shift, return_logits=True, zoom="never")
    np.testing.assert_allclose(found.masks[0][window.pixels], alone.masks[0], atol=1e-5)
    np.testing.assert_allclose(found.scores, alone.scores, atol=1e-5)


def test_unknown_zoom_is_refused(image):
    with pytest.raises(PromptError, match="zoom must be 'never', 'auto' or 'always', got True"):
        Threshold().predict_image(image, box=SMALL, zoom=True)
