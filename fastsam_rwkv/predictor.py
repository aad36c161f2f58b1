"""The model behind `SamPredictor`'s interface, and behind `predict`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor

from .image_predictor import ImagePredictor
from .images import ImageFrame, load_image, resize_image
from .prompts import Prediction, Prompts, numbers

if TYPE_CHECKING:
    from .model import RWKVSAM, ImageEmbedding


def predict(
    model: RWKVSAM,
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
    """See `RWKVSAM.predict`."""
    array = load_image(image)
    frame = ImageFrame.of((array.shape[0], array.shape[1]), model.config.image_size)
    if box is not None and boxes is not None:
        raise ValueError("give box (one prompt) or boxes (N prompts), not both")
    if boxes is not None:
        boxes = numbers(boxes, "boxes")
        if boxes.size == 0:
            raise ValueError(f"boxes are empty, shape {list(boxes.shape)}: there is nothing to look for")
        if boxes.ndim != 2:
            raise ValueError(f"boxes must be [N, 4], got shape {list(boxes.shape)}; a single one is `box`")
    if box is not None:
        box = numbers(box, "box")
        if box.ndim != 1:
            raise ValueError(f"box must be [4], got shape {list(box.shape)}; several are `boxes`")
    predictor = Predictor(model)
    predictor.check_multimask(multimask_output)
    prompts = Prompts(frame, point_coords, point_labels, boxes if box is None else box, mask_input)
    embedding = predictor.embed(*resize_image(array, model.config.image_size))
    return predictor.run(prompts, embedding, multimask_output, return_logits)


class Predictor(ImagePredictor["ImageEmbedding", Tensor]):
    """segment-anything's `SamPredictor` interface: embed an image once, then ask for masks.

    Args:
        model: a model from `RWKVSAM.from_pretrained`.

    Source: the signatures and return values of segment-anything's `SamPredictor`.
    """

    def __init__(self, model: RWKVSAM) -> None:
        super().__init__()
        self.model = model
        self.image_size = model.config.image_size
        self.has_multimask = model.config.num_multimask_outputs > 0

    @property
    def device(self) -> torch.device:
        return self.model.device

    @torch.no_grad()  # not inference mode: what the embedding goes into may be trained
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
    def enlarge(self, low: Tensor, frame: ImageFrame, return_logits: bool) -> np.ndarray:
        logits = frame.masks_to_image(low)
        return (logits if return_logits else logits > 0).cpu().numpy()

    def to_numpy(self, low: Tensor) -> np.ndarray:
        return low.float().cpu().numpy()

    def get_image_embedding(self) -> Tensor:
        """The image embedding `[1, 256, h, w]`, channels first as in SAM."""
        if self._embedding is None:
            raise RuntimeError("an image must be set with .set_image(...) to have an embedding")
        return self._embedding.image_embed.permute(0, 3, 1, 2)
