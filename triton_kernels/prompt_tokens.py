"""Tokens of the mask decoder: its own, then one for each point of the prompt.

    token = label_embed[label] + [sin, cos](2 pi (2 (x + 0.5, y + 0.5) / (W, H) - 1) frequencies)

B * M tokens of D values are written. It is one launch instead of about twenty.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import tl, triton, wait_for_inputs
from .launch_config import LaunchConfig, launch_config
from .operator import check_batch, contiguous, described, register

ABSENT = -2  # label of a point that only fills the shape of a CUDA graph
LABELS = 4  # background, foreground, two corners of a box


def prompt_tokens_ref(
    coords: Tensor,
    labels: Tensor,
    frequencies: Tensor,
    label_embed: Tensor,
    absent_embed: Tensor,
    iou_token: Tensor,
    mask_tokens: Tensor,
    H: int,
    W: int,
) -> tuple[Tensor, Tensor]:
    """Oracle and CPU path.

    Args:
        coords: `[B, M, 2]` (x, y) in the input frame.
        labels: `[B, M]`, below LABELS; negative for a point that is padding.
        frequencies: `[2, D/2]`.
        label_embed, absent_embed: `[LABELS, D]`, and `[D]` for padding.
        iou_token, mask_tokens: `[1, D]` and `[n, D]`, the decoder's own tokens.
        H, W: Size of the model input.

    Returns:
        Tokens `[B, 1 + n + M, D]` in the dtype of the embeddings, and `[B, 1 + n + M]` bool, False where the label is
        ABSENT.
    """
    B = _check(coords, labels, frequencies, label_embed, absent_embed, iou_token, mask_tokens)
    own = torch.cat([iou_token, mask_tokens]).expand(B, -1, -1)
    encode = partial(encode_positions, frequencies=frequencies)
    tokens = embed_points(coords, labels, encode, label_embed, absent_embed, H, W)
    return torch.cat([own, tokens], dim=1), F.pad(labels != ABSENT, (own.shape[1], 0), value=True)


def encode_positions(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Encode positions `[..., 2]` (x, y) in [0, 1] by random Fourier features: `[..., D]` float32."""
    phases = (2 * positions.float() - 1) @ (2 * math.pi * frequencies.float())
    return torch.cat([phases.sin(), phases.cos()], dim=-1)


def embed_points(
    coords: Tensor,
    labels: Tensor,
    encode: Callable[[Tensor], Tensor],
    label_embed: Tensor,
    absent_embed: Tensor,
    H: int,
    W: int,
) -> Tensor:
    """Return the tokens `[B, M, D]` of points. `encode` maps positions in [0, 1] to features."""
    x, y = ((coords.float() + 0.5) / side for side in (W, H))
    positions = torch.stack([x[..., 0], y[..., 1]], dim=-1)
    absent = labels < 0
    embedded = F.embedding(torch.where(absent, 0, labels), label_embed)
    embedded = encode(positions).to(label_embed.dtype) + embedded
    return torch.where(absent[..., None], absent_embed, embedded)


