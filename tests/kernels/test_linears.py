import pytest
import torch
from guards import guarded_outputs, surrounded
from launch_configs import launch
from numerics import assert_as_accurate_as_eager

from fastsam_rwkv.triton_kernels.linears import linears, linears_ref
from fastsam_rwkv.triton_kernels.operator import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: kernels cannot run")
SETTINGS = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 1, "num_stages": 1}
SMALL = {"linears": SETTINGS, "linears.float32": SETTINGS}
# layers, own inputs, rows, K, N, rows of add, layers added to, ReLU
CASES = {
    "one": (1, False, 5, 24, 20, 0, 0, True),
    "queries, keys and values": (3, False, 14, 32, 32, 14, 2, False),
    "maps share places": (3, False, 30, 40, 16, 15, 2, False),
    "heads": (4, True, 3, 20, 33, 0, 0, True),
    "two blocks of rows": (2, False, 70, 16, 48, 7, 1, False),
}


def make(case, dtype=torch.float32, device="cpu", seed=0):
    J, own, M, K, N, A, added, relu = CASES[case]
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return surrounded((torch.randn(shape, generator=g) * scale).to(device, dtype))

    layers = [t for _ in range(J) for t in (normal(N, K, scale=K**-0.5), normal(N))]
    return (normal(J if own else 1, M, K), normal(A, K) if A else None, added, relu, *layers)


def step_by_step(x, add, added, relu, *layers):
    """Definition in float64, one layer at a time."""
    x, layers = x.double(), [t.double() for t in layers]
    ys = []
    for j, (weight, bias) in enumerate(zip(layers[::2], layers[1::2], strict=True)):
        rows = x[j % len(x)]
        if add is not None and j < added:
            rows = rows + add.double().repeat(len(rows) // len(add), 1)
        ys.append(rows @ weight.T + bias)
    y = torch.stack(ys)
    return y.clamp(min=0) if relu else y


@pytest.mark.parametrize("case", CASES)
def test_reference_is_the_definition(case):
    args = make(case, torch.float64)
    torch.testing.assert_close(linears_ref(*args), step_by_step(*args))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocks", ["default", "small"])
@pytest.mark.parametrize("case", CASES)
def test_kernel_is_as_accurate_as_eager(case, blocks, dtype, device, monkeypatch):
    args = make(case, dtype, device)
    with guarded_outputs(monkeypatch):
        got = launch(linears, *args, settings={} if blocks == "default" else SMALL)
    assert_as_accurate_as_eager(got, linears_ref(*args), step_by_step(*args))


@needs_triton
def test_strided_and_empty(device):
    x, *rest = make("heads", device=device)
    want = launch(linears, x, *rest)
    by_prompt = x.transpose(0, 1).contiguous()  # as tokens lie: a row for each head of a prompt
    torch.testing.assert_close(launch(linears, by_prompt.transpose(0, 1), *rest), want)
    torch.testing.assert_close(launch(linears, x.mT.contiguous().mT, *rest), want)
    assert launch(linears, x[:, :0], *rest).shape == (4, 0, 33)


@pytest.mark.parametrize("case", CASES)
def test_op_contract(case, device):
    torch.library.opcheck(torch.ops.fastsam_rwkv.linears.default, make(case, device=device))


def test_gradients():
    x, add, added, relu, *layers = make("queries, keys and values", torch.float64)
    tensors = [t.detach().clone().requires_grad_() for t in (x, add, *layers)]
    assert torch.autograd.gradcheck(lambda x, add, *layers: linears(x, add, added, relu, *layers), tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 14, 32)}, r"x \[2, 14, 32\]"),
        ({"add": torch.ones(5, 32)}, r"A that divides M.*add \[5, 32\]"),
        ({"added": 4}, "added 4"),
        ({"weight2": torch.ones(31, 32)}, r"\[31, 32\] and \[32\]"),
        ({"bias3": None}, r"J weights \[N, K\] with biases \[N\]"),
    ],
)
def test_wrong_arguments_raise(change, message):
    names = ("x", "add", "added", "relu", "weight1", "bias1", "weight2", "bias2", "weight3", "bias3")
    args = dict(zip(names, make("queries, keys and values"), strict=True))
    with pytest.raises(ValueError, match=message):
        linears_ref(**args | change)
