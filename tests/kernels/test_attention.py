import pytest
import torch
from guards import guarded_outputs, surrounded
from numerics import assert_as_accurate_as_eager

from fastsam_rwkv.triton_kernels.attention import attention, attention_ref, attention_triton, splits_of
from fastsam_rwkv.triton_kernels.launch_config import override
from fastsam_rwkv.triton_kernels.operator import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: kernels cannot run")
SMALL = dict.fromkeys(
    ("attention", "attention.float32"),
    {"BLOCK_T": 16, "BLOCK_S": 16, "PROGRAMS": 64, "num_warps": 1, "num_stages": 1},
)
# images of q and of k, T, S, heads, width of a head
CASES = [
    ((1, 1), 1, 1, 1, 3),
    ((2, 2), 7, 7, 8, 32),
    ((2, 1), 7, 300, 8, 16),  # of tokens, all of them at one map
    ((1, 3), 150, 9, 2, 16),  # of a map, at each prompt's tokens
    ((2, 2), 18, 70, 3, 20),
]


def make(images, T, S, heads, D, seen=True, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return surrounded((torch.randn(shape, generator=g) * scale).to(device, dtype))

    q, k, v = normal(images[0], T, heads * D, scale=3.0), *(normal(images[1], S, heads * D) for _ in "kv")
    there = torch.rand(max(images), S, generator=g) < 0.4
    there[:, S // 2] = True
    return q, k, v, there.to(device) if seen else None, heads


def step_by_step(q, k, v, seen, heads):
    """The definition in float64, a head at a time."""
    q, k, v = (t.double().expand(max(len(q), len(k)), -1, -1) for t in (q, k, v))
    D = q.shape[2] // heads
    parts = []
    for head in range(heads):
        one_q, one_k, one_v = (t[..., head * D : (head + 1) * D] for t in (q, k, v))
        scores = one_q @ one_k.mT / D**0.5
        if seen is not None:
            scores = scores.masked_fill(~seen[:, None], float("-inf"))
        parts.append(scores.softmax(-1) @ one_v)
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_definition(case, seen):
    args = make(*case, seen, torch.float64)
    torch.testing.assert_close(attention_ref(*args), step_by_step(*args))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocks", ["default", "small"])
@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_is_as_accurate_as_eager(case, seen, blocks, dtype, device, monkeypatch):
    args = make(*case, seen, dtype, device)
    with override({} if blocks == "default" else SMALL), guarded_outputs(monkeypatch):
        got = attention_triton(*args)
    assert_as_accurate_as_eager(got, attention_ref(*args), step_by_step(*args))


@needs_triton
@pytest.mark.parametrize("first", [0, 40, 90])
def test_one_key_seen_wherever_it_stands(first, device):
    """Whole blocks and whole splits without a key count for nothing."""
    q, k, v, seen, heads = make((2, 1), 3, 97, 2, 16, device=device)
    seen[:] = False
    seen[0, first], seen[1, first + 5] = True, True
    with override(SMALL):
        got = attention_triton(q, k, v, seen, heads)
    want = torch.stack([v[0, first], v[0, first + 5]])[:, None].expand(-1, 3, -1)
    torch.testing.assert_close(got, want)


@needs_triton
def test_large_exponents(device):
    q, k, v, seen, heads = make((1, 1), 5, 90, 2, 16, device=device)
    args = (1000 * q, k, v, seen, heads)
    with override(SMALL):
        torch.testing.assert_close(attention_triton(*args).double(), step_by_step(*args), rtol=1e-4, atol=1e-4)


def test_keys_are_split_until_there_are_programs_enough():
    settings = {"PROGRAMS": 132, "BLOCK_S": 256}
    assert splits_of(8, 4096, settings) == 16
    assert splits_of(64, 4096, settings) == 2
    assert splits_of(67, 4096, settings) == splits_of(8, 300, settings) == 1
    assert splits_of(8, 512, settings) == 2


@needs_triton
def test_strided_and_empty(device):
    q, k, v, seen, heads = make((2, 2), 4, 6, 2, 8, device=device)
    want = attention_triton(q, k, v, seen, heads)
    q_strided, k_strided, v_strided = (t.mT.contiguous().mT for t in (q, k, v))
    torch.testing.assert_close(attention_triton(q_strided, k_strided, v_strided, seen.T.contiguous().T, heads), want)
    assert attention_triton(q[:0], k[:1], v[:1], seen[:0], heads).shape == (0, 4, 16)
    assert attention_triton(q[:1], k[:0], v[:0], seen[:0], heads).shape == (0, 4, 16)


@pytest.mark.parametrize("images", [(2, 2), (1, 2), (2, 1)])
@pytest.mark.parametrize("seen", [True, False])
def test_op_contract(images, seen, device):
    torch.library.opcheck(torch.ops.fastsam_rwkv.attention.default, make(images, 3, 20, 2, 4, seen, device=device))


def test_gradients_are_those_of_the_reference():
    q, k, v, seen, heads = make((1, 2), 3, 4, 2, 3, dtype=torch.float64)
    tensors = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *t: attention(*t, seen, heads), tensors)


def test_what_does_not_fit_is_named():
    q, k, v, seen, heads = make((2, 2), 3, 4, 2, 3)
    for args in (
        (q, k, v[:, 1:], seen, heads), (q[:, :, 1:], k, v, seen, heads), (q, k, v, seen[1:], heads),
        (q, k, v, seen, 4), (q, k, v, seen.float(), heads), (q[0], k, v, seen, heads),
        (torch.cat([q, q]), k, v, None, heads),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"attention needs q \[1 or B, T, C\].* got "):
            attention(*args)
