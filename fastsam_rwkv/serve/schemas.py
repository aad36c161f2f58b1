"""Prompts and answers of the server as JSON."""

from __future__ import annotations

import base64
import binascii
import io
import math
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from ..errors import PromptError
from ..predictor.answers import Prediction
from ..predictor.rle import as_rle, coco_box_of, runs_of
from .settings import Settings

Format = Literal["rle", "png"]


class Logits(BaseModel):
    """Low-resolution logits as bytes."""

    model_config = ConfigDict(extra="forbid")
    shape: list[int] = Field(min_length=3, max_length=4, description="[1, h, w], or [N, 1, h, w] for N prompts")
    data: str = Field(description="base64 of little-endian float32")

    def array(self) -> np.ndarray:
        """Return the logits.

        Raises:
            PromptError: The data are not base64, or not as many values as the shape says.
        """
        try:
            data = base64.b64decode(self.data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise PromptError(f"mask_input.data is not base64: {error}") from error
        if min(self.shape) < 1 or 4 * math.prod(self.shape) != len(data):
            raise PromptError(f"mask_input.data has {len(data)} bytes, which is not 4 * {self.shape}")
        return np.frombuffer(data, "<f4").reshape(self.shape)

    @classmethod
    def of(cls, array: np.ndarray) -> Logits:
        """Return logits that `mask_input` takes."""
        return cls(shape=list(array.shape), data=base64.b64encode(array.astype("<f4").tobytes()).decode())


class Prompt(BaseModel):
    """One prompt, or N prompts with N in front. Coordinates are (x, y) in pixels of the upright image."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"point_coords": [[320, 240]]}, {"box": [10, 20, 200, 180]}]}
    )
    point_coords: list[list[float]] | list[list[list[float]]] | None = Field(
        None, description="[P, 2] for one prompt, [N, P, 2] for N"
    )
    point_labels: list[int] | list[list[int]] | None = Field(
        None, description="[P] or [N, P]: 1 foreground (default), 0 background, -1 padding"
    )
    box: list[float] | list[list[float]] | None = Field(
        None, description="[4] (x1, y1, x2, y2) for one prompt, [N, 4] for N; x2 and y2 are exclusive"
    )
    mask_input: Logits | None = Field(None, description="low_res_logits of an earlier answer")
    multimask_output: bool = Field(False, description="three masks for an ambiguous prompt instead of one")
    format: Format = Field("rle", description="rle: COCO's compressed run lengths; png: base64 of a PNG, 0 and 255")
    low_res_logits: bool = Field(False, description="also return the logits, for mask_input")

    def prompts(self, settings: Settings) -> dict[str, Any]:
        """Return the arguments of `Prompts`.

        Raises:
            PromptError: There are too many prompts or points, or `mask_input` is not readable.
        """
        mask = None if self.mask_input is None else self.mask_input.array()
        given = {"point_coords": self.point_coords, "point_labels": self.point_labels, "box": self.box}
        depths = {"point_coords": 2, "point_labels": 1, "box": 1}
        counts = {name: len(value) for name, value in given.items() if value and _depth(value) > depths[name]}
        prompts = max([*counts.values(), len(mask) if mask is not None and mask.ndim == 4 else 1])
        points = sum(map(len, self.point_coords or [])) if "point_coords" in counts else len(self.point_coords or [])
        for name, count, most in (("prompts", prompts, settings.max_prompts), ("points", points, settings.max_points)):
            if count > most:
                raise PromptError(f"{count} {name} in one request; at most {most} are taken")
        return {**given, "mask_input": mask}


class ImagePrompt(Prompt):
    """Prompts on an image that comes with them."""

    zoom: Literal["never", "auto", "always"] = Field(
        "auto", description="auto: encode a window around each small box instead of the image"
    )


class Embedded(BaseModel):
    """An image that is embedded."""

    id: str
    height: int
    width: int


class Mask(BaseModel):
    """A mask in the frame of the upright image."""

    prompt: int = Field(description="number of the prompt")
    mask: int = Field(description="number of the mask among those of the prompt")
    score: float = Field(description="predicted IoU")
    area: int = Field(description="pixels")
    bbox: list[int] = Field(description="x, y, width, height in pixels; 0, 0, 0, 0 if the mask is empty")
    segmentation: dict[str, Any] | str = Field(description="COCO's size and counts, or base64 of a PNG")
    low_res_logits: Logits | None = None


class Masks(BaseModel):
    """The masks of all prompts, those of the first prompt first."""

    height: int
    width: int
    masks: list[Mask]


class Model(BaseModel):
    """The model that runs."""

    variant: str
    image_size: int
    multimask: bool
    device: str
    dtype: str
    weights_sha256: str


def _depth(value: Any) -> int:
    """Return the number of nested lists, by the first elements."""
    return 1 + _depth(value[0]) if isinstance(value, list) and value else int(isinstance(value, list))


def answer(prediction: Prediction, format: Format, low_res_logits: bool) -> Masks:
    """Return a prediction as JSON."""
    masks, scores, low = prediction
    if masks.ndim == 3:
        masks, scores, low = masks[None], scores[None], low[None]
    H, W = masks.shape[-2:]
    found = []
    for i, k in np.ndindex(scores.shape):
        runs = runs_of(masks[i, k], (0, 0), (H, W))
        found.append(
            Mask(
                prompt=i,
                mask=k,
                score=float(scores[i, k]),
                area=int(runs[1::2].sum()),
                bbox=coco_box_of(runs, H),
                segmentation=as_rle(runs, (H, W), compressed=True) if format == "rle" else _png(masks[i, k]),
                low_res_logits=Logits.of(low[i, k : k + 1]) if low_res_logits else None,
            )
        )
    return Masks(height=H, width=W, masks=found)


def _png(mask: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()
