"""Everything there is to know about the kernels on one CUDA card, in one command.

    python -m benchmarks.speed.gpu_suite [--stages NAME ...] [--rows REGEX] [--minutes 9]
        [--photos FOLDER] [--output FILE]

Stages, in this order: `ceilings` (copy bandwidth of memory and of the second-level cache, matrix rate), `tests` (the
kernels' tests on the card), `goals` (the rows of later stages that what was set out is judged by), `golden` (stored
outputs of the published implementation in float32, bfloat16, float16), `kernels` (each one's time and its fraction of
the ceiling; its reference's, and that of its products and convolutions alone by cuBLAS and cuDNN), `profile` (every
launch of an encoding, in order), `encoder`, `decoder`, `agreement` (bfloat16 masks against float32 ones), `baselines`
(our reference and a transformer of the same scale, eager and compiled; SAM ViT-B; SAM 2 Hiera-tiny), `tune`.

Results go to `benchmarks/results/<device>.json` row by row: a run that ends at its time limit goes on where it stopped
when the command is given again, without `--fresh`, which moves the file to `<device>.old` and measures anew. Times are
medians in microseconds by CUDA events; a kernel's are of replays of a graph of many launches, inputs taking turns.
The tuned settings are written beside the results; to use them, move the file into `triton_kernels/` and measure with
`--fresh`. `--tiny` shrinks every shape, which is how a CPU tests the suite itself.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.kernels import tune
from benchmarks.kernels.operator_calls import (
    REFERENCES,
    cost,
    dense_pieces,
    elsewhere,
    operators_replaced,
    random_model,
    recorded_calls,
)
from benchmarks.speed.gpu_baselines import segment_scan, transformer
from benchmarks.speed.timing import machine
from fastsam_rwkv import RWKVSAM, ModelConfig, convert_upstream
from fastsam_rwkv.predictor.transforms import load_image, resize
from fastsam_rwkv.triton_kernels.bi_wkv import bi_wkv
from fastsam_rwkv.triton_kernels.launch_config import device_file

ROOT = Path(__file__).resolve().parents[2]
STAGES = (
    "ceilings", "tests", "goals", "golden", "kernels", "profile", "encoder", "decoder", "agreement", "baselines",
    "tune",
)  # fmt: skip
GOALS = (
    r"^ceilings/|^kernels/bi_wkv/|^encoder/small/(1024/(1|16)|2048/1|4096/1)/graphs$|^decoder/small/1024/1$|^agreement/"
    r"|^baselines/(reference|transformer) compiled/|^baselines/reference eager/small/1024/1$"
)
# variant, size, batch, prompts: what those encode and decode, and more that has to be compiled sooner or later
ENCODED_AHEAD = (
    ("small", 1024, 1, 1), ("small", 1024, 16, 0), ("small", 1024, 4, 0), ("small", 2048, 1, 0), ("small", 4096, 1, 0),
    ("tiny", 512, 1, 1), ("tiny", 1024, 1, 1), ("tiny", 1024, 16, 0),
)  # fmt: skip
KERNEL_TESTS = (
    "bi_wkv_kernel", "kernel_model", "cuda_graphs", "norm_shift_mix", "fused_linear", "mbconv", "conv_norm",
    "operators", "strided_vectors", "stem", "attention", "upscale",
)  # fmt: skip
SAME = ("device", "torch", "triton", "tiny", "code")  # what results in one file have in common
Row = dict[str, Any]
T = TypeVar("T")
GO_ON = "give the command again, without --fresh, to go on"
COMPILING_SECONDS = 150.0  # before a compiled baseline is timed, at least
TUNING_SECONDS = 150.0, 420.0  # the least that tuning is begun with, and the most it takes


class OutOfTime(Exception):
    """The time limit was reached between two rows."""


class Suite:
    """Rows by name, kept in a file.

    Args:
        device: "cuda", or "cpu" to try the suite out.
        tiny: shapes that a CPU can do.
        output: the results file; rows it holds are not measured again.
        minutes: no row is begun after that.
        fresh: start anew, whatever the file holds.
        rows: a regular expression; only rows are measured in whose names it is found.
    """

    def __init__(
        self, device: str, tiny: bool, output: Path, minutes: float, fresh: bool = False, rows: str = ""
    ) -> None:
        self.device, self.tiny, self.output = torch.device(device), tiny, output
        self.patterns = [re.compile(rows)]
        self.skipped: list[str] = []  # rows that needed more time than was left
        self.seconds = 60 * minutes
        self.deadline = time.monotonic() + self.seconds
        self.setting = machine(device) | {"triton": _triton_version(), "tiny": tiny, "code": _code()}
        self.rows: dict[str, Row] = {}
        if output.exists() and fresh:
            os.replace(output, output.with_suffix(".old"))
        elif output.exists():
            stored = json.loads(output.read_text())
            differing = [key for key in SAME if stored["machine"].get(key) != self.setting[key]]
            if differing:
                raise SystemExit(
                    f"{output} holds results with another {', '.join(differing)}: move it away to keep them, or give "
                    "--fresh to measure everything again"
                )
            self.rows = stored["rows"]
        self.failed_before = {name for name, row in self.rows.items() if "error" in row}
        self.settled = set(self.rows)  # rows not to be measured, for now

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def row(self, name: str, measure: Callable[[], Row], seconds: float = 0.0) -> Row:
        """The stored row, a new one, or an empty one where it is not wanted.

        A failure is a row that says so, and is tried again when all else is done. So is a row that was begun and not
        ended, for the run was killed. A row is not begun with less than `seconds` left; others may be.
        """
        if self.wants(name):
            left = self.deadline - time.monotonic()
            if left < 0:
                raise OutOfTime
            if left < seconds:
                self.skipped.append(name)
                return {}
            self._write({name: {"error": "begun, and not ended"}})
            if (row := self._attempt(name, measure)) is not None:
                self._store(name, row)
        return self.rows.get(name, {})

    def prepared(self, name: str, prepare: Callable[[], list[Any]]) -> list[Any]:
        """What rows need: there is a row only of a failure, which gives nothing."""
        if time.monotonic() > self.deadline:
            raise OutOfTime
        if name in self.settled or (found := self._attempt(name, prepare)) is None:
            return []
        self.rows.pop(name, None)
        return found

    def wants(self, name: str) -> bool:
        """Whether the row is still to be measured."""
        return name not in self.settled and all(pattern.search(name) for pattern in self.patterns)

    @contextlib.contextmanager
    def only(self, patterns: list[re.Pattern[str]]) -> Iterator[None]:
        """Within the context only such rows are wanted."""
        before, self.patterns = self.patterns, patterns
        try:
            yield
        finally:
            self.patterns = before

    def ceiling(self, name: str, field: str) -> float:
        """A ceiling, measured now if need be, whatever rows are wanted; NaN where that fails."""
        if f"ceilings/{name}" not in self.rows:
            with self.only([re.compile(f"^ceilings/{name}$")]), contextlib.suppress(OutOfTime):
                ceilings(self)
        return self.value(f"ceilings/{name}", field)

    def _attempt(self, name: str, function: Callable[[], T]) -> T | None:
        try:
            return function()
        except OutOfTime:
            raise
        except Exception as error:  # of one row: the others are to be had all the same
            self._store(name, {"error": f"{type(error).__name__}: {error}"[:500]})
            return None

    def retry(self) -> bool:
        """Have what failed in earlier runs measured again; whether there is any."""
        self.settled -= self.failed_before
        return bool(self.failed_before)

    def _store(self, name: str, row: Row) -> None:
        self.rows[name] = row
        self.settled.add(name)
        self._write({})
        print(f"{name:60} {_short(row)}", flush=True)
        if self.on_gpu:
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                raise SystemExit(f"{name} left the GPU unusable: {GO_ON} ({error})") from error

    def _write(self, begun: dict[str, Row]) -> None:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        partial = self.output.with_suffix(".partial")
        partial.write_text(json.dumps({"machine": self.setting, "rows": self.rows | begun}, indent=1) + "\n")
        os.replace(partial, self.output)

    def value(self, name: str, field: str) -> float:
        return float(self.rows.get(name, {}).get(field, float("nan")))

    def time(self, function: Callable[[], object], repeats: int = 30) -> Row:
        """Median microseconds of one call, with the quartiles."""
        repeats = 2 if self.tiny else repeats
        for _ in range(3):
            function()
        if not self.on_gpu:
            samples = []
            for _ in range(repeats):
                start = time.perf_counter()
                function()
                samples.append(1e6 * (time.perf_counter() - start))
            return _spread(samples)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        torch.cuda.synchronize()
        for start_event, end_event in events:
            start_event.record()
            function()
            end_event.record()
        torch.cuda.synchronize()
        return _spread([1e3 * start_event.elapsed_time(end_event) for start_event, end_event in events])

    def time_launches(self, calls: Sequence[Callable[[], object]], launches: int = 50) -> Row:
        """Like `time`, of one call among many in a CUDA graph: without gaps between them."""
        if not self.on_gpu:
            return self.time(calls[0])
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(launches):
                calls[i % len(calls)]()
        row = self.time(graph.replay, 20)
        return {name: value if name == "repeats" else value / launches for name, value in row.items()}


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def _code() -> str:
    """A fingerprint of what is measured: the package's sources and launch settings."""
    digest = hashlib.sha256()
    for folder in ("fastsam_rwkv", "triton_kernels"):
        for file in sorted([*(ROOT / folder).glob("*.py"), *(ROOT / folder).glob("*.json")]):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _spread(samples: list[float]) -> Row:
    lower, middle, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return {"us": middle, "us_lower": lower, "us_upper": upper, "repeats": len(samples)}


