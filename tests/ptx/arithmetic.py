"""Arithmetic of PTX instructions on a thread's registers, and rounding to half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Kind = np.dtype[Any]
U16, U32, F16, F32, PRED = (np.dtype(name) for name in ("u2", "u4", "f2", "f4", "?"))


class EmulationError(RuntimeError):
    """An error of the kernel, or something that is not emulated."""


def from_half(bits: Array, kind: str) -> Array:
    return (bits.astype(U32) << 16).view(F32) if kind == "bf16" else bits.view(np.float16).astype(F32)


def to_half(x: Array, kind: str) -> Array:
    """Round to nearest even."""
    if kind.startswith("f16"):
        with np.errstate(over="ignore"):
            return x.astype(np.float16).view(U16)
    bits = np.asarray(x).view(U32).astype(np.uint64)
    return np.where(np.isnan(x), U16.type(0x7FFF), (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(U16))


def flush(x: Array, op: list[str]) -> Array:
    """Flush subnormal numbers to zero if the instruction says so."""
    return np.where(np.abs(x) < F32.type(2.0**-126), F32.type(0), x) if "ftz" in op and x.dtype == F32 else x


def _multiply(a: list[Array], op: list[str], kind: Kind) -> Array:
    if kind.kind == "f" or "lo" in op:
        return a[0] * a[1]
    product = a[0].astype(f"{kind.kind}{2 * kind.itemsize}") * a[1]
    return product if "wide" in op else (product >> 8 * kind.itemsize).astype(kind)


def _divide(a: list[Array], op: list[str], kind: Kind) -> Array:
    if kind.kind == "f":
        return a[0] / a[1]
    x, y = a[0].astype(np.int64), np.where(a[1] == 0, 1, a[1]).astype(np.int64)
    return (np.abs(x) // np.abs(y) * np.sign(x) * np.sign(y)).astype(kind)


def _shift(a: list[Array], op: list[str], kind: Kind) -> Array:
    bits = 8 * kind.itemsize
    by = np.minimum(a[1], bits - 1).astype(kind)
    shifted = a[0] << by if op[0] == "shl" else a[0] >> by
    return shifted if op[0] == "shr" and kind.kind == "i" else np.where(a[1] >= bits, kind.type(0), shifted)


def _field(a: list[Array], op: list[str], kind: Kind) -> Array:
    start, length = (x.astype(np.int64) for x in a[1:])
    value = a[0].astype(np.int64) >> start & ((1 << length) - 1)
    if kind.kind == "i":
        value = value - ((value >> length - 1) << length)
    return value.astype(kind)


def _count_ones(a: list[Array], op: list[str], kind: Kind) -> Array:
    return np.unpackbits(np.ascontiguousarray(a[0]).view(np.uint8).reshape(-1, a[0].itemsize), axis=1).sum(1, kind)


def _permute(a: list[Array], op: list[str], kind: Kind) -> Array:
    both, selector = a[0].astype(np.uint64) | a[1].astype(np.uint64) << 32, a[2].astype(np.uint64)
    result = np.zeros((), np.uint64)
    for byte in range(4):
        choice = selector >> 4 * byte & 15
        if (choice > 7).any():
            raise EmulationError("not emulated")
        result = result | (both >> choice * 8 & 255) << 8 * byte
    return result.astype(kind)


ARITHMETIC: dict[str, Callable[[list[Array], list[str], Kind], Array]] = {
    "add": lambda a, op, kind: a[0] + a[1],
    "sub": lambda a, op, kind: a[0] - a[1],
    "mul": _multiply,
    "mad": lambda a, op, kind: _multiply(a[:2], op, kind) + a[2],
    "fma": lambda a, op, kind: (a[0].astype(np.float64) * a[1] + a[2]).astype(kind),
    "div": _divide,
    "rem": lambda a, op, kind: a[0] - _divide(a, op, kind) * a[1],
    "neg": lambda a, op, kind: -a[0],
    "abs": lambda a, op, kind: np.abs(a[0]),
    "min": lambda a, op, kind: (np.minimum if "NaN" in op else np.fmin)(a[0], a[1]),
    "max": lambda a, op, kind: (np.maximum if "NaN" in op else np.fmax)(a[0], a[1]),
    "and": lambda a, op, kind: a[0] & a[1],
    "or": lambda a, op, kind: a[0] | a[1],
    "xor": lambda a, op, kind: a[0] ^ a[1],
    "not": lambda a, op, kind: ~a[0],
    "shl": _shift,
    "shr": _shift,
    "bfe": _field,
    "popc": _count_ones,
    "prmt": _permute,
    "selp": lambda a, op, kind: np.where(a[2], a[0], a[1]),
    "ex2": lambda a, op, kind: np.exp2(a[0]),
    "sqrt": lambda a, op, kind: np.sqrt(a[0]),
    "rsqrt": lambda a, op, kind: 1 / np.sqrt(a[0]),
}
