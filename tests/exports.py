"""Exports of a small model, shared by tests: each takes seconds."""

from pathlib import Path

import torch
from small_model import small_model

from fastsam_rwkv import RWKVSAM
from fastsam_rwkv.export import export_onnx

FORMS = {
    "fp32": {},
    "fp16": {"precision": "fp16"},
    "uint8": {"uint8": True, "sam_compatible": True},
    "fixed": {"batch": 2, "single_mask": True},
    "uint8-fp16": {"uint8": True, "precision": "fp16"},
}


def model_to_export() -> RWKVSAM:
    """With decays that matter, of both signs, and bonuses."""
    model = small_model()
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.spatial_mix.decay.copy_(torch.linspace(-8, 20, 36))
            layer.spatial_mix.first.copy_(torch.linspace(-60, 60, 36))
    return model


class Exports:
    """Read only; `copy` gives a folder of one's own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = root / "model"
        model_to_export().save_pretrained(self.model)

    def __getitem__(self, form: str) -> Path:
        folder = self.root / form
        if not folder.exists():
            export_onnx(self.model, folder, **FORMS[form])
        return folder

    def copy(self, form: str, to: Path) -> Path:
        to.mkdir(exist_ok=True)
        for file in self[form].iterdir():
            (to / file.name).write_bytes(file.read_bytes())
        return to