def _short(row: Row) -> str:
    texts = {k: f"{v:.4g}" if isinstance(v, float) else len(v) if isinstance(v, list) else v for k, v in row.items()}
    return "  ".join(f"{k} {text}" for k, text in texts.items())


def ceilings(suite: Suite) -> None:
    size = 1 << (16 if suite.tiny else 30)
    side = 64 if suite.tiny else 8192

    def copy(size: int) -> Row:
        """The faster of a kernel that reads and writes, in a graph, and of the driver's copy, launched by itself."""
        source = torch.randn(size // 2, device=suite.device).to(torch.bfloat16)
        target = torch.empty_like(source)
        by_kernel = suite.time_launches([lambda: torch.neg(source, out=target)], 20)
        row = min(by_kernel, suite.time(lambda: target.copy_(source)), key=lambda row: row["us"])
        return row | {"gb_s": 2 * source.numel() * 2 / row["us"] / 1e3}

    def product() -> Row:
        a, b = (torch.randn(side, side, device=suite.device).to(torch.bfloat16) for _ in range(2))
        row = suite.time(lambda: a @ b)
        return row | {"tflop_s": 2 * side**3 / row["us"] / 1e6}

    suite.row("ceilings/copy", partial(copy, size))
    suite.row("ceilings/cached_copy", partial(copy, min(size, 1 << 24)))
    suite.row("ceilings/matmul", product)


def tests(suite: Suite) -> None:
    def run() -> Row:
        names = KERNEL_TESTS[-1:] if suite.tiny else KERNEL_TESTS
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += [f"tests/test_{name}.py" for name in names]
        command += ["-o", "addopts="]  # which ask for pytest-xdist
        if find_spec("xdist") and suite.on_gpu:  # nearly all of the time is the compiler's
            command += ["-n", str(min(12, os.cpu_count() or 1))]
        if suite.tiny:
            command += ["-k", "named"]
        seconds = max(60.0, min(suite.seconds / 3, suite.deadline - time.monotonic()))  # one may hang
        with tempfile.TemporaryFile("w+") as file:
            try:
                code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, timeout=seconds).returncode
            except subprocess.TimeoutExpired:
                code = None
            file.seek(0)
            lines = file.read().strip().splitlines() or ["nothing was printed"]
        row = {"summary": lines[-1]}
        if code != 0:
            row["error"] = "\n".join([f"not done in {seconds:.0f} s"] * (code is None) + lines[-40:])
        return row

    suite.row("tests", run)


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """cuDNN rounds float32 to tf32 unless told otherwise."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def golden(suite: Suite) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from golden import load_run, pixels, published_weights

    strides = {"s1": 16, "s2": 16, "mid": 4, "last": 4, "emb": 4}
    runs = (
        ("small_backbone_256x320",)
        if suite.tiny
        else ("small_backbone_256x320", "tiny_points", "tiny_boxes", "small_box")
    )
    for name in runs:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):

            def check(name: str = name, dtype: torch.dtype = dtype) -> Row:
                run = load_run(name)
                config, weights = convert_upstream(published_weights(str(run["variant"])))
                model = RWKVSAM(config).eval().requires_grad_(False)
                model.load_state_dict(weights)
                model.to(suite.device, dtype)
                model.cuda_graphs = False  # hooks do not run in a replay
                maps: dict[str, Tensor] = {}
                model.backbone.layers[7].register_forward_hook(lambda _m, _a, out: maps.update(mid=out))
                model.backbone.register_forward_hook(
                    lambda _m, _a, out: maps.update(zip(("s1", "s2", "last"), out, strict=True))
                )
                with torch.inference_mode(), exact_float32():
                    embedding = model.encode_image(pixels(run).to(suite.device))
                    maps["emb"] = embedding.image_embed
                    row = {
                        key: _relative_l2(maps[key].permute(0, 3, 1, 2)[:, ::8, ::stride, ::stride], run[key])
                        for key, stride in strides.items()
                    }
                    if "low" in run:
                        prompts: dict[str, Tensor] = {}
                        if "points" in run:
                            prompts["point_coords"] = torch.from_numpy(run["points"]).to(suite.device)
                            prompts["point_labels"] = torch.from_numpy(run["labels"]).long().to(suite.device)
                        if "boxes" in run:
                            prompts["boxes"] = torch.from_numpy(run["boxes"]).to(suite.device)
                        low, iou = model.decode_masks(embedding, **prompts)
                        row |= {
                            "low": _relative_l2(low[:, :, ::2, ::2], run["low"]),
                            "iou": _relative_l2(iou, run["iou"]),
                        }
                if dtype == torch.float32 and not max(row.values()) <= 1e-4:
                    row["error"] = "float32 differs from the published outputs by more than 1e-4"
                return row

            suite.row(f"golden/{name}/{_name(dtype)}", check)


def _relative_l2(got: Tensor, want: np.ndarray) -> float:
    g, w = got.double().cpu().numpy(), want.astype(np.float64)
    return float(np.linalg.norm(g - w) / np.linalg.norm(w))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def kernels(suite: Suite) -> None:
    """Every operator with the arguments the model gives it, as recorded in one encoding and, of one image, a prompt."""
    variants, size = (("tiny",), 64) if suite.tiny else (("tiny", "small"), 1024)
    for variant in variants:
        for batch in (1, 16):
            calls_on = partial(recorded_calls, variant, size, batch, prompts=1 if batch == 1 else 0)
            rows = f"kernels/{variant}/{size}/{batch}"

            def still_to_measure(calls_on: Callable[..., list[Any]] = calls_on, rows: str = rows) -> list[Any]:
                named = calls_on(device=torch.device("meta"))  # recording on the device runs all of them
                wanted = any(suite.wants(f"{rows}/{name}/{shapes}") for name, shapes, _, _ in named)
                return calls_on(device=suite.device) if wanted else []

            for name, shapes, args, times in suite.prepared(rows, still_to_measure):
                operator = getattr(torch.ops.fastsam_rwkv, name)

                def measure(
                    operator: Any = operator, name: str = name, args: tuple[Any, ...] = args, times: int = times
                ) -> Row:
                    copies = [args, *(elsewhere(args) for _ in range(2))]
                    with torch.inference_mode():
                        row = suite.time_launches([partial(operator, *a) for a in copies], 20)
                        reference = suite.time_launches([partial(REFERENCES[name], *a) for a in copies], 20)
                        dense = [piece for a in copies if (piece := dense_pieces(name, a))]
                        if dense:
                            row["dense_pieces_us"] = suite.time_launches(dense, 20)["us"]
                        moved, flops = cost(name, args, operator(*args))
                    row |= {"reference_us": reference["us"], "bytes": moved, "flops": flops, "calls": times}
                    return row | fractions(suite, row)

                suite.row(f"{rows}/{name}/{shapes}", measure)
    scans(suite)


def scans(suite: Suite) -> None:
    """The scan at the sizes that goals name and a long one, beside the published algorithm."""
    for batch, T, C in ((1, 64, 36),) if suite.tiny else ((1, 4096, 384), (16, 4096, 384), (1, 65536, 384)):

        def scan(batch: int = batch, T: int = T, C: int = C) -> Row:
            sets = []
            for _ in range(4):
                w, u = (torch.randn(C, device=suite.device, dtype=torch.bfloat16) for _ in range(2))
                sets.append(
                    (w, u, *(torch.randn(batch, T, C, device=suite.device, dtype=torch.bfloat16) for _ in "kvr"))
                )
            with torch.inference_mode():
                row = suite.time_launches([partial(bi_wkv, *a, 1 / T) for a in sets])
                row["plain_us"] = suite.time_launches([partial(bi_wkv, *a[:4], None, 1 / T) for a in sets])["us"]
                if suite.on_gpu:
                    baseline = suite.time_launches([partial(segment_scan, *a[:4], 1 / T) for a in sets], 10)
                    row["published_algorithm_us"] = baseline["us"]
                    row["times_faster"] = baseline["us"] / row["plain_us"]
            row["bytes"] = 4 * batch * T * C * 2
            return row | fractions(suite, row)

        suite.row(f"kernels/bi_wkv/{batch}x{T}x{C}", scan)


def fractions(suite: Suite, row: Row) -> Row:
    """Of the copy bandwidth and, where there are operations, of the matrix rate; none that has no ceiling."""
    found = {"of_copy": row["bytes"] / row["us"] / 1e3 / suite.ceiling("copy", "gb_s")}
    if "flops" in row:
        found["of_matmul"] = row["flops"] / row["us"] / 1e6 / suite.ceiling("matmul", "tflop_s")
    return {name: value for name, value in found.items() if value == value}


def _pixels(batch: int, size: int, device: torch.device) -> Tensor:
    return torch.randn(batch, 3, size, size, device=device, dtype=torch.bfloat16)


def _measured(suite: Suite, function: Callable[[], object], repeats: int) -> Row:
    """Time, and the most memory held."""
    if suite.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        row = suite.time(function, repeats)
    if suite.on_gpu:
        row["peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
    return row


def _encode(suite: Suite, model: RWKVSAM, size: int, batch: int, repeats: int = 30) -> Row:
    pixels = _pixels(batch, size, suite.device)

    def encode() -> None:
        torch.compiler.cudagraph_mark_step_begin()  # else a compiled neck gives up what the compiled backbone returned
        model.encode_image(pixels)

    row = _measured(suite, encode, repeats)
    return row | {"images_s": 1e6 * batch / row["us"]}


def profile(suite: Suite) -> None:
    """Every kernel of an encoding, as PyTorch's profiler sees it: where it overlaps the one before, both count it."""
    variant, size = ("tiny", 64) if suite.tiny else ("small", 1024)
    activity = torch.profiler.ProfilerActivity.CUDA if suite.on_gpu else torch.profiler.ProfilerActivity.CPU

    def measure(batch: int) -> Row:
        model = random_model(variant, size, suite.device, torch.bfloat16)
        model.cuda_graphs = False
        pixels = _pixels(batch, size, suite.device)
        with torch.inference_mode():
            for _ in range(3):
                model.encode_image(pixels)
            with torch.profiler.profile(activities=[activity]) as profiler:
                model.encode_image(pixels)
                if suite.on_gpu:
                    torch.cuda.synchronize()
        where = torch.autograd.DeviceType.CUDA if suite.on_gpu else torch.autograd.DeviceType.CPU
        events = [event for event in profiler.events() if event.device_type == where]  # no calls to the driver
        events.sort(key=lambda event: event.time_range.start)
        times = [(event.name, event.time_range.elapsed_us()) for event in events]
        return {"us": sum(us for _, us in times), "launches": [f"{us:.2f} {name[:60]}" for name, us in times]}

    for batch in (1,) if suite.tiny else (1, 16):
        suite.row(f"profile/{variant}/{size}/{batch}", partial(measure, batch))


