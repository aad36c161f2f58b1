"""Prompts in the image frame, as numpy arrays: checked, and mapped to an input frame. No PyTorch."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import PromptError, short_repr
from ..prompt_checks import check_labels, check_shapes
from .frame import ImageFrame, bilinear, resample_logits
from .zoom import Box, enclosing, outline

OUTSIDE = -10.0  # logit of pixels that no window covers
SAM_LOW_RES = 256  # side of SAM's low-resolution masks


def mask_to_low_res_logits(mask: ArrayLike, image_size: int) -> np.ndarray:
    """Turn a mask at the image's size into low-resolution logits, which `mask_input` takes.

    Each logit is 10 times the share of its pixel inside the mask, less the share outside it. Targets smaller than 4
    pixels of the model input fade.

    Args:
        mask: `[H, W]` or `[N, H, W]` in the image frame: bool, or numbers 0 and 1, or 0 and 255.
        image_size: Side of the model input in pixels, as `Predictor.image_size`.

    Returns:
        Float32 `[1, h, w]` or `[N, 1, h, w]`, -10..10, with h = w = image_size // 4. The padding has -10.

    Raises:
        PromptError: The shape or the values are not those of a mask, or `image_size` is not a multiple of 4.
    """
    if not isinstance(image_size, (int, np.integer)) or image_size <= 0 or image_size % 4:
        raise PromptError(f"image_size must be a positive multiple of 4, got {short_repr(image_size)}")
    masks = _numbers(mask, "mask")
    if masks.ndim not in (2, 3) or 0 in masks.shape:
        raise PromptError(f"mask must be [H, W] or [N, H, W], got shape {list(masks.shape)}")
    inside = masks > 0
    high = masks.max()
    if high not in (0, 1, 255) or not (masks == inside * high).all():
        raise PromptError(
            f"mask must be bool, 0 and 1, or 0 and 255, got values {masks.min():g}..{high:g}; "
            "compare it with a threshold, such as `logits > 0`"
        )
    frame = ImageFrame.of((masks.shape[-2], masks.shape[-1]), int(image_size))
    share = frame.coverage(inside.reshape(-1, *masks.shape[-2:]).astype(np.float32), image_size // 4)
    logits = (2 * share - 1) * -OUTSIDE
    return logits if masks.ndim == 2 else logits[:, None]


class Prompts:
    """Checked prompts on one image, in its frame, with N in front.

    Args:
        frame: Frame of the image.
        point_coords: `[P, 2]` or `[N, P, 2]` (x, y) in the image frame.
        point_labels: `[P]` or `[N, P]`: 1 foreground, 0 background, -1 padding. All foreground by default.
        box: `[4]` or `[N, 4]` (x1, y1, x2, y2) in the image frame.
        mask_input: `[1, h, w]` or `[N, 1, h, w]` logits.
        as_sam: Take what SAM takes: a box `[1, 4]` for `[4]` unless other prompts have N in front, no points beside a
            box, points outside the image, which are moved to its edge with a warning, and logits of SAM's 256 x 256.
        relative: Points and boxes are in 0..1, as parts of the image's width and height.

    Attributes:
        frame: Frame of the image.
        count: N.
        single: Whether one prompt was given, without N.

    Raises:
        PromptError: A prompt that cannot be used.
    """

    def __init__(
        self,
        frame: ImageFrame,
        point_coords: ArrayLike | None = None,
        point_labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        *,
        as_sam: bool = False,
        relative: bool = False,
    ) -> None:
        given = {"point_coords": point_coords, "point_labels": point_labels, "box": box, "mask_input": mask_input}
        arrays = {name: _numbers(value, name) for name, value in given.items() if value is not None}
        if point_coords is not None and point_labels is None:
            arrays["point_labels"] = np.ones(arrays["point_coords"].shape[:-1], np.float32)
        if mask_input is not None:
            _check_logits(mask_input, arrays["mask_input"])
        for name, axes in (("point_coords", 2), ("box", 4)):
            if relative and name in arrays and arrays[name].shape[-1:] == (axes,):  # others are refused below
                arrays[name] = arrays[name] * np.tile(np.array(frame.original_size[::-1], np.float32), axes // 2)
        if "mask_input" in arrays and arrays["mask_input"].ndim == 2:
            arrays["mask_input"] = arrays["mask_input"][None]
        if as_sam:
            arrays = _as_sam(arrays, frame)
        low_res_size = (frame.input_size[0] // 4, frame.input_size[1] // 4)
        self.count, self.single = check_shapes(arrays, low_res_size, optional_batch=True)
        if self.single:
            arrays = {name: array[None] for name, array in arrays.items()}
        if self.count == 0:
            raise PromptError(f"no prompt: {', '.join(arrays)} are empty")
        _check_values(arrays, frame)
        if not relative:
            _check_pixels(arrays, frame)
        if "point_labels" in arrays:
            arrays["point_labels"] = arrays["point_labels"].astype(np.int64)
        self.frame, self._arrays = frame, arrays

    def inputs(self, rows: slice | list[int], frame: ImageFrame) -> dict[str, np.ndarray]:
        """Return some prompts in the input frame of the image or of a window of it.

        Args:
            rows: Numbers of the prompts.
            frame: Frame of the image or window.

        Returns:
            Any of `point_coords` `[N, P, 2]` float32, `point_labels` `[N, P]` int64, `boxes` `[N, 4]` float32 and
            `mask_input` `[N, 1, h, w]` float32.
        """
        arrays = {name: array[rows] for name, array in self._arrays.items()}
        if "point_coords" in arrays:
            points = frame.points_to_input(arrays["point_coords"]).astype(np.float32)
            if frame != self.frame:  # background points outside a window say nothing about it
                outside = ((points < 0) | (points > frame.input_size[0])).any(-1)
                arrays["point_labels"] = np.where(outside, -1, arrays["point_labels"])
            arrays["point_coords"] = points
        if "box" in arrays:
            arrays["boxes"] = frame.boxes_to_input(arrays.pop("box")).astype(np.float32)
        if "mask_input" in arrays and frame != self.frame:
            arrays["mask_input"] = resample_logits(arrays["mask_input"], self.frame, frame, OUTSIDE)
        return arrays

    def extent(self, row: int) -> Box | None:
        """Return the box (x1, y1, x2, y2) that a prompt outlines in the image frame.

        It encloses the foreground points and the box prompt, or without one the tight box of `mask_input` above 0. None
        if there is neither a box nor such a mask.
        """
        box: Box | None = None
        if "box" in self._arrays:
            x1, y1, x2, y2 = self._arrays["box"][row].tolist()
            box = x1, y1, x2, y2
        elif "mask_input" in self._arrays:
            box = outline(self._arrays["mask_input"][row], self.frame)
        if box is None or "point_coords" not in self._arrays:
            return box
        points = self._arrays["point_coords"][row][self._arrays["point_labels"][row] == 1]
        return enclosing([box, *((x, y, x, y) for x, y in points.tolist())])


def _check_values(arrays: dict[str, np.ndarray], frame: ImageFrame) -> None:
    """Raise a PromptError for points and boxes, with N in front, that do not fit the image."""
    H, W = frame.original_size
    if "point_coords" in arrays:
        points, labels = arrays["point_coords"], arrays["point_labels"]
        if points.shape[1] == 0:
            raise PromptError("point_coords hold no point; leave them out to prompt with a box alone")
        check_labels(np.unique(labels).tolist())
        if arrays.keys() <= {"point_coords", "point_labels"} and (labels == -1).all(-1).any():
            raise PromptError("point_labels are all -1 (padding): give at least one point, a box or mask_input")
        outside = (points < 0).any(-1) | (points[..., 0] > W) | (points[..., 1] > H)
        outside &= labels != -1  # the model ignores the coordinates of padding
        if outside.any():
            raise PromptError(f"point {points[outside][0].tolist()} (x, y) lies outside the image of {W}x{H} pixels")
    for x1, y1, x2, y2 in arrays.get("box", np.empty((0, 4))).tolist():
        if x2 <= x1 or y2 <= y1:
            raise PromptError(
                f"box {[x1, y1, x2, y2]} is empty or reversed; the order is x1, y1, x2, y2 with x1 < x2 and y1 < y2"
            )
        if x2 <= 0 or y2 <= 0 or x1 >= W or y1 >= H:
            raise PromptError(f"box {[x1, y1, x2, y2]} lies outside the image of {W}x{H} pixels")


def _as_sam(arrays: dict[str, np.ndarray], frame: ImageFrame) -> dict[str, np.ndarray]:
    """Return prompts that SAM takes as those that `Prompts` takes."""
    points = arrays.get("point_coords")
    if points is not None and points.size == 0 and "box" in arrays:
        arrays = {name: array for name, array in arrays.items() if not name.startswith("point")}
    elif points is not None and points.shape[-1:] == (2,) and arrays["point_labels"].shape == points.shape[:-1]:
        used = arrays["point_labels"][..., None] != -1
        inside = np.where(used, points.clip(0, frame.original_size[::-1]), points)
        if (moved := np.argwhere((inside != points).any(-1))).size:
            H, W = frame.original_size
            first = points[tuple(moved[0])].tolist()
            warnings.warn(
                f"{len(moved)} of the points lie outside the image of {W}x{H} pixels, such as {first}; they were moved "
                "to its edge",
                stacklevel=5,
            )
            arrays = arrays | {"point_coords": inside.astype(np.float32)}
    mask, low = arrays.get("mask_input"), frame.input_size[0] // 4
    if mask is not None and mask.shape[-2:] == (SAM_LOW_RES, SAM_LOW_RES) != (low, low):
        resize = bilinear(low, SAM_LOW_RES)
        arrays = arrays | {"mask_input": resize @ mask @ resize.T}
    ranks = {name: array.ndim for name, array in arrays.items()}
    if ranks.get("point_coords", 2) == 2 and ranks.get("mask_input", 3) == 3:
        arrays = arrays | {name: array[0] for name, array in arrays.items() if name == "box" and array.shape == (1, 4)}
    return arrays


def _check_pixels(arrays: dict[str, np.ndarray], frame: ImageFrame) -> None:
    """Raise a PromptError for coordinates in 0..1 instead of pixels. Whole numbers may mean the first pixel."""
    H, W = frame.original_size
    if min(H, W) <= 2:
        return
    for name in ("point_coords", "box"):
        if name not in arrays:
            continue
        coords = arrays[name]
        if name == "point_coords":
            coords = coords[arrays["point_labels"] != -1]
        if coords.size and (np.abs(coords) <= 1).all() and (coords % 1).any():
            raise PromptError(
                f"{name} must be in pixels, got {short_repr(coords[0].tolist())}, which is in the first pixel; "
                f"for coordinates in 0..1 multiply x by {W} and y by {H}"
            )


def _check_logits(given: ArrayLike, array: np.ndarray) -> None:
    """Raise a PromptError for a `mask_input`, as given and as float32, that holds a mask or probabilities."""
    remedy = "`fastsam_rwkv.mask_to_low_res_logits(mask, image_size)` makes logits from a mask [H, W]"
    dtype = str(getattr(given, "dtype", "")).removeprefix("torch.")
    if dtype.startswith(("bool", "uint")):
        raise PromptError(f"mask_input must be logits, got a mask of {dtype}; {remedy}")
    for prompt in array if array.ndim == 4 else array[None]:
        low, high = (prompt.min(), prompt.max()) if prompt.size else (0, 0)
        if low < 0 or high == 0:
            continue
        if ((prompt == 0) | (prompt == high)).all() and high in (1, 255):
            raise PromptError(f"mask_input must be logits, got a mask of values 0 and {high:g}; {remedy}")
        if high <= 1:
            raise PromptError(
                f"mask_input must be logits, got {low:g}..{high:g} as of probabilities p; give `np.log(p / (1 - p))`"
            )


def _numbers(value: ArrayLike, name: str) -> np.ndarray:
    """Return a prompt as float32. Tensors in it may have any device and dtype and may require gradients."""
    try:
        array = np.asarray(_without_tensors(value))
        if array.dtype.kind in "cmM":  # which float32 would take in part
            raise TypeError(f"numbers of dtype {array.dtype}")
        with np.errstate(over="ignore"):  # what overflows float32 becomes infinite and is refused below
            array = array.astype(np.float32)
    except MemoryError:
        raise
    except Exception as error:  # an object's own methods, and PyTorch, raise many types
        problem = f"{name} must be an array of numbers, with rows of one length, got {short_repr(value)}"
        raise PromptError(problem) from error
    if not np.isfinite(array).all():
        index = np.argwhere(~np.isfinite(array))[0].tolist()
        raise PromptError(f"{name} must be finite, got {array[tuple(index)]} at index {index}")
    return array


def _without_tensors(value: Any) -> Any:
    if hasattr(value, "detach"):  # a torch.Tensor, without importing torch
        return value.detach().cpu().float().numpy()
    return [_without_tensors(item) for item in value] if isinstance(value, (list, tuple)) else value
