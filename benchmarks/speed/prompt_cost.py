"""Cost of one more prompt on an embedded image, beside a decoder that repeats its image part for every prompt.

    python -m benchmarks.speed.prompt_cost [--variant tiny] [--image-size 1024] [--prompts 1 8]

Multiply-accumulates of matrix products and convolutions are counted. The published decoder spends 12.0e9 per prompt at
1024 pixels, 7.8e9 of them on the image alone. Random weights, float32 on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.timing import compare, cpu_parser, ratio, report
from fastsam_rwkv import RWKVSAM, ImageEmbedding, ModelConfig

PUBLISHED_GMACS = 12.0  # at 1024 pixels
GOAL = 0.4  # largest share of the published


def count_gmacs(run: Callable[[], object]) -> float:
    """Count the multiply-accumulates of matrix products and convolutions, in units of 1e9."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2e9


def main(arguments: list[str] | None = None) -> None:
    parser = cpu_parser(__doc__)
    parser.add_argument("--variant", default="tiny", choices=["tiny", "small", "base", "large"])
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args(arguments)
    side = options.image_size
    model = RWKVSAM(ModelConfig.from_name(options.variant, image_size=side)).eval()

    with torch.inference_mode():
        stage1, stage2, final = model.backbone(torch.randn(1, side, side, 3))
        image_embed = model.neck(final)

        def embed() -> ImageEmbedding:
            """Compute the image part of the decoder from the encoder's maps."""
            grid = model.prompt_encoder.grid(side // 16, side // 16)
            return ImageEmbedding(image_embed, grid, model.mask_decoder.project_image(stage1, stage2), (side, side))

        kept = embed()

        def decode(embedding: ImageEmbedding, count: int) -> object:
            return model.decode_masks(embedding, torch.full((count, 1, 2), side / 2), torch.ones(count, 1).long())

        first, second = (count_gmacs(partial(decode, kept, n)) for n in (1, 2))
        image_part = count_gmacs(embed)
        runs: dict[str, Callable[[], object]] = {}
        for n in options.prompts:
            runs[f"{n} prompts, image once"] = partial(decode, kept, n)
            runs[f"{n} prompts, image each time"] = lambda n=n: [decode(embed(), 1) for _ in range(n)]
        rows = compare(runs, options.repeats)

    share = (second - first) / PUBLISHED_GMACS * (1024 / side) ** 2
    counts = {"gmacs_one_more_prompt": second - first, "gmacs_first_prompt": first, "gmacs_image_part": image_part}
    found = [ratio(rows, f"{n} prompts, image each time", f"{n} prompts, image once") for n in options.prompts]
    report(options, rows, found, variant=options.variant, **counts, share_of_published=share, goal=f"<= {GOAL}")


if __name__ == "__main__":
    main()
