"""Sizes of the model, and the normalization of its pixels. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import listed, short_repr

FORMAT_VERSION = 1
PIXEL_MEAN = (123.675, 116.28, 103.53)  # of RGB in 0..255, as in segment-anything
PIXEL_STD = (58.395, 57.12, 57.375)
SAM_SIZE = 1024  # pixels, the side of segment-anything's frame of images and coordinates
MODEL_TYPE = "rwkv_sam"  # by which transformers knows the model
_OF_TRANSFORMERS = {"model_type", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype"}

_MOST = {  # several times those of "large"; larger ones exhaust memory or time before a file disagrees with them
    "stem_dim": 1024,
    "stage1_dim": 1024,
    "stage2_dim": 2048,
    "embed_dim": 8192,
    "stage1_depth": 64,
    "stage2_depth": 64,
    "depth": 256,
    "image_size": 16384,
}
_SIZES: dict[str, dict[str, int]] = {
    "tiny": {"stem_dim": 32, "stage1_dim": 32, "stage2_dim": 64, "embed_dim": 192},
    "small": {"stem_dim": 64, "stage1_dim": 64, "stage2_dim": 128, "embed_dim": 384},
    "base": {"stem_dim": 128, "stage1_dim": 128, "stage2_dim": 256, "embed_dim": 768},
    "large": {"stem_dim": 160, "stage1_dim": 160, "stage2_dim": 320, "embed_dim": 1024},
}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of one RWKV-SAM model.

    Attributes:
        variant: Name of the size: "tiny", "small", "base", "large", or "custom" for other widths.
        stem_dim: Channels of the stem (1/2 resolution), at most 1024.
        stage1_dim: Channels of convolution stage 1 (1/4 resolution), at most 1024.
        stage2_dim: Channels of convolution stage 2 (1/8 resolution), at most 2048.
        embed_dim: Channels of the RWKV layers (1/16 resolution), at most 8192.
        stage1_depth: MBConv blocks of stage 1, at most 64; the first has stride 2.
        stage2_depth: MBConv blocks of stage 2, at most 64; the first has stride 2.
        depth: Number of RWKV layers, at most 256.
        image_size: Side in pixels of the square that `predict` resizes and pads images to; a multiple of 64, at most
            16384.
        num_multimask_outputs: Extra mask outputs for ambiguous prompts: 0 as published, 3 as in SAM.
        pred_iou_thresh: Default of `AutomaticMaskGenerator` for this model, 0 to 1; 0.88 as in SAM.
        stability_score_thresh: Likewise; 0.95 as in SAM.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field is out of range.

    Source: arXiv 2406.19369; the multimask layout is SAM's (arXiv 2304.02643).
    """

    variant: str
    stem_dim: int
    stage1_dim: int
    stage2_dim: int
    embed_dim: int
    stage1_depth: int = 2
    stage2_depth: int = 4
    depth: int = 14
    image_size: int = 1024
    num_multimask_outputs: int = 0
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95

    def __post_init__(self) -> None:
        if not isinstance(self.variant, str):
            raise TypeError(f"config field 'variant' must be a string, got {short_repr(self.variant)}")
        for name in ("pred_iou_thresh", "stability_score_thresh"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"config field {name!r} must be a number, got {short_repr(value)}")
            if not 0 <= value <= 1:
                raise ValueError(f"config field {name!r} must be within 0..1, got {short_repr(value)}")
        for name in (f.name for f in fields(self) if f.type == "int"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"config field {name!r} must be an integer, got {short_repr(value)}")
            if value < (0 if name == "num_multimask_outputs" else 1):
                raise ValueError(f"config field {name!r} must be positive, got {short_repr(value)}")
            if value > _MOST.get(name, value):
                raise ValueError(f"config field {name!r} must be at most {_MOST[name]}, got {short_repr(value)}")
        if self.variant != "custom" and self.variant not in _SIZES:
            raise ValueError(
                f"config field 'variant' must be one of {[*_SIZES, 'custom']}, got {short_repr(self.variant)}"
            )
        if self.image_size % 64:
            raise ValueError(f"image_size must be a multiple of 64, got {self.image_size}")
        if self.num_multimask_outputs not in (0, 3):
            raise ValueError(
                f"num_multimask_outputs must be 0, or 3 as in SAM, got {short_repr(self.num_multimask_outputs)}"
            )

    @classmethod
    def from_name(cls, variant: str, *, image_size: int = 1024, num_multimask_outputs: int = 0) -> ModelConfig:
        """Return a published config: "tiny", "small", "base" or "large"."""
        if variant not in _SIZES:
            raise ValueError(f"unknown variant {short_repr(variant)}; choose one of {list(_SIZES)}")
        return cls(variant, **_SIZES[variant], image_size=image_size, num_multimask_outputs=num_multimask_outputs)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Build a config from the dict that `to_dict` returns. Keys of transformers are ignored.

        Raises:
            TypeError: A field has the wrong type.
            ValueError: A key is unknown or missing, a field is out of range, or the format version is another one.
        """
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"config has format_version {short_repr(version)}; this release reads {FORMAT_VERSION}. "
                "Upgrade fastsam-rwkv, or convert the checkpoint again with `fastsam-rwkv convert`."
            )
        known = {f.name for f in fields(cls)}
        given = {k: v for k, v in data.items() if k not in _OF_TRANSFORMERS | {"format_version"}}
        if unknown := sorted(map(str, set(given) - known)):
            raise ValueError(f"unknown config keys: {listed(unknown, 150)}; known keys are {', '.join(sorted(known))}")
        required = {"variant", "stem_dim", "stage1_dim", "stage2_dim", "embed_dim"}
        if missing := sorted(required - set(given)):
            raise ValueError(f"config lacks the keys {missing}")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serializable dict with a `format_version`."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}
