"""Timings on a machine that is not quiet: candidates take turns, so that drift affects all alike."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastsam_rwkv


class Row(NamedTuple):
    """Times of one candidate, in seconds."""

    name: str
    median: float
    min: float
    spread: float  # interquartile range
    repeats: int  # number of rounds
    samples: tuple[float, ...]  # round i of every candidate ran side by side


def machine(device: str | torch.device = "cpu") -> dict[str, str | int]:
    """Describe the machine of a timing: platform, CPU, device and versions."""
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


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def source_files() -> list[Path]:
    """List the package's sources and launch settings, whose digest identifies the code that was measured."""
    package = Path(fastsam_rwkv.__file__).parent
    folders = (package, *(package / name for name in ("modeling", "predictor", "triton_kernels")))
    return [file for folder in folders for ending in ("py", "json") for file in sorted(folder.glob(f"*.{ending}"))]


def compare(candidates: Mapping[str, Callable[[], object]], repeats: int = 5) -> dict[str, Row]:
    """Time candidates in turn, round after round, after one round that does not count; return their rows by name.

    Raises:
        ValueError: `repeats` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(-1, repeats):
        for name, function in candidates.items():
            start = time.perf_counter()
            result = function()
            seconds = time.perf_counter() - start
            del result
            if turn >= 0:
                samples[name].append(seconds)
    return {name: summarize(name, times) for name, times in samples.items()}


def summarize(name: str, samples: Sequence[float]) -> Row:
    """Return the row of a candidate whose rounds took `samples` seconds."""
    lower, _, upper = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return Row(name, statistics.median(samples), min(samples), upper - lower, len(samples), tuple(samples))


def ratio(numerator: Row, denominator: Row) -> dict[str, Any]:
    """Divide the times of two candidates round by round; return median, smallest and largest quotient."""
    quotients = [a / b for a, b in zip(numerator.samples, denominator.samples, strict=True)]
    what = f"{numerator.name} / {denominator.name}"
    return {"what": what, "median": statistics.median(quotients), "min": min(quotients), "max": max(quotients)}


def table(rows: Sequence[Row]) -> str:
    """Format rows, in milliseconds."""
    width = max([len(row.name) for row in rows], default=0)
    lines = [f"{'':{width}}  {'median ms':>10}  {'min ms':>10}  {'spread ms':>10}  {'repeats':>7}"]
    for row in rows:
        times = "  ".join(f"{1000 * seconds:10.2f}" for seconds in (row.median, row.min, row.spread))
        lines.append(f"{row.name:{width}}  {times}  {row.repeats:7}")
    return "\n".join(lines)


def cpu_parser(module: str, description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of all CPU timings."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    return parser


def report(setting: dict[str, Any], rows: dict[str, Row], compared: list[dict[str, Any]], out: Path | None) -> None:
    """Print rows and their quotients, each with its goal if it has one, and write them to `out`."""
    print("  ".join(f"{key}: {value}" for key, value in setting.items()))
    print(table(list(rows.values())))
    for entry in compared:
        goal = f"  goal {entry['goal']}: {'met' if entry['met'] else 'missed'}" if entry.get("goal") else ""
        print(f"{entry['what']:44} {entry['median']:7.3f}  ({entry['min']:.3f} to {entry['max']:.3f}){goal}")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        results = {"machine": setting, "rows": [row._asdict() for row in rows.values()], "compared": compared}
        out.write_text(json.dumps(results, indent=1) + "\n")
