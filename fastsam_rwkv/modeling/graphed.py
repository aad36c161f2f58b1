"""CUDA-graph routing: which calls of the model run in a graph, and which of them share one.

Encoder calls share a graph per input size, batch and dtype: pixels are normalized and padded first. Decoder calls
share a graph per input size, chosen mask outputs and bucket of prompts and points. Buckets are powers of two, and
padding prompts are masked out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..triton_kernels.operator import HAS_TRITON, in_forward_ad
from ..triton_kernels.prompt_tokens import ABSENT
from .cuda_graphs import CudaGraphs, SideStream
from .embedding import ImageEmbedding
from .layers import SpatialMix
from .pixels import pad

if TYPE_CHECKING:
    from .rwkv_sam import RWKVSAM

MAX_PROMPTS = 64  # prompts in one graph; larger calls replay it several times
MIN_TOKENS = 2

Decode = Callable[[ImageEmbedding, Tensor, Tensor, "Tensor | None", slice, bool], tuple[Tensor, Tensor]]


def bucket(count: int, smallest: int = 1) -> int:
    """Return the size that graphs are recorded for: the next power of two, at least `smallest`."""
    return max(smallest, 1 << max(0, count - 1).bit_length())


def can_use_graph(on_device: Tensor, needs_grad: Callable[[], bool]) -> bool:
    """True if a call on `on_device` may run in a CUDA graph. `needs_grad` is called in gradient mode only."""
    return (
        HAS_TRITON  # the reference reads values, which synchronizes
        and on_device.is_cuda
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
        and not (torch.is_grad_enabled() and needs_grad())
        and not in_forward_ad(on_device)
    )


class GraphedCalls:
    """The CUDA graphs of one model, the position encoding of the last input size, and the scan's bounds."""

    def __init__(self) -> None:
        self._graphs = CudaGraphs()
        self._last_grid: Tensor | None = None
        self._decays: tuple[Tensor, ...] = ()  # and bonuses, of all layers
        self._bounds: tuple[int | None, tuple[float | None, ...]] = (None, ())  # number of changes, and bounds

    def clear(self) -> None:
        """Forget graphs and position encoding, because the parameters moved or changed."""
        self._graphs.clear()
        self._last_grid = None
        self._decays, self._bounds = (), (None, ())

    def scan_bounds(self, model: RWKVSAM) -> tuple[float | None, ...]:
        """Return the bound of each layer's decays and bonuses, on which the choice of the scan's kernels depends."""
        changes = sum(p._version for p in self._decays)
        if changes != self._bounds[0]:
            scans = [m for m in model.modules() if isinstance(m, SpatialMix)]
            self._decays = tuple(p for m in scans for p in (m.decay, m.first) if not p.is_inference())
            changes = sum(p._version for p in self._decays)
            self._bounds = changes, tuple(scan.scan_bound() for scan in scans)
        return self._bounds[1]

    def encode(self, model: RWKVSAM, pixels: Tensor, input_size: tuple[int, int]) -> tuple[Tensor, ...] | None:
        """Run the model's encoder on pixels `[B, h, w, 3]`, padded first, because each new shape captures a graph.

        The graph normalizes uint8 pixels; the size of what is not padding is an input of it. `project_image` runs on a
        side stream, because the RWKV layers leave SMs idle for one image. Returns None if no graph could be recorded.
        """
        inputs, size = [pixels], pixels.shape[1:3]
        if tuple(size) != input_size:
            inputs = [pad(pixels, input_size)]
            if not pixels.is_floating_point():
                inputs.append(torch.tensor(size, dtype=torch.int32))

        def encode(stream: torch.cuda.Stream, pixels: Tensor, size: Tensor | None = None) -> tuple[Tensor, ...]:
            with SideStream(stream) as side:
                project = partial(side.start, model.mask_decoder.project_image)
                image_embed, *stages = model.embed(pixels, input_size, project, size)  # `project` needs `stages` alive
            return image_embed, side.result

        return self._graphs(("encode", *input_size, self.scan_bounds(model)), model.device, encode, inputs)

    def grid(self, compute: Callable[[int, int], Tensor], h: int, w: int) -> Tensor:
        """Return `compute(h, w)`, kept for the last size: its 16 small launches are 3 % of the encoder's time."""
        grid = self._last_grid
        if grid is None or grid.shape[:2] != (h, w):
            with torch.inference_mode(False), torch.no_grad():  # callers in any mode may use it
                grid = self._last_grid = compute(h, w)
            torch.cuda.current_stream(grid.device).synchronize()  # and callers on any stream
        return grid

    def decode(
        self,
        decode: Decode,
        embedding: ImageEmbedding,
        coords: Tensor,
        labels: Tensor,
        mask_input: Tensor | None,
        mask_slice: slice,
    ) -> tuple[Tensor, Tensor] | None:
        """Run `decode` on points `[N, M, 2]` with labels `[N, M]`, padded to the sizes that graphs are recorded for.

        Returns None if no graph could be recorded.
        """
        maps = [embedding.image_embed, embedding.image_pe, embedding.high_res_feats]
        input_size = embedding.input_size

        def masks(_: torch.cuda.Stream, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            image_embed, image_pe, high_res_feats, coords, labels, *mask = tensors
            image = ImageEmbedding(image_embed, image_pe, high_res_feats, input_size)
            return decode(image, coords, labels, mask[0] if mask else None, mask_slice, True)

        N, M = labels.shape
        image_embed, columns = embedding.image_embed, bucket(M, MIN_TOKENS) - M
        coords, labels = coords.to(image_embed.device, torch.float32), labels.to(image_embed.device, torch.long)
        key = ("decode", *input_size, mask_slice.start, mask_slice.stop)
        parts = []
        for first in range(0, N, MAX_PROMPTS):
            n = min(N - first, MAX_PROMPTS)
            part, rows = slice(first, first + n), bucket(n) - n
            prompts = [
                F.pad(coords[part], (0, 0, 0, columns, 0, rows)),
                F.pad(labels[part], (0, columns, 0, rows), value=ABSENT),
            ]
            if mask_input is not None:
                prompts.append(F.pad(mask_input[part].to(image_embed), (0, 0, 0, 0, 0, 0, 0, rows)))
            found = self._graphs(key, image_embed.device, masks, maps + prompts, kept=len(maps))
            if found is None:
                return None
            low, iou = found
            parts.append((low[:n], iou[:n]))
        low, iou = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
        return low, iou
