"""TensorRT engines of exported graphs, and a predictor that runs them.

This module is written for TensorRT 10.8 and later, including 11. It has not run on TensorRT yet, only on the tests'
stand-in. `fastsam-rwkv export tensorrt --self-check` runs all of it and prints a report.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..errors import listed, short_repr
from ..files import whole_file
from ..predictor.base import ImagePredictor
from ..predictor.frame import ImageFrame
from ..predictor.image_io import load_image
from ..predictor.transforms import masks_to_image
from .check import PHOTO, mask_ious
from .feeds import decoder_inputs, encoder_input, labeled_points
from .manifest import (
    DECODER,
    ENCODER,
    MANIFEST,
    ExportError,
    Manifest,
    describe,
    make_stage,
    read_json,
    reject,
    require,
)
from .onnx import export_onnx
from .onnx_predictor import OnnxPredictor

OLDEST = (10, 8)  # the first with a CumSum layer; older parsers make it a loop over the tokens
ENGINES, FORMAT_VERSION = "engines.json", 1
PLANS = {ENCODER: "encoder.plan", DECODER: "decoder.plan"}
LEAST_IOU = {"fp32": 0.999, "fp16": 0.99}  # mean mask IoU with ONNX Runtime

Range = tuple[int, int, int]  # min, opt, max of an optimization profile
Shapes = dict[str, tuple[tuple[int, ...], ...]]  # min, opt, max by input name


@dataclass(frozen=True)
class Ranges:
    """Sizes that engines are built for, each as (min, opt, max) of an optimization profile.

    Attributes:
        batch: Images in a call of the encoder.
        prompts: Prompts in a call of the decoder. More prompts take several calls.
        points: Points of a prompt. A box counts as two; a prompt without a box has one padding point more.

    Raises:
        ExportError: A range is not 1 <= min <= opt <= max.
    """

    batch: Range = (1, 1, 1)
    prompts: Range = (1, 1, 32)
    points: Range = (1, 2, 16)

    def __post_init__(self) -> None:
        for name, values in vars(self).items():
            if len(values) != 3 or not 1 <= values[0] <= values[1] <= values[2]:
                raise ExportError(f"{name} must be MIN,OPT,MAX with 1 <= MIN <= OPT <= MAX, got {values}")


def shapes(manifest: Manifest, ranges: Ranges) -> dict[str, Shapes]:
    """Return the (min, opt, max) shapes of each graph's dynamic inputs, by graph and input name."""
    S = manifest.image_size
    images = ranges.batch if manifest.batch is None else (manifest.batch,) * 3
    encoder: Shapes = {}
    if manifest.uint8:  # opt is a 4:3 landscape image
        sides = ((1, 1), (3 * S // 4, S), (S, S))
        encoder["image"] = tuple((n, *side, 3) for n, side in zip(images, sides, strict=True))
    elif manifest.batch is None:
        encoder["image"] = tuple((n, 3, S, S) for n in images)
    labels = tuple(zip(ranges.prompts, ranges.points, strict=True))
    coords, masks = tuple((*shape, 2) for shape in labels), tuple((n, 1, S // 4, S // 4) for n in ranges.prompts)
    return {ENCODER: encoder, DECODER: {"point_coords": coords, "point_labels": labels, "mask_input": masks}}


def trtexec_commands(folder: str | os.PathLike[str], ranges: Ranges | None = None) -> list[str]:
    """Return the `trtexec` commands that build the same engines as `build_tensorrt`.

    Raises:
        ExportError: The folder holds no export, or one whose decoder takes `orig_im_size`.
    """
    folder = Path(os.path.expanduser(folder))
    commands = []
    for graph, inputs in shapes(_for_tensorrt(folder), ranges or Ranges()).items():
        options = [f"--onnx={folder / graph}", f"--saveEngine={folder / PLANS[graph]}", "--stronglyTyped", "--noTF32"]
        for i, which in enumerate(("min", "opt", "max")):
            if inputs:
                given = ",".join(f"{name}:{'x'.join(map(str, shape[i]))}" for name, shape in inputs.items())
                options.append(f"--{which}Shapes={given}")
        commands.append(shlex.join(["trtexec", *options]))
    return commands


def build_tensorrt(
    folder: str | os.PathLike[str], ranges: Ranges | None = None, timing_cache: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Build `encoder.plan` and `decoder.plan` beside the graphs after a check of their masks against ONNX Runtime.

    Networks are strongly typed, so `export_onnx` decides the precision. Engines that fail the check go to
    `folder/rejected`.

    Args:
        folder: Folder that `export_onnx` wrote, with the contract "sam2".
        ranges: Sizes to build for, by default `Ranges()`.
        timing_cache: TensorRT timing cache to read, if the file exists, and to write. It makes the next build faster.

    Returns:
        The content of `engines.json`: versions, GPU, ranges, and the differences of masks.

    Raises:
        ExportError: TensorRT or a GPU is missing, a graph cannot be built, or the engines fail the check.
    """
    folder, ranges = Path(os.path.expanduser(folder)), ranges or Ranges()
    manifest = _for_tensorrt(folder)
    trt = _tensorrt()
    require("polygraphy", "onnxruntime", extra="tensorrt")
    from polygraphy.backend.trt import CreateConfig, Profile, engine_bytes_from_network, network_from_onnx_path
    from polygraphy.exception import PolygraphyException

    with make_stage(folder) as stage:
        cache = None if timing_cache is None else Path(os.path.expanduser(timing_cache))
        written = stage / "timing.cache"
        for graph, inputs in shapes(manifest, ranges).items():
            profile = Profile()
            for tensor, (smallest, best, largest) in inputs.items():
                profile.add(tensor, min=smallest, opt=best, max=largest)
            config = CreateConfig(
                profiles=[profile] if inputs else None,
                load_timing_cache=str(cache) if cache is not None and cache.exists() else None,
            )
            try:
                network = network_from_onnx_path(str(folder / graph), strongly_typed=True)
                plan = engine_bytes_from_network(
                    network, config, save_timing_cache=None if cache is None else str(written)
                )
            except PolygraphyException as error:
                raise ExportError(f"TensorRT {trt.__version__} could not build {graph}: {error}") from error
            (stage / PLANS[graph]).write_bytes(plan)
            if cache is not None:
                with whole_file(cache) as stream:
                    stream.write(written.read_bytes())
        built: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "version": __version__,
            **_versions(trt),
            "ranges": vars(ranges),
            "graphs": {graph: file["sha256"] for graph, file in manifest.files.items()},
            "files": {plan: describe(stage / plan) for plan in PLANS.values()},
        }
        (stage / ENGINES).write_text(json.dumps(built, indent=2) + "\n", encoding="utf-8")
        for file in (MANIFEST, *manifest.files):
            shutil.copy(folder / file, stage)
        built["check"] = compare(stage)
        (stage / ENGINES).write_text(json.dumps(built, indent=2) + "\n", encoding="utf-8")
        iou, limit = built["check"]["mask_iou_mean"], LEAST_IOU[manifest.precision]
        if not iou >= limit:
            found = f"mean IoU {iou:.4f}, limit {limit}. The files are in {reject(stage)}"
            raise ExportError(f"the engines' masks differ from ONNX Runtime's: {found}")
        for file in (*PLANS.values(), ENGINES):
            (stage / file).replace(folder / file)
        return built


def compare(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Compare masks of a folder's engines with masks of its graphs in ONNX Runtime, on the installed image."""
    image = load_image(PHOTO)
    H, W = image.shape[:2]
    generator = np.random.default_rng(0)
    boxes = np.sort(generator.uniform(0, 1, (7, 2, 2)), axis=1).reshape(7, 4) * [W, H, W, H]
    points = generator.uniform(0, 1, (7, 1, 2)) * [W, H]
    click, results = [[0.6 * W, 0.7 * H]], []
    for predictor in (OnnxPredictor(folder), TensorRTPredictor(folder)):
        predictor.set_image(image)
        results.append([predictor.predict(click), predictor.predict(points), predictor.predict(box=boxes)])
    pairs = list(zip(*results, strict=True))
    ious = [iou for (masks, *_), (others, *_) in pairs for iou in mask_ious(masks, others)]
    logits = max(float(np.abs(low - other).max()) for (*_, low), (*_, other) in pairs)
    return {"mask_iou_mean": float(np.mean(ious)), "mask_iou_least": min(ious), "logits": logits, "masks": len(ious)}


class TensorRTPredictor(ImagePredictor[dict[str, Tensor], Tensor]):
    """Predictor with the interface of `Predictor` that runs TensorRT engines.

    Args:
        folder: Folder in which `fastsam-rwkv export tensorrt` built engines.

    Raises:
        ExportError: TensorRT or the GPU is missing, or the engines are missing or damaged. Also if they were built for
            other graphs, another TensorRT or another GPU.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__()
        folder = Path(os.path.expanduser(folder))
        self.manifest = _for_tensorrt(folder)
        built = read_engines(folder, self.manifest)
        trt = _tensorrt()
        for name, here in _versions(trt).items():
            if built[name] != here:
                raise ExportError(
                    f"the engines in {str(folder)!r} were built for {name} {built[name]!r}, but this machine has "
                    f"{here!r}; build them again: fastsam-rwkv export tensorrt {shlex.quote(str(folder))}"
                )
        try:
            self.ranges = Ranges(**{name: tuple(values) for name, values in built["ranges"].items()})
        except TypeError as error:
            raise ExportError(f"{str(folder / ENGINES)!r} is damaged: {error}; build the engines again") from error
        self._encoder, self._decoder = (_Engine(trt, folder / plan) for plan in PLANS.values())

    @property
    def prompts_at_once(self) -> int:
        return min(super().prompts_at_once, self.ranges.prompts[2])

    @property
    def image_size(self) -> int:
        return self.manifest.image_size

    @property
    def has_multimask(self) -> bool:
        return self.manifest.num_masks > 1

    def embed(self, pixels: np.ndarray, frame: ImageFrame) -> dict[str, Tensor]:
        image = encoder_input(pixels, self.manifest, self.manifest.batch or self.ranges.batch[0])
        maps = self._encoder({"image": torch.from_numpy(image).cuda()})
        return {name: maps[name][:1] for name in self.manifest.embedding}

    def decode(
        self, embedding: dict[str, Tensor], inputs: dict[str, np.ndarray], multimask_output: bool
    ) -> tuple[Tensor, np.ndarray]:
        feeds = decoder_inputs(labeled_points(inputs), self.manifest)
        N, P = feeds["point_labels"].shape
        smallest, best, largest = self.ranges.points
        if P == 0:
            raise ValueError("engines take no mask_input without points; add a point or a box")
        if not smallest <= P <= largest:
            raise ValueError(
                f"a prompt has {P} points (a box counts as two, no box as one), but the engine takes {smallest} to "
                f"{largest}; build it with --points {min(P, smallest)},{best},{max(P, largest)}"
            )
        has_mask = feeds.pop("has_mask_input")
        missing = max(0, self.ranges.prompts[0] - N)  # the profile's minimum; the first prompt is repeated
        feeds = {name: np.concatenate([a, np.repeat(a[:1], missing, axis=0)]) for name, a in feeds.items()}
        feeds["has_mask_input"] = has_mask
        outputs = self._decoder({**embedding, **{name: torch.from_numpy(a).cuda() for name, a in feeds.items()}})
        chosen = slice(1, None) if multimask_output else slice(0, 1)
        return outputs["low_res_masks"][:N, chosen], outputs["iou_predictions"][:N, chosen].cpu().numpy()

    def enlarge(self, low_res_masks: Tensor, frame: ImageFrame, return_logits: bool) -> np.ndarray:
        logits = masks_to_image(low_res_masks, frame)
        return (logits if return_logits else logits > 0).cpu().numpy()

    def to_numpy(self, low_res_masks: Tensor) -> np.ndarray:
        return low_res_masks.cpu().numpy()

    def get_image_embedding(self) -> Tensor:
        """Return the image embedding `[1, 256, S/16, S/16]` on the GPU, float32, or float16 if exported as "fp16".

        Raises:
            RuntimeError: No image is set.
        """
        return self._embedding["image_embed"]


class _Engine:
    """Deserialized engine that maps CUDA tensors to CUDA tensors by name."""

    def __init__(self, trt: Any, file: Path) -> None:
        self._file = file
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        self._engine = self._runtime.deserialize_cuda_engine(file.read_bytes())
        if self._engine is None:
            raise ExportError(f"TensorRT could not read {str(file)!r}; see its message above")
        self._context = self._engine.create_execution_context()
        self._stream = torch.cuda.Stream()  # on the default stream TensorRT synchronizes the device
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self._outputs = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]
        self._dtypes = {trt.float32: torch.float32, trt.float16: torch.float16}

    def __call__(self, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = {name: tensor.contiguous() for name, tensor in feeds.items()}
        for name, tensor in inputs.items():
            if not self._context.set_input_shape(name, tuple(tensor.shape)):
                raise ExportError(
                    f"{self._file.name} does not take {name} of shape {list(tensor.shape)}; "
                    "build engines for it with --batch, --prompts and --points"
                )
            self._context.set_tensor_address(name, tensor.data_ptr())
        outputs = {}
        for name in self._outputs:
            dtype = self._dtypes[self._engine.get_tensor_dtype(name)]
            outputs[name] = torch.empty(tuple(self._context.get_tensor_shape(name)), dtype=dtype, device="cuda")
            self._context.set_tensor_address(name, outputs[name].data_ptr())
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise RuntimeError(f"TensorRT failed to run {self._file.name}; see its message above")
        current.wait_stream(self._stream)  # the inputs' memory must not be reused before it is read
        return outputs


def self_check(folder: Path) -> dict[str, Any]:
    """Export the bundled model in three forms, build engines, compare and time them.

    Args:
        folder: Empty folder to work in.

    Returns:
        Versions, GPU, and for each form the differences of masks and the times in milliseconds, or an error.
    """
    report: dict[str, Any] = {"version": __version__, **_versions(_tensorrt()), "forms": {}}
    half: dict[str, Any] = {"precision": "fp16"}
    for name, form in {"fp32": {}, "fp16": half, "uint8": half | {"uint8": True}}.items():
        target = folder / name
        export_onnx(None, target, **form)
        try:
            built = build_tensorrt(target, timing_cache=folder / "timing.cache")
            report["forms"][name] = {"check": built["check"], "milliseconds": _times(TensorRTPredictor(target))}
        except ExportError as error:
            report["forms"][name] = {"error": str(error)}
    return report


def _times(predictor: TensorRTPredictor, repeats: int = 50) -> dict[str, float]:
    """Return the median milliseconds of `set_image` and of `predict` with one point, copies included."""
    image = load_image(PHOTO)
    times: dict[str, list[float]] = {"set_image": [], "predict": []}
    for _ in range(repeats):
        start, between, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        start.record()
        predictor.set_image(image)
        between.record()
        predictor.predict(point_coords=[[100, 100]])
        end.record()
        torch.cuda.synchronize()
        times["set_image"].append(start.elapsed_time(between))
        times["predict"].append(between.elapsed_time(end))
    return {name: float(np.median(values)) for name, values in times.items()}


def read_engines(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Read `engines.json` and check its files.

    Raises:
        ExportError: Engines are missing, were changed, or were built from other graphs than the manifest's.
    """
    again = f"build them: fastsam-rwkv export tensorrt {shlex.quote(str(folder))}"
    if not (folder / ENGINES).is_file():
        raise ExportError(f"{str(folder)!r} holds no engines ({ENGINES}); {again}")
    built = read_json(folder / ENGINES, again)
    found = built.get("format_version")
    if found != FORMAT_VERSION:
        raise ExportError(
            f"the engines in {str(folder)!r} have format {short_repr(found)}, not {FORMAT_VERSION}; {again}"
        )
    kinds = {"graphs": dict, "files": dict, "ranges": dict, "tensorrt": str, "gpu": str, "compute_capability": str}
    if wrong := [name for name, kind in kinds.items() if not isinstance(built.get(name), kind)]:
        raise ExportError(f"{str(folder / ENGINES)!r} is damaged: wrong {listed(wrong)}; {again}")
    if built["graphs"] != {name: file.get("sha256") for name, file in manifest.files.items()}:
        raise ExportError(f"the engines in {str(folder)!r} were built from other graphs; {again}")
    for plan in PLANS.values():
        if not (folder / plan).is_file() or describe(folder / plan) != built["files"].get(plan):
            raise ExportError(f"{str(folder / plan)!r} is missing or was changed; {again}")
    return built


def _for_tensorrt(folder: Path) -> Manifest:
    """Read the manifest of `folder` and check that TensorRT can run its graphs."""
    manifest = Manifest.read(folder)
    if manifest.takes_size:
        raise ExportError(
            f"{str(folder)!r} has the contract {manifest.contract!r}: the size of its masks depends on the values of a "
            "float input, which TensorRT does not support; export again with --contract sam2"
        )
    return manifest


def _tensorrt() -> Any:
    """Return the tensorrt module after checking its version and the GPU."""
    require("tensorrt", extra="tensorrt")
    import tensorrt

    version = tuple(int(part) for part in tensorrt.__version__.split(".")[:2])
    if version < OLDEST:
        raise ExportError(
            f"TensorRT {tensorrt.__version__} is older than {OLDEST[0]}.{OLDEST[1]}, the first with a CumSum layer; "
            "pip install -U tensorrt"
        )
    if not torch.cuda.is_available():
        raise ExportError("TensorRT needs an NVIDIA GPU that PyTorch can use; torch.cuda.is_available() is False here")
    return tensorrt


def _versions(trt: Any) -> dict[str, str]:
    """Return the version of TensorRT, and name and compute capability of the current GPU; engines need the same."""
    major, minor = torch.cuda.get_device_capability()
    gpu = torch.cuda.get_device_name()
    return {"tensorrt": trt.__version__, "gpu": gpu, "compute_capability": f"{major}.{minor}"}
