"""Find the fastest launch settings of every kernel on this card and write them as a settings file.

    python -m benchmarks.tune [--only NAME ...] [--minutes 9] [--output FILE.json]

The default output is `triton_kernels/tuned_<device>.json`, which the kernels use from then on. Each operator runs with
the arguments that model small gives it at 1024 x 1024, in bfloat16, batch 1 (4 for `<op>.large`), under every candidate
that compiles and is right to rounding; the smallest sum of times over the model's calls wins. Nearly all of the time is
the compiler's, so candidates are compiled ahead, by as many processes as there are cores. What is left at the time
limit keeps the default. float32 is not tuned.
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
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.operator_calls import recorded_calls
from fastsam_rwkv.triton_kernels.tuning import device_file, override, shipped_settings

Settings = dict[str, int]
MOST_PROCESSES = 12  # each holds an encoding's maps in the card's memory
COMPILING = 0.6  # share of the time in which to compile ahead


def _grid(**choices: tuple[int, ...]) -> Iterator[Settings]:
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


# settings name: the operators whose calls it serves, and what to try
CANDIDATES: dict[str, tuple[str, list[Settings]]] = {
    "attention": (
        "attention",
        list(_grid(BLOCK_T=(64, 128), BLOCK_S=(64, 128, 256), PROGRAMS=(132, 264), num_warps=(4, 8),
                   num_stages=(1, 2))),
    ),
    "bi_wkv": (
        "bi_wkv",
        [
            s
            for s in _grid(
                SEGMENTS=(4, 8, 16), LENGTH=(8, 16), BLOCK_C=(16, 32, 64), BLOCK_N=(16, 32), num_warps=(2, 4, 8),
                maxnreg=(168, 255),
            )
            if 1 <= s["SEGMENTS"] * s["BLOCK_C"] / (32 * s["num_warps"]) <= 32 / s["LENGTH"]  # 32 values a thread
        ],
    ),
    "bi_wkv.large": (
        "bi_wkv",
        [
            s
            for s in _grid(
                SEGMENTS=(2, 4, 8, 16), LENGTH=(16, 32), BLOCK_C=(16, 32, 64), BLOCK_N=(32, 64), num_warps=(1, 2, 4, 8),
                maxnreg=(168, 255),
            )
            if 1 <= s["SEGMENTS"] * s["BLOCK_C"] / (32 * s["num_warps"]) <= 64 / s["LENGTH"]  # 64 values a thread
            and s["SEGMENTS"] * s["LENGTH"] * s["BLOCK_N"] >= 4096  # else they do not serve the calls they are timed on
            and (s["maxnreg"] == 255 or s["LENGTH"] == 16)  # 32 tokens a thread need more
        ],
    ),
    **{
        name: (
            "norm_shift_mix",
            list(_grid(BLOCK_C=(64, 128), num_warps=(4, 8), maxnreg=(128, 168, 255))),
        )
        for name in ("norm_shift_mix", "norm_shift_mix.large")
    },
    **{
        name: (
            "fused_linear",
            list(
                _grid(
                    BLOCK_M=rows, BLOCK_N=columns, BLOCK_K=(64,), BLOCKS=(1,), PARTS=(1, 4), num_warps=(4, 8),
                    num_stages=(2, 3, 4), maxnreg=(255,),
                )
            )
            + list(
                _grid(
                    BLOCK_M=(128,), BLOCK_N=(64, 128), BLOCK_K=(64,), BLOCKS=wider, PARTS=(4,), num_warps=(8,),
                    num_stages=(2, 3), maxnreg=(255,),
                )
            ),
        )
        for name, rows, columns, wider in (
            ("fused_linear", (64, 128), (64, 128), ()),
            ("fused_linear.large", (128, 256), (128, 256), (2, 3)),
        )
    },
    "mbconv_expand": (
        "mbconv",
        list(
            _grid(
                BLOCK_M=(64, 128), BLOCK_D=(64, 128), BLOCK_C=(64,), num_warps=(4, 8), num_stages=(1, 2, 3),
                maxnreg=(255,),
            )
        ),
    ),
    **{
        name: (
            "mbconv",
            [
                s
                for s in _grid(
                    PIXELS=(2, 4), LINES=(4,), BLOCK_M=(64, 128), BLOCK_N=(64, 128), BLOCK_D=(32, 64),
                    num_warps=(4, 8), num_stages=(1,), maxnreg=(128, 168, 255),
                )
                if s["BLOCK_M"] // s["PIXELS"] * s["BLOCK_D"] >= 4 * 32 * s["num_warps"]  # four channels a thread
            ],
        )
        for name in ("mbconv_project", "mbconv_halve")  # the second kernel with stride 1 and 2
    },
    "conv_norm": (
        "conv_norm stem",
        list(
            _grid(
                BLOCK_M=(64, 128), BLOCK_N=(64, 128), BLOCK_C=(32, 64), WIDE_M=(64,), CACHED=(0, 1), num_warps=(4, 8),
                num_stages=(2, 3, 4), maxnreg=(255,),
            )
        ),
    ),
    "conv_norm_input": (
        "conv_norm",
        list(_grid(BLOCK_M=(4, 8, 16), BLOCK_C=(64, 128), num_warps=(1, 2, 4))),
    ),
    "stem": ("stem", list(_grid(VALUES=(4096, 8192, 16384), num_warps=(2, 4, 8)))),
    "upscale": (
        "upscale",
        list(_grid(BLOCK_M=(64, 128, 256), BLOCK_C=(32, 64), num_warps=(4, 8), num_stages=(1, 2, 3))),
    ),
}  # fmt: skip
MODEL = {"cuda": ("small", 1024), "cpu": ("tiny", 64)}  # whose calls are timed; a CPU tries the procedure out
LARGE_BATCH = 4  # images, for settings named `.large`


def tune(
    device: torch.device,
    seconds: float,
    candidates: dict[str, tuple[str, list[Settings]]] | None = None,
    keep: Callable[[dict[str, Settings]], None] = lambda chosen: None,
) -> tuple[dict[str, Settings], dict[str, dict[str, float]]]:
    """The best settings found within the time, and for each name the microseconds before and with the best.

    What the device's settings file holds already is where it starts from, and stays unless something is faster. `keep`
    is given what was chosen after each name: a run may be cut off.

    Raises:
        RuntimeError: the settings there are fail on this device.
    """
    candidates = CANDIDATES if candidates is None else candidates
    on_gpu = device.type == "cuda"
    end = time.monotonic() + seconds
    calls = _calls_for(device)
    if on_gpu:
        jobs = sum(len(settings) for _, settings in candidates.values())
        done = compile_ahead(device, COMPILING * seconds, candidates, min(MOST_PROCESSES, os.cpu_count() or 1))
        print(f"{done} of {jobs} candidates compiled and ran, {seconds - (end - time.monotonic()):.0f} s", flush=True)
    shipped = shipped_settings()
    tuned = device_file(torch.cuda.get_device_name(device)).stem if on_gpu else ""
    chosen: dict[str, Settings] = dict(shipped.get(tuned, {}))
    table: dict[str, dict[str, float]] = {}
    for place, (name, (operators, settings)) in enumerate(candidates.items()):
        share = time.monotonic() + (end - time.monotonic()) / (len(candidates) - place)
        mine = _bound(calls[name.endswith(".large")], operators)
        with torch.inference_mode(), override(chosen):
            want = [call() for call, _ in mine]
            before = best = _try(mine, want, float("inf"), on_gpu)
            if before == float("inf"):
                raise RuntimeError(f"{operators} does not run on {device} with the settings there are")
            for trial in settings:
                if time.monotonic() > share:
                    break
                with override({name: trial}):
                    total = _try(mine, want, best, on_gpu)
                if total < 0.98 * best:  # what is within the noise stays as it was
                    best, chosen[name] = total, trial
        table[name] = {"before_us": before, "best_us": best}
        keep(chosen)
        print(f"{name:24} {before:9.2f} us to {best:9.2f} us  {chosen.get(name, 'as it was')}", flush=True)
    return chosen, table


def compile_ahead(
    device: torch.device, seconds: float, candidates: dict[str, tuple[str, list[Settings]]], processes: int
) -> int:
    """Run candidates once each, in processes side by side, which leaves their binaries in Triton's cache on disk.

    Returns:
        How many ran. The others do not compile or do not fit, or their turn did not come within the time: they are
        compiled when they are timed.
    """
    jobs = [(operators, name, trial) for name, (operators, settings) in candidates.items() for trial in settings]
    random.Random(0).shuffle(jobs)  # should the time not do for all, every operator has had some of it
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _record, (device,)) as pool:
        futures = [pool.submit(_runs, *job) for job in jobs]
        wait(futures, timeout=seconds)
        pool.shutdown(cancel_futures=True)
    return sum(f.result() for f in futures if f.done() and not f.cancelled() and f.exception() is None)


def _calls_for(device: torch.device) -> dict[bool, list[tuple[str, str, tuple[Any, ...], int]]]:
    """The operators' calls for one image and one prompt, and for a large batch."""
    model = MODEL[device.type]
    return {False: recorded_calls(*model, 1, device, prompts=1), True: recorded_calls(*model, LARGE_BATCH, device)}


