import numpy as np
import pytest
import torch
from guards import guarded_outputs, surrounded
from launch_configs import launch

from fastsam_rwkv.predictor.frame import ImageFrame
from fastsam_rwkv.predictor.resizing import MaskResizer
from fastsam_rwkv.triton_kernels.mask_edges import TAPS, mask_edges, mask_edges_ref
from fastsam_rwkv.triton_kernels.operator import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: kernels cannot run")
SMALL = {"mask_edges": {"BLOCK_W": 8, "num_warps": 1}}
# image or window, input, upper left corner of the window, image
CASES = {
    "enlarged": ((30, 21), 16, (0, 0), (30, 21)),
    "reduced": ((9, 20), 32, (0, 0), (9, 20)),
    "one column": ((9, 1), 16, (0, 0), (9, 1)),
    "one row": ((1, 9), 16, (0, 0), (1, 9)),
    "a window": ((8, 11), 16, (4, 3), (16, 18)),
    "a window at the right edge": ((16, 9), 16, (9, 0), (16, 18)),
}


def make(case="enlarged", M=2, device="cpu", seed=0):
    """Return smooth and rough logits with the tables of an image or of a window of it."""
    size, image_size, offset, whole = CASES[case]
    g = torch.Generator().manual_seed(seed)
    side = image_size // 4
    low = torch.randn(M, side, side, generator=g)
    low[:1] = torch.linspace(-1, 1, side)[:, None] + torch.linspace(-1, 1, side) + 0.01  # touches the last pixel
    resizer = MaskResizer(ImageFrame.of(size, image_size, offset), torch.device(device))
    first_row, rows, first_column, columns = resizer._tables(whole)
    return surrounded(low.to(device)), first_row, surrounded(rows), first_column, surrounded(columns), None, 0


def step_by_step(low, first_row, rows, first_column, columns):
    """Pixels where runs begin, by definition, from maps in float64, and the smallest logit of each mask."""
    matrices = []
    for first, weights in ((first_row, rows), (first_column, columns)):
        matrix = torch.zeros(len(first), low.shape[1], dtype=torch.float64)
        matrices.append(
            matrix.scatter_add_(1, first.cpu().long()[:, None] + torch.arange(TAPS), weights.cpu().double())
        )
    logits = matrices[0] @ low.cpu().double() @ matrices[1].T
    masks = (logits > 0).numpy()
    edges = [np.flatnonzero(np.diff(np.concatenate([[False], mask.T.ravel()]).astype(int))) for mask in masks]
    return edges, logits[logits != 0].abs().min()  # zeros lie outside the window


def starts_of(counts):
    ends = counts.flatten().cumsum(0)
    return (ends - counts.flatten()).view(counts.shape), int(ends[-1])


@pytest.mark.parametrize("case", CASES)
def test_reference_is_the_definition(case):
    low, *tables, _, _ = make(case)
    edges, nearest = step_by_step(low, *tables)
    assert nearest > 1e-5, "a logit that rounds to either side"
    counts = mask_edges_ref(low, *tables, None, 0)
    assert counts.sum(1).tolist() == [len(part) for part in edges] and sum(map(len, edges)) >= 2
    starts, total = starts_of(counts)
    assert mask_edges_ref(low, *tables, starts, total).tolist() == np.concatenate(edges).tolist()


@needs_triton
@pytest.mark.parametrize("blocks", ["default", "small"])
@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_the_reference(case, blocks, device, monkeypatch):
    low, *tables, _, _ = make(case, device=device)
    settings = {} if blocks == "default" else SMALL
    with guarded_outputs(monkeypatch):
        counts = launch(mask_edges, low, *tables, None, 0, settings=settings)
        starts, total = starts_of(counts)
        edges = launch(mask_edges, low, *tables, starts, total, settings=settings)
    assert counts.dtype == edges.dtype == torch.int32
    assert torch.equal(counts, mask_edges_ref(low, *tables, None, 0))
    assert torch.equal(edges, mask_edges_ref(low, *tables, starts, total))


@needs_triton
def test_nothing_and_everything(device):
    low, *tables, _, _ = make(M=2, device=device)
    low[0], low[1] = -1.0, 1.0
    counts = launch(mask_edges, low, *tables, None, 0)
    starts, total = starts_of(counts)
    assert total == 1 and launch(mask_edges, low, *tables, starts, total).tolist() == [0]
    assert launch(mask_edges, low[:0], *tables, None, 0).shape == (0, 21)
    assert launch(mask_edges, low[:1], *tables, starts[:1], 0).shape == (0,)


@needs_triton
def test_strided(device):
    low, *tables, _, _ = make(device=device)
    want = launch(mask_edges, low, *tables, None, 0)
    gaps = [torch.stack([t, t + 1], 1)[:, 0] for t in tables]
    turned = low.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(launch(mask_edges, turned, *gaps, None, 0), want)
    starts, total = starts_of(want)
    spread = torch.stack([starts, starts], 2)[..., 0]
    assert torch.equal(
        launch(mask_edges, turned, *gaps, spread, total), launch(mask_edges, low, *tables, starts, total)
    )


def test_op_contract(device):
    args = make(device=device)
    torch.library.opcheck(torch.ops.fastsam_rwkv.mask_edges.default, args)
    starts, total = starts_of(mask_edges(*args))
    torch.library.opcheck(torch.ops.fastsam_rwkv.mask_edges.default, (*args[:5], starts, total))


def test_wrong_shapes_raise():
    low, *tables, _, _ = make()
    with pytest.raises(ValueError, match=r"low \[2, 2, 4\]"):
        mask_edges(low[:, :2], *tables, None, 0)
    with pytest.raises(ValueError, match=r"rows \[29, 3\]"):
        mask_edges(low, tables[0], tables[1][1:], *tables[2:], None, 0)
    with pytest.raises(ValueError, match=r"starts \[3, 21\]"):
        mask_edges(low, *tables, torch.zeros(3, 21, dtype=torch.long), 0)
