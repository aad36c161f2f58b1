"""Everything in an image, step by step at the size of the image: what `AutomaticMaskGenerator` must come to.

Source: the steps that segment-anything documents for its mask generator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from fastsam_rwkv import RWKVSAM, ImageEmbedding
from fastsam_rwkv.predictor.frame import ImageFrame
from fastsam_rwkv.predictor.image_io import resize_image
from fastsam_rwkv.predictor.transforms import masks_to_image


def generate(
    model: RWKVSAM,
    image: np.ndarray,
    side: int,
    iou_thresh: float,
    stability_thresh: float,
    again: Callable[[], ImageEmbedding] | None = None,
    offset: float = 1.0,
    nms_thresh: float = 0.7,
) -> tuple[np.ndarray, np.ndarray]:
    """Return masks `[M, H, W]` bool and predicted IoUs `[M]`, the best first.

    Args:
        model: A model with three masks for a click.
        image: `[H, W, 3]` uint8.
        side: Clicks per side.
        iou_thresh, stability_thresh, offset, nms_thresh: As in `AutomaticMaskGenerator`.
        again: Called for every click to embed the image; None to embed it once.
    """
    H, W = image.shape[:2]
    pixels, frame = resize_image(image, model.config.image_size)
    assert frame == ImageFrame.of((H, W), model.config.image_size)
    masks, scores = [], []
    with torch.inference_mode():
        embedding = model.encode_image(torch.from_numpy(pixels).permute(2, 0, 1)[None], frame.input_size)
        for y in range(side):
            for x in range(side):
                point = np.array([[[(x + 0.5) / side * W, (y + 0.5) / side * H]]])
                coords = torch.from_numpy(frame.points_to_input(point)).float()
                used = embedding if again is None else again()
                low, iou = model.decode_masks(used, coords, torch.ones(1, 1).long(), multimask_output=True)
                for logits, score in zip(masks_to_image(low, frame)[0], iou[0].tolist(), strict=True):
                    certain, possible = (logits > offset).sum().item(), (logits > -offset).sum().item()
                    if score > iou_thresh and certain >= stability_thresh * max(1, possible) and (logits > 0).any():
                        masks.append((logits > 0).numpy())
                        scores.append(score)
    order = np.argsort(-np.array(scores), kind="stable")
    kept, boxes = [], []
    for i in order:
        rows, columns = (np.flatnonzero(masks[i].any(axis)) for axis in (1, 0))
        box = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        if all(_iou(box, other) <= nms_thresh for other in boxes):
            kept.append(i)
            boxes.append(box)
    return np.array([masks[i] for i in kept]).reshape(-1, H, W), np.array([scores[i] for i in kept])


def _iou(a: Sequence[int], b: Sequence[int]) -> float:
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def matched(masks: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> list[float]:
    """Return the best IoU of each mask with one of the others."""
    return [max(((m & o).sum() / (m | o).sum() for o in others), default=0.0) for m in masks]
