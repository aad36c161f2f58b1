"""Translations of the package's operators to ONNX for `torch.onnx.export`.

Maps are channels-last between operators, as in the model, and channels-first around convolutions. Adjacent transposes
cancel. LayerNormalization and the scan are float32 also in a float16 graph. Nodes on constants rearrange the weights,
and constant folding removes these nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir
import torch
from onnx_ir import DataType, Value
from onnx_ir.convenience import replace_nodes_and_values
from onnx_ir.passes import Sequential
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
    ShapeInferencePass,
)
from onnx_ir.tape import Tape
from onnxscript import opset20
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import rewrite

from . import graphs  # noqa: F401  registers masks_to_size

op: Any = opset20  # while a graph is built its functions return Values, unlike their annotations


def _ints(*values: int) -> Value:
    # a tensor, because shape inference of onnx before 1.23 does not read the attribute `value_ints`
    return op.Constant(value=onnx_ir.tensor(np.array(values, np.int64)))


def _channels_first(x: Value) -> Value:
    return op.Transpose(x, perm=[0, 3, 1, 2])


def _channels_last(x: Value) -> Value:
    return op.Transpose(x, perm=[0, 2, 3, 1])


def _float(x: Value, dtype: DataType) -> Value:
    """Cast x from `dtype` to float32. `dtype` is an argument because only an operator's inputs know their type."""
    return x if dtype == DataType.FLOAT else op.Cast(x, to=int(DataType.FLOAT))


def _from_float(x: Value, dtype: DataType) -> Value:
    return x if dtype == DataType.FLOAT else op.Cast(x, to=int(dtype))


def _layer_norm(x: Value, weight: Value, bias: Value, eps: float) -> Value:
    """Normalize the last axis of x, whose type is the weights', in float32."""
    dtype = weight.dtype
    weight, bias = _float(weight, dtype), _float(bias, dtype)
    y, *_ = op.LayerNormalization(_float(x, dtype), weight, bias, axis=-1, epsilon=eps)
    return _from_float(y, dtype)


