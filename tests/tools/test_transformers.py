"""`RwkvSamForMaskGeneration` in the calls of transformers' SAM notebooks and of its mask-generation pipeline."""

import importlib
import json
import sys
import types
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from small_model import CONFIG, small_model

from fastsam_rwkv import RWKVSAM, CheckpointError, InputError, ModelConfig, Predictor, PromptError

transformers = pytest.importorskip("transformers", reason="transformers is not installed: its extra is not tested")
hf = importlib.import_module("fastsam_rwkv.hf")  # after the line above

PIXELS = torch.zeros(1, 3, 128, 128)
BOXES = [[20, 10, 120, 80], [0, 0, 30, 30]]
POINTS, LABELS = [[[60, 40], [5, 5]], [[90, 70], [20, 30]]], [[1, 0], [1, 1]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformers")
    small_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return hf.RwkvSamForMaskGeneration.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(folder):
    return transformers.SamProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def photo():
    y, x = np.mgrid[:90, :150]
    return np.stack([x + y, 2 * x % 256, 255 - 2 * y], -1).astype(np.uint8)


@pytest.mark.parametrize("multimask_output", [True, False])
@pytest.mark.parametrize("prompt", ["boxes", "points"])
def test_model_and_processor_give_what_the_predictor_gives(
    prompt, multimask_output, model, processor, photo, monkeypatch
):
    if prompt == "boxes":
        given, ours = {"input_boxes": [BOXES]}, {"box": BOXES}
    else:
        given, ours = (
            {"input_points": [POINTS], "input_labels": [LABELS]},
            {"point_coords": POINTS, "point_labels": LABELS},
        )
    inputs = processor(images=photo, **given, return_tensors="pt")
    outputs = model(**inputs, multimask_output=multimask_output)
    predictor = Predictor(model.model)
    predictor.set_image(photo)
    want = predictor.predict(**ours, multimask_output=multimask_output)
    n = 3 if multimask_output else 1
    assert outputs.pred_masks.shape == (1, 2, n, 32, 32) and outputs.iou_scores.shape == (1, 2, n)
    np.testing.assert_allclose(outputs.pred_masks[0], want.low_res_logits, atol=2e-2)  # the processor resizes in float
    np.testing.assert_allclose(outputs.iou_scores[0], want.scores, atol=2e-3)
    (masks,) = processor.image_processor.post_process_masks(
        outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
    )
    assert masks.shape == want.masks.shape and (masks.numpy() == want.masks).mean() > 0.99
    embeddings = model.get_image_embeddings(inputs.pop("pixel_values"))
    assert embeddings.shape == (1, 1280, 8, 8)
    again = model(**inputs, image_embeddings=embeddings, multimask_output=multimask_output)
    torch.testing.assert_close(again.pred_masks, outputs.pred_masks)
    assert model.get_image_wide_positional_embeddings().shape == (1, 256, 8, 8)


def test_a_batch_is_its_images_one_by_one(model, processor, photo):
    images = [photo, photo[::-1, :80].copy()]
    points = [[[60, 40]], [[30, 20]]]
    inputs = processor(images=images, input_points=points, return_tensors="pt")
    together = model(**inputs)
    masks = together.pred_masks[:, 0, :1]
    corrected = model(**inputs, input_masks=masks)
    for i, image in enumerate(images):
        one = processor(images=image, input_points=[points[i]], return_tensors="pt")
        torch.testing.assert_close(together.pred_masks[i : i + 1], model(**one).pred_masks, atol=1e-4, rtol=1e-4)
        want = model(**one, input_masks=masks[i : i + 1]).pred_masks
        torch.testing.assert_close(corrected.pred_masks[i : i + 1], want, atol=1e-4, rtol=1e-4)
    assert (together.pred_masks - corrected.pred_masks).abs().max() > 1e-3
    two = model(image_embeddings=model.get_image_embeddings(inputs["pixel_values"][:1]),
                input_points=inputs["input_points"][:1].expand(1, 2, 1, 2), input_masks=masks[:1])  # fmt: skip
    torch.testing.assert_close(two.pred_masks[0, 0], two.pred_masks[0, 1])  # one mask prompt serves both points


def test_without_transformers_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "fastsam_rwkv.hf")
    with pytest.raises(ImportError, match=r"pip install 'fastsam-rwkv\[transformers\]'"):
        importlib.import_module("fastsam_rwkv.hf")


def test_labels_of_padding_are_padding(model, processor, photo):
    pixels = processor(images=photo, return_tensors="pt")["pixel_values"]
    points = torch.tensor([[[[60.0, 40.0], [0.0, 0.0]]]])
    results = [
        model(pixels, input_points=points, input_labels=torch.tensor([[[1, label]]])).pred_masks
        for label in (-10, -1, 1)
    ]
    torch.testing.assert_close(results[0], results[1])
    assert (results[0] - results[2]).abs().max() > 1e-3


