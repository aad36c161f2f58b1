import pytest
import torch
from guards import guarded_outputs, surrounded
from launch_configs import config_of, launch
from numerics import assert_as_accurate_as_eager

from fastsam_rwkv.triton_kernels.attention import attention, attention_ref, choose_blocks
from fastsam_rwkv.triton_kernels.operator import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: kernels cannot run")
SMALL = dict.fromkeys(
    ("attention", "attention.float32"),
    {"BLOCK_T": 16, "BLOCK_S": 16, "PROGRAMS": 64, "num_warps": 1, "num_stages": 1},
)
# batches of q and of k, T, S, heads, width of a head
CASES = [
    ((1, 1), 1, 1, 1, 3),
    ((2, 2), 7, 7, 8, 32),
    ((2, 1), 7, 300, 8, 16),  # tokens to one shared map
    ((1, 3), 150, 9, 2, 16),  # one shared map to tokens
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
    """Definition in float64, one head at a time."""
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
    with guarded_outputs(monkeypatch):
        got = launch(attention, *args, settings={} if blocks == "default" else SMALL)
    assert_as_accurate_as_eager(got, attention_ref(*args), step_by_step(*args))


@needs_triton
@pytest.mark.parametrize("first", [0, 40, 90])
def test_single_visible_key_at_any_position(first, device):
    """Blocks and splits without a visible key do not count."""
    q, k, v, seen, heads = make((2, 1), 3, 97, 2, 16, device=device)
    seen[:] = False
    seen[0, first], seen[1, first + 5] = True, True
    got = launch(attention, q, k, v, seen, heads, settings=SMALL)
    want = torch.stack([v[0, first], v[0, first + 5]])[:, None].expand(-1, 3, -1)
    torch.testing.assert_close(got, want)


@needs_triton
def test_large_exponents(device):
    q, k, v, seen, heads = make((1, 1), 5, 90, 2, 16, device=device)
    args = (1000 * q, k, v, seen, heads)
    got = launch(attention, *args, settings=SMALL)
    torch.testing.assert_close(got.double(), step_by_step(*args), rtol=1e-4, atol=1e-4)


def test_keys_are_split_for_enough_programs():
    settings = {"attention": {"PROGRAMS": 132, "BLOCK_T": 128, "BLOCK_S": 256}}

    def splits(B, S):
        return choose_blocks(B, 8, S, 8, torch.float16, config_of("cpu", settings))["SPLITS"]

    assert [splits(1, 4096), splits(8, 4096), splits(9, 4096), splits(1, 300), splits(1, 512)] == [16, 2, 1, 1, 2]


@needs_triton
def test_strided_and_empty(device):
    q, k, v, seen, heads = make((2, 2), 4, 6, 2, 8, device=device)
    want = launch(attention, q, k, v, seen, heads)
    q_strided, k_strided, v_strided = (t.mT.contiguous().mT for t in (q, k, v))
    torch.testing.assert_close(launch(attention, q_strided, k_strided, v_strided, seen.T.contiguous().T, heads), want)
    assert launch(attention, q[:0], k[:1], v[:1], seen[:0], heads).shape == (0, 4, 16)
    assert launch(attention, q[:1], k[:0], v[:0], seen[:0], heads).shape == (0, 4, 16)


@pytest.mark.parametrize("images", [(2, 2), (1, 2), (2, 1)])
@pytest.mark.parametrize("seen", [True, False])
def test_op_contract(images, seen, device):
    torch.library.opcheck(torch.ops.fastsam_rwkv.attention.default, make(images, 3, 20, 2, 4, seen, device=device))


def test_gradients():
    q, k, v, seen, heads = make((1, 2), 3, 4, 2, 3, dtype=torch.float64)
    tensors = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *t: attention(*t, seen, heads), tensors)


def test_wrong_shapes_raise():
    q, k, v, seen, heads = make((2, 2), 3, 4, 2, 3)
    for args in (
        (q, k, v[:, 1:], seen, heads), (q[:, :, 1:], k, v, seen, heads), (q, k, v, seen[1:], heads),
        (q, k, v, seen, 4), (q, k, v, seen.float(), heads), (q[0], k, v, seen, heads),
        (torch.cat([q, q]), k, v, None, heads),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"attention needs q \[1 or B, T, C\].* got "):
            attention(*args)