_calls: dict[bool, list[tuple[str, str, tuple[Any, ...], int]]] = {}  # of a process that compiles ahead


def _bound(
    calls: list[tuple[str, str, tuple[Any, ...], int]], operators: str
) -> list[tuple[Callable[[], Tensor], int]]:
    """Those of the calls that are of one of the operators, and how many of each there are."""
    functions = {name: getattr(torch.ops.fastsam_rwkv, name) for name in operators.split()}
    return [(partial(functions[name], *args), times) for name, _, args, times in calls if name in functions]


def _record(device: torch.device) -> None:
    _calls.update(_calls_for(device))


def _runs(operators: str, name: str, trial: Settings) -> bool:
    try:
        with torch.inference_mode(), override({name: trial}):
            for call, _ in _bound(_calls[name.endswith(".large")], operators):
                call()
        return True
    except Exception:  # each library has its own for what does not fit; timing finds out again, in _try
        return False


def _try(calls: list[tuple[Callable[[], Tensor], int]], want: list[Tensor], limit: float, on_gpu: bool) -> float:
    """Microseconds of all calls; infinite where settings do not compile, do not fit, are wrong, or exceed the limit."""
    total = 0.0
    for (call, times), expected in zip(calls, want, strict=True):
        try:
            got = call()
            if not (got - expected).float().norm() <= 0.02 * expected.float().norm():  # a NaN is wrong, too
                return float("inf")
            total += times * _time(call, on_gpu)
        except Exception as error:  # Triton, the driver and PyTorch each have their own for what does not fit
            if "illegal memory access" in str(error):  # nothing that follows on this device can be trusted
                raise
            return float("inf")
        if total > limit:
            return float("inf")
    return total