def encoder(suite: Suite) -> None:
    variants, sizes, batches = ("tiny", "small", "base"), (512, 1024, 2048), (1, 4, 16)
    if suite.tiny:
        variants, sizes, batches = ("tiny",), (64,), (1,)
    cases = [(v, s, b) for v in variants for s in sizes for b in batches]
    if not suite.tiny:
        cases += [("small", 4096, 1)]
    for variant, size, batch in cases:
        for graphs in (True, False):
            if not graphs and batch > 1:
                continue

            def measure(variant: str = variant, size: int = size, batch: int = batch, graphs: bool = graphs) -> Row:
                model = random_model(variant, size, suite.device, torch.bfloat16)
                model.cuda_graphs = graphs
                return _encode(suite, model, size, batch)

            suite.row(f"encoder/{variant}/{size}/{batch}/{'graphs' if graphs else 'launches'}", measure)


def decoder(suite: Suite) -> None:
    size = 64 if suite.tiny else 1024
    for variant in ("tiny",) if suite.tiny else ("tiny", "small"):
        for count in (1,) if suite.tiny else (1, 16, 64, 256):

            def measure(variant: str = variant, count: int = count) -> Row:
                model = random_model(variant, size, suite.device, torch.bfloat16)
                boxes = torch.tensor([[0.1, 0.2, 0.6, 0.8]], device=suite.device).mul(size).expand(count, 4)
                with torch.inference_mode():
                    embedding = model.encode_image(_pixels(1, size, suite.device))
                return _measured(suite, lambda: model.decode_masks(embedding, boxes=boxes), 30)

            suite.row(f"decoder/{variant}/{size}/{count}", measure)


