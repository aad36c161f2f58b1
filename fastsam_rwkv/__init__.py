"""RWKV-SAM, a promptable segmenter whose cost is linear in the number of pixels. Inference only.

import fastsam_rwkv
masks, scores, low_res_logits = fastsam_rwkv.predict("photo.jpg", point_coords=[[320, 240]])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import ModelConfig
    from .convert import convert_upstream
    from .errors import CheckpointError, DeviceError, HubError, ImageError, InputError, PromptError
    from .modeling.embedding import ImageEmbedding
    from .modeling.rwkv_sam import RWKVSAM
    from .predictor.answers import Prediction
    from .predictor.automatic import AutomaticMaskGenerator, SamAutomaticMaskGenerator
    from .predictor.image_io import load_image
    from .predictor.prompts import mask_to_low_res_logits
    from .predictor.torch_predictor import Predictor, predict, predict_images

__all__ = [
    "AutomaticMaskGenerator",
    "CheckpointError",
    "DeviceError",
    "HubError",
    "ImageEmbedding",
    "ImageError",
    "InputError",
    "ModelConfig",
    "Prediction",
    "Predictor",
    "PromptError",
    "RWKVSAM",
    "SamAutomaticMaskGenerator",
    "convert_upstream",
    "load_image",
    "mask_to_low_res_logits",
    "predict",
    "predict_images",
]
__version__ = "0.1.0"

_MODULES = {  # imported at first access, because exported models run without PyTorch
    "AutomaticMaskGenerator": "predictor.automatic",
    "CheckpointError": "errors",
    "DeviceError": "errors",
    "HubError": "errors",
    "ImageEmbedding": "modeling.embedding",
    "ImageError": "errors",
    "InputError": "errors",
    "ModelConfig": "config",
    "Prediction": "predictor.answers",
    "Predictor": "predictor.torch_predictor",
    "PromptError": "errors",
    "RWKVSAM": "modeling.rwkv_sam",
    "SamAutomaticMaskGenerator": "predictor.automatic",
    "convert_upstream": "convert",
    "load_image": "predictor.image_io",
    "mask_to_low_res_logits": "predictor.prompts",
    "predict": "predictor.torch_predictor",
    "predict_images": "predictor.torch_predictor",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
