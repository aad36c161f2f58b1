"""Prompts and masks in an image's own pixels, as numpy arrays."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor

from .transforms import ImageFrame, load_image, resize

if TYPE_CHECKING:
    from .model import RWKVSAM, ImageEmbedding

PROMPTS_AT_ONCE = 32  # bounds the memory of the decoder
VALUES_AT_ONCE = 1 << 25  # bounds that of float masks at the image's size: 128 MiB


class Prediction(NamedTuple):
    """Masks of one prompt, or of N prompts with N in front of every shape.

    Attributes:
        masks: `[n, H, W]` bool at the image's size; float32 logits with `return_logits`.
        scores: `[n]` float32, the predicted IoU of each mask.
        low_res_logits: `[n, h, w]` float32, a quarter of the model's input size; what `mask_input` takes.
    """

    masks: np.ndarray
    scores: np.ndarray
    low_res_logits: np.ndarray


@torch.inference_mode()
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
        boxes = _numbers(boxes, "boxes")
        if boxes.ndim != 2:
            raise ValueError(f"boxes must be [N, 4], got shape {list(boxes.shape)}; a single one is `box`")
    if box is not None:
        box = _numbers(box, "box")
        if box.ndim != 1:
            raise ValueError(f"box must be [4], got shape {list(box.shape)}; several are `boxes`")
    check_multimask(model, multimask_output)
    prompts = Prompts(frame, point_coords, point_labels, boxes if box is None else box, mask_input)
    pixels, _ = resize(array, model.config.image_size, model.device)
    embedding = model.encode_image(pixels, frame.input_size)
    return prompts.decode(model, embedding, multimask_output, return_logits)


def check_multimask(model: RWKVSAM, multimask_output: bool) -> None:
    if multimask_output and not model.config.num_multimask_outputs:
        raise ValueError("multimask_output=True needs a model with num_multimask_outputs=3; this one has a single")


class Prompts:
    """Prompts on one image: checked, in the model's input frame, with N in front."""

    def __init__(
        self,
        frame: ImageFrame,
        point_coords: ArrayLike | None,
        point_labels: ArrayLike | None,
        boxes: ArrayLike | None,
        mask_input: ArrayLike | None,
    ) -> None:
        if point_coords is None and point_labels is not None:
            raise ValueError("point_labels were given without point_coords")
        if point_coords is None and boxes is None and mask_input is None:
            raise ValueError("no prompt: give point_coords, a box or mask_input")
        arrays: dict[str, tuple[np.ndarray, int]] = {}  # name to the array and its number of axes without N
        if point_coords is not None:
            coords, labels = _points(point_coords, point_labels, frame)
            if boxes is None and mask_input is None and (labels == -1).all(-1).any():
                raise ValueError("point_labels are all -1 (padding): give at least one point, a box or mask_input")
            arrays["point_coords"] = coords, 2
            arrays["point_labels"] = labels, 1
        if boxes is not None:
            arrays["boxes"] = _boxes(boxes, frame), 1
        if mask_input is not None:
            arrays["mask_input"] = _mask(mask_input, frame), 3
        batched = {name: array.ndim > axes for name, (array, axes) in arrays.items()}
        self.single = not any(batched.values())
        if not self.single and not all(batched.values()):
            one, many = ([name for name in batched if batched[name] is kind] for kind in (False, True))
            raise ValueError(f"{', '.join(many)} hold N prompts but {', '.join(one)} a single one; give N of each")
        if self.single:
            arrays = {name: (array[None], axes) for name, (array, axes) in arrays.items()}
        counts = {name: len(array) for name, (array, _) in arrays.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"prompts differ in number: {counts}")
        self.frame = frame
        self.count = next(iter(counts.values()))
        if self.count == 0:
            raise ValueError(f"no prompt: {', '.join(counts)} are empty")
        self.inputs = {name: torch.from_numpy(array) for name, (array, _) in arrays.items()}
        for name in ("point_coords", "boxes"):
            if name in self.inputs:
                self.inputs[name] = frame.points_to_input(self.inputs[name])

    def decode(
        self, model: RWKVSAM, embedding: ImageEmbedding, multimask_output: bool, return_logits: bool
    ) -> Prediction:
        parts: list[tuple[Tensor, Tensor]] = []
        for first in range(0, self.count, PROMPTS_AT_ONCE):
            chunk = {n: t[first : first + PROMPTS_AT_ONCE].to(model.device) for n, t in self.inputs.items()}
            parts.append(model.decode_masks(embedding, **chunk, multimask_output=multimask_output))
        low, iou = (torch.cat(column).float() for column in zip(*parts, strict=True))

        H, W = self.frame.original_size
        masks = np.empty((*low.shape[:2], H, W), np.float32 if return_logits else np.bool_)
        a_prompt = low.shape[1] * max(H * W, self.frame.input_size[0] * self.frame.input_size[1])
        step = max(1, VALUES_AT_ONCE // a_prompt)
        for first in range(0, self.count, step):
            logits = self.frame.masks_to_image(low[first : first + step])
            masks[first : first + step] = (logits if return_logits else logits > 0).cpu().numpy()
        prediction = Prediction(masks, iou.cpu().numpy(), low.cpu().numpy())
        return Prediction(*(array[0] for array in prediction)) if self.single else prediction


class Predictor:
    """segment-anything's `SamPredictor` interface: embed an image once, then ask for masks.

    Args:
        model: a model from `RWKVSAM.from_pretrained`.

    Source: the signatures and return values of segment-anything's `SamPredictor`.
    """

    def __init__(self, model: RWKVSAM) -> None:
        self.model = model
        self.reset_image()

    @property
    def device(self) -> torch.device:
        return self.model.device

    def reset_image(self) -> None:
        """Forget the image."""
        self._embedding: ImageEmbedding | None = None
        self._frame: ImageFrame | None = None

    @property
    def is_image_set(self) -> bool:
        return self._embedding is not None

    @torch.inference_mode()
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
        pixels, frame = resize(array, self.model.config.image_size, self.model.device)
        self._embedding = self.model.encode_image(pixels, frame.input_size)
        self._frame = frame

    @torch.inference_mode()
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
            multimask_output = self.model.config.num_multimask_outputs > 0
        check_multimask(self.model, multimask_output)
        if box is not None:
            box = _numbers(box, "box")
            if box.shape == (1, 4) and np.ndim(point_coords) < 3 and np.ndim(mask_input) < 4:  # type: ignore[arg-type]
                box = box[0]
        prompts = Prompts(self._frame, point_coords, point_labels, box, mask_input)
        return tuple(prompts.decode(self.model, self._embedding, multimask_output, return_logits))  # type: ignore[return-value]

    def get_image_embedding(self) -> Tensor:
        """The image embedding `[1, 256, h, w]`, channels first as in SAM."""
        if self._embedding is None:
            raise RuntimeError("an image must be set with .set_image(...) to have an embedding")
        return self._embedding.image_embed.permute(0, 3, 1, 2)


def _numbers(value: ArrayLike, name: str) -> np.ndarray:
    try:
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused below
            array = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers, got {value!r}") from error
    if not np.isfinite(array).all():
        where = np.argwhere(~np.isfinite(array))[0].tolist()
        raise ValueError(f"{name} must be finite, got {array[tuple(where)]} at index {where}")
    return array


def _points(coords: ArrayLike, point_labels: ArrayLike | None, frame: ImageFrame) -> tuple[np.ndarray, np.ndarray]:
    points = _numbers(coords, "point_coords")
    if points.ndim not in (2, 3) or points.shape[-1] != 2:
        raise ValueError(f"point_coords must be [P, 2] or [N, P, 2] (x, y), got shape {list(points.shape)}")
    if points.shape[-2] == 0:
        raise ValueError("point_coords hold no point; leave them out to prompt with a box alone")
    labels = _labels(point_labels, points.shape[:-1])
    H, W = frame.original_size
    outside = (points < 0).any(-1) | (points[..., 0] > W) | (points[..., 1] > H)
    outside &= labels != -1  # wherever padding lies, the model does not look at it
    if outside.any():
        raise ValueError(f"point {points[outside][0].tolist()} (x, y) lies outside the image of {W}x{H} pixels")
    return points, labels


def _labels(value: ArrayLike | None, shape: tuple[int, ...]) -> np.ndarray:
    if value is None:
        return np.ones(shape, np.int64)
    labels = _numbers(value, "point_labels")
    if labels.shape != shape:
        raise ValueError(f"point_labels must have one label a point, shape {list(shape)}, got {list(labels.shape)}")
    known = np.isin(labels, (-1, 0, 1))
    if not known.all():
        remedy = "; give the corners of a box as `box`" if np.isin(labels[~known][0], (2, 3)) else ""
        raise ValueError(
            f"point label {labels[~known][0]:g}: labels are 1 (foreground), 0 (background) or -1 (padding){remedy}"
        )
    return labels.astype(np.int64)


def _boxes(value: ArrayLike, frame: ImageFrame) -> np.ndarray:
    boxes = _numbers(value, "box")
    if boxes.ndim not in (1, 2) or boxes.shape[-1] != 4:
        raise ValueError(f"a box is 4 numbers (x1, y1, x2, y2), N boxes [N, 4]; got shape {list(boxes.shape)}")
    H, W = frame.original_size
    for x1, y1, x2, y2 in boxes.reshape(-1, 4).tolist():
        if x2 <= x1 or y2 <= y1:
            raise ValueError(
                f"box {[x1, y1, x2, y2]} is empty or turned round; the order is x1, y1, x2, y2 with x1 < x2, y1 < y2"
            )
        if x2 <= 0 or y2 <= 0 or x1 >= W or y1 >= H:
            raise ValueError(f"box {[x1, y1, x2, y2]} lies wholly outside the image of {W}x{H} pixels")
    return boxes


def _mask(value: ArrayLike, frame: ImageFrame) -> np.ndarray:
    mask = _numbers(value, "mask_input")
    if mask.ndim == 2:
        mask = mask[None]
    h, w = (side // 4 for side in frame.input_size)
    if mask.ndim not in (3, 4) or mask.shape[-3:] != (1, h, w):
        raise ValueError(
            f"mask_input must be [1, {h}, {w}] or [N, 1, {h}, {w}] low-resolution logits of one mask, "
            f"got shape {list(mask.shape)}"
        )
    return mask
