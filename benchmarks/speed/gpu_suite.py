"""Measurements on one CUDA card: a list of rows in stages, and a time budget.

    python -m benchmarks.speed.gpu_suite [--stages NAME ...] [--rows REGEX] [--minutes 9]
        [--photos FOLDER] [--output FILE]

The stages are functions of `gpu_rows`, in the order of STAGES. Ceilings, kernel tests and the rows that goals are
judged by come first. Rows that failed in an earlier run come last, because one of them may leave the GPU unusable.

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

from benchmarks.speed.gpu_rows import ROOT, STAGES, Result, Row, Setup, compile_ahead
from benchmarks.speed.timing import machine, source_files
from fastsam_rwkv.triton_kernels.launch_config import device_file

FIRST = re.compile(
    r"^ceilings/|^tests$|^kernels/bi_wkv/|^encoder/small/(1024/(1|16)|2048/1|4096/1)/graphs$|^decoder/small/1024/1$"
    r"|^agreement/|^baselines/(reference|transformer) compiled/|^baselines/reference eager/small/1024/1$"
)
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
    """Return the rows to measure in their order: the goals' rows first, earlier failures last."""
    failed = results.failed
    left = [row for row in rows if row.name not in results.rows or row.name in failed]
    return sorted(left, key=lambda row: (row.name in failed, not FIRST.search(row.name)))


def measure(rows: Iterable[Row], results: Results, deadline: float) -> list[str]:
    """Measure and store rows until `deadline`, in seconds of `time.monotonic`. Return the names of the rows left."""
    left = []
    for row in rows:
        if deadline - time.monotonic() < row.seconds:
            left.append(row.name)
            continue
        results.store(row.name, {"error": "started, but not finished"})  # remains if the process is killed
        try:
            result = row.measure()
        except Exception as error:  # the other rows are still wanted
            result = {"error": f"{type(error).__name__}: {error}"[:500]}
        results.store(row.name, result)
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
        ("encoder small 1024 batch 1, ms", small / 1e3, "<=", 1.2),
        ("encoder small 1024 batch 16, images/s", value("encoder/small/1024/16/graphs", "images_s"), ">=", 1500),
        ("eager reference / ours", eager / small, ">=", 6),
        ("compiled reference / ours", compiled / small, ">=", 1.5),
        ("compiled transformer / ours, 1024", other / small, ">=", 2),
        ("compiled transformer / ours, 2048", other_twice / twice, ">=", 5),
        ("time a pixel, 4096 / 2048", value("encoder/small/4096/1/graphs") / (4 * twice), "<=", 1.15),
        ("one more prompt, ms", value("decoder/small/1024/1") / 1e3, "<=", 0.5),
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
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--rows", default="", metavar="REGEX", help="measure only rows whose names it matches")
    parser.add_argument("--minutes", type=float, default=9.0, help="start no row later than that")
    parser.add_argument("--photos", type=Path, help="photographs for `agreement`; the examples by default")
    parser.add_argument("--output", type=Path, help="results; benchmarks/results/<device>.json by default")
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU, to try the suite out")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA device; `--tiny` tries the suite out")
    if options.photos and not options.photos.is_dir():
        parser.error(f"--photos: there is no folder {str(options.photos)!r}")
    name = "cpu_tiny" if options.tiny else device_file(torch.cuda.get_device_name()).stem[len("tuned_") :]
    triton = version("triton") if find_spec("triton") else None
    code = hashlib.sha256(b"".join(file.read_bytes() for file in source_files())).hexdigest()[:12]
    setting = machine("cpu" if options.tiny else "cuda") | {"triton": triton, "tiny": options.tiny, "code": code}
    results = Results(options.output or ROOT / "benchmarks/results" / f"{name}.json", setting)
    print("  ".join(f"{key}: {value}" for key, value in setting.items()))
    deadline = time.monotonic() + 60 * options.minutes
    setup = Setup(options.tiny, options.photos or ROOT / "examples", results.output, deadline)
    rows = [row for stage in STAGES if stage in options.stages for row in STAGES[stage](setup)]
    rows = pending([row for row in rows if re.search(options.rows, row.name)], results)
    if not setup.tiny and any(row.name.startswith("encoder/") for row in rows):
        compile_ahead()
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
