"""Find the fastest launch settings of every kernel on this card and write them as a settings file.

    python -m benchmarks.kernels.tune [--only NAME ...] [--minutes 9] [--output FILE.json]

The default output is `triton_kernels/tuned_<device>.json`, which the kernels use from then on. Each operator runs with
the arguments that model small gives it at 1024 x 1024, in bfloat16, for one image and for 16 (`<op>.large`: for 16, and
`<op>` then for one), under every candidate that compiles and is right to rounding; the smallest time an image over the
model's calls wins. Nearly all of the time is the compiler's, so candidates are compiled ahead, by as many processes as
there are cores. What is left at the time limit keeps the default. float32 is not tuned.
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

from benchmarks.kernels.operator_calls import LAUNCHERS, elsewhere, recorded_calls
from fastsam_rwkv.triton_kernels.launch_config import device_file, override, shipped_settings, tuned_settings

Settings = dict[str, int]
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
                SEGMENTS=(4, 8, 16), LENGTH=(16, 32), BLOCK_C=(32,), BLOCK_N=(32,), num_warps=(2, 4, 8),
                maxnreg=(168, 255),  # few: one of 32 tokens a thread takes a core 20 s to compile
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
LARGE_BATCH = 16  # images
IN_TURN = 3  # inputs of a call: as in an encoding, what it reads has not just been read
Call = tuple[list[Callable[[], Tensor]], float]  # with inputs that take turns; how many of them there are an image


def tune(
    device: torch.device,
    seconds: float,
    candidates: dict[str, tuple[str, list[Settings]]] | None = None,
    keep: Callable[[dict[str, Settings]], None] = lambda chosen: None,
) -> tuple[dict[str, Settings], dict[str, dict[str, float]]]:
    """The best settings found within the time, and for each name the microseconds before and with the best.

    The time is that of a model's calls for one image and, an image, for a large batch; of the former alone where the
    name has a `.large` of its own, which is of the latter. What the device's settings file holds already is where it
    starts from, and stays unless something is faster. `keep` is given what was chosen after each name: a run may be cut
    off.

    Raises:
        RuntimeError: the settings there are fail on this device, or a candidate has left it unusable.
    """
    candidates = CANDIDATES if candidates is None else candidates
    on_gpu = device.type == "cuda"
    end = time.monotonic() + seconds
    trials = {name: settings for name, (_, settings) in candidates.items()}
    if on_gpu:
        architecture = of_this_card({})["device"]["architecture"]
        ready = compile_ahead(architecture, COMPILING * seconds, candidates, os.cpu_count() or 1)
        counts = ", ".join(f"{name} {len(ready[name])} of {len(trials[name])}" for name in trials)
        print(f"compiled in {seconds - (end - time.monotonic()):.0f} s: {counts}", flush=True)
        for name, compiled in ready.items():  # those first that take no time to compile any more
            trials[name] = compiled + [trial for trial in trials[name] if trial not in compiled]
    recorded = {
        batch: recorded_calls(*MODEL[device.type], batch, device, int(batch == 1)) for batch in (1, LARGE_BATCH)
    }
    chosen = tuned_settings(torch.cuda.get_device_name(device)) if on_gpu else {}
    table: dict[str, dict[str, float]] = {}
    for place, (name, settings) in enumerate(trials.items()):
        share = time.monotonic() + (end - time.monotonic()) / (len(candidates) - place)
        operators = candidates[name][0]
        with torch.inference_mode(), override(chosen):
            mine = _calls(recorded, operators, batches_of(name))
            want = [calls[0]() for calls, _ in mine]
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


def batches_of(name: str) -> tuple[int, ...]:
    """The batches whose calls a name's settings serve."""
    if name.endswith(".large"):
        return (LARGE_BATCH,)
    return (1,) if f"{name}.large" in shipped_settings()["default"] else (1, LARGE_BATCH)


