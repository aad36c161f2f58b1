"""Encoder and decoder of the bundled model in bfloat16 beside float32, on a CPU.

    python -m benchmarks.speed.cpu_dtype [--image-size 1024] [--prompts 1 32]

It pays on processors with instructions for it: `amx_bf16` or `avx512_bf16` in `lscpu`, for which `dtype="auto"` looks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.speed.timing import compare, cpu_parser, ratio, report
from fastsam_rwkv import RWKVSAM
from fastsam_rwkv.checkpoint import multiplies_bfloat16


def main(arguments: list[str] | None = None) -> None:
    parser = cpu_parser(__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 32])
    options = parser.parse_args(arguments)
    side = options.image_size
    runs: dict[str, Callable[[], object]] = {}
    pixels = torch.randn(1, 3, side, side)
    corners = torch.rand(max(options.prompts), 2) * side / 2
    boxes = torch.cat([corners, corners + side / 3], dim=1)
    pairs = []
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            model, name = RWKVSAM.from_pretrained(dtype=dtype), str(dtype).removeprefix("torch.")
            embedding = model.encode_image(pixels)
            runs[f"encoder, {name}"] = partial(model.encode_image, pixels)
            for n in options.prompts:
                runs[f"{n} prompts, {name}"] = partial(model.decode_masks, embedding, boxes=boxes[:n])
        for what in ("encoder", *(f"{n} prompts" for n in options.prompts)):
            pairs.append((f"{what}, bfloat16", f"{what}, float32"))
        rows = compare(runs, options.repeats)
    found = [ratio(rows, *pair) for pair in pairs]
    has = multiplies_bfloat16(torch.device("cpu"))
    report(options, rows, found, dtype="float32 and bfloat16", has_instructions=has)


if __name__ == "__main__":
    main()
