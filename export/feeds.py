"""Inputs of the two graphs as numpy arrays. No PyTorch."""

from __future__ import annotations

import numpy as np

from ..config import PIXEL_MEAN, PIXEL_STD
from .manifest import Manifest


def encoder_input(pixels: np.ndarray, manifest: Manifest, batch: int = 1) -> np.ndarray:
    """Convert pixels resized to `frame_size`, uint8 `[h, w, 3]`, to the encoder's input for copies of one image.

    Returns:
        RGB 0..255 `[h, w, 3]` for "sam". Otherwise uint8 `[batch, h, w, 3]` if the manifest says `uint8`, else
        normalized float32 `[batch, 3, S, S]` padded with zeros.
    """
    if manifest.contract == "sam":
        return pixels if manifest.uint8 else pixels.astype(np.float32)
    if manifest.uint8:
        return np.repeat(pixels[None], batch, axis=0)
    S = manifest.frame_size
    image = np.zeros((1, 3, S, S), np.float32)
    normalized = (pixels - np.array(PIXEL_MEAN, np.float32)) / np.array(PIXEL_STD, np.float32)
    image[0, :, : pixels.shape[0], : pixels.shape[1]] = normalized.transpose(2, 0, 1)
    return np.repeat(image, batch, axis=0)


def labeled_points(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convert prompts to the decoder's points and labels, in the input frame.

    A box becomes two points with labels 2 and 3. Points without a box get a padding point with label -1. A mask alone
    has P = 0.

    Args:
        inputs: `Prompts.inputs`: `point_coords`, `point_labels`, `boxes` and `mask_input`, each with N in front.

    Returns:
        `point_coords` `[N, P, 2]` and `point_labels` `[N, P]` float32, and `mask_input` if it was given.
    """
    N = len(next(iter(inputs.values())))
    coords = inputs.get("point_coords", np.empty((N, 0, 2), np.float32))
    labels = inputs.get("point_labels", np.empty((N, 0), np.int64))
    if "boxes" in inputs:
        last, last_labels = inputs["boxes"].reshape(N, 2, 2), [2, 3]
    elif "point_coords" in inputs:
        last, last_labels = np.zeros((N, 1, 2), np.float32), [-1]
    else:
        last, last_labels = np.empty((N, 0, 2), np.float32), []
    result = {
        "point_coords": np.concatenate([coords, last], axis=1).astype(np.float32),
        "point_labels": np.concatenate([labels, np.tile(np.array(last_labels), (N, 1))], axis=1).astype(np.float32),
    }
    return result | {name: inputs[name] for name in ("mask_input",) if name in inputs}


def decoder_inputs(inputs: dict[str, np.ndarray], manifest: Manifest) -> dict[str, np.ndarray]:
    """Return the decoder's inputs except the embedding and `orig_im_size`.

    Without a mask, `mask_input` is zeros `[N, 1, h, w]` and `has_mask_input` is 0.
    """
    N, side = len(inputs["point_coords"]), manifest.frame_size // 4
    given = inputs.get("mask_input")
    return {
        "point_coords": inputs["point_coords"],
        "point_labels": inputs["point_labels"],
        "mask_input": np.zeros((N, 1, side, side), np.float32) if given is None else given,
        "has_mask_input": np.array([given is not None], np.float32),
    }
