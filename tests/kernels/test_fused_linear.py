import math

import pytest
import torch
from guards import guarded_outputs, surrounded
from launch_configs import config_of, launch
from numerics import assert_as_accurate_as_eager

from fastsam_rwkv.triton_kernels.fused_linear import (
    choose_blocks,
    fused_linear,
    fused_linear_ref,
    gated_key,
    gated_key_ref,
)
from fastsam_rwkv.triton_kernels.operator import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: kernels cannot run")
BLOCKS = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "BLOCKS": 1, "PARTS": 1, "num_warps": 1, "num_stages": 1}
SMALL = {"fused_linear": BLOCKS, "fused_linear.float32": BLOCKS}
SIDE_BY_SIDE = {"sms": 1}  # whole waves, so that a program has several blocks
FORMS = ["residual", "gated"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def normal(g, *shape, scale=1.0, dtype=torch.float32, device="cpu"):
    return surrounded((torch.randn(shape, generator=g) * scale).to(device, dtype))


def make(size, K, N, form, dtype=torch.float32, device="cpu", seed=0):
    g, options = torch.Generator().manual_seed(seed), {"dtype": dtype, "device": device}
    x, weight = normal(g, *size, K, **options), normal(g, N, K, scale=K**-0.5, **options)
    gate = normal(g, *size, N, **options) if form == "gated" else None
    return x, weight, gate, normal(g, N, **options), normal(g, *size, N, **options)


def make_pair(size, K, N, G, dtype=torch.float32, device="cpu", seed=0):
    g, options = torch.Generator().manual_seed(seed), {"dtype": dtype, "device": device}
    x = normal(g, 2, *size, K, **options)
    return x, normal(g, N, K, scale=K**-0.5, **options), normal(g, G, K, scale=K**-0.5, **options)


def formula(x, weight, gate, scale, residual):
    """Definition in float64."""
    x, weight, gate, scale, residual = (None if t is None else t.double() for t in (x, weight, gate, scale, residual))
    y = torch.einsum("...k,nk->...n", x, weight)
    return residual + scale * (y if gate is None else gate * y)


def formula_pair(x, key_weight, gate_weight):
    """Definition in float64."""
    key, gate = (
        torch.einsum("...k,nk->...n", x[i].double(), w.double()) for i, w in enumerate((key_weight, gate_weight))
    )
    return torch.where(key > 0, key * key, 0), 1 / (1 + torch.exp(-gate))


ENOUGH = 256  # values: the root mean square error of a dozen is random
SIZES = [((1,), 1, 6), ((2, 3), 7, 5), ((1, 5, 9), 33, 20), ((3, 17), 16, 65), ((70,), 48, 16)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("size", "K", "N"), SIZES)
def test_reference_is_the_definition(size, K, N, form):
    args = make(size, K, N, form, torch.float64)
    torch.testing.assert_close(fused_linear_ref(*args), formula(*args))


@pytest.mark.parametrize(("size", "K", "N"), SIZES)
def test_reference_of_the_pair_is_the_definition(size, K, N):
    args = make_pair(size, K, N, N // 2, torch.float64)
    torch.testing.assert_close(gated_key_ref(*args), formula_pair(*args))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", ["default", "small"])
@pytest.mark.parametrize("form", [*FORMS, "pair"])
@pytest.mark.parametrize(("size", "K", "N"), SIZES)
def test_kernel_is_as_accurate_as_eager(size, K, N, form, blocks, dtype, device, monkeypatch):
    check_kernel(size, K, N, form, {} if blocks == "default" else SMALL, dtype, device, monkeypatch)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("size", "K", "N"), SIZES[-2:])
def test_columns_in_parts(size, K, N, form, parts, dtype, device, monkeypatch):
    blocks = BLOCKS | {"BLOCK_M": 32, "BLOCK_N": 64, "PARTS": parts, "num_warps": 4}
    settings = {"fused_linear": blocks, "fused_linear.float32": blocks}
    check_kernel(size, K, N, form, settings, dtype, device, monkeypatch)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("blocks", "parts"), [(2, 1), (2, 2), (3, 4)])
