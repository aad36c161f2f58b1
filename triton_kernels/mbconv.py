"""Inverted bottleneck (MBConv) of the convolution stages, on channels-last maps.

    x = x + b                                              if in_bias is given
    h = GELU(LayerNorm(x) W_e + b_e)                       [B, H, W, D], D = 4 * N
    y = GELU(depthwise3x3(h, stride)) W_p + b_p + shortcut(x)

The shortcut is x. With stride 2 it is the average of x over 3 x 3 pixels, padding not counted. If the widths differ,
it is multiplied by W_s, plus b_s. On a GPU h is written once and read from memory once, and about five times from
caches. Half precision moves 310 MB at 512 x 512 pixels with C = 64, D = 256 and stride 2. Of these, h is 2 * 134 MB.
Those bytes are the lower bound; by count, issuing the instructions for h takes longer. So on NVIDIA GPUs a bfloat16
model has h, the depthwise sums and their GELU in float16, two values in one instruction (PACKED). float16 has three
more bits than bfloat16; values beyond 65504 are clamped before GELU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import add_row, gelu, mean_and_rstd, multiply_add, tl, triton, wait_for_inputs
from .launch_config import LaunchConfig, Settings, launch_config
from .operator import MOST_IN_BATCH, check_counts, contiguous, described, dot_precision, register
from .rows import conv_rows, rows_needed, strips

WIDEST_INPUT = 128  # most channels of which 128 rows fit in 99 KiB
ENOUGH_PROGRAMS = 512  # a few per SM; below this, the columns of h are divided among programs too


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
    in_bias: Tensor | None = None,
) -> Tensor:
    """Oracle and CPU path.

    Args:
        x: `[B, H, W, C]`; H and W even with stride 2.
        norm_weight, norm_bias: `[C]`.
        expand_weight, expand_bias: `[D, C]`, `[D]`.
        depthwise_weight, depthwise_bias: `[D, 1, 3, 3]`, `[D]`.
        project_weight, project_bias: `[N, D]`, `[N]`.
        shortcut_weight, shortcut_bias: `[N, C]`, `[N]`; None if C = N, as it is with stride 1.
        stride: 1 or 2.
        eps: Epsilon of the LayerNorm.
        in_bias: `[C]` added to x first, so that the convolution before needs no bias; or None.

    Returns:
        `[B, H / stride, W / stride, N]` in x's dtype.
    """
    _check(x, expand_weight, depthwise_weight, project_weight, shortcut_weight, stride)
    if in_bias is not None:
        x = x + in_bias
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
        and (C == N if shortcut is None else stride == 2 and shortcut.shape == (N, C))
    )
    if not fits:
        given = described(x=x, expand=expand, depthwise=depthwise, project=project, shortcut=shortcut)
        raise ValueError(
            "mbconv needs x [B, H, W, C], expand [D, C], depthwise [D, 1, 3, 3], project [N, D] and shortcut [N, C] or "
            f"None; None means C = N, as it is with stride 1. Got stride {stride}, {given}"
        )
    if stride not in (1, 2) or x.shape[1] % stride or x.shape[2] % stride:
        raise ValueError(f"mbconv has stride 1, or 2 on even sizes, got stride {stride} on {x.shape[1]}x{x.shape[2]}")


@triton.jit
def _cast(source_ptr, target_ptr, COUNT: tl.constexpr):
    """Copy COUNT values to another dtype; programs take turns."""
    SHARE: tl.constexpr = 1024
    for first in range(tl.program_id(0) * SHARE, COUNT, tl.num_programs(0) * SHARE):
        offs = first + tl.arange(0, SHARE)
        x = tl.load(source_ptr + offs, mask=offs < COUNT)
        tl.store(target_ptr + offs, x.to(target_ptr.dtype.element_ty), mask=offs < COUNT)


@triton.jit
def _expand_kernel(
    x_ptr, in_bias_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, bias_ptr,  # [M, C], [C], [C], [C], [D, C], [D]
    h_ptr, depthwise_weight_ptr, depthwise_bias_ptr, project_weight_ptr, cast_ptr,  # [M, D], [3, 3, D], [D], [N, D]
    M, SPAN, eps,  # SPAN: columns of h per program, a multiple of BLOCK_D
    C: tl.constexpr, D: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute SPAN columns of h = GELU(LayerNorm(x) W + b). BLOCK_M rows are normalized once.

    With PACKED, `cast` `[10 + N, D]` gets the parameters of `_project_kernel` in float16: elsewhere it costs a launch.
    """
    wait_for_inputs(OVERLAP)
    if PACKED:
        _cast(depthwise_weight_ptr, cast_ptr, 9 * D)
        _cast(depthwise_bias_ptr, cast_ptr + 9 * D, D)
        _cast(project_weight_ptr, cast_ptr + 10 * D, N * D)
    CHUNKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    spans = tl.cdiv(D, SPAN)
    offs_m = (pid // spans).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M

    x = ()
    for chunk in tl.static_range(CHUNKS):
        offs_c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = mask_m[:, None] & (offs_c < C)[None, :]
        piece = tl.load(x_ptr + offs_m[:, None] * C + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
        x += (add_row(piece, in_bias_ptr, offs_c, C),)
    mean, rstd = mean_and_rstd(x, eps, C, BLOCK_C)
    normed = ()
    for chunk in tl.static_range(CHUNKS):
        offs_c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
        gain = tl.load(norm_weight_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
        shift = tl.load(norm_bias_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
        normed += (((x[chunk] - mean) * rstd * gain[None, :] + shift[None, :]).to(x_ptr.dtype.element_ty),)

    start = (pid % spans) * SPAN
    offs_d = start + tl.arange(0, BLOCK_D)
    weight_ptrs = weight_ptr + offs_d[None, :] * C + tl.arange(0, BLOCK_C)[:, None]
    bias_ptrs = bias_ptr + offs_d
    h_ptrs = h_ptr + offs_m[:, None] * D + offs_d[None, :]
    for first in range(start, tl.minimum(start + SPAN, D), BLOCK_D):
        mask_d = first + tl.arange(0, BLOCK_D) < D if D % BLOCK_D else tl.full((BLOCK_D,), True, tl.int1)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for chunk in tl.static_range(CHUNKS):
            inside = (chunk * BLOCK_C + tl.arange(0, BLOCK_C) < C)[:, None] & mask_d[None, :]
            weight = tl.load(weight_ptrs + chunk * BLOCK_C, mask=inside, other=0.0)
            acc = tl.dot(normed[chunk], weight, acc, input_precision=PRECISION)
        acc += tl.load(bias_ptrs, mask=mask_d, other=0.0).to(tl.float32)[None, :]
        h = gelu(acc.to(tl.float16) if PACKED else acc, h_ptr.dtype.element_ty).to(h_ptr.dtype.element_ty)
        tl.store(h_ptrs, h, mask=mask_m[:, None] & mask_d[None, :])
        weight_ptrs += BLOCK_D * C
        bias_ptrs += BLOCK_D
        h_ptrs += BLOCK_D


@triton.jit
def _join(a, PIXELS: tl.constexpr):
    """Join PIXELS tensors `[M, N]` to `[M, N, 2]` or `[M, N, 2, 2]`; the last indices are the binary digits of i."""
    return tl.join(a[0], a[1]) if PIXELS == 2 else tl.join(tl.join(a[0], a[2]), tl.join(a[1], a[3]))


@triton.jit
def _side_by_side(a, PIXELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Interleave PIXELS tensors `[BLOCK_M / PIXELS, BLOCK_D]`: row PIXELS * p + i from row p of a[i].

    Even and odd channels are joined last, because the last join is innermost. The compiler then stores rows of channels
    without bank conflicts; columns of pixels have eightfold conflicts (`tests.ptx.memory_report`, sm_90).
    """
    if PIXELS == 1:
        joined = a[0]
    else:
        even = ()
        odd = ()
        for i in tl.static_range(PIXELS):
            halves = tl.split(tl.reshape(a[i], (BLOCK_M // PIXELS, BLOCK_D // 2, 2)))
            even += (halves[0],)
            odd += (halves[1],)
        joined = tl.join(_join(even, PIXELS), _join(odd, PIXELS))
        joined = tl.permute(joined, (0, 2, 1, 3) if PIXELS == 2 else (0, 2, 3, 1, 4))
    return tl.reshape(joined, (BLOCK_M, BLOCK_D))


@triton.jit
def _rows(x_ptr, offs_m, mask_m, offs_c, C: tl.constexpr):
    """Load rows of x as float32."""
    mask = mask_m[:, None] & (offs_c < C)[None, :]
    return tl.load(x_ptr + offs_m[:, None] * C + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _pooled(
    x_ptr, corner, above, left, offs_c, H, W,
    C: tl.constexpr, PIXELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean of x over the pixels of 3 x 3 windows inside the image, with stride 2. Windows share sums of columns."""
    rows = tl.minimum(above + 3, H) - tl.maximum(above, 0)
    sums = ()
    means = ()
    for column in tl.static_range(2 * PIXELS + 1):
        total = tl.zeros((BLOCK_M // PIXELS, BLOCK_C), tl.float32)
        for dy in tl.static_range(3):
            inside = (above + dy >= 0) & (above + dy < H) & (left + column >= 0) & (left + column < W)
            total += _rows(x_ptr, corner + dy * W + column, inside, offs_c, C)
        sums += (total,)
        if column >= 2 and column % 2 == 0:
            count = rows * (tl.minimum(left + column + 1, W) - tl.maximum(left + column - 2, 0))
            total += sums[column - 2] + sums[column - 1]
            means += (total / tl.maximum(count, 1).to(tl.float32)[:, None],)
    return _side_by_side(means, PIXELS, BLOCK_M, BLOCK_C)


@triton.jit
def _halved(
    x_ptr, in_bias_ptr, weight_ptr, bias_ptr, corner, above, left, offs_n, H, W,
    C: tl.constexpr, N: tl.constexpr, WIDENS: tl.constexpr, PRECISION: tl.constexpr,
    PIXELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Shortcut with stride 2, `[BLOCK_M, BLOCK_N]` in float32."""
    if WIDENS:
        y = add_row(tl.zeros((BLOCK_M, BLOCK_N), tl.float32), bias_ptr, offs_n, N)
        for first in range(0, C, BLOCK_C):
            offs_c = first + tl.arange(0, BLOCK_C)
            x = _pooled(x_ptr, corner, above, left, offs_c, H, W, C, PIXELS, BLOCK_M, BLOCK_C)
            x = add_row(x, in_bias_ptr, offs_c, C)
            mask = (offs_c < C)[:, None] & (offs_n < N)[None, :]
            weight = tl.load(weight_ptr + offs_n[None, :] * C + offs_c[:, None], mask=mask, other=0.0)
            y = tl.dot(x.to(x_ptr.dtype.element_ty), weight, y, input_precision=PRECISION)
    else:
        y = _pooled(x_ptr, corner, above, left, offs_n, H, W, C, PIXELS, BLOCK_M, BLOCK_N)
        y = add_row(y, in_bias_ptr, offs_n, C)
    return y


@triton.jit
def _project_kernel(
    h_ptr, x_ptr, in_bias_ptr, depthwise_weight_ptr,  # [B, H, W, D], [B, H, W, C], [C], [3, 3, D]
    depthwise_bias_ptr, project_weight_ptr, project_bias_ptr, shortcut_weight_ptr,  # [D], [N, D], [N], [N, C]
    shortcut_bias_ptr, y_ptr,  # [N], [B, H / STRIDE, W / STRIDE, N]
    ROWS, H, W,  # ROWS = B * H / STRIDE
    C: tl.constexpr, D: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr, WIDENS: tl.constexpr,
    PRECISION: tl.constexpr, PACKED: tl.constexpr,
    PIXELS: tl.constexpr, LINES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute y = GELU(depthwise(h)) W + b + shortcut; the depthwise output stays in registers.

    A thread computes PIXELS (1, 2 or 4) adjacent pixels, which share filters and loads. A program computes strips of
    them in LINES lines, which share loads in L1. With PACKED, h and the first three parameters are float16.
    """
    wait_for_inputs(OVERLAP)
    BLOCK_S: tl.constexpr = BLOCK_M // PIXELS
    WIDTH: tl.constexpr = BLOCK_S // LINES  # strips per line
    COLUMNS: tl.constexpr = (PIXELS - 1) * STRIDE + 3
    blocks_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    out_h, out_w = H // STRIDE, W // STRIDE
    first_line = tl.program_id(1) * LINES
    first_strip = (tl.program_id(0) // blocks_n) * WIDTH
    offs_n = (tl.program_id(0) % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N

    place = tl.arange(0, BLOCK_S)
    line = first_line + place // WIDTH
    left = (first_strip + place % WIDTH) * (PIXELS * STRIDE) - 1  # leftmost column under the filters
    above = tl.where(line < ROWS, (line % out_h) * STRIDE - 1, -3)  # -3: no tap lies in the image
    corner = ((line // out_h).to(tl.int64) * H + above) * W + left  # upper left pixel under the filters
    start = h_ptr + corner * D
    kind: tl.constexpr = tl.float16 if PACKED else tl.float32
    dtype: tl.constexpr = project_weight_ptr.dtype.element_ty

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if STRIDE == 2:  # before the loop, which leaves fewer registers
        short = _halved(
            x_ptr, in_bias_ptr, shortcut_weight_ptr, shortcut_bias_ptr, corner, above, left, offs_n, H, W,
            C, N, WIDENS, PRECISION, PIXELS, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        if PRECISION != "ieee":  # in float32 the sum would lose digits of the small products
            acc += add_row(short, project_bias_ptr, offs_n, N)
    for first in range(0, D, BLOCK_D):
        offs_d = tl.arange(0, BLOCK_D)
        mask_d = first + offs_d < D if D % BLOCK_D else tl.full((BLOCK_D,), True, tl.int1)
        bias_ptr = depthwise_weight_ptr + 9 * D if PACKED else depthwise_bias_ptr  # one address less in registers
        bias = tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(kind)
        sums = ()
        for _ in tl.static_range(PIXELS):
            sums += (tl.broadcast_to(bias[None, :], (BLOCK_S, BLOCK_D)),)
        for dy in tl.static_range(3):
            filters = ()
            for dx in tl.static_range(3):
                taps = tl.load(depthwise_weight_ptr + (3 * dy + dx) * D + offs_d, mask=mask_d, other=0.0).to(kind)
                filters += (tl.broadcast_to(taps[None, :], (BLOCK_S, BLOCK_D)),)
            inside_row = (above + dy).to(tl.uint32, bitcast=True) < H
            for column in tl.static_range(COLUMNS):
                inside = inside_row & ((left + column).to(tl.uint32, bitcast=True) < W)
                ptr = (start + dy * (W * D) + column * D)[:, None] + tl.arange(0, BLOCK_D)[None, :]
                h = tl.load(ptr, mask=inside[:, None] & mask_d[None, :], other=0.0).to(kind)
                following = ()
                for i in tl.static_range(PIXELS):
                    if column >= i * STRIDE and column < i * STRIDE + 3:
                        following += (multiply_add(h, filters[column - i * STRIDE], sums[i]),)
                    else:
                        following += (sums[i],)
                sums = following
        activated = ()
        for i in tl.static_range(PIXELS):
            activated += (gelu(sums[i], dtype).to(dtype),)
        mask = mask_d[:, None] & mask_n[None, :]
        weight = tl.load(project_weight_ptr + offs_n[None, :] * D + offs_d[:, None], mask=mask, other=0.0)
        a = _side_by_side(activated, PIXELS, BLOCK_M, BLOCK_D)
        acc = tl.dot(a, weight, acc, input_precision=PRECISION)
        start += BLOCK_D
        depthwise_weight_ptr += BLOCK_D
        depthwise_bias_ptr += BLOCK_D
        project_weight_ptr += BLOCK_D

    row = tl.arange(0, BLOCK_M)
    line = first_line + row // (PIXELS * WIDTH)
    out_column = first_strip * PIXELS + row % (PIXELS * WIDTH)
    mask_m = (line < ROWS) & (out_column < out_w)
    pixel = line.to(tl.int64) * out_w + out_column
    if STRIDE == 1 or PRECISION == "ieee":
        acc = add_row(acc, project_bias_ptr, offs_n, N)
        if STRIDE == 1:
            short = add_row(_rows(x_ptr, pixel, mask_m, offs_n, C), in_bias_ptr, offs_n, C)
        acc += short
    mask = mask_m[:, None] & mask_n[None, :]
    tl.store(y_ptr + pixel[:, None] * N + offs_n[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


def choose_blocks(
    M: int, C: int, D: int, N: int, stride: int, dtype: torch.dtype, config: LaunchConfig
) -> tuple[Settings, Settings]:
    """Choose the blocks of both kernels for M input pixels; SPAN are the columns of h per program of the first.

    First kernel: rows of x and the weights must fit in shared memory, and 64 wide rows need the registers of eight
    warps. Second kernel: several blocks of columns need more registers, so fewer pixels share a thread. Wide blocks
    with stride 2 need those of eight warps.
    """
    expand = config.settings_for("mbconv_expand", dtype)
    BLOCK_M, num_warps = expand["BLOCK_M"], expand["num_warps"]
    if BLOCK_M > 64 and C > WIDEST_INPUT:
        BLOCK_M, num_warps = BLOCK_M // 2, max(4, num_warps // 2)
    elif BLOCK_M == 64 and C > 2 * WIDEST_INPUT:
        num_warps = max(8, num_warps)
    BLOCK_D = expand["BLOCK_D"]
    blocks = -(-D // BLOCK_D)
    while blocks > 1 and -(-M // BLOCK_M) * -(-D // (blocks * BLOCK_D)) < ENOUGH_PROGRAMS:
        blocks = -(-blocks // 2)
    expand = expand | {"BLOCK_M": BLOCK_M, "SPAN": blocks * BLOCK_D, "num_warps": num_warps}

    project = config.settings_for("mbconv_project" if stride == 1 else "mbconv_halve", dtype)
    BLOCK_N, PIXELS, BLOCK_D = project["BLOCK_N"], project["PIXELS"], project["BLOCK_D"]
    if N > BLOCK_N:
        PIXELS, BLOCK_D = max(1, PIXELS // stride), max(16, BLOCK_D // 2)
    BLOCK_N = min(BLOCK_N, max(16, 1 << (N - 1).bit_length()))
    num_warps = max(8, project["num_warps"]) if stride == 2 and BLOCK_N > 64 else project["num_warps"]
    return expand, project | {"BLOCK_N": BLOCK_N, "PIXELS": PIXELS, "BLOCK_D": BLOCK_D, "num_warps": num_warps}


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
    in_bias: Tensor | None = None,
    *,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Launch the kernels. Also runs on CPU tensors under TRITON_INTERPRET=1, which is how the tests use it.

    Depthwise filters are read as they are if `permute(2, 3, 1, 0)` is contiguous; other layouts are copied on every
    call.
    """
    _check(x, expand_weight, depthwise_weight, project_weight, shortcut_weight, stride)
    B, H, W, C = x.shape
    D, N = len(expand_weight), len(project_weight)
    y = torch.empty((B, H // stride, W // stride, N), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    filters = depthwise_weight.permute(2, 3, 1, 0).contiguous()
    x, *expand_tensors = contiguous(x, in_bias, norm_weight, norm_bias, expand_weight, expand_bias)
    depthwise_bias, project_weight, project_bias = contiguous(depthwise_bias, project_weight, project_bias)
    shortcut_weight, shortcut_bias = contiguous(shortcut_weight, shortcut_bias)
    config = config or launch_config(x.device)
    M, PRECISION = B * H * W, dot_precision(x.dtype)
    expand, project = choose_blocks(M, C, D, N, stride, x.dtype, config)
    BLOCK_M, SPAN, BLOCK_N, LINES = expand["BLOCK_M"], expand["SPAN"], project["BLOCK_N"], project["LINES"]
    lines, PACKED = B * H // stride, x.dtype == torch.bfloat16 and config.arch >= 80
    if lines > (most := LINES * MOST_IN_BATCH):
        raise ValueError(f"the mbconv kernel writes at most {most} lines, got {lines}; split the batch")
    check_counts("mbconv", values_of_two_lines=2 * W * D)
    across = triton.cdiv(W // stride, project["BLOCK_M"] // LINES) * triton.cdiv(N, BLOCK_N)
    h = torch.empty((B, H, W, D), dtype=torch.float16 if PACKED else x.dtype, device=x.device)
    cast = torch.empty((10 + N, D), dtype=h.dtype, device=x.device) if PACKED else filters
    with torch.cuda.device_of(x):
        _expand_kernel[(triton.cdiv(M, BLOCK_M) * triton.cdiv(D, SPAN),)](
            x, *expand_tensors, h, filters, depthwise_bias, project_weight, cast,
            M, SPAN, eps, C, D, N, PRECISION, PACKED,
            BLOCK_M, expand["BLOCK_D"], expand["BLOCK_C"],
            **config.options(expand),
        )  # fmt: skip
        if PACKED:
            filters, depthwise_bias, project_weight = cast[:9], cast[9], cast[10:]
        _project_kernel[(across, triton.cdiv(lines, LINES))](
            h, x, expand_tensors[0], filters, depthwise_bias, project_weight, project_bias,
            project_weight if shortcut_weight is None else shortcut_weight,
            project_bias if shortcut_bias is None else shortcut_bias,
            y, lines, H, W, C, D, N, stride, shortcut_weight is not None, PRECISION, PACKED,
            project["PIXELS"], LINES, project["BLOCK_M"], BLOCK_N, project["BLOCK_D"],
            **config.options(project),
        )  # fmt: skip
    return y


def _fake(x: Tensor, *args: Any) -> Tensor:
    project_weight, stride = args[6], args[10]
    B, H, W, _ = x.shape
    return torch.empty((B, H // stride, W // stride, len(project_weight)), dtype=x.dtype, device=x.device)


def _flops(x: tuple[int, ...], *args: object, out_shape: tuple[int, ...], **kwargs: object) -> int:
    B, H, W, C = x
    N, stride = out_shape[-1], H // out_shape[1]
    D = 4 * N
    out = B * H * W // stride**2
    return 2 * (B * H * W * C * D + out * (9 * D + D * N + (0 if C == N else C * N)))


mbconv = register("mbconv", mbconv_ref, mbconv_triton, _fake, _flops)
