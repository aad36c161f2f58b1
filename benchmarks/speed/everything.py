"""Time and memory of everything in an image, beside the same steps one by one at the size of the image.

    python -m benchmarks.speed.everything [--image FILE] [--image-size 1024] [--points-per-side 32]

Each run has a process of its own. "step by step" decodes click by click and resizes every mask; with "image each time"
the decoder also repeats its image part for every click, as the published decoder does. It runs on a grid of
`--reference-side` clicks per side, and its time is multiplied up to the whole grid. All run in float32 except "dtype
auto", the command's default. Memory is the largest resident size
less that after loading the model and the image. Random pixels tell nothing about masks: pass a photograph.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.masks.step_by_step import generate
from fastsam_rwkv import RWKVSAM, AutomaticMaskGenerator, ImageEmbedding, ModelConfig
from fastsam_rwkv.predictor.image_io import resize_image

COFFEE = Path(__file__).parents[2] / "examples" / "coffee.jpg"
KINDS = ("generator", "generator, dtype auto", "step by step", "step by step, image each time")


def resized(file: Path, size: tuple[int, int]) -> np.ndarray:
    """Return a photograph as `[H, W, 3]` uint8 of `size` (W, H)."""
    return np.asarray(Image.open(file).convert("RGB").resize(size, Image.Resampling.LANCZOS))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run one kind and return its figures."""
    torch.set_num_threads(args.threads)
    bundled = RWKVSAM.from_pretrained(dtype="auto" if "auto" in args.kind else "float32")
    model = RWKVSAM(ModelConfig(**{**bundled.config.__dict__, "image_size": args.image_size})).eval().to(bundled.dtype)
    model.load_state_dict(bundled.state_dict())
    width, height = (int(side) for side in args.photo_size.split("x"))
    image = resized(args.image, (width, height))
    before = _resident()
    thresholds = model.config.pred_iou_thresh, model.config.stability_score_thresh
    with torch.inference_mode():
        pixels, frame = resize_image(image, args.image_size)
        tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        model.encode_image(tensor, frame.input_size)  # the first call takes longer
        started = time.perf_counter()
        model.encode_image(tensor, frame.input_size)
        encoding = time.perf_counter() - started
        blank = torch.zeros(1, args.image_size, args.image_size, 3, dtype=model.dtype)
        stages = model.backbone(blank, frame.input_size)[:2]

    def again() -> ImageEmbedding:
        embedding = kept[0]
        grid = model.prompt_encoder.grid(*embedding.image_pe.shape[:2])
        maps = model.mask_decoder.project_image(*stages)
        return ImageEmbedding(embedding.image_embed, grid, maps, embedding.input_size)

    side, started = args.points_per_side, time.perf_counter()
    if args.kind.startswith("generator"):
        mode = "uncompressed_rle"
        masks = len(AutomaticMaskGenerator(model, side, output_mode=mode).generate(image))
        seconds = time.perf_counter() - started
    else:
        side = args.reference_side
        with torch.inference_mode():
            kept = [model.encode_image(tensor, frame.input_size)]
        masks = len(generate(model, image, side, *thresholds, again if "each" in args.kind else None)[0])
        seconds = encoding + (time.perf_counter() - started - encoding) * (args.points_per_side / side) ** 2
    return {
        "kind": args.kind,
        "dtype": str(model.dtype).removeprefix("torch."),
        "clicks": side * side,
        "masks": masks,
        "seconds": seconds,
        "seconds_after_encoding": seconds - encoding,
        "extra_mib": (_resident() - before) / 2**20,
    }


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, default=COFFEE)
    parser.add_argument("--photo-size", default="1024x1024", metavar="WxH", help="the photograph is resized to this")
    parser.add_argument("--image-size", type=int, default=512, help="side of the model input")
    parser.add_argument("--points-per-side", type=int, default=32)
    parser.add_argument("--reference-side", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        print(json.dumps(measure(args)))
        return
    rows = []
    for kind in args.kinds:
        command = [sys.executable, "-m", "benchmarks.speed.everything", *sys.argv[1:], "--kind", kind]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        row = rows[-1]
        print(
            f"{kind:30} {row['masks']:4} masks, {row['seconds_after_encoding']:7.1f} s after encoding, "
            f"{row['extra_mib']:6.0f} MiB more",
            flush=True,
        )
    times = [row["seconds_after_encoding"] for row in rows]
    for row, seconds in zip(rows[1:], times[1:], strict=True):
        print(f"{row['kind']} / generator: {seconds / times[0]:.2f}")
    about = {name: str(value) for name, value in vars(args).items() if name not in ("out", "kind", "image")}
    about |= {"torch": torch.__version__, "python": sys.version.split()[0], "image": args.image.name}
    print(json.dumps(about))
    if args.out:
        args.out.write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
