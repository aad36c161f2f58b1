"""Export to ONNX and TensorRT, and predictors that run the exported files. See README.md in this folder.

Importing this package imports neither PyTorch nor ONNX Runtime nor TensorRT. Each is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if __name__ != "fastsam_rwkv.export":
    raise ImportError(f"this folder was imported as {__name__!r}; import it as 'fastsam_rwkv.export'")

from .manifest import ExportError, Manifest

if TYPE_CHECKING:
    from .check import adopt_onnx, check_onnx
    from .onnx import export_onnx
    from .onnx_predictor import OnnxPredictor
    from .tensorrt import TensorRTPredictor, build_tensorrt

__all__ = [
    "ExportError",
    "Manifest",
    "OnnxPredictor",
    "TensorRTPredictor",
    "adopt_onnx",
    "build_tensorrt",
    "check_onnx",
    "export_onnx",
]
_MODULES = {
    "OnnxPredictor": "onnx_predictor",
    "TensorRTPredictor": "tensorrt",
    "adopt_onnx": "check",
    "build_tensorrt": "tensorrt",
    "check_onnx": "check",
    "export_onnx": "onnx",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