@pytest.mark.parametrize("form", [*FORMS, "pair"])
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
    widths = (N, N // 2) if form == "pair" else (N,)
    assert choose_blocks(math.prod(size), widths, dtype, config)["BLOCKS"] == (blocks if config.arch in (0, 90) else 1)
    check_kernel(size, 70, N, form, settings, dtype, device, monkeypatch, SIDE_BY_SIDE)


def test_number_of_blocks_side_by_side():
    def blocks(M, *widths, wanted=3, arch=90):
        settings = {"fused_linear.large": BLOCKS | {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCKS": wanted}}
        config = config_of("cpu", settings, arch=arch, sms=132, large=0)
        return choose_blocks(M, widths, torch.float16, config)["BLOCKS"]

    assert [blocks(65536, 384), blocks(65536, 1024), blocks(65536, 128), blocks(65536, 384, wanted=1)] == [3, 2, 1, 1]
    assert [blocks(65536, 768, 384), blocks(65536, 1024, 512), blocks(65536, 512, 384)] == [3, 2, 1]
    assert [blocks(65536, 384, arch=arch) for arch in (80, 89, 100, 120)] == [1] * 4
    assert [blocks(M, 384) for M in (4096, 16384, 20480, 65536)] == [1, 3, 1, 3]  # programs / 3: 32, 128, 160, 512
    assert blocks(16384 * 2, 256) == 2


def check_kernel(size, K, N, form, settings, dtype, device, monkeypatch, changes=None):
    draws = range(-(-ENOUGH // (math.prod(size) * max(1, N // 2))))
    if form == "pair":
        calls = [make_pair(size, K, N, max(1, N // 2), dtype, device, seed) for seed in draws]
        functions = (gated_key, gated_key_ref, formula_pair)
    else:
        calls = [make(size, K, N, form, dtype, device, seed) for seed in draws]
        functions = (fused_linear, fused_linear_ref, formula)
    operator, *others = functions
    with guarded_outputs(monkeypatch):
        results = [launch(operator, *args, settings=settings, changes=changes) for args in calls]
    assert_pairs_as_accurate(results, *([function(*args) for args in calls] for function in others))


def assert_pairs_as_accurate(*columns):
    """Compare results, references and oracles of several calls, output by output."""
    outputs = [[(y,) if isinstance(y, torch.Tensor) else y for y in column] for column in columns]
    for place in range(len(outputs[0][0])):
        assert_as_accurate_as_eager(*(torch.stack([y[place] for y in column]) for column in outputs))


@needs_triton
@pytest.mark.parametrize("C", [192, 384, 768, 1024])
@pytest.mark.parametrize("settings", ["usual", "for large outputs"])
def test_model_widths(settings, C, device):
    changes = SIDE_BY_SIDE | {"large": 0} if settings == "for large outputs" else {}
    for K, form in ((C, "residual"), (2 * C, "gated")):
        args = make((1, 35), K, C, form, torch.float16, device)
        got = launch(fused_linear, *args, changes=changes)
        assert_as_accurate_as_eager(got, fused_linear_ref(*args), formula(*args))
    args = make_pair((1, 35), C, 2 * C, C, torch.float16, device)
    got = launch(gated_key, *args, changes=changes)
    assert_pairs_as_accurate([got], [gated_key_ref(*args)], [formula_pair(*args)])


@needs_triton
def test_few_rows_halve_the_blocks(device):
    config = config_of("cpu", {"fused_linear": BLOCKS | {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8}})
    for M, N, rows, warps in ((4096, 384, 128, 8), (1024, 192, 64, 4)):
        tiles = choose_blocks(M, (N,), torch.float16, config)
        assert (tiles["BLOCK_M"], tiles["num_warps"]) == (rows, warps)
    args = make((1, 200), 48, 192, "gated", torch.float16, device)
    assert_as_accurate_as_eager(launch(fused_linear, *args), fused_linear_ref(*args), formula(*args))


@pytest.mark.parametrize(("arch", "parts"), [(0, 4), (80, 1), (89, 1), (90, 4), (100, 4), (120, 1)])
def test_parts_if_a_second_block_fits_on_the_sm(arch, parts):
    for block_n, expected in ((128, parts), (16, 1)):
        config = config_of("cpu", {"fused_linear": BLOCKS | {"BLOCK_N": block_n, "PARTS": 4}}, arch=arch)
        assert choose_blocks(1024, (128,), torch.float16, config)["PARTS"] == expected


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy in the interpreter: 1 / inf is intended
@needs_triton
def test_large_gates_do_not_overflow(device):
    x = torch.full((2, 4, 8), 100.0, device=device)
    signs = torch.eye(8, device=device) * torch.tensor([[1.0], [-1.0]] * 4, device=device)
    key, gate = launch(gated_key, x, signs, signs)
    torch.testing.assert_close((key, gate), gated_key_ref(x, signs, signs))
    assert (gate[:, 1::2] < 1e-30).all() and (gate[:, ::2] == 1).all()


@needs_triton
def test_strided_and_empty(device):
    def strided(t):
        return t.transpose(0, 1).contiguous().transpose(0, 1) if isinstance(t, torch.Tensor) and t.ndim > 1 else t

    args, pair = make((4, 6), 8, 8, "gated", device=device), make_pair((4, 6), 8, 8, 4, device=device)
    torch.testing.assert_close(launch(fused_linear, *map(strided, args)), launch(fused_linear, *args))
    torch.testing.assert_close(launch(gated_key, *map(strided, pair)), launch(gated_key, *pair))
    x, weight, gate, scale, residual = args
    assert launch(fused_linear, x[:0], weight, gate[:0], scale, residual[:0]).shape == (0, 6, 8)
    key, gate = launch(gated_key, pair[0][:, :0], *pair[1:])
    assert (key.shape, gate.shape) == ((0, 6, 8), (0, 6, 4))


@pytest.mark.parametrize("form", FORMS)
def test_op_contract(form, device):
    torch.library.opcheck(torch.ops.fastsam_rwkv.fused_linear.default, make((2, 3), 8, 5, form, device=device))


def test_op_contract_of_the_pair(device):
    torch.library.opcheck(torch.ops.fastsam_rwkv.gated_key.default, make_pair((2, 3), 8, 5, 4, device=device))


def test_gradients():
    args = [t.detach().clone().requires_grad_() for t in make((2, 3), 4, 3, "gated", torch.float64)]
    assert torch.autograd.gradcheck(fused_linear, args)
    pair = [t.detach().clone().requires_grad_() for t in make_pair((2, 3), 4, 3, 2, torch.float64)]
    assert torch.autograd.gradcheck(gated_key, pair)


def test_wrong_shapes_raise():
    x, weight, gate, scale, residual = make((2, 3), 8, 5, "gated")
    for broken in (
        (x[..., :7], weight, gate, scale, residual),
        (x, weight, gate[..., 1:], scale, residual),
        (x, weight, gate[:1], scale, residual),
        (x, weight, gate, scale[1:], residual),
        (x, weight, gate, scale, residual[..., 1:]),
    ):
        with pytest.raises(ValueError, match=r"fused_linear needs .* got x \[2, 3, [78]\]"):
            fused_linear(*broken)
    x, key_weight, gate_weight = make_pair((3,), 8, 5, 4)
    for broken in ((x[:1], key_weight, gate_weight), (x, key_weight[:, 1:], gate_weight), (x, key_weight, scale)):
        with pytest.raises(ValueError, match=r"gated_key needs x \[2, ..., K\].* got x \[[12], 3, 8\]"):
            gated_key(*broken)
