"""How long image encoders take on a CPU: ours beside SAM's ViT-B and SAM 2's Hiera-tiny, in one interleaved run.

    python -m benchmarks.speed.cpu_encoder [--image-size 1024] [--repeats 5] [--threads 2]

All have random weights, which cost the same as trained ones, and run in float32 on one image. Our rows are the whole
`encode_image`, with the image-only part of the mask decoder, which SAM's encoders leave to every prompt;
`-backbone-neck` leaves it out. `-no-scan` has the bi-WKV replaced by the identity, `-no-scan-no-shift` the Q-shift
too: what they save is the share of those operations.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.speed.timing import Row, compare, machine, ratios, table
from fastsam_rwkv import RWKVSAM, ModelConfig
from fastsam_rwkv.modeling import layers

SAM, SAM2 = "sam-vit-b", "sam2-hiera-tiny"
VARIANTS = ("tiny", "small")
NAMES = (
    *(v + suffix for v in VARIANTS for suffix in ("", "-backbone-neck", "-no-scan", "-no-scan-no-shift")),
    SAM,
    SAM2,
)


class Goal(NamedTuple):
    """A quotient of two rows' times and the least it should be; None where it is only shown."""

    numerator: str
    denominator: str
    at_least: int | None


QUOTIENTS = (
    Goal(SAM, "tiny", 14),
    Goal(SAM, "tiny-backbone-neck", None),
    Goal(SAM2, "tiny", 3),
    Goal(SAM2, "tiny-backbone-neck", None),
    Goal(SAM, "small", 5),
    Goal(SAM, "small-backbone-neck", None),
)
SCAN_AND_SHIFT_SHARE_AT_MOST = 0.15
GOALS_AT = 1024  # the image size the goals are for
NOISY_SPREAD = 0.1  # of the median


def ours(variant: str, image_size: int) -> RWKVSAM:
    """Our model with random weights."""
    return RWKVSAM(ModelConfig.from_name(variant, image_size=image_size)).eval()


def sam_vit_b(image_size: int, attention: str = "sdpa") -> nn.Module:
    """SAM ViT-B's image encoder (arXiv 2304.02643, `build_sam_vit_b`) with random weights.

    transformers draws them from a deviation of 1e-10; 0.02 keeps the arithmetic clear of denormal numbers.
    """
    from transformers import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    config = SamVisionConfig(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        mlp_dim=3072,
        output_channels=256,
        patch_size=16,
        window_size=14,
        global_attn_indexes=[2, 5, 8, 11],
        use_abs_pos=True,
        use_rel_pos=True,
        image_size=image_size,
        initializer_range=0.02,
        attn_implementation=attention,
    )
    return SamVisionEncoder(config).eval()


