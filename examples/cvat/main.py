"""Interactor for CVAT: clicks or a box in, a mask out.

Nuclio calls `init_context` once, and `handler` for each click.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from typing import Any

import numpy as np

from fastsam_rwkv import RWKVSAM, Predictor
from fastsam_rwkv.errors import ArgumentError, InputError


def init_context(context: Any) -> None:
    """Load the model of the environment's MODEL on its DEVICE, by default the bundled one."""
    model = RWKVSAM.from_pretrained(os.environ.get("MODEL"), device=os.environ.get("DEVICE"))
    context.user_data.predictor = Predictor(model)
    context.user_data.digest = None
    context.logger.info(f"fastsam-rwkv {model.config.variant} on {model.device}")


def handler(context: Any, event: Any) -> Any:
    """Answer a click with the mask as rows of 0 and 1, at the size of the image."""
    try:
        body, status = {"mask": segment(context.user_data, event.body).tolist()}, 200
    except InputError as error:
        body, status = {"error": str(error)}, 400
    text = json.dumps(body, separators=(",", ":"))
    return context.Response(body=text, headers={}, content_type="application/json", status_code=status)


def segment(kept: Any, body: Any) -> np.ndarray:
    """Return the mask uint8 `[H, W]` for the body of a request. The embedding of the last image is kept.

    Raises:
        InputError: An image or a prompt that cannot be used.
    """
    if not isinstance(body, dict) or not isinstance(body.get("image"), str):
        raise ArgumentError("the body must be a JSON object whose 'image' is base64 of a file")
    try:
        data = base64.b64decode(body["image"], validate=True)
    except ValueError as error:
        raise ArgumentError(f"'image' is not base64: {error}") from error
    positive, negative, box = (_points(body, name) for name in ("pos_points", "neg_points", "obj_bbox"))
    if len(box) not in (0, 2):
        raise ArgumentError(f"'obj_bbox' must be the two corners of one box, got {len(box)} points")
    if not (len(positive) or len(negative) or len(box)):
        raise ArgumentError("give a point or a box")
    prompt: dict[str, Any] = {"box": box.ravel()} if len(box) else {}
    if len(positive) or len(negative):
        prompt["point_coords"] = np.concatenate([positive, negative])
        prompt["point_labels"] = [1] * len(positive) + [0] * len(negative)
    digest = hashlib.sha256(data).digest()
    if digest != kept.digest:
        kept.predictor.set_image(data)
        kept.digest = digest
    masks, _, _ = kept.predictor.predict(**prompt, multimask_output=False, zoom="auto")
    return masks[0].astype(np.uint8)


def _points(body: dict[str, Any], name: str) -> np.ndarray:
    """Return a list of points as `[P, 2]`. It may be missing, null or empty."""
    try:
        points = np.asarray(body.get(name) or np.empty((0, 2)), np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ArgumentError(f"{name!r} must be a list of [x, y]: {error}") from error
    if points.ndim != 2 or points.shape[1] != 2:
        raise ArgumentError(f"{name!r} must be a list of [x, y]")
    return points
