"""Linear layer without bias, with the element-wise operations that follow it in an RWKV layer.

    y = x W^T
    y = relu(y)^2                      if squared_relu
    y = sigmoid(gate_x G^T) * y        if a gate is given
    y = residual + scale * y           if a residual is given

One launch; two if BLOCKS > 1 and the output is gated. The gate's product never reaches memory. A gated output with
BLOCKS > 1 or PARTS > 1 is written ungated and read again. Otherwise each tensor is read or written once:
(M * (K + N)) * itemsize bytes and 2 * M * K * N operations, plus M * (K' + N) and 2 * M * K' * N for a gate and a
residual.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import add_product, quotient, tl, triton, wait_for_inputs
from .launch_config import LaunchConfig, Settings, block_that_divides, launch_config
from .operator import contiguous, described, dot_precision, register

FEW_PROGRAMS = 64  # below this, blocks have half as many rows
BUSY = 0.85  # minimum share of SMs in use over all waves if BLOCKS > 1, when one program fits an SM


def fused_linear_ref(
    x: Tensor,
    weight: Tensor,
    squared_relu: bool = False,
    gate_x: Tensor | None = None,
    gate_weight: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Oracle and CPU path.

    Args:
        x: `[..., K]`.
        weight: `[N, K]`.
        squared_relu: Apply relu(.)^2 to the product.
        gate_x, gate_weight: `[..., K']` and `[N, K']`, or None.
        scale, residual: `[N]` and `[..., N]`, or None.

    Returns:
        `[..., N]` in x's dtype.
    """
    _check(x, weight, gate_x, gate_weight, scale, residual)
    y = F.linear(x, weight)
    if squared_relu:
        y = F.relu(y).square()
    if gate_x is not None and gate_weight is not None:
        y = torch.sigmoid(F.linear(gate_x, gate_weight)) * y
    return y if residual is None or scale is None else torch.addcmul(residual, scale, y)


def _check(x: Tensor, weight: Tensor, *optional: Tensor | None) -> None:
    gate_x, gate_weight, scale, residual = optional
    N, K = weight.shape
    fits = x.shape[-1] == K and (gate_x is None) == (gate_weight is None) and (scale is None) == (residual is None)
    if gate_x is not None and gate_weight is not None:
        fits = fits and gate_x.shape[:-1] == x.shape[:-1] and gate_weight.shape == (N, gate_x.shape[-1])
    if scale is not None and residual is not None:
        fits = fits and scale.shape == (N,) and residual.shape == (*x.shape[:-1], N)
    if not fits:
        given = described(x=x, weight=weight, gate_x=gate_x, gate_weight=gate_weight, scale=scale, residual=residual)
        raise ValueError(
            "fused_linear needs x [..., K] and weight [N, K]; gate_x [..., K'] with gate_weight [N, K'], and scale [N] "
            f"with residual [..., N], or none of the two; got {given}"
        )


@triton.jit
def _weight(weight_ptr, first_n, offs_k, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr):
    """Load a block of the weight, `[BLOCK_K, BLOCK_N]`."""
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask = (offs_k < K)[:, None] & (offs_n < N)[None, :]
    return tl.load(weight_ptr + offs_n[None, :] * K + offs_k[:, None], mask=mask, other=0.0)