@contextlib.contextmanager
def compiled_encoder(model: RWKVSAM, once: bool = True, **options: Any) -> Iterator[None]:
    """Within the context the image encoder runs under `torch.compile(**options)`, for the sizes at hand alone: what was
    compiled before is forgotten, lest a second size be taken for a sign that sizes vary.

    Backbone, neck and the decoder's part are a graph each; in the first PyTorch compiles the layers, which are alike,
    `once` (from 2.8 on): 45 s instead of 105 for small on two CPU cores. Nothing is fused across layers.
    """
    torch._dynamo.reset()
    options = {"dynamic": False} | options
    layer, decoder = type(model.backbone.layers[0]), model.mask_decoder
    shared = getattr(torch.compiler, "nested_compile_region", None) if once else None
    projected = torch.compile(decoder.project_image, **options)
    with (
        mock.patch.object(layer, "forward", shared(layer.forward) if shared else layer.forward),
        mock.patch.object(decoder, "project_image", projected),
    ):
        model.backbone.compile(**options)
        model.neck.compile(**options)
        yield


def baselines(suite: Suite) -> None:
    size = 64 if suite.tiny else 1024
    variant = "tiny" if suite.tiny else "small"

    def timed(model: RWKVSAM, side: int, batch: int, compiled: bool) -> Row:
        model.cuda_graphs = False
        with operators_replaced(REFERENCES):
            if not compiled:
                return _encode(suite, model, side, batch, 10)
            try:
                with compiled_encoder(model, mode="max-autotune"):
                    return _encode(suite, model, side, batch, 10)
            except Exception as error:  # of regions that are compiled once, which are new
                with compiled_encoder(model, once=False, mode="max-autotune"):
                    row = _encode(suite, model, side, batch, 10)
                return row | {"layers_one_by_one": f"{type(error).__name__}: {error}"[:200]}

    def reference(batch: int, compiled: bool) -> Row:
        return timed(random_model(variant, size, suite.device, torch.bfloat16), size, batch, compiled)

    def same_scale(side: int, compiled: bool) -> Row:
        torch.manual_seed(0)
        model = transformer(ModelConfig.from_name(variant, image_size=side)).requires_grad_(False)
        return timed(model.to(suite.device, torch.bfloat16), side, 1, compiled)

    def other(build: Callable[[int], torch.nn.Module]) -> Row:
        model = build(size).to(suite.device, torch.bfloat16)
        pixels = _pixels(1, size, suite.device)
        return _measured(suite, lambda: model(pixels), 10)

    for batch in (1,) if suite.tiny else (1, 16):
        suite.row(f"baselines/reference eager/{variant}/{size}/{batch}", partial(reference, batch, False))
    for side in (size,) if suite.tiny else (1024, 2048):
        suite.row(f"baselines/transformer eager/{variant}/{side}/1", partial(same_scale, side, False))
    if suite.on_gpu:
        from benchmarks.speed.cpu_encoder import sam2_hiera_tiny, sam_vit_b

        suite.row(f"baselines/SAM ViT-B/{size}/1", partial(other, sam_vit_b))
        suite.row(f"baselines/SAM 2 Hiera-tiny/{size}/1", partial(other, sam2_hiera_tiny))
        for side in (1024, 2048):
            name = f"baselines/transformer compiled/{variant}/{side}/1"
            suite.row(name, partial(same_scale, side, True), COMPILING_SECONDS)
        name = f"baselines/reference compiled/{variant}/{size}/1"
        suite.row(name, partial(reference, 1, True), COMPILING_SECONDS)


