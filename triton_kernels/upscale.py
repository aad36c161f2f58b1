"""Transposed 2x2 convolution with stride 2, LayerNorm and GELU, on channels-last maps.

    y = conv_transpose2x2(x) + b       each pixel becomes four
    y = GELU(LayerNorm(y))             the norm if it is given

The convolution is a matrix product: the four pixels are four blocks of N columns. One launch reads x and writes y once:
B * H * W * (C + 4 N) * itemsize bytes and 8 * C * N operations per pixel of x.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import add_product, add_row, gelu, normalize_rows, tl, triton, wait_for_inputs
from .launch_config import LaunchConfig, launch_config
from .operator import check_counts, contiguous, described, dot_precision, register


def upscale_ref(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float
) -> Tensor:
    """Oracle and CPU path.

    Args:
        x: `[B, H, W, C]`.
        weight: `[4 * N, C]`, rows in the order (y, x, out).
        bias: `[N]`.
        norm_weight, norm_bias: `[N]` of a LayerNorm, or None.
        eps: Epsilon of the LayerNorm.

    Returns:
        `[B, 2 * H, 2 * W, N]` in x's dtype.
    """
    _check(x, weight, bias, norm_weight, norm_bias)
    B, H, W, _ = x.shape
    N = len(bias)
    y = F.linear(x, weight, bias.repeat(4)).view(B, H, W, 2, 2, N)
    y = y.permute(0, 1, 3, 2, 4, 5).reshape(B, 2 * H, 2 * W, N)
    return F.gelu(y if norm_weight is None else F.layer_norm(y, (N,), norm_weight, norm_bias, eps))


def _check(x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None) -> None:
    N = len(bias)
    norms = {None if t is None else tuple(t.shape) for t in (norm_weight, norm_bias)}
    if x.ndim != 4 or weight.shape != (4 * N, x.shape[3]) or bias.shape != (N,) or norms not in ({None}, {(N,)}):
        raise ValueError(
            "upscale needs x [B, H, W, C], weight [4 * N, C], bias [N], and a norm of weight and bias [N] or none; got "
            + described(x=x, weight=weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias)
        )


@triton.jit
def _upscale_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, y_ptr,  # [M, C], [4, N, C], [N] x 3, [B, 2H, 2W, N]
    M, W, eps,  # M = B * H * W
    C: tl.constexpr, N: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,  # BLOCK_N = next_power_of_2(N)
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute one of the four output pixels of BLOCK_M pixels. Four consecutive programs read the same x from L2."""
    wait_for_inputs(OVERLAP)
    pid = tl.program_id(0)
    corner = pid % 4
    offs_m = (pid // 4) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * C
    weight_rows = weight_ptr + (corner * N + offs_n)[None, :] * C
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, C, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        x = tl.load(x_rows + offs_c[None, :], mask=mask_m[:, None] & mask_c[None, :], other=0.0)
        weight = tl.load(weight_rows + offs_c[:, None], mask=mask_c[:, None] & mask_n[None, :], other=0.0)
        acc = add_product(x, weight, acc, PRECISION)
    acc = add_row(acc, bias_ptr, offs_n, N)
    if NORM:
        acc = normalize_rows(acc, norm_weight_ptr, norm_bias_ptr, offs_n, mask_n, eps, N)
    y = gelu(acc, y_ptr.dtype.element_ty)
    column, line = offs_m % W, offs_m // W  # lines of all images
    place = (2 * line + corner // 2).to(tl.int64) * (2 * W) + (2 * column + corner % 2)
    ptr = y_ptr + place[:, None] * N + offs_n[None, :]
    tl.store(ptr, y.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def upscale_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    *,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Launch the kernel. Also runs on CPU tensors under TRITON_INTERPRET=1, which is how the tests use it."""
    _check(x, weight, bias, norm_weight, norm_bias)
    B, H, W, C = x.shape
    N = len(bias)
    y = torch.empty((B, 2 * H, 2 * W, N), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x, weight, bias, norm_weight, norm_bias = contiguous(x, weight, bias, norm_weight, norm_bias)
    config = config or launch_config(x.device)
    settings = config.settings_for("upscale", x.dtype)
    M, BLOCK_M, BLOCK_N = B * H * W, settings["BLOCK_M"], max(16, triton.next_power_of_2(N))
    BLOCK_C = min(settings["BLOCK_C"], max(16, triton.next_power_of_2(C)))
    check_counts("upscale", pixels=M + BLOCK_M, programs=4 * triton.cdiv(M, BLOCK_M), lines=2 * (B * H + BLOCK_M))
    with torch.cuda.device_of(x):
        _upscale_kernel[(4 * triton.cdiv(M, BLOCK_M),)](
            x, weight, bias, norm_weight, norm_bias, y, M, W, eps,
            C, N, norm_weight is not None, dot_precision(x.dtype), BLOCK_M, BLOCK_N, BLOCK_C,
            **config.options(settings),
        )  # fmt: skip
    return y


def _fake(x: Tensor, weight: Tensor, bias: Tensor, *_: object) -> Tensor:
    B, H, W, _ = x.shape
    return torch.empty((B, 2 * H, 2 * W, len(bias)), dtype=x.dtype, device=x.device)


def _flops(x: tuple[int, ...], weight: tuple[int, ...], *_: object, out_shape: tuple[int, ...], **__: object) -> int:
    B, H, W, C = x
    return 2 * B * H * W * C * weight[0]


upscale = register("upscale", upscale_ref, upscale_triton, _fake, _flops)
