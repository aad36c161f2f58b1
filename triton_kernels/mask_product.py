"""Product of mask weights with a map and with a 3x3 convolution of another, without the convolution's output.

    y = weights (m + conv(x) + bias) = weights m + (weights W) * x + weights bias

x and m are read and y is written once: B * H * W * (C + K + n) * itemsize bytes. The convolution has n outputs, not C.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import add_product, tl, triton, wait_for_inputs
from .launch_config import LaunchConfig, launch_config
from .operator import check_batch, check_counts, contiguous, described, dot_precision, register


def mask_product_ref(weights: Tensor, m: Tensor, x: Tensor, conv_weight: Tensor, conv_bias: Tensor) -> Tensor:
    """Oracle and CPU path.

    Args:
        weights: `[B, n, C]`.
        m: `[B, H, W, C]`.
        x: `[B, H, W, K]`.
        conv_weight, conv_bias: `[C, K, 3, 3]` and `[C]`.

    Returns:
        `[B, n, H, W]` in m's dtype. The sums over the nine taps are not rounded.
    """
    _check(weights, m, x, conv_weight, conv_bias)
    low = weights @ m.flatten(1, 2).transpose(1, 2) + weights @ conv_bias[:, None]
    taps = (weights.float() @ conv_weight.float().flatten(1)).unflatten(2, conv_weight.shape[1:])  # [B, n, K, 3, 3]
    # `fold` adds tap (y, x) of a position to its neighbor at (y - 1, x - 1): the taps in reverse
    taps = taps.flip(3, 4).permute(0, 1, 3, 4, 2).flatten(1, 3).to(x.dtype)
    shifted = (taps @ x.flatten(1, 2).transpose(1, 2)).float()
    return low.unflatten(-1, m.shape[1:3]) + F.fold(shifted, m.shape[1:3], 3, padding=1).to(low.dtype)


def _check(weights: Tensor, m: Tensor, x: Tensor, conv_weight: Tensor, conv_bias: Tensor) -> None:
    fits = weights.ndim == 3 and m.ndim == 4 and x.shape[:3] == m.shape[:3]
    fits = fits and (weights.shape[0], weights.shape[2]) == (m.shape[0], m.shape[3]) and conv_bias.shape == m.shape[3:]
    if not fits or conv_weight.shape != (m.shape[3], x.shape[3], 3, 3):
        raise ValueError(
            "mask_product needs weights [B, n, C], m [B, H, W, C], x [B, H, W, K], conv_weight [C, K, 3, 3] and "
            "conv_bias [C], got " + described(weights=weights, m=m, x=x, conv_weight=conv_weight, conv_bias=conv_bias)
        )


@triton.jit
def _mask_product_kernel(
    weights_ptr, taps_ptr, m_ptr, x_ptr, bias_ptr,  # [B, n, C], [B, n, 9, K], [B, H, W, C], [B, H, W, K], [C]
    y_ptr,  # [B, n, H, W]
    H, W, n,
    C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_P pixels of all masks of an image."""
    wait_for_inputs(OVERLAP)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    b = tl.program_id(1).to(tl.int64)
    offs_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_n, offs_c, offs_k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    mask_p, mask_n, mask_c, mask_k = offs_p < H * W, offs_n < n, offs_c < C, offs_k < K
    weight_ptrs = weights_ptr + (b * n + offs_n)[None, :] * C + offs_c[:, None]
    weights = tl.load(weight_ptrs, mask=mask_c[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_C, BLOCK_N]
    m_ptrs = m_ptr + (b * H * W + offs_p)[:, None] * C + offs_c[None, :]
    m = tl.load(m_ptrs, mask=mask_p[:, None] & mask_c[None, :], other=0.0)
    acc = add_product(m, weights, tl.zeros((BLOCK_P, BLOCK_N), tl.float32), PRECISION)
    bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    acc += tl.sum(weights.to(tl.float32) * bias[:, None], 0)[None, :]
    row, column = offs_p // W, offs_p % W
    x_ptrs = x_ptr + (b * H * W + offs_p)[:, None] * K + offs_k[None, :]
    tap_ptrs = taps_ptr + (b * n + offs_n)[None, :] * (9 * K) + offs_k[:, None]
    for tap in range(9):
        down, right = tap // 3 - 1, tap % 3 - 1
        inside = (row + down >= 0) & (row + down < H) & (column + right >= 0) & (column + right < W) & mask_p
        x = tl.load(x_ptrs + (down * W + right) * K, mask=inside[:, None] & mask_k[None, :], other=0.0)
        taps = tl.load(tap_ptrs + tap * K, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = add_product(x, taps, acc, PRECISION)
    y_ptrs = y_ptr + (b * n + offs_n)[None, :] * (H * W) + offs_p[:, None]
    tl.store(y_ptrs, acc.to(dtype), mask=mask_p[:, None] & mask_n[None, :])


def mask_product_triton(
    weights: Tensor,
    m: Tensor,
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    *,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Launch the kernel. Also runs on CPU tensors under TRITON_INTERPRET=1, which is how the tests use it."""
    _check(weights, m, x, conv_weight, conv_bias)
    (B, H, W, C), n, K = m.shape, weights.shape[1], x.shape[3]
    check_batch("mask_product", B)
    y = torch.empty((B, n, H, W), dtype=m.dtype, device=m.device)
    if y.numel() == 0:
        return y
    taps = weights @ conv_weight.permute(0, 2, 3, 1).reshape(C, 9 * K)  # no copy in the memory layout of a model
    weights, m, x, conv_bias, taps = contiguous(weights, m, x, conv_bias, taps)
    config = config or launch_config(m.device)
    settings = config.settings_for("mask_product", m.dtype)
    BLOCK_P = settings["BLOCK_P"]
    check_counts("mask_product", pixels=H * W + BLOCK_P, values_of_a_tap=(W + 1) * K)
    BLOCK_N, BLOCK_C, BLOCK_K = (max(16, triton.next_power_of_2(size)) for size in (n, C, K))
    with torch.cuda.device_of(m):
        _mask_product_kernel[(triton.cdiv(H * W, BLOCK_P), B)](
            weights, taps, m, x, conv_bias, y, H, W, n,
            C, K, dot_precision(m.dtype), BLOCK_P, BLOCK_N, BLOCK_C, BLOCK_K,
            **config.options(settings),
        )  # fmt: skip
    return y


def _fake(weights: Tensor, m: Tensor, *_: Tensor) -> Tensor:
    return torch.empty((*weights.shape[:2], *m.shape[1:3]), dtype=m.dtype, device=m.device)


def _flops(weights: object, m: tuple[int, ...], x: tuple[int, ...], *_: object, out_shape: Any, **__: object) -> int:
    B, n, H, W = out_shape
    C, K = m[3], x[3]
    return 2 * B * n * (H * W * (C + 9 * K) + 9 * C * K)


mask_product = register("mask_product", mask_product_ref, mask_product_triton, _fake, _flops)
