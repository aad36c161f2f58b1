"""The inverted bottleneck of the convolution stages, on channels-last maps.

    h = GELU(LayerNorm(x) W_e + b_e)                       [B, H, W, D], D = 4 * N
    y = GELU(depthwise3x3(h, stride)) W_p + b_p + shortcut(x)

The shortcut is x itself; with stride 2 its average over 3 x 3 pixels, padding not counted; and where the widths differ
that times W_s + b_s. On the GPU h is written once and read once, nine-fold from the cache: with C = 64, D = 256 at
512 x 512 pixels and stride 2 that is 2 * 134 MB of the 310 MB that are moved in half precision, and the bound.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._rows import conv_rows, rows_needed, strips
from ._triton import dot_precision, gelu, register, tl, triton
from .tuning import launch_options, launch_settings


def mbconv_ref(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
    shortcut_weight: Tensor | None,
    shortcut_bias: Tensor | None,
    stride: int,
    eps: float,
) -> Tensor:
    """Oracle, CPU path and export decomposition.

    Args:
        x: `[B, H, W, C]`; H and W even with stride 2.
        norm_weight, norm_bias: `[C]`.
        expand_weight, expand_bias: `[D, C]`, `[D]`.
        depthwise_weight, depthwise_bias: `[D, 1, 3, 3]`, `[D]`.
        project_weight, project_bias: `[N, D]`, `[N]`.
        shortcut_weight, shortcut_bias: `[N, C]`, `[N]`; None where C = N.
        stride: 1 or 2.
        eps: of the LayerNorm.

    Returns:
        `[B, H / stride, W / stride, N]` in x's dtype.
    """
    _check(x, expand_weight, depthwise_weight, project_weight, shortcut_weight, stride)
    B, H, W, C = x.shape
    D = len(expand_weight)
    parts = []
    for rows in strips(H // stride, B * stride * W * D, x):
        needed = rows_needed(rows, stride, H)
        y = F.layer_norm(x[:, needed.start : needed.stop], (C,), norm_weight, norm_bias, eps)
        y = F.gelu(F.linear(y, expand_weight, expand_bias))
        y = F.gelu(conv_rows(y, depthwise_weight, depthwise_bias, rows, H, stride, groups=D))
        parts.append(F.linear(y, project_weight, project_bias))
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    if stride == 2:
        x = F.avg_pool2d(x.permute(0, 3, 1, 2), 3, 2, padding=1, count_include_pad=False).permute(0, 2, 3, 1)
    return y + (x if shortcut_weight is None else F.linear(x, shortcut_weight, shortcut_bias))


def _check(x: Tensor, expand: Tensor, depthwise: Tensor, project: Tensor, shortcut: Tensor | None, stride: int) -> None:
    C, D, N = x.shape[-1], len(expand), len(project)
    fits = (
        x.ndim == 4
        and expand.shape == (D, C)
        and depthwise.shape == (D, 1, 3, 3)
        and project.shape == (N, D)
        and (C == N if shortcut is None else shortcut.shape == (N, C))
    )
    if not fits:
        named = {"x": x, "expand": expand, "depthwise": depthwise, "project": project, "shortcut": shortcut}
        raise ValueError(
            "mbconv needs x [B, H, W, C], expand [D, C], depthwise [D, 1, 3, 3], project [N, D] and, unless C = N, "
            + "shortcut [N, C], got "
            + ", ".join(f"{name} {None if t is None else list(t.shape)}" for name, t in named.items())
        )
    if stride not in (1, 2) or x.shape[1] % stride or x.shape[2] % stride:
        raise ValueError(f"mbconv has stride 1, or 2 on even sizes, got stride {stride} on {x.shape[1]}x{x.shape[2]}")


@triton.jit
def _expand_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, bias_ptr, h_ptr,  # [M, C], [C], [C], [D, C], [D], [M, D]
    M, eps,
    C: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """h = GELU(LayerNorm(x) W + b): the rows are normalised on their way into the product."""
    pid = tl.program_id(0)
    blocks_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    offs_m = (pid // blocks_d).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = (pid % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_m, mask_d = offs_m < M, offs_d < D
    x_ptrs = x_ptr + offs_m[:, None] * C

    total = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, C, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        mask = mask_m[:, None] & (offs_c < C)[None, :]
        total += tl.sum(tl.load(x_ptrs + offs_c[None, :], mask=mask, other=0.0).to(tl.float32), 1)
    mean = (total / C)[:, None]
    total = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, C, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        mask = mask_m[:, None] & (offs_c < C)[None, :]
        centred = tl.load(x_ptrs + offs_c[None, :], mask=mask, other=0.0).to(tl.float32) - mean
        total += tl.sum(tl.where(mask, centred * centred, 0.0), 1)
    rstd = tl.rsqrt(total / C + eps)[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, C, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        x = tl.load(x_ptrs + offs_c[None, :], mask=mask_m[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
        gain = tl.load(norm_weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        shift = tl.load(norm_bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        x = ((x - mean) * rstd * gain[None, :] + shift[None, :]).to(x_ptr.dtype.element_ty)
        mask = mask_c[:, None] & mask_d[None, :]
        weight = tl.load(weight_ptr + offs_d[None, :] * C + offs_c[:, None], mask=mask, other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
    h = gelu(acc + tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :])
    mask = mask_m[:, None] & mask_d[None, :]
    tl.store(h_ptr + offs_m[:, None] * D + offs_d[None, :], h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _project_kernel(
    h_ptr, x_ptr, depthwise_weight_ptr, depthwise_bias_ptr,  # [B, H, W, D], [B, H, W, C], [D, 1, 3, 3], [D]
    project_weight_ptr, project_bias_ptr, shortcut_weight_ptr, shortcut_bias_ptr,  # [N, D], [N], [N, C], [N]
    y_ptr,  # [B, H / STRIDE, W / STRIDE, N]
    M, H, W,  # M = B * (H / STRIDE) * (W / STRIDE)
    C: tl.constexpr, D: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr, WIDENS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = GELU(depthwise(h)) W + b + shortcut: what the depthwise convolution gives goes straight into the product."""
    pid = tl.program_id(0)
    blocks_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    offs_m = (pid // blocks_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (pid % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    out_h, out_w = H // STRIDE, W // STRIDE
    column, row = (offs_m % out_w) * STRIDE, ((offs_m // out_w) % out_h) * STRIDE
    centre = ((offs_m // out_w // out_h).to(tl.int64) * H + row) * W + column  # the input pixel in the middle

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, D, BLOCK_D):
        offs_d = first + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        a = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        a += tl.load(depthwise_bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
        for tap in tl.static_range(9):
            dy = tap // 3 - 1
            dx = tap % 3 - 1
            inside = mask_m & (row + dy >= 0) & (row + dy < H) & (column + dx >= 0) & (column + dx < W)
            ptr = h_ptr + (centre + dy * W + dx)[:, None] * D + offs_d[None, :]
            h = tl.load(ptr, mask=inside[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
            a += h * tl.load(depthwise_weight_ptr + offs_d * 9 + tap, mask=mask_d, other=0.0).to(tl.float32)[None, :]
        a = gelu(a).to(h_ptr.dtype.element_ty)
        mask = mask_d[:, None] & mask_n[None, :]
        weight = tl.load(project_weight_ptr + offs_n[None, :] * D + offs_d[:, None], mask=mask, other=0.0)
        acc = tl.dot(a, weight, acc, input_precision=PRECISION)
    acc += tl.load(project_bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]

    if WIDENS:
        acc += tl.load(shortcut_bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        for first in range(0, C, BLOCK_D):
            offs_c = first + tl.arange(0, BLOCK_D)
            x = _pooled(x_ptr, centre, row, column, mask_m, offs_c, offs_c < C, H, W, C, STRIDE, BLOCK_M, BLOCK_D)
            mask = (offs_c < C)[:, None] & mask_n[None, :]
            weight = tl.load(shortcut_weight_ptr + offs_n[None, :] * C + offs_c[:, None], mask=mask, other=0.0)
            acc = tl.dot(x.to(x_ptr.dtype.element_ty), weight, acc, input_precision=PRECISION)
    else:
        acc += _pooled(x_ptr, centre, row, column, mask_m, offs_n, mask_n, H, W, C, STRIDE, BLOCK_M, BLOCK_N)
    mask = mask_m[:, None] & mask_n[None, :]
    tl.store(y_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pooled(
    x_ptr, centre, row, column, mask_m, offs_c, mask_c, H, W,
    C: tl.constexpr, STRIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x at the output's pixels; with stride 2 its mean over the 3 x 3 pixels around that lie in the image."""
    if STRIDE == 1:
        ptr = x_ptr + centre[:, None] * C + offs_c[None, :]
        result = tl.load(ptr, mask=mask_m[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        count = tl.zeros((BLOCK_M,), tl.float32)
        for tap in tl.static_range(9):
            dy = tap // 3 - 1
            dx = tap % 3 - 1
            inside = (row + dy >= 0) & (row + dy < H) & (column + dx >= 0) & (column + dx < W)
            ptr = x_ptr + (centre + dy * W + dx)[:, None] * C + offs_c[None, :]
            total += tl.load(ptr, mask=(inside & mask_m)[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
            count += inside.to(tl.float32)
        result = total / count[:, None]
    return result


def mbconv_triton(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
    shortcut_weight: Tensor | None,
    shortcut_bias: Tensor | None,
    stride: int,
    eps: float,
) -> Tensor:
    """Launch the kernels. Also runs on CPU tensors under TRITON_INTERPRET=1, which is how the tests use it."""
    _check(x, expand_weight, depthwise_weight, project_weight, shortcut_weight, stride)
    B, H, W, C = x.shape
    D, N = len(expand_weight), len(project_weight)
    y = torch.empty((B, H // stride, W // stride, N), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    h = torch.empty((B, H, W, D), dtype=x.dtype, device=x.device)
    x, expand_weight, depthwise_weight, project_weight = (
        t.contiguous() for t in (x, expand_weight, depthwise_weight, project_weight)
    )
    expand, project = (
        launch_settings("mbconv_expand", x.device, x.dtype),
        launch_settings("mbconv_project", x.device, x.dtype),
    )
    M, PRECISION = B * H * W, dot_precision(x.dtype)
    with torch.cuda.device_of(x):
        _expand_kernel[(triton.cdiv(M, expand["BLOCK_M"]) * triton.cdiv(D, expand["BLOCK_D"]),)](
            x, norm_weight, norm_bias, expand_weight, expand_bias, h, M, eps, C, D, PRECISION,
            expand["BLOCK_M"], expand["BLOCK_D"], expand["BLOCK_C"],
            **launch_options(expand),
        )  # fmt: skip
        M //= stride * stride
        _project_kernel[(triton.cdiv(M, project["BLOCK_M"]) * triton.cdiv(N, project["BLOCK_N"]),)](
            h, x, depthwise_weight, depthwise_bias, project_weight, project_bias,
            project_weight if shortcut_weight is None else shortcut_weight.contiguous(),
            project_bias if shortcut_bias is None else shortcut_bias,
            y, M, H, W, C, D, N, stride, shortcut_weight is not None, PRECISION,
            project["BLOCK_M"], project["BLOCK_N"], project["BLOCK_D"],
            **launch_options(project),
        )  # fmt: skip
    return y


def _fake(x: Tensor, *args: object) -> Tensor:
    project_weight, stride = args[6], args[10]
    assert isinstance(project_weight, Tensor) and isinstance(stride, int)
    B, H, W, _ = x.shape
    return torch.empty((B, H // stride, W // stride, len(project_weight)), dtype=x.dtype, device=x.device)


def _flops(x: tuple[int, ...], *args: object, out_shape: tuple[int, ...], **kwargs: object) -> int:
    B, H, W, C = x
    N, stride = out_shape[-1], H // out_shape[1]
    D = 4 * N
    out = B * H * W // stride**2
    return 2 * (B * H * W * C * D + out * (9 * D + D * N + (0 if C == N else C * N)))


mbconv = register("mbconv", mbconv_ref, mbconv_triton, _fake, _flops)