@pytest.mark.parametrize("trust", [True, False])
def test_auto_classes_load_a_local_folder(trust, folder):
    """With `trust_remote_code` by the file in the folder, else by the registration of the module."""
    loaded = transformers.AutoModelForMaskGeneration.from_pretrained(folder, trust_remote_code=trust)
    assert type(loaded).__name__ == "RwkvSamForMaskGeneration" and loaded.dtype == torch.float32
    assert not loaded.training and loaded.config.model_config() == CONFIG
    assert isinstance(transformers.AutoProcessor.from_pretrained(folder), transformers.SamProcessor)


def test_files_serve_both_loaders(folder, model, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "rwkv_sam" and ModelConfig.from_dict(config) == CONFIG
    model.save_pretrained(tmp_path / "again")
    ours = RWKVSAM.from_pretrained(tmp_path / "again")
    assert all(
        torch.equal(a, b) for a, b in zip(ours.state_dict().values(), model.model.state_dict().values(), strict=True)
    )
    half = hf.RwkvSamForMaskGeneration.from_pretrained(tmp_path / "again", dtype="bfloat16", device_map="cpu")
    assert half.dtype == torch.bfloat16
    written = hf.RwkvSamConfig(**asdict(replace(CONFIG, image_size=256)))
    written.save_pretrained(tmp_path / "config")  # by transformers itself
    data = json.loads((tmp_path / "config" / "config.json").read_text())
    assert transformers.AutoConfig.from_pretrained(tmp_path / "config").image_size == 256
    assert ModelConfig.from_dict({**data, "format_version": 1}).image_size == 256


def test_the_pipeline_generates_masks(folder, model, photo, monkeypatch):
    """All but torchvision's suppression of overlaps, which a short one replaces."""

    def batched_nms(boxes, scores, idxs, iou_threshold):
        keep, order = [], scores.argsort(descending=True).tolist()
        while order:
            first, *rest = order
            keep.append(first)
            low = torch.maximum(boxes[first, :2], boxes[rest][:, :2])
            high = torch.minimum(boxes[first, 2:], boxes[rest][:, 2:])
            both = (high - low).clamp(min=0).prod(1)
            areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
            iou = both / (areas[first] + areas[rest] - both)
            order = [i for i, overlap in zip(rest, iou, strict=True) if overlap <= iou_threshold]
        return torch.tensor(keep)

    modules = {name: types.ModuleType(name) for name in ("torchvision", "torchvision.ops", "torchvision.ops.boxes")}
    modules["torchvision.ops.boxes"].batched_nms = batched_nms
    generate = transformers.pipeline("mask-generation", str(folder), device="cpu")
    kind = type(generate.image_processor)
    post_process = sys.modules[kind.__module__]._post_process_for_mask_generation
    monkeypatch.setattr(kind, "post_process_for_mask_generation", lambda self, *args: post_process(*args))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    found = generate(
        Image.fromarray(photo), points_per_batch=8, points_per_crop=4, pred_iou_thresh=0.0, stability_score_thresh=0.0
    )
    assert len(found["masks"]) == len(found["scores"]) > 0
    assert all(mask.shape == (90, 150) and mask.dtype == np.bool_ for mask in map(np.asarray, found["masks"]))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m, f: m(), ValueError, "give either pixel_values or image_embeddings"),
        (lambda m, f: m(PIXELS), PromptError, "no prompt"),
        (lambda m, f: m(PIXELS, input_points=torch.zeros(1, 2)), ValueError, r"must be \[B, N, P, 2\]"),
        (lambda m, f: m(PIXELS, input_boxes=torch.zeros(2, 1, 4)), ValueError, "with B = 1, got"),
        (lambda m, f: m(image_embeddings=torch.zeros(1, 256, 8, 8)), ValueError, r"\[B, 1280, 8, 8\]"),
        (lambda m, f: type(m).from_pretrained(f, load_in_8bit=True), InputError, "does not take load_in_8bit"),
        (lambda m, f: type(m).from_pretrained(f, device_map={"": 0}), InputError, "must be one device"),
        (lambda m, f: type(m).from_pretrained(f / ".."), (CheckpointError, FileNotFoundError), "model.safetensors"),
        (lambda m, f: m.save_pretrained(f, push_to_hub=True), InputError, "call model.push_to_hub"),
    ],
)  # fmt: skip
def test_unusable_arguments(call, error, message, model, folder):
    with pytest.raises(error, match=message):
        call(model, folder)
