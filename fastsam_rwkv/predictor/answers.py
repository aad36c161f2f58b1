"""Prompts on one image, from the frames that answer them to the masks. No PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np

from .frame import ImageFrame, resample_logits
from .prompts import OUTSIDE, Prompts
from .zoom import window_around

if TYPE_CHECKING:
    from .base import ImagePredictor

Embedding = TypeVar("Embedding")
Array = TypeVar("Array", bound=Any)  # [N, n, h, w], sliced along N

VALUES_AT_ONCE = 1 << 25  # bounds the memory of float masks in the image frame: 128 MiB
STRIP = 1 << 22  # values of a mask that is larger than that, at a time

Zoom = Literal["never", "auto", "always"]


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


@dataclass(frozen=True)
class Decoded(Generic[Array]):  # not a NamedTuple, which cannot be generic in Python 3.10
    """The decoder's answer to some prompts.

    Attributes:
        rows: numbers of the N prompts.
        frame: of the image or of the window that was encoded.
        low: logits `[N, n, h, w]`.
        iou: `[N, n]` float32.
    """

    rows: list[int]
    frame: ImageFrame
    low: Array
    iou: np.ndarray


class Request(Generic[Embedding, Array]):
    """Prompts on one image, and how they are to be answered.

    Args:
        predictor: Runs the model.
        prompts: Prompts in the image frame.
        multimask_output, return_logits, zoom: As in `ImagePredictor.predict_image`.

    Attributes:
        rows_of: Numbers of the prompts that the image or a window of it answers, by its frame.
    """

    def __init__(
        self,
        predictor: ImagePredictor[Embedding, Array],
        prompts: Prompts,
        multimask_output: bool,
        return_logits: bool,
        zoom: Zoom,
    ) -> None:
        self._predictor, self._prompts = predictor, prompts
        self._multimask_output, self._return_logits = multimask_output, return_logits
        self.rows_of: dict[ImageFrame, list[int]] = {}
        for row in range(prompts.count):
            self.rows_of.setdefault(self._view(row, zoom), []).append(row)

    def _view(self, row: int, zoom: Zoom) -> ImageFrame:
        """Return the frame in which a prompt is answered."""
        whole = self._prompts.frame
        extent = None if zoom == "never" else self._prompts.extent(row)
        if extent is None:
            return whole
        return window_around(extent, whole, **({} if zoom == "auto" else {"largest": 1})) or whole

    def decode(self, frame: ImageFrame, embedding: Embedding) -> Iterator[Decoded[Array]]:
        """Yield the answers that a frame gives, in chunks whose memory is bounded."""
        rows, most = self.rows_of[frame], self._predictor.prompts_at_once
        for first in range(0, len(rows), most):
            chunk = rows[first : first + most]
            inputs = self._prompts.inputs(chunk, frame)
            yield Decoded(chunk, frame, *self._predictor.decode(embedding, inputs, self._multimask_output))

    def prediction(self, answers: Iterable[Decoded[Array]]) -> Prediction:
        """Bring the answers of all frames to the image frame."""
        filled: Prediction | None = None
        for answer in answers:
            if filled is None:
                filled = self._empty(tuple(answer.low.shape[1:]))
            self._write(filled, answer)
        assert filled is not None  # there is at least one prompt
        return Prediction(*(array[0] for array in filled)) if self._prompts.single else filled

    def _empty(self, shape: tuple[int, ...]) -> Prediction:
        """Return a prediction to be filled: no object anywhere."""
        N, (n, h, w) = self._prompts.count, shape
        fill: Any = OUTSIDE if self._return_logits else False
        dtype = np.float32 if self._return_logits else np.bool_
        masks: np.ndarray = np.full((N, n, *self._prompts.frame.original_size), fill, dtype)
        return Prediction(masks, np.empty((N, n), np.float32), np.empty((N, n, h, w), np.float32))

    def _write(self, filled: Prediction, answer: Decoded[Array]) -> None:
        """Write masks into the prediction, as many at a time as memory allows."""
        rows, frame, iou = answer.rows, answer.frame, answer.iou
        predictor, return_logits = self._predictor, self._return_logits
        pixels = max(frame.original_size[0] * frame.original_size[1], frame.input_size[0] * frame.input_size[1])
        lines, columns = frame.pixels
        step = max(1, VALUES_AT_ONCE // (iou.shape[1] * pixels))
        low_res_logits, low = predictor.to_numpy(answer.low), predictor.cleaned(answer.low)
        for i in range(0, len(rows), step):
            if iou.shape[1] * pixels <= VALUES_AT_ONCE:
                masks = predictor.enlarge(low[i : i + step], frame, return_logits)
                for row, mask in zip(rows[i : i + step], masks, strict=True):
                    filled.masks[row, :, lines, columns] = mask
                continue
            for k in range(iou.shape[1]):
                window = filled.masks[rows[i], k, lines, columns]
                if pixels <= VALUES_AT_ONCE:
                    window[:] = predictor.enlarge(low[i : i + 1, k : k + 1], frame, return_logits)[0, 0]
                    continue
                for strip, logits in frame.strips_to_image(predictor.to_numpy(low[i : i + 1, k : k + 1]), STRIP):
                    window[strip] = logits[0, 0] if return_logits else logits[0, 0] > predictor.mask_threshold
        if frame != self._prompts.frame:
            low_res_logits = resample_logits(low_res_logits, frame, self._prompts.frame, OUTSIDE)
        filled.scores[rows], filled.low_res_logits[rows] = iou, low_res_logits
