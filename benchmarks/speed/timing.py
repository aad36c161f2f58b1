"""Timings on a machine that is not quiet: candidates take turns, so that drift affects all alike."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastsam_rwkv


def machine(device: str | torch.device = "cpu") -> dict[str, str | int]:
    """Describe the machine of a timing: platform, CPU, device and versions."""
    device, info = torch.device(device), Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return {
        "platform": platform.platform(),
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def source_files() -> list[Path]:
    """List the package's sources and launch settings, whose digest identifies the code that was measured."""
    package = Path(fastsam_rwkv.__file__).parent
    folders = (package, *(package / name for name in ("modeling", "predictor", "triton_kernels")))
    return [file for folder in folders for ending in ("py", "json") for file in sorted(folder.glob(f"*.{ending}"))]


def compare(candidates: Mapping[str, Callable[[], object]], repeats: int = 5) -> dict[str, list[float]]:
    """Time candidates in turn, round after round, after one round that does not count; return their seconds by name."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(-1, repeats):
        for name, function in candidates.items():
            start = time.perf_counter()
            result = function()
            seconds = time.perf_counter() - start
            del result
            if turn >= 0:
                samples[name].append(seconds)
    return samples


def ratio(
    rows: Mapping[str, Sequence[float]], numerator: str, denominator: str, at_least: float | None = None
) -> dict[str, Any]:
    """Divide the times of two candidates round by round; return median, smallest and largest quotient, and its goal."""
    quotients = [a / b for a, b in zip(rows[numerator], rows[denominator], strict=True)]
    median = statistics.median(quotients)
    found = {"what": f"{numerator} / {denominator}", "median": median, "min": min(quotients), "max": max(quotients)}
    return found if at_least is None else found | {"goal": f">= {at_least}", "met": median >= at_least}


def graph_samples(calls: Sequence[Callable[[], object]], rep: int = 20) -> list[float]:
    """Time a CUDA graph that repeats `calls`, for about `rep` ms; return samples of one call in microseconds."""
    from triton.testing import do_bench_cudagraph

    def all_calls() -> None:
        for call in calls:
            call()

    times: Any = do_bench_cudagraph(all_calls, rep=rep, return_mode="all")
    return [1e3 * milliseconds / len(calls) for milliseconds in times]


def cpu_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of all CPU timings."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    return parser


def report(
    options: argparse.Namespace, rows: dict[str, list[float]], compared: list[dict[str, Any]], **more: Any
) -> None:
    """Print rows and their quotients, each with its goal if it has one, and write them to `options.out`."""
    setting = machine() | {"image_size": options.image_size, "dtype": "float32"} | more
    print("  ".join(f"{key}: {value}" for key, value in setting.items()))
    results: dict[str, Any] = {"machine": setting, "rows": [], "compared": compared}
    for name, samples in rows.items():
        lower, median, upper = np.percentile(samples, (25, 50, 75)).tolist()
        row = {"name": name, "median": median, "min": min(samples), "spread": upper - lower, "repeats": len(samples)}
        results["rows"].append(row | {"samples": samples})
        print(f"{name:44} {1e3 * median:9.2f} ms  least {1e3 * min(samples):.2f}  spread {1e3 * (upper - lower):.2f}")
    for entry in compared:
        goal = f"  goal {entry['goal']}: {'met' if entry['met'] else 'missed'}" if "goal" in entry else ""
        print(f"{entry['what']:44} {entry['median']:7.3f}  ({entry['min']:.3f} to {entry['max']:.3f}){goal}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
