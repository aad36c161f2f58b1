"""The rule that makes the golden runs' weights: see tests/golden/README.md."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"


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
