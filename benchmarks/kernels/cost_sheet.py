"""Bytes and operations of each operator in one encoding, bytes its kernels load and store, and the time floor.

    python -m benchmarks.kernels.cost_sheet [--variant tiny small] [--image-size 1024] [--batch 1] >FILE.md

"must" counts each input and output once, which an operator moves at least. "asked" counts the kernels' loads and stores
under the default launch settings; the excess over "must" comes from caches at best. The floor of an operator is the
larger of must / bandwidth and operations / matrix rate. The rates were measured on one H200: 4.3 TB/s, counting bytes
read and written, and 790 TFLOP/s in bfloat16.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.operator_calls import OPERATORS, cost, outputs_of, recorded_calls
from fastsam_rwkv.triton_kernels import bi_wkv, conv_norm, fused_linear, mbconv, norm_shift_mix
from fastsam_rwkv.triton_kernels.launch_config import LaunchConfig, Settings, default_settings

COPY_BYTES_S, MATMUL_FLOP_S = 4.3e12, 790e12
FLOAT, ARCH = 4, 90


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def asked(name: str, args: tuple[Any, ...], result: Any, settings: Mapping[str, Settings]) -> int:
    """Bytes of all loads and stores without padding; each input and output once if the operator has no formula."""
    output, *_ = outputs = outputs_of(result)
    item, dtype, config = output.element_size(), output.dtype, LaunchConfig(settings, ARCH)
    if name == "bi_wkv":
        k = args[2]
        B, T, C = k.shape
        _, tiles, in_group, groups = bi_wkv.choose_blocks(T, k.numel(), dtype, config)
        single = in_group == 1
        states = 6 * FLOAT * B * C * (groups + (0 if single else tiles))  # written by the summary kernel
        states += 3 * FLOAT * B * C * tiles * (groups + (0 if single else in_group))  # read by the main kernel
        return 2 * _bytes(k, args[3]) + _bytes(args[4], output) + states
    if name == "norm_shift_mix":
        x, side = args[0], norm_shift_mix.SIDE
        B, H, W, C = x.shape
        warps = norm_shift_mix.choose_blocks(C, x.numel(), dtype, config)["num_warps"]
        down, across = _blocks(H, side), _blocks(W, side)
        around = 2 * B * ((down - 1) * W + (across - 1) * H) * C * item  # tokens of neighboring programs
        vectors = B * down * across * warps * _bytes(*args[1:4])  # each warp loads all channels
        return 2 * _bytes(x) + around + vectors + _bytes(output)  # the token, and the value mixed with it
    if name == "fused_linear":
        x, weight, gate, _, residual = args
        N = len(weight)
        M = output.numel() // N
        s = fused_linear.choose_blocks(M, (N,), dtype, config)
        rows, columns = _blocks(M, s["BLOCK_M"]), _blocks(N, s["BLOCKS"] * s["BLOCK_N"])
        return columns * _bytes(x) + rows * _bytes(weight) + _bytes(gate, residual, output)
    if name == "gated_key":
        widths, M = [len(weight) for weight in args[1:]], args[0][0].numel() // args[0].shape[-1]
        s = fused_linear.choose_blocks(M, tuple(widths), dtype, config)
        columns = sum(_blocks(width, s["BLOCKS"] * s["BLOCK_N"]) for width in widths)
        return columns * _bytes(args[0][0]) + _blocks(M, s["BLOCK_M"]) * _bytes(*args[1:]) + _bytes(*outputs)
    if name == "mbconv":
        x, stride = args[0], args[11]
        C, D, N = x.shape[-1], len(args[3]), len(args[7])
        pixels, out_pixels = x.numel() // C, output.numel() // N
        expand, project = mbconv.choose_blocks(pixels, C, D, N, stride, dtype, config)
        first = _blocks(D, expand["SPAN"]) * _bytes(x) + _blocks(pixels, expand["BLOCK_M"]) * _bytes(args[3])
        columns, side = _blocks(N, project["BLOCK_N"]), project["PIXELS"]
        under = 3 * ((side - 1) * stride + 3)  # pixels of h under the filters of `side` outputs
        second = columns * out_pixels // side * D * under * item
        filters = project["num_warps"] * _bytes(args[5], args[6])  # each warp loads all channels
        second += columns * _blocks(out_pixels, project["BLOCK_M"]) * (filters + _bytes(args[7], args[9]) // columns)
        windows = 3 * (2 * side + 1) / side if stride == 2 else 1  # pixels of x for each output
        second += int((columns if C != N else 1) * out_pixels * C * windows * item)
        cast = 2 * _bytes(args[5], args[6], args[7]) if config.arch >= 80 and dtype == torch.bfloat16 else 0
        return first + pixels * D * item + second + cast + _bytes(output)
    if name == "conv_norm":
        x, weight, _, in_norm, _, add, norm = args[:7]
        N, C, size, _ = weight.shape
        M = output.numel() // N
        if conv_norm.is_dense(weight, (args[2], in_norm, add), norm, args[9]):
            return _bytes(x, weight) + (1 if norm is None else 3) * _bytes(output)  # cuDNN, counted as reading x once
        s = conv_norm.choose_blocks(C, N, norm is not None, dtype, config)
        total = _blocks(N, s["BLOCK_N"]) * M * size * size * C * item + _blocks(M, s["BLOCK_M"]) * _bytes(weight)
        return total + (2 * _bytes(x) if in_norm is not None else 0) + _bytes(add, output)
    if name == "stem":  # its second convolution is the kernel of conv_norm
        pixels, weight1 = args[0], args[3]
        taken = output.numel() // len(weight1) * 27 * pixels.element_size() + _bytes(weight1, output)
        second = (output, args[7], args[8], None, None, None, None, None, 1, False)
        return taken + asked("conv_norm", second, output, settings)
    if name == "upscale":  # four programs read x, one for each output pixel
        x, weight = args[:2]
        rows = _blocks(x.numel() // x.shape[-1], config.settings_for("upscale", dtype)["BLOCK_M"])
        return 4 * _bytes(x) + rows * _bytes(weight) + _bytes(output)
    return cost(name, args, result)[0]


def sheet(variant: str, size: int, batch: int) -> dict[str, dict[str, Any]]:
    """Sum the calls of each operator, and the batched projections of cuBLAS."""
    settings = default_settings()
    rows: dict[str, dict[str, Any]] = defaultdict(lambda: defaultdict(int))

    def add(name: str, times: int, must: int, asked: int, flops: int, rate: float = MATMUL_FLOP_S) -> None:
        floor = 1e6 * times * max(must / COPY_BYTES_S, flops / rate)
        counts = {"calls": times, "must": times * must, "asked": times * asked, "flops": times * flops}
        for key, value in (counts | {"floor_us": floor}).items():
            rows[name][key] += value

    for name, _, args, times in recorded_calls(variant, size, batch, torch.device("meta")):
        output = OPERATORS[name].kernel(*args)
        moved, flops = cost(name, args, output)
        if name == "bi_wkv":
            B, T, C = args[2].shape  # in float32, outside the matrix units
            add(name, times, moved, asked(name, args, output, settings), 30 * output.numel(), float("inf"))
            moved, flops = (6 * B * T * C + 3 * C * C) * output.element_size(), 6 * B * T * C * C
            add("projections (cuBLAS)", times, moved, moved, flops)
        else:
            add(name, times, moved, asked(name, args, output, settings), flops)
    return rows


def table(variant: str, size: int, batch: int) -> str:
    """Format the sheet in Markdown."""
    rows = sheet(variant, size, batch)
    rows["**all**"] = {key: sum(row[key] for row in rows.values()) for key in rows["stem"]}
    lines = [
        f"## {variant}, {size} x {size}, batch {batch}, bfloat16",
        "",
        "| operator | calls | GFLOP | must, MB | asked, MB | asked / must | floor, us |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['calls']} | {row['flops'] / 1e9:.1f} | {row['must'] / 1e6:.1f} | "
            f"{row['asked'] / 1e6:.1f} | {row['asked'] / row['must']:.1f} | {row['floor_us']:.0f} |"
        )
    whole = 1e6 * row["flops"] / MATMUL_FLOP_S
    lines += ["", f"All operations at the matrix rate, without moving anything: {whole:.0f} us.", ""]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", nargs="+", default=["tiny", "small"], choices=("tiny", "small", "base", "large"))
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args(arguments)
    text = "\n".join(table(variant, options.image_size, options.batch) for variant in options.variant)
    note = (
        "Counted, not measured: `python -m benchmarks.kernels.cost_sheet`. must: each input and output of an operator "
        "once; asked: all loads and stores of its kernels; floor: at 4.3 TB/s and 790 TFLOP/s (one H200).\n\n"
    )
    print(note + text)


if __name__ == "__main__":
    main()
