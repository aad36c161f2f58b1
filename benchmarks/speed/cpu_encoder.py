"""Time of image encoders on a CPU: ours beside SAM's ViT-B and SAM 2's Hiera-tiny, in one interleaved run.

    python -m benchmarks.speed.cpu_encoder [--image-size 1024] [--repeats 5]

All have random weights, which cost the same as trained ones, and run in float32 on one image. Our rows are the whole
`encode_image`, with the image part of the mask decoder, which SAM's encoders leave to every prompt. In
`-no-scan-no-shift` rows the bi-WKV and the Q-shift are the identity: the time they save is their share. SAM's encoders
need `pip install '.[benchmark]'`; `--only` leaves them out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.speed.timing import compare, cpu_parser, ratio, report
from fastsam_rwkv import RWKVSAM, ModelConfig
from fastsam_rwkv.modeling import layers

SAM, SAM2 = "sam-vit-b", "sam2-hiera-tiny"
VARIANTS = ("tiny", "small")
WITHOUT = "-no-scan-no-shift"
NAMES = (*(variant + suffix for variant in VARIANTS for suffix in ("", WITHOUT)), SAM, SAM2)
# Smallest quotients of their times; scan and Q-shift take at most 15 %
GOALS = {(SAM, "tiny"): 14, (SAM2, "tiny"): 3, (SAM, "small"): 5} | {(name + WITHOUT, name): 0.85 for name in VARIANTS}
GOALS_SIZE = 1024  # image size of the goals


def ours(variant: str, image_size: int) -> RWKVSAM:
    """Build our model with random weights."""
    return RWKVSAM(ModelConfig.from_name(variant, image_size=image_size)).eval()


def sam_vit_b(image_size: int, attention: str = "sdpa") -> nn.Module:
    """Build SAM ViT-B's image encoder (arXiv 2304.02643), the default of transformers, with random weights.

    transformers draws them with a deviation of 1e-10; 0.02 avoids denormal numbers.
    """
    from transformers import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    config = SamVisionConfig(image_size=image_size, initializer_range=0.02, attn_implementation=attention)
    return SamVisionEncoder(config).eval()


def sam2_hiera_tiny(image_size: int) -> nn.Module:
    """Build SAM 2's Hiera-tiny with its feature pyramid (arXiv 2408.00714), transformers' default, random weights."""
    from transformers import Sam2HieraDetConfig, Sam2VisionConfig, Sam2VisionModel

    hiera = Sam2HieraDetConfig(image_size=[image_size, image_size])
    sizes = [[image_size // stride] * 2 for stride in (4, 8, 16)]
    config = Sam2VisionConfig(backbone_config=hiera, backbone_feature_sizes=sizes, attn_implementation="sdpa")
    return Sam2VisionModel(config).eval()


@contextlib.contextmanager
def without_scan_and_shift() -> Iterator[None]:
    """Let the bi-WKV return its values, gated as before, and the Q-shift its input."""

    def gate(w: Tensor, u: Tensor, k: Tensor, v: Tensor, r: Tensor, *others: float | None) -> Tensor:
        return torch.sigmoid(r) * v

    def norm_mix(x: Tensor, weight: Tensor, bias: Tensor, mix: Tensor, eps: float) -> Tensor:
        n = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
        return torch.lerp(n, n, mix[:, None, None, None])

    with mock.patch.multiple(layers, bi_wkv=gate, norm_shift_mix=norm_mix):
        yield


def candidates(names: list[str], image_size: int) -> dict[str, Callable[[], object]]:
    """Return the encoders of `names`, each bound to its image."""
    pixels = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))

    def encode(model: RWKVSAM, whole: bool) -> object:
        with contextlib.nullcontext() if whole else without_scan_and_shift():
            return model.encode_image(pixels)

    def encoder(name: str) -> Callable[[], object]:
        if name in (SAM, SAM2):
            return partial((sam_vit_b if name == SAM else sam2_hiera_tiny)(image_size), pixels)
        return partial(encode, ours(name.removesuffix(WITHOUT), image_size), name in VARIANTS)

    return {name: encoder(name) for name in names}


def compared(rows: dict[str, list[float]], image_size: int) -> list[dict[str, Any]]:
    """Return the quotients of the rows at hand, with goals at the goals' image size."""
    goals = {pair: goal if image_size == GOALS_SIZE else None for pair, goal in GOALS.items()}
    return [ratio(rows, *pair, at_least=goal) for pair, goal in goals.items() if rows.keys() >= set(pair)]


def main(arguments: list[str] | None = None) -> None:
    parser = cpu_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="ROW", help=", ".join(NAMES))
    options = parser.parse_args(arguments)
    runs = candidates(options.only, options.image_size)
    with torch.inference_mode():
        rows = compare(runs, options.repeats)
    report(options, rows, compared(rows, options.image_size))


if __name__ == "__main__":
    main()
