"""Prompts in an image's pixels, as numpy arrays: checked and brought into the model's input frame. No PyTorch."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .images import ImageFrame


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


class Prompts:
    """Prompts on one image: checked, in the model's input frame, with N in front.

    Attributes:
        inputs: those that were given of `point_coords` `[N, P, 2]` float32 and `point_labels` `[N, P]` int64, `boxes`
            `[N, 4]` float32 and `mask_input` `[N, 1, h, w]` float32.
        count: N.
        single: whether one prompt was given, without N.
    """

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
        self.inputs = {name: array for name, (array, _) in arrays.items()}
        for name in ("point_coords", "boxes"):
            if name in self.inputs:
                self.inputs[name] = frame.points_to_input(self.inputs[name])


def numbers(value: ArrayLike, name: str) -> np.ndarray:
    """A prompt as float32; tensors in it may be on any device, of any dtype, and want gradients."""
    try:
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused below
            array = np.asarray(_without_tensors(value), dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers, with rows of one length, got {value!r}") from error
    if not np.isfinite(array).all():
        where = np.argwhere(~np.isfinite(array))[0].tolist()
        raise ValueError(f"{name} must be finite, got {array[tuple(where)]} at index {where}")
    return array


def _without_tensors(value: Any) -> Any:
    if hasattr(value, "detach"):  # a torch.Tensor or a class of its own after it; torch itself may not be installed
        return value.detach().cpu().float().numpy()
    return [_without_tensors(item) for item in value] if isinstance(value, (list, tuple)) else value


def _points(coords: ArrayLike, point_labels: ArrayLike | None, frame: ImageFrame) -> tuple[np.ndarray, np.ndarray]:
    points = numbers(coords, "point_coords")
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
    labels = numbers(value, "point_labels")
    if labels.shape != shape:
        raise ValueError(f"point_labels must have one label a point, shape {list(shape)}, got {list(labels.shape)}")
    known = np.isin(labels, (-1, 0, 1))
    if not known.all():
        raise unknown_label(labels[~known][0])
    return labels.astype(np.int64)


def unknown_label(label: float) -> ValueError:
    remedy = "; give the corners of a box as `box` or `boxes`" if label in (2, 3) else ""
    return ValueError(f"point label {label:g}: labels are 1 (foreground), 0 (background) or -1 (padding){remedy}")


def _boxes(value: ArrayLike, frame: ImageFrame) -> np.ndarray:
    boxes = numbers(value, "box")
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
    mask = numbers(value, "mask_input")
    if mask.ndim == 2:
        mask = mask[None]
    h, w = (side // 4 for side in frame.input_size)
    if mask.ndim not in (3, 4) or mask.shape[-3:] != (1, h, w):
        raise ValueError(
            f"mask_input must be [1, {h}, {w}] or [N, 1, {h}, {w}] low-resolution logits of one mask, "
            f"got shape {list(mask.shape)}"
        )
    return mask
