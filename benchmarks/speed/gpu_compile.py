"""Compiling ahead for the GPU suite: on the GPU's machine, or before on any other."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.operator_calls import LAUNCHERS, recorded_calls
from benchmarks.speed.gpu_records import triton_key
from benchmarks.speed.gpu_rows import ENCODER_CASES, PROMPTS, SCAN_SHAPES, TUNED
from fastsam_rwkv.triton_kernels.launch_config import LaunchConfig, default_settings

KEY_FILE = "fastsam_rwkv.json"  # in a cache: what compiled it


def compile_only(folder: Path, architecture: int, minutes: float) -> None:
    """Fill a Triton cache with the kernels of the rows and of the settings to tune, for `use_cache`."""
    from benchmarks.kernels import tune

    folder.mkdir(parents=True, exist_ok=True)
    (folder / KEY_FILE).write_text(json.dumps({"triton_key": triton_key(), "architecture": architecture}) + "\n")
    os.environ["TRITON_CACHE_DIR"] = str(folder.resolve())
    end, processes = time.monotonic() + 60 * minutes, os.cpu_count() or 1
    compile_ahead(architecture, processes)
    candidates = {name: tune.CANDIDATES[name] for name in TUNED}
    ready = tune.compile_ahead(architecture, max(0.0, end - time.monotonic()), candidates, processes)
    for name, trials in ready.items():
        print(f"{name}: {len(trials)} of {len(candidates[name][1])} candidates compiled and fit")


def use_cache(folder: Path, architecture: int) -> None:
    """Let Triton look in a cache made by `compile_only`.

    Raises:
        SystemExit: There is no such cache, or another Triton or architecture made it.
    """
    file, mine = folder / KEY_FILE, {"triton_key": triton_key(), "architecture": architecture}
    if not file.is_file():
        raise SystemExit(f"--cache: {str(folder)!r} has no {KEY_FILE}; make the cache with --compile-only")
    made = json.loads(file.read_text())
    for what, here in mine.items():
        if made.get(what) != here:
            raise SystemExit(f"--cache: {str(folder)!r} was compiled with {what} {made.get(what)}, here it is {here}")
    os.environ["TRITON_CACHE_DIR"] = str(folder.resolve())


def compile_ahead(architecture: int, processes: int) -> None:
    """Compile the kernels of the rows into Triton's cache on disk, in several processes, without a GPU."""
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        cases: list[tuple[Any, ...]] = [(*case, 1) for case in ENCODER_CASES]
        cases += [("small", 1024, 1, prompts) for prompts in PROMPTS]
        for case in cases:  # one that fails will fail again as a row
            pool.submit(_compile, architecture, *case)
        for shape in SCAN_SHAPES:
            pool.submit(_compile_scan, architecture, *shape)


def _compile(architecture: int, variant: str, size: int, batch: int, prompts: int) -> None:
    from benchmarks.kernels.compile_report import compiling_for

    config = LaunchConfig(default_settings(), architecture)
    calls = recorded_calls(variant, size, batch, torch.device("meta"), prompts=prompts * (batch == 1))
    with compiling_for(architecture):
        for name, _, args, _ in calls:
            LAUNCHERS[name](*args, config=config)


def _compile_scan(architecture: int, B: int, T: int, C: int) -> None:
    from benchmarks.kernels.compile_report import compiling_for

    vector, values = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((C,), (B, T, C)))
    with compiling_for(architecture):
        for r in (values, None):
            config = LaunchConfig(default_settings(), architecture)
            LAUNCHERS["bi_wkv"](vector, vector, values, values, r, 1 / T, config=config)
