import math

import pytest
import torch
from guards import guarded_outputs, surrounded
from launch_configs import config_of, launch
from numerics import assert_as_accurate_as_eager

from fastsam_rwkv.triton_kernels.fused_linear import choose_blocks, fused_linear, fused_linear_ref
from fastsam_rwkv.triton_kernels.operator import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: kernels cannot run")
BLOCKS = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "BLOCKS": 1, "PARTS": 1, "num_warps": 1, "num_stages": 1}
SMALL = {"fused_linear": BLOCKS, "fused_linear.float32": BLOCKS}
SIDE_BY_SIDE = {"sms": 1}  # whole waves, so that a program has several blocks
FORMS = ["plain", "squared_relu", "residual", "gated", "gated_residual"]  # the model uses the second, third and last


def make(size, K, N, form, dtype=torch.float32, device="cpu", gate_K=None, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return surrounded((torch.randn(shape, generator=g) * scale).to(device, dtype))

    x, weight, gate_K = normal(*size, K), normal(N, K, scale=K**-0.5), gate_K or K // 2 + 1
    gate = [normal(*size, gate_K), normal(N, gate_K, scale=gate_K**-0.5)] if "gated" in form else [None, None]
    end = [normal(N), normal(*size, N)] if "residual" in form else [None, None]
    return (x, weight, form == "squared_relu", *gate, *end)


def formula(x, weight, squared_relu, gate_x, gate_weight, scale, residual):
    """Definition in float64."""
    x, weight, gate_x, gate_weight, scale, residual = (
        None if t is None else t.double() for t in (x, weight, gate_x, gate_weight, scale, residual)
    )
    y = torch.einsum("...k,nk->...n", x, weight)
    if squared_relu:
        y = torch.where(y > 0, y * y, 0)
    if gate_x is not None:
        y = y / (1 + torch.exp(-torch.einsum("...k,nk->...n", gate_x, gate_weight)))
    return y if residual is None else residual + scale * y


ENOUGH = 256  # values: the root mean square error of a dozen is random
SIZES = [((1,), 1, 6), ((2, 3), 7, 5), ((1, 5, 9), 33, 20), ((3, 17), 16, 65), ((70,), 48, 16)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("size", "K", "N"), SIZES)
def test_reference_is_the_definition(size, K, N, form):
    args = make(size, K, N, form, torch.float64)
    torch.testing.assert_close(fused_linear_ref(*args), formula(*args))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocks", ["default", "small"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("size", "K", "N"), SIZES)
def test_kernel_is_as_accurate_as_eager(size, K, N, form, blocks, dtype, device, monkeypatch):
    check_kernel(size, K, N, form, {} if blocks == "default" else SMALL, dtype, device, monkeypatch)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("form", ["residual", "gated", "gated_residual"])
@pytest.mark.parametrize(("size", "K", "N"), SIZES[-2:])
def test_columns_in_parts(size, K, N, form, parts, dtype, device, monkeypatch):
    blocks = BLOCKS | {"BLOCK_M": 32, "BLOCK_N": 64, "PARTS": parts, "num_warps": 4}
    settings = {"fused_linear": blocks, "fused_linear.float32": blocks}
    check_kernel(size, K, N, form, settings, dtype, device, monkeypatch)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("blocks", "parts"), [(2, 1), (2, 2), (3, 4)])
@pytest.mark.parametrize("form", FORMS)
def test_blocks_side_by_side(form, blocks, parts, dtype, device, monkeypatch):
    """Two programs per row of blocks; rows and K are no multiples of the blocks."""
    block_n = 64 if parts == 4 else 32
    settings = BLOCKS | {
        "BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_K": 32, "BLOCKS": blocks, "PARTS": parts, "num_warps": 4,
        "num_stages": 3,
    }  # fmt: skip
    settings = {"fused_linear": settings, "fused_linear.float32": settings}
    size, N = (3, 23), 2 * blocks * block_n
    config = config_of(device, settings, **SIDE_BY_SIDE)
    assert choose_blocks(math.prod(size), N, dtype, config)["BLOCKS"] == (blocks if config.arch in (0, 90) else 1)
    check_kernel(size, 70, N, form, settings, dtype, device, monkeypatch, SIDE_BY_SIDE)


