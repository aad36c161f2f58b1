"""The operators' calls in one encoding: what the kernels are measured, tuned and accounted for with."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from inspect import signature
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastsam_rwkv import RWKVSAM, ModelConfig
from fastsam_rwkv.modeling import layers
from fastsam_rwkv.triton_kernels.operator import Operator

OPERATORS = {name: op for name, op in sorted(vars(layers).items()) if isinstance(op, Operator)}
REFERENCES = {name: op.reference for name, op in OPERATORS.items()}
LAUNCHERS = {name: op.launcher for name, op in OPERATORS.items()}


@contextlib.contextmanager
def operators_replaced(functions: dict[str, Any]) -> Iterator[None]:
    """Within the context the model calls these functions by the operators' names."""
    with contextlib.ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(mock.patch.object(layers, name, function))
        yield


def random_model(variant: str, size: int, device: torch.device, dtype: torch.dtype) -> RWKVSAM:
    """Random weights, which cost the same as trained ones."""
    torch.manual_seed(0)
    model = RWKVSAM(ModelConfig.from_name(variant, image_size=size)).eval().requires_grad_(False)
    return model.to(device, dtype)


def recorded_calls(
    variant: str, size: int, batch: int, device: torch.device, prompts: int = 0
) -> list[tuple[str, str, tuple[Any, ...], int]]:
    """One call for every operator and set of shapes in an encoding and, if there are prompts, in decoding them as for a
    graph: name, shapes with what there is besides, arguments, how many there are."""
    model = random_model(variant, size, device, torch.bfloat16)
    model.cuda_graphs = False
    found: dict[tuple[str, str], tuple[Any, ...]] = {}
    times: dict[tuple[str, str], int] = defaultdict(int)
    with contextlib.ExitStack() as stack:
        for name in REFERENCES:
            operator = getattr(layers, name)

            def record(*args: Any, name: str = name, operator: Any = operator) -> Tensor:
                shapes = "x".join(map(str, args[2 if name == "bi_wkv" else 0].shape))
                flags = [str(a) for a in args if isinstance(a, (bool, int))]
                weights = next((f"-{len(a)}" for a in args[1:] if isinstance(a, Tensor) and a.ndim > 1), "")
                optional = dict.fromkeys(
                    parameter.name.removesuffix("_weight").removesuffix("_bias")
                    for parameter, a in zip(signature(REFERENCES[name]).parameters.values(), args, strict=False)
                    if isinstance(a, Tensor) and "None" in str(parameter.annotation)
                )
                key = (name, shapes + weights + "".join(f"-{f}" for f in flags) + "".join(f"+{o}" for o in optional))
                found.setdefault(key, args)
                times[key] += 1
                return operator(*args)

            stack.enter_context(mock.patch.object(layers, name, record))
        with torch.inference_mode():
            pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
            embedding = model.encode_image(pixels)
            if prompts:
                box = torch.rand(prompts, 4, device=device) * size
                points = model.prompt_encoder.points(None, None, box)
                graphed = model._graphed
                with mock.patch.object(graphed, "_graphs", lambda key, function, inputs: function(*inputs)):
                    graphed.decode(model._masks, embedding[0], *points, None, slice(0, 1))
    return [(*key, args, times[key]) for key, args in found.items()]


def elsewhere(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Other memory with the same values for the activations, which alone differ between calls."""
    return tuple(a.clone() if isinstance(a, Tensor) and a.ndim > 2 else a for a in args)


def dense_pieces(name: str, args: Sequence[Any]) -> Callable[[], list[Tensor]] | None:
    """An operator's products and dense convolutions alone, as cuBLAS and cuDNN do them: where one of ours, with
    all that it does besides, takes longer, theirs is to be used. None where there are none.

    The convolution of the stem is its second one; that of an operator with a norm before it takes what was not normed.
    """

    def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Callable[[], Tensor]:
        if weight.shape[2] == 1 and stride == 1:
            return partial(F.linear, x, weight.flatten(1), bias)
        weight = weight.contiguous(memory_format=torch.channels_last)
        return partial(F.conv2d, x.permute(0, 3, 1, 2), weight, bias, stride, weight.shape[2] // 2)

    pieces: list[Callable[[], Tensor]]
    if name == "fused_linear":
        x, weight, _, gate_x, gate_weight, *_ = (*args, *[None] * (7 - len(args)))
        pieces = [partial(torch.mm, x.flatten(0, -2), weight.t())]  # addmm would copy a residual first
        if gate_x is not None:
            pieces.append(partial(torch.mm, gate_x.flatten(0, -2), gate_weight.t()))
    elif name == "conv_norm":
        pieces = [convolution(*args[:3], stride=args[9])]
    elif name == "stem":
        weight, H, W = args[7], args[9], args[10]
        x = torch.randn(len(args[0]), H // 2, W // 2, len(weight)).to(weight)  # zeros would take less power, and time
        pieces = [convolution(x, weight, args[8])]
    elif name == "upscale":
        pieces = [partial(F.linear, *args[:2])]
    else:
        return None
    return lambda: [piece() for piece in pieces]


def cost(name: str, args: Sequence[Any], output: Tensor) -> tuple[int, int]:
    """Bytes that must move, every input and the output once, and operations."""
    tensors = {id(a): a for a in (*args, output) if isinstance(a, Tensor)}
    moved = sum(t.numel() * t.element_size() for t in tensors.values())
    if name == "mbconv":  # the expanded map, written once and read once
        x, expand = args[0], args[3]
        moved += 2 * x.numel() // x.shape[-1] * len(expand) * x.element_size()
    if name == "stem":
        moved += 2 * output.numel() * output.element_size()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        getattr(torch.ops.fastsam_rwkv, name)(*args)
    return moved, counter.get_total_flops()