def _time(call: Callable[[], object], on_gpu: bool, launches: int = 10, repeats: int = 9) -> float:
    call()
    if not on_gpu:
        start = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - start)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            call()
    samples = []
    for _ in range(repeats):
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        graph.replay()
        end_event.record()
        torch.cuda.synchronize()
        samples.append(1e3 * start_event.elapsed_time(end_event) / launches)
    return statistics.median(samples)


def of_this_card(settings: dict[str, Settings]) -> dict[str, Settings]:
    """With the architecture they are for, the only one that the compile report then holds them to."""
    major, minor = torch.cuda.get_device_capability()
    return {"device": {"architecture": 10 * major + minor}} | settings


def dumps(settings: dict[str, Settings]) -> str:
    """As the settings files are written: one operator a line."""
    return "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in settings.items()) + "\n}\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES), metavar="NAME")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("tuning needs a CUDA device")
    wanted = {name: CANDIDATES[name] for name in options.only}
    file = options.output or device_file(torch.cuda.get_device_name())

    def keep(chosen: dict[str, Settings]) -> None:
        file.write_text(dumps(of_this_card(chosen)))

    tune(torch.device("cuda"), 60 * options.minutes, wanted, keep)
    print(f"{file}: check it with `python -m benchmarks.compile_report`", file=sys.stderr)


if __name__ == "__main__":
    main()
