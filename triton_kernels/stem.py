"""Stem of the backbone: pixels to the first map.

    p = (pixels - mean) / std          if the pixels are uint8; zero-padded on the right and below to H x W
    y = GELU(LayerNorm(conv3x3 s2(p) + b))
    z = conv3x3(y) + b

One launch computes y. The second convolution is the kernel of `conv_norm`, because cuDNN adds a bias in a launch of
its own. That launch takes as long as the convolution (H100, bfloat16, N = 64, 512 x 512: 59 and 49 us).
Pixels are read once: 3 * B * h * w * itemsize bytes. With M = B * H * W / 4 pixels of the maps, y is written and read
once and z is written once: 3 * M * N * itemsize bytes. The convolutions take 2 * M * N * (27 + 9 * N) operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import add_row, gelu, normalize_rows, tl, triton, wait_for_inputs
from .conv_norm import conv_norm_triton
from .launch_config import LaunchConfig, launch_config
from .operator import check_batch, check_counts, contiguous, described, dot_precision, register
from .rows import conv_rows, rows_needed, strips


def stem_ref(
    pixels: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    weight1: Tensor,
    bias1: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight2: Tensor,
    bias2: Tensor | None,
    H: int,
    W: int,
    eps: float,
    size: Tensor | None = None,
) -> Tensor:
    """Oracle and CPU path.

    Args:
        pixels: `[B, h, w, 3]` uint8, or normalized in the weights' dtype; h <= H, w <= W.
        mean, std: Mean and standard deviation of the three channels, for uint8 pixels.
        weight1, bias1: `[N, 3, 3, 3]`, `[N]` of the convolution with stride 2.
        norm_weight, norm_bias: `[N]` of the LayerNorm.
        weight2, bias2: `[N, N, 3, 3]`, `[N]` of the second convolution; without a bias, cuDNN computes it.
        H, W: Padded size in pixels, even.
        eps: Epsilon of the LayerNorm.
        size: `[2]` int32, height and width of the image in pixels; beyond them is padding. None for all of it. On the
            device, so that one CUDA graph serves every size.

    Returns:
        `[B, H/2, W/2, N]` in the weights' dtype.
    """
    _check(pixels, weight1, weight2, H, W, size)
    x = pixels
    if x.dtype == torch.uint8:
        x = normalized(x, mean, std).to(weight1.dtype)
    B, h, w, _ = x.shape
    x = x if size is None else without_padding(x, size)
    if (h, w) != (H, W):
        x = F.pad(x, (0, 0, 0, W - w, 0, H - h))
    N = len(weight1)
    parts = []
    for rows in strips(H // 2, B * W // 2 * N, x):
        inner = rows_needed(rows, 1, H // 2)
        outer = rows_needed(inner, 2, H)
        y = conv_rows(x[:, outer.start : outer.stop], weight1, bias1, inner, H, stride=2)
        y = F.gelu(F.layer_norm(y, (N,), norm_weight, norm_bias, eps))
        parts.append(conv_rows(y, weight2, bias2, rows, H // 2, stride=1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def normalized(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return uint8 pixels `[..., 3]` as float32, minus the mean and divided by the standard deviation."""
    means, stds = (_constant(values, pixels.device) for values in (mean, std))
    return (pixels - means) / stds


def without_padding(x: Tensor, size: Tensor) -> Tensor:
    """Return `[B, h, w, 3]` with zeros beyond `size` `[2]`."""
    rows, columns = (torch.arange(n, device=x.device) < size[axis] for axis, n in enumerate(x.shape[1:3]))
    return torch.where((rows[:, None] & columns)[..., None], x, 0)


