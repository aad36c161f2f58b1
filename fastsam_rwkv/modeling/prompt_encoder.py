"""SAM's prompt encoder for points, boxes and low-resolution masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..triton_kernels.prompt_tokens import embed_points, encode_positions, prompt_tokens
from .layers import LN_EPS, Conv2d, on_gpu, plain


class FourierEncoding(nn.Module):
    """Random Fourier features of positions in [0, 1]^2. Phases are computed in float32 whatever the model's dtype."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.randn(2, dim // 2, dtype=torch.float32))

    def forward(self, positions: Tensor) -> Tensor:
        """Encode positions `[..., 2]` (x, y) in [0, 1] as `[..., dim]` float32."""
        return encode_positions(positions, self.frequencies)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> FourierEncoding:
        # model.to(torch.bfloat16) must not round the frequencies: a phase would be off by up to 0.1 rad
        frequencies = self.frequencies
        super()._apply(fn, *args, **kwargs)
        moved = self.frequencies
        self.frequencies = (moved if frequencies.is_meta else frequencies).to(moved.device, torch.float32)
        return self


class PromptEncoder(nn.Module):
    """Encoder from points and boxes in the input frame to tokens `[N, M, dim]`, and from masks to `[N, h, w, dim]`."""

    def __init__(self, dim: int = 256) -> None:
        super().__init__()
        self.position = FourierEncoding(dim)
        self.label_embed = nn.Parameter(torch.randn(4, dim))  # background, foreground, box corners
        self.not_a_point_embed = nn.Parameter(torch.randn(dim))
        self.no_mask_embed = nn.Parameter(torch.randn(dim))
        self.mask_downscaling = nn.Sequential(
            Conv2d(1, 4, 2, stride=2),
            nn.LayerNorm(4, LN_EPS),
            nn.GELU(),
            Conv2d(4, 16, 2, stride=2),
            nn.LayerNorm(16, LN_EPS),
            nn.GELU(),
            nn.Linear(16, dim),
        )

    def grid(self, h: int, w: int) -> Tensor:
        """Return the position encoding `[h, w, dim]` of the cell centers of an h x w grid."""
        frequencies = self.position.frequencies
        y = (torch.arange(h, device=frequencies.device) + 0.5) / h
        x = (torch.arange(w, device=frequencies.device) + 0.5) / w
        grid = torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), dim=-1)
        return self.position(grid).to(self.label_embed.dtype)

    def points(self, coords: Tensor | None, labels: Tensor | None, boxes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return prompts as points `[N, M, 2]` with labels `[N, M]`, in SAM's order: points, then the box.

        Labels 2 and 3 are a box's corners. Without a box, SAM appends one padding point, label -1.
        """
        if coords is None or labels is None:
            assert boxes is not None
            coords, labels = (
                boxes.new_empty(boxes.shape[0], 0, 2),
                boxes.new_empty((boxes.shape[0], 0), dtype=torch.long),
            )
        one = labels.new_ones(labels.shape[0], 1)
        if boxes is None:
            return torch.cat([coords, torch.zeros_like(coords[:, :1])], dim=1), torch.cat([labels, -one], dim=1)
        return torch.cat([coords, boxes.view(-1, 2, 2)], dim=1), torch.cat([labels, 2 * one, 3 * one], dim=1)

    def forward(self, coords: Tensor, labels: Tensor, input_size: tuple[int, int]) -> Tensor:
        """Encode points as tokens.

        Args:
            coords: `[N, M, 2]` (x, y) in the input frame.
            labels: `[N, M]`: 0 background, 1 foreground, 2 and 3 box corners, negative for padding.
            input_size: `(H, W)` of the model input.

        Returns:
            `[N, M, dim]`.
        """
        return embed_points(coords, labels, self.position, self.label_embed, self.not_a_point_embed, *input_size)

    def joined(
        self, coords: Tensor, labels: Tensor, input_size: tuple[int, int], iou_token: Tensor, mask_tokens: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Encode points behind the decoder's own tokens in one launch, on a GPU, if no module is changed.

        Args:
            coords, labels, input_size: As in `forward`. Points of label ABSENT are not to be seen.
            iou_token, mask_tokens: `[1, dim]` and `[n, dim]`.

        Returns:
            Tokens `[N, 1 + n + M, dim]` and which of them are to be seen; None if `forward` has to be called.
        """
        if not on_gpu(coords) or not plain(self, self.position, kinds=(PromptEncoder, FourierEncoding)):
            return None
        embeddings = self.label_embed, self.not_a_point_embed, iou_token, mask_tokens
        return prompt_tokens(coords, labels, self.position.frequencies, *embeddings, *input_size)
