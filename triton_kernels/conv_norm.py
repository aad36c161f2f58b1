"""A convolution with the norms around it, on channels-last maps.

    x = LayerNorm(x)                   if in_norm is given
    y = conv(x) + bias + add           1x1, or 3x3 with stride 1 or 2, zero padding; bias and add if given
    y = LayerNorm(y), y = GELU(y)      as wished
    y = y + residual                   if given

One pass, or two where a norm comes first: x is normalised once, not again for every tap and column. x is read from
memory once (a 3x3 convolution reads it nine times from the cache), y is written once:
(B * H * W * C + B * H' * W' * N) * itemsize bytes, 2 * B * H * W * C * itemsize more for a norm before, and
2 * k * k * C * N operations a pixel, whichever bounds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import add_product, gelu, mean_and_rstd, normalise_rows, tl, triton, wait_for_inputs
from .launch_config import launch_options, launch_settings
from .operator import check_rows, dot_precision, register


def conv_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_norm_weight: Tensor | None,
    in_norm_bias: Tensor | None,
    add: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    activate: bool,
    eps: float,
) -> Tensor:
    """Oracle, CPU path and export decomposition.

    Args:
        x: `[B, H, W, C]`.
        weight: `[N, C, k, k]`, k = 1 or 3.
        bias: `[N]` or None.
        in_norm_weight, in_norm_bias: `[C]` of a LayerNorm before the convolution, or None.
        add: `[B or 1, H', W', N]` added to the convolution, or None.
        norm_weight, norm_bias: `[N]` of a LayerNorm after it, or None.
        residual: `[B or 1, H', W', N]` added at the end, or None.
        stride: 1 or 2; H' = (H - 1) // stride + 1.
        activate: with an exact GELU.
        eps: of both LayerNorms.

    Returns:
        `[B, H', W', N]` in x's dtype.
    """
    _check(x, weight, stride, add, residual)
    N, C, size, _ = weight.shape
    if in_norm_weight is not None:
        x = F.layer_norm(x, (C,), in_norm_weight, in_norm_bias, eps)
    if size == 1 and stride == 1:
        y = F.linear(x, weight.view(N, C), bias)
    else:
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, size // 2).permute(0, 2, 3, 1)
    if add is not None:
        y = y + add
    if norm_weight is not None:
        y = F.layer_norm(y, (N,), norm_weight, norm_bias, eps)
    if activate:
        y = F.gelu(y)
    return y if residual is None else y + residual


def _output_shape(x: Tensor, weight: Tensor, stride: int) -> tuple[int, int, int, int]:
    B, H, W, _ = x.shape
    return B, (H - 1) // stride + 1, (W - 1) // stride + 1, len(weight)


def _check(x: Tensor, weight: Tensor, stride: int, add: Tensor | None, residual: Tensor | None) -> None:
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[1] != x.shape[3] or weight.shape[2:] not in ((1, 1), (3, 3)):
        raise ValueError(
            "conv_norm needs x [B, H, W, C] and weight [N, C, 1, 1] or [N, C, 3, 3], got "
            f"{list(x.shape)} and {list(weight.shape)}"
        )
    if stride not in (1, 2):
        raise ValueError(f"conv_norm has stride 1 or 2, got {stride}")
    B, *rest = _output_shape(x, weight, stride)
    for name, t in (("add", add), ("residual", residual)):
        if t is not None and (t.ndim != 4 or list(t.shape[1:]) != rest or t.shape[0] not in (1, B)):
            raise ValueError(f"{name} must be {[B, *rest]} or {[1, *rest]}, got {list(t.shape)}")


@triton.jit
def _norm_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr,  # [M, C], [C], [C], [M, C]
    M, eps,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
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
        every_row = tl.broadcast_to(offs_c[None, :], (BLOCK_M, BLOCK_C))  # each thread loads its own: no exchange
        gain = tl.load(weight_ptr + every_row, mask=every_row < C, other=0.0).to(tl.float32)
        shift = tl.load(bias_ptr + every_row, mask=every_row < C, other=0.0).to(tl.float32)
        y = ((x[chunk] - mean) * rstd * gain + shift).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offs_m[:, None] * C + offs_c[None, :], y, mask=mask_m[:, None] & (every_row < C))


@triton.jit(do_not_specialize=["M", "H", "OUT_H", "ADD_ROWS", "RESIDUAL_ROWS"])  # which go with prompts and points
def _conv_norm_kernel(
    x_ptr, weight_ptr, bias_ptr,  # [B, H, W, C], [N, k, k, C], [N]
    add_ptr, norm_weight_ptr, norm_bias_ptr, residual_ptr, y_ptr,  # [., H', W', N], [N], [N], [., H', W', N] x 2
    M, H, W, OUT_H, OUT_W, ADD_ROWS, RESIDUAL_ROWS, eps,  # M = B * H' * W'; rows after which add, residual repeat
    TAPS,  # SIZE * SIZE, but no constant: unrolled, all taps' places and masks would be kept in registers
    C: tl.constexpr, N: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr, NORM: tl.constexpr, ACTIVATE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    VECTOR: tl.constexpr,  # values of x that are copied at once; 0: as many as can be
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    pid = tl.program_id(0)
    blocks_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N  # 1 with NORM: a row must be whole
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    offs_m = (pid // blocks_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (pid % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    line = (offs_m.to(tl.uint32) // tl.cast(OUT_W, tl.uint32)).to(tl.int32)  # without signs in half of the instructions
    image = (line.to(tl.uint32) // tl.cast(OUT_H, tl.uint32)).to(tl.int32)
    row, column = (line - image * OUT_H) * STRIDE, (offs_m - line * OUT_W) * STRIDE
    centre = (image.to(tl.int64) * H + row) * W + column
    inside = mask_m.to(tl.int32)  # a bit for every tap: whether what is under it lies in the image
    if SIZE == 3:
        above, below = (row > 0).to(tl.int32), (row + 1 < H).to(tl.int32)
        before, behind = (column > 0).to(tl.int32), (column + 1 < W).to(tl.int32)
        inside *= (above + 8 + 64 * below) * (before + 2 + 4 * behind)
    offs_c = tl.arange(0, BLOCK_C)
    x_ptrs = x_ptr + centre[:, None] * C + offs_c[None, :]
    weight_ptrs = weight_ptr + offs_n[None, :] * (SIZE * SIZE * C) + offs_c[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(TAPS * blocks_c):  # one loop over taps and channels, so that the next loads are under way
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
        weight = tl.load(weight_ptrs + (tap * C + first), mask=weight_mask, other=0.0)
        acc = add_product(x, weight, acc, PRECISION)

    mask = mask_m[:, None] & mask_n[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if HAS_ADD:
        ptr = add_ptr + (offs_m % ADD_ROWS).to(tl.int64)[:, None] * N + offs_n[None, :]
        acc += tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        acc = normalise_rows(acc, norm_weight_ptr, norm_bias_ptr, offs_n, mask_n, eps, N)
    if ACTIVATE:
        acc = gelu(acc, y_ptr.dtype.element_ty)
    if HAS_RESIDUAL:
        ptr = residual_ptr + (offs_m % RESIDUAL_ROWS).to(tl.int64)[:, None] * N + offs_n[None, :]
        acc += tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


DENSE = 256  # columns from which cuDNN's 3x3 convolution and a norm in a launch of its own are faster


def is_dense(weight: Tensor, others: tuple[Tensor | None, ...], norm: Tensor | None, activate: bool) -> bool:
    """A 3x3 convolution and nothing else, or to many columns with a norm after it; `others` are all there may be."""
    N, _, size, _ = weight.shape
    return size == 3 and (norm is None or N >= DENSE) and all(t is None for t in others) and not activate


def for_wide_rows(settings: dict[str, int]) -> dict[str, int]:
    """Settings where a program computes whole rows: low and wide, by eight warps at least, in two stages at most."""
    warps, stages = max(8, settings["num_warps"]), min(2, settings["num_stages"])
    return settings | {"BLOCK_M": settings["WIDE_M"], "num_warps": warps, "num_stages": stages}


def _normalised(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm in a launch of its own."""
    C = x.shape[-1]
    x, weight, bias = x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
    settings = launch_settings("conv_norm_input", x.device, x.dtype)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    pixels, BLOCK_C = x.numel() // C, min(settings["BLOCK_C"], triton.next_power_of_2(C))
    with torch.cuda.device_of(x):
        _norm_kernel[(triton.cdiv(pixels, settings["BLOCK_M"]),)](
            x, weight, bias, y, pixels, eps, C, settings["BLOCK_M"], BLOCK_C, **launch_options(settings, x.device)
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
    residual: Tensor | None,
    stride: int,
    activate: bool,
    eps: float,
) -> Tensor:
    """Launch the kernel. Also runs on CPU tensors under TRITON_INTERPRET=1, which is how the tests use it.

    The weight is fastest in PyTorch's channels_last layout; any other is copied into it on every call.
    """
    _check(x, weight, stride, add, residual)
    others = (bias, in_norm_weight, add, residual)
    if x.dtype != torch.float32 and x.numel() and is_dense(weight, others, norm_weight, activate):
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, None, stride, 1).permute(0, 2, 3, 1)
        return y.contiguous() if norm_weight is None else _normalised(y, norm_weight, norm_bias, eps)
    B, OUT_H, OUT_W, N = _output_shape(x, weight, stride)
    check_rows("conv_norm", B * OUT_H * OUT_W)
    y = torch.empty((B, OUT_H, OUT_W, N), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x, weight = x.contiguous(), weight.permute(0, 2, 3, 1).contiguous()
    SIZE, C = weight.shape[1], weight.shape[3]
    settings = launch_settings("conv_norm", x.device, x.dtype)
    BLOCK_N, M = min(settings["BLOCK_N"], max(16, triton.next_power_of_2(N))), B * OUT_H * OUT_W
    if norm_weight is not None and BLOCK_N < N:  # a row must be whole: wider, and lower, for the same registers
        BLOCK_N, settings = triton.next_power_of_2(N), for_wide_rows(settings)
    BLOCK_M = settings["BLOCK_M"]
    BLOCK_C = min(settings["BLOCK_C"], max(16, triton.next_power_of_2(C)))
    VECTOR = 8 // x.element_size() if settings["CACHED"] and SIZE > 1 else 0
    bias, in_norm_weight, in_norm_bias, add, norm_weight, norm_bias, residual = (
        None if t is None else t.contiguous()
        for t in (bias, in_norm_weight, in_norm_bias, add, norm_weight, norm_bias, residual)
    )
    with torch.cuda.device_of(x):
        if in_norm_weight is not None:
            x = _normalised(x, in_norm_weight, in_norm_bias, eps)
        _conv_norm_kernel[(triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N),)](
            x, weight, bias, add, norm_weight, norm_bias, residual, y,
            M, x.shape[1], x.shape[2], OUT_H, OUT_W,
            1 if add is None else add.numel() // N, 1 if residual is None else residual.numel() // N, eps, SIZE * SIZE,
            C, N, SIZE, stride, bias is not None, add is not None, norm_weight is not None, activate,
            residual is not None, dot_precision(x.dtype), VECTOR, BLOCK_M, BLOCK_N, BLOCK_C,
            **launch_options(settings, x.device),
        )  # fmt: skip
    return y


def _fake(x: Tensor, weight: Tensor, *args: object) -> Tensor:
    stride = args[7]
    assert isinstance(stride, int)
    return torch.empty(_output_shape(x, weight, stride), dtype=x.dtype, device=x.device)


def _flops(x: tuple[int, ...], weight: tuple[int, ...], *args: object, out_shape: tuple[int, ...], **_: object) -> int:
    B, H, W, N = out_shape
    return 2 * B * H * W * N * weight[1] * weight[2] * weight[3]


conv_norm = register("conv_norm", conv_norm_ref, conv_norm_triton, _fake, _flops)
