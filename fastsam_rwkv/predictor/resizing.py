"""Low-resolution masks brought to the size of the image, each only where it may be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..triton_kernels.mask_edges import TAPS, mask_edges
from .frame import ImageFrame

STRIP = 1 << 24  # float32 logits at a time
MASKS_AT_ONCE = 64  # whose run lengths are computed in one launch
ROWS = 16  # lines of pixels that are searched for an edge at a time


class MaskResizer:
    """Resize masks of one frame as `masks_to_image` does, in windows around them.

    A resize is a product with one matrix per axis. A pixel of the image is a weighted mean of a few logits. It lies in
    the mask only if one of them does.

    Args:
        frame: Frame of the image or of a window; windows are counted from its corner.
        device: Device of the logits.
    """

    def __init__(self, frame: ImageFrame, device: torch.device) -> None:
        self.frame = frame
        low = frame.input_size[0] // 4
        matrices = [frame.enlarging(axis, slice(0, side), low) for axis, side in enumerate(frame.original_size)]
        self.first = [np.argmax(m > 0, axis=1) for m in matrices]  # logits that a row or column of pixels depends on
        self.last = [low - 1 - np.argmax(m[:, ::-1] > 0, axis=1) for m in matrices]
        self.used = [int(last.max()) + 1 for last in self.last]  # logits in the image; the rest is padding
        self.matrices = [torch.from_numpy(m).to(device) for m in matrices]

    def inside(self, low: Tensor) -> Tensor:
        """Return the logits `[M, h, w]` without those of the padding."""
        return low[..., : self.used[0], : self.used[1]]

    def stability(self, low: Tensor, offset: float, threshold: float, unsure: float) -> tuple[Tensor, Tensor]:
        """Return stability scores `[M]` at low resolution, and which are too close to the threshold to decide by."""
        low = self.inside(low)
        certain, possible = ((low > t).sum((1, 2)).float() for t in (offset, -offset))
        scores = certain / possible.clamp(min=1)
        return scores, (scores - threshold).abs() < unsure + 1 / possible.clamp(min=1).sqrt()

    def exact_stability(self, low: Tensor, offset: float) -> float:
        """Return the stability score of logits `[h, w]` at the size of the image."""
        certain = possible = 0
        for _, logits in self._strips(low, -offset):
            certain += int((logits > offset).sum())
            possible += int((logits > -offset).sum())
        return certain / max(1, possible)

    def box(self, low: Tensor) -> tuple[int, int, int, int] | None:
        """Return the box (x1, y1, x2, y2), exclusive, of the mask of logits `[h, w]`; None if it is empty.

        Only pixels near the four edges are computed.
        """
        spans = self._spans(low, 0.0)
        if spans is None:
            return None
        edges = []
        for axis in (0, 1):
            (start, stop, a, b), (begin, end, c, d) = spans[axis], spans[1 - axis]
            across = self.matrices[1 - axis][begin:end, c:d]
            part = (low[a:b, c:d] if axis == 0 else low[c:d, a:b].T) @ across.T
            lines = self.matrices[axis][start:stop, a:b]
            first = self._first(lines, part)
            if first is None:
                return None
            last = self._first(lines.flip(0), part)
            assert last is not None
            edges.append((start + first, stop - last))
        (y1, y2), (x1, x2) = edges
        return x1, y1, x2, y2

    @staticmethod
    def _first(lines: Tensor, part: Tensor) -> int | None:
        """Return the first row of `lines @ part` with a value above 0, computing some rows at a time."""
        for row in range(0, len(lines), ROWS):
            found = (lines[row : row + ROWS] @ part > 0).any(1).nonzero()[:, 0]
            if len(found):
                return row + int(found[0])
        return None

    def mask(self, low: Tensor) -> tuple[np.ndarray, tuple[int, int]]:
        """Return the mask of logits `[h, w]` as a bool window, and the window's upper left (row, column)."""
        strips = [(corner, (logits > 0).cpu().numpy()) for corner, logits in self._strips(low, 0.0)]
        if not strips:
            return np.zeros((1, 1), np.bool_), (0, 0)
        return np.concatenate([strip for _, strip in strips]), strips[0][0]

    def runs(self, masks: Sequence[Tensor], size: tuple[int, int]) -> Iterator[np.ndarray]:
        """Yield the run lengths of masks at the size of the image, from logits `[h, w]` each, by `mask_edges`.

        No map of the image's size is made on a GPU. `size` is that of the whole image, `(H, W)`.
        """
        H, W = size
        tables = self._tables(size)
        for first in range(0, len(masks), MASKS_AT_ONCE):
            low = torch.stack(list(masks[first : first + MASKS_AT_ONCE]))
            counts = mask_edges(low, *tables, None, 0)
            ends = counts.flatten().cumsum(0).view(counts.shape)
            last = ends[:, -1].tolist()  # the number of boundaries up to the end of each mask
            edges = mask_edges(low, *tables, ends - counts, last[-1]).cpu().numpy()
            yield from (np.diff(np.concatenate([[0], part, [H * W]])) for part in np.split(edges, last[:-1]))

    def _tables(self, size: tuple[int, int]) -> list[Tensor]:
        """Return first logits and weights of the rows and the columns of the whole image; zeros outside the frame."""
        tables = []
        for first, matrix, part, side in zip(self.first, self.matrices, self.frame.pixels, size, strict=True):
            start = np.zeros(side, np.int32)
            start[part] = np.minimum(first, matrix.shape[1] - TAPS)
            weights = torch.zeros(side, TAPS, device=matrix.device)
            taps = torch.from_numpy(start[part, None] + np.arange(TAPS)).to(matrix.device)
            weights[part] = matrix.gather(1, taps)
            tables += [torch.from_numpy(start).to(matrix.device), weights]
        return tables

    def _spans(self, low: Tensor, threshold: float) -> list[tuple[int, int, int, int]] | None:
        """Return rows and columns that may exceed the threshold: start and stop of the pixels and of the logits."""
        above = self.inside(low) > threshold
        spans = []
        for axis in (0, 1):
            found = above.any(1 - axis).nonzero()[:, 0]
            if len(found) == 0:
                return None
            start = int(np.searchsorted(self.last[axis], int(found[0]), "left"))
            stop = int(np.searchsorted(self.first[axis], int(found[-1]), "right"))
            spans.append((start, stop, int(self.first[axis][start]), int(self.last[axis][stop - 1]) + 1))
        return spans

    def _strips(self, low: Tensor, threshold: float) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Yield corners and logits of the window in which a pixel may exceed the threshold, in strips of rows."""
        spans = self._spans(low, threshold)
        if spans is None:
            return
        (top, bottom, a, b), (left, right, c, d) = spans
        columns = low[a:b, c:d] @ self.matrices[1][left:right, c:d].T
        step = max(1, STRIP // (right - left))
        for row in range(top, bottom, step):
            yield (row, left), self.matrices[0][row : min(bottom, row + step), a:b] @ columns