def agreement(suite: Suite, photos: Path | None) -> None:
    """Masks of the default model in bfloat16 and in float32: mean IoU over a grid of clicks on photographs."""
    folder = photos or ROOT / "examples"
    files = sorted(
        p
        for p in folder.iterdir()
        if p.suffix.lower() in (".jpg", ".jpeg", ".png") and p.name not in ("overlay.png", "gallery.jpg")
    )

    def measure() -> Row:
        wide = RWKVSAM.from_pretrained(device=str(suite.device))
        narrow = RWKVSAM.from_pretrained(device=str(suite.device), dtype=torch.bfloat16)
        found = []
        for file in files[: 1 if suite.tiny else 100]:
            pixels, frame = resize(load_image(file), wide.config.image_size, suite.device)
            h, w = frame.resized_size
            grid = [[(x + 0.5) * w / 4, (y + 0.5) * h / 4] for y in range(4) for x in range(4)]
            clicks = torch.tensor(grid, device=suite.device)[:, None]
            labels = torch.ones(len(clicks), 1, dtype=torch.long, device=suite.device)
            with torch.inference_mode():
                a, b = (
                    m.decode_masks(m.encode_image(pixels, frame.input_size), clicks, labels)[0] > 0
                    for m in (wide, narrow)
                )
            both, either = ((a & b).sum((1, 2, 3)), (a | b).sum((1, 2, 3)))
            found += torch.where(either > 0, both / either.clamp(min=1), 1.0).tolist()
        return {"mean_iou": statistics.fmean(found), "min_iou": min(found), "masks": len(found), "photos": len(files)}

    suite.row(f"agreement/bfloat16/{folder.name}", measure)


