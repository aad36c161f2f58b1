"""Memory with guard bands, so that reads and writes beyond a tensor show."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

BAND = 512
MARK = -30000  # within float16, and nothing a test computes


def surrounded(t: Tensor) -> Tensor:
    """Return a copy of a tensor with NaN before and after it in memory."""
    buffer = torch.full((t.numel() + 2 * BAND,), torch.nan, dtype=t.dtype, device=t.device)
    view = buffer[BAND : BAND + t.numel()].view(t.shape)
    return view.copy_(t)


@contextmanager
def guarded_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make `torch.empty` return NaN, or MARK in integers, between two guard bands, and check the bands at the end."""
    buffers, empty = [], torch.empty

    def guarded(*size, dtype=None, device=None):
        shape = torch.Size(size[0]) if len(size) == 1 and not isinstance(size[0], int) else torch.Size(size)
        mark = True if dtype == torch.bool else MARK
        buffer = torch.full((shape.numel() + 2 * BAND,), mark, dtype=dtype, device=device)
        buffers.append((buffer, mark))
        unwritten = torch.nan if buffer.is_floating_point() else MARK
        return buffer[BAND : BAND + shape.numel()].fill_(unwritten).view(shape)

    monkeypatch.setattr(torch, "empty", guarded)
    yield
    monkeypatch.setattr(torch, "empty", empty)
    assert buffers
    for buffer, mark in buffers:
        assert (buffer[:BAND] == mark).all() and (buffer[-BAND:] == mark).all()
