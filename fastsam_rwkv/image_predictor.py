"""segment-anything's `SamPredictor` interface, whatever runs the model. No PyTorch."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from .images import ImageFrame, load_image, resize_image
from .prompts import Prediction, Prompts, numbers

Embedding = TypeVar("Embedding")
Array = TypeVar("Array", bound=Any)  # [N, n, h, w], sliced along N

PROMPTS_AT_ONCE = 32  # bounds the memory of the decoder
VALUES_AT_ONCE = 1 << 25  # bounds that of float masks at the image's size: 128 MiB


class ImagePredictor(ABC, Generic[Embedding, Array]):
    """Embed an image once, then ask for masks. What runs the model, and in which arrays, is the subclass's."""

    image_size: int  # the side of the model's input, in pixels
    has_multimask: bool  # whether the model has three masks for an ambiguous prompt

    def __init__(self) -> None:
        self.reset_image()

    @abstractmethod
    def embed(self, pixels: np.ndarray, frame: ImageFrame) -> Embedding:
        """The embedding of resized pixels, uint8 `[h, w, 3]`."""

    @abstractmethod
    def decode(
        self, embedding: Embedding, inputs: dict[str, np.ndarray], multimask_output: bool
    ) -> tuple[Array, np.ndarray]:
        """Low-resolution logits `[N, n, h, w]` and predicted IoUs `[N, n]` float32 for N of the inputs of `Prompts`."""

    @abstractmethod
    def enlarge(self, low: Array, frame: ImageFrame, return_logits: bool) -> np.ndarray:
        """Low-resolution logits to masks `[N, n, H, W]` at the image's size: bool, or float32 logits."""

    @abstractmethod
    def to_numpy(self, low: Array) -> np.ndarray:
        """The logits in float32."""

    @property
    def prompts_at_once(self) -> int:
        """Prompts that `decode` is given at once."""
        return PROMPTS_AT_ONCE

    def reset_image(self) -> None:
        """Forget the image."""
        self._embedding: Embedding | None = None
        self._frame: ImageFrame | None = None

    @property
    def is_image_set(self) -> bool:
        return self._embedding is not None

    def set_image(self, image: np.ndarray | Image.Image | str | os.PathLike[str], image_format: str = "RGB") -> None:
        """Embed an image.

        Args:
            image: uint8 array `[H, W, 3]`, a PIL image or a path; EXIF orientation is applied to the last two.
            image_format: "RGB" or "BGR": the order of an array's channels.

        Raises:
            ValueError, TypeError, FileNotFoundError: an image that cannot be used; the one set before stays.
        """
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format must be 'RGB' or 'BGR', got {image_format!r}")
        array = load_image(image)
        if image_format == "BGR":
            if not isinstance(image, np.ndarray):
                raise ValueError("image_format='BGR' is for arrays; paths and PIL images are read as RGB")
            array = np.ascontiguousarray(array[..., ::-1])
        self.reset_image()
        pixels, frame = resize_image(array, self.image_size)
        self._embedding, self._frame = self.embed(pixels, frame), frame

    def predict(
        self,
        point_coords: ArrayLike | None = None,
        point_labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool | None = None,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks for prompts in the image's pixels.

        Args:
            point_coords: `[P, 2]` (x, y); `[N, P, 2]` for N prompts.
            point_labels: `[P]` or `[N, P]`: 1 foreground, 0 background, -1 padding. All foreground when left out.
            box: `[4]` or `[1, 4]` (x1, y1, x2, y2), x2 and y2 exclusive; `[N, 4]` for N prompts. A box may reach
                beyond the image; as in SAM it is not clipped.
            mask_input: `[1, h, w]` logits of an earlier prediction; `[N, 1, h, w]` for N prompts.
            multimask_output: three masks instead of one. By default, as in SAM, three where the model has them.
            return_logits: float logits instead of booleans.

        Returns:
            masks `[n, H, W]`, predicted IoUs `[n]`, low-resolution logits `[n, h, w]`; for N prompts with N in front.

        Raises:
            RuntimeError: no image is set.
            ValueError: a prompt that cannot be used.
        """
        if self._embedding is None or self._frame is None:
            raise RuntimeError("an image must be set with .set_image(...) before mask prediction")
        if multimask_output is None:
            multimask_output = self.has_multimask
        self.check_multimask(multimask_output)
        if box is not None:
            box = numbers(box, "box")
            if (
                box.shape == (1, 4)
                and (point_coords is None or numbers(point_coords, "point_coords").ndim < 3)
                and (mask_input is None or numbers(mask_input, "mask_input").ndim < 4)
            ):
                box = box[0]
        prompts = Prompts(self._frame, point_coords, point_labels, box, mask_input)
        return tuple(self.run(prompts, self._embedding, multimask_output, return_logits))  # type: ignore[return-value]

    def check_multimask(self, multimask_output: bool) -> None:
        if multimask_output and not self.has_multimask:
            raise ValueError("multimask_output=True needs a model with num_multimask_outputs=3; this one has a single")

    def run(self, prompts: Prompts, embedding: Embedding, multimask_output: bool, return_logits: bool) -> Prediction:
        """The masks of prompts that were checked."""
        H, W = prompts.frame.original_size
        masks: np.ndarray | None = None
        lows, ious = [], []
        at_once = self.prompts_at_once
        for first in range(0, prompts.count, at_once):
            inputs = {name: array[first : first + at_once] for name, array in prompts.inputs.items()}
            low, iou = self.decode(embedding, inputs, multimask_output)
            N, n = iou.shape
            if masks is None:
                masks = np.empty((prompts.count, n, H, W), np.float32 if return_logits else np.bool_)
            step = max(1, VALUES_AT_ONCE // (n * max(H * W, prompts.frame.input_size[0] * prompts.frame.input_size[1])))
            for i in range(0, N, step):
                stop = min(i + step, N)
                masks[first + i : first + stop] = self.enlarge(low[i:stop], prompts.frame, return_logits)
            lows.append(self.to_numpy(low))
            ious.append(iou)
        assert masks is not None  # Prompts holds at least one
        prediction = Prediction(masks, np.concatenate(ious), np.concatenate(lows))
        return Prediction(*(array[0] for array in prediction)) if prompts.single else prediction