def tune_stage(suite: Suite) -> None:
    """Writes the settings beside the results: they count once they lie in `triton_kernels/`."""
    if not suite.on_gpu:
        return

    least, most = TUNING_SECONDS
    seconds = min(most, suite.deadline - time.monotonic())
    target = suite.output.with_name(device_file(torch.cuda.get_device_name(suite.device)).name)

    def keep(chosen: dict[str, tune.Settings]) -> None:
        target.write_text(tune.dumps(tune.of_this_card(chosen)))

    def measure() -> Row:
        _, table = tune.tune(suite.device, seconds, keep=keep)
        return {"written": target.name, "us": table}

    suite.row("tune", measure, min(least, 0.8 * suite.seconds))


def goals_stage(suite: Suite, photos: Path | None) -> None:
    """Rows of later stages that goals are judged by, before all others: time may run out."""
    with suite.only([*suite.patterns, re.compile(GOALS)]):
        if suite.on_gpu and suite.wants("encoder/small/1024/1/graphs"):
            encode_ahead()
        for stage in (scans, encoder, decoder, partial(agreement, photos=photos), baselines):
            stage(suite)


def encode_ahead() -> None:
    """Run every kernel once, in processes side by side, which leaves their binaries in Triton's cache on disk."""
    processes = min(len(ENCODED_AHEAD), os.cpu_count() or 1)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_encode_once, *case) for case in ENCODED_AHEAD]
        failed = [str(future.exception()) for future in futures if future.exception()]
    print(f"{len(futures) - len(failed)} of {len(futures)} encodings run ahead", *failed[:1], flush=True)


