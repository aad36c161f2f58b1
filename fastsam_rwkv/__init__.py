"""RWKV-SAM, a promptable segmenter whose cost is linear in the number of pixels. Inference only.

import fastsam_rwkv
masks, scores, low_res_logits = fastsam_rwkv.predict("photo.jpg", point_coords=[[320, 240]])
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

from .prompts import Prediction

if TYPE_CHECKING:
    import os

    import numpy as np
    from numpy.typing import ArrayLike
    from PIL import Image

    from .checkpoint import CheckpointError
    from .config import ModelConfig
    from .convert import convert_upstream
    from .hub import HubError
    from .model import RWKVSAM, ImageEmbedding
    from .predictor import Predictor

__all__ = [
    "CheckpointError",
    "HubError",
    "ImageEmbedding",
    "ModelConfig",
    "Prediction",
    "Predictor",
    "RWKVSAM",
    "convert_upstream",
    "predict",
]
__version__ = "0.1.0"

_MODULES = {  # imported when they are asked for: exported models run without PyTorch
    "CheckpointError": "checkpoint",
    "HubError": "hub",
    "ImageEmbedding": "model",
    "ModelConfig": "config",
    "Predictor": "predictor",
    "RWKVSAM": "model",
    "convert_upstream": "convert",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


@functools.cache
def _default_model() -> RWKVSAM:
    from .model import RWKVSAM

    return RWKVSAM.from_pretrained()


def predict(
    image: str | os.PathLike[str] | Image.Image | np.ndarray,
    *,
    point_coords: ArrayLike | None = None,
    point_labels: ArrayLike | None = None,
    box: ArrayLike | None = None,
    boxes: ArrayLike | None = None,
    mask_input: np.ndarray | None = None,
    multimask_output: bool = False,
    return_logits: bool = False,
) -> Prediction:
    """`RWKVSAM.predict` with the bundled model, which is loaded on the first call and kept."""
    return _default_model().predict(
        image,
        point_coords=point_coords,
        point_labels=point_labels,
        box=box,
        boxes=boxes,
        mask_input=mask_input,
        multimask_output=multimask_output,
        return_logits=return_logits,
    )
