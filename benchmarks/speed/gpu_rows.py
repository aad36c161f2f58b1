"""Rows of the GPU suite, stage by stage. `gpu_suite` orders and measures them.

Times are medians in microseconds. Kernels are timed in CUDA graphs of many launches, with inputs that take turns; the
encoder, the decoder and the baselines by `torch.utils.benchmark`, in blocks of many calls. Each stage is a function
that yields rows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

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
from benchmarks.speed.timing import graph_samples
from fastsam_rwkv import RWKVSAM, ModelConfig
from fastsam_rwkv.predictor.transforms import load_image, resize
from fastsam_rwkv.triton_kernels import launch_config as launch_settings
from fastsam_rwkv.triton_kernels.bi_wkv import bi_wkv
from fastsam_rwkv.triton_kernels.launch_config import device_file

ROOT = Path(__file__).resolve().parents[2]
ENCODER_CASES = (  # variant, image size, batch
    ("small", 512, 1), ("small", 1024, 1), ("small", 2048, 1), ("small", 4096, 1), ("small", 1024, 16),
    ("tiny", 512, 1), ("tiny", 1024, 1), ("tiny", 1024, 16), ("base", 1024, 1),
)  # fmt: skip
PROMPTS = 1, 16, 64, 256
SCAN_SHAPES = ((1, 4096, 384), (16, 4096, 384), (1, 65536, 384))  # B, T, C
COMPILE_SECONDS = 150.0  # time that torch.compile needs, at least
TUNE_SECONDS = 120.0, 330.0  # time that tuning needs at least, and takes at most
TUNED = (
    "conv_norm", "mbconv_expand", "mbconv_project", "mbconv_halve", "fused_linear", "fused_linear.large", "bi_wkv",
    "bi_wkv.large", "linears",
)  # fmt: skip
TUNED_SECONDS, TURNS = 40.0, 3  # to judge the tuned settings
ON_DEVICE = {False: ("kernel", "gpu_memcpy", "gpu_memset"), True: ("cpu_op",)}  # categories of a trace; tiny or not
LAUNCH_FACTS = {"grid": "grid", "block": "block", "registers": "registers per thread", "shared": "shared memory"}
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
        return _summary([1e6 * seconds for seconds in times])

    def time_launches(self, calls: Sequence[Callable[[], object]]) -> Result:
        """Time one of `calls` in a CUDA graph that repeats all of them: median and quartiles in microseconds."""
        if self.tiny:
            return self.time_calls(calls[0])
        return _summary(graph_samples(calls))


def _summary(samples: Sequence[float]) -> Result:
    """Median and quartiles of microseconds, and the samples."""
    rounded = [round(us, 3) for us in samples]
    quartiles = np.percentile(rounded, (50, 25, 75)).tolist()
    return dict(zip(QUARTILES, quartiles, strict=True)) | {"samples": rounded}


def ceilings(setup: Setup) -> Iterator[Row]:
    """Copy bandwidth of memory and of L2, and the rate of a matrix product."""
    size, side = (1 << 16, 64) if setup.tiny else (1 << 30, 8192)

    def copy(size: int) -> Result:
        """Time PyTorch's copy and a kernel with several block sizes; return the fastest, and the medians of all."""
        source = torch.zeros(size // 4, dtype=torch.int32, device=setup.device)
        target = torch.empty_like(source)
        ways: dict[str, Callable[[], object]] = {"copy_": lambda: target.copy_(source)}
        if not setup.tiny:
            from benchmarks.speed.copy_kernel import BLOCKS, copy

            ways |= {f"kernel {block} {warps}": partial(copy, source, target, block, warps) for block, warps in BLOCKS}
        results = {name: setup.time_launches([way]) for name, way in ways.items()}
        fastest = min(results, key=lambda name: results[name]["us"])
        found = {"fastest": fastest, "us_of_each": {name: result["us"] for name, result in results.items()}}
        return results[fastest] | found | {"gb_s": 2 * size / results[fastest]["us"] / 1e3}

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
    """Kernel tests in bfloat16 at usual blocks, graphs, and stored outputs of the published implementation."""
    smoke = "bfloat16 and default or test_cuda_graphs"
    yield Row("tests", partial(_pytest, setup, "tests/kernels", "tests/model/test_cuda_graphs.py", "-k", smoke))
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

    for count in (1,) if setup.tiny else PROMPTS:
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
        with tempfile.TemporaryDirectory() as folder:
            profiler.export_chrome_trace(f"{folder}/trace.json")  # which alone has grids and registers
            events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
        events = [event for event in events if event.get("cat") in ON_DEVICE[setup.tiny]]  # no calls to the driver
        launches = [_described(event) for event in sorted(events, key=lambda event: event["ts"])]
        return {"us": sum(event["dur"] for event in events), "launches": launches}

    for batch in (1,) if setup.tiny else (1, 16):
        yield Row(f"profile/{variant}/{size}/{batch}", partial(measure, batch))


def _described(event: dict[str, Any]) -> str:
    """Time, name, grid and registers of a launch."""
    args = event.get("args", {})
    known = [f"{what} {args[key]}" for what, key in LAUNCH_FACTS.items() if key in args]
    return " ".join([f"{event['dur']:.2f}", event["name"][:60], *known])


def tune(setup: Setup) -> Iterator[Row]:
    """Launch settings tuned for this device, in a file beside the results, and times of the model with and without.

    The file is refused, which renames it, if the encoder got slower. Move a file that is kept to `triton_kernels/`.
    """
    if setup.tiny:
        return
    least, most = TUNE_SECONDS
    file = setup.output.with_name(device_file(torch.cuda.get_device_name()).name)

    def measure() -> Result:
        seconds = min(most, setup.seconds_left() - TUNED_SECONDS)
        options = ["--minutes", f"{seconds / 60:.2f}", "--output", str(file), "--only", *TUNED]
        return command(["benchmarks.kernels.tune", *options], seconds + 60) | {"written": file.name}

    yield Row("tune", measure, least + TUNED_SECONDS)
    yield Row("tuned", partial(judge_settings, setup, file), TUNED_SECONDS)


def judge_settings(setup: Setup, file: Path) -> Result:
    """Time encoder and decoder without and with tuned settings in turns; rename the file if an encoder is slower."""
    result: Result = {}
    settings = {name: value for name, value in json.loads(file.read_text()).items() if name != "device"}
    for what, batch, prompts in (("encoder_1", 1, 0), ("encoder_16", 16, 0), ("decoder_1", 1, 1)):
        calls = {"before": _model_call(setup, batch, prompts)}
        with settings_used(settings):
            calls["after"] = _model_call(setup, batch, prompts)  # its graphs keep the settings
        with torch.inference_mode():
            turns: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(TURNS):
                for name, call in calls.items():
                    turns[name].append(setup.time_calls(call)["us"])
        result |= {f"{what}_{name}_us": float(np.median(us)) for name, us in turns.items()}
    slower = [n for n in (1, 16) if result[f"encoder_{n}_after_us"] > result[f"encoder_{n}_before_us"]]
    if slower:
        file.rename(file.with_suffix(".refused"))
    return result | {"kept": not slower, "slower_at_batch": slower}


def _model_call(setup: Setup, batch: int, prompts: int) -> Callable[[], object]:
    """Return a call of the model that has run once, so that its graph is recorded."""
    variant, size = ("tiny", 64) if setup.tiny else ("small", 1024)
    model, pixels = random_model(variant, size, setup.device, torch.bfloat16), setup.random(batch, 3, size, size)
    boxes = torch.tensor([[0.1, 0.2, 0.6, 0.8]], device=setup.device).mul(size).expand(prompts, 4)
    with torch.inference_mode():
        embedding = model.encode_image(pixels)
        call = partial(model.decode_masks, embedding, boxes=boxes) if prompts else partial(model.encode_image, pixels)
        call()
    return call


@contextmanager
def settings_used(settings: dict[str, Any]) -> Iterator[None]:
    """Let launchers read these settings in place of the device's file."""
    try:
        with mock.patch.object(launch_settings, "tuned_settings", lambda *_: settings):
            launch_settings.launch_config.cache_clear()
            yield
    finally:
        launch_settings.launch_config.cache_clear()


STAGES: dict[str, Callable[[Setup], Iterator[Row]]] = {
    stage.__name__: stage
    for stage in (ceilings, tests, scan, encoder, decoder, agreement, baselines, kernels, profile, tune)
}