def _encode_once(variant: str, size: int, batch: int, prompts: int) -> None:
    recorded_calls(variant, size, batch, torch.device("cuda"), prompts)


def goals(suite: Suite) -> list[tuple[str, float, str, bool]]:
    """What was set out for one H200, as far as it was measured: name, value, bound, met."""
    value = suite.value
    small = value("encoder/small/1024/1/graphs", "us")
    twice = value("encoder/small/2048/1/graphs", "us")
    agreed = [value(name, "mean_iou") for name in suite.rows if name.startswith("agreement")]
    eager, compiled = (value(f"baselines/reference {how}/small/1024/1", "us") for how in ("eager", "compiled"))
    other, other_twice = (value(f"baselines/transformer compiled/small/{side}/1", "us") for side in (1024, 2048))
    scan = "kernels/bi_wkv/16x4096x384"
    of_copy = value(scan, "bytes") / value(scan, "us") / 1e3 / value("ceilings/copy", "gb_s")
    rows = [
        ("bi_wkv (1, 4096, 384), us", value("kernels/bi_wkv/1x4096x384", "us"), "<=", 12),
        ("bi_wkv (16, 4096, 384), of copy bandwidth", of_copy, ">=", 0.6),
        ("bi_wkv, times the published algorithm", value("kernels/bi_wkv/1x4096x384", "times_faster"), ">=", 10),
        ("encoder small 1024 batch 1, ms", small / 1e3, "<=", 1.2),
        ("encoder small 1024 batch 16, images/s", value("encoder/small/1024/16/graphs", "images_s"), ">=", 1500),
        ("eager reference / ours", eager / small, ">=", 6),
        ("compiled reference / ours", compiled / small, ">=", 1.5),
        ("compiled transformer / ours, 1024", other / small, ">=", 2),
        ("compiled transformer / ours, 2048", other_twice / twice, ">=", 5),
        ("time a pixel, 4096 / 2048", value("encoder/small/4096/1/graphs", "us") / (4 * twice), "<=", 1.15),
        ("one more prompt, ms", value("decoder/small/1024/1", "us") / 1e3, "<=", 0.5),
        ("bfloat16 masks, mean IoU", min(agreed, default=float("nan")), ">=", 0.99),
    ]
    return [
        (name, measured, f"{sign} {bound}", measured <= bound if sign == "<=" else measured >= bound)
        for name, measured, sign, bound in rows
        if measured == measured
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--rows", default="", metavar="REGEX", help="measure only rows in whose names it is found")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no row after that")
    parser.add_argument("--photos", type=Path, help="folder of photographs for `agreement`; the examples by default")
    parser.add_argument("--output", type=Path, help="results; benchmarks/results/<device>.json by default")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the suite out")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; `--device cpu --tiny` tries the suite out")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu needs --tiny")
    if options.photos and not options.photos.is_dir():
        parser.error(f"--photos: there is no folder {str(options.photos)!r}")
    name = "cpu_tiny" if options.device == "cpu" else device_file(torch.cuda.get_device_name()).stem[len("tuned_") :]
    output = options.output or ROOT / "benchmarks/results" / f"{name}.json"
    suite = Suite(options.device, options.tiny, output, options.minutes, options.fresh, options.rows)
    print("  ".join(f"{key}: {value}" for key, value in suite.setting.items()))
    stages: dict[str, Callable[[], None]] = {
        "ceilings": lambda: ceilings(suite),
        "tests": lambda: tests(suite),
        "goals": lambda: goals_stage(suite, options.photos),
        "golden": lambda: golden(suite),
        "kernels": lambda: kernels(suite),
        "profile": lambda: profile(suite),
        "encoder": lambda: encoder(suite),
        "decoder": lambda: decoder(suite),
        "baselines": lambda: baselines(suite),
        "agreement": lambda: agreement(suite, options.photos),
        "tune": lambda: tune_stage(suite),
    }
    finished = True
    try:
        for stage in options.stages:
            stages[stage]()
        if suite.retry():
            for stage in options.stages:
                stages[stage]()
    except OutOfTime:
        finished = False
    skipped = [name for name in dict.fromkeys(suite.skipped) if name not in suite.rows]
    if not finished or skipped:
        left = f", {', '.join(skipped)} left" if skipped else ""
        print(f"the time limit was reached{left}: {GO_ON}")
    for title, measured, bound, met in goals(suite):
        print(f"{title:50} {measured:10.4g}  goal {bound}: {'met' if met else 'MISSED'}")
    failed = [n for n, row in suite.rows.items() if "error" in row]
    for n in failed:
        print(f"FAILED {n}: {suite.rows[n]['error']}")
    return 3 if not finished or skipped else int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
