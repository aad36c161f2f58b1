"""What one more prompt on an embedded image costs, beside a decoder that works on the image again for every prompt.

    python -m benchmarks.speed.prompt_cost [--variant tiny] [--image-size 1024] [--prompts 1 8]

Multiply-accumulates are counted over matrix products and convolutions; the published decoder spends 12.0e9 a prompt at
1024 pixels, 7.8e9 of them on the image alone. Random weights, float32 on a CPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.timing import compare, machine, ratios, table
from fastsam_rwkv import RWKVSAM, ImageEmbedding, ModelConfig

PUBLISHED_GMACS = 12.0  # at 1024 pixels
GOAL = 0.4


def count_gmacs(run: Callable[[], object]) -> float:
    """Multiply-accumulates of matrix products and convolutions, in units of 1e9."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2e9


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.prompt_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="tiny", choices=["tiny", "small", "base", "large"])
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    options = parser.parse_args(arguments)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)  # now, not when all is measured
    torch.set_num_threads(options.threads)
    side = options.image_size
    model = RWKVSAM(ModelConfig.from_name(options.variant, image_size=side)).eval()

    with torch.inference_mode():
        stage1, stage2, final = model.backbone(torch.randn(1, side, side, 3))
        image_embed = model.neck(final)

        def embed() -> ImageEmbedding:
            """The image's share of the decoder; the encoder's maps are given."""
            grid = model.prompt_encoder.grid(side // 16, side // 16)
            return ImageEmbedding(image_embed, grid, model.mask_decoder.project_image(stage1, stage2), (side, side))

        kept = embed()

        def decode(embedding: ImageEmbedding, count: int) -> object:
            return model.decode_masks(embedding, torch.full((count, 1, 2), side / 2), torch.ones(count, 1).long())

        first, second = (count_gmacs(lambda n=n: decode(kept, n)) for n in (1, 2))
        image_share = count_gmacs(embed)
        runs: dict[str, Callable[[], object]] = {}
        for n in options.prompts:
            runs[f"{n} prompts, image done once"] = lambda n=n: decode(kept, n)
            runs[f"{n} prompts, image done for each"] = lambda n=n: [decode(embed(), 1) for _ in range(n)]
        rows = {row.name: row for row in compare(runs, options.repeats)}

    share = (second - first) / PUBLISHED_GMACS * (1024 / side) ** 2
    info = machine() | {"variant": options.variant, "image_size": side, "dtype": "float32"}
    print(", ".join(f"{key} {value}" for key, value in info.items()))
    print(f"one more prompt: {second - first:.2f} GMAC, {share:.2f} of the published (goal: at most {GOAL})")
    print(f"the first prompt: {first:.2f} GMAC; the image's share, once: {image_share:.2f} GMAC")
    print(table(list(rows.values())))
    quotients = {}
    for n in options.prompts:
        once, each = (rows[f"{n} prompts, image done {how}"] for how in ("once", "for each"))
        quotients[str(n)] = median, low, high = ratios(each, once)
        print(f"{n} prompts: {median:.2f}x faster with the image done once ({low:.2f} to {high:.2f} over the rounds)")
    if options.out:
        result = {"machine": info, "gmacs_one_more_prompt": second - first, "gmacs_first_prompt": first}
        result |= {"gmacs_image_share": image_share, "share_of_published": share, "speedup": quotients}
        result["rows"] = [row._asdict() for row in rows.values()]
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
