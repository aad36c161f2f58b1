"""The rule that makes the golden runs' weights: see tests/golden/README.md."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"
STRIDES = {"s1": 16, "s2": 16, "mid": 4, "last": 4, "emb": 4}
RUNS = ["small_backbone_256x320", "tiny_points", "tiny_boxes", "small_box"]


def _weight(name: str, shape: list[int]) -> np.ndarray:
    n = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF).standard_normal(shape)
    leaf = name.rpartition(".")[2]
    if "spatial_mix" in leaf:
        return 1 / (1 + np.exp(-n))
    if leaf == "spatial_decay":
        return 2 * n
    if leaf == "spatial_first":
        return 300 * n
    if leaf.startswith("layer_scale"):
        return 0.5 + 0.1 * n
    if leaf == "positional_encoding_gaussian_matrix":
        return n
    if len(shape) >= 2 and ("embed" in name or ("token" in name and "attn" not in name)):
        return n
    if len(shape) >= 2:
        return n / np.sqrt(np.prod(shape[1:]))
    if leaf == "weight":
        return 1 + 0.1 * n
    return 0.1 * n


def published_weights(variant: str) -> dict[str, Tensor]:
    """The golden weights under the published names."""
    keys = json.loads((FOLDER / f"keys_{variant}.json").read_text())
    return {name: torch.from_numpy(_weight(name, shape).astype(np.float32)) for name, shape in keys.items()}


def load_run(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as data:
        return dict(data)


def pixels(run: dict[str, np.ndarray]) -> Tensor:
    """The run's input `[1, 3, H, W]`."""
    H, W = (int(s) for s in run["hw"])
    return torch.from_numpy(np.random.RandomState(int(run["seed"])).standard_normal((1, 3, H, W)).astype(np.float32))


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