def _constant(values: Sequence[float], device: torch.device) -> Tensor:
    """Return `torch.tensor(values)`; on CUDA by fills, because a copy from the host cannot be captured."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.float32, device=device)
    return torch.cat([torch.full((1,), value, dtype=torch.float32, device=device) for value in values])


def _check(pixels: Tensor, weight1: Tensor, weight2: Tensor, H: int, W: int, size: Tensor | None) -> None:
    N = len(weight1)
    if pixels.ndim != 4 or pixels.shape[3] != 3 or weight1.shape != (N, 3, 3, 3) or weight2.shape != (N, N, 3, 3):
        raise ValueError(
            "stem needs pixels [B, h, w, 3], weight1 [N, 3, 3, 3] and weight2 [N, N, 3, 3], got "
            + described(pixels=pixels, weight1=weight1, weight2=weight2)
        )
    if pixels.dtype not in (torch.uint8, weight1.dtype):
        raise TypeError(f"stem needs pixels of uint8 or of the weights' {weight1.dtype}, got {pixels.dtype}")
    if size is not None and (size.shape != (2,) or size.dtype != torch.int32):
        raise ValueError(f"stem needs size [2] int32, got {list(size.shape)} {size.dtype}")
    if H % 2 or W % 2 or pixels.shape[1] > H or pixels.shape[2] > W:
        raise ValueError(f"stem pads {pixels.shape[1]}x{pixels.shape[2]} pixels to an even size, got {H}x{W}")


@triton.jit
def _stem_kernel(
    x_ptr, weight_ptr, bias_ptr,  # [B, h, w, 3] in any layout, [N, 3, 3, 3] channels last, [N]
    norm_weight_ptr, norm_bias_ptr, size_ptr, y_ptr,  # [N], [N], [2] or None, [B, H/2, W/2, N]
    mean0, mean1, mean2, scale0, scale1, scale2,  # scale: 1 / std
    H, W, OUT_H, OUT_W, eps,  # H, W: size of x, before padding
    stride_b, stride_h, stride_w, stride_c,  # of x, in elements
    N: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,  # BLOCK_N = next_power_of_2(N)
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_M pixels of one row of one image."""
    wait_for_inputs(OVERLAP)
    if size_ptr is None:
        height, width = H, W
    else:
        height, width = tl.load(size_ptr), tl.load(size_ptr + 1)
    blocks = tl.cdiv(OUT_W, BLOCK_M)
    row = tl.program_id(0) // blocks
    offs_m = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    image = tl.program_id(1).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, 32)  # row, column and channel of the 27 filter taps
    mask_m, mask_n, mask_k = offs_m < OUT_W, offs_n < N, offs_k < 27
    channel = offs_k % 3
    in_row = 2 * row + offs_k // 9 - 1
    column = (offs_m * 2)[:, None] + (offs_k // 3 % 3 - 1)[None, :]
    inside = mask_m[:, None] & (mask_k & (in_row >= 0) & (in_row < height))[None, :] & (column >= 0) & (column < width)
    ptr = x_ptr + image * stride_b + (2 * row - 1).to(tl.int64) * stride_h - stride_w
    ptr += (offs_m * (2 * stride_w))[:, None]
    ptr += (offs_k // 9 * stride_h + offs_k // 3 % 3 * stride_w + channel * stride_c)[None, :]
    x = tl.load(ptr, mask=inside, other=0)
    if NORMALIZE:
        mean = tl.where(channel == 0, mean0, tl.where(channel == 1, mean1, mean2))
        scale = tl.where(channel == 0, scale0, tl.where(channel == 1, scale1, scale2))
        x = tl.where(inside, (x.to(tl.float32) - mean[None, :]) * scale[None, :], 0.0)  # padding stays zero
    x = x.to(weight_ptr.dtype.element_ty)
    mask = mask_k[:, None] & mask_n[None, :]
    weight = tl.load(weight_ptr + offs_n[None, :] * 27 + offs_k[:, None], mask=mask, other=0.0)
    y = tl.dot(x, weight, input_precision=PRECISION)
    y = add_row(y, bias_ptr, offs_n, N)
    y = normalize_rows(y, norm_weight_ptr, norm_bias_ptr, offs_n, mask_n, eps, N)
    y = gelu(y, y_ptr.dtype.element_ty)
    ptr = y_ptr + ((image * OUT_H + row) * OUT_W + offs_m)[:, None] * N + offs_n[None, :]
    tl.store(ptr, y.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def stem_triton(
    pixels: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    weight1: Tensor,
    bias1: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight2: Tensor,
    bias2: Tensor | None,
    H: int,
    W: int,
    eps: float,
    size: Tensor | None = None,
    *,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Launch the kernels. Also runs on CPU tensors under TRITON_INTERPRET=1, which is how the tests use it.

    Weights in PyTorch's channels_last layout are read as they are; other layouts are copied on every call.
    """
    _check(pixels, weight1, weight2, H, W, size)
    B, N = len(pixels), len(weight1)
    check_batch("stem", B)
    y = torch.empty((B, H // 2, W // 2, N), dtype=weight1.dtype, device=pixels.device)
    if y.numel() == 0:
        return y
    tensors = contiguous(weight1.permute(0, 2, 3, 1), bias1, norm_weight, norm_bias)
    config = config or launch_config(pixels.device)
    settings = config.settings_for("stem", weight1.dtype)
    BLOCK_N = max(16, triton.next_power_of_2(N))
    BLOCK_M = max(16, min(settings["VALUES"] // BLOCK_N, triton.next_power_of_2(W // 2)))
    _, stride_h, stride_w, stride_c = pixels.stride()
    line, taps = (W + 2 * BLOCK_M) * stride_w, 2 * (stride_h + stride_w + stride_c)
    check_counts("stem", addresses_of_a_line=line, addresses_under_a_filter=taps)
    with torch.cuda.device_of(pixels):
        _stem_kernel[(H // 2 * triton.cdiv(W // 2, BLOCK_M), B)](
            pixels, *tensors, size, y, *mean, *(1 / deviation for deviation in std),
            pixels.shape[1], pixels.shape[2], H // 2, W // 2, eps, *pixels.stride(),
            N, pixels.dtype == torch.uint8, dot_precision(weight1.dtype), BLOCK_M, BLOCK_N,
            **config.options(settings),
        )  # fmt: skip
    return conv_norm_triton(y, weight2, bias2, None, None, None, None, None, 1, False, eps, config=config)


def _fake(pixels: Tensor, mean: object, std: object, weight1: Tensor, *args: Any) -> Tensor:
    H, W = args[5:7]
    return torch.empty((pixels.shape[0], H // 2, W // 2, len(weight1)), dtype=weight1.dtype, device=pixels.device)


def _flops(*args: object, out_shape: tuple[int, ...], **_: object) -> int:
    B, H, W, N = out_shape
    return 2 * B * H * W * N * (27 + 9 * N)


stem = register("stem", stem_ref, stem_triton, _fake, _flops)
