"""Compile every kernel ahead of time and read from the machine code what no GPU is needed for.

    python -m benchmarks.kernels.compile_report [--arch 90 ...] [--dtype bfloat16 ...] [--output FILE.md]

Every launcher is called with tensors of the model's shapes that hold no memory, under every launch setting that ships,
those of one device for its architecture alone; the kernels are compiled as they would be for a launch, and not
launched. Any error, any spilled register in a setting, more shared memory or registers than a block can have is a
failure.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import struct
import subprocess
import sys
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastsam_rwkv.config import ModelConfig
from fastsam_rwkv.triton_kernels.attention import attention_triton
from fastsam_rwkv.triton_kernels.bi_wkv import bi_wkv_triton
from fastsam_rwkv.triton_kernels.conv_norm import conv_norm_triton
from fastsam_rwkv.triton_kernels.fused_linear import fused_linear_triton
from fastsam_rwkv.triton_kernels.launch_config import assume_architecture, override, shipped_settings
from fastsam_rwkv.triton_kernels.mbconv import mbconv_triton
from fastsam_rwkv.triton_kernels.norm_shift_mix import norm_shift_mix_triton
from fastsam_rwkv.triton_kernels.stem import stem_triton
from fastsam_rwkv.triton_kernels.upscale import upscale_triton

VARIANTS = ("tiny", "small", "base", "large")
LARGE_BATCH = (16, 4096)  # images, tokens: with any width, what `<op>.large` settings are for
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Shared memory that one block may use, in bytes: CUDA C++ Programming Guide, table of technical specifications
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
REGISTERS = 65536  # of a multiprocessor, on all of these: same table
SAME_PTX = {89: 86}  # but for the target's name Triton writes the same for both: it is assembled twice, compiled once
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
        constants: compile-time arguments.
        settings: name of the settings file.
        registers: a thread's.
        stack: bytes of local memory a thread has on the stack, where spilled registers go.
        shared: bytes a block.
        counts: instructions in the program text by kind, all of them, and those in the longest loop.
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
        found = []
        if self.stack:
            found.append(f"{self.stack} bytes of registers spilled")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, {SHARED_LIMIT[self.arch]} at most")
        block = 32 * self.num_warps * -(-self.registers // 8) * 8  # they are given out eight to a thread
        if block > REGISTERS:
            found.append(f"{block} registers for a block, {REGISTERS} at most")
        return found


def operators() -> dict[str, Callable[[torch.dtype], None]]:
    """Launchers, called as the model calls them in all its sizes."""
    configs = [ModelConfig.from_name(name) for name in VARIANTS]
    widths = [config.embed_dim for config in configs]
    stages = sorted(
        {(a, b, stride) for c in configs for a, b, stride in (
            (c.stem_dim, c.stage1_dim, 2), (c.stage1_dim, c.stage1_dim, 1),
            (c.stage1_dim, c.stage2_dim, 2), (c.stage2_dim, c.stage2_dim, 1),
        )}
    )  # fmt: skip

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def bi_wkv(dtype: torch.dtype) -> None:
        for B, T, C, gated in (
            (1, 4096, widths[0], True),
            (1, 4095, 384, True),  # tiles do not come out even
            (1, 16384, widths[-1], True),  # groups of several tiles
            (*LARGE_BATCH, 384, True),
            (1, 4096, 384, False),
        ):
            k, v, r = empty(3, B, T, C, dtype=dtype)
            w, u = empty(C, dtype=dtype), empty(C, dtype=dtype)
            bi_wkv_triton(w, u, k, v, r if gated else None, 1 / T)

    def norm_shift_mix(dtype: torch.dtype) -> None:
        for B, C in (*((1, C) for C in widths), (LARGE_BATCH[0], 384)):
            x, weight, bias = empty(B, 64, 64, C, dtype=dtype), empty(C, dtype=dtype), empty(C, dtype=dtype)
            for J in (2, 3):
                norm_shift_mix_triton(x, weight, bias, empty(J, C, dtype=dtype), 1e-6)

    def mbconv(dtype: torch.dtype) -> None:
        for C, N, stride in stages:
            x, vector, out = empty(1, 64, 64, C, dtype=dtype), empty(C, dtype=dtype), empty(N, dtype=dtype)
            D = 4 * N
            hidden, shortcut = empty(D, dtype=dtype), (None, None) if C == N else (empty(N, C, dtype=dtype), out)
            expand, project = empty(D, C, dtype=dtype), empty(N, D, dtype=dtype)
            depthwise = empty(D, 1, 3, 3, dtype=dtype)
            mbconv_triton(
                x, vector, vector, expand, hidden, depthwise, hidden, project, out, *shortcut, stride, 1e-6
            )  # fmt: skip

    def fused_linear(dtype: torch.dtype) -> None:
        def layer(C: int, tokens: int) -> None:
            x, k = empty(tokens, C, dtype=dtype), empty(tokens, 2 * C, dtype=dtype)
            square, scale = empty(C, C, dtype=dtype), empty(C, dtype=dtype)
            fused_linear_triton(x, square, False, None, None, scale, x)
            fused_linear_triton(x, empty(2 * C, C, dtype=dtype), True)
            fused_linear_triton(k, empty(C, 2 * C, dtype=dtype), False, x, square, scale, x)

        for C in widths:
            layer(C, 4096)
            for busy in (0, 2):  # blocks side by side whatever the multiprocessors do, and never
                with mock.patch("fastsam_rwkv.triton_kernels.fused_linear.BUSY", busy):
                    layer(C, LARGE_BATCH[0] * LARGE_BATCH[1])
        layer(widths[0], 1024)  # in lower blocks

    def conv_norm(dtype: torch.dtype) -> None:
        def call(
            C: int, N: int, size: int, stride: int = 1, *, side: int = 64, bias: bool = True, in_norm: bool = False,
            add: bool = False, norm: bool = False, activate: bool = False, residual: bool = False,
        ) -> None:  # fmt: skip
            before, after = ([empty(width, dtype=dtype)] * 2 for width in (C, N))
            like_output = empty(1, side // stride, side // stride, N, dtype=dtype)
            conv_norm_triton(
                empty(1, side, side, C, dtype=dtype), empty(N, C, size, size, dtype=dtype),
                after[0] if bias else None, *(before if in_norm else (None, None)), like_output if add else None,
                *(after if norm else (None, None)), like_output if residual else None, stride, activate, 1e-6,
            )  # fmt: skip

        for config in configs:
            call(config.stem_dim, config.stem_dim, 3)
            call(config.stage2_dim, config.embed_dim, 3, 2, in_norm=True)
            call(config.embed_dim, 256, 1, bias=False, norm=True)
            call(config.stage1_dim, 64, 3, norm=True, activate=True)
        call(256, 256, 3, bias=False, norm=True)
        call(64, 32, 3)
        call(32, 64, 3, add=True, norm=True, activate=True)
        call(64, 32, 3, residual=True)
        call(128, 256, 1, add=True, norm=True)
        call(256, 256, 1, add=True, norm=True)
        call(256, 256, 1, norm=True)

    def stem(dtype: torch.dtype) -> None:
        for N in sorted({config.stem_dim for config in configs}):
            vector, weight = empty(N, dtype=dtype), empty(N, 3, 3, 3, dtype=dtype)
            for pixels in (torch.uint8, dtype):
                stem_triton(
                    empty(1, 48, 64, 3, dtype=pixels), (0.0,) * 3, (1.0,) * 3, weight, vector, vector, vector,
                    empty(N, N, 3, 3, dtype=dtype), vector, 64, 64, 1e-6,
                )  # fmt: skip

    def attention(dtype: torch.dtype) -> None:
        for N, T, S, width, masked in (
            (1, 8, 8, 256, True),
            (1, 8, 4096, 128, False),  # keys split among programs
            (64, 8, 4096, 128, False),  # not split
            (1, 4096, 8, 128, True),
            (1, 4096, 20, 128, True),
        ):
            q, k, seen = empty(N, T, width, dtype=dtype), empty(N, S, width, dtype=dtype), empty(N, S, dtype=torch.bool)
            attention_triton(q, k, k, seen if masked else None, 8)

    def upscale(dtype: torch.dtype) -> None:
        for C, N, normed in (*((config.stage2_dim, 64, True) for config in configs), (256, 64, True), (64, 32, False)):
            vector, norm = empty(N, dtype=dtype), (empty(N, dtype=dtype) if normed else None)
            upscale_triton(empty(1, 64, 64, C, dtype=dtype), empty(4 * N, C, dtype=dtype), vector, norm, norm, 1e-6)

    return {
        "attention": attention,
        "bi_wkv": bi_wkv,
        "conv_norm": conv_norm,
        "fused_linear": fused_linear,
        "mbconv": mbconv,
        "norm_shift_mix": norm_shift_mix,
        "stem": stem,
        "upscale": upscale,
    }


class _Target:
    """Stands in for a GPU driver: it knows the architecture, and nothing is launched."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling_for(arch: int) -> Iterator[list[Any]]:
    """Launches within the context compile for the architecture instead; the list collects (function, kernel)."""
    kernels: list[Any] = []
    run, active = JITFunction.run, driver._active  # None where there is no GPU, which the public property refuses

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels.append((self.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    driver.set_active(_Target(arch))
    try:
        with assume_architecture(arch):
            yield kernels
    finally:
        JITFunction.run = run
        driver.set_active(active)


def report(
    archs: list[int], dtypes: tuple[torch.dtype, ...] = DTYPES, only: tuple[str, ...] | None = None
) -> list[Kernel]:
    """Compile every operator, or `only` some; kernels that come out the same for several shapes count once."""
    launchers = [launch for name, launch in operators().items() if only is None or name in only]
    devices = [settings["device"] for settings in shipped_settings().values() if "device" in settings]
    own_settings = {device["architecture"] for device in devices}
    found: list[Kernel] = []
    done: dict[int, list[Compiled]] = {}
    for arch in archs:
        like = SAME_PTX.get(arch)
        if like in done and not {arch, like} & own_settings:
            done[arch] = [kernel._replace(cubin=assembled(kernel.kernel, arch)) for kernel in done[like]]
        else:
            done[arch] = compiled(arch, dtypes, launchers)
        texts = disassemble([kernel.cubin for kernel in done[arch]], arch)
        found += [_inspect(kernel, arch, text) for kernel, text in zip(done[arch], texts, strict=True)]
    return found


class Compiled(NamedTuple):
    name: str
    dtype: str
    settings: str
    kernel: Any
    cubin: bytes


def compiled(
    arch: int, dtypes: tuple[torch.dtype, ...], launchers: list[Callable[[torch.dtype], None]]
) -> list[Compiled]:
    found: dict[tuple[str, str], Compiled] = {}
    for settings_name, settings in shipped_settings().items():
        if settings.get("device", {}).get("architecture", arch) != arch:
            continue
        for dtype in dtypes:
            with override(settings), compiling_for(arch) as kernels:
                for launch in launchers:
                    launch(dtype)
            of = str(dtype).removeprefix("torch."), settings_name
            for name, kernel in kernels:
                found.setdefault((name, kernel.hash), Compiled(name, *of, kernel, kernel.asm["cubin"]))
    return list(found.values())


def assembled(kernel: Any, arch: int) -> bytes:
    """Machine code for another architecture that takes the same PTX."""
    ptx = re.sub(r"\.target sm_\d+", f".target sm_{arch}", kernel.asm["ptx"])
    return make_backend(GPUTarget("cuda", arch, 32)).make_cubin(ptx, {}, kernel.metadata, arch)


@cache
def _tool(name: str) -> str:
    return next(str(path) for path in Path(triton.__file__).parent.rglob(name))


def disassemble(cubins: list[bytes], arch: int) -> list[str]:
    """Each kernel's machine code as text, addresses counted from the first one's.

    The disassembler takes a third of a second to start, whatever it is given: it is started once.
    """
    if not cubins:
        return []
    codes = [_machine_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        command = [_tool("nvdisasm"), "--binary", f"SM{arch}{'a' * (arch >= 90)}", "--print-code", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line for line in text.splitlines() if INSTRUCTION.search(line)]
    places = [int(INSTRUCTION.search(line)[1], 16) for line in lines]
    bounds = [0, *(bisect_left(places, end) for end in accumulate(map(len, codes)))]
    return ["\n".join(lines[start:end]) for start, end in pairwise(bounds)]


def _machine_code(cubin: bytes) -> bytes:
    """The one .text section of an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    sections = [struct.unpack_from("<2I4Q", cubin, table + index * size) for index in range(count)]
    start = sections[names][4]
    (found,) = (section for section in sections if cubin.startswith(b".text.", start + section[0]))
    return cubin[found[4] : found[4] + found[5]]


def _inspect(of: Compiled, arch: int, sass: str) -> Kernel:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(of.cubin)
        file.flush()
        command = [_tool("cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{field}:(\d+)", usage)[1]) for field in ("REG", "STACK"))
    counts = {kind: len(re.findall(pattern, sass)) for kind, pattern in INSTRUCTIONS.items()} | lengths(sass)
    source, meta = of.kernel.src, of.kernel.metadata
    names = source.fn.arg_names
    constants = " ".join(f"{names[place[0]]}={value}" for place, value in source.constants.items())
    return Kernel(
        of.name.strip("_"), constants, arch, of.dtype, of.settings, meta.num_warps, registers, stack,
        meta.shared, counts,
    )  # fmt: skip


def lengths(sass: str) -> dict[str, int]:
    """Instructions of a kernel as `nvdisasm` prints it: all of them, and those of its longest loop."""
    text = [(int(place, 16), name, rest) for place, name, rest in INSTRUCTION.findall(sass) if name != "NOP"]
    loops = [0]
    for end, name, rest in text:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and int(target[1], 16) < end:
            loops.append(sum(int(target[1], 16) <= place <= end for place, _, _ in text))
    return {"instructions": len(text), "longest loop": max(loops)}


def table(kernels: list[Kernel]) -> str:
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
    parser.add_argument("--output", type=Path, help="write the table there; print it otherwise")
    args = parser.parse_args()
    groups = [[arch] + [a for a, like in SAME_PTX.items() if like == arch and a in args.arch] for arch in args.arch]
    groups = [group for group in groups if SAME_PTX.get(group[0]) not in args.arch]
    tasks = [(group, (getattr(torch, dtype),)) for group in groups for dtype in args.dtype]
    with multiprocessing.get_context("spawn").Pool(min(len(tasks), os.cpu_count() or 1)) as pool:
        kernels = [kernel for found in pool.starmap(report, tasks, chunksize=1) for kernel in found]
    text = (
        f"Compiled ahead of time by Triton {triton.__version__}, not run: "
        "`python -m benchmarks.kernels.compile_report`.\n"
        "Registers and stack (bytes, where spilled registers go) are a thread's, shared memory (bytes) a block's; "
        f"instructions are counted in the program text.\n\n{table(kernels)}\n"
    )
    if args.output:
        args.output.write_text(text)
    else:
        print(text)
    problems = [(kernel, problem) for kernel in kernels for problem in kernel.problems]
    for kernel, problem in problems:
        print(f"{kernel.name} ({kernel.settings}, {kernel.dtype}, sm_{kernel.arch}): {problem}", file=sys.stderr)
    print(f"{len(kernels)} kernels, {len(problems)} problems", file=sys.stderr)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
