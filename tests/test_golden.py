"""The published implementation's outputs, through `convert_upstream`, `save_pretrained` and `from_pretrained`."""

import numpy as np
import pytest
import torch
from golden import load_run, pixels, published_weights

from fastsam_rwkv import RWKVSAM
from fastsam_rwkv.convert import convert_file

RUNS = ["small_backbone_256x320", "tiny_points", "tiny_boxes", "small_box"]
STRIDES = {"s1": 16, "s2": 16, "mid": 4, "last": 4, "emb": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    for variant in ("tiny", "small"):
        torch.save({"state_dict": published_weights(variant), "optimizer": {"step": 3}}, folder / f"{variant}.pth")
        assert convert_file(folder / f"{variant}.pth", folder / variant).variant == variant
    return {variant: RWKVSAM.from_pretrained(folder / variant) for variant in ("tiny", "small")}


def relative_l2(got, want):
    return np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want.astype(np.float64))


def check_every_stored_tensor(run, model):
    device = model.device
    maps = {}
    hooks = [
        model.backbone.layers[7].register_forward_hook(lambda _module, _args, out: maps.update(mid=out)),
        model.backbone.register_forward_hook(
            lambda _module, _args, out: maps.update(zip(("s1", "s2", "last"), out, strict=True))
        ),
    ]
    with torch.inference_mode():
        embedding = model.encode_image(pixels(run).to(device))
    for hook in hooks:
        hook.remove()
    maps["emb"] = embedding.image_embed
    for key, stride in STRIDES.items():
        got = maps[key].permute(0, 3, 1, 2).cpu()
        assert relative_l2(got[:, ::8, ::stride, ::stride].numpy(), run[key]) <= 1e-4, key
        assert got.double().norm().item() == pytest.approx(float(run[f"{key}_norm"]), rel=1e-4), key
    if "low" not in run:
        return
    prompts = {}
    if "points" in run:
        labels = torch.from_numpy(run["labels"]).long()
        prompts = {"point_coords": torch.from_numpy(run["points"]), "point_labels": labels}
    if "boxes" in run:
        prompts["boxes"] = torch.from_numpy(run["boxes"])
    with torch.inference_mode():
        prompts = {prompt: tensor.to(device) for prompt, tensor in prompts.items()}
        low, iou = (t.cpu() for t in model.decode_masks(embedding, **prompts))
    assert relative_l2(low[:, :, ::2, ::2].numpy(), run["low"]) <= 1e-4
    assert low.double().norm().item() == pytest.approx(float(run["low_norm"]), rel=1e-4)
    assert relative_l2(iou.numpy(), run["iou"]) <= 1e-4


@pytest.mark.parametrize("name", RUNS)
def test_every_stored_tensor(name, models):
    run = load_run(name)
    check_every_stored_tensor(run, models[str(run["variant"])])