def sam2_hiera_tiny(image_size: int) -> nn.Module:
    """SAM 2's Hiera-tiny with its feature pyramid (arXiv 2408.00714, `sam2_hiera_t.yaml`), random weights."""
    from transformers import Sam2HieraDetConfig, Sam2VisionConfig, Sam2VisionModel

    hiera = Sam2HieraDetConfig(
        hidden_size=96,
        num_attention_heads=1,
        blocks_per_stage=[1, 2, 7, 2],
        embed_dim_per_stage=[96, 192, 384, 768],
        num_attention_heads_per_stage=[1, 2, 4, 8],
        window_size_per_stage=[8, 4, 14, 7],
        window_positional_embedding_background_size=[7, 7],
        global_attention_blocks=[5, 7, 9],
        num_query_pool_stages=3,
        image_size=[image_size, image_size],
    )
    config = Sam2VisionConfig(
        backbone_config=hiera,
        backbone_channel_list=[768, 384, 192, 96],
        backbone_feature_sizes=[[image_size // stride] * 2 for stride in (4, 8, 16)],
        fpn_hidden_size=256,
        fpn_top_down_levels=[2, 3],
        attn_implementation="sdpa",
    )
    return Sam2VisionModel(config).eval()


@contextlib.contextmanager
def identity_scan(keep_shift: bool = True) -> Iterator[None]:
    """The bi-WKV returns its values, gated as ever, and without `keep_shift` the Q-shift its input."""

    def gate(w: Tensor, u: Tensor, k: Tensor, v: Tensor, r: Tensor, scale: float) -> Tensor:
        return torch.sigmoid(r) * v

    def norm_mix(x: Tensor, weight: Tensor, bias: Tensor, mix: Tensor, eps: float) -> Tensor:
        n = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
        return torch.lerp(n, n, mix[:, None, None, None])

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(layers, "bi_wkv", gate))
        if not keep_shift:
            stack.enter_context(mock.patch.object(layers, "norm_shift_mix", norm_mix))
        yield


def candidates(names: list[str], image_size: int) -> dict[str, Callable[[], object]]:
    """The encoders behind `names`, each with its own image already at hand."""
    pixels = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    runs: dict[str, Callable[[], object]] = {}
    for variant in VARIANTS:
        if any(name.startswith(variant) for name in names):
            runs |= _our_runs(variant, ours(variant, image_size), pixels)
    for name, build in ((SAM, sam_vit_b), (SAM2, sam2_hiera_tiny)):
        if name in names:
            runs[name] = _bind(build(image_size), pixels)
    return {name: runs[name] for name in names}


def _our_runs(variant: str, model: RWKVSAM, pixels: Tensor) -> dict[str, Callable[[], object]]:
    def backbone_and_neck() -> Tensor:
        x = pixels.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        return model.neck(model.backbone(x)[-1])

    def without_scan(keep_shift: bool) -> object:
        with identity_scan(keep_shift):
            return model.encode_image(pixels)

    return {
        variant: lambda: model.encode_image(pixels),
        f"{variant}-backbone-neck": backbone_and_neck,
        f"{variant}-no-scan": lambda: without_scan(keep_shift=True),
        f"{variant}-no-scan-no-shift": lambda: without_scan(keep_shift=False),
    }


def _bind(model: nn.Module, pixels: Tensor) -> Callable[[], object]:
    return lambda: model(pixels)


def compared(rows: dict[str, Row], image_size: int) -> list[dict[str, Any]]:
    """Quotients and shares that the measured rows allow: median, smallest and largest over the rounds, and goals."""
    with_goals = image_size == GOALS_AT
    found: list[dict[str, Any]] = []
    for numerator, denominator, at_least in QUOTIENTS:
        if numerator in rows and denominator in rows:
            middle, low, high = ratios(rows[numerator], rows[denominator])
            goal, met = (f">= {at_least}", middle >= at_least) if with_goals and at_least else (None, None)
            found.append(_entry(f"{numerator} / {denominator}", middle, low, high, goal, met))
    for variant in VARIANTS:
        for suffix, title in (("-no-scan", "scan"), ("-no-scan-no-shift", "scan + Q-shift")):
            if variant in rows and variant + suffix in rows:
                middle, low, high = ratios(rows[variant + suffix], rows[variant])
                share, limit = 1 - middle, SCAN_AND_SHIFT_SHARE_AT_MOST
                goal, met = (f"<= {limit}", share <= limit) if with_goals and "shift" in suffix else (None, None)
                found.append(_entry(f"{title}, share of {variant}", share, 1 - high, 1 - low, goal, met))
    return found


def _entry(what: str, median: float, low: float, high: float, goal: str | None, met: bool | None) -> dict[str, Any]:
    return {"what": what, "median": median, "min": low, "max": high, "goal": goal, "met": met}


def profile(runs: dict[str, Callable[[], object]], count: int = 15) -> str:
    """The operations that take most of each candidate's time."""
    parts = []
    for name, run in runs.items():
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            run()
        parts.append(f"{name}\n{profiler.key_averages().table(sort_by='self_cpu_time_total', row_limit=count)}")
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.cpu_encoder", description=__doc__.splitlines()[0])
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice by default")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="ROW", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--profile", action="store_true", help="print each row's costliest operations, do not time")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    options = parser.parse_args(arguments)
    if options.image_size < 64 or options.image_size % 64:
        parser.error(f"--image-size must be a multiple of 64, got {options.image_size}")
    if options.threads:
        torch.set_num_threads(options.threads)
    names = list(NAMES) if options.only is None else [name for name in NAMES if name in options.only]

    torch.manual_seed(0)
    try:
        runs = candidates(names, options.image_size)
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        parser.error(
            f"{SAM} and {SAM2} need transformers: `pip install 'transformers>=4.56'`, or leave them out with --only"
        )
    setting: dict[str, Any] = machine() | {
        "transformers": _version("transformers"),
        "shape": [1, 3, options.image_size, options.image_size],
        "dtype": "float32",
        "repeats": options.repeats,
        "warmup": options.warmup,
    }
    if hasattr(os, "getloadavg"):
        setting["load_before"] = round(os.getloadavg()[0], 2)
    with torch.inference_mode():
        if options.profile:
            print(profile(runs))
            return
        rows = compare(runs, options.repeats, options.warmup)
    found = compared({row.name: row for row in rows}, options.image_size)
    print("  ".join(f"{key}: {value}" for key, value in setting.items()))
    print(table(rows))
    for entry in found:
        goal = "" if entry["goal"] is None else f"  goal {entry['goal']}: {'met' if entry['met'] else 'missed'}"
        print(f"{entry['what']:44} {entry['median']:7.3f}  ({entry['min']:.3f} to {entry['max']:.3f}){goal}")
    noisy = [row.name for row in rows if row.spread > NOISY_SPREAD * row.median]
    if noisy:
        print(f"NOISY: {', '.join(noisy)} spread by more than {NOISY_SPREAD:.0%}; repeat with the machine to yourself")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        report = {"machine": setting, "rows": [row._asdict() for row in rows], "compared": found, "noisy": noisy}
        options.out.write_text(json.dumps(report, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
