import pytest
import torch
import torch.nn.functional as F
from guards import guarded_outputs, surrounded
from launch_configs import launch
from numerics import assert_as_accurate_as_eager

from fastsam_rwkv.triton_kernels.norm_shift_mix import norm_shift_mix, norm_shift_mix_ref, q_shift
from fastsam_rwkv.triton_kernels.operator import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: kernels cannot run")
SHAPES = [(1, 1, 1, 4), (2, 3, 5, 7), (1, 1, 6, 48), (1, 5, 1, 3), (2, 4, 4, 192), (2, 9, 6, 64), (1, 2, 3, 1024)]


def make(shape, J=3, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    C = shape[-1]
    x = torch.randn(shape, generator=g) * 3 + 5  # an offset mean, at which one-pass variance cancels
    weight, bias, mix = (
        torch.randn(C, generator=g),
        torch.randn(C, generator=g),
        torch.rand(J, C, generator=g) * 1.4 - 0.2,
    )
    x, *fixed = (surrounded(t.to(device, dtype)) for t in (x, weight, bias, mix))
    return (x, *(torch.nn.Parameter(t, requires_grad=False) for t in fixed), 1e-6)  # parameters are read early


def pixel_by_pixel(x, weight, bias, mix, eps):
    """Definition, one pixel and one channel group at a time."""
    B, H, W, C = x.shape
    n = F.layer_norm(x, (C,), weight, bias, eps)
    s, q = n.clone(), C // 4
    for y in range(H):
        for x_ in range(W):
            for quarter, (dy, dx) in enumerate([(0, -1), (0, 1), (-1, 0), (1, 0)]):
                channels = slice(quarter * q, (quarter + 1) * q)
                inside = 0 <= y + dy < H and 0 <= x_ + dx < W
                s[:, y, x_, channels] = n[:, y + dy, x_ + dx, channels] if inside else 0
    return torch.stack([n * m + s * (1 - m) for m in mix])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_is_the_definition(shape):
    args = make(shape, dtype=torch.float64)
    torch.testing.assert_close(norm_shift_mix_ref(*args), pixel_by_pixel(*args))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("J", [2, 3])
def test_kernel_is_as_accurate_as_eager(shape, J, dtype, device, monkeypatch):
    args = make(shape, J, dtype, device)
    with guarded_outputs(monkeypatch):
        got = launch(norm_shift_mix, *args)
    oracle = pixel_by_pixel(*(t.double() for t in args[:4]), args[4])
    assert_as_accurate_as_eager(got, norm_shift_mix_ref(*args), oracle)


@needs_triton
def test_strided_and_empty(device):
    x, *rest = make((2, 3, 4, 16), device=device)
    want = launch(norm_shift_mix, x, *rest)
    channels_first = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    torch.testing.assert_close(launch(norm_shift_mix, channels_first, *rest), want)
    wide = torch.cat([x, x * 0], dim=-1)[..., :16]
    torch.testing.assert_close(launch(norm_shift_mix, wide, *rest), want)
    assert launch(norm_shift_mix, x[:0], *rest).shape == (3, 0, 3, 4, 16)


@needs_triton
@pytest.mark.parametrize(
    ("shape", "message"),
    [((65536, 1, 1, 4), "a batch of at most 65535, got 65536"), ((1, 262141, 1, 4), "at most 262140 rows, got 262141")],
    ids=str,
)
def test_grid_limits_raise(shape, message, device):
    x, *rest = make((1, 1, 1, 4), device=device)
    with pytest.raises(ValueError, match=message):
        launch(norm_shift_mix, x.expand(shape), *rest)


def test_op_contract(device):
    torch.library.opcheck(torch.ops.fastsam_rwkv.norm_shift_mix.default, make((1, 2, 3, 8), device=device))


def test_gradients():
    *tensors, eps = make((1, 2, 3, 6), dtype=torch.float64)
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: norm_shift_mix(*t, eps), tensors)


def test_wrong_shapes_raise():
    x, weight, bias, mix, eps = make((1, 2, 3, 8))
    with pytest.raises(ValueError, match=r"\[3, 4\]"):
        norm_shift_mix(x, weight, bias, mix[:, :4], eps)
    with pytest.raises(ValueError, match=r"\[2, 3, 8\]"):
        norm_shift_mix(x[0], weight, bias, mix, eps)


def test_q_shift_takes_each_quarter_from_its_neighbor():
    H, W, C = 3, 4, 9
    x = torch.randn(2, H, W, C, generator=torch.Generator().manual_seed(1))
    y = q_shift(x)
    for c, (dy, dx) in enumerate([(0, -1)] * 2 + [(0, 1)] * 2 + [(-1, 0)] * 2 + [(1, 0)] * 2 + [(0, 0)]):
        for i in range(H):
            for j in range(W):
                inside = 0 <= i + dy < H and 0 <= j + dx < W
                want = x[:, i + dy, j + dx, c] if inside else torch.zeros(2)
                assert torch.equal(y[:, i, j, c], want)


@needs_triton
def test_mean_far_above_the_deviation(device):
    x, *rest = make((1, 3, 4, 192), device=device)
    args = (x + 1000, *rest)
    oracle = pixel_by_pixel(*(t.double() for t in args[:4]), args[4])
    assert_as_accurate_as_eager(launch(norm_shift_mix, *args), norm_shift_mix_ref(*args), oracle)