@triton.jit
def _products(
    x_ptr, weight_ptr, offs_m, first_n, mask_m, end,  # [M, K], [N, K]; end = K
    N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """BLOCKS (1, 2 or 3) products side by side, which share x; the unused ones are zeros.

    With several, the end of the loop is not a constant, because the unrolled loop spills registers.
    """
    a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    b, c = a, a
    for first in range(0, K if BLOCKS == 1 else end, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        mask = mask_m[:, None] & (offs_k < K)[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * K + offs_k[None, :], mask=mask, other=0.0)
        a = add_product(x, _weight(weight_ptr, first_n, offs_k, N, K, BLOCK_N), a, PRECISION)
        if BLOCKS > 1:
            b = add_product(x, _weight(weight_ptr, first_n + BLOCK_N, offs_k, N, K, BLOCK_N), b, PRECISION)
        if BLOCKS > 2:
            c = add_product(x, _weight(weight_ptr, first_n + 2 * BLOCK_N, offs_k, N, K, BLOCK_N), c, PRECISION)
    return a, b, c


@triton.jit
def _half(x, right: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Left or right half of the columns; no value moves to another thread."""
    a, b = tl.split(tl.permute(tl.reshape(x, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    return b if right else a


@triton.jit
def _part(x, part: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Part `part` of PARTS (1, 2 or 4) equal parts of the columns."""
    if PARTS > 1:
        x = _half(x, part >= PARTS // 2, BLOCK_M, BLOCK_N)
    if PARTS == 4:
        x = _half(x, part % 2 == 1, BLOCK_M, BLOCK_N // 2)
    return x


@triton.jit
def _gated(y, gate, dtype: tl.constexpr):
    return quotient(y, 1.0 + tl.exp2(gate * -1.4426950408889634), dtype)


@triton.jit
def _activated(y, SQUARED_RELU: tl.constexpr):
    if SQUARED_RELU:
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
        y *= y
    return y


@triton.jit
def _fused_linear_kernel(
    x_ptr, weight_ptr, gate_x_ptr, gate_weight_ptr,  # [M, K], [N, K], [M, GATE_K], [N, GATE_K]
    scale_ptr, residual_ptr, y_ptr,  # [N], [M, N], [M, N]; all contiguous
    M, end,  # end = K
    N: tl.constexpr, K: tl.constexpr, GATE_K: tl.constexpr,  # GATE_K = 0: no gate
    SQUARED_RELU: tl.constexpr, GATES: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute BLOCKS blocks of columns side by side and write each in PARTS, which need fewer registers.

    With PARTS and a gate, y holds the ungated product while the gate's product accumulates. With GATES, the product is
    the gate of what an earlier launch left in y. Inputs of the epilogue are prefetched AHEAD parts.
    """
    wait_for_inputs(OVERLAP)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    WAITS: tl.constexpr = GATE_K > 0 and PARTS > 1
    PART_N: tl.constexpr = BLOCK_N // PARTS
    pid = tl.program_id(0)
    if GATES:
        pid = tl.num_programs(0) - 1 - pid  # backwards: the end of y is still in L2
    across: tl.constexpr = (N + BLOCKS * BLOCK_N - 1) // (BLOCKS * BLOCK_N)  # neighbors share rows of x in L2
    offs_m = (pid // across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_n = (pid % across) * (BLOCKS * BLOCK_N)
    mask_m = offs_m < M
    y = _products(
        x_ptr, weight_ptr, offs_m, first_n, mask_m, end, N, K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, BLOCKS
    )  # fmt: skip
    if WAITS:
        offs_n = first_n + tl.arange(0, BLOCK_N)
        ptr = y_ptr + offs_m[:, None] * N + offs_n[None, :]
        tl.store(ptr, _activated(y[0], SQUARED_RELU).to(dtype), mask=mask_m[:, None] & (offs_n < N)[None, :])
        tl.debug_barrier()
    if GATE_K > 0:
        gate = _products(
            gate_x_ptr, gate_weight_ptr, offs_m, first_n, mask_m, GATE_K,
            N, GATE_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, 1,
        )  # fmt: skip
        last = gate if WAITS else y
    else:
        last = y
    AHEAD: tl.constexpr = 0 if BLOCKS == 1 else (1 if GATES else 3)  # alone on its SM, nothing else hides the latency
    ungated = ()
    residual = ()
    for part in tl.static_range(-AHEAD, BLOCKS * PARTS):
        if part + AHEAD < BLOCKS * PARTS:
            offs_n = first_n + (part + AHEAD) * PART_N + tl.arange(0, PART_N)
            offs = offs_m[:, None] * N + offs_n[None, :]
            mask = mask_m[:, None] & (offs_n < N)[None, :]
            if GATES or WAITS:
                ungated += (tl.load(y_ptr + offs, mask=mask, other=0.0),)
            if RESIDUAL:
                residual += (tl.load(residual_ptr + offs, mask=mask, other=0.0),)
        if part >= 0:
            offs_n = first_n + part * PART_N + tl.arange(0, PART_N)
            mask_n = offs_n < N
            z = _part(last[part // PARTS], part % PARTS, PARTS, BLOCK_M, BLOCK_N)
            if GATES or WAITS:
                z = _gated(ungated[part].to(tl.float32), z, dtype)
            else:
                z = _activated(z, SQUARED_RELU)
                if GATE_K > 0:
                    z = _gated(z, gate[0], dtype)
            if RESIDUAL:
                scale = tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
                z = residual[part].to(tl.float32) + scale[None, :] * z
            ptr = y_ptr + offs_m[:, None] * N + offs_n[None, :]
            tl.store(ptr, z.to(dtype), mask=mask_m[:, None] & mask_n[None, :])


def choose_blocks(M: int, N: int, dtype: torch.dtype, config: LaunchConfig) -> Settings:
    """Choose the blocks.

    BLOCK_M is halved if there are fewer than FEW_PROGRAMS. PARTS is 1 on sm_80 to sm_89 and sm_120, where two blocks do
    not fit on an SM. BLOCKS is the largest number, up to the setting, that divides the columns. It is 1 if that number
    does not keep the SMs BUSY, and on every architecture but sm_90, whose products read from shared memory.
    """
    settings = config.settings_for("fused_linear", dtype, M * N)
    BLOCK_M, BLOCK_N, num_warps = settings["BLOCK_M"], block_that_divides(N, settings["BLOCK_N"]), settings["num_warps"]
    if -(-M // BLOCK_M) * -(-N // BLOCK_N) < FEW_PROGRAMS and BLOCK_M > 64:
        BLOCK_M, num_warps = BLOCK_M // 2, max(4, num_warps // 2)
    PARTS = 1 if 0 < config.arch < 90 or config.arch >= 120 else max(1, min(settings["PARTS"], BLOCK_N // 16))
    BLOCKS = 1
    if config.arch in (0, 90):
        BLOCKS = next((n for n in range(settings["BLOCKS"], 1, -1) if N % (n * BLOCK_N) == 0), 1)
        waves = -(-M // BLOCK_M) * (N // (BLOCKS * BLOCK_N)) / config.sms
        BLOCKS = BLOCKS if waves >= BUSY * math.ceil(waves) else 1
    return settings | {
        "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCKS": BLOCKS, "PARTS": PARTS, "num_warps": num_warps
    }  # fmt: skip


def fused_linear_triton(
    x: Tensor,
    weight: Tensor,
    squared_relu: bool = False,
    gate_x: Tensor | None = None,
    gate_weight: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Launch the kernel. Also runs on CPU tensors under TRITON_INTERPRET=1, which is how the tests use it."""
    _check(x, weight, gate_x, gate_weight, scale, residual)
    N = len(weight)
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x, weight, gate_x, gate_weight, scale, residual = contiguous(x, weight, gate_x, gate_weight, scale, residual)
    M = y.numel() // N
    config = config or launch_config(x.device)
    settings = choose_blocks(M, N, x.dtype, config)
    BLOCK_M, BLOCK_N, BLOCKS = settings["BLOCK_M"], settings["BLOCK_N"], settings["BLOCKS"]

    def launch(
        x: Tensor, weight: Tensor, squared_relu: bool, gates: bool, gate_x: Tensor | None, gate_weight: Tensor | None,
        scale: Tensor | None, residual: Tensor | None,
    ) -> None:  # fmt: skip
        K = weight.shape[1]
        PARTS = settings["PARTS"] if gates or residual is not None or gate_x is not None else 1
        with torch.cuda.device_of(x):
            _fused_linear_kernel[(triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCKS * BLOCK_N),)](
                x, weight, gate_x, gate_weight, scale, residual, y,
                M, K, N, K, 0 if gate_x is None else gate_x.shape[-1], squared_relu, gates, residual is not None,
                dot_precision(x.dtype), BLOCK_M, BLOCK_N, settings["BLOCK_K"], BLOCKS, PARTS,
                **config.options(settings),
            )  # fmt: skip

    if BLOCKS > 1 and gate_x is not None and gate_weight is not None:  # registers are too few for both products
        launch(x, weight, squared_relu, False, None, None, None, None)
        launch(gate_x, gate_weight, False, True, None, None, scale, residual)
    else:
        launch(x, weight, squared_relu, False, gate_x, gate_weight, scale, residual)
    return y


def _fake(x: Tensor, weight: Tensor, *args: object) -> Tensor:
    return torch.empty((*x.shape[:-1], len(weight)), dtype=x.dtype, device=x.device)


def _flops(
    x: tuple[int, ...],
    weight: tuple[int, ...],
    squared_relu: bool = False,
    gate_x: tuple[int, ...] | None = None,
    *args: object,
    out_shape: tuple[int, ...],
    **_: object,
) -> int:
    return 2 * math.prod(x[:-1]) * weight[0] * (weight[1] + (0 if gate_x is None else gate_x[-1]))


fused_linear = register("fused_linear", fused_linear_ref, fused_linear_triton, _fake, _flops)
