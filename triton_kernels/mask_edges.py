"""Run boundaries of masks at the size of the image, from low-resolution logits; no map of that size is made.

    logit(y, x) = sum over t, s in 0..2 of rows[y, t] * columns[x, s] * low[first_row[y] + t, first_column[x] + s]
    inside(y, x) = logit(y, x) > 0

Bilinear resizing to the model input, the crop of its padding and resizing to the image are such a product. Pixels count
column by column, as in COCO: p = x * H + y. A boundary is a pixel whose predecessor differs; before the first pixel is
no mask. Differences of the boundaries are the run lengths.

One launch counts the boundaries of each column, and one writes them. A launch reads M * h * w * 4 bytes and spends 24
operations per pixel of the image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import tl, triton, wait_for_inputs
from .launch_config import LaunchConfig, launch_config
from .operator import check_batch, check_counts, contiguous, described, register

TAPS = 3  # logits that a pixel depends on along an axis: two adjacent pixels of the model input touch three at most


def mask_edges_ref(
    low: Tensor,
    first_row: Tensor,
    rows: Tensor,
    first_column: Tensor,
    columns: Tensor,
    starts: Tensor | None,
    total: int,
) -> Tensor:
    """Oracle and CPU path. It makes the map.

    Args:
        low: `[M, h, w]` float32 logits.
        first_row: `[H]` int32, 0..h - 3: the first logit of each row of the image.
        rows: `[H, 3]` float32 weights of three logits. A row of zeros lies outside every mask.
        first_column, columns: `[W]` and `[W, 3]` of the columns.
        starts: None to count, or `[M, W]` int64 to write: the number of boundaries before each column, over all masks.
        total: Number of all boundaries; 0 to count.

    Returns:
        `[M, W]` int32, the boundaries in each column; or `[total]` int32, their pixels, mask after mask.
    """
    _check(low, first_row, rows, first_column, columns, starts)
    taps = torch.arange(TAPS, device=low.device)
    lines = (low[:, first_row[:, None] + taps] * rows[..., None]).sum(2)  # [M, H, w]
    logits = (lines[..., first_column[:, None] + taps] * columns).sum(3)  # [M, H, W]
    inside = (logits > 0).transpose(1, 2).flatten(1)
    before = torch.cat([torch.zeros_like(inside[:, :1]), inside[:, :-1]], 1)
    edges = inside != before
    if starts is None:
        return edges.view(len(low), len(columns), len(rows)).sum(2, dtype=torch.int32)
    return edges.nonzero()[:total, 1].int()


def _check(
    low: Tensor, first_row: Tensor, rows: Tensor, first_column: Tensor, columns: Tensor, starts: Tensor | None
) -> None:
    axes = ((first_row, rows), (first_column, columns))
    fits = low.ndim == 3 and all(first.ndim == 1 and table.shape == (len(first), TAPS) for first, table in axes)
    if not fits or min(low.shape[1:]) < TAPS or (starts is not None and starts.shape != (len(low), len(columns))):
        tensors = {"low": low, "first_row": first_row, "rows": rows, "first_column": first_column, "columns": columns}
        raise ValueError(
            "mask_edges needs low [M, h, w] with sides of 3 or more, first_row [H], rows [H, 3], first_column [W], "
            f"columns [W, 3], and starts [M, W] or none; got {described(**tensors, starts=starts)}"
        )


@triton.jit
def _columns(first_ptr, weights_ptr, x, mask):
    """Return the first logits and the three weights of columns x `[BLOCK_W]`."""
    first = tl.load(first_ptr + x, mask=mask, other=0)
    weights_ptr += x * 3
    weight0 = tl.load(weights_ptr, mask=mask, other=0.0)
    weight1 = tl.load(weights_ptr + 1, mask=mask, other=0.0)
    weight2 = tl.load(weights_ptr + 2, mask=mask, other=0.0)
    return first, weight0, weight1, weight2


@triton.jit
def _inside(low_ptr, w, first_row_ptr, rows_ptr, y, first, weight0, weight1, weight2, mask):
    """Return 1 inside the mask and 0 outside, `[BLOCK_W]` int32, at row y and columns of given logits and weights."""
    line = low_ptr + tl.load(first_row_ptr + y) * w + first
    logit = tl.zeros_like(weight0)
    for t in tl.static_range(3):
        left = tl.load(line + t * w, mask=mask, other=0.0)
        middle = tl.load(line + t * w + 1, mask=mask, other=0.0)
        right = tl.load(line + t * w + 2, mask=mask, other=0.0)
        logit += tl.load(rows_ptr + y * 3 + t) * (weight0 * left + weight1 * middle + weight2 * right)
    return (logit > 0).to(tl.int32)


@triton.jit
def _mask_edges_kernel(
    low_ptr, first_row_ptr, rows_ptr, first_column_ptr, columns_ptr,  # [M, h, w], [H], [H, 3], [W], [W, 3]
    starts_ptr, out_ptr,  # [M, W], and counts [M, W] or edges [total]
    H, W, h, w, WRITE: tl.constexpr, BLOCK_W: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Count or write the boundaries in BLOCK_W columns of one mask. Rows follow one another in a loop."""
    wait_for_inputs(OVERLAP)
    m = tl.program_id(1).to(tl.int64)
    x = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    mask = x < W
    low_ptr += m * h * w
    first, weight0, weight1, weight2 = _columns(first_column_ptr, columns_ptr, x - 1, mask & (x > 0))
    # before the first pixel of a column is the last of the column to its left; all weights are 0 before column 0
    before = _inside(low_ptr, w, first_row_ptr, rows_ptr, H - 1, first, weight0, weight1, weight2, mask)
    first, weight0, weight1, weight2 = _columns(first_column_ptr, columns_ptr, x, mask)
    count = tl.zeros((BLOCK_W,), tl.int32)
    if WRITE:
        out_rows = out_ptr + tl.load(starts_ptr + m * W + x, mask=mask, other=0)
    for y in range(H):
        inside = _inside(low_ptr, w, first_row_ptr, rows_ptr, y, first, weight0, weight1, weight2, mask)
        edge = inside ^ before
        if WRITE:
            tl.store(out_rows + count, x * H + y, mask=mask & (edge != 0))
        count += edge
        before = inside
    if not WRITE:
        tl.store(out_ptr + m * W + x, count, mask=mask)


