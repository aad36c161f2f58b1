"""Exported folders of a small model, shared by tests because each takes seconds."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from small_model import small_model

from fastsam_rwkv import RWKVSAM
from fastsam_rwkv.export import export_onnx

FORMS = {
    "fp32": {},
    "fp16": {"precision": "fp16", "uint8": True},
    "sam": {"uint8": True, "contract": "sam", "configs": True},
    "fixed": {"batch": 2, "single_mask": True},
}


def model_to_export() -> RWKVSAM:
    """Return a small model with decays and bonuses of both signs, large enough to change masks."""
    model = small_model()
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.spatial_mix.decay.copy_(torch.linspace(-8, 20, 36))
            layer.spatial_mix.first.copy_(torch.linspace(-60, 60, 36))
    return model


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """Make a folder unless it exists, and return it. If two processes make it at once, the first to finish wins."""
    if not folder.exists():
        own = folder.with_name(f"{folder.name}.{os.getpid()}")
        make(own)
        try:
            own.rename(folder)
        except OSError:  # another process was faster
            if not folder.exists():
                raise
    return folder


class Exports:
    """Exported folders by form, read-only. `copy` makes a writable copy."""

    def __init__(self, root: Path) -> None:
        root.mkdir(exist_ok=True)
        self.root = root
        self.model = made_once(root / "model", lambda folder: model_to_export().save_pretrained(folder))

    def __getitem__(self, form: str) -> Path:
        return made_once(self.root / form, lambda folder: export_onnx(self.model, folder, **FORMS[form]))

    def copy(self, form: str, to: Path) -> Path:
        to.mkdir(parents=True, exist_ok=True)
        for file in self[form].iterdir():
            (to / file.name).write_bytes(file.read_bytes())
        return to


def feeds_of(session) -> dict[str, np.ndarray]:
    """Return inputs for a graph of one of FORMS."""
    generator = np.random.default_rng(0)
    sizes = {"batch": 1, "num_prompts": 2, "num_points": 3, "height": 96, "width": 128}
    feeds = {}
    for value in session.get_inputs():
        shape = [sizes.get(n, n) for n in value.shape]
        dtype = {"tensor(uint8)": np.uint8, "tensor(float16)": np.float16}.get(value.type, np.float32)
        feeds[value.name] = (64 * generator.random(shape)).astype(dtype)
    if "point_labels" in feeds:
        feeds |= {"point_labels": np.array([[1, 0, -1], [2, 3, 1]], np.float32)}
    if "orig_im_size" in feeds:
        feeds["orig_im_size"] = np.array([90, 150], np.float32)
    return feeds
