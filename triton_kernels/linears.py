"""Up to four linear layers of one shape in one launch, such as queries, keys and values.

    y_j = act((x or x_j [+ add]) W_j^T + b_j)      with act = ReLU or none

Latency is the bound for tokens, whose matrices are small. Reading x is the bound for maps, which one launch reads once
instead of once for each layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import add_product, add_row, tl, triton, wait_for_inputs
from .launch_config import LaunchConfig, Settings, block_that_divides, launch_config
from .operator import check_counts, contiguous, described, dot_precision, register

MOST = 4  # layers of a launch


def linears_ref(
    x: Tensor,
    add: Tensor | None,
    added: int,
    relu: bool,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor | None = None,
    bias2: Tensor | None = None,
    weight3: Tensor | None = None,
    bias3: Tensor | None = None,
    weight4: Tensor | None = None,
    bias4: Tensor | None = None,
) -> Tensor:
    """Oracle and CPU path.

    Args:
        x: `[1, M, K]` for all layers, or `[J, M, K]`, one for each.
        add: `[A, K]` with A that divides M, added to rows 0..A-1, A..2A-1 and so on; None for nothing.
        added: Number of first layers whose input has `add`.
        relu: Apply ReLU.
        weight1 to weight4, bias1 to bias4: `[N, K]` and `[N]` of J layers.

    Returns:
        `[J, M, N]` in x's dtype.
    """
    weights, biases = _layers(weight1, bias1, weight2, bias2, weight3, bias3, weight4, bias4)
    _check(x, add, added, weights, biases)
    inputs = list(x) * (len(weights) // len(x))
    if add is not None:
        for j in range(added):
            inputs[j] = (inputs[j].unflatten(0, (-1, add.shape[0])) + add).flatten(0, 1)
    y = torch.stack([F.linear(*layer) for layer in zip(inputs, weights, biases, strict=True)])
    return F.relu(y) if relu else y


def _layers(*tensors: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    given = [t for t in tensors if t is not None]
    return given[::2], given[1::2]


def _check(x: Tensor, add: Tensor | None, added: int, weights: list[Tensor], biases: list[Tensor]) -> None:
    J, (N, K) = len(weights), weights[0].shape
    fits = x.ndim == 3 and len(x) in (1, J) and x.shape[2] == K and 0 <= added <= J
    fits = fits and all(w.shape == (N, K) for w in weights) and [tuple(b.shape) for b in biases] == J * [(N,)]
    if not fits or (
        add is not None and (add.ndim != 2 or add.shape[1] != K or not add.shape[0] or x.shape[1] % add.shape[0])
    ):
        shapes = ", ".join(f"{list(w.shape)} and {list(b.shape)}" for w, b in zip(weights, biases, strict=False))
        raise ValueError(
            "linears needs x [1 or J, M, K], add None or [A, K] with A that divides M, J weights [N, K] with biases "
            f"[N], and added of 0 to J; got {described(x=x, add=add)}, layers {shapes}, added {added}"
        )


@triton.jit
def _linears_kernel(
    x_ptr, add_ptr, weight1_ptr, weight2_ptr, weight3_ptr, weight4_ptr,  # [1 or J, M, K], [A, K], [N, K] x 4
    bias1_ptr, bias2_ptr, bias3_ptr, bias4_ptr, y_ptr,  # [N] x 4, [J, M, N]
    M, A, end, stride_j, stride_m,  # end = K; strides of x in elements
    J: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ADDED: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute one block of one layer. Neighbors share rows of x in L2."""
    wait_for_inputs(OVERLAP)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    blocks_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    row, column = pid // (J * blocks_n), pid % (J * blocks_n)
    j = column // blocks_n
    weight_ptr, bias_ptr = weight1_ptr, bias1_ptr
    if J > 1:
        weight_ptr, bias_ptr = tl.where(j == 1, weight2_ptr, weight_ptr), tl.where(j == 1, bias2_ptr, bias_ptr)
    if J > 2:
        weight_ptr, bias_ptr = tl.where(j == 2, weight3_ptr, weight_ptr), tl.where(j == 2, bias3_ptr, bias_ptr)
    if J > 3:
        weight_ptr, bias_ptr = tl.where(j == 3, weight4_ptr, weight_ptr), tl.where(j == 3, bias4_ptr, bias_ptr)
    offs_m = row.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = column % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    x_rows = x_ptr + j.to(tl.int64) * stride_j + offs_m[:, None] * stride_m
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, end, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(x_rows + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        if ADDED > 0:
            mask = (offs_m < tl.where(j < ADDED, M, 0))[:, None] & mask_k[None, :]
            more = tl.load(add_ptr + (offs_m % A)[:, None] * K + offs_k[None, :], mask=mask, other=0.0)
            x = (x.to(tl.float32) + more.to(tl.float32)).to(dtype)
        weight = tl.load(
            weight_ptr + offs_n[None, :] * K + offs_k[:, None], mask=mask_k[:, None] & mask_n[None, :], other=0.0
        )
        acc = add_product(x, weight, acc, PRECISION)
    acc = add_row(acc, bias_ptr, offs_n, N)
    if RELU:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    ptr = y_ptr + (j.to(tl.int64) * M + offs_m)[:, None] * N + offs_n[None, :]
    tl.store(ptr, acc.to(dtype), mask=mask_m[:, None] & mask_n[None, :])


def choose_blocks(M: int, N: int, dtype: torch.dtype, config: LaunchConfig) -> Settings:
    """Choose the blocks: a few tokens get many narrow blocks, because each reads its weights at the speed of one SM."""
    settings = config.settings_for("linears", dtype)
    BLOCK_M = min(settings["BLOCK_M"], max(16, triton.next_power_of_2(M)))
    few = settings["BLOCK_M"] >= M
    BLOCK_N = block_that_divides(N, min(settings["BLOCK_N"], 32) if few else settings["BLOCK_N"])
    num_warps = min(settings["num_warps"], 4) if few else settings["num_warps"]
    return settings | {"BLOCK_M": BLOCK_M, "BLOCK_N": max(16, BLOCK_N), "num_warps": num_warps}


def linears_triton(
    x: Tensor,
    add: Tensor | None,
    added: int,
    relu: bool,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor | None = None,
    bias2: Tensor | None = None,
    weight3: Tensor | None = None,
    bias3: Tensor | None = None,
    weight4: Tensor | None = None,
    bias4: Tensor | None = None,
    *,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Launch the kernel. Also runs on CPU tensors under TRITON_INTERPRET=1, which is how the tests use it."""
    weights, biases = _layers(weight1, bias1, weight2, bias2, weight3, bias3, weight4, bias4)
    _check(x, add, added, weights, biases)
    J, M, (N, K) = len(weights), x.shape[1], weight1.shape
    y = torch.empty((J, M, N), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x = x if x.stride(2) == 1 else x.contiguous()
    add, *layers = contiguous(add, *weights, *biases)
    weights, biases = (part + (MOST - J) * part[:1] for part in (layers[:J], layers[J:]))
    config = config or launch_config(x.device)
    settings = choose_blocks(M, N, x.dtype, config)
    BLOCK_M, BLOCK_N, BLOCK_K = settings["BLOCK_M"], settings["BLOCK_N"], settings["BLOCK_K"]
    programs = triton.cdiv(M, BLOCK_M) * J * triton.cdiv(N, BLOCK_N)
    check_counts("linears", programs=programs)
    with torch.cuda.device_of(x):
        _linears_kernel[(programs,)](
            x, add, *weights, *biases, y, M, 1 if add is None else len(add), K, x.stride(0) * (len(x) > 1), x.stride(1),
            J, N, K, 0 if add is None else added, relu, dot_precision(x.dtype), BLOCK_M, BLOCK_N, BLOCK_K,
            **config.options(settings),
        )  # fmt: skip
    return y


def _fake(x: Tensor, add: Tensor | None, added: int, relu: bool, weight: Tensor, *layers: Tensor | None) -> Tensor:
    J = 1 + sum(t is not None for t in layers) // 2
    return torch.empty((J, x.shape[1], len(weight)), dtype=x.dtype, device=x.device)


def _flops(x: tuple[int, ...], *_: object, out_shape: tuple[int, ...], **__: object) -> int:
    J, M, N = out_shape
    return 2 * J * M * N * x[2]


linears = register("linears", linears_ref, linears_triton, _fake, _flops)