def _conv(x: Value, weight: Value, bias: Value | None, stride: int = 1, group: int = 1) -> Value:
    """Convolve `[B, C, H, W]` with a weight `[N, C, k, k]`, or `[N, C]` for a 1x1 convolution."""
    size = weight.shape[2] if len(weight.shape) == 4 else 1
    if len(weight.shape) == 2:
        weight = op.Unsqueeze(weight, _ints(2, 3))
    inputs = (x, weight) if bias is None else (x, weight, bias)
    return op.Conv(*inputs, kernel_shape=[size, size], strides=[stride, stride], pads=[size // 2] * 4, group=group)


def _linear(x: Value, weight: Value) -> Value:
    return op.MatMul(x, op.Transpose(weight, perm=[1, 0]))


def bi_wkv(
    w: Value,
    u: Value,
    k: Value,
    v: Value,
    r: Value | None = None,
    scale: float | None = 1.0,
    bound: float | None = None,
) -> Value:
    """Scan as two exclusive prefix sums over the tokens, as `_prefix_sums` in `bi_wkv.py` derives it.

    Positions count from the middle of the sequence, so that the factors stay within exp(MAX_DECAY / 2). A softmax over
    the tokens scales exp(k), because a factor for each channel cancels. ReduceMax would do, but ONNX Runtime's symbolic
    shape inference, and so `quant_pre_process`, cannot read its axes.
    """
    T, dtype = k.shape[1], k.dtype
    k32, v32 = _float(k, dtype), _float(v, dtype)
    factor = 1 / T if scale is None else scale
    w, u = (op.Mul(_float(t, t.dtype), op.Constant(value_float=factor)) for t in (w, u))
    position = op.Constant(value=onnx_ir.tensor((np.arange(T)[:, None] - (T - 1) / 2).astype(np.float32)))
    decay = op.Mul(position, w)  # [T, C]
    weight = op.Softmax(k32, axis=1)
    growth = op.Exp(decay)
    to_left, to_right = op.Mul(weight, growth), op.Div(weight, growth)
    left = op.Concat(op.Mul(to_left, v32), to_left, axis=2)
    right = op.Concat(op.Mul(to_right, v32), to_right, axis=2)
    axis = op.Constant(value_int=1)
    sums_left = op.CumSum(left, axis, exclusive=1)
    sums_right = op.CumSum(right, axis, exclusive=1, reverse=1)
    twice = op.Mul(growth, growth)
    own = op.Exp(op.Sub(u, w))
    total = op.Add(
        op.Add(sums_left, op.Mul(left, op.Concat(own, own, axis=0))),
        op.Mul(sums_right, op.Concat(twice, twice, axis=1)),
    )
    C = k.shape[2]
    numerator = op.Slice(total, _ints(0), _ints(C), _ints(2))
    denominator = op.Slice(total, _ints(C), _ints(2 * C), _ints(2))
    y = op.Div(numerator, denominator)
    if r is not None:
        y = op.Mul(y, op.Sigmoid(_float(r, dtype)))
    return _from_float(y, dtype)


def norm_shift_mix(x: Value, weight: Value, bias: Value, mix: Value, eps: float) -> Value:
    """LayerNorm, Q-shift and mixes.

    Each quarter of the channels is shifted by one token: a slice drops a row or column, a pad adds one of zeros.
    """
    _, H, W, C = x.shape
    n = _layer_norm(x, weight, bias, eps)
    q = C // 4
    quarters = []
    for quarter, (axis, source) in enumerate([(2, -1), (2, 1), (1, -1), (1, 1)]):
        size = (H, W)[axis - 1]
        first, last = (0, size - 1) if source < 0 else (1, size)
        # axes ascend, because the WebGPU provider of onnxruntime-web reads them in that order
        part = op.Slice(n, _ints(first, quarter * q), _ints(last, (quarter + 1) * q), _ints(axis, 3))
        pads = [0] * 8
        pads[axis if source < 0 else 4 + axis] = 1
        quarters.append(op.Pad(part, _ints(*pads)))
    if 4 * q < C:
        quarters.append(op.Slice(n, _ints(4 * q), _ints(C), _ints(3)))
    shifted = op.Concat(*quarters, axis=3)
    mix = op.Unsqueeze(mix, _ints(1, 2, 3))  # [J, 1, 1, 1, C]
    return op.Add(shifted, op.Mul(op.Sub(n, shifted), mix))


def mbconv(
    x: Value,
    norm_weight: Value,
    norm_bias: Value,
    expand_weight: Value,
    expand_bias: Value,
    depthwise_weight: Value,
    depthwise_bias: Value,
    project_weight: Value,
    project_bias: Value,
    shortcut_weight: Value | None,
    shortcut_bias: Value | None,
    stride: int,
    eps: float,
    in_bias: Value | None = None,
) -> Value:
    x = x if in_bias is None else op.Add(x, in_bias)
    D = expand_weight.shape[0]
    h = op.Gelu(_conv(_channels_first(_layer_norm(x, norm_weight, norm_bias, eps)), expand_weight, expand_bias))
    h = op.Gelu(_conv(h, depthwise_weight, depthwise_bias, stride, group=D))
    shortcut = _channels_first(x)
    if stride == 2:
        shortcut = op.AveragePool(shortcut, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], count_include_pad=0)
    if shortcut_weight is not None:
        shortcut = _conv(shortcut, shortcut_weight, shortcut_bias)
    return _channels_last(op.Add(_conv(h, project_weight, project_bias), shortcut))


def conv_norm(
    x: Value,
    weight: Value,
    bias: Value | None,
    in_norm_weight: Value | None,
    in_norm_bias: Value | None,
    add: Value | None,
    norm_weight: Value | None,
    norm_bias: Value | None,
    stride: int,
    activate: bool,
    eps: float,
) -> Value:
    if in_norm_weight is not None:
        x = _layer_norm(x, in_norm_weight, in_norm_bias, eps)
    N, C, size, _ = weight.shape
    if size == 1 and stride == 1:
        y = _linear(x, op.Reshape(weight, _ints(N, C)))
        y = y if bias is None else op.Add(y, bias)
    else:
        y = _channels_last(_conv(_channels_first(x), weight, bias, stride))
    if add is not None:
        y = op.Add(y, add)
    if norm_weight is not None:
        y = _layer_norm(y, norm_weight, norm_bias, eps)
    return op.Gelu(y) if activate else y


def upscale(
    x: Value, weight: Value, bias: Value, norm_weight: Value | None, norm_bias: Value | None, eps: float
) -> Value:
    B, H, W, _ = x.shape
    N = bias.shape[0]
    y = op.Reshape(_linear(x, weight), _ints(0, H, W, 2, 2, N))
    y = op.Reshape(op.Transpose(y, perm=[0, 1, 3, 2, 4, 5]), _ints(0, 2 * H, 2 * W, N))
    y = op.Add(y, bias)
    return op.Gelu(y if norm_weight is None else _layer_norm(y, norm_weight, norm_bias, eps))


def fused_linear(
    x: Value,
    weight: Value,
    gate: Value | None,
    scale: Value,
    residual: Value,
) -> Value:
    y = _linear(x, op.Mul(weight, op.Unsqueeze(scale, _ints(1))))
    return op.Add(residual, y if gate is None else op.Mul(gate, y))


def gated_key(x: Value, key_weight: Value, gate_weight: Value) -> tuple[Value, Value]:
    to_key, to_gate = (op.Squeeze(op.Slice(x, _ints(i), _ints(i + 1), _ints(0)), _ints(0)) for i in range(2))
    key = op.Relu(_linear(to_key, key_weight))
    return op.Mul(key, key), op.Sigmoid(_linear(to_gate, gate_weight))


def stem(
    pixels: Value,
    mean: Sequence[float],
    std: Sequence[float],
    weight1: Value,
    bias1: Value,
    norm_weight: Value,
    norm_bias: Value,
    weight2: Value,
    bias2: Value | None,
    H: int,
    W: int,
    eps: float,
    size: None = None,  # serves CUDA graphs alone
) -> Value:
    x = pixels
    if x.dtype == DataType.UINT8:
        x = _float(x, x.dtype)
        x = op.Div(op.Sub(x, op.Constant(value_floats=mean)), op.Constant(value_floats=std))
        x = _from_float(x, weight1.dtype)
    x = _channels_first(x)
    if tuple(pixels.shape[1:3]) != (H, W):
        missing = op.Sub(_ints(H, W), op.Shape(x, start=2))
        x = op.Pad(x, op.Concat(_ints(0, 0, 0, 0, 0, 0), missing, axis=0))
    y = _channels_last(_conv(x, weight1, bias1, stride=2))
    y = op.Gelu(_layer_norm(y, norm_weight, norm_bias, eps))
    return _channels_last(_conv(_channels_first(y), weight2, bias2))


def attention(q: Value, k: Value, v: Value, seen: Value | None, heads: int) -> Value:
    """Attention without a mask: the graphs have no `seen`."""
    assert seen is None
    d = q.shape[2] // heads

    def by_head(x: Value, perm: Sequence[int]) -> Value:
        return op.Transpose(op.Reshape(x, _ints(0, 0, heads, d)), perm=perm)

    scale = op.Cast(op.Constant(value_float=d**-0.5), to=int(q.dtype))
    weights = op.Softmax(op.MatMul(by_head(op.Mul(q, scale), (0, 2, 1, 3)), by_head(k, (0, 2, 3, 1))), axis=-1)
    y = op.Transpose(op.MatMul(weights, by_head(v, (0, 2, 1, 3))), perm=[0, 2, 1, 3])
    return op.Reshape(y, _ints(0, 0, heads * d))


def layer_norm(
    x: Value,
    normalized_shape: Sequence[int],
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Value:
    """LayerNorm that the model calls in PyTorch, over the last axis and with weights."""
    assert len(normalized_shape) == 1 and weight is not None and bias is not None
    return _layer_norm(x, weight, bias, eps)


def fold(
    x: Value,
    output_size: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Value:
    """`F.fold` of 3x3 blocks at every position: a transposed convolution that moves each tap to its place.

    TensorRT has no Col2Im.
    """
    (H, W), taps = output_size, math.prod(kernel_size)
    assert list(kernel_size) == [3, 3] and list(padding) == list(dilation) == list(stride) == [1, 1]
    channels = x.shape[1] // taps
    places = np.tile(np.eye(taps, dtype=np.float32).reshape(taps, 1, 3, 3), (channels, 1, 1, 1))
    weight = op.Cast(op.Constant(value=onnx_ir.tensor(places)), to=int(x.dtype))
    x = op.Reshape(x, _ints(0, channels * taps, H, W))
    return op.ConvTranspose(x, weight, kernel_shape=[3, 3], strides=[1, 1], pads=[1] * 4, group=channels)


def masks_to_size(low_res_masks: Value, orig_im_size: Value, image_size: int) -> Value:
    """Resize masks as `resize_masks` does, with the sizes of `ImageFrame.of` computed in the graph in float32."""

    def resize(x: Value, sizes: Value) -> Value:
        # no attribute `axes`, which ONNX Runtime's symbolic shape inference does not read
        sizes = op.Concat(op.Shape(x, end=2), sizes, axis=0)
        return op.Resize(x, None, None, sizes, mode="linear", coordinate_transformation_mode="pytorch_half_pixel")

    scale = op.Div(op.Constant(value_float=float(image_size)), op.ReduceMax(orig_im_size, keepdims=0))
    rounded = op.Floor(op.Add(op.Mul(orig_im_size, scale), op.Constant(value_float=0.5)))
    inside = op.Cast(op.Max(rounded, op.Constant(value_float=1.0)), to=int(DataType.INT64))
    logits = resize(low_res_masks, _ints(image_size, image_size))
    return resize(op.Slice(logits, _ints(0, 0), inside, _ints(2, 3)), op.Cast(orig_im_size, to=int(DataType.INT64)))


def optimize(model: onnx_ir.Model, opset: int = 20, flips: bool = False) -> None:
    """Simplify the graph, fold constants if the result is not larger than the operands, and set the opset.

    With `flips`, a reversed CumSum becomes one between two flips.

    The exporter's optimizer folds by absolute size. It would store the scan's tables for a small image, and leave large
    weights to be rearranged in every run.
    """
    for _ in range(2):  # rewriting may make a node constant
        fold_constants(model, input_size_limit=1 << 40, output_size_limit=1 << 40, should_fold=_does_not_grow)
        rewrite(model)
    if flips:
        _flip_reversed_sums(model)
    if opset < 20:
        _as_in_opset_18(model)
        model.opset_imports[""] = opset
    Sequential(
        RemoveUnusedNodesPass(),
        CommonSubexpressionEliminationPass(),
        # several tools read initializers, but not every attribute of Constant, such as `value_ints`
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        DeduplicateInitializersPass(),
        ClearMetadataAndDocStringPass(),  # removes stack traces with local paths
    )(model)


def _flip_reversed_sums(model: onnx_ir.Model) -> None:
    for node in list(model.graph):
        if node.op_type == "CumSum" and "reverse" in node.attributes and node.attributes["reverse"].as_int():
            x, axis = node.inputs
            builder = onnx_ir.tape.Tape()
            ends = [
                builder.op("Constant", [], {"value": onnx_ir.tensor(np.array([n], np.int64))})
                for n in (-1, -(1 << 62), 1, -1)
            ]
            flipped = builder.op("Slice", [x, *ends])
            sums = builder.op("CumSum", [flipped, axis], {"exclusive": 1})
            result = builder.op("Slice", [sums, *ends])
            onnx_ir.convenience.replace_nodes_and_values(
                model.graph, node, [node], list(builder.nodes), [node.outputs[0]], [result]
            )


def _as_in_opset_18(model: onnx_ir.Model) -> None:
    """Replace what the graphs have from opsets 19 and 20.

    Gelu becomes operators in the order that ONNX Runtime's optimizer recognizes. Cast loses an attribute for float8.
    """
    ShapeInferencePass()(model)  # for dtypes
    for node in list(model.graph):
        if node.op_type == "Cast":
            node.attributes.pop("saturate", None)
        if node.op_type != "Gelu":
            continue
        (x,) = node.inputs
        assert x is not None and node.attributes.get_string("approximate", "none") == "none"
        dtype = x.dtype
        assert dtype is not None
        tape = Tape()
        root, one, half = (
            tape.op("Constant", [], {"value": onnx_ir.tensor(np.array(value, dtype.numpy()))})
            for value in (math.sqrt(2), 1, 0.5)
        )
        erf = tape.op("Erf", [tape.op("Div", [x, root])])
        y = tape.op("Mul", [tape.op("Mul", [x, tape.op("Add", [erf, one])]), half])
        replace_nodes_and_values(model.graph, node, [node], tape.nodes, node.outputs, [y])


def _does_not_grow(node: onnx_ir.Node) -> bool | None:
    """Return False if the node broadcasts to a result larger than its inputs, else None: the optimizer decides."""
    shapes = [tuple(value.shape) for value in node.inputs if value is not None and value.shape is not None]
    if node.op_type not in ("Add", "Sub", "Mul", "Div"):
        return None
    try:
        grows = math.prod(np.broadcast_shapes(*shapes)) > sum(math.prod(shape) for shape in shapes)
    except (TypeError, ValueError):  # a dynamic axis, or an unknown shape
        return None
    return False if grows else None


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    getattr(torch.ops.fastsam_rwkv, function.__name__).default: function
    for function in (
        attention,
        bi_wkv,
        norm_shift_mix,
        mbconv,
        conv_norm,
        gated_key,
        fused_linear,
        stem,
        upscale,
        masks_to_size,
    )
} | {
    torch.ops.aten.layer_norm.default: layer_norm,
    torch.ops.aten.col2im.default: fold,
}
