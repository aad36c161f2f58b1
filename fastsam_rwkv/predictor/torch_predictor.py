"""`Predictor`: the PyTorch model behind the predictors' interface."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import weights_sha256
from ..errors import short_repr
from ..modeling.embedding import ImageEmbedding
from ..modeling.rwkv_sam import RWKVSAM
from .base import ImagePredictor
from .frame import ImageFrame
from .transforms import masks_to_image

IMAGES_AT_ONCE = 8  # on a GPU

_loading = threading.Lock()


class Predictor(ImagePredictor[ImageEmbedding, Tensor]):
    """segment-anything's `SamPredictor` interface: embed an image once, then predict masks for prompts on it.

    Args:
        model: A model from `RWKVSAM.from_pretrained`. By default the bundled model, which is loaded at first use.

    Source: the signatures and return values of segment-anything's `SamPredictor`.
    """

    def __init__(self, model: RWKVSAM | None = None) -> None:
        super().__init__()
        self._model = model

    @property
    def model(self) -> RWKVSAM:
        """The model that runs."""
        if self._model is None:
            with _loading:  # once, from however many threads
                if self._model is None:
                    self._model = RWKVSAM.from_pretrained()
        return self._model

    @property
    def image_size(self) -> int:
        return self.model.config.image_size

    @property
    def has_multimask(self) -> bool:
        return self.model.config.num_multimask_outputs > 0

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    def embed(self, pixels: np.ndarray, frame: ImageFrame) -> ImageEmbedding:
        return self._encode(pixels[None], frame)

    @torch.no_grad()  # not inference mode: the embedding may feed a head that is being trained
    def _encode(self, pixels: np.ndarray, frame: ImageFrame) -> ImageEmbedding:
        x = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2)
        return self.model.encode_image(x, frame.input_size)

    def embed_batch(self, pixels: Sequence[np.ndarray], frame: ImageFrame) -> list[ImageEmbedding]:
        try:
            return list(self._encode(np.stack(pixels), frame))
        except torch.OutOfMemoryError:
            if len(pixels) == 1:
                raise
        half = len(pixels) // 2  # outside of `except`, whose error keeps the tensors of the failed call
        return self.embed_batch(pixels[:half], frame) + self.embed_batch(pixels[half:], frame)

    @property
    def images_at_once(self) -> int:
        return IMAGES_AT_ONCE if self.device.type == "cuda" else 1

    @torch.inference_mode()
    def decode(
        self, embedding: ImageEmbedding, inputs: dict[str, np.ndarray], multimask_output: bool
    ) -> tuple[Tensor, np.ndarray]:
        prompts = {name: torch.from_numpy(array).to(self.device) for name, array in inputs.items()}
        low, iou = self.model.decode_masks(embedding, **prompts, multimask_output=multimask_output)
        return low, iou.float().cpu().numpy()

    @torch.inference_mode()
    def enlarge(self, low_res_masks: Tensor, frame: ImageFrame, return_logits: bool) -> np.ndarray:
        logits = masks_to_image(low_res_masks, frame)
        return (logits if return_logits else logits > 0).cpu().numpy()

    def to_numpy(self, low_res_masks: Tensor) -> np.ndarray:
        return low_res_masks.float().cpu().numpy()

    @property
    def embedding(self) -> ImageEmbedding:
        """The embedding of the image that is set, for `set_embedding`, or `save` to a file.

        It names the image's size and the model's fingerprint, which takes some hundredths of a second.

        Raises:
            RuntimeError: No image is set.
        """
        size = self._set.frame.original_size
        return replace(self._embedding, original_size=size, fingerprint=self._fingerprint())

    def _fingerprint(self) -> str:
        return weights_sha256(self.model, torch.bfloat16)  # the same for models of several dtypes from one checkpoint

    def set_embedding(self, embedding: ImageEmbedding) -> None:
        """Use an embedding of one image instead of an image. Prompts cannot zoom then.

        Args:
            embedding: `Predictor.embedding` of a predictor with the same model, or `ImageEmbedding.load(file)` of it.
                It may be on any device and in any dtype, and the model that made it may have had another dtype.

        Raises:
            TypeError: Not an `ImageEmbedding`.
            ValueError: It was made by other weights, at another input size, or of several images, or it does not name
                its image's size. The previous image stays set.
        """
        if not isinstance(embedding, ImageEmbedding):
            raise TypeError(f"embedding must be an ImageEmbedding, got {short_repr(embedding)}")
        embedding.check()
        if len(embedding) != 1:
            raise ValueError(f"the embedding holds {len(embedding)} images; pass one of them, such as embedding[0]")
        if embedding.original_size is None:
            raise ValueError(
                "the embedding does not name its image's size; use `Predictor.embedding`, or "
                "`dataclasses.replace(embedding, original_size=(H, W))` for one of `encode_image`"
            )
        if embedding.input_size != (self.image_size, self.image_size):
            H, W = embedding.input_size
            raise ValueError(
                f"the embedding is of an input of {H}x{W} pixels; this model's has {self.image_size} a side"
            )
        if embedding.fingerprint not in (None, self._fingerprint()):
            raise ValueError("the embedding was made by a model with other weights; set the image again")
        self._set_embedding(embedding.to(self.device, self.model.dtype), embedding.original_size)

    def get_image_embedding(self) -> Tensor:
        """Return the image embedding `[1, 256, h, w]`, channels first as in SAM.

        Raises:
            RuntimeError: No image is set.
        """
        return self._embedding.image_embed.permute(0, 3, 1, 2)


_default = Predictor()  # loads the bundled model at the first call and keeps it
predict = _default.predict_image
predict_batch = _default.predict_images