def mask_edges_triton(
    low: Tensor,
    first_row: Tensor,
    rows: Tensor,
    first_column: Tensor,
    columns: Tensor,
    starts: Tensor | None,
    total: int,
    *,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Launch the kernel. Also runs on CPU tensors under TRITON_INTERPRET=1, which is how the tests use it."""
    _check(low, first_row, rows, first_column, columns, starts)
    (M, h, w), H, W = low.shape, len(rows), len(columns)
    out = torch.empty((M, W) if starts is None else (total,), dtype=torch.int32, device=low.device)
    if out.numel() == 0:
        return out
    low, first_row, rows, first_column, columns, starts = contiguous(
        low, first_row, rows, first_column, columns, starts
    )
    config = config or launch_config(low.device)
    settings = config.settings_for("mask_edges", low.dtype)
    BLOCK_W = settings["BLOCK_W"]
    check_batch("mask_edges", M)
    check_counts("mask_edges", pixels=H * (W + BLOCK_W), logits=h * w, weights=TAPS * max(H, W + BLOCK_W))
    with torch.cuda.device_of(low):
        _mask_edges_kernel[(triton.cdiv(W, BLOCK_W), M)](
            low, first_row, rows, first_column, columns, starts, out, H, W, h, w, starts is not None, BLOCK_W,
            **config.options(settings),
        )  # fmt: skip
    return out


def _fake(
    low: Tensor, _: Tensor, __: Tensor, ___: Tensor, columns: Tensor, starts: Tensor | None, total: int
) -> Tensor:
    shape = (len(low), len(columns)) if starts is None else (total,)
    return torch.empty(shape, dtype=torch.int32, device=low.device)


mask_edges = register("mask_edges", mask_edges_ref, mask_edges_triton, _fake)