def test_number_of_blocks_side_by_side():
    def blocks(M, N, wanted=3, arch=90):
        settings = {"fused_linear.large": BLOCKS | {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCKS": wanted}}
        return choose_blocks(M, N, torch.float16, config_of("cpu", settings, arch=arch, sms=132, large=0))["BLOCKS"]

    assert [blocks(65536, 384), blocks(65536, 1024), blocks(65536, 128), blocks(65536, 384, 1)] == [3, 2, 1, 1]
    assert [blocks(65536, 384, arch=arch) for arch in (80, 89, 100, 120)] == [1] * 4
    assert [blocks(M, 384) for M in (4096, 16384, 20480, 65536)] == [
        1,
        3,
        1,
        3,
    ]  # programs / 3: 32, 128, 160, 512
    assert blocks(16384 * 2, 256) == 2


def check_kernel(size, K, N, form, settings, dtype, device, monkeypatch, changes=None):
    draws = range(-(-ENOUGH // (math.prod(size) * N)))
    calls = [make(size, K, N, form, dtype, device, seed=seed) for seed in draws]
    with guarded_outputs(monkeypatch):
        results = [launch(fused_linear, *args, settings=settings, changes=changes) for args in calls]
    references, oracles = ([function(*args) for args in calls] for function in (fused_linear_ref, formula))
    assert_as_accurate_as_eager(*(torch.stack(column) for column in (results, references, oracles)))


@needs_triton
@pytest.mark.parametrize("C", [192, 384, 768, 1024])
@pytest.mark.parametrize("settings", ["usual", "for large outputs"])
def test_model_widths(settings, C, device):
    changes = SIDE_BY_SIDE | {"large": 0} if settings == "for large outputs" else {}
    for K, N, form in ((C, C, "residual"), (C, 2 * C, "squared_relu"), (2 * C, C, "gated_residual")):
        args = make((1, 35), K, N, form, torch.float16, device, gate_K=C)
        got = launch(fused_linear, *args, changes=changes)
        assert_as_accurate_as_eager(got, fused_linear_ref(*args), formula(*args))


@needs_triton
def test_few_rows_halve_the_blocks(device):
    config = config_of("cpu", {"fused_linear": BLOCKS | {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8}})
    for M, N, rows, warps in ((4096, 384, 128, 8), (1024, 192, 64, 4)):
        tiles = choose_blocks(M, N, torch.float16, config)
        assert (tiles["BLOCK_M"], tiles["num_warps"]) == (rows, warps)
    args = make((1, 200), 48, 192, "gated_residual", torch.float16, device)
    assert_as_accurate_as_eager(launch(fused_linear, *args), fused_linear_ref(*args), formula(*args))


@pytest.mark.parametrize(("arch", "parts"), [(0, 4), (80, 1), (89, 1), (90, 4), (100, 4), (120, 1)])
def test_parts_if_a_second_block_fits_on_the_sm(arch, parts):
    for block_n, expected in ((128, parts), (16, 1)):
        config = config_of("cpu", {"fused_linear": BLOCKS | {"BLOCK_N": block_n, "PARTS": 4}}, arch=arch)
        assert choose_blocks(1024, 128, torch.float16, config)["PARTS"] == expected


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy in the interpreter: 1 / inf is intended
@needs_triton
def test_large_gates_do_not_overflow(device):
    x, weight, *_ = make((4,), 8, 8, "plain", device=device)
    gate_x = torch.full_like(x, 100.0)
    gate_weight = torch.eye(8, device=device) * torch.tensor([[1.0], [-1.0]] * 4, device=device)
    got = launch(fused_linear, x, weight, False, gate_x, gate_weight)
    want = fused_linear_ref(x, weight, False, gate_x, gate_weight)
    torch.testing.assert_close(got, want)
    assert (got[:, 1::2].abs() < 1e-30).all() and got[:, ::2].abs().min() > 0


@needs_triton
def test_strided_and_empty(device):
    args = make((4, 6), 8, 8, "gated_residual", device=device)
    want = launch(fused_linear, *args)
    strided = [
        t.transpose(0, 1).contiguous().transpose(0, 1) if isinstance(t, torch.Tensor) and t.ndim > 1 else t
        for t in args
    ]
    torch.testing.assert_close(launch(fused_linear, *strided), want)
    x, weight, squared_relu, gate_x, gate_weight, scale, residual = args
    got = launch(fused_linear, x[:0], weight, squared_relu, gate_x[:0], gate_weight, scale, residual[:0])
    assert got.shape == (0, 6, 8)


@pytest.mark.parametrize("form", FORMS)
def test_op_contract(form, device):
    torch.library.opcheck(torch.ops.fastsam_rwkv.fused_linear.default, make((2, 3), 8, 5, form, device=device))


def test_gradients():
    x, weight, flag, *rest = make((2, 3), 4, 3, "gated_residual", torch.float64)
    tensors = [t.detach().clone().requires_grad_() for t in (x, weight, *rest)]
    assert torch.autograd.gradcheck(lambda x, w, *rest: fused_linear(x, w, flag, *rest), tensors)


def test_wrong_shapes_raise():
    x, weight, flag, gate_x, gate_weight, scale, residual = make((2, 3), 8, 5, "gated_residual")
    for broken in (
        (x[..., :7], weight, flag, gate_x, gate_weight, scale, residual),
        (x, weight, flag, gate_x, None, scale, residual),
        (x, weight, flag, gate_x, gate_weight[:, 1:], scale, residual),
        (x, weight, flag, gate_x, gate_weight, scale, residual[..., 1:]),
        (x, weight, flag, gate_x, gate_weight, None, residual),
    ):
        with pytest.raises(ValueError, match=r"fused_linear needs .* got x \[2, 3, [78]\]"):
            fused_linear(*broken)
