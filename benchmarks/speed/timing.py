"""Fair timings on a machine that is not quiet: candidates take turns, so that drift hits all alike."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch


class Row(NamedTuple):
    """Times of one candidate, in seconds.

    Attributes:
        name: the candidate's.
        median, min: over the rounds.
        spread: interquartile range.
        repeats: number of rounds.
        samples: the time of each round; round i of one candidate ran right beside round i of every other.
    """

    name: str
    median: float
    min: float
    spread: float
    repeats: int
    samples: tuple[float, ...]


def machine(device: str | torch.device = "cpu") -> dict[str, str | int]:
    """What a timing was taken on."""
    device = torch.device(device)
    return {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def compare(candidates: Mapping[str, Callable[[], object]], repeats: int = 5, warmup: int = 1) -> list[Row]:
    """Time candidates in turn, round after round.

    Args:
        candidates: name to a function without arguments. What it returns is dropped after the clock has stopped.
        repeats: timed rounds, at least 1.
        warmup: rounds before them that do not count.

    Raises:
        ValueError: repeats or warmup is out of range.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(-warmup, repeats):
        for name, function in candidates.items():
            _synchronize()
            start = time.perf_counter()
            result = function()
            _synchronize()
            seconds = time.perf_counter() - start
            del result
            if turn >= 0:
                samples[name].append(seconds)
    return [summarize(name, times) for name, times in samples.items()]


def summarize(name: str, samples: Sequence[float]) -> Row:
    """The row of a candidate whose rounds took `samples` seconds."""
    lower, _, upper = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return Row(name, statistics.median(samples), min(samples), upper - lower, len(samples), tuple(samples))


def ratios(numerator: Row, denominator: Row) -> tuple[float, float, float]:
    """Median, smallest and largest quotient of two candidates within a round."""
    quotients = [a / b for a, b in zip(numerator.samples, denominator.samples, strict=True)]
    return statistics.median(quotients), min(quotients), max(quotients)


def table(rows: Sequence[Row]) -> str:
    """Rows as text, in milliseconds."""
    width = max([len(row.name) for row in rows], default=0)
    lines = [f"{'':{width}}  {'median ms':>10}  {'min ms':>10}  {'spread ms':>10}  {'repeats':>7}"]
    for row in rows:
        times = "  ".join(f"{1000 * seconds:10.2f}" for seconds in (row.median, row.min, row.spread))
        lines.append(f"{row.name:{width}}  {times}  {row.repeats:7}")
    return "\n".join(lines)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
