"""Linear layers without bias of an RWKV layer, with the element-wise operations that follow them.

    key, gate = relu(x_0 K^T)^2, sigmoid(x_1 G^T)        gated_key
    y = residual + scale * gate * (x W^T)                fused_linear; the gate may be missing

One launch each. Each tensor is read or written once: with M rows, gated_key moves M * (2K + N + G) * itemsize bytes for
2 * M * K * (N + G) operations, and fused_linear M * (K + 3N) * itemsize bytes for 2 * M * K * N.
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


def gated_key_ref(x: Tensor, key_weight: Tensor, gate_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Oracle and CPU path.

    Args:
        x: `[2, ..., K]`, inputs of the key and of the gate.
        key_weight, gate_weight: `[N, K]` and `[G, K]`.

    Returns:
        relu(.)^2 of the key's product, `[..., N]`, and the gate, `[..., G]` in 0..1, in x's dtype.
    """
    _check_pair(x, key_weight, gate_weight)
    return F.relu(F.linear(x[0], key_weight)).square(), torch.sigmoid(F.linear(x[1], gate_weight))


def _check_pair(x: Tensor, key_weight: Tensor, gate_weight: Tensor) -> None:
    K = x.shape[-1]
    if len(x) != 2 or any(w.ndim != 2 or w.shape[1] != K for w in (key_weight, gate_weight)):
        given = described(x=x, key_weight=key_weight, gate_weight=gate_weight)
        raise ValueError(f"gated_key needs x [2, ..., K], key_weight [N, K] and gate_weight [G, K], got {given}")


def fused_linear_ref(x: Tensor, weight: Tensor, gate: Tensor | None, scale: Tensor, residual: Tensor) -> Tensor:
    """Oracle and CPU path.

    Args:
        x: `[..., K]`.
        weight: `[N, K]`.
        gate: `[..., N]`, or None.
        scale, residual: `[N]` and `[..., N]`.

    Returns:
        `[..., N]` in x's dtype.
    """
    _check(x, weight, gate, scale, residual)
    y = F.linear(x, weight)
    return torch.addcmul(residual, scale, y if gate is None else gate * y)


def _check(x: Tensor, weight: Tensor, gate: Tensor | None, scale: Tensor, residual: Tensor) -> None:
    N, K = weight.shape
    shape = (*x.shape[:-1], N)
    fits = x.shape[-1] == K and scale.shape == (N,) and residual.shape == shape
    if not fits or (gate is not None and gate.shape != shape):
        given = described(x=x, weight=weight, gate=gate, scale=scale, residual=residual)
        raise ValueError(
            "fused_linear needs x [..., K], weight [N, K], gate [..., N] or None, scale [N] and residual [..., N], "
            f"got {given}"
        )


@triton.jit
def _weight(weight_ptr, first_n, offs_k, N, K: tl.constexpr, BLOCK_N: tl.constexpr):
    """Load a block of the weight, `[BLOCK_K, BLOCK_N]`."""
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask = (offs_k < K)[:, None] & (offs_n < N)[None, :]
    return tl.load(weight_ptr + offs_n[None, :] * K + offs_k[:, None], mask=mask, other=0.0)


