"""Measurements on one CUDA card: a list of rows in stages, and a time budget.

    python -m benchmarks.speed.gpu_suite [--run first|second|baselines] [--stages NAME ...] [--rows REGEX]
        [--minutes 9] [--cache FOLDER] [--photos FOLDER] [--output FILE]
    python -m benchmarks.speed.gpu_suite --compile-only FOLDER [--arch 90] [--minutes 60]    # without a GPU

The stages are functions of `gpu_rows`. A run is a choice of their rows that takes nine minutes at most. `first` has
what the goals are judged by, and tunes. `second` has kernels, tests and other sizes; `baselines` compiles other models.
Rows that failed in an earlier run come last, because one of them may leave the GPU unusable.

`--compile-only` fills a Triton cache, to take along to the GPU, with the kernels of the rows and of settings to tune.
`--cache` uses it there, and refuses one that another Triton or another architecture made.

Every row is written to `benchmarks/results/<device>.json` when it is measured. A run that ends at its time limit, or is
killed, resumes when the command is given again. `--tiny` tries the suite out on the CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.gpu_compile import compile_ahead, compile_only, use_cache
from benchmarks.speed.gpu_records import STATE, VERSIONS, smi, software
from benchmarks.speed.gpu_rows import ROOT, STAGES, Result, Row, Setup
from benchmarks.speed.timing import machine, source_files
from fastsam_rwkv.triton_kernels.launch_config import device_file

RUNS = {  # patterns of row names in their order
    "first": (
        r"^ceilings/", r"^profile/", r"^encoder/small/1024/(1|16)/graphs$", r"^decoder/small/1024/(1|16|64)$",
        r"^kernels/bi_wkv/", r"^tune$", r"^tuned$",
    ),
    "second": (r"^tests$", r"^golden$", r"^agreement/", r"^kernels/small/", r"^encoder/", r"^decoder/"),
    "baselines": (r"^baselines/reference eager/", r"^baselines/"),
}  # fmt: skip
SAME = ("device", "torch", "triton", "tiny", "code")  # equal for all results in one file
AGAIN = "give the command again to resume"


class Results:
    """Results by row name, in a file that is rewritten whenever one is added.

    `setting` describes machine and code. An existing file must agree with it.
    """

    def __init__(self, output: Path, setting: dict[str, Any]) -> None:
        self.output, self.setting = output, setting
        self.rows: dict[str, Result] = {}
        if output.exists():
            stored = json.loads(output.read_text())
            differing = [key for key in SAME if stored["machine"].get(key) != setting[key]]
            if differing:
                raise SystemExit(
                    f"{output} holds results with another {', '.join(differing)}: move it away to measure again"
                )
            self.rows = stored["rows"]

    @property
    def failed(self) -> set[str]:
        """Names of the rows that hold an error."""
        return {name for name, row in self.rows.items() if "error" in row}

    def store(self, name: str, result: Result) -> None:
        """Add one result and write the file."""
        self.rows[name] = result
        self.output.parent.mkdir(parents=True, exist_ok=True)
        partial = self.output.with_suffix(".partial")
        partial.write_text(json.dumps({"machine": self.setting, "rows": self.rows}, indent=1) + "\n")
        os.replace(partial, self.output)


def pending(rows: Iterable[Row], results: Results) -> list[Row]:
    """Return the rows to measure in their order: run after run, earlier failures last."""
    failed, patterns = results.failed, [pattern for run in RUNS.values() for pattern in run]

    def place(row: Row) -> tuple[bool, int]:
        found = (i for i, pattern in enumerate(patterns) if re.search(pattern, row.name))
        return row.name in failed, next(found, len(patterns))

    return sorted((row for row in rows if row.name not in results.rows or row.name in failed), key=place)


def of_run(rows: Iterable[Row], run: str | None) -> list[Row]:
    """Return the rows of a run, without those of earlier runs; all for None."""

    def found(row: Row) -> str | None:
        return next((name for name, patterns in RUNS.items() if re.search("|".join(patterns), row.name)), None)

    return [row for row in rows if run is None or found(row) == run]


def measure(rows: Iterable[Row], results: Results, deadline: float) -> list[str]:
    """Measure and store rows until `deadline`, in seconds of `time.monotonic`. Return the names of the rows left."""
    left = []
    for row in rows:
        if deadline - time.monotonic() < row.seconds:
            left.append(row.name)
            continue
        results.store(row.name, {"error": "started, but not finished"})  # remains if the process is killed
        start = time.monotonic()
        try:
            result = row.measure()
        except Exception as error:  # the other rows are still wanted
            result = {"error": f"{type(error).__name__}: {error}"[:500]}
        state = smi(STATE) if torch.cuda.is_initialized() else {}
        results.store(row.name, result | {"seconds": round(time.monotonic() - start, 1)} | state)
        print(f"{row.name:60} {json.dumps(result)[:150]}", flush=True)
        if torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                raise SystemExit(f"{row.name} left the GPU unusable: {AGAIN} ({error})") from error
    return left


def goals(rows: dict[str, Result]) -> list[tuple[str, float, str, bool]]:
    """Judge the goals for one H200 that the rows allow to judge: title, value, bound, met."""

    def value(name: str, field: str = "us") -> float:
        return float(rows.get(name, {}).get(field, float("nan")))

    small, twice = value("encoder/small/1024/1/graphs"), value("encoder/small/2048/1/graphs")
    agreed = [value(name, "mean_iou") for name in rows if name.startswith("agreement")]
    eager, compiled = (value(f"baselines/reference {how}/small/1024/1") for how in ("eager", "compiled"))
    other, other_twice = (value(f"baselines/transformer compiled/small/{side}/1") for side in (1024, 2048))
    scan, scans = "kernels/bi_wkv/1x4096x384", "kernels/bi_wkv/16x4096x384"
    of_copy = value(scans, "bytes") / value(scans) / 1e3 / value("ceilings/copy", "gb_s")
    judged = [
        ("bi_wkv (1, 4096, 384), us", value(scan), "<=", 12),
        ("bi_wkv (16, 4096, 384), of copy bandwidth", of_copy, ">=", 0.6),
        ("bi_wkv, times the published algorithm", value(scan, "times_faster"), ">=", 10),
        ("encoder small 1024 batch 1, ms", small / 1e3, "<=", 1.0),
        ("encoder small 1024 batch 16, images/s", value("encoder/small/1024/16/graphs", "images_s"), ">=", 1500),
        ("eager reference / ours", eager / small, ">=", 6),
        ("compiled reference / ours", compiled / small, ">=", 1.5),
        ("compiled transformer / ours, 1024", other / small, ">=", 2),
        ("compiled transformer / ours, 2048", other_twice / twice, ">=", 5),
        ("time a pixel, 4096 / 2048", value("encoder/small/4096/1/graphs") / (4 * twice), "<=", 1.15),
        ("one more prompt, ms", value("decoder/small/1024/1") / 1e3, "<=", 0.2),
        ("64 more prompts, ms", value("decoder/small/1024/64") / 1e3, "<=", 1.2),
        ("tuned: encoder small 1024 batch 1, ms", value("tuned", "encoder_1_after_us") / 1e3, "<=", 1.0),
        ("tuned: images/s at batch 16", 16e6 / value("tuned", "encoder_16_after_us"), ">=", 1500),
        ("tuned: one more prompt, ms", value("tuned", "decoder_1_after_us") / 1e3, "<=", 0.2),
        ("bfloat16 masks, mean IoU", min(agreed, default=float("nan")), ">=", 0.99),
    ]
    return [
        (title, measured, f"{sign} {bound}", measured <= bound if sign == "<=" else measured >= bound)
        for title, measured, sign, bound in judged
        if measured == measured
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Return 0 if all rows are there, 1 if one has failed, 3 if the time did not suffice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", choices=list(RUNS), help="measure the rows of this run")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--rows", default="", metavar="REGEX", help="measure only rows whose names it matches")
    parser.add_argument("--minutes", type=float, default=9.0, help="start no row later than that")
    parser.add_argument("--compile-only", type=Path, metavar="FOLDER", help="compile into this cache, and do no more")
    parser.add_argument("--arch", type=int, default=90, help="architecture of --compile-only: 90 for sm_90")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="a cache that --compile-only filled")
    parser.add_argument("--photos", type=Path, help="photographs for `agreement`; the examples by default")
    parser.add_argument("--output", type=Path, help="results; benchmarks/results/<device>.json by default")
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU, to try the suite out")
    options = parser.parse_args(arguments)
    if options.compile_only:
        compile_only(options.compile_only, options.arch, options.minutes)
        return 0
    if not options.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA device; `--tiny` tries the suite out")
    if options.photos and not options.photos.is_dir():
        parser.error(f"--photos: there is no folder {str(options.photos)!r}")
    name = "cpu_tiny" if options.tiny else device_file(torch.cuda.get_device_name()).stem[len("tuned_") :]
    triton = version("triton") if find_spec("triton") else None
    code = hashlib.sha256(b"".join(file.read_bytes() for file in source_files())).hexdigest()[:12]
    setting = machine("cpu" if options.tiny else "cuda") | {"triton": triton, "tiny": options.tiny, "code": code}
    setting |= software(ROOT) | ({} if options.tiny else smi(VERSIONS))
    results = Results(options.output or ROOT / "benchmarks/results" / f"{name}.json", setting)
    print("  ".join(f"{key}: {value}" for key, value in setting.items()))
    deadline = time.monotonic() + 60 * options.minutes
    setup = Setup(options.tiny, options.photos or ROOT / "examples", results.output, deadline)
    rows = [row for stage in STAGES if stage in options.stages for row in STAGES[stage](setup)]
    rows = pending([row for row in of_run(rows, options.run) if re.search(options.rows, row.name)], results)
    if not setup.tiny:
        major, minor = torch.cuda.get_device_capability()
        if options.cache:
            use_cache(options.cache, 10 * major + minor)
        elif any(row.name.startswith("encoder/") for row in rows):
            compile_ahead(10 * major + minor, os.cpu_count() or 1)
    left = measure(rows, results, deadline)
    if left:
        print(f"the time limit was reached with {len(left)} rows left, first {left[0]}: {AGAIN}")
    for title, measured, bound, met in goals(results.rows):
        print(f"{title:50} {measured:10.4g}  goal {bound}: {'met' if met else 'MISSED'}")
    for failed in sorted(results.failed):
        print(f"FAILED {failed}: {results.rows[failed]['error']}")
    return 3 if left else int(bool(results.failed))


if __name__ == "__main__":
    sys.exit(main())
