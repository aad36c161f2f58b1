"""Programs written for segment-anything's mask generator, with another import: the same calls, written afresh."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco
from small_model import CONFIG, small_model

from fastsam_rwkv import RWKVSAM, ModelConfig, SamAutomaticMaskGenerator


@pytest.fixture(scope="module")
def sam():
    """A model that is confident of any mask: its predicted IoUs are all near 1."""
    config = ModelConfig(**{**CONFIG.__dict__, "pred_iou_thresh": 1.0, "stability_score_thresh": 0.0})
    model = small_model(config)
    with torch.no_grad():
        model.mask_decoder.iou_head.layers[-1].bias += 0.9
    return model


@pytest.fixture(scope="module")
def image(request):
    photo = Image.open(request.config.rootpath / "examples" / "coffee.jpg")
    return np.asarray(photo.resize((150, 100)))


def test_the_generator_example(sam, image):
    """Calls of segment-anything's automatic_mask_generator_example notebook, in its order."""
    sam.to(device="cpu")
    masks = SamAutomaticMaskGenerator(sam).generate(image)
    assert masks[0].keys() == {
        "segmentation", "area", "bbox", "predicted_iou", "point_coords", "stability_score", "crop_box"
    }  # fmt: skip
    ordered = sorted(masks, key=lambda mask: mask["area"], reverse=True)
    drawing = np.ones((*ordered[0]["segmentation"].shape, 4))
    drawing[:, :, 3] = 0
    for mask in ordered:
        drawing[mask["segmentation"]] = [0.2, 0.4, 0.6, 0.35]
    assert (drawing[..., 3] > 0).sum() >= ordered[0]["area"] > 0

    second = SamAutomaticMaskGenerator(
        model=sam,
        points_per_side=8,
        pred_iou_thresh=0.86,
        stability_score_thresh=0.0,
        crop_n_layers=1,
        crop_n_points_downscale_factor=2,
        min_mask_region_area=100,
    )
    more = second.generate(image)
    assert more and all(mask["predicted_iou"] > 0.86 for mask in more)


def test_the_generator_script(sam, image, tmp_path):
    """Calls of segment-anything's scripts/amg.py: masks as PNG files with a table, or as JSON."""
    options = {"points_per_side": 4, "points_per_batch": 8, "box_nms_thresh": 0.9, "stability_score_offset": 1.0}
    masks = SamAutomaticMaskGenerator(sam, output_mode="binary_mask", **options).generate(image)
    names = ["area", "predicted_iou", "stability_score"]
    with open(tmp_path / "metadata.csv", "w", newline="") as file:
        rows = csv.writer(file)
        for i, mask in enumerate(masks):
            Image.fromarray(mask["segmentation"] * np.uint8(255)).save(tmp_path / f"{i}.png")
            rows.writerow([i, *(mask[n] for n in names), *mask["bbox"], *mask["point_coords"][0], *mask["crop_box"]])
    assert len((tmp_path / "metadata.csv").read_text().splitlines()) == len(masks) > 0
    assert (np.asarray(Image.open(tmp_path / "0.png")) > 0).sum() == masks[0]["area"]
    records = SamAutomaticMaskGenerator(sam, output_mode="coco_rle", **options).generate(image)
    read = json.loads(json.dumps(records))
    assert [coco.area(record["segmentation"]) for record in read] == [mask["area"] for mask in masks]


@pytest.mark.parametrize("mode", ["binary_mask", "coco_rle"])
def test_supervision_reads_and_draws_records(mode, request):
    sv = pytest.importorskip("supervision", reason="supervision is not installed: pip install '.[dev]'")
    photo = np.asarray(Image.open(request.config.rootpath / "examples" / "coffee.jpg"))
    generator = SamAutomaticMaskGenerator(
        RWKVSAM.from_pretrained(), points_per_side=4, pred_iou_thresh=0.3, output_mode=mode
    )
    records = generator.generate(photo)
    detections = sv.Detections.from_sam(sam_result=records)
    assert len(detections) == len(records) > 1
    by_area = sorted(records, key=lambda record: record["area"], reverse=True)
    for mask, corners, record in zip(detections.mask, detections.xyxy, by_area, strict=True):
        x, y, w, h = record["bbox"]
        assert mask.sum() == record["area"] and corners.tolist() == [x, y, x + w, y + h]
    drawn = sv.MaskAnnotator(color_lookup=sv.ColorLookup.INDEX).annotate(scene=photo.copy(), detections=detections)
    changed = (drawn != photo).any(-1)
    assert changed[detections.mask.any(0)].mean() > 0.95 and not changed[~detections.mask.any(0)].any()
    boxed = sv.BoxAnnotator(color_lookup=sv.ColorLookup.INDEX).annotate(scene=photo.copy(), detections=detections)
    assert (boxed != photo).any()
