"""`OnnxPredictor`, which needs no PyTorch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..predictor.base import ImagePredictor
from ..predictor.frame import ImageFrame
from .feeds import decoder_inputs, encoder_input, labeled_points
from .manifest import DECODER, ENCODER, ExportError, Manifest, require
from .sessions import Session

Maps = dict[str, np.ndarray]


class OnnxPredictor(ImagePredictor[Maps, np.ndarray]):
    """Predictor with the interface of `Predictor` that runs exported graphs in ONNX Runtime.

    Args:
        folder: Folder that `fastsam-rwkv export onnx` wrote.
        providers: Execution provider of ONNX Runtime, or several, the preferred one first. By default the CPU; None for
            all that this ONNX Runtime has.
        session_options: `onnxruntime.SessionOptions`, such as the number of threads.

    Raises:
        ExportError: The folder holds no export, its files were changed, ONNX Runtime is missing, or it lacks a
            provider.

    A predictor can be pickled and deep-copied, with the image that is set. It reads the folder again then.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        providers: str | Sequence[str | tuple[str, dict[str, Any]]] | None = ("CPUExecutionProvider",),
        session_options: Any = None,
    ) -> None:
        require("onnxruntime")
        import onnxruntime

        super().__init__()
        folder = Path(os.path.abspath(os.path.expanduser(folder)))
        self._arguments = folder, providers, session_options
        self.manifest = Manifest.read(folder)
        if providers is None:
            providers = onnxruntime.get_available_providers()
        providers = [providers] if isinstance(providers, str) else list(providers)
        names = [provider if isinstance(provider, str) else provider[0] for provider in providers]
        if missing := [name for name in names if name not in onnxruntime.get_available_providers()]:
            raise ExportError(
                f"this ONNX Runtime has no {missing[0]}; it has {onnxruntime.get_available_providers()}. "
                "`pip install onnxruntime-gpu` brings CUDAExecutionProvider and TensorrtExecutionProvider"
            )
        self._encoder, self._decoder = (
            Session(folder / file, providers, session_options) for file in (ENCODER, DECODER)
        )
        if names and self._encoder.providers[0] != names[0]:  # ONNX Runtime only warns
            raise ExportError(f"{names[0]} could not be started; see ONNX Runtime's message above")

    def __reduce__(self) -> tuple[Any, ...]:
        if self._arguments[2] is not None:
            raise TypeError("an OnnxPredictor with session_options can be neither pickled nor copied: make another one")
        return type(self), self._arguments, {"_views": self._views, "_batch": self._batch}

    @property
    def image_size(self) -> int:
        return self.manifest.frame_size

    @property
    def has_multimask(self) -> bool:
        return self.manifest.num_masks > 1

    @property
    def providers(self) -> list[str]:
        """Execution providers in use."""
        return self._encoder.providers

    def embed(self, pixels: np.ndarray, frame: ImageFrame) -> Maps:
        image, names = encoder_input(pixels, self.manifest, self.manifest.batch or 1), self.manifest.embedding
        maps = self._encoder.run(names, {self.manifest.image_input: image})
        embedding = {name: array[:1] for name, array in zip(names, maps, strict=True)}
        if self.manifest.takes_size:
            embedding["orig_im_size"] = np.array(frame.original_size, np.float32)
        return embedding

    def decode(
        self, embedding: Maps, inputs: dict[str, np.ndarray], multimask_output: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        feeds = {**embedding, **decoder_inputs(labeled_points(inputs), self.manifest)}
        low, iou = self._decoder.run(["low_res_masks", "iou_predictions"], feeds)
        chosen = slice(1, None) if multimask_output else slice(0, 1)
        return low[:, chosen], iou[:, chosen]

    def enlarge(self, low_res_masks: np.ndarray, frame: ImageFrame, return_logits: bool) -> np.ndarray:
        logits = frame.masks_to_image(low_res_masks)
        return logits if return_logits else logits > 0

    def to_numpy(self, low_res_masks: np.ndarray) -> np.ndarray:
        return low_res_masks

    def get_image_embedding(self) -> np.ndarray:
        """Return the image embedding `[1, 256, S/16, S/16]`, float32, or float16 if the precision is "fp16".

        Graphs of the contracts "sam" and "osam" have `[1, 1280, S/16, S/16]`.

        Raises:
            RuntimeError: No image is set.
        """
        name = "image_embed" if "image_embed" in self.manifest.embedding else "image_embeddings"
        return self._embedding[name]