@triton.jit
def _products(
    x_ptr, weight_ptr, offs_m, first_n, mask_m, N, end,  # [M, K], [N, K]; end = K
    K: tl.constexpr, PRECISION: tl.constexpr,
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
def _gated_key_kernel(
    x_ptr, key_weight_ptr, gate_weight_ptr, key_ptr, gate_ptr,  # [2, M, K], [N, K], [G, K], [M, N], [M, G]; contiguous
    M, end,  # end = K
    N: tl.constexpr, G: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCKS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute BLOCKS blocks of columns of the key, or of the gate in the last programs of each row of blocks."""
    wait_for_inputs(OVERLAP)
    dtype: tl.constexpr = key_ptr.dtype.element_ty
    WIDTH: tl.constexpr = BLOCKS * BLOCK_N
    of_key: tl.constexpr = (N + WIDTH - 1) // WIDTH
    across: tl.constexpr = of_key + (G + WIDTH - 1) // WIDTH  # neighbors share rows of x in L2
    pid = tl.program_id(0)
    row, column = pid // across, pid % across
    gates = column >= of_key
    x_ptr += tl.where(gates, tl.cast(M, tl.int64) * K, 0)
    weight_ptr = tl.where(gates, gate_weight_ptr, key_weight_ptr)
    y_ptr = tl.where(gates, gate_ptr, key_ptr)
    columns = tl.where(gates, G, N)
    first_n = tl.where(gates, column - of_key, column) * WIDTH
    offs_m = row.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    y = _products(
        x_ptr, weight_ptr, offs_m, first_n, mask_m, columns, end, K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, BLOCKS
    )  # fmt: skip
    for block in tl.static_range(BLOCKS):
        z = y[block]
        if gates:
            z = quotient(1.0, 1.0 + tl.exp2(z * -1.4426950408889634), dtype)
        else:
            z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
            z *= z
        offs_n = first_n + block * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = mask_m[:, None] & (offs_n < columns)[None, :]
        tl.store(y_ptr + offs_m[:, None] * columns + offs_n[None, :], z.to(dtype), mask=mask)


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
def _fused_linear_kernel(
    x_ptr, weight_ptr, gate_ptr, scale_ptr, residual_ptr, y_ptr,  # [M, K], [N, K], [M, N], [N], [M, N], [M, N]
    M, end,  # end = K; all are contiguous
    N: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute BLOCKS blocks of columns side by side and write each in PARTS, which need fewer registers.

    The residual is prefetched AHEAD parts; for the gate too, registers are too few.
    """
    wait_for_inputs(OVERLAP)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    PART_N: tl.constexpr = BLOCK_N // PARTS
    across: tl.constexpr = (N + BLOCKS * BLOCK_N - 1) // (BLOCKS * BLOCK_N)  # neighbors share rows of x in L2
    pid = tl.program_id(0)
    offs_m = (pid // across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_n = (pid % across) * (BLOCKS * BLOCK_N)
    mask_m = offs_m < M
    y = _products(
        x_ptr, weight_ptr, offs_m, first_n, mask_m, N, end, K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, BLOCKS
    )  # fmt: skip
    AHEAD: tl.constexpr = 0 if BLOCKS == 1 else (1 if GATED else 3)  # alone on its SM, nothing else hides the latency
    residual = ()
    for part in tl.static_range(-AHEAD, BLOCKS * PARTS):
        if part + AHEAD < BLOCKS * PARTS:
            offs_n = first_n + (part + AHEAD) * PART_N + tl.arange(0, PART_N)
            mask = mask_m[:, None] & (offs_n < N)[None, :]
            residual += (tl.load(residual_ptr + offs_m[:, None] * N + offs_n[None, :], mask=mask, other=0.0),)
        if part >= 0:
            offs_n = first_n + part * PART_N + tl.arange(0, PART_N)
            mask_n = offs_n < N
            z = _part(y[part // PARTS], part % PARTS, PARTS, BLOCK_M, BLOCK_N)
            z *= tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
            if GATED:
                mask = mask_m[:, None] & mask_n[None, :]
                z *= tl.load(gate_ptr + offs_m[:, None] * N + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
            z += residual[part].to(tl.float32)
            ptr = y_ptr + offs_m[:, None] * N + offs_n[None, :]
            tl.store(ptr, z.to(dtype), mask=mask_m[:, None] & mask_n[None, :])


def choose_blocks(M: int, widths: tuple[int, ...], dtype: torch.dtype, config: LaunchConfig) -> Settings:
    """Choose the blocks for M rows of outputs that are `widths` wide.

    BLOCK_M is halved if there are fewer than FEW_PROGRAMS. PARTS is 1 on sm_80 to sm_89 and sm_120, where two blocks do
    not fit on an SM. BLOCKS is the largest number, up to the setting, that divides the columns. It is 1 if that number
    does not keep the SMs BUSY, and on every architecture but sm_90, whose products read from shared memory.
    """
    N, common = sum(widths), math.gcd(*widths)
    settings = config.settings_for("fused_linear", dtype, M * max(widths))
    BLOCK_M, num_warps = settings["BLOCK_M"], settings["num_warps"]
    BLOCK_N = block_that_divides(common, settings["BLOCK_N"])
    if -(-M // BLOCK_M) * -(-N // BLOCK_N) < FEW_PROGRAMS and BLOCK_M > 64:
        BLOCK_M, num_warps = BLOCK_M // 2, max(4, num_warps // 2)
    PARTS = 1 if 0 < config.arch < 90 or config.arch >= 120 else max(1, min(settings["PARTS"], BLOCK_N // 16))
    BLOCKS = 1
    if config.arch in (0, 90):
        BLOCKS = next((n for n in range(settings["BLOCKS"], 1, -1) if common % (n * BLOCK_N) == 0), 1)
        waves = -(-M // BLOCK_M) * (N // (BLOCKS * BLOCK_N)) / config.sms
        BLOCKS = BLOCKS if waves >= BUSY * math.ceil(waves) else 1
    return settings | {
        "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCKS": BLOCKS, "PARTS": PARTS, "num_warps": num_warps
    }  # fmt: skip


def gated_key_triton(
    x: Tensor, key_weight: Tensor, gate_weight: Tensor, *, config: LaunchConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Launch the kernel. Also runs on CPU tensors under TRITON_INTERPRET=1, which is how the tests use it."""
    _check_pair(x, key_weight, gate_weight)
    outputs = key, gate = _fake_pair(x, key_weight, gate_weight)
    (N, K), G = key_weight.shape, len(gate_weight)
    M = math.prod(x.shape[1:-1])
    if M * (N + G) == 0:
        return outputs
    x, key_weight, gate_weight = contiguous(x, key_weight, gate_weight)
    config = config or launch_config(x.device)
    settings = choose_blocks(M, (N, G), x.dtype, config)
    BLOCK_M, BLOCK_N, BLOCKS = settings["BLOCK_M"], settings["BLOCK_N"], settings["BLOCKS"]
    across = sum(triton.cdiv(width, BLOCKS * BLOCK_N) for width in (N, G))
    with torch.cuda.device_of(x):
        _gated_key_kernel[(triton.cdiv(M, BLOCK_M) * across,)](
            x, key_weight, gate_weight, key, gate, M, K, N, G, K,
            dot_precision(x.dtype), BLOCK_M, BLOCK_N, settings["BLOCK_K"], BLOCKS,
            **config.options(settings),
        )  # fmt: skip
    return outputs


def _fake_pair(x: Tensor, key_weight: Tensor, gate_weight: Tensor) -> tuple[Tensor, Tensor]:
    def output(weight: Tensor) -> Tensor:
        return torch.empty((*x.shape[1:-1], len(weight)), dtype=x.dtype, device=x.device)

    return output(key_weight), output(gate_weight)


def _flops_pair(
    x: tuple[int, ...], key_weight: tuple[int, ...], gate_weight: tuple[int, ...], *, out_shape: object, **_: object
) -> int:
    return math.prod(x) * (key_weight[0] + gate_weight[0])


def fused_linear_triton(
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    residual: Tensor,
    *,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Launch the kernel. Also runs on CPU tensors under TRITON_INTERPRET=1, which is how the tests use it."""
    _check(x, weight, gate, scale, residual)
    N, K = weight.shape
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x, weight, gate, scale, residual = contiguous(x, weight, gate, scale, residual)
    M = y.numel() // N
    config = config or launch_config(x.device)
    settings = choose_blocks(M, (N,), x.dtype, config)
    BLOCK_M, BLOCK_N, BLOCKS = settings["BLOCK_M"], settings["BLOCK_N"], settings["BLOCKS"]
    with torch.cuda.device_of(x):
        _fused_linear_kernel[(triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCKS * BLOCK_N),)](
            x, weight, gate, scale, residual, y, M, K, N, K, gate is not None,
            dot_precision(x.dtype), BLOCK_M, BLOCK_N, settings["BLOCK_K"], BLOCKS, settings["PARTS"],
            **config.options(settings),
        )  # fmt: skip
    return y


def _fake(x: Tensor, weight: Tensor, *args: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))


def _flops(x: tuple[int, ...], weight: tuple[int, ...], *args: object, out_shape: object, **_: object) -> int:
    return 2 * math.prod(x) * weight[0]


gated_key = register("gated_key", gated_key_ref, gated_key_triton, _fake_pair, _flops_pair)
fused_linear = register("fused_linear", fused_linear_ref, fused_linear_triton, _fake, _flops)
