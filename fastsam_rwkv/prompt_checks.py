"""Checks of prompts that hold for numpy arrays and tensors, in any coordinate frame. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from .errors import PromptError


class Shaped(Protocol):
    """A numpy array or a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def check_shapes(
    prompts: Mapping[str, Shaped], low_res_size: tuple[int, int], *, optional_batch: bool
) -> tuple[int, bool]:
    """Check that prompts have the right shapes and agree on their number.

    Args:
        prompts: Any of `point_coords` `[N, P, 2]`, `point_labels` `[N, P]`, `box` or `boxes` `[N, 4]` and
            `mask_input` `[N, 1, h, w]`.
        low_res_size: `(h, w)` of `mask_input`.
        optional_batch: Accept one prompt without the leading N.

    Returns:
        The number of prompts N, and whether they are one prompt without the leading N.

    Raises:
        PromptError: A shape is wrong, the prompts differ in number, or there is none.
    """
    if "point_labels" in prompts and "point_coords" not in prompts:
        raise PromptError("point_labels were given without point_coords")
    if not prompts:
        raise PromptError("no prompt: give point_coords, a box or mask_input")
    trailing: dict[str, tuple[int | str, ...]] = {"point_coords": ("P", 2), "point_labels": ("P",)}
    trailing |= {"box": (4,), "boxes": (4,), "mask_input": (1, *low_res_size)}
    for name, prompt in prompts.items():
        _check_shape(name, tuple(prompt.shape), trailing[name], optional_batch)
    if "point_labels" in prompts:
        expected, got = (list(prompts[name].shape) for name in ("point_coords", "point_labels"))
        if got != expected[:-1]:
            raise PromptError(f"point_labels must have one label per point, shape {expected[:-1]}, got {got}")
    batched = {name: len(prompt.shape) > len(trailing[name]) for name, prompt in prompts.items()}
    if not any(batched.values()):
        return 1, True
    if not all(batched.values()):
        one, many = ([name for name in batched if batched[name] is kind] for kind in (False, True))
        raise PromptError(f"{', '.join(many)} hold N prompts but {', '.join(one)} a single one; give N of each")
    counts = {name: prompt.shape[0] for name, prompt in prompts.items()}
    if len(set(counts.values())) > 1:
        raise PromptError(f"prompts differ in number: {counts}")
    return next(iter(counts.values())), False


def _check_shape(name: str, shape: tuple[int, ...], trailing: tuple[int | str, ...], optional_batch: bool) -> None:
    ranks = (len(trailing), len(trailing) + 1) if optional_batch else (len(trailing) + 1,)
    fits = all(isinstance(want, str) or want == got for want, got in zip(trailing[::-1], shape[::-1], strict=False))
    if len(shape) in ranks and fits:
        return
    corners = " (x1, y1, x2, y2)"
    meaning = {"point_coords": " (x, y)", "box": corners, "boxes": corners, "mask_input": " logits"}.get(name, "")
    inner = ", ".join(map(str, trailing))
    expected = f"[{inner}] or [N, {inner}]" if optional_batch else f"[N, {inner}]"
    raise PromptError(f"{name} must be {expected}{meaning}, got shape {list(shape)}")


def check_labels(labels: Iterable[float]) -> None:
    """Raise a PromptError for a point label other than 1 (foreground), 0 (background) and -1 (padding)."""
    for label in labels:
        if label not in (-1, 0, 1):
            remedy = "; give the corners of a box as `box`" if label in (2, 3) else ""
            raise PromptError(
                f"point label {label:g}: labels are 1 (foreground), 0 (background) or -1 (padding){remedy}"
            )
