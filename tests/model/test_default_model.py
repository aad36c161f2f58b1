"""The bundled weights on the example images."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fastsam_rwkv
from fastsam_rwkv import RWKVSAM, Predictor, checkpoint, load_image

EXAMPLE = Path(__file__).parents[2] / "examples" / "coffee.jpg"


@pytest.fixture(scope="module")
def model():
    return RWKVSAM.from_pretrained()


def test_size_dtype_and_mask_outputs(model):
    file = checkpoint.BUNDLED / "model.safetensors"
    assert file.stat().st_size <= 20e6
    wide = [name for name, tensor in load_file(file).items() if tensor.dtype != torch.float16]
    assert wide == ["prompt_encoder.position.frequencies"]
    assert model.config.variant == "tiny" and model.config.num_multimask_outputs == 3


def test_a_click_gives_a_mask_around_it(model):
    masks, scores, low_res = Predictor(model).predict_image(EXAMPLE, point_coords=[[365, 285]])
    assert masks.shape == (1, 400, 600) and low_res.shape == (1, *[model.config.image_size // 4] * 2)
    assert masks[0, 285, 365]
    assert masks[0, 190:335, 300:410].sum() > 0.9 * masks.sum()  # the spoon
    assert masks[0, 265:310, 345:385].mean() > 0.9
    assert Predictor(model).predict_image(EXAMPLE, point_coords=[[365, 285]], multimask_output=True).masks.shape == (
        3,
        400,
        600,
    )
    again = fastsam_rwkv.predict(EXAMPLE, point_coords=[[365, 285]])
    assert np.array_equal(again.masks, masks)


def test_a_box_gives_a_mask_in_it(model):
    x1, y1, x2, y2 = 170, 15, 420, 290  # the cup
    mask = Predictor(model).predict_image(EXAMPLE, box=[x1, y1, x2, y2]).masks[0]
    assert mask[y1:y2, x1:x2].sum() > 0.8 * mask.sum()
    assert mask[y1:y2, x1:x2].mean() > 0.3


def test_the_image_in_readme_is_current(model):
    from fastsam_rwkv.visualize import overlay

    image = np.asarray(Image.open(EXAMPLE))
    box = [318, 222, 408, 332]
    now = overlay(image, Predictor(model).predict_image(image, box=box).masks, boxes=[box])
    shown = np.asarray(Image.open(EXAMPLE.with_name("overlay.png")))
    differing = (np.asarray(now).astype(int) - shown).any(-1).mean()
    assert differing < 0.002, "run README's first command with --overlay examples/overlay.png"


def test_the_gallery_is_current(model, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    from gallery import gallery

    file = io.BytesIO()
    gallery(model).save(file, "JPEG", quality=88)
    now, shown = Image.open(file), Image.open(EXAMPLE.with_name("gallery.jpg"))
    assert now.size == shown.size
    apart = np.abs(np.asarray(now).astype(int) - np.asarray(shown)).mean()
    assert apart < 1, f"{apart:.2f} of 255 on average: run `python examples/gallery.py`"


@pytest.mark.parametrize("name", ["coffee", "chelsea"])
def test_masks_in_bfloat16_agree(name, request):
    image = load_image(request.config.rootpath / "examples" / f"{name}.jpg")
    H, W = image.shape[:2]
    corners = np.random.default_rng(0).uniform(0, 0.5, (12, 2))
    boxes = np.concatenate([corners, corners + 0.4], axis=1) * [W, H, W, H]
    masks = []
    for dtype in (torch.float32, torch.bfloat16):
        found = Predictor(RWKVSAM.from_pretrained(dtype=dtype)).predict_image(image, box=boxes, zoom="never")
        masks.append(found.masks[:, 0])
    shared, either = (masks[0] & masks[1]).sum((1, 2)), (masks[0] | masks[1]).sum((1, 2))
    assert (shared / either).mean() >= 0.99
