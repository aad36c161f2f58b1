"""Row strips for references on a CPU: large temporary tensors stay in the cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STRIP_VALUES = 1 << 20


def conv_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: range, height: int, stride: int, groups: int = 1
) -> Tensor:
    """Compute output rows `rows` of a 3x3 convolution: `[B, len(rows), W', C]`.

    x holds the needed input rows only, out of `height`. Rows outside the image are zero padding.
    """
    above, below = max(0, 1 - stride * rows.start), max(0, stride * (rows.stop - 1) + 2 - height)
    if above or below:
        x = F.pad(x, (0, 0, 0, 0, above, below))
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, (0, 1), groups=groups).permute(0, 2, 3, 1)


def rows_needed(rows: range, stride: int, height: int) -> range:
    """Return the input rows that output rows of a 3x3 convolution need, clipped to the image."""
    return range(max(0, stride * rows.start - 1), min(height, stride * (rows.stop - 1) + 2))


def parts_help(x: Tensor) -> bool:
    """True on a CPU without gradients and without tracing, where parts keep temporary tensors in the cache."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling() and x.device.type == "cpu"


def strips(height: int, values_per_row: int, x: Tensor) -> list[range]:
    """Divide rows into strips whose largest tensor stays in a CPU's cache; one strip if that does not help.

    A map of a convolution stage at 1024 x 1024 pixels takes 134 MB, a strip 4 MB, which is three times faster.
    """
    if not parts_help(x):
        return [range(height)]
    step = max(1, STRIP_VALUES // values_per_row)
    return [range(r, min(r + step, height)) for r in range(0, height, step)] or [range(0)]
