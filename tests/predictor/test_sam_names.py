"""Names of `SamPredictor` and of SAM 2's predictor, called as programs written for them do."""

import copy
import pickle
import sys
import warnings

import numpy as np
import pytest
import torch
from small_model import small_model

from fastsam_rwkv import ImageError, Predictor, PromptError
from fastsam_rwkv.errors import ArgumentError
from fastsam_rwkv.modeling.embedding import ImageEmbedding

POINTS, LABELS, BOX = [[40, 50], [100, 20]], [1, 0], [20, 15, 110, 80]


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def predictor(model):
    return Predictor(model)


@pytest.fixture(scope="module")
def photos():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (*size, 3), np.uint8) for size in ((90, 150), (70, 61), (90, 150))]


def same(a, b, atol=1e-5):
    for x, y in zip(a, b, strict=True):
        x, y = (np.asarray(t, np.float64) for t in (x, y))
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, atol=atol)


def test_predict_torch_is_predict_with_tensors(predictor, photos):
    """As Grounded-SAM, ComfyUI and samgeo call it."""
    predictor.set_image(photos[0])
    assert predictor.original_size == (90, 150) and predictor.input_size == (77, 128)
    boxes = torch.tensor([BOX, [0, 0, 50, 40.5]])
    transformed = predictor.transform.apply_boxes_torch(boxes, photos[0].shape[:2]).to(predictor.device)
    for options in ({"multimask_output": False}, {"multimask_output": True, "return_logits": True}, {}):
        masks, scores, low = predictor.predict_torch(
            point_coords=None, point_labels=None, boxes=transformed, mask_input=None, **options
        )
        assert isinstance(masks, torch.Tensor) and masks.shape == (2, len(scores[0]), 90, 150)
        assert masks.dtype == (torch.float32 if options.get("return_logits") else torch.bool)
        same((masks, scores, low), predictor.predict(box=boxes.numpy(), **options), atol=1e-4)
    masks[:] = False  # as programs do
    points = predictor.transform.apply_coords_torch(torch.tensor(POINTS)[None], predictor.original_size)
    low = low[:1, :1]
    found = predictor.predict_torch(points, torch.tensor([LABELS]), mask_input=low, multimask_output=False)
    same((t[0] for t in found), predictor.predict(POINTS, LABELS, mask_input=low[0], multimask_output=False), 1e-4)
    with pytest.raises(PromptError):
        predictor.predict_torch(points, None)


def test_transforms_of_arrays_and_tensors_agree(predictor, photos):
    transform, size = predictor.transform, photos[0].shape[:2]
    assert transform.target_length == 128
    resized = transform.apply_image(photos[0])
    assert resized.dtype == np.uint8 and resized.shape == (77, 128, 3)
    assert transform.get_preprocess_shape(90, 150, 1024) == (614, 1024)
    tensor = transform.apply_image_torch(torch.from_numpy(photos[0]).permute(2, 0, 1)[None])
    assert np.abs(tensor[0].permute(1, 2, 0).numpy() - resized).max() < 1.5  # Pillow rounds
    coords = np.array(POINTS)
    found = transform.apply_coords(coords, size)
    np.testing.assert_allclose(found, coords * 128 / 150)
    assert coords.tolist() == POINTS
    np.testing.assert_allclose(transform.apply_coords_torch(torch.from_numpy(coords), size), found, rtol=1e-6)
    np.testing.assert_allclose(transform.apply_boxes(np.array(BOX), size), np.array([BOX]) * 128 / 150)
    np.testing.assert_allclose(transform.apply_boxes_torch(torch.tensor(BOX), size), [np.array(BOX) * 128 / 150])


def test_set_torch_image(predictor, photos):
    predictor.set_image(photos[0])
    want = predictor.predict(box=BOX)
    tensor = torch.from_numpy(predictor.transform.apply_image(photos[0])).permute(2, 0, 1)[None]
    for pixels in (tensor, tensor.float()):
        predictor.reset_image()
        predictor.set_torch_image(pixels, photos[0].shape[:2])
        assert predictor.is_image_set and predictor.original_size == (90, 150)
        same(predictor.predict(box=BOX), want, atol=1e-4)
    with pytest.raises(ImageError, match=r"must be \[1, 3, 77, 128\], got \[1, 3, 90, 150\]"):
        predictor.set_torch_image(torch.zeros(1, 3, 90, 150), (90, 150))


