"""`Predictor`: the PyTorch model behind the predictors' interface."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..modeling.embedding import ImageEmbedding
from ..modeling.rwkv_sam import RWKVSAM
from .base import ImagePredictor
from .frame import ImageFrame
from .transforms import masks_to_image


class Predictor(ImagePredictor[ImageEmbedding, Tensor]):
    """segment-anything's `SamPredictor` interface: embed an image once, then predict masks for prompts on it.

    Args:
        model: A model from `RWKVSAM.from_pretrained`. By default the bundled model, which is loaded at first use.

    Source: the signatures and return values of segment-anything's `SamPredictor`.
    """

    def __init__(self, model: RWKVSAM | None = None) -> None:
        super().__init__()
        if model is not None:
            self.model = model

    @cached_property
    def model(self) -> RWKVSAM:
        """The model that runs."""
        return RWKVSAM.from_pretrained()

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

    @torch.no_grad()  # not inference mode: the embedding may feed a head that is being trained
    def embed(self, pixels: np.ndarray, frame: ImageFrame) -> ImageEmbedding:
        x = torch.from_numpy(pixels).to(self.device).permute(2, 0, 1)[None]
        return self.model.encode_image(x, frame.input_size)

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

    def get_image_embedding(self) -> Tensor:
        """Return the image embedding `[1, 256, h, w]`, channels first as in SAM.

        Raises:
            RuntimeError: No image is set.
        """
        return self._embedding.image_embed.permute(0, 3, 1, 2)


predict = Predictor().predict_image  # loads the bundled model at the first call and keeps it
