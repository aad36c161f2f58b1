"""Operators of the model, and the calls with which their kernels are compiled, timed and tuned."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from inspect import signature
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fastsam_rwkv import RWKVSAM, ModelConfig
from fastsam_rwkv.modeling import layers, mask_decoder, prompt_encoder
from fastsam_rwkv.predictor.frame import ImageFrame
from fastsam_rwkv.predictor.resizing import MaskResizer
from fastsam_rwkv.triton_kernels.mask_edges import mask_edges
from fastsam_rwkv.triton_kernels.operator import Operator

MODULES = (layers, mask_decoder, prompt_encoder)  # that call operators
OPERATORS = {name: op for module in MODULES for name, op in sorted(vars(module).items()) if isinstance(op, Operator)}
REFERENCES = {name: op.reference for name, op in OPERATORS.items()}
LAUNCHERS = {name: op.launcher for name, op in OPERATORS.items()} | {"mask_edges": mask_edges.launcher}

MASKS_OF = 1500, 2250  # pixels of the image whose masks `mask_edges` resizes
Call = tuple[str, str, tuple[Any, ...], int]  # name, shapes and flags, arguments, calls in the model


@contextlib.contextmanager
def operators_replaced(functions: dict[str, Any]) -> Iterator[None]:
    """Let the model call these functions instead of the operators of the same names, and choose as on CUDA."""
    with contextlib.ExitStack() as patches:
        for module in MODULES:
            here = {name: function for name, function in functions.items() if name in vars(module)}
            patches.enter_context(mock.patch.multiple(module, **here, on_gpu=lambda t: True))
        yield


def random_model(variant: str, size: int, device: torch.device, dtype: torch.dtype) -> RWKVSAM:
    """Build a model with random weights, which cost the same as trained ones."""
    torch.manual_seed(0)
    with torch.device("meta") if device.type == "meta" else contextlib.nullcontext():
        model = RWKVSAM(ModelConfig.from_name(variant, image_size=size)).eval().requires_grad_(False)
    return model.to(device, dtype)


def recorded_calls(
    variant: str,
    size: int,
    batch: int,
    device: torch.device,
    prompts: int = 0,
    *,
    points: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Call]:
    """Record one call for each operator and set of shapes while encoding images.

    With `prompts`, decode as in a CUDA graph: a box and `points` points for each prompt.
    """
    model = random_model(variant, size, device, dtype)
    model.cuda_graphs = False
    found: dict[tuple[str, str], tuple[Any, ...]] = {}
    times: Counter[tuple[str, str]] = Counter()

    def record(name: str, *args: Any) -> Any:
        key = (name, _shapes(name, args))
        found.setdefault(key, args)
        times[key] += 1
        return OPERATORS[name](*args)

    with operators_replaced({name: partial(record, name) for name in OPERATORS}), torch.inference_mode():
        pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
        embedding = model.encode_image(pixels)
        if prompts:
            coords = torch.rand(prompts, points + 2, 2, device=device) * size
            labels = torch.ones(prompts, points, dtype=torch.long, device=device)
            given = (coords[:, 2:], labels) if points else (None, None)
            tokens = model.prompt_encoder.points(*given, coords[:, :2].flatten(1))
            graphed = model._graphed
            with mock.patch.object(graphed, "_graphs", _run_eagerly):
                graphed.decode(model._masks, embedding[0], *tokens, None, slice(0, 1))
    return [(*key, args, times[key]) for key, args in found.items()]


def _run_eagerly(key: object, device: object, function: Callable[..., Any], inputs: Sequence[Tensor], kept: int) -> Any:
    """Stand in for CUDA graphs."""
    return function(None, *inputs)


def mask_edges_calls(device: torch.device, size: tuple[int, int] = MASKS_OF) -> list[Call]:
    """Return the calls that count and that write the boundaries of 64 smooth masks, for a model of 1024 pixels."""
    noise = torch.randn(64, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    low = F.interpolate(noise, (256, 256), mode="bicubic")[:, 0].to(device)
    tables = MaskResizer(ImageFrame.of(size, 1024), device)._tables(size)
    counts = mask_edges(low, *tables, None, 0)
    ends = counts.flatten().cumsum(0).view(counts.shape)
    total = 1000 if device.type == "meta" else int(ends[-1, -1])
    kinds = (("count", None, 0), ("write", ends - counts, total))
    return [("mask_edges", kind, (low, *tables, *args), 1) for kind, *args in kinds]


def _shapes(name: str, args: tuple[Any, ...]) -> str:
    """Name the shapes, flags and optional tensors of a call."""
    shapes = "x".join(map(str, args[2 if name == "bi_wkv" else 0].shape))
    weights = next((f"-{len(a)}" for a in args[1:] if isinstance(a, Tensor) and a.ndim > 1), "")
    flags = "".join(f"-{a}" for a in args if isinstance(a, (bool, int)))
    optional = dict.fromkeys(
        parameter.name.removesuffix("_weight").removesuffix("_bias")
        for parameter, a in zip(signature(REFERENCES[name]).parameters.values(), args, strict=False)
        if isinstance(a, Tensor) and "None" in str(parameter.annotation)
    )
    return shapes + weights + flags + "".join(f"+{name}" for name in optional)


def elsewhere(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copy the activations to other memory, because they alone differ between calls."""
    return tuple(a.clone() if isinstance(a, Tensor) and a.ndim > 2 else a for a in args)


class _DensePieces(TorchFunctionMode):
    """Record the matrix products and convolutions that PyTorch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Tensor]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (F.linear, F.conv2d):
            x, weight, *rest = args
            if weight.ndim == 4:  # else cuDNN would convert it in every call
                weight = weight.contiguous(memory_format=torch.channels_last)
            self.calls.append(partial(function, x, weight, *rest, **kwargs))
        return function(*args, **kwargs)


def dense_pieces(name: str, args: Sequence[Any]) -> Callable[[], list[Tensor]] | None:
    """Matrix products and convolutions of an operator by cuBLAS and cuDNN, the bar for its kernel; None without any."""
    with _DensePieces() as pieces:
        REFERENCES[name](*args)
    return (lambda: [call() for call in pieces.calls]) if pieces.calls else None


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    """Return the outputs of a call, one or several."""
    return (result,) if isinstance(result, Tensor) else result


def cost(name: str, args: Sequence[Any], result: Any) -> tuple[int, int]:
    """Bytes that must move, counting each input and output once, and operations."""
    output, *_ = outputs = outputs_of(result)
    tensors = {id(a): a for a in (*args, *outputs) if isinstance(a, Tensor)}
    moved = sum(t.numel() * t.element_size() for t in tensors.values())
    if name == "mbconv":  # the expanded map, written once and read once
        x, expand = args[0], args[3]
        moved += 2 * x.numel() // x.shape[-1] * len(expand) * x.element_size()
    if name == "stem":
        moved += 2 * output.numel() * output.element_size()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        OPERATORS[name].kernel(*args)
    return moved, counter.get_total_flops()
