import math

import pytest
import torch
from guards import guarded_outputs, surrounded
from launch_configs import launch

from fastsam_rwkv.triton_kernels.operator import HAS_TRITON
from fastsam_rwkv.triton_kernels.prompt_tokens import ABSENT, LABELS, prompt_tokens, prompt_tokens_ref

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: kernels cannot run")
H, W = 96, 128
# prompts, points, D, mask tokens
CASES = [(1, 2, 256, 4), (3, 5, 20, 1), (2, 0, 16, 3)]


def make(B, M, D, n, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return surrounded(torch.randn(shape, generator=g).to(device, dtype))

    coords = torch.rand(B, M, 2, generator=g) * torch.tensor([W, H])
    coords[:, :1] = torch.tensor([W - 0.5, -0.5])  # the corners of the range
    labels = torch.randint(ABSENT, LABELS, (B, M), generator=g)
    frequencies = surrounded(torch.randn(2, D // 2, generator=g).to(device))
    coords, labels = surrounded(coords.to(device)), labels.to(device)
    return (coords, labels, frequencies, normal(LABELS, D), normal(D), normal(1, D), normal(n, D), H, W)


def step_by_step(coords, labels, frequencies, label_embed, absent_embed, iou_token, mask_tokens, height, width):
    """Definition in float64, one token at a time."""
    B, M = labels.shape
    tokens = torch.zeros(B, 1 + len(mask_tokens) + M, len(absent_embed), dtype=torch.float64)
    seen = torch.ones(tokens.shape[:2], dtype=torch.bool)
    for b in range(B):
        tokens[b, : len(mask_tokens) + 1] = torch.cat([iou_token, mask_tokens]).cpu().double()
        for m in range(M):
            place, label = 1 + len(mask_tokens) + m, int(labels[b, m])
            position = [(float(c) + 0.5) / size * 2 - 1 for c, size in zip(coords[b, m], (width, height), strict=True)]
            phase = 2 * math.pi * sum(p * f for p, f in zip(position, frequencies.cpu().double(), strict=True))
            embedded = torch.cat([phase.sin(), phase.cos()]) + label_embed[max(label, 0)].cpu().double()
            tokens[b, place] = absent_embed.cpu().double() if label < 0 else embedded
            seen[b, place] = label != ABSENT
    return tokens, seen


@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_reference_is_the_definition(sizes):
    args = make(*sizes)
    got, want = prompt_tokens_ref(*args), step_by_step(*args)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(got[1], want[1])


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_kernel_equals_the_reference(sizes, dtype, device, monkeypatch):
    args = make(*sizes, dtype, device)
    with guarded_outputs(monkeypatch):
        got, seen = launch(prompt_tokens, *args)
    want, want_seen = prompt_tokens_ref(*args)
    assert got.dtype == dtype and seen.dtype == torch.bool and torch.equal(seen, want_seen)
    tolerance = {"rtol": 0, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 8 * torch.finfo(dtype).eps}
    torch.testing.assert_close(got, want, **tolerance)
    if dtype == torch.float32:
        torch.testing.assert_close(got.cpu().double(), step_by_step(*args)[0], rtol=0, atol=1e-5)


@needs_triton
def test_a_label_that_there_is_not_gives_nan(device):
    args = make(1, 2, 16, 1, device=device)
    args[1][0, 1] = LABELS
    tokens, _ = launch(prompt_tokens, *args)
    assert tokens[0, 3].isnan().all() and torch.isfinite(tokens[0, :3]).all()


@needs_triton
def test_strided_and_empty(device):
    coords, labels, *rest = make(3, 5, 20, 1, device=device)
    want = launch(prompt_tokens, coords, labels, *rest)
    got = launch(prompt_tokens, coords.mT.contiguous().mT, labels.T.contiguous().T.int(), *rest)
    torch.testing.assert_close(got, want)
    assert launch(prompt_tokens, coords[:0], labels[:0], *rest)[0].shape == (0, 7, 20)


def test_op_contract(device):
    torch.library.opcheck(torch.ops.fastsam_rwkv.prompt_tokens.default, make(3, 5, 20, 1, device=device))


def test_wrong_shapes_raise():
    coords, labels, frequencies, *rest = make(3, 5, 20, 1)
    with pytest.raises(ValueError, match=r"labels \[3, 4\]"):
        prompt_tokens_ref(coords, labels[:, 1:], frequencies, *rest)
    with pytest.raises(ValueError, match=r"frequencies \[2, 9\]"):
        prompt_tokens_ref(coords, labels, frequencies[:, 1:], *rest)
