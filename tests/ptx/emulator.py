"""PTX emulator: runs the compiled kernels of this project without a GPU.

Triton's interpreter runs a kernel's Python. The emulator runs the compiled PTX: layouts, shuffles, shared
memory, barriers, asynchronous copies and the fragments of tensor cores (mma and wgmma). It emulates neither ptxas nor
time, nor sm_100, whose tensor cores have memory of their own. Threads of many blocks advance in step; a register is an
array [threads].

It raises an error for an address outside all tensors or not aligned. Shared memory must be written before it is read,
with a barrier between two warps, and not be used by an asynchronous instruction meanwhile. A block must not read
the writes of another.

`emulated` is the entry point, and `run` runs one launch. `Program` parses the PTX, `Memory` holds the tensors, and
`Blocks.run` steps through the instructions. Each is a method `op_...`, or a function in `arithmetic.py`.

Source: PTX ISA 8.7, https://docs.nvidia.com/cuda/parallel-thread-execution/
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from triton.runtime.jit import JITFunction

from benchmarks.kernels.compile_report import compiling_for
from tests.ptx.arithmetic import (
    ARITHMETIC,
    F16,
    F32,
    PRED,
    U16,
    U32,
    Array,
    EmulationError,
    Kind,
    flush,
    from_half,
    to_half,
)

TYPES = {
    f"{kind}{bits}": np.dtype(f"{letter}{bits // 8}")
    for kind, letter in (("b", "u"), ("u", "u"), ("s", "i"))
    for bits in (8, 16, 32, 64)
} | {"f32": F32, "f64": np.dtype("f8"), "pred": PRED}
ARCHS = (80, 86, 89, 90, 120)
GAP = 4096  # bytes between two tensors, out of bounds
THREADS = 1 << 14  # emulated at a time at most, in whole blocks
UNDEFINED = 0x7FDEADBEEF7FDEAD  # a NaN, and an address out of bounds
NOBODY, SEVERAL = -1, -2  # in place of a warp's or block's number


class Instruction(NamedTuple):
    """One instruction."""

    place: int  # index in the program
    text: str
    source: str  # line and column of the Python
    op: list[str]  # name, split at the dots
    guard: tuple[str, bool] | None  # predicate register, and its value if the instruction executes
    operands: list[Any]  # registers, symbols, numbers, lists of these, and pairs (base, offset) for addresses


def _operands(text: str) -> list[Any]:
    found: list[Any] = []
    for vector, address, other in re.findall(r"\{([^}]*)\}|\[([^\]]*)\]|([^,{}\[\]\s]+)", text):
        if vector:
            found.append(_operands(vector))
        elif address:
            base, _, offset = address.replace(" ", "").partition("+")
            found.append((base, int(offset or "0", 0)))
        elif bits := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", other):
            found.append(int(bits[1], 16))
        elif number := re.fullmatch(r"(-?(?:0x[0-9a-fA-F]+|\d+))U?", other):
            found.append(int(number[1], 0))
        else:
            found.append(other)
    return found


class Program:
    """Parsed PTX of one kernel."""

    def __init__(self, ptx: str) -> None:
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.types: dict[str, Kind] = {}
        head, body = ptx.split(".visible .entry", 1)[1].split("{", 1)
        self.parameters = re.findall(r"\.param \.(\w+) .*?(\w+),?$", head, re.MULTILINE)
        self.threads = int(re.search(r"\.reqntid (\d+)", head)[1])
        source = ""
        for line in body.split("$L__func_end")[0].splitlines():
            line = re.sub(r"^[{}]", "", line.split("//")[0].strip())  # inline assembly may open a scope
            for text in filter(None, map(str.strip, line.split(";"))):
                if label := re.fullmatch(r"(\$?\w+):", text):
                    self.labels[label[1]] = len(self.instructions)
                elif text.startswith(".loc"):
                    source = ":".join(text.split()[2:4])
                elif declared := re.match(r"\.reg\s*\.(\w+)\s+(.*)", text):
                    self._declare(TYPES[declared[1]], declared[2])
                elif not text.startswith("."):
                    not_, predicate, name, rest = re.match(r"(?:@(!?)(\S+)\s+)?(\S+)\s*(.*)", text).groups()
                    guard = (predicate, not not_) if predicate else None
                    name = name.replace("::cta", "")  # a block is all of its cluster
                    place = len(self.instructions)
                    self.instructions.append(Instruction(place, text, source, name.split("."), guard, _operands(rest)))

    def _declare(self, kind: Kind, names: str) -> None:
        for name in names.replace(" ", "").split(","):
            many = re.fullmatch(r"(.*)<(\d+)>", name)
            self.types |= dict.fromkeys([f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name], kind)


class Memory:
    """All tensors of a launch in one array; the kernel's addresses are indices."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        storages = (t.untyped_storage() for t in tensors)
        self.storages = {s.data_ptr(): s for s in storages if s.nbytes()}
        self.starts, end = {}, GAP
        for pointer, storage in self.storages.items():
            self.starts[pointer] = end + pointer % 256  # with the alignment of the tensor
            end += -(-(storage.nbytes() + 256) // 256) * 256 + GAP
        self.bytes = np.zeros(end, np.uint8)
        self.valid = np.zeros(end, bool)
        self.writer = np.full(end, NOBODY, np.int32)  # block that wrote a byte
        for pointer, storage in self.storages.items():
            place = slice(self.starts[pointer], self.starts[pointer] + storage.nbytes())
            self.bytes[place], self.valid[place] = _bytes(storage), True

    def address(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        return self.starts.get(storage.data_ptr(), 0) + tensor.storage_offset() * tensor.element_size()

    def write_back(self) -> None:
        for pointer, storage in self.storages.items():
            _bytes(storage)[:] = self.bytes[self.starts[pointer] : self.starts[pointer] + storage.nbytes()]


def _bytes(storage: torch.UntypedStorage) -> Array:
    return torch.tensor((), dtype=torch.uint8).set_(storage).numpy()


class Blocks:
    """State of some blocks of a launch."""

    def __init__(
        self,
        program: Program,
        memory: Memory,
        parameters: dict[str, Array],
        grid: Sequence[int],
        blocks: range,
        shared: int,
    ) -> None:
        self.program, self.memory = program, memory
        self.blocks, self.per_block = len(blocks), program.threads
        self.n = self.blocks * self.per_block
        thread = np.tile(np.arange(self.per_block, dtype=U32), self.blocks)
        self.block = np.repeat(np.array(blocks, U32), self.per_block)
        self.warp, self.lane = (thread // 32).astype(np.int32), (thread % 32).astype(np.int64)
        x, y, z = (np.array(size, U32) for size in grid)
        self.special = parameters | {
            "%tid.x": thread,
            "%ctaid.x": self.block % x, "%ctaid.y": self.block // x % y, "%ctaid.z": self.block // (x * y),
            "%nctaid.x": x, "%nctaid.y": y, "%nctaid.z": z, "global_smem": np.array(0, U32),
        }  # fmt: skip
        self.registers: dict[str, Array] = {}
        # Shared memory, block after block, and the state of every byte
        self.size = -(-max(shared, 1) // 1024) * 1024
        self.start = ((self.block - self.block[0]).astype(np.int64)) * self.size
        self.shared = np.zeros(self.size * self.blocks, np.uint8)
        self.written = np.zeros(self.shared.shape, bool)
        self.write_epoch, self.read_epoch, self.write_warp, self.read_warp = (
            np.full(self.shared.shape, NOBODY, np.int32) for _ in range(4)
        )
        self.arriving = np.zeros(self.shared.shape, bool)  # by a copy that nobody has waited for
        self.being_read = np.zeros(self.shared.shape, np.int32)  # number of products that nobody has waited for
        # State of every thread
        self.epoch = np.zeros(self.n, np.int32)  # barriers passed
        self.copy_group, self.product_group = np.zeros(self.n, np.int32), np.zeros(self.n, np.int32)
        self.copies: list[tuple[Array, ...]] = []  # threads, groups, places [threads, bytes], data
        self.products: list[tuple[Array, ...]] = []  # first threads, groups, places [warp groups, bytes]

    # Control flow

    def run(self) -> None:
        """Run all threads to the end: the least advanced first, unless they wait for others of their warp or block."""
        instructions, end = self.program.instructions, len(self.program.instructions)
        at = np.zeros(self.n, np.int32)
        while (here := self._next(at)) is not None:
            first = place = int(at[here][0])
            mask = None if here.all() else here
            others = end if mask is None else int(at[~here & (at > place)].min(initial=end))
            target = None
            while target is None and place < others:  # up to the next thread
                instruction = instructions[place]
                if mask is not None and place != first and self._together(instruction) > 1:
                    break
                try:
                    target = self._step(instruction, mask)
                except Exception as error:  # name the instruction
                    raise EmulationError(f"{instruction.text} ({instruction.source}): {error}") from error
                place += 1
            at[here] = place if target is None else target[here]

    def _next(self, at: Array) -> Array | None:
        for place in np.unique(at):
            here = at == place
            if place == len(self.program.instructions):
                break
            if (together := self._together(self.program.instructions[place])) > 1:
                here &= np.repeat(here.reshape(-1, together).all(1), together)
            if here.any():
                return here
        if not here.all():
            raise EmulationError("threads wait for each other forever")
        return None

    def _together(self, i: Instruction) -> int:
        """Return the number of threads that execute an instruction together."""
        if i.op[0] == "wgmma":
            return 128
        if i.op == ["bar", "sync"]:
            return self.per_block
        return 32 if "sync" in i.op else 1

    def _step(self, i: Instruction, mask: Array | None) -> Array | None:
        """Execute for the threads of the mask; return their next places if the instruction is a branch."""
        holds = None
        if i.guard:
            holds = np.broadcast_to(self.read(i.guard[0], PRED) == i.guard[1], (self.n,))
        if i.op[0] in ("bra", "ret"):
            place = self.program.labels[i.operands[0]] if i.operands else len(self.program.instructions)
            return np.full(self.n, place) if holds is None else np.where(holds, place, i.place + 1)
        if holds is not None:
            mask = holds if mask is None else mask & holds
            if not mask.any():
                return None
            mask = None if mask.all() else mask
        getattr(self, f"op_{i.op[0]}", self.arithmetic)(i, mask)
        return None

    # Registers

    def read(self, operand: Any, kind: Kind) -> Array:
        """Return a register `[threads]`, or one number for all threads."""
        if isinstance(operand, int):
            return np.array(operand & ((1 << 8 * kind.itemsize) - 1), _unsigned(kind)).view(kind)
        value = self.special[operand] if operand in self.special else self.registers.get(operand)
        if value is None:  # allowed if nothing depends on it
            value = np.array(UNDEFINED, np.uint64).astype(self.program.types[operand])
        if value.dtype.itemsize != kind.itemsize:
            value = value.astype(_unsigned(kind))
        return value.view(kind)

    def spread(self, operand: Any, kind: Kind) -> Array:
        return np.broadcast_to(self.read(operand, kind), (self.n,))

    def write(self, name: str, value: Array, mask: Array | None) -> None:
        kind = self.program.types[name]
        value = np.asarray(value)
        if value.dtype.itemsize != kind.itemsize:  # with its sign
            value = value.astype(f"{value.dtype.kind}{kind.itemsize}")
        value = np.broadcast_to(value.view(kind), (self.n,))
        if mask is not None:
            value = np.where(mask, value, self.spread(name, kind))
        self.registers[name] = value

    def write_each(self, names: list[str], threads: Array, values: Array, mask: Array | None) -> None:
        """Write one register each from values `[*threads.shape, registers]` of the mask's threads."""
        for j, name in enumerate(names):
            whole = np.zeros(self.n, values.dtype)
            whole[threads] = values[..., j]
            self.write(name, whole, mask)

    # Memory

    def places(self, space: str, operand: tuple[str, int], width: int, mask: Array | None) -> tuple[Array, Array]:
        """Return the threads of the mask, and the indices of their bytes `[threads, width]`."""
        threads = np.arange(self.n) if mask is None else np.flatnonzero(mask)
        base = self.spread(operand[0], self.program.types.get(operand[0], U32))
        place = base[threads].astype(np.int64) + operand[1]
        if (place % width).any():
            raise EmulationError(f"an address that is not a multiple of {width}")
        places = place[:, None] + np.arange(width)
        if space not in ("global", "shared"):
            raise EmulationError("not emulated")
        if space == "global":
            inside = (place >= 0) & (place + width <= len(self.memory.bytes))
            if not (inside.all() and self.memory.valid[places].all()):
                raise EmulationError("an address outside all tensors")
            return threads, places
        if (place < 0).any() or (place + width > self.size).any():
            raise EmulationError("an address outside shared memory")
        return threads, places + self.start[threads, None]

    def get(self, space: str, threads: Array, places: Array) -> Array:
        """Read bytes `[threads, width]`."""
        if space == "shared":
            self.check_read(threads, places, self.warp[threads, None])
            return self.shared[places]
        if self.written_by_others(threads, places).any():
            raise EmulationError("read of a value that another block wrote")
        return self.memory.bytes[places]

    def put(self, space: str, threads: Array, places: Array, data: Array) -> None:
        memory = self.shared if space == "shared" else self.memory.bytes
        if space == "shared":
            self.check_write(threads, places, data)
        else:
            if (self.written_by_others(threads, places) & (memory[places] != data)).any():
                raise EmulationError("two blocks write different values to one place")
            self.memory.writer[places] = self.block[threads, None]
        memory[places] = data
        lost = memory[places] != data
        if space == "shared":  # two lanes may hold one value, accumulated in another order
            self.mark_written(threads, places)
            lost &= self.write_warp[places] != self.warp[threads, None]
        if lost.any():
            raise EmulationError("two threads write different values to one place")

    def written_by_others(self, threads: Array, places: Array) -> Array:
        writer = self.memory.writer[places]
        return (writer != NOBODY) & (writer != self.block[threads, None])

    def check_write(self, threads: Array, places: Array, data: Array | None) -> None:
        epoch, warp = self.epoch[threads, None], self.warp[threads, None]
        if self.arriving[places].any() or self.being_read[places].any():
            raise EmulationError("write to shared memory that an asynchronous instruction uses")
        if ((self.read_epoch[places] == epoch) & (self.read_warp[places] != warp)).any():
            raise EmulationError("write to shared memory that another warp reads, without a barrier")
        wrote = (self.write_epoch[places] == epoch) & (self.write_warp[places] != warp)
        if (wrote & (True if data is None else self.shared[places] != data)).any():
            raise EmulationError("write to shared memory that another warp wrote, without a barrier")

    def mark_written(self, threads: Array, places: Array) -> None:
        self.write_epoch[places], self.write_warp[places] = self.epoch[threads, None], self.warp[threads, None]
        self.written[places] = True

    def check_read(self, threads: Array, places: Array, warp: Array) -> None:
        epoch = self.epoch[threads, None]
        if not self.written[places].all():
            raise EmulationError("read of shared memory that was never written")
        if self.arriving[places].any():
            raise EmulationError("read of shared memory that an asynchronous copy still writes")
        if ((self.write_epoch[places] == epoch) & (self.write_warp[places] != warp)).any():
            raise EmulationError("read of shared memory that another warp wrote, without a barrier")
        others = (self.read_epoch[places] == epoch) & (self.read_warp[places] != warp)
        reader = np.where(others, SEVERAL, warp)
        self.read_epoch[places], self.read_warp[places] = epoch, reader
        others = self.read_warp[places] != reader  # of the same instruction
        self.read_warp[places] = np.where(others, SEVERAL, reader)

    def op_ld(self, i: Instruction, mask: Array | None) -> None:
        space, kind, names = i.op[1], TYPES[i.op[-1]], _as_list(i.operands[0])
        width = kind.itemsize * len(names)
        if space == "param":
            self.write(names[0], self.read(i.operands[1][0], kind), mask)
            return
        threads, places = self.places(space, i.operands[1], width, mask)
        data = self.get(space, threads, places)
        self.write_each(names, threads, np.ascontiguousarray(data).view(kind), mask)

    def op_st(self, i: Instruction, mask: Array | None) -> None:
        kind, sources = TYPES[i.op[-1]], _as_list(i.operands[1])
        threads, places = self.places(i.op[1], i.operands[0], kind.itemsize * len(sources), mask)
        values = np.stack([self.spread(s, _unsigned(kind))[threads] for s in sources], 1)
        self.put(i.op[1], threads, places, values.view(np.uint8))

    def op_cp(self, i: Instruction, mask: Array | None) -> None:
        """Execute cp.async: data arrive at the latest moment, when a thread waits for them."""
        takes_part = np.ones(self.n, bool) if mask is None else mask
        if i.op[2] == "commit_group":
            self.copy_group = self.copy_group + takes_part
        elif i.op[2] == "wait_group":
            finished, self.copies = _divided(self.copies, takes_part, self.copy_group - i.operands[0])
            for threads, _, places, data in finished:
                self.arriving[places] = False
                self.shared[places] = data
                self.mark_written(threads, places)
        elif i.op[2] in ("ca", "cg"):
            width = i.operands[2]
            size = self.spread(i.operands[3] if len(i.operands) > 3 else width, U32)
            threads, places = self.places("shared", i.operands[0], width, mask)
            if not np.isin(size[threads], (0, width)).all():
                raise EmulationError("copies of part of their bytes are not emulated")
            reads = takes_part & (size > 0)
            data = np.zeros(places.shape, np.uint8)
            if reads.any():
                data[reads[threads]] = self.get("global", *self.places("global", i.operands[1], width, reads))
            self.check_write(threads, places, None)
            self.arriving[places] = True
            self.copies.append((threads, self.copy_group[threads], places, data))
        else:
            raise EmulationError("not emulated")

    # Warps and blocks

    def op_bar(self, i: Instruction, mask: Array | None) -> None:
        if i.op[1:] == ["sync"]:
            self.epoch = self.epoch + (1 if mask is None else mask.astype(np.int32))
        elif i.op[1:] != ["warp", "sync"]:
            raise EmulationError("not emulated")

    def op_fence(self, i: Instruction, mask: Array | None) -> None:
        """Do nothing: memory operations run in order, and launches one after another."""

    op_griddepcontrol = op_fence

    def op_shfl(self, i: Instruction, mask: Array | None) -> None:
        value = self.spread(i.operands[1], U32)
        b, c = (self.spread(o, U32).astype(np.int64) for o in i.operands[2:4])
        b, segment, clamp = b & 31, c >> 8 & 31, c & 31
        first, last = self.lane & segment, (self.lane & segment) | (clamp & ~segment)
        lane = {
            "up": self.lane - b, "down": self.lane + b, "bfly": self.lane ^ b, "idx": first | (b & ~segment)
        }[i.op[2]]  # fmt: skip
        lane = np.where(lane >= last if i.op[2] == "up" else lane <= last, lane, self.lane)
        self.write(i.operands[0], value[np.arange(self.n) // 32 * 32 + lane], mask)

    def groups(self, mask: Array | None, size: int) -> Array:
        """Return the threads `[groups, size]` of the warps, or warp groups, in the mask."""
        threads = np.arange(self.n).reshape(-1, size)
        return threads if mask is None else threads[mask.reshape(-1, size).all(1)]

    # Matrices: g is a thread's index in its warp divided by 4, t the remainder

    def halves(self, operands: list[str], kind: str, threads: Array) -> Array:
        """Return registers of two values each, as float32 `[*threads.shape, registers, 2]`."""
        bits = np.stack([self.spread(o, U32)[threads] for o in operands], -1)
        return from_half(bits.view(U16), kind).reshape(*bits.shape, 2)

    def _matrix_rows(self, operand: tuple[str, int], count: int, mask: Array | None) -> tuple[Array, Array, Array]:
        """Return the warps' threads `[warps, 32]`, the row threads of `count` matrices, and the rows' bytes."""
        threads = self.groups(mask, 32)
        _, places = self.places("shared", operand, 16, mask)
        return threads, threads[:, : 8 * count].ravel(), places.reshape(-1, 32, 16)[:, : 8 * count].reshape(-1, 16)

    def op_ldmatrix(self, i: Instruction, mask: Array | None) -> None:
        names = _as_list(i.operands[0])
        threads, of_rows, rows = self._matrix_rows(i.operands[1], len(names), mask)
        matrices = self.get("shared", of_rows, rows).view(U16).reshape(len(threads), len(names), 8, 8)
        if "trans" in i.op:
            matrices = matrices.swapaxes(2, 3)
        values = np.ascontiguousarray(matrices).view(U32).reshape(len(threads), len(names), 32)
        self.write_each(names, threads, values.swapaxes(1, 2), mask)

    def op_stmatrix(self, i: Instruction, mask: Array | None) -> None:
        sources = _as_list(i.operands[1])
        threads, of_rows, rows = self._matrix_rows(i.operands[0], len(sources), mask)
        values = np.stack([self.spread(s, U32)[threads] for s in sources], 1)
        matrices = values.view(U16).reshape(len(threads), len(sources), 8, 8)
        if "trans" in i.op:
            matrices = matrices.swapaxes(2, 3)
        self.put("shared", of_rows, rows, np.ascontiguousarray(matrices).reshape(-1, 8).view(np.uint8))

    def op_mma(self, i: Instruction, mask: Array | None) -> None:
        shape, kinds = i.op[3:6], i.op[6:10]
        if shape != ["m16n8k16", "row", "col"] or kinds[1:3] not in (["f16"] * 2, ["bf16"] * 2) or kinds[0] != "f32":
            raise EmulationError("not emulated")
        threads = self.groups(mask, 32)
        d, a, b, c = i.operands
        n = len(threads)
        a = self.halves(a, kinds[1], threads).reshape(n, 8, 4, 2, 2, 2)  # g, t, half of k, half of the rows, 2 of k
        left = a.transpose(0, 4, 1, 3, 2, 5).reshape(n, 16, 16)
        b = self.halves(b, kinds[2], threads).reshape(n, 8, 4, 2, 2)  # g, t, half of k, 2 of k
        right = b.transpose(0, 3, 2, 4, 1).reshape(n, 16, 8)
        product = np.matmul(left, right).reshape(n, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(n, 32, 4)
        before = np.stack([self.spread(name, F32)[threads] for name in c], -1)
        self.write_each(d, threads, before + product, mask)

    def op_wgmma(self, i: Instruction, mask: Array | None) -> None:
        takes_part = np.ones(self.n, bool) if mask is None else mask
        if i.op[1] == "commit_group":
            self.product_group = self.product_group + takes_part
        elif i.op[1] == "wait_group":
            finished, self.products = _divided(self.products, takes_part, self.product_group - i.operands[0])
            for threads, _, places in finished:
                for of_group in places:
                    self.being_read[of_group] -= 1
                if self.per_block > 128:  # other groups have not waited
                    self.check_read(threads, places, np.array(SEVERAL))
                else:
                    self.read_epoch[places] = NOBODY
        elif i.op[1] == "mma_async":
            self._warp_group_product(i, mask)
        elif i.op[1] != "fence":
            raise EmulationError("not emulated")

    def _warp_group_product(self, i: Instruction, mask: Array | None) -> None:
        M, N, K = map(int, re.fullmatch(r"m(\d+)n(\d+)k(\d+)", i.op[4]).groups())
        d, a, b, keep, *signs_and_order = i.operands
        if (M, K) != (64, 16) or i.op[5] != "f32" or i.op[6] not in ("f16", "bf16") or signs_and_order[:2] != [1, 1]:
            raise EmulationError("not emulated")
        threads = self.groups(mask, 128)
        n = len(threads)

        def matrix(descriptor: str, rows: int, transposed: int) -> Array:
            bits = self.spread(descriptor, np.dtype("u8"))[threads]
            offset = _described(bits[:, 0], rows, bool(transposed)) + self.start[threads[:, 0], None, None]
            places = (offset[..., None] + np.arange(2)).reshape(n, -1)
            first = threads[:, 0]
            self.check_read(first, places, np.array(SEVERAL))
            for of_group in places:  # several groups may read one place
                self.being_read[of_group] += 1
            self.products.append((first, self.product_group[first], places))
            return from_half(self.shared[places].view(U16), i.op[6]).reshape(n, rows, 16)

        if isinstance(a, list):  # warp, g, t, half of k, half of the rows, 2 of k
            values = self.halves(a, i.op[6], threads).reshape(n, 4, 8, 4, 2, 2, 2)
            left = values.transpose(0, 1, 5, 2, 4, 3, 6).reshape(n, 64, 16)
        else:
            left = matrix(a, 64, signs_and_order[-2])
        product = np.matmul(left, matrix(b, N, signs_and_order[-1]).swapaxes(1, 2))
        product = product.reshape(n, 4, 2, 8, N // 8, 4, 2).transpose(0, 1, 3, 5, 4, 2, 6).reshape(n, 128, N // 2)
        before = np.stack([self.spread(name, F32)[threads] for name in d], -1)
        before = np.where(self.spread(keep, PRED)[threads][..., None], before, np.float32(0))
        self.write_each(d, threads, before + product, mask)

    # Single threads

    def op_mov(self, i: Instruction, mask: Array | None) -> None:
        targets, sources = map(_as_list, i.operands)
        from_kind, to_kind = (np.dtype(f"u{TYPES[i.op[1]].itemsize // len(names)}") for names in (sources, targets))
        bits = np.stack([self.spread(source, from_kind) for source in sources], 1).view(to_kind)
        for name, value in zip(targets, np.ascontiguousarray(bits.T), strict=True):
            if name != "_":
                self.write(name, value, mask)

    def op_setp(self, i: Instruction, mask: Array | None) -> None:
        kind, name = TYPES[i.op[-1]], i.op[1]
        a, b = (self.read(o, kind) for o in i.operands[1:3])
        compare = {
            "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
            "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
        }[name[:2]]  # fmt: skip
        result = compare(a, b)
        if kind.kind == "f":
            nan = np.isnan(a) | np.isnan(b)
            result = result | nan if name.endswith("u") else result & ~nan
        if len(i.operands) > 3:
            combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[i.op[2]]
            result = combine(result, self.read(i.operands[3], PRED))
        self.write(i.operands[0], result, mask)

    def op_cvt(self, i: Instruction, mask: Array | None) -> None:
        to, source = i.op[-2:]
        name, *sources = i.operands
        if to in ("bf16x2", "f16x2"):
            high, low = (to_half(self.read(s, F32), to).astype(U32) for s in sources)
            self.write(name, high << 16 | low, mask)
            return
        value = self.read(sources[0], TYPES.get(source, U16))
        if source in ("bf16", "f16"):
            value = from_half(value, source)
        if to in ("bf16", "f16"):
            self.write(name, to_half(value.astype(F32), to), mask)
            return
        kind = TYPES[to]
        if value.dtype.kind == "f" and kind.kind != "f":
            raise EmulationError("not emulated")
        for mode, rounded in {"rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc, "rni": np.rint}.items():
            value = rounded(value) if mode in i.op else value
        self.write(name, value.astype(kind), mask)

    def in_half(self, i: Instruction, mask: Array | None) -> None:
        """Compute half-precision values in float32, and round them."""
        kind, bits = i.op[-1].removesuffix("x2"), U32 if i.op[-1].endswith("x2") else U16
        values = (np.ascontiguousarray(self.spread(o, bits)).view(U16) for o in i.operands[1:])
        with np.errstate(all="ignore"):
            result = ARITHMETIC[i.op[0]]([from_half(value, kind) for value in values], i.op, F32)
        self.write(i.operands[0], to_half(result, kind).view(bits), mask)

    def arithmetic(self, i: Instruction, mask: Array | None) -> None:
        op = i.op
        pairs = op[-1] in ("s16x2", "u16x2", "f16x2", "f32x2")
        mixed = op[-2] == "f32" and op[-1] in ("f16", "bf16")  # all but the last are in half precision
        if op[-1] in ("f16", "bf16", "bf16x2") and op[0] in ("add", "sub", "mul", "fma") and not mixed:
            self.in_half(i, mask)
            return
        kind = F32 if mixed else F16 if op[-1] == "f16x2" else TYPES.get(op[-1].removesuffix("x2"))
        if op[0] not in ARITHMETIC or kind is None or (op[-1].endswith("x2") and not pairs):
            raise EmulationError("not emulated")
        kinds = [kind] * 3
        if op[0] in ("shl", "shr", "bfe"):
            kinds[1:] = [U32, U32]
        elif op[0] == "selp":
            kinds[2] = PRED
        elif op[0] == "mad" and "wide" in op:
            kinds[2] = np.dtype(f"{kind.kind}{2 * kind.itemsize}")
        if pairs:
            both = np.dtype(f"u{2 * kind.itemsize}")
            a = [flush(np.ascontiguousarray(self.spread(o, both)).view(kind), op) for o in i.operands[1:]]
        else:
            a = [flush(self.read(o, k), op) for o, k in zip(i.operands[1:], kinds, strict=False)]
        if mixed:
            a[:-1] = [from_half(self.read(o, U16), op[-1]) for o in i.operands[1:-1]]
        with np.errstate(all="ignore"):
            result = flush(ARITHMETIC[op[0]](a, op, kind), op)
        if "sat" in op:
            result = np.where(np.isnan(result), 0, np.clip(result, 0, 1))
        self.write(i.operands[0], result.astype(kind).view(both) if pairs else result, mask)


def _as_list(operand: Any) -> list[Any]:
    return operand if isinstance(operand, list) else [operand]


def _divided(
    under_way: Sequence[tuple[Array, ...]], takes_part: Array, end: Array
) -> tuple[list[tuple[Array, ...]], list[tuple[Array, ...]]]:
    """Divide asynchronous operations (threads, groups, ...) into those of groups before `end` and those that go on."""
    finished, left = [], []
    for operation in under_way:
        threads, groups, *_ = operation
        done = takes_part[threads] & (groups < end[threads])
        finished.append(tuple(array[done] for array in operation))
        if not done.all():
            left.append(tuple(array[~done] for array in operation))
    return finished, left


def _unsigned(kind: Kind) -> Kind:
    return kind if kind == PRED else np.dtype(f"u{kind.itemsize}")


def _described(bits: Array, rows: int, transposed: bool) -> Array:
    """Return the places in shared memory of wgmma's matrices, `[groups, rows, 16 of k]`; a row is one of M or N."""
    start, leading, stride = (
        ((bits >> np.uint64(s)) & 0x3FFF).astype(np.int64)[:, None, None] * 16 for s in (0, 16, 32)
    )
    mode = int(bits[0] >> np.uint64(62))
    if (bits >> np.uint64(62) != mode).any() or (bits >> np.uint64(49) & 7).any() or mode == 0:
        raise EmulationError("not emulated")
    span = {1: 128, 2: 64, 3: 32}[mode]  # contiguous bytes
    row, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    if transposed:  # neighbors are in different rows
        row, piece = row % (span // 2), row // (span // 2)
        place = start + piece * leading + row * 2 + k // 8 * stride + k % 8 * span
    else:
        place = start + row // 8 * stride + row % 8 * span + k * 2
    return place ^ (place >> 7 & {1: 7, 2: 3, 3: 1}[mode]) << 4


def run(
    ptx: str,
    arguments: Sequence[Any],
    grid: Sequence[int],
    shared: int,
    some: range | None = None,
    kind: Callable[..., Blocks] = Blocks,
) -> None:
    """Run a kernel, or `some` of its blocks, in place on CPU tensors; `shared` is in bytes."""
    program = Program(ptx)
    memory = Memory([a for a in arguments if isinstance(a, torch.Tensor)])
    parameters = {}
    for i, (form, name) in enumerate(program.parameters):
        value = arguments[i] if i < len(arguments) else 0  # scratch memory, which no kernel here uses
        value = memory.address(value) if isinstance(value, torch.Tensor) else value
        parameters[name] = np.array([value]).astype(TYPES[form])[0]
    x, y, z = (*grid, 1, 1)[:3]
    numbers, at_once = some or range(x * y * z), max(1, THREADS // program.threads)
    for first in range(0, len(numbers), at_once):
        kind(program, memory, parameters, (x, y, z), numbers[first : first + at_once], shared).run()
    memory.write_back()


@contextmanager
def emulated(arch: int, launch: Callable[[str, Any, list[Any], Sequence[int]], None] | None = None) -> Iterator[None]:
    """Compile kernels for sm_`arch` and run them, or pass name, kernel, arguments and grid to `launch`."""
    if arch not in ARCHS:
        raise ValueError(f"arch must be one of {', '.join(map(str, ARCHS))}, got {arch}")
    with compiling_for(arch):
        compile_only = JITFunction.run

        def compile_and_run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            kernel = compile_only(self, *args, grid=grid, warmup=warmup, **kwargs)
            given = dict(zip(self.arg_names, args, strict=False)) | kwargs
            arguments = [given[name] for name, kind in kernel.src.signature.items() if kind != "constexpr"]
            if launch is None:
                run(kernel.asm["ptx"], arguments, grid, kernel.metadata.shared)
            else:
                launch(self.__name__, kernel, arguments, grid)
            return kernel

        with mock.patch.object(JITFunction, "run", compile_and_run):
            yield
