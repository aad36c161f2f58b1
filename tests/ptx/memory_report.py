"""Memory accesses of the compiled kernels: bank conflicts and scattered addresses, counted without a GPU.

    python -m tests.ptx.memory_report [--variant small] [--image-size 1024] >FILE.md

The emulator runs a few blocks, compiled for sm_90, from the middle of every launch of one encoding. Counts are for all
blocks, in thousands.

instructions   of warps, in PTX; ptxas makes somewhat fewer
shared         passes over all 32 banks for accesses to shared memory, with asynchronous copies and without the reads of
               tensor cores; "least" without bank conflicts
read, written  sectors of 32 bytes that warps request from global memory, with hits in L1; "least" for the bytes used

The counts give no time; a count far above its least is worth a look.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from benchmarks.kernels.operator_calls import LAUNCHERS, recorded_calls
from fastsam_rwkv.triton_kernels.launch_config import LaunchConfig, default_settings
from tests.ptx.emulator import Array, Blocks, Instruction, emulated, run

ARCH = 90
BLOCKS = 4  # of every launch
SECTOR, BANKS = 32, 32
COLUMNS = ("instructions", "shared", "least shared", "read", "least read", "written", "least written")


class CountedBlocks(Blocks):
    """Blocks that count instructions and memory accesses."""

    def __init__(self, *args: Any, counts: Counter[str]) -> None:
        super().__init__(*args)
        self.counts = counts

    def _step(self, i: Instruction, mask: Array | None) -> Array | None:
        self.instruction = i
        self.counts["instructions"] += self.n // 32 if mask is None else int(mask.reshape(-1, 32).any(1).sum())
        return super()._step(i, mask)

    def places(self, space: str, operand: tuple[str, int], width: int, mask: Array | None) -> tuple[Array, Array]:
        threads, places = super().places(space, operand, width, mask)
        warp, lane, first = threads // 32, threads % 32, places[:, 0]
        if space == "global":
            column = "written" if self.instruction.op[0] == "st" else "read"
            ends = np.concatenate([first // SECTOR, (first + width - 1) // SECTOR])
            self.counts[column] += len(np.unique(np.stack([np.tile(warp, 2), ends]), axis=1).T)
            wanted = len(np.unique(np.stack([warp, first]), axis=1).T) * width
            self.counts[f"least {column}"] += -(-wanted // SECTOR)
        else:
            matrices = _matrices(self.instruction)
            used = lane < 8 * matrices if matrices else np.full(len(lane), True)
            lanes = 128 // max(width, 4)  # served in one pass at most
            passes, least = _passes((warp * 32 + lane)[used] // lanes, first[used], width)
            self.counts["shared"] += passes
            self.counts["least shared"] += least
        return threads, places


def _matrices(i: Instruction) -> int:
    """Return the number of 8 x 8 matrices that ldmatrix and stmatrix move; a thread holds the address of a row."""
    if i.op[0] not in ("ldmatrix", "stmatrix"):
        return 0
    return int(next(part for part in i.op if part in ("x1", "x2", "x4"))[1:])


def _passes(group: Array, place: Array, width: int) -> tuple[int, int]:
    """Return the passes of groups of threads, and the least: words of one bank take one pass each."""
    words = place[:, None] // 4 + np.arange(max(1, width // 4))
    group, word = np.unique(np.stack([np.broadcast_to(group[:, None], words.shape).ravel(), words.ravel()]), axis=1)
    _, numbered = np.unique(group, return_inverse=True)
    in_bank = np.zeros((numbered.max() + 1, BANKS), np.int64)
    np.add.at(in_bank, (numbered, word % BANKS), 1)
    return int(in_bank.max(1).sum()), int((-(-in_bank.sum(1) // BANKS)).sum())


def _real(argument: Any) -> Any:
    """Replace a meta tensor by one with memory; its values do not matter."""
    if not isinstance(argument, Tensor):
        return argument
    real = torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype)
    return real.fill_(0.5 if argument.is_floating_point() else 1)


def counted(name: str, args: Sequence[Any], arch: int, blocks: int = BLOCKS) -> list[tuple[str, int, Counter[str]]]:
    """Run one call; return name, number of blocks and counts of each kernel it launches."""
    found = []

    def launch(kernel_name: str, kernel: Any, arguments: list[Any], grid: Sequence[int]) -> None:
        total = int(np.prod(grid))
        few = min(blocks, total)
        first = (total - few) // 2
        counts: Counter[str] = Counter()
        kind = partial(CountedBlocks, counts=counts)
        run(kernel.asm["ptx"], arguments, grid, kernel.metadata.shared, range(first, first + few), kind)
        of_all = Counter({column: round(number * total / few) for column, number in counts.items()})
        found.append((kernel_name.strip("_"), total, of_all))

    with emulated(arch, launch):
        LAUNCHERS[name](*args, config=LaunchConfig(default_settings(), arch))
    return found


def report(variant: str, image_size: int) -> str:
    rows = []
    for name, shapes, args, times in recorded_calls(variant, image_size, 1, torch.device("meta")):
        for kernel, blocks, counts in counted(name, [_real(a) for a in args], ARCH):
            rows.append((kernel, shapes, times, blocks, [counts[column] / 1e3 for column in COLUMNS]))
    header = ["kernel", "shapes", "calls", "blocks", *COLUMNS]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for kernel, shapes, times, blocks, numbers in rows:
        lines.append(f"| {kernel} | {shapes} | {times} | {blocks} | " + " | ".join(f"{x:.0f}" for x in numbers) + " |")
    totals = [sum(row[2] * row[4][j] for row in rows) for j in range(len(COLUMNS))]
    lines.append("| all calls | | | | " + " | ".join(f"{x:.0f}" for x in totals) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="small")
    parser.add_argument("--image-size", type=int, default=1024)
    args = parser.parse_args()
    print(
        f"Model {args.variant}, {args.image_size} x {args.image_size} pixels, batch 1, bfloat16, compiled for "
        f"sm_{ARCH} by Triton {triton.__version__}; not run on a GPU. Counts are in thousands, from {BLOCKS} blocks of "
        f"each launch: see `tests/ptx/memory_report.py`.\n\n{report(args.variant, args.image_size)}"
    )


if __name__ == "__main__":
    main()
