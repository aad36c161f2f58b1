"""Convolution with LayerNorms before and after it, on channels-last maps.

    x = LayerNorm(x)                   if in_norm is given
    y = conv(x) + bias + add           1x1, or 3x3 with stride 1 or 2, zero padding; bias and add if given
    y = LayerNorm(y)                   if norm is given
    y = GELU(y)                        if activate

One launch; one more for a norm before the convolution, so that x is not normalized again for every tap and column.
Bytes: (B * H * W * C + B * H' * W' * N) * itemsize, plus 2 * B * H * W * C * itemsize for that norm. Operations:
2 * k * k * C * N per output pixel. A 3x3 convolution reads x from memory once and nine times from caches.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import add_product, add_row, gelu, mean_and_rstd, normalize_rows, tl, triton, wait_for_inputs
from .launch_config import LaunchConfig, Settings, launch_config
from .operator import check_counts, contiguous, described, dot_precision, register

CUDNN_COLUMNS = 256  # from here on, cuDNN and a norm in a launch of its own are faster


def conv_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_norm_weight: Tensor | None,
    in_norm_bias: Tensor | None,
    add: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    stride: int,
    activate: bool,
    eps: float,
) -> Tensor:
    """Oracle and CPU path.

    Args:
        x: `[B, H, W, C]`.
        weight: `[N, C, k, k]`, k = 1 or 3.
        bias: `[N]` or None.
        in_norm_weight, in_norm_bias: `[C]` of a LayerNorm before the convolution, or None.
        add: `[B or 1, H', W', N]` added to the convolution, or None.
        norm_weight, norm_bias: `[N]` of a LayerNorm after the convolution, or None.
        stride: 1 or 2; H' = (H - 1) // stride + 1.
        activate: Apply an exact GELU.
        eps: Epsilon of both LayerNorms.

    Returns:
        `[B, H', W', N]` in x's dtype.
    """
    _check(x, weight, stride, add)
    N, C, size, _ = weight.shape
    if in_norm_weight is not None:
        x = F.layer_norm(x, (C,), in_norm_weight, in_norm_bias, eps)
    if size == 1 and stride == 1:
        y = F.linear(x, weight.view(N, C), bias)
    else:
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, size // 2).permute(0, 2, 3, 1)
    if add is not None:
        y = y + add if torch.is_grad_enabled() else y.add_(add)  # y is new; another new map takes longer on a CPU
    if norm_weight is not None:
        y = F.layer_norm(y, (N,), norm_weight, norm_bias, eps)
    return F.gelu(y) if activate else y


def _output_shape(x: Tensor, weight: Tensor, stride: int) -> tuple[int, int, int, int]:
    B, H, W, _ = x.shape
    return B, (H - 1) // stride + 1, (W - 1) // stride + 1, len(weight)


def _check(x: Tensor, weight: Tensor, stride: int, add: Tensor | None) -> None:
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[1] != x.shape[3] or weight.shape[2:] not in ((1, 1), (3, 3)):
        raise ValueError(
            "conv_norm needs x [B, H, W, C] and weight [N, C, 1, 1] or [N, C, 3, 3], got "
            + described(x=x, weight=weight)
        )
    if stride not in (1, 2):
        raise ValueError(f"conv_norm has stride 1 or 2, got {stride}")
    B, *rest = _output_shape(x, weight, stride)
    if add is not None and (add.ndim != 4 or list(add.shape[1:]) != rest or add.shape[0] not in (1, B)):
        raise ValueError(f"add must be {[B, *rest]} or {[1, *rest]}, got {list(add.shape)}")


@triton.jit
def _norm_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr,  # [M, C], [C], [C], [M, C]
    M, eps,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """LayerNorm of BLOCK_M rows."""
    wait_for_inputs(OVERLAP)
    CHUNKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    x = ()
    for chunk in tl.static_range(CHUNKS):
        offs_c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = mask_m[:, None] & (offs_c < C)[None, :]
        x += (tl.load(x_ptr + offs_m[:, None] * C + offs_c[None, :], mask=mask, other=0.0).to(tl.float32),)
    mean, rstd = mean_and_rstd(x, eps, C, BLOCK_C)
    for chunk in tl.static_range(CHUNKS):
        offs_c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
        every_row = tl.broadcast_to(offs_c[None, :], (BLOCK_M, BLOCK_C))  # each thread loads its own
        gain = tl.load(weight_ptr + every_row, mask=every_row < C, other=0.0).to(tl.float32)
        shift = tl.load(bias_ptr + every_row, mask=every_row < C, other=0.0).to(tl.float32)
        y = ((x[chunk] - mean) * rstd * gain + shift).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offs_m[:, None] * C + offs_c[None, :], y, mask=mask_m[:, None] & (every_row < C))


@triton.jit(do_not_specialize=["M", "H", "OUT_H", "ADD_ROWS"])  # vary with prompts and points
def _conv_norm_kernel(
    x_ptr, in_weight_ptr, in_bias_ptr, weight_ptr, bias_ptr,  # [B, H, W, C], [C], [C], [N, k, k, C], [N]
    add_ptr, norm_weight_ptr, norm_bias_ptr, y_ptr,  # [., H', W', N], [N], [N], [B, H', W', N]
    M, H, W, OUT_H, OUT_W, ADD_ROWS, eps,  # M = B * H' * W'; add repeats after ADD_ROWS rows
    TAPS,  # SIZE * SIZE, not a constant: an unrolled loop keeps the offsets and masks of all taps in registers
    C: tl.constexpr, N: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr,
    HAS_ADD: tl.constexpr, NORM: tl.constexpr, ACTIVATE: tl.constexpr, PRECISION: tl.constexpr,
    VECTOR: tl.constexpr,  # values of x per copy, 0 for the most possible; not timed
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Implicit matrix product of BLOCK_M output pixels and BLOCK_N columns."""
    wait_for_inputs(OVERLAP)
    pid = tl.program_id(0)
    blocks_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N  # 1 with NORM, which needs whole rows
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    offs_m = (pid // blocks_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (pid % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    line = (offs_m.to(tl.uint32) // tl.cast(OUT_W, tl.uint32)).to(tl.int32)  # unsigned: half of the instructions
    image = (line.to(tl.uint32) // tl.cast(OUT_H, tl.uint32)).to(tl.int32)
    row, column = (line - image * OUT_H) * STRIDE, (offs_m - line * OUT_W) * STRIDE
    center = (image.to(tl.int64) * H + row) * W + column
    inside = mask_m.to(tl.int32)  # bit per tap: 1 if its pixel lies in the image; not timed
    if SIZE == 3:
        above, below = (row > 0).to(tl.int32), (row + 1 < H).to(tl.int32)
        before, behind = (column > 0).to(tl.int32), (column + 1 < W).to(tl.int32)
        inside *= (above + 8 + 64 * below) * (before + 2 + 4 * behind)
    offs_c = tl.arange(0, BLOCK_C)
    x_ptrs = x_ptr + center[:, None] * C + offs_c[None, :]
    weight_ptrs = weight_ptr + offs_n[None, :] * (SIZE * SIZE * C) + offs_c[:, None]

    if in_weight_ptr is not None:  # of a 1x1 convolution; the rows stay in L1
        total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for first in range(0, C, BLOCK_C):
            mask = mask_m[:, None] & (first + offs_c < C)[None, :]
            total += tl.load(x_ptrs + first, mask=mask, other=0.0).to(tl.float32)
        mean = (tl.sum(total, 1) / C)[:, None]
        total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for first in range(0, C, BLOCK_C):
            mask = mask_m[:, None] & (first + offs_c < C)[None, :]
            centered = tl.where(mask, tl.load(x_ptrs + first, mask=mask, other=0.0).to(tl.float32) - mean, 0.0)
            total += centered * centered
        rstd = tl.rsqrt(tl.sum(total, 1) / C + eps)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(TAPS * blocks_c):  # one loop over taps and channels, which the compiler can pipeline
        tap, first = step // blocks_c, (step % blocks_c) * BLOCK_C
        place = (tap // SIZE - SIZE // 2) * W + tap % SIZE - SIZE // 2
        mask = ((inside & (1 << tap)) != 0)[:, None]
        weight_mask = mask_n[None, :]
        if C % BLOCK_C:
            mask_c = first + offs_c < C
            mask = mask & mask_c[None, :]
            weight_mask = weight_mask & mask_c[:, None]
        ptrs = x_ptrs + (place.to(tl.int64) * C + first)
        if VECTOR > 0:
            ptrs = tl.max_contiguous(ptrs, (1, VECTOR))
        x = tl.load(ptrs, mask=mask, other=0.0)
        if in_weight_ptr is not None:
            gain = tl.load(in_weight_ptr + first + offs_c, mask=first + offs_c < C, other=0.0).to(tl.float32)
            shift = tl.load(in_bias_ptr + first + offs_c, mask=first + offs_c < C, other=0.0).to(tl.float32)
            x = ((x.to(tl.float32) - mean) * rstd * gain[None, :] + shift[None, :]).to(x.dtype)
        weight = tl.load(weight_ptrs + (tap * C + first), mask=weight_mask, other=0.0)
        acc = add_product(x, weight, acc, PRECISION)

    mask = mask_m[:, None] & mask_n[None, :]
    acc = add_row(acc, bias_ptr, offs_n, N)
    if HAS_ADD:
        ptr = add_ptr + (offs_m % ADD_ROWS).to(tl.int64)[:, None] * N + offs_n[None, :]
        acc += tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        acc = normalize_rows(acc, norm_weight_ptr, norm_bias_ptr, offs_n, mask_n, eps, N)
    if ACTIVATE:
        acc = gelu(acc, y_ptr.dtype.element_ty)
    tl.store(y_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


def is_dense(weight: Tensor, others: tuple[Tensor | None, ...], norm: Tensor | None, activate: bool) -> bool:
    """True if cuDNN is faster: a 3x3 convolution alone, or with a norm after it and at least CUDNN_COLUMNS columns."""
    N, _, size, _ = weight.shape
    return size == 3 and (norm is None or N >= CUDNN_COLUMNS) and all(t is None for t in others) and not activate


def choose_blocks(C: int, N: int, normed: bool, dtype: torch.dtype, config: LaunchConfig) -> Settings:
    """Choose the blocks. A norm after the convolution needs whole rows: wide blocks of WIDE_M rows, more warps."""
    settings = config.settings_for("conv_norm", dtype)
    BLOCK_N = min(settings["BLOCK_N"], max(16, 1 << (N - 1).bit_length()))
    BLOCK_C = min(settings["BLOCK_C"], max(16, 1 << (C - 1).bit_length()))
    settings = settings | {"BLOCK_N": BLOCK_N, "BLOCK_C": BLOCK_C}
    if not normed or BLOCK_N >= N:
        return settings
    return settings | {
        "BLOCK_M": settings["WIDE_M"],
        "BLOCK_N": 1 << (N - 1).bit_length(),
        "num_warps": max(8, settings["num_warps"]),
        "num_stages": min(2, settings["num_stages"]),
    }


def _normalized(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, config: LaunchConfig) -> Tensor:
    """LayerNorm in a launch of its own."""
    C = x.shape[-1]
    x, weight, bias = contiguous(x, weight, bias)
    settings = config.settings_for("conv_norm_input", x.dtype)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    pixels, BLOCK_C = x.numel() // C, min(settings["BLOCK_C"], triton.next_power_of_2(C))
    with torch.cuda.device_of(x):
        _norm_kernel[(triton.cdiv(pixels, settings["BLOCK_M"]),)](
            x, weight, bias, y, pixels, eps, C, settings["BLOCK_M"], BLOCK_C, **config.options(settings)
        )
    return y


def conv_norm_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_norm_weight: Tensor | None,
    in_norm_bias: Tensor | None,
    add: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    stride: int,
    activate: bool,
    eps: float,
    *,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Launch the kernel. Also runs on CPU tensors under TRITON_INTERPRET=1, which is how the tests use it.

    A weight in PyTorch's channels_last layout is read as it is; other layouts are copied on every call.
    """
    _check(x, weight, stride, add)
    config = config or launch_config(x.device)
    others = (bias, in_norm_weight, add)
    if x.dtype != torch.float32 and x.numel() and is_dense(weight, others, norm_weight, activate):
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, None, stride, 1).permute(0, 2, 3, 1)
        return y.contiguous() if norm_weight is None else _normalized(y, norm_weight, norm_bias, eps, config)
    B, OUT_H, OUT_W, N = _output_shape(x, weight, stride)
    y = torch.empty((B, OUT_H, OUT_W, N), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x, weight = x.contiguous(), weight.permute(0, 2, 3, 1).contiguous()
    SIZE, C = weight.shape[1], weight.shape[3]
    settings = choose_blocks(C, N, norm_weight is not None, x.dtype, config)
    M, BLOCK_M, BLOCK_N = B * OUT_H * OUT_W, settings["BLOCK_M"], settings["BLOCK_N"]
    check_counts("conv_norm", pixels=M + BLOCK_M)
    VECTOR = 8 // x.element_size() if settings["CACHED"] and SIZE > 1 else 0
    bias, add, norm_weight, norm_bias = contiguous(bias, add, norm_weight, norm_bias)
    in_norm_weight, in_norm_bias = contiguous(in_norm_weight, in_norm_bias)
    with torch.cuda.device_of(x):
        if in_norm_weight is not None and SIZE > 1:
            x, in_norm_weight = _normalized(x, in_norm_weight, in_norm_bias, eps, config), None
        _conv_norm_kernel[(triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N),)](
            x, in_norm_weight, None if in_norm_weight is None else in_norm_bias, weight, bias, add,
            norm_weight, norm_bias, y,
            M, x.shape[1], x.shape[2], OUT_H, OUT_W, 1 if add is None else add.numel() // N, eps, SIZE * SIZE,
            C, N, SIZE, stride, add is not None, norm_weight is not None, activate, dot_precision(x.dtype), VECTOR,
            BLOCK_M, BLOCK_N, settings["BLOCK_C"],
            **config.options(settings),
        )  # fmt: skip
    return y


def _fake(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    return torch.empty(_output_shape(x, weight, args[6]), dtype=x.dtype, device=x.device)


def _flops(x: tuple[int, ...], weight: tuple[int, ...], *args: object, out_shape: tuple[int, ...], **_: object) -> int:
    B, H, W, N = out_shape
    return 2 * B * H * W * N * weight[1] * weight[2] * weight[3]


conv_norm = register("conv_norm", conv_norm_ref, conv_norm_triton, _fake, _flops)
