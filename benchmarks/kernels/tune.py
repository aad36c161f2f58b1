"""Find the fastest launch settings of every kernel on this GPU and write them as a settings file.

    python -m benchmarks.kernels.tune [--only NAME ...] [--minutes 9] [--output FILE.json]

The default output is `triton_kernels/tuned_<device>.json`, which the kernels use from then on. Launchers run with the
arguments of model small at 1024 x 1024 in bfloat16, for one image and for 16; `mask_edges` gets 64 masks. `<op>.large`
is tuned for 16 images, and `<op>` then for one. Compilation dominates, so all cores compile candidates ahead. The
smallest time per image wins among those that compile in time and are right to rounding. At the time limit the remaining
settings stay as they are. float32 is not tuned.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, wait
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.operator_calls import (
    LAUNCHERS,
    MASKS_OF,
    Call,
    elsewhere,
    mask_edges_calls,
    outputs_of,
    recorded_calls,
)
from benchmarks.speed.timing import graph_samples
from fastsam_rwkv.triton_kernels.launch_config import (
    LaunchConfig,
    Settings,
    default_settings,
    device_file,
    launch_config,
    tuned_settings,
)

COMPILING = 0.6  # share of the time for compiling ahead
MODEL = "small", 1024
LARGE_BATCH = 16  # images
IN_TURN = 3  # copies of the inputs, so that L2 does not hold them from the last call
Candidates = Mapping[str, tuple[str, list[Settings]]]
Launch = Callable[..., Any]


def _grid(**choices: tuple[int, ...]) -> list[Settings]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def _scans(most: int, **choices: tuple[int, ...]) -> list[Settings]:
    """Settings of the scan with at most `most` values per thread, and a channel of a segment at least."""
    return [
        s for s in _grid(**choices) if 1 <= s["SEGMENTS"] * s["BLOCK_C"] / (32 * s["num_warps"]) <= most / s["LENGTH"]
    ]


_mix = _grid(BLOCK_C=(64, 128), num_warps=(4, 8), maxnreg=(128, 168, 255))
_project = [
    s for s in _grid(PIXELS=(2, 4), LINES=(4,), BLOCK_M=(64, 128), BLOCK_N=(64, 128), BLOCK_D=(32, 64),
                     num_warps=(4, 8), num_stages=(1,), maxnreg=(128, 168, 255))
    if s["BLOCK_M"] // s["PIXELS"] * s["BLOCK_D"] >= 4 * 32 * s["num_warps"]  # four channels per thread
]  # fmt: skip
_linear = partial(_grid, BLOCK_K=(64,), num_stages=(2, 3, 4), maxnreg=(255,))
# By name of the settings: the operators they serve, and what to try
CANDIDATES: Candidates = {
    "attention": ("attention", _grid(
        BLOCK_T=(64, 128), BLOCK_S=(64, 128, 256), PROGRAMS=(132, 264), num_warps=(4, 8), num_stages=(1, 2))),
    "bi_wkv": ("bi_wkv", [
        *_scans(32, SEGMENTS=(4, 8, 16), LENGTH=(8, 16), BLOCK_C=(16, 32, 64), BLOCK_N=(16, 32), num_warps=(2, 4, 8),
                maxnreg=(168, 255)),
        # one warp: no shared memory and no barriers
        *_scans(32, SEGMENTS=(4, 8), LENGTH=(8, 16), BLOCK_C=(8, 16), BLOCK_N=(16, 32), num_warps=(1,),
                maxnreg=(168, 255))]),
    "bi_wkv.large": ("bi_wkv", [
        s for s in _scans(  # few, because 32 tokens per thread compile for 20 s
            64, SEGMENTS=(4, 8, 16), LENGTH=(16, 32), BLOCK_C=(32,), BLOCK_N=(32,), num_warps=(2, 4, 8),
            maxnreg=(168, 255))
        if s["SEGMENTS"] * s["LENGTH"] * s["BLOCK_N"] >= 4096  # else the calls use other settings
        and (s["maxnreg"] == 255 or s["LENGTH"] == 16)]),  # 32 tokens per thread need more registers
    "norm_shift_mix": ("norm_shift_mix", _mix),
    "norm_shift_mix.large": ("norm_shift_mix", _mix),
    "fused_linear": ("fused_linear gated_key", _linear(
        BLOCK_M=(64, 128), BLOCK_N=(64, 128), BLOCKS=(1,), PARTS=(1, 4), num_warps=(4, 8))),
    "fused_linear.large": ("fused_linear gated_key", [
        *_linear(BLOCK_M=(128, 256), BLOCK_N=(128, 256), BLOCKS=(1,), PARTS=(1, 4), num_warps=(4, 8)),
        *_linear(BLOCK_M=(128,), BLOCK_N=(64, 128), BLOCKS=(2, 3), PARTS=(4,), num_warps=(8,), num_stages=(2, 3))]),
    "mbconv_expand": ("mbconv", _grid(
        BLOCK_M=(64, 128), BLOCK_D=(64, 128), BLOCK_C=(64,), num_warps=(4, 8), num_stages=(1, 2, 3), maxnreg=(255,))),
    "mbconv_project": ("mbconv", _project),
    "mbconv_halve": ("mbconv", _project),
    "conv_norm": ("conv_norm stem", _grid(
        BLOCK_M=(64, 128), BLOCK_N=(64, 128), BLOCK_C=(32, 64), WIDE_M=(64,), CACHED=(0, 1), num_warps=(4, 8),
        num_stages=(2, 3, 4), maxnreg=(255,))),
    "conv_norm_input": ("conv_norm", _grid(BLOCK_M=(4, 8, 16), BLOCK_C=(64, 128), num_warps=(1, 2, 4))),
    "linears": ("linears", _grid(
        BLOCK_M=(32, 64, 128), BLOCK_N=(32, 64, 128), BLOCK_K=(64, 128), num_warps=(4, 8), num_stages=(2, 3),
        maxnreg=(255,))),
    "mask_product": ("mask_product", _grid(BLOCK_P=(64, 128, 256), num_warps=(4, 8), num_stages=(1, 2, 3))),
    "prompt_tokens": ("prompt_tokens", _grid(num_warps=(1, 2, 4))),
    "mask_edges": ("mask_edges", _grid(BLOCK_W=(32, 64, 128), num_warps=(1, 2, 4))),
    "stem": ("stem", _grid(VALUES=(4096, 8192, 16384), num_warps=(2, 4, 8))),
    "upscale": ("upscale", _grid(
        BLOCK_M=(64, 128, 256), BLOCK_C=(32, 64), num_warps=(4, 8), num_stages=(1, 2, 3))),
}  # fmt: skip


def tune(device: torch.device, seconds: float, candidates: Candidates, file: Path) -> None:
    """Write the best settings to `file`, and print for each name the microseconds per image before and after.

    Start from the device's settings file; an entry is replaced by faster settings only. The file is written after each
    name, because a run may be cut off.

    Raises:
        RuntimeError: The present settings fail on this device, or a candidate has left it unusable.
    """
    end, config = time.monotonic() + seconds, launch_config(device)
    ready = compile_ahead(config.arch, COMPILING * seconds, candidates, os.cpu_count() or 1)
    counts = ", ".join(f"{name} {len(trials)} of {len(candidates[name][1])}" for name, trials in ready.items())
    print(f"compiled in {seconds - (end - time.monotonic()):.0f} s: {counts}", flush=True)
    recorded = {batch: calls_of(batch, device) for batch in (1, LARGE_BATCH)}
    chosen = {"device": {}} | tuned_settings(torch.cuda.get_device_name(device))
    chosen["device"] = {"architecture": config.arch}  # for which alone the compile report checks the settings
    for place, (name, trials) in enumerate(ready.items()):
        share = time.monotonic() + (end - time.monotonic()) / (len(candidates) - place)
        operators = candidates[name][0].split()
        calls = [
            ([partial(LAUNCHERS[op], *(elsewhere(args) if i else args)) for i in range(IN_TURN)], times / batch)
            for batch in batches_of(name)
            for op, _, args, times in recorded[batch]
            if op in operators
        ]
        with torch.inference_mode():
            present = config.with_settings(chosen)
            want = [in_turn[0](config=present) for in_turn, _ in calls]
            before = best = _microseconds(calls, want, float("inf"), present)
            if before == float("inf"):
                raise RuntimeError(f"{', '.join(operators)} does not run on {device} with the present settings")
            for trial in trials:
                if time.monotonic() > share:
                    break
                total = _microseconds(calls, want, best, present.with_settings({name: trial}))
                if total < 0.98 * best:  # smaller differences are noise
                    best, chosen[name] = total, trial
        lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in chosen.items())
        file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        print(f"{name:24} {before:9.2f} us to {best:9.2f} us  {chosen.get(name, 'unchanged')}", flush=True)


def batches_of(name: str) -> tuple[int, ...]:
    """Batches whose calls use the settings of this name."""
    if name.endswith(".large"):
        return (LARGE_BATCH,)
    return (1,) if f"{name}.large" in default_settings() else (1, LARGE_BATCH)


def compile_ahead(
    architecture: int, seconds: float, candidates: Candidates, processes: int
) -> dict[str, list[Settings]]:
    """Compile candidates into Triton's cache on disk, in several processes, without a GPU.

    Returns:
        By name, the candidates that were compiled in time and fit in shared memory.
    """
    jobs = [(name, trial) for name, (_, settings) in candidates.items() for trial in settings]
    random.Random(0).shuffle(jobs)  # every operator gets a share of the time
    ready: dict[str, list[Settings]] = {name: [] for name in candidates}
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
    futures = {
        pool.submit(_compiles, candidates[name][0], name, trial, architecture): (name, trial) for name, trial in jobs
    }
    done, _ = wait(futures, timeout=seconds)
    pool.shutdown(wait=False, cancel_futures=True)
    for future in done:
        if not future.exception() and future.result():
            name, trial = futures[future]
            ready[name].append(trial)
    return ready


@cache
def calls_of(batch: int, device: torch.device) -> list[Call]:
    """Return the calls to tune: of the model, and of `mask_edges` beside a batch of one."""
    calls = recorded_calls(*MODEL, batch, device, int(batch == 1))
    return calls + mask_edges_calls(device, MASKS_OF) if batch == 1 else calls


def _compiles(operators: str, name: str, trial: Settings, architecture: int) -> bool:
    from benchmarks.kernels.compile_report import SHARED_LIMIT, compiling_for

    config = LaunchConfig(default_settings() | {name: trial}, architecture)
    try:
        with compiling_for(architecture) as kernels:
            for batch in batches_of(name):
                for operator, _, args, _ in calls_of(batch, torch.device("meta")):
                    if operator in operators.split():
                        LAUNCHERS[operator](*args, config=config)
    except Exception:  # Triton and ptxas raise different errors
        return False
    limit = SHARED_LIMIT.get(architecture, min(SHARED_LIMIT.values()))
    return all(kernel.metadata.shared <= limit for _, kernel in kernels)


def _microseconds(
    calls: list[tuple[list[Launch], float]], want: list[Any], limit: float, config: LaunchConfig
) -> float:
    """Time all calls per image; infinite if settings do not compile, do not fit, are wrong, or exceed the limit."""
    total = 0.0
    for (in_turn, times), expected in zip(calls, want, strict=True):
        try:
            got = in_turn[0](config=config)
            pairs = zip(outputs_of(got), outputs_of(expected), strict=True)
            if not all((a - b).float().norm() <= 0.02 * b.float().norm() for a, b in pairs):  # also false for NaN
                return float("inf")
            total += times * statistics.median(
                graph_samples([partial(launch, config=config) for launch in in_turn], rep=1)
            )
        except Exception:  # Triton, the driver and PyTorch raise different errors
            torch.cuda.synchronize()  # raises again if the device is unusable
            return float("inf")
        if total > limit:
            return float("inf")
    return total


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES), metavar="NAME")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("tuning needs a CUDA device")
    file = options.output or device_file(torch.cuda.get_device_name())
    tune(torch.device("cuda"), 60 * options.minutes, {name: CANDIDATES[name] for name in options.only}, file)
    print(f"{file}: check it with `python -m benchmarks.kernels.compile_report`", file=sys.stderr)


if __name__ == "__main__":
    main()
