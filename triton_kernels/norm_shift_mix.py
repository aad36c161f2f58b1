"""LayerNorm, Q-shift and the mixes of a token with its neighbours: what stands before an RWKV layer's projections.

    n = LayerNorm(x)                                     over the channels
    s = n of the pixel to the left, right, above, below  for the four quarters of the channels; zero outside the image
    y_j = s + (n - s) * mix_j                            for every j

x is read from memory once, though five times from the cache, and J maps are written: (1 + J) * B * H * W * C * itemsize
bytes, which is the bound to compare a benchmark with. The maps are stacked, so that the projections are one batched
matrix product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import register, tl, triton
from .tuning import launch_options, launch_settings


def q_shift(x: Tensor) -> Tensor:
    """Quarters of the channels of `[B, H, W, C]` from the left, right, upper and lower neighbour; zero outside.

    Quarters are C // 4 wide; the channels beyond the fourth are not shifted.
    """
    q = x.shape[-1] // 4
    s = torch.empty_like(x)
    for quarter, (axis, source) in enumerate([(2, -1), (2, 1), (1, -1), (1, 1)]):
        of, to = (t[..., quarter * q : (quarter + 1) * q] for t in (x, s))
        size, outside = x.shape[axis], 0 if source < 0 else x.shape[axis] - 1
        to.narrow(axis, max(0, -source), size - 1).copy_(of.narrow(axis, max(0, source), size - 1))
        to.select(axis, outside).zero_()
    s[..., 4 * q :] = x[..., 4 * q :]
    return s


def norm_shift_mix_ref(x: Tensor, weight: Tensor, bias: Tensor, mix: Tensor, eps: float) -> Tensor:
    """Oracle, CPU path and export decomposition.

    Args:
        x: `[B, H, W, C]`.
        weight, bias: `[C]` of the LayerNorm.
        mix: `[J, C]`, the share of the token itself.
        eps: of the LayerNorm.

    Returns:
        `[J, B, H, W, C]` in x's dtype.
    """
    _check(x, weight, bias, mix)
    n = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return torch.lerp(q_shift(n), n, mix[:, None, None, None])


def _check(x: Tensor, weight: Tensor, bias: Tensor, mix: Tensor) -> None:
    C = x.shape[-1]
    if x.ndim != 4 or weight.shape != (C,) or bias.shape != (C,) or mix.ndim != 2 or mix.shape[1] != C:
        raise ValueError(
            "norm_shift_mix needs x [B, H, W, C], weight and bias [C] and mix [J, C], got "
            f"{list(x.shape)}, {list(weight.shape)}, {list(bias.shape)} and {list(mix.shape)}"
        )


@triton.jit
def _normalised(x_ptr, offs_m, mask_m, offs_c, weight, bias, eps, C: tl.constexpr):
    """LayerNorm of the rows offs_m, `[BLOCK_M, BLOCK_C]`."""
    mask = mask_m[:, None] & (offs_c < C)[None, :]
    x = tl.load(x_ptr + offs_m[:, None] * C + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(mask, x - (tl.sum(x, 1) / C)[:, None], 0.0)  # two passes: no E[x^2] - E[x]^2 cancellation
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    return centred * rstd[:, None] * weight[None, :] + bias[None, :]


@triton.jit
def _norm_shift_mix_kernel(
    x_ptr, weight_ptr, bias_ptr, mix_ptr, y_ptr,  # [M, C], [C], [C], [J, C], [J, M, C], all contiguous
    M, H, W, eps,  # M = B * H * W
    C: tl.constexpr, J: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,  # BLOCK_C = next_power_of_2(C)
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column, row = token % W, (token // W) % H  # in 32 bits: a 64-bit division is a subroutine with a stack
    offs_m = token.to(tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    mask_m, mask_c = offs_m < M, offs_c < C
    weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    QUARTER: tl.constexpr = C // 4

    n = _normalised(x_ptr, offs_m, mask_m, offs_c, weight, bias, eps, C)
    s = tl.where((offs_c < 4 * QUARTER)[None, :], 0.0, n)
    for side in tl.static_range(4):
        if side == 0:
            place, inside = offs_m - 1, column > 0
        elif side == 1:
            place, inside = offs_m + 1, column < W - 1
        elif side == 2:
            place, inside = offs_m - W, row > 0
        else:
            place, inside = offs_m + W, row < H - 1
        neighbour = _normalised(x_ptr, place, inside & mask_m, offs_c, weight, bias, eps, C)
        quarter = (offs_c >= side * QUARTER) & (offs_c < (side + 1) * QUARTER)
        s = tl.where(inside[:, None] & quarter[None, :], neighbour, s)
    for j in tl.static_range(J):
        mix = tl.load(mix_ptr + j * C + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        y = s + (n - s) * mix[None, :]
        ptr = y_ptr + (j * M + offs_m)[:, None] * C + offs_c[None, :]
        tl.store(ptr, y.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_c[None, :])


def norm_shift_mix_triton(x: Tensor, weight: Tensor, bias: Tensor, mix: Tensor, eps: float) -> Tensor:
    """Launch the kernel. Also runs on CPU tensors under TRITON_INTERPRET=1, which is how the tests use it."""
    _check(x, weight, bias, mix)
    B, H, W, C = x.shape
    J = len(mix)
    y = torch.empty((J, B, H, W, C), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x, weight, bias, mix = (t.contiguous() for t in (x, weight, bias, mix))
    settings = launch_settings("norm_shift_mix", x.device, x.dtype)
    M, BLOCK_M = B * H * W, settings["BLOCK_M"]
    with torch.cuda.device_of(x):
        _norm_shift_mix_kernel[(triton.cdiv(M, BLOCK_M),)](
            x, weight, bias, mix, y, M, H, W, eps, C, J, BLOCK_M, triton.next_power_of_2(C),
            **launch_options(settings),
        )  # fmt: skip
    return y


norm_shift_mix = register(
    "norm_shift_mix",
    norm_shift_mix_ref,
    norm_shift_mix_triton,
    lambda x, weight, bias, mix, eps: torch.empty((len(mix), *x.shape), dtype=x.dtype, device=x.device),
)
