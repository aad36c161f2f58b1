"""`AutomaticMaskGenerator`: the same masks as step by step, SAM's records and parameters, and its parts."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco
from small_model import CONFIG, small_model

from benchmarks.masks.step_by_step import generate, matched
from fastsam_rwkv import RWKVSAM, ModelConfig, Predictor
from fastsam_rwkv.errors import ArgumentError
from fastsam_rwkv.predictor.automatic import AutomaticMaskGenerator, SamAutomaticMaskGenerator, _grid
from fastsam_rwkv.predictor.boxes import box_iou, keep_apart, near_edge
from fastsam_rwkv.predictor.frame import ImageFrame
from fastsam_rwkv.predictor.resizing import MaskResizer
from fastsam_rwkv.predictor.rle import as_rle, box_of, mask_of, runs_of, without_small_regions
from fastsam_rwkv.predictor.transforms import masks_to_image

LOOSE = {"pred_iou_thresh": 0.1, "stability_score_thresh": 0.6}


@pytest.fixture(scope="module")
def model():
    return RWKVSAM.from_pretrained()


@pytest.fixture(scope="module")
def coffee(request):
    return np.asarray(Image.open(request.config.rootpath / "examples" / "coffee.jpg"))


@pytest.fixture(scope="module")
def records(model, coffee):
    return AutomaticMaskGenerator(model, points_per_side=6, **LOOSE).generate(coffee)


def test_the_same_masks_as_step_by_step(model, coffee, records):
    masks, scores = generate(model, coffee, 6, 0.1, 0.6)
    assert len(masks) > 20 and len(records) == len(masks)
    found = [record["segmentation"] for record in records]
    assert min(matched(found, masks)) >= 0.99 and min(matched(masks, found)) >= 0.99
    np.testing.assert_allclose([record["predicted_iou"] for record in records], scores, atol=1e-4)


def test_records_are_those_of_sam(records, coffee):
    for record in records:
        mask = record["segmentation"]
        rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        assert mask.dtype == bool and mask.shape == coffee.shape[:2] and record["area"] == mask.sum() > 0
        x, y, w, h = record["bbox"]
        assert (x, y, x + w, y + h) == (columns[0], rows[0], columns[-1], rows[-1])
        assert record["crop_box"] == [0, 0, 600, 400]
        assert 0.1 < record["predicted_iou"] <= 1 and 0.6 <= record["stability_score"] <= 1
        ((px, py),) = record["point_coords"]
        assert 0 < px < 600 and 0 < py < 400
    keys = "segmentation area bbox predicted_iou point_coords stability_score crop_box"
    assert set(records[0]) == set(keys.split())


@pytest.mark.parametrize("mode", ["uncompressed_rle", "coco_rle"])
def test_run_lengths_hold_the_same_masks(mode, model, coffee, records):
    found = AutomaticMaskGenerator(model, points_per_side=6, output_mode=mode, **LOOSE).generate(coffee)
    for record, other in zip(found, records, strict=True):
        rle = record["segmentation"]
        assert rle["size"] == [400, 600] and isinstance(rle["counts"], str if mode == "coco_rle" else list)
        packed = rle if mode == "coco_rle" else coco.frPyObjects(rle, 400, 600)
        assert np.array_equal(coco.decode(packed).astype(bool), other["segmentation"])
        assert coco.area(packed) == record["area"]


def test_small_memory_and_small_batches_change_nothing(model, coffee, records):
    for options in ({"memory": 1}, {"points_per_batch": 5}):
        found = AutomaticMaskGenerator(model, points_per_side=6, **LOOSE, **options).generate(coffee)
        assert len(found) == len(records)
        assert min(matched([r["segmentation"] for r in found], [r["segmentation"] for r in records])) > 0.99


def test_a_full_device_halves_the_batch(model, coffee, records, monkeypatch):
    sizes = []
    decode = RWKVSAM.decode_where

    def limited(self, embedding, coords, *rest):
        sizes.append(len(coords))
        if len(coords) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(self, embedding, coords, *rest)

    monkeypatch.setattr(RWKVSAM, "decode_where", limited)
    generator = AutomaticMaskGenerator(model, points_per_side=6, memory=1 << 40, **LOOSE)
    assert len(generator.generate(coffee)) == len(records)
    assert sizes == [36, 18, 9, 9, 9, 9]


def test_masks_without_promise_are_not_upscaled(model, coffee, monkeypatch):
    upscaled = []
    masks = type(model.mask_decoder)._masks

    def counted(self, image, *rest):
        upscaled.append(len(image))
        return masks(self, image, *rest)

    monkeypatch.setattr(type(model.mask_decoder), "_masks", counted)
    strict = AutomaticMaskGenerator(model, points_per_side=6, pred_iou_thresh=0.5, stability_score_thresh=0.6)
    assert strict.generate(coffee) and sum(upscaled) < 30
    sams = AutomaticMaskGenerator(model, points_per_side=6, pred_iou_thresh=0.88, stability_score_thresh=0.95)
    assert sams.generate(coffee) == [] and sum(upscaled) < 30


def test_crops_find_smaller_things(model, coffee):
    options = {"points_per_side": 4, "crop_n_layers": 1, "crop_n_points_downscale_factor": 2, **LOOSE}
    records = AutomaticMaskGenerator(model, **options).generate(coffee)
    crops = {tuple(record["crop_box"]) for record in records}
    overlap = int(512 / 1500 * 400)
    width, height = -(-(overlap + 600) // 2), -(-(overlap + 400) // 2)
    corners = [(0, 0), (0, height - overlap), (width - overlap, 0), (width - overlap, height - overlap)]
    expected = {(x, y, min(width, 600 - x), min(height, 400 - y)) for x, y in corners} | {(0, 0, 600, 400)}
    assert len(crops) > 2 and crops <= expected
    for record in records:
        x, y, w, h = record["crop_box"]
        outside = record["segmentation"].copy()
        outside[y : y + h, x : x + w] = False
        ((px, py),) = record["point_coords"]
        assert not outside.any() and x <= px <= x + w and y <= py <= y + h


def test_small_regions_go(model, coffee, records):
    found = AutomaticMaskGenerator(model, points_per_side=6, min_mask_region_area=400, **LOOSE).generate(coffee)
    assert 0 < len(found) <= len(records)
    pieces = [len(coco_regions(record["segmentation"])) for record in found]
    assert max(pieces) < max(len(coco_regions(record["segmentation"])) for record in records)
    for record in found:
        areas = coco_regions(record["segmentation"])
        assert min(areas) >= 400 or len(areas) == 1


def coco_regions(mask):
    from scipy import ndimage

    labels, count = ndimage.label(mask, np.ones((3, 3)))
    return np.bincount(labels.ravel(), minlength=count + 1)[1:]


def test_other_points_and_ranks(model, coffee):
    thresholds = {"pred_iou_thresh": 0, "stability_score_thresh": 0.3}
    generator = AutomaticMaskGenerator(model, None, point_grids=[np.array([[0.5, 0.6]])], **thresholds)
    records = generator.generate(coffee)
    assert records and {tuple(r["point_coords"][0]) for r in records} == {(300.0, 240.0)}
    by_stability = AutomaticMaskGenerator(model, 4, stability_score_thresh=0.6, rank_by="stability_score")
    scores = [record["stability_score"] for record in by_stability.generate(coffee)]
    assert len(scores) > 5 and scores == sorted(scores, reverse=True)


def test_a_single_mask_model_and_a_predictor():
    single = small_model(ModelConfig(**{**CONFIG.__dict__, "num_multimask_outputs": 0}))
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    options = {"points_per_side": 3, "pred_iou_thresh": -9, "stability_score_thresh": 0}
    records = AutomaticMaskGenerator(Predictor(single), **options).generate(image)
    assert len(records) <= 9 and all(record["segmentation"].shape == (60, 90) for record in records)
    assert SamAutomaticMaskGenerator is AutomaticMaskGenerator


@pytest.mark.parametrize(
    "options, message",
    [
        ({"points_per_side": None}, "exactly one of points_per_side and point_grids"),
        ({"point_grids": [np.zeros((1, 2))]}, "exactly one of points_per_side and point_grids"),
        ({"points_per_side": None, "point_grids": [np.zeros((1, 2))], "crop_n_layers": 1}, "2 grids with at least one"),
        ({"points_per_side": None, "point_grids": [np.zeros((0, 2))]}, "1 grids with at least one"),
        ({"output_mode": "polygon"}, "binary_mask, uncompressed_rle, coco_rle, got 'polygon'"),
        ({"rank_by": "area"}, "predicted_iou, stability_score, got 'area'"),
        ({"points_per_side": 0}, "1 grids with at least one"),
        ({"points_per_batch": 0}, "points_per_batch must be at least 1, got 0"),
        ({"memory": 0}, "memory must be at least 1, got 0"),
        ({"crop_n_layers": -1}, "crop_n_layers must be at least 0, got -1"),
        ({"min_mask_region_area": -5}, "min_mask_region_area must be at least 0, got -5"),
    ],
)
def test_parameters_that_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        AutomaticMaskGenerator(small_model(), **options)


def test_thresholds_come_from_the_model(model):
    assert (model.config.pred_iou_thresh, model.config.stability_score_thresh) == (0.45, 0.5)
    ours, sams = (AutomaticMaskGenerator(m) for m in (model, small_model()))
    assert (ours.pred_iou_thresh, ours.stability_score_thresh) == (0.45, 0.5)
    assert (sams.pred_iou_thresh, sams.stability_score_thresh) == (0.88, 0.95)
    given = AutomaticMaskGenerator(model, pred_iou_thresh=0.88, stability_score_thresh=0.0)
    assert (given.pred_iou_thresh, given.stability_score_thresh) == (0.88, 0.0)


def test_the_grid_is_sams():
    assert _grid(2).tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]


@pytest.mark.parametrize("size", [(60, 90), (300, 90), (90, 300), (33, 33), (128, 128), (7, 500)])
def test_windows_hold_what_the_whole_image_does(size):
    frame = ImageFrame.of(size, 128)
    resizer = MaskResizer(frame, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    low = torch.nn.functional.interpolate(torch.randn(12, 1, 6, 6, generator=generator), (32, 32), mode="bicubic")[:, 0]
    low = low - torch.linspace(-0.5, 2.5, 12)[:, None, None]  # from most of the image to nothing
    whole = masks_to_image(low[None], frame)[0]
    for logits, full in zip(low, whole, strict=True):
        window, (top, left) = resizer.mask(logits)
        mask = np.zeros(size, bool)
        mask[top : top + window.shape[0], left : left + window.shape[1]] = window
        assert np.abs(full.numpy())[mask != (full > 0).numpy()].max(initial=0) < 1e-5  # rounding only
        expected = None
        if mask.any():
            rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
            expected = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert resizer.box(logits) == expected
        exact = (full > 1).sum().item() / max(1, (full > -1).sum().item())
        assert resizer.exact_stability(logits, 1.0) == pytest.approx(exact, abs=1e-3)
    scores, unsure = resizer.stability(low, 1.0, 0.5, 0.02)
    for i in range(12):
        exact = (whole[i] > 1).sum().item() / max(1, (whole[i] > -1).sum().item())
        assert unsure[i] or (scores[i] > 0.5) == (exact > 0.5)


def test_run_lengths():
    generator = np.random.default_rng(0)
    for density in (0.0, 0.02, 0.5, 1.0):
        for size in ((5, 7), (1, 4), (6, 1), (300, 170)):
            mask = generator.random(size) < density
            window = mask[: size[0], : size[1]]
            runs = runs_of(window, (0, 0), size)
            assert runs.sum() == mask.size and np.array_equal(mask_of(runs, size), mask)
            expected = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
            assert as_rle(runs, size, compressed=True)["counts"].encode() == expected["counts"]
    large = np.zeros((3000, 4000), bool)
    large[100:2900, 50:3000] = True  # runs of several characters, and differences of both signs
    large[200:900, 60:3500:7] ^= True
    packed = as_rle(runs_of(large, (0, 0), large.shape), large.shape, compressed=True)["counts"]
    assert packed.encode() == coco.encode(np.asfortranarray(large.astype(np.uint8)))["counts"]
    mask = np.zeros((9, 8), bool)
    mask[2:9, 3:5] = generator.random((7, 2)) < 0.7
    assert np.array_equal(mask_of(runs_of(mask[2:, 3:5], (2, 3), (9, 8)), (9, 8)), mask)


def test_boxes_of_run_lengths():
    generator = np.random.default_rng(0)
    for density in (0.0, 0.02, 0.5, 1.0):
        for size in ((5, 7), (1, 4), (6, 1), (30, 17)):
            mask = generator.random(size) < density
            rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
            expected = [columns[0], rows[0], columns[-1], rows[-1]] if mask.any() else None
            assert box_of(runs_of(mask, (0, 0), size), size[0]) == expected


@pytest.mark.parametrize("corner", [(0, 0), (40, 0), (13, 30)])
def test_run_lengths_without_maps_are_those_of_windows(corner):
    """`mask_edges` gives the masks of a crop in the whole image."""
    resizer = MaskResizer(ImageFrame.of((60, 90), 128, corner), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    low = torch.nn.functional.interpolate(torch.randn(5, 1, 6, 6, generator=generator), (32, 32), mode="bicubic")[:, 0]
    low[-1] = -1
    size = (corner[1] + 60 + (corner[1] > 0), corner[0] + 90)
    for runs, logits in zip(resizer.runs(list(low), size), low, strict=True):
        window, (top, left) = resizer.mask(logits)
        assert np.array_equal(runs, runs_of(window, (top + corner[1], left + corner[0]), size))


def test_records_without_maps(model, coffee, monkeypatch):
    """As on a GPU, where `mask_edges` replaces windows; its reference serves here."""
    generator = AutomaticMaskGenerator(model, points_per_side=4, output_mode="coco_rle", **LOOSE)
    windows = generator.generate(coffee)
    monkeypatch.setattr("fastsam_rwkv.predictor.resizing.MASKS_AT_ONCE", 3)
    monkeypatch.setattr(AutomaticMaskGenerator, "_without_maps", lambda self: True)
    records = generator.generate(coffee)
    assert len(records) == len(windows) > 5
    for record, other in zip(records, windows, strict=True):
        assert coco.iou([record["segmentation"]], [other["segmentation"]], [0])[0, 0] > 0.999  # rounding at the edge
        assert record["point_coords"] == other["point_coords"]


def test_holes_and_islands():
    mask = np.zeros((20, 20), bool)
    mask[2:12, 2:12] = True
    mask[5:7, 5:7] = False  # a hole of 4
    mask[15, 15] = True  # an island of 1
    clean = without_small_regions(mask, 5)
    assert clean[5:7, 5:7].all() and not clean[15, 15] and clean.sum() == 100
    assert without_small_regions(mask, 4)[5:7, 5:7].sum() == 0
    assert without_small_regions(mask[2:12, 2:12], 1000).all()  # the largest region stays, its hole is filled
    cut = np.ones((4, 4), bool)
    cut[0, 0] = False  # open to the window's edge: no hole
    assert not without_small_regions(cut, 5)[0, 0]


def test_without_scipy_small_regions_are_refused_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ArgumentError, match="min_mask_region_area needs scipy: pip install scipy"):
        AutomaticMaskGenerator(small_model(), min_mask_region_area=1)


def test_suppression_of_boxes():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 8], [20, 0, 30, 10], [0, 0, 10, 10], [5, 5, 5, 9]])
    assert box_iou(boxes[0], boxes).tolist() == [1.0, 0.8, 0.0, 1.0, 0.0]
    assert keep_apart(boxes, np.array([0.5, 0.9, 0.1, 0.5, 0.2]), 0.7).tolist() == [1, 4, 2]
    assert keep_apart(boxes, np.array([0.5, 0.9, 0.1, 0.5, 0.2]), 0.8).tolist() == [1, 0, 4, 2]
    assert keep_apart(boxes[:0], np.zeros(0), 0.7).tolist() == []


def test_edges_of_crops():
    crop = ImageFrame.of((50, 50), 128, (0, 30))
    boxes = np.array([[0, 35, 20, 75], [5, 32, 20, 50], [10, 60, 48, 79], [10, 55, 20, 60]])
    assert near_edge(boxes, crop, (80, 200), 4).tolist() == [False, True, True, False]
