"""Compile every kernel ahead of time and report registers, spills, shared memory and instructions, without a GPU.

    python -m benchmarks.kernels.compile_report [--arch 90 ...] [--dtype bfloat16 ...] >FILE.md

Launchers get the calls of the model on meta tensors, under every settings file that ships; a device's file serves its
architecture only. Kernels are compiled as for a launch, but not launched. The report fails if a kernel does not
compile, spills registers, or needs more shared memory or registers than a block can have.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import re
import struct
import subprocess
import sys
import tempfile
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.kernels.operator_calls import LAUNCHERS, OPERATORS, mask_edges_calls, recorded_calls
from fastsam_rwkv.triton_kernels.launch_config import LaunchConfig, default_settings, shipped_settings

# What is recorded: variant, image size, batch, options of the decoder, operators (all if empty)
BUT_THE_SCAN = tuple(OPERATORS.keys() - {"bi_wkv"})  # which takes long, and differs in the width only
LINEAR = ("fused_linear", "gated_key")
RECORDED: list[tuple[str, int, int, dict[str, int], tuple[str, ...]]] = [
    ("tiny", 1024, 1, {"prompts": 1}, ()),
    ("small", 1024, 1, {"prompts": 64}, ()),  # keys are not split
    ("base", 1024, 1, {"prompts": 1, "points": 14}, BUT_THE_SCAN),  # blocks of 64 tokens
    ("large", 1024, 1, {}, BUT_THE_SCAN),
    ("small", 1024, 16, {}, ("bi_wkv", "norm_shift_mix", *LINEAR)),  # `.large` settings
    *((variant, 1024, 16, {}, LINEAR) for variant in ("tiny", "base", "large")),
    ("tiny", 512, 1, {}, LINEAR),  # few rows
    ("large", 2048, 1, {}, ("bi_wkv",)),  # groups of several tiles
]
SMS = (1, 1 << 20)  # many waves, and less than one: both forms of `fused_linear` for large outputs
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Shared memory that one block may use, in bytes: CUDA C++ Programming Guide, table of technical specifications
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
REGISTERS = 65536  # of an SM: same table
INSTRUCTIONS = {
    "tensor core": r"\b(HMMA|HGMMA|UTC\w*MMA|QMMA)\b",
    "16-byte loads": r"\b(LDG|LDGSTS)\.[\w.]*128\b|\bUBLKCP\b|\bUTMALDG\b",
    "other loads": r"\b(LDG|LDGSTS)\.(?![\w.]*128\b)",
    "shuffles": r"\bSHFL\b",
    "barriers": r"\bBAR\.SYNC\b",
}
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)([^;]*);")


class Kernel(NamedTuple):
    """One compiled kernel.

    Attributes:
        constants: Compile-time arguments.
        settings: Name of the settings file.
        registers: Registers per thread.
        stack: Bytes of stack per thread, which hold spilled registers.
        shared: Bytes of shared memory per block.
        counts: Instructions in the program text by kind, all of them, and those in the longest loop.
    """

    name: str
    constants: str
    arch: int
    dtype: str
    settings: str
    num_warps: int
    registers: int
    stack: int
    shared: int
    counts: dict[str, int]

    @property
    def problems(self) -> list[str]:
        """Violated limits."""
        found = []
        if self.stack:
            found.append(f"{self.stack} bytes of registers spilled")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, {SHARED_LIMIT[self.arch]} at most")
        block = 32 * self.num_warps * -(-self.registers // 8) * 8  # allocated in units of eight per thread
        if block > REGISTERS:
            found.append(f"{block} registers for a block, {REGISTERS} at most")
        return found


Launch = tuple[str, tuple[Any, ...]]  # operator and arguments


def calls(dtype: torch.dtype) -> list[Launch]:
    """Calls of all operators, on tensors without memory, in all kernel variants of the model."""
    found: list[Launch] = []
    for variant, size, batch, options, served in RECORDED:
        recorded = recorded_calls(variant, size, batch, torch.device("meta"), dtype=dtype, **options)
        found += [(name, args) for name, _, args, _ in recorded if name in (served or OPERATORS)]
    for name, args in found[:]:
        if name == "stem":  # normalized pixels
            found.append((name, (args[0].to(dtype), *args[1:])))
        if name == "bi_wkv" and args[2].shape == (1, 4096, 384):
            found.append((name, (*args[:4], None)))  # without a gate
            found.append((name, (*args[:2], *(t[:, 1:] for t in args[2:5]))))  # the last tile is not whole
        if name == "bi_wkv" and args[2].shape[1:] in ((4096, 384), (16384, 1024)):
            found.append((name, (*args[:5], None, math.inf)))  # exact sums
    return found + [(name, args) for name, _, args, _ in mask_edges_calls(torch.device("meta"))]


@contextmanager
def compiling_for(arch: int) -> Iterator[list[Any]]:
    """Compile for the architecture instead of launching, and collect (function name, kernel)."""
    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels.append((self.__name__, kernel))
        return kernel

    fake_driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: arch,  # kernels are cached by device
        get_current_stream=lambda device: 0,
    )
    # not `set_active`, because reading the active driver raises without a GPU
    with mock.patch.object(JITFunction, "run", compile_only), mock.patch.object(driver, "_active", fake_driver):
        yield kernels


def report(arch: int, dtype: torch.dtype, launches: Sequence[Launch] = ()) -> list[Kernel]:
    """Compile the kernels of `launches`, by default of all `calls`; equal kernels for several shapes count once."""
    launches = launches or calls(dtype)
    found: dict[tuple[str, str], tuple[str, Any]] = {}  # settings file and kernel by name and hash
    for file, settings in shipped_settings().items():
        if settings.get("device", {}).get("architecture", arch) != arch:
            continue
        with compiling_for(arch) as kernels:
            for sms in SMS:
                for name, args in launches:
                    LAUNCHERS[name](*args, config=LaunchConfig(default_settings() | settings, arch, sms))
        for name, kernel in kernels:
            found.setdefault((name, kernel.hash), (file, kernel))
    texts = disassemble([kernel.asm["cubin"] for _, kernel in found.values()], arch)
    return [
        _inspect(name.strip("_"), kernel, arch, str(dtype).removeprefix("torch."), file, text)
        for ((name, _), (file, kernel)), text in zip(found.items(), texts, strict=True)
    ]


def _run(tool: str, binary: bytes, *options: str) -> str:
    """Output of a CUDA tool that ships with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [getattr(triton.knobs.nvidia, tool).path, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def disassemble(cubins: list[bytes], arch: int) -> list[str]:
    """Disassemble kernels in one run, because starting the tool takes a third of a second."""
    if not cubins:
        return []
    codes = [_machine_code(cubin) for cubin in cubins]
    target = f"SM{arch}{'a' * (arch >= 90)}"
    text = _run("nvdisasm", b"".join(codes), "--binary", target, "--print-code")
    lines = [line for line in text.splitlines() if INSTRUCTION.search(line)]
    places = [int(INSTRUCTION.search(line)[1], 16) for line in lines]
    bounds = [0, *(bisect_left(places, end) for end in accumulate(map(len, codes)))]
    return ["\n".join(lines[start:end]) for start, end in pairwise(bounds)]


def _machine_code(cubin: bytes) -> bytes:
    """Return the single .text section of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    sections = [struct.unpack_from("<2I4Q", cubin, table + index * size) for index in range(count)]
    start = sections[names][4]
    (found,) = (section for section in sections if cubin.startswith(b".text.", start + section[0]))
    return cubin[found[4] : found[4] + found[5]]


def _inspect(name: str, kernel: Any, arch: int, dtype: str, settings: str, sass: str) -> Kernel:
    usage = _run("cuobjdump", kernel.asm["cubin"], "-res-usage")
    registers, stack = (int(re.search(rf"{field}:(\d+)", usage)[1]) for field in ("REG", "STACK"))
    counts = {kind: len(re.findall(pattern, sass)) for kind, pattern in INSTRUCTIONS.items()} | lengths(sass)
    source, meta = kernel.src, kernel.metadata
    constants = " ".join(f"{source.fn.arg_names[place[0]]}={value}" for place, value in source.constants.items())
    return Kernel(name, constants, arch, dtype, settings, meta.num_warps, registers, stack, meta.shared, counts)


def lengths(sass: str) -> dict[str, int]:
    """Count the instructions of a disassembled kernel, and those of its longest loop."""
    text = [(int(place, 16), name, rest) for place, name, rest in INSTRUCTION.findall(sass) if name != "NOP"]
    loops = [0]
    for end, name, rest in text:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and int(target[1], 16) < end:
            loops.append(sum(int(target[1], 16) <= place <= end for place, _, _ in text))
    return {"instructions": len(text), "longest loop": max(loops)}


def table(kernels: list[Kernel]) -> str:
    """Format the report in Markdown."""
    fields = ("name", "constants", "settings", "dtype", "arch", "num_warps", "registers", "stack", "shared")
    header = [*fields, *INSTRUCTIONS, "instructions", "longest loop"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for kernel in sorted(kernels, key=lambda kernel: kernel[:5]):
        cells = [*(getattr(kernel, field) for field in fields), *kernel.counts.values()]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(SHARED_LIMIT), choices=list(SHARED_LIMIT))
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    parser.add_argument("--dtype", nargs="+", default=names, choices=names)
    args = parser.parse_args()
    tasks = [(arch, getattr(torch, dtype)) for arch in args.arch for dtype in args.dtype]
    with multiprocessing.get_context("spawn").Pool(min(len(tasks), os.cpu_count() or 1)) as pool:
        kernels = [kernel for found in pool.starmap(report, tasks, chunksize=1) for kernel in found]
    print(
        f"Compiled by Triton {triton.__version__}, not run: `python -m benchmarks.kernels.compile_report`.\n"
        "Registers and stack (bytes of spilled registers) are per thread, shared memory (bytes) is per block; "
        f"instructions are counted in the program text.\n\n{table(kernels)}"
    )
    problems = [(kernel, problem) for kernel in kernels for problem in kernel.problems]
    for kernel, problem in problems:
        print(f"{kernel.name} ({kernel.settings}, {kernel.dtype}, sm_{kernel.arch}): {problem}", file=sys.stderr)
    print(f"{len(kernels)} kernels, {len(problems)} problems", file=sys.stderr)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
