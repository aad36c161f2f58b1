"""Count what the operators of a model ask of a GPU, from compiled code, to compare two versions of the kernels.

    python -m benchmarks.kernels.kernel_summary [--arch 90] [--variant small] [--size 1024]

Each operator's calls of an encoding, for one image and for 16, and of a prompt, in bfloat16 under the default settings:
launches of our kernels, bytes that their loads and stores ask for, and of each kernel registers, warps that fit an SM
and instructions. Launches of cuBLAS, cuDNN and PyTorch are not counted.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch

from benchmarks.kernels.compile_report import REGISTERS, SHARED_LIMIT, Kernel, _inspect, compiling_for, disassemble
from benchmarks.kernels.cost_sheet import asked
from benchmarks.kernels.operator_calls import LAUNCHERS, OPERATORS, recorded_calls
from fastsam_rwkv.triton_kernels.launch_config import LaunchConfig, default_settings

MOST_WARPS, MOST_BLOCKS = 64, 32  # of an SM: CUDA C++ Programming Guide, table of technical specifications, 9.0
RESERVED = 1024  # bytes of shared memory that a block takes beside its own


def warps_of_an_sm(kernel: Kernel) -> int:
    """Warps that fit an SM at once, by registers, shared memory, blocks and warps."""
    by_registers = REGISTERS // (32 * kernel.num_warps * -(-kernel.registers // 8) * 8)
    by_shared = SHARED_LIMIT[kernel.arch] // (kernel.shared + RESERVED)
    return kernel.num_warps * min(by_registers, by_shared, MOST_BLOCKS, MOST_WARPS // kernel.num_warps)


def rows(variant: str, size: int, batch: int, arch: int, prompts: int) -> list[list[str]]:
    """Return a row for each kernel of each operator: of an encoding, or of one prompt if `prompts`."""
    settings = default_settings()
    config = LaunchConfig(settings, arch)
    calls = recorded_calls(variant, size, batch, torch.device("meta"), prompts=prompts)
    if prompts:
        encoding = {(name, shapes): times for name, shapes, _, times in recorded_calls(
            variant, size, batch, torch.device("meta"))}  # fmt: skip
        left = ((n, s, args, times - encoding.get((n, s), 0)) for n, s, args, times in calls)
        calls = [call for call in left if call[3]]
    launches: dict[tuple[str, str], int] = defaultdict(int)
    found: dict[tuple[str, str], dict[str, Kernel]] = defaultdict(dict)
    moved: dict[str, int] = defaultdict(int)
    for operator, _, args, times in calls:
        with compiling_for(arch) as kernels:
            LAUNCHERS[operator](*args, config=config)
        moved[operator] += times * asked(operator, args, OPERATORS[operator].kernel(*args), settings)
        for name, kernel in kernels:
            launches[operator, name] += times
            if kernel.hash not in found[operator, name]:
                (text,) = disassemble([kernel.asm["cubin"]], arch)
                found[operator, name][kernel.hash] = _inspect(name, kernel, arch, "bfloat16", "default", text)
    table, seen = [], set()
    for (operator, name), several in sorted(found.items()):
        kernels_of_it = list(several.values())
        first = operator not in seen
        seen.add(operator)
        table.append([
            operator if first else "", name.strip("_"), str(launches[operator, name]),
            f"{moved[operator] / 1e6:,.0f}" if first else "",
            _span(kernel.registers for kernel in kernels_of_it), _span(map(warps_of_an_sm, kernels_of_it)),
            _span(kernel.counts["instructions"] for kernel in kernels_of_it),
            _span(kernel.counts["longest loop"] for kernel in kernels_of_it),
        ])  # fmt: skip
    return [*table, ["**all**", "", str(sum(launches.values())), f"{sum(moved.values()) / 1e6:,.0f}", *[""] * 4]]


def _span(values: Iterable[int]) -> str:
    numbers = sorted(values)
    return f"{numbers[0]:,}" if numbers[0] == numbers[-1] else f"{numbers[0]:,} to {numbers[-1]:,}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--variant", default="small")
    parser.add_argument("--size", type=int, default=1024)
    options = parser.parse_args(arguments)
    head = ["operator", "kernel", "launches", "asked, MB", "registers", "warps an SM", "instructions", "longest loop"]
    for title, batch, prompts in (("encoding, 1 image", 1, 0), ("encoding, 16 images", 16, 0), ("one prompt", 1, 1)):
        print(f"## {options.variant}, {options.size} x {options.size}, {title}, bfloat16, sm_{options.arch}\n")
        print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
        for row in rows(options.variant, options.size, batch, options.arch, prompts):
            print(f"| {' | '.join(row)} |")
        print()


if __name__ == "__main__":
    main()
