"""Rows of the GPU suite, stage by stage. `gpu_suite` orders and measures them.

Times are medians in microseconds. Kernels are timed in CUDA graphs of many launches, with inputs that take turns; the
encoder, the decoder and the baselines by `torch.utils.benchmark`, in blocks of many calls. Each stage is a function
that yields rows.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from benchmarks.kernels.operator_calls import (
    REFERENCES,
    cost,
    dense_pieces,
    elsewhere,
    operators_replaced,
    random_model,
    recorded_calls,
)
from benchmarks.masks.mask_geometry import mask_iou
from benchmarks.speed.gpu_baselines import compiled_encoder, transformer
from benchmarks.speed.timing import graph_microseconds
from fastsam_rwkv import RWKVSAM, ModelConfig
from fastsam_rwkv.predictor.transforms import load_image, resize
from fastsam_rwkv.triton_kernels.bi_wkv import bi_wkv
from fastsam_rwkv.triton_kernels.launch_config import device_file

ROOT = Path(__file__).resolve().parents[2]
ENCODER_CASES = (  # variant, image size, batch
    ("small", 512, 1), ("small", 1024, 1), ("small", 2048, 1), ("small", 4096, 1), ("small", 1024, 16),
    ("tiny", 512, 1), ("tiny", 1024, 1), ("tiny", 1024, 16), ("base", 1024, 1),
)  # fmt: skip
SCAN_SHAPES = ((1, 4096, 384), (16, 4096, 384), (1, 65536, 384))  # B, T, C
COMPILE_SECONDS = 150.0  # time that torch.compile needs, at least
TUNE_SECONDS = 150.0, 420.0  # time that tuning needs at least, and takes at most
QUARTILES = "us", "us_lower", "us_upper"
Result = dict[str, Any]


class Row(NamedTuple):
    """One measurement."""

    name: str  # stage and case, separated by slashes
    measure: Callable[[], Result]
    seconds: float = 0.0  # time that must be left to start it


@dataclass(frozen=True)
class Setup:
    """Device and sizes of a run."""

    tiny: bool  # shrink all shapes, and run on the CPU
    photographs: Path  # folder for `agreement`
    output: Path  # file of the results; tuned settings are written beside it
    deadline: float  # end of the time budget, in seconds of `time.monotonic`

    @property
    def device(self) -> torch.device:
        """The device that is measured."""
        return torch.device("cpu" if self.tiny else "cuda")

    def seconds_left(self) -> float:
        """Return the rest of the time budget."""
        return self.deadline - time.monotonic()

    def random(self, *shape: int) -> Tensor:
        """Return normal random numbers in bfloat16 on the device."""
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16)

    def time_calls(self, function: Callable[[], object]) -> Result:
        """Time blocks of calls, synchronized at their ends: median and quartiles of a call in microseconds."""
        for _ in range(1 if self.tiny else 3):  # a call may compile, or capture a CUDA graph
            function()
        timer = Timer("function()", globals={"function": function})
        times = timer.blocked_autorange(min_run_time=0.0 if self.tiny else 1.0).times
        return dict(zip(QUARTILES, (1e6 * np.percentile(times, (50, 25, 75))).tolist(), strict=True))

    def time_launches(self, calls: Sequence[Callable[[], object]]) -> Result:
        """Time one of `calls` in a CUDA graph that repeats all of them: median and quartiles in microseconds."""
        if self.tiny:
            return self.time_calls(calls[0])
        return dict(zip(QUARTILES, graph_microseconds(calls), strict=True))


def ceilings(setup: Setup) -> Iterator[Row]:
    """Copy bandwidth of memory and of L2, and the rate of a matrix product."""
    size, side = (1 << 16, 64) if setup.tiny else (1 << 30, 8192)

    def copy(size: int) -> Result:
        """Time a kernel that reads and writes, and the driver's copy; return the faster."""
        source = setup.random(size // 2)
        target = torch.empty_like(source)
        results = (
            setup.time_launches([lambda: torch.neg(source, out=target)]),
            setup.time_calls(lambda: target.copy_(source)),
        )
        result = min(results, key=lambda result: result["us"])
        return result | {"gb_s": 2 * source.numel() * 2 / result["us"] / 1e3}

    def product() -> Result:
        a, b = setup.random(side, side), setup.random(side, side)
        result = setup.time_calls(lambda: a @ b)
        return result | {"tflop_s": 2 * side**3 / result["us"] / 1e6}

    yield Row("ceilings/copy", partial(copy, size))
    yield Row("ceilings/cached_copy", partial(copy, min(size, 1 << 24)))
    yield Row("ceilings/matmul", product)


def command(arguments: Sequence[str], seconds: float) -> Result:
    """Run a Python module in a process of its own; keep its last line, and 40 lines if it fails or takes too long."""
    with tempfile.TemporaryFile("w+") as file:  # a pipe would wait for the module's own processes
        try:
            run = subprocess.run(
                [sys.executable, "-m", *arguments], cwd=ROOT, stdout=file, stderr=file, timeout=seconds
            )
            failure = [f"exit status {run.returncode}"] if run.returncode else []
        except subprocess.TimeoutExpired:
            failure = [f"stopped after {seconds:.0f} s"]
        file.seek(0)
        lines = file.read().strip().splitlines() or ["nothing was printed"]
    return {"summary": lines[-1]} | ({"error": "\n".join(failure + lines[-40:])} if failure else {})


def _pytest(setup: Setup, *arguments: str) -> Result:
    options = ["pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", *arguments]
    if setup.tiny:
        options.append("--collect-only")
    elif find_spec("xdist"):  # nearly all of the time is the compiler's
        options += ["-n", str(min(12, os.cpu_count() or 1))]
    return command(options, max(60.0, setup.seconds_left() / 3))  # a test may hang


def tests(setup: Setup) -> Iterator[Row]:
    """Kernel tests on the device, and stored outputs of the published implementation."""
    yield Row("tests", partial(_pytest, setup, "tests/kernels", "tests/model/test_cuda_graphs.py", "-k", "not golden"))
    files = "tests/model/test_golden.py", "tests/kernels/test_kernel_model.py"
    yield Row("golden", partial(_pytest, setup, *files, "-k", "golden"))


def scan(setup: Setup) -> Iterator[Row]:
    """Times of the scan at the goals' sizes and on a long sequence, beside the published algorithm."""

    def measure(batch: int, T: int, C: int) -> Result:
        inputs = [(*(setup.random(C) for _ in "wu"), *(setup.random(batch, T, C) for _ in "kvr")) for _ in range(4)]
        with torch.inference_mode():
            bound = max(float(t.abs().max()) for a in inputs for t in a[:2])
            result = setup.time_launches([partial(bi_wkv, *a, 1 / T, bound) for a in inputs])
            ungated = setup.time_launches([partial(bi_wkv, *a[:4], None, 1 / T, bound) for a in inputs])
            result["plain_us"] = ungated["us"]
            if not setup.tiny:
                from benchmarks.speed.published_scan import segment_scan

                published = setup.time_launches([partial(segment_scan, *a[:4], 1 / T) for a in inputs])["us"]
                result |= {"published_algorithm_us": published, "times_faster": published / result["plain_us"]}
        return result | {"bytes": 4 * batch * T * C * 2}

    for shape in ((1, 64, 36),) if setup.tiny else SCAN_SHAPES:
        yield Row(f"kernels/bi_wkv/{'x'.join(map(str, shape))}", partial(measure, *shape))


def kernels(setup: Setup) -> Iterator[Row]:
    """Times of the operator calls of an encoding and, for one image, a prompt, beside reference, cuBLAS and cuDNN."""

    @lru_cache(maxsize=1)
    def calls(variant: str, size: int, batch: int, device: str) -> list[tuple[str, str, tuple[Any, ...], int]]:
        return recorded_calls(variant, size, batch, torch.device(device), prompts=int(batch == 1))

    def measure(name: str, index: int, case: tuple[str, int, int]) -> Result:
        operator = getattr(torch.ops.fastsam_rwkv, name)
        _, _, args, times = calls(*case, str(setup.device))[index]
        copies = [args, *(elsewhere(args) for _ in range(2))]
        with torch.inference_mode():
            result = setup.time_launches([partial(operator, *a) for a in copies])
            result["reference_us"] = setup.time_launches([partial(REFERENCES[name], *a) for a in copies])["us"]
            if dense := [piece for a in copies if (piece := dense_pieces(name, a))]:
                result["dense_pieces_us"] = setup.time_launches(dense)["us"]
            moved, flops = cost(name, args, operator(*args))
        return result | {"bytes": moved, "flops": flops, "calls": times}

    for variant, size in (("tiny", 64),) if setup.tiny else (("tiny", 1024), ("small", 1024)):
        for batch in (1, 16):
            case = variant, size, batch
            for index, (name, shapes, _, _) in enumerate(calls(*case, "meta")):
                yield Row(f"kernels/{variant}/{size}/{batch}/{name}/{shapes}", partial(measure, name, index, case))


def _encode(setup: Setup, model: RWKVSAM, size: int, batch: int = 1) -> Result:
    pixels = setup.random(batch, 3, size, size)

    def encode() -> None:
        torch.compiler.cudagraph_mark_step_begin()  # a compiled neck would free the compiled backbone's outputs
        model.encode_image(pixels)

    with torch.inference_mode():
        result = setup.time_calls(encode)
    return result | {"images_s": 1e6 * batch / result["us"]}


def encoder(setup: Setup) -> Iterator[Row]:
    """Times of the image encoder in CUDA graphs and, in one case, launch by launch."""

    def measure(variant: str, size: int, batch: int, graphs: bool) -> Result:
        model = random_model(variant, size, setup.device, torch.bfloat16)
        model.cuda_graphs = graphs
        return _encode(setup, model, size, batch)

    launches = ("tiny", 64, 1) if setup.tiny else ("small", 1024, 1)
    for case in (launches,) if setup.tiny else ENCODER_CASES:
        yield Row("/".join(map(str, ("encoder", *case, "graphs"))), partial(measure, *case, True))
    yield Row("/".join(map(str, ("encoder", *launches, "launches"))), partial(measure, *launches, False))


def decoder(setup: Setup) -> Iterator[Row]:
    """Times of one or more prompts on an embedded image."""
    variant, size = ("tiny", 64) if setup.tiny else ("small", 1024)

    def measure(count: int) -> Result:
        model = random_model(variant, size, setup.device, torch.bfloat16)
        boxes = torch.tensor([[0.1, 0.2, 0.6, 0.8]], device=setup.device).mul(size).expand(count, 4)
        with torch.inference_mode():
            embedding = model.encode_image(setup.random(1, 3, size, size))
            return setup.time_calls(lambda: model.decode_masks(embedding, boxes=boxes))

    for count in (1,) if setup.tiny else (1, 16, 64, 256):
        yield Row(f"decoder/{variant}/{size}/{count}", partial(measure, count))


def agreement(setup: Setup) -> Iterator[Row]:
    """IoU of the default model's masks in bfloat16 and in float32, for a grid of clicks on photographs."""
    files = sorted(p for p in setup.photographs.glob("*.jpg") if p.name != "gallery.jpg")[: 1 if setup.tiny else 100]

    def masks(model: RWKVSAM, file: Path) -> Tensor:
        pixels, frame = resize(load_image(file), model.config.image_size, setup.device)
        h, w = frame.resized_size
        grid = [[[(x + 0.5) * w / 4, (y + 0.5) * h / 4]] for y in range(4) for x in range(4)]
        labels = torch.ones(len(grid), 1, dtype=torch.long, device=setup.device)
        embedding = model.encode_image(pixels, frame.input_size)
        return model.decode_masks(embedding, torch.tensor(grid, device=setup.device), labels)[0] > 0

    def measure() -> Result:
        dtypes = (torch.float32, torch.bfloat16)
        models = [RWKVSAM.from_pretrained(device=setup.device, dtype=dtype) for dtype in dtypes]
        with torch.inference_mode():
            found = torch.cat([mask_iou(*(masks(model, file) for model in models)) for file in files])
        return {"mean_iou": found.mean().item(), "min_iou": found.min().item(), "masks": len(found)}

    yield Row(f"agreement/bfloat16/{setup.photographs.name}", measure)


def baselines(setup: Setup) -> Iterator[Row]:
    """Times of our reference and a transformer of its scale, eager and compiled, SAM ViT-B and SAM 2 Hiera-tiny."""
    variant, size = ("tiny", 64) if setup.tiny else ("small", 1024)

    def encode(build: Callable[[int], RWKVSAM], side: int, compiled: bool) -> Result:
        model = build(side)
        model.cuda_graphs = False
        compiling = compiled_encoder(model, mode="max-autotune") if compiled else nullcontext()
        with operators_replaced(REFERENCES), compiling:
            return _encode(setup, model, side)

    def reference(side: int) -> RWKVSAM:
        return random_model(variant, side, setup.device, torch.bfloat16)

    def same_scale(side: int) -> RWKVSAM:
        torch.manual_seed(0)
        model = transformer(ModelConfig.from_name(variant, image_size=side)).requires_grad_(False)
        return model.to(setup.device, torch.bfloat16)

    def published(build: Callable[[int], torch.nn.Module]) -> Result:
        model, pixels = build(size).to(setup.device, torch.bfloat16), setup.random(1, 3, size, size)
        with torch.inference_mode():
            return setup.time_calls(lambda: model(pixels))

    yield Row(f"baselines/reference eager/{variant}/{size}/1", partial(encode, reference, size, False))
    yield Row(f"baselines/transformer eager/{variant}/{size}/1", partial(encode, same_scale, size, False))
    if setup.tiny:
        return
    from benchmarks.speed.cpu_encoder import sam2_hiera_tiny, sam_vit_b

    yield Row(f"baselines/SAM ViT-B/{size}/1", partial(published, sam_vit_b))
    yield Row(f"baselines/SAM 2 Hiera-tiny/{size}/1", partial(published, sam2_hiera_tiny))
    for name, build, side in (
        ("transformer", same_scale, 1024),
        ("transformer", same_scale, 2048),
        ("reference", reference, 1024),
    ):
        yield Row(f"baselines/{name} compiled/{variant}/{side}/1", partial(encode, build, side, True), COMPILE_SECONDS)


def profile(setup: Setup) -> Iterator[Row]:
    """Every launch of an encoding in order. PyTorch's profiler counts the time twice if two launches overlap."""
    variant, size = ("tiny", 64) if setup.tiny else ("small", 1024)
    kind = "CPU" if setup.tiny else "CUDA"

    def measure(batch: int) -> Result:
        model = random_model(variant, size, setup.device, torch.bfloat16)
        model.cuda_graphs = False
        pixels = setup.random(batch, 3, size, size)
        with torch.inference_mode():
            for _ in range(3):
                model.encode_image(pixels)
            activity = getattr(torch.profiler.ProfilerActivity, kind)
            with torch.profiler.profile(activities=[activity]) as profiler:
                model.encode_image(pixels)
                if not setup.tiny:
                    torch.cuda.synchronize()
        events = [event for event in profiler.events() if event.device_type.name == kind]  # no calls to the driver
        events.sort(key=lambda event: event.time_range.start)
        times = [(event.name, event.time_range.elapsed_us()) for event in events]
        return {"us": sum(us for _, us in times), "launches": [f"{us:.2f} {name[:60]}" for name, us in times]}

    for batch in (1,) if setup.tiny else (1, 16):
        yield Row(f"profile/{variant}/{size}/{batch}", partial(measure, batch))


def tune(setup: Setup) -> Iterator[Row]:
    """Launch settings tuned for this device, in a file beside the results. Move it to `triton_kernels/` to use it."""
    if setup.tiny:
        return
    least, most = TUNE_SECONDS

    def measure() -> Result:
        file = setup.output.with_name(device_file(torch.cuda.get_device_name()).name)
        seconds = min(most, setup.seconds_left())
        options = ["--minutes", f"{seconds / 60:.2f}", "--output", str(file)]
        return command(["benchmarks.kernels.tune", *options], seconds + 60) | {"written": file.name}

    yield Row("tune", measure, least)


STAGES: dict[str, Callable[[Setup], Iterator[Row]]] = {
    stage.__name__: stage
    for stage in (ceilings, tests, scan, encoder, decoder, agreement, baselines, kernels, profile, tune)
}


def compile_ahead() -> None:
    """Run every kernel once, in several processes, because compiled kernels are then in Triton's cache on disk."""
    processes = min(len(ENCODER_CASES), os.cpu_count() or 1)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for case in ENCODER_CASES:  # one that fails will fail again as a row
            pool.submit(_compile, *case)


def _compile(variant: str, size: int, batch: int) -> None:
    recorded_calls(variant, size, batch, torch.device("cuda"), prompts=int(batch == 1))