def compile_ahead(
    architecture: int, seconds: float, candidates: dict[str, tuple[str, list[Settings]]], processes: int
) -> dict[str, list[Settings]]:
    """Compile candidates, in processes side by side, which leaves their binaries in Triton's cache on disk. No GPU is
    needed, and none can be left unusable.

    Returns:
        By name, those that were compiled and fit into shared memory. The others do not, or their turn did not come.
    """
    jobs = [(name, trial) for name, (_, settings) in candidates.items() for trial in settings]
    random.Random(0).shuffle(jobs)  # should the time not do for all, every operator has had some of it
    ready: dict[str, list[Settings]] = {name: [] for name in candidates}
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _record, (architecture,))
    futures = {pool.submit(_compiles, candidates[name][0], name, trial): (name, trial) for name, trial in jobs}
    done, _ = wait(futures, timeout=seconds)
    pool.shutdown(wait=False, cancel_futures=True)
    for future in done:
        if not future.exception() and future.result():
            name, trial = futures[future]
            ready[name].append(trial)
    return ready


_recorded: dict[int, list[tuple[str, str, tuple[Any, ...], int]]] = {}  # of a process that compiles ahead
_architecture = 0


def _record(architecture: int) -> None:
    global _architecture
    _architecture = architecture
    for batch in (1, LARGE_BATCH):
        _recorded[batch] = recorded_calls(*MODEL["cuda"], batch, torch.device("meta"), int(batch == 1))


def _compiles(operators: str, name: str, trial: Settings) -> bool:
    from benchmarks.kernels.compile_report import SHARED_LIMIT, compiling_for

    try:
        with override({name: trial}), compiling_for(_architecture) as kernels:
            for batch in batches_of(name):
                for operator, _, args, _ in _recorded[batch]:
                    if operator in operators.split():
                        LAUNCHERS[operator](*args)
    except Exception:  # each compiler has its own for what it cannot do
        return False
    limit = SHARED_LIMIT.get(_architecture, min(SHARED_LIMIT.values()))
    return all(kernel.metadata.shared <= limit for _, kernel in kernels)


def _calls(
    recorded: dict[int, list[tuple[str, str, tuple[Any, ...], int]]], operators: str, batches: tuple[int, ...]
) -> list[Call]:
    found: list[Call] = []
    for batch in batches:
        for name, _, args, times in recorded[batch]:
            if name in operators.split():
                operator = getattr(torch.ops.fastsam_rwkv, name)
                inputs = [args, *(elsewhere(args) for _ in range(IN_TURN - 1))]
                found.append(([partial(operator, *a) for a in inputs], times / batch))
    return found


def _try(calls: list[Call], want: list[Tensor], limit: float, on_gpu: bool) -> float:
    """Microseconds of all calls; infinite where settings do not compile, do not fit, are wrong, or exceed the limit."""
    total = 0.0
    for (in_turn, times), expected in zip(calls, want, strict=True):
        try:
            got = in_turn[0]()
            if not (got - expected).float().norm() <= 0.02 * expected.float().norm():  # a NaN is wrong, too
                return float("inf")
            total += times * _time(in_turn, on_gpu)
        except Exception:  # Triton, the driver and PyTorch each have their own for what does not fit
            if on_gpu:
                torch.cuda.synchronize()  # raises again what nothing can follow on this device
            return float("inf")
        if total > limit:
            return float("inf")
    return total


def _time(in_turn: list[Callable[[], Tensor]], on_gpu: bool) -> float:
    """The median of a few graphs of many launches; of fewer where one takes long."""

    def elapsed(function: Callable[[], object]) -> float:
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        function()
        end_event.record()
        torch.cuda.synchronize()
        return 1e3 * start_event.elapsed_time(end_event)

    in_turn[0]()
    if not on_gpu:
        start = time.perf_counter()
        in_turn[0]()
        return 1e6 * (time.perf_counter() - start)
    torch.cuda.synchronize()
    once = elapsed(in_turn[0])
    launches, repeats = (12, 9) if once < 200 else (6, 5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            in_turn[i % len(in_turn)]()
    return statistics.median(elapsed(graph.replay) / launches for _ in range(repeats))


def of_this_card(settings: dict[str, Settings]) -> dict[str, Settings]:
    """With the architecture they are for, the only one that the compile report then holds them to."""
    major, minor = torch.cuda.get_device_capability()
    return {"device": {"architecture": 10 * major + minor}} | {k: v for k, v in settings.items() if k != "device"}


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
    print(f"{file}: check it with `python -m benchmarks.kernels.compile_report`", file=sys.stderr)


if __name__ == "__main__":
    main()