@pytest.mark.parametrize("size_first", [True, False])
def test_features_restore_an_image(predictor, model, photos, size_first):
    """As sd-webui and ComfyUI keep an image's features and set them again."""
    predictor.set_image(photos[0])
    want = predictor.predict(box=BOX)
    features, size = predictor.features.cpu(), predictor.original_size
    assert features.shape == (1, 1280, 8, 8)
    other = Predictor(model)
    if size_first:
        other.original_size, other.input_size = size, predictor.input_size
    other.features = features
    if not size_first:
        with pytest.raises(RuntimeError, match="set"):
            other.predict(box=BOX)
        other.original_size = size
    other.is_image_set = True
    same(other.predict(box=BOX), want)
    other.is_image_set = False
    assert not other.is_image_set
    other.set_image(photos[1])
    other.features = None
    with pytest.raises(RuntimeError, match="set_image"):
        _ = other.features
    with pytest.raises(ValueError, match=r"\[B, 1280, 8, 8\], got \[1, 256, 8, 8\]"):
        other.features = torch.zeros(1, 256, 8, 8)


def test_packed_embeddings(predictor, photos):
    predictor.set_image(photos[0])
    embedding = predictor.embedding
    packed = embedding.packed()
    assert torch.equal(packed[:, :256], predictor.get_image_embedding())
    unpacked = ImageEmbedding.unpacked(packed, embedding.image_pe)
    assert torch.equal(unpacked.image_embed, embedding.image_embed)
    assert torch.equal(unpacked.high_res_feats, embedding.high_res_feats) and unpacked.input_size == (128, 128)


def test_sam2_coordinates_in_parts_of_the_image(predictor, photos):
    predictor.set_image(photos[0])
    size = np.array([150, 90])
    same(
        predictor.predict(np.array(POINTS) / size, LABELS, normalize_coords=False),
        predictor.predict(point_coords=POINTS, point_labels=LABELS, normalize_coords=True),
    )
    same(predictor.predict(box=np.array(BOX) / np.tile(size, 2), normalize_coords=False), predictor.predict(box=BOX))
    with pytest.raises(PromptError, match="must be in pixels"):
        predictor.predict(np.array(POINTS) / size, LABELS)
    predictor.predict([[0.004, 0.005]], [1], normalize_coords=False)  # in the first pixel
    with pytest.raises(PromptError, match=r"box must be \[4\]"):
        predictor.predict(box=[0.1, 0.2, 0.3], normalize_coords=False)


def test_sam2_batches(predictor, photos):
    predictor.set_image_batch(photos)
    assert not predictor.is_image_set
    boxes = [np.array([BOX, [5, 5, 60, 60]]), np.array([10, 10, 50, 60]), None]
    points = [None, None, np.array(POINTS)]
    masks, scores, low = predictor.predict_batch(
        point_coords_batch=points,
        point_labels_batch=[None, None, np.array(LABELS)],
        box_batch=boxes,
        mask_input_batch=None,
        multimask_output=False,
    )
    assert [m.shape for m in masks] == [(2, 1, 90, 150), (1, 70, 61), (1, 90, 150)]
    for i, photo in enumerate(photos):
        predictor.set_image(photo)
        want = predictor.predict(points[i], LABELS if i == 2 else None, box=boxes[i], multimask_output=False)
        same((masks[i], scores[i], low[i]), want, atol=1e-4)
    with pytest.raises(RuntimeError, match="set_image_batch"):
        predictor.predict_batch(points)  # `set_image` forgot them
    predictor.set_image_batch(photos[:2])
    with pytest.raises(PromptError, match="box_batch is for 3 images; 2 are set"):
        predictor.predict_batch(box_batch=boxes)
    with pytest.raises(PromptError, match=r"images\[1\]: box .* lies outside the image of 61x70"):
        predictor.predict_batch(box_batch=[BOX, [200, 200, 300, 300]])
    with pytest.raises(ImageError, match="no image"):
        predictor.set_image_batch([])
    assert len(predictor.predict_batch(box_batch=[BOX, BOX])[0]) == 2  # the previous images stay set
    predictor.reset_predictor()
    with pytest.raises(RuntimeError):
        predictor.predict_batch(box_batch=[BOX, BOX])


def test_batches_can_be_copied(predictor, photos):
    predictor.set_image_batch(photos[:2])
    want = predictor.predict_batch(box_batch=[BOX, BOX])
    for copied in (copy.deepcopy(predictor), pickle.loads(pickle.dumps(predictor))):
        for a, b in zip(copied.predict_batch(box_batch=[BOX, BOX]), want, strict=True):
            same(a, b)


def test_a_predictor_of_a_folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert Predictor.from_pretrained(tmp_path, device="cpu").image_size == 128


