"""Files and config keys for Hugging Face transformers, in the folder of a saved model. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .config import MODEL_TYPE, PIXEL_MEAN, PIXEL_STD, ModelConfig

_CODE = "modeling_rwkv_sam"
_SOURCE = """# For `trust_remote_code=True` of transformers. The code itself is in the package fastsam-rwkv.
from fastsam_rwkv.hf import RwkvSamConfig, RwkvSamForMaskGeneration

__all__ = ["RwkvSamConfig", "RwkvSamForMaskGeneration"]
"""
CONFIG_KEYS = {  # of `config.json`, besides the sizes
    "model_type": MODEL_TYPE,
    "architectures": ["RwkvSamForMaskGeneration"],
    "auto_map": {
        "AutoConfig": f"{_CODE}.RwkvSamConfig",
        "AutoModel": f"{_CODE}.RwkvSamForMaskGeneration",
        "AutoModelForMaskGeneration": f"{_CODE}.RwkvSamForMaskGeneration",
    },
}


def as_json(data: Mapping[str, Any]) -> bytes:
    """Return the text of a JSON file."""
    return (json.dumps(data, indent=2) + "\n").encode()


def further_files(config: ModelConfig) -> dict[str, bytes]:
    """Return by name the file for `trust_remote_code`, and the settings of SAM's image processor and processor."""
    S = config.image_size
    processor = {
        "processor_class": "SamProcessor",
        "image_processor_type": "SamImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"longest_edge": S},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [value / 255 for value in PIXEL_MEAN],
        "image_std": [value / 255 for value in PIXEL_STD],
        "do_pad": True,
        "pad_size": {"height": S, "width": S},
        "mask_size": {"longest_edge": S // 4},
        "mask_pad_size": {"height": S // 4, "width": S // 4},
    }
    return {"preprocessor_config.json": as_json(processor), f"{_CODE}.py": _SOURCE.encode()}
