"""What each operator must move and compute in one encoding, what its kernels ask of the caches, and the floor.

    python -m benchmarks.kernels.cost_sheet [--variant tiny small] [--image-size 1024] [--batch 1] [--output FILE.md]

"must" counts every input and output once: what has to come from memory if each operator stands alone. "asked" counts
what the kernels' loads and stores add up to under the default launch settings: what lies above "must" comes from the
caches at best. The floor of an operator is the larger of must / bandwidth and operations / matrix rate, with the rates
measured on one H200: 4.3 TB/s, counting bytes read and written, and 790 TFLOP/s in bfloat16.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.operator_calls import cost, recorded_calls
from fastsam_rwkv.triton_kernels.bi_wkv import settings_that_fit
from fastsam_rwkv.triton_kernels.conv_norm import for_wide_rows, is_dense
from fastsam_rwkv.triton_kernels.fused_linear import blocks_side_by_side, for_few_rows
from fastsam_rwkv.triton_kernels.launch_config import LARGE, block_that_divides, shipped_settings
from fastsam_rwkv.triton_kernels.mbconv import for_output, for_wide_input, span_of_columns
from fastsam_rwkv.triton_kernels.norm_shift_mix import SIDE, for_many_channels

COPY_BYTES_S, MATMUL_FLOP_S = 4.3e12, 790e12
FLOAT = 4


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def asked(name: str, args: tuple[Any, ...], output: Tensor, settings: dict[str, dict[str, int]]) -> int:
    """Bytes that the kernels' loads and stores add up to, padding left out."""
    item = output.element_size()
    if name == "bi_wkv":
        k, usual = args[2], settings["bi_wkv"]
        B, T, C = k.shape
        s = settings_that_fit(T, settings["bi_wkv.large"], usual) if k.numel() >= LARGE else usual
        tiles = _blocks(T, s["SEGMENTS"] * s["LENGTH"])
        in_group = 1 << (_blocks(tiles, s["BLOCK_N"]) - 1).bit_length()
        groups, single = _blocks(tiles, in_group), in_group == 1
        states = 6 * FLOAT * B * C * (groups + (0 if single else tiles))  # written by the summary kernel
        states += 3 * FLOAT * B * C * tiles * (groups + (0 if single else in_group))  # read by the main one
        return 2 * _bytes(k, args[3]) + _bytes(args[4], output) + states
    if name == "norm_shift_mix":
        x = args[0]
        B, H, W, C = x.shape
        s = for_many_channels(C, settings["norm_shift_mix.large" if x.numel() >= LARGE else "norm_shift_mix"])
        down, across = _blocks(H, SIDE), _blocks(W, SIDE)
        around = 2 * B * ((down - 1) * W + (across - 1) * H) * C * item  # what a program reads of the next ones' tokens
        vectors = B * down * across * s["num_warps"] * _bytes(*args[1:4])  # every warp has all channels of its tokens
        return 2 * _bytes(x) + around + vectors + _bytes(output)  # the token, and the value mixed with it
    if name == "fused_linear":
        x, weight, _, gate_x, gate_weight, _, residual = (*args, *[None] * 7)[:7]
        N = len(weight)
        M = output.numel() // N
        s = for_few_rows(M, N, settings["fused_linear.large" if output.numel() >= LARGE else "fused_linear"])
        BLOCK_M, BLOCK_N = s["BLOCK_M"], block_that_divides(N, s["BLOCK_N"])
        side_by_side = blocks_side_by_side(M, N, BLOCK_M, BLOCK_N, s["BLOCKS"], torch.device("cpu"))
        rows, columns = _blocks(M, BLOCK_M), _blocks(N, side_by_side * BLOCK_N)
        again = 2 * _bytes(output) if gate_x is not None and side_by_side > 1 else 0  # written by a launch of its own
        return columns * _bytes(x, gate_x) + rows * _bytes(weight, gate_weight) + _bytes(residual, output) + again
    if name == "mbconv":
        x, stride = args[0], args[11]
        expand, project = settings["mbconv_expand"], settings["mbconv_project" if stride == 1 else "mbconv_halve"]
        C, D, N = x.shape[-1], len(args[3]), len(args[7])
        expand = for_wide_input(C, expand)
        pixels = x.numel() // C
        out_pixels = output.numel() // N
        blocks, spans = _blocks(pixels, expand["BLOCK_M"]), _blocks(D, span_of_columns(pixels, D, expand))
        first = spans * _bytes(x) + blocks * _bytes(args[3]) + pixels * D * item
        project = for_output(N, stride, project)
        columns, side = _blocks(N, project["BLOCK_N"]), project["PIXELS"]
        under = 3 * ((side - 1) * stride + 3)  # pixels of h under the filters of `side` outputs
        second = columns * out_pixels // side * D * under * item
        filters = project["num_warps"] * _bytes(args[5], args[6])  # every warp has all channels of its pixels
        second += columns * _blocks(out_pixels, project["BLOCK_M"]) * (filters + _bytes(args[7], args[9]) // columns)
        second += (columns if C != N else 1) * out_pixels * C * (9 if stride == 2 else 1) * item
        return first + second + _bytes(output)
    if name == "conv_norm":
        s = settings["conv_norm"]
        x, weight, _, in_norm, _, add, norm, _, residual = args[:9]
        N, C, size, _ = weight.shape
        M = output.numel() // N
        if is_dense(weight, (args[2], in_norm, add, residual), norm, args[10]):
            return _bytes(x, weight) + (1 if norm is None else 3) * _bytes(output)  # cuDNN's, counted as reading x once
        wide = norm is not None and s["BLOCK_N"] < N
        block_n = 1 << (N - 1).bit_length() if wide else s["BLOCK_N"]
        block_m = (for_wide_rows(s) if wide else s)["BLOCK_M"]
        total = _blocks(N, block_n) * M * size * size * C * item + _blocks(M, block_m) * _bytes(weight)
        return total + (2 * _bytes(x) if in_norm is not None else 0) + _bytes(add, residual, output)
    if name == "stem":  # its second convolution is conv_norm's kernel, on a map like its output
        pixels, weight1 = args[0], args[3]
        taken = output.numel() // len(weight1) * 27 * pixels.element_size() + _bytes(weight1, output)
        second = (output, args[7], args[8], None, None, None, None, None, None, 1, False)
        return taken + asked("conv_norm", second, output, settings)
    if name == "upscale":  # four programs read x, one for each pixel that comes of one
        x, weight = args[:2]
        s = settings["upscale"]
        return 4 * _bytes(x) + _blocks(x.numel() // x.shape[-1], s["BLOCK_M"]) * _bytes(weight) + _bytes(output)
    raise ValueError(f"no formula for {name!r}")


def sheet(variant: str, size: int, batch: int) -> list[dict[str, Any]]:
    """A row for every operator with its calls added up, and the batched projections, which are cuBLAS's."""
    settings = shipped_settings()["default"]
    rows: dict[str, dict[str, Any]] = defaultdict(lambda: defaultdict(int))
    for name, args, output, times in _calls(variant, size, batch):
        row = rows[name]
        moved, flops = cost(name, args, output)
        if name == "bi_wkv":
            flops = 30 * output.numel()  # in float32, outside the matrix units
        row["calls"] += times
        row["must"] += times * moved
        row["asked"] += times * asked(name, args, output, settings)
        row["flops"] += times * flops
        rate = float("inf") if name == "bi_wkv" else MATMUL_FLOP_S
        row["floor_us"] += 1e6 * times * max(moved / COPY_BYTES_S, flops / rate)
        if name == "bi_wkv":
            B, T, C = args[2].shape
            moved, flops = (6 * B * T * C + 3 * C * C) * output.element_size(), 6 * B * T * C * C
            row = rows["projections (cuBLAS)"]
            row["calls"] += times
            row["must"] += times * moved
            row["asked"] += times * moved
            row["flops"] += times * flops
            row["floor_us"] += 1e6 * times * max(moved / COPY_BYTES_S, flops / MATMUL_FLOP_S)
    return [{"operator": name, **row} for name, row in rows.items()]


def _calls(variant: str, size: int, batch: int) -> list[tuple[str, tuple[Any, ...], Tensor, int]]:
    return [
        (name, args, getattr(torch.ops.fastsam_rwkv, name)(*args), times)
        for name, _, args, times in recorded_calls(variant, size, batch, torch.device("meta"))
    ]


def table(variant: str, size: int, batch: int) -> str:
    rows = sheet(variant, size, batch)
    total = {key: sum(row[key] for row in rows) for key in ("calls", "must", "asked", "flops", "floor_us")}
    lines = [
        f"## {variant}, {size} x {size}, batch {batch}, bfloat16",
        "",
        "| operator | calls | GFLOP | must, MB | asked, MB | asked / must | floor, us |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in [*rows, {"operator": "**all**", **total}]:
        lines.append(
            f"| {row['operator']} | {row['calls']} | {row['flops'] / 1e9:.1f} | {row['must'] / 1e6:.1f} | "
            f"{row['asked'] / 1e6:.1f} | {row['asked'] / row['must']:.1f} | {row['floor_us']:.0f} |"
        )
    whole = 1e6 * total["flops"] / MATMUL_FLOP_S
    lines += ["", f"All operations at the matrix rate, with nothing moved: {whole:.0f} us.", ""]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", nargs="+", default=["tiny", "small"], choices=("tiny", "small", "base", "large"))
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    text = "\n".join(table(variant, options.image_size, options.batch) for variant in options.variant)
    note = (
        "Counted, not measured: `python -m benchmarks.kernels.cost_sheet`. "
        "must: every input and output of an operator once; "
        "asked: what the kernels' loads and stores add up to; floor: at 4.3 TB/s and 790 TFLOP/s (one H200).\n\n"
    )
    if options.output:
        options.output.write_text(note + text)
    else:
        print(note + text)


if __name__ == "__main__":
    main()