def test_sam2_thresholds_and_small_areas(model, photos, monkeypatch):
    """As SAM 2's post-processing: areas in pixels of low-resolution masks, holes first."""
    low = torch.full((1, 1, 32, 32), -3.0)
    low[..., 4:14, 4:14] = 3
    low[..., 6:8, 6:8] = -1  # a hole of 4 pixels
    low[..., 20, 10:13] = 0.7  # three pixels apart
    low[..., 10, 30] = 0.2
    found = {}
    for areas in ((0, 0), (4, 0), (3, 0), (0, 3), (0, 2), (4, 3)):
        predictor = Predictor(model, max_hole_area=areas[0], max_sprinkle_area=areas[1])
        cleaned = predictor.cleaned(low)
        found[areas] = int((cleaned > 0).sum())
        assert cleaned.shape == low.shape
    assert found == {(0, 0): 100, (4, 0): 104, (3, 0): 100, (0, 3): 96, (0, 2): 99, (4, 3): 100}
    assert low[0, 0, 6, 6] == -1
    predictor = Predictor(model, max_hole_area=4, max_sprinkle_area=3)
    assert predictor.cleaned(low).unique().tolist() == [-10, -3, 3, 10]
    monkeypatch.setattr(predictor.model, "decode_masks", lambda *a, **k: (low, torch.ones(1, 1)))
    predictor.set_image(photos[0])
    plain = Predictor(model)
    plain.set_image(photos[0])
    for cleaner in (
        lambda p: p.predict(box=BOX, multimask_output=False),
        lambda p: [t[0] for t in p.predict_torch(None, None, boxes=torch.tensor([BOX]), multimask_output=False)],
    ):
        (masks, _, logits), (before, _, same_logits) = cleaner(predictor), cleaner(plain)
        assert masks[0, 32, 32] and not before[0, 32, 32] and not masks[0, 95 * 90 // 128, 0]
        assert np.array_equal(logits, same_logits)
    high = Predictor(model, mask_threshold=2.0)
    high.set_image(photos[0])
    assert high.predict(box=BOX).masks.sum() == (high.predict(box=BOX, return_logits=True).masks > 2).sum()


def test_points_outside_are_moved_with_a_warning(predictor, photos):
    predictor.set_image(photos[0])
    with pytest.warns(
        UserWarning, match=r"1 of the points lie outside the image of 150x90 pixels, such as \[160.0, -5.0\]"
    ):
        found = predictor.predict([[160, -5], [20, 20]], [1, 1])
    same(found, predictor.predict([[150, 0], [20, 20]], [1, 1]))
    with pytest.raises(PromptError, match="outside the image"):
        predictor.predict_image(photos[0], [[160, -5]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor.predict([[20, 20], [999, 999]], [1, -1])  # padding


def test_no_points_beside_a_box(predictor, photos):
    predictor.set_image(photos[0])
    want = predictor.predict(box=BOX)
    for points, labels in ((np.empty((0, 2)), np.empty(0)), ([], []), (np.empty((0, 2)), None)):
        same(predictor.predict(points, labels, box=BOX), want)
    with pytest.raises(PromptError):
        predictor.predict([], [])


def test_float_images_of_255(predictor, photos):
    predictor.set_image(photos[0])
    want = predictor.predict(box=BOX)
    predictor.set_image(photos[0].astype(np.float32) + 0.2)
    same(predictor.predict(box=BOX), want)
    for image in (photos[0] / 255.0, photos[0] - 9.0, photos[0] * 2.0, photos[0] * np.nan):
        with pytest.raises(TypeError, match="image must be uint8"):
            predictor.set_image(image)


def test_logits_of_sams_size(predictor, photos):
    predictor.set_image(photos[0])
    low = predictor.predict(box=BOX, multimask_output=False).low_res_logits
    large = torch.nn.functional.interpolate(torch.from_numpy(low)[None], (256, 256), mode="bilinear")[0]
    small = torch.nn.functional.interpolate(large[None], (32, 32), mode="bilinear")[0]
    same(predictor.predict(box=BOX, mask_input=large), predictor.predict(box=BOX, mask_input=small), atol=1e-4)
    with pytest.raises(PromptError, match=r"mask_input must be \[1, 32, 32\]"):
        predictor.predict(box=BOX, mask_input=large[:, :128, :128])


def test_without_scipy_small_areas_are_refused_at_once(monkeypatch, model):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ArgumentError, match="max_sprinkle_area needs scipy"):
        Predictor(model, max_sprinkle_area=1)