def _check(coords: Tensor, labels: Tensor, frequencies: Tensor, *embeddings: Tensor) -> int:
    """Return the number of prompts, or raise ValueError if the arguments do not fit."""
    label_embed, absent_embed, iou_token, mask_tokens = embeddings
    D = 2 * frequencies.shape[-1]
    fits = coords.ndim == 3 and coords.shape == (*labels.shape, 2) and frequencies.shape == (2, D // 2)
    fits = fits and (label_embed.shape, absent_embed.shape, iou_token.shape) == ((LABELS, D), (D,), (1, D))
    if not fits or mask_tokens.shape[1:] != (D,):
        raise ValueError(
            f"prompt_tokens needs coords [B, M, 2], labels [B, M], frequencies [2, D/2], label_embed [{LABELS}, D], "
            "absent_embed [D], iou_token [1, D] and mask_tokens [n, D], got "
            + described(
                coords=coords, labels=labels, frequencies=frequencies, label_embed=label_embed,
                absent_embed=absent_embed, iou_token=iou_token, mask_tokens=mask_tokens,
            )
        )  # fmt: skip
    return coords.shape[0]


@triton.jit
def _prompt_tokens_kernel(
    coords_ptr, labels_ptr, frequencies_ptr,  # [B, M, 2], [B, M] int64, [2, D / 2] float32
    label_embed_ptr, absent_embed_ptr, iou_token_ptr, mask_tokens_ptr,  # [LABELS, D], [D], [1, D], [OWN - 1, D]
    y_ptr, seen_ptr,  # [B, OWN + M, D], [B, OWN + M] uint8
    M, H, W,
    OWN: tl.constexpr, D: tl.constexpr, LABELS: tl.constexpr, ABSENT: tl.constexpr, BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute one token. A label that there is not gives NaN."""
    wait_for_inputs(OVERLAP)
    place, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask = offs_d < D
    point = b * M + place - OWN
    own = place < OWN
    label = tl.load(labels_ptr + point, mask=place >= OWN, other=0)
    if own:
        source = tl.where(place == 0, iou_token_ptr, mask_tokens_ptr + (place - 1) * D)
    else:
        source = tl.where(label < 0, absent_embed_ptr, label_embed_ptr + tl.minimum(label, LABELS - 1) * D)
    token = tl.load(source + offs_d, mask=mask, other=0.0)
    if (place >= OWN) & (label >= 0):
        x = (tl.load(coords_ptr + 2 * point).to(tl.float32) + 0.5) / W * 2 - 1
        y = (tl.load(coords_ptr + 2 * point + 1).to(tl.float32) + 0.5) / H * 2 - 1
        column = offs_d % (D // 2)
        turns = x * tl.load(frequencies_ptr + column, mask=mask, other=0.0)
        turns += y * tl.load(frequencies_ptr + D // 2 + column, mask=mask, other=0.0)
        turns -= tl.floor(turns + 0.5)  # within half a turn of zero
        from_zero = tl.abs(turns)
        sine = tl.where(from_zero > 0.25, tl.where(turns > 0, 0.5, -0.5) - turns, turns)
        z = tl.where(offs_d < D // 2, sine, 0.25 - from_zero) * 6.283185307179586  # sin z, |z| at most pi / 2
        s = z * z
        p = -2.5052108385e-8 * s + 2.7557319224e-6
        p = p * s - 1.9841269841e-4
        p = p * s + 8.3333333333e-3
        p = p * s - 0.16666666667
        encoded = z + z * s * p
        encoded = tl.where(label < LABELS, encoded, float("nan"))
        token = (encoded.to(token.dtype).to(tl.float32) + token.to(tl.float32)).to(token.dtype)
    row = b * (OWN + M) + place
    tl.store(y_ptr + row * D + offs_d, token, mask=mask)
    tl.store(seen_ptr + row, (own | (label != ABSENT)).to(tl.uint8))


def prompt_tokens_triton(
    coords: Tensor,
    labels: Tensor,
    frequencies: Tensor,
    label_embed: Tensor,
    absent_embed: Tensor,
    iou_token: Tensor,
    mask_tokens: Tensor,
    H: int,
    W: int,
    *,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel. Also runs on CPU tensors under TRITON_INTERPRET=1, which is how the tests use it."""
    B = _check(coords, labels, frequencies, label_embed, absent_embed, iou_token, mask_tokens)
    check_batch("prompt_tokens", B)
    tokens, seen = _fake(coords, labels, frequencies, label_embed, absent_embed, iou_token, mask_tokens, H, W)
    _, count, D = tokens.shape
    if tokens.numel() == 0:
        return tokens, seen
    inputs = contiguous(
        coords.float(), labels.long(), frequencies.float(), label_embed, absent_embed, iou_token, mask_tokens
    )
    config = config or launch_config(coords.device)
    M = labels.shape[1]
    with torch.cuda.device_of(tokens):
        _prompt_tokens_kernel[(count, B)](
            *inputs, tokens, seen.view(torch.uint8), M, H, W,
            count - M, D, LABELS, ABSENT, triton.next_power_of_2(D),
            **config.options(config.settings_for("prompt_tokens", tokens.dtype)),
        )  # fmt: skip
    return tokens, seen


def _fake(
    coords: Tensor, labels: Tensor, frequencies: Tensor, label_embed: Tensor, *others: Tensor | int
) -> tuple[Tensor, Tensor]:
    mask_tokens = others[2]
    assert isinstance(mask_tokens, Tensor)
    shape = coords.shape[0], 1 + len(mask_tokens) + labels.shape[1]
    return (
        torch.empty((*shape, label_embed.shape[1]), dtype=label_embed.dtype, device=coords.device),
        torch.empty(shape, dtype=torch.bool, device=coords.device),
    )


prompt_tokens = register("prompt_tokens", prompt_tokens_ref, prompt_tokens_triton, _fake)
