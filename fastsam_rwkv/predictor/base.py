"""segment-anything's `SamPredictor` interface, independent of what runs the model. No PyTorch."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from ..errors import ImageError, PromptError
from .frame import ImageFrame
from .image_io import load_image, resize_image
from .prompts import Prompts

Embedding = TypeVar("Embedding")
Array = TypeVar("Array", bound=Any)  # [N, n, h, w], sliced along N

PROMPTS_AT_ONCE = 32  # bounds the memory of the decoder
VALUES_AT_ONCE = 1 << 25  # bounds the memory of float masks in the image frame: 128 MiB


class Prediction(NamedTuple):
    """Masks of one prompt, or of N prompts with N in front of every shape.

    Attributes:
        masks: `[n, H, W]` bool in the image frame; float32 logits with `return_logits`.
        scores: `[n]` float32, the predicted IoU of each mask.
        low_res_logits: `[n, h, w]` float32 at a quarter of the model input's size; accepted as `mask_input`.
    """

    masks: np.ndarray
    scores: np.ndarray
    low_res_logits: np.ndarray


class ImagePredictor(ABC, Generic[Embedding, Array]):
    """Embed an image once, then predict masks for prompts on it. A subclass runs the model."""

    def __init__(self) -> None:
        self.reset_image()

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Side of the model input in pixels."""

    @property
    @abstractmethod
    def has_multimask(self) -> bool:
        """True if the model has three masks for an ambiguous prompt."""

    @abstractmethod
    def embed(self, pixels: np.ndarray, frame: ImageFrame) -> Embedding:
        """Return the embedding of resized pixels, uint8 `[h, w, 3]`."""

    @abstractmethod
    def decode(
        self, embedding: Embedding, inputs: dict[str, np.ndarray], multimask_output: bool
    ) -> tuple[Array, np.ndarray]:
        """Return logits `[N, n, h, w]` and predicted IoUs `[N, n]` float32 for N of `Prompts.inputs`."""

    @abstractmethod
    def enlarge(self, low_res_masks: Array, frame: ImageFrame, return_logits: bool) -> np.ndarray:
        """Resize logits `[N, n, h, w]` to masks `[N, n, H, W]` in the image frame: bool, or float32 logits."""

    @abstractmethod
    def to_numpy(self, low_res_masks: Array) -> np.ndarray:
        """Return the logits as a float32 array."""

    @property
    def prompts_at_once(self) -> int:
        """Largest number of prompts in one call of `decode`."""
        return PROMPTS_AT_ONCE

    def reset_image(self) -> None:
        """Forget the image."""
        self._embedding: Embedding | None = None
        self._frame: ImageFrame | None = None

    @property
    def is_image_set(self) -> bool:
        """True after `set_image`."""
        return self._embedding is not None

    def set_image(self, image: np.ndarray | Image.Image | str | os.PathLike[str], image_format: str = "RGB") -> None:
        """Embed an image.

        Args:
            image: uint8 array `[H, W, 3]`, PIL image or path. EXIF orientation is applied to the last two.
            image_format: "RGB" or "BGR", the channel order of an array.

        Raises:
            ImageError, TypeError, FileNotFoundError: An image that cannot be used. The previous one stays set.
        """
        if image_format not in ("RGB", "BGR"):
            raise ImageError(f"image_format must be 'RGB' or 'BGR', got {image_format!r}")
        array = load_image(image)
        if image_format == "BGR":
            if not isinstance(image, np.ndarray):
                raise ImageError("image_format='BGR' is for arrays; paths and PIL images are read as RGB")
            array = np.ascontiguousarray(array[..., ::-1])
        self.reset_image()
        pixels, frame = resize_image(array, self.image_size)
        self._embedding, self._frame = self.embed(pixels, frame), frame

    def predict(
        self,
        point_coords: ArrayLike | None = None,
        point_labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        multimask_output: bool | None = None,
        return_logits: bool = False,
    ) -> Prediction:
        """Predict masks for prompts on the image that is set, with the defaults of `SamPredictor.predict`.

        Args:
            point_coords, point_labels, mask_input, return_logits: As in `predict_image`.
            box: `[4]` or, as in SAM, `[1, 4]` for one prompt; `[N, 4]` for N prompts.
            multimask_output: Return three masks instead of one. By default three if the model has them, as in SAM.

        Returns:
            Masks `[n, H, W]`, predicted IoUs `[n]` and low-resolution logits `[n, h, w]`, with N in front for N
            prompts.

        Raises:
            RuntimeError: No image is set.
            PromptError: A prompt that cannot be used.
        """
        if self._embedding is None or self._frame is None:
            raise RuntimeError("an image must be set with .set_image(...) before mask prediction")
        if multimask_output is None:
            multimask_output = self.has_multimask
        self._check_multimask(multimask_output)
        prompts = Prompts(self._frame, point_coords, point_labels, box, mask_input, squeeze_box=True)
        return self._decode_all(prompts, self._embedding, multimask_output, return_logits)

    def predict_image(
        self,
        image: str | os.PathLike[str] | Image.Image | np.ndarray,
        point_coords: ArrayLike | None = None,
        point_labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        multimask_output: bool = False,
        return_logits: bool = False,
    ) -> Prediction:
        """Predict masks for prompts on an image, in one call that keeps nothing.

        Coordinates are (x, y) in pixels of the image, after EXIF orientation.

        Args:
            image: Path, PIL image, or uint8 array `[H, W, 3]` RGB. EXIF orientation is applied to the first two.
            point_coords: `[P, 2]` for one prompt, `[N, P, 2]` for N prompts.
            point_labels: `[P]` or `[N, P]`: 1 foreground, 0 background, -1 padding. All foreground by default.
            box: `[4]` (x1, y1, x2, y2) for one prompt, `[N, 4]` for N prompts; x2 and y2 are exclusive. A box may
                reach beyond the image. As in SAM it is not clipped.
            mask_input: `[1, h, w]` or `[N, 1, h, w]`, the low-resolution logits of an earlier prediction.
            multimask_output: Return three masks for an ambiguous prompt instead of one.
            return_logits: Return float32 logits in `masks` instead of booleans.

        Returns:
            Masks `[n, H, W]`, predicted IoUs `[n]` and low-resolution logits `[n, h, w]`, with N in front for N
            prompts.

        Raises:
            ImageError, TypeError: An image that cannot be used.
            PromptError: A prompt that cannot be used.
            FileNotFoundError: The file does not exist.
        """
        self._check_multimask(multimask_output)
        pixels, frame = resize_image(load_image(image), self.image_size)
        prompts = Prompts(frame, point_coords, point_labels, box, mask_input)  # raises before the encoder's work
        return self._decode_all(prompts, self.embed(pixels, frame), multimask_output, return_logits)

    def _check_multimask(self, multimask_output: bool) -> None:
        if multimask_output and not self.has_multimask:
            raise PromptError("multimask_output=True needs a model with num_multimask_outputs=3; this one has one mask")

    def _decode_all(
        self, prompts: Prompts, embedding: Embedding, multimask_output: bool, return_logits: bool
    ) -> Prediction:
        """Decode prompts in chunks whose memory is bounded."""
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
        assert masks is not None  # there is at least one prompt
        prediction = Prediction(masks, np.concatenate(ious), np.concatenate(lows))
        return Prediction(*(array[0] for array in prediction)) if prompts.single else prediction
