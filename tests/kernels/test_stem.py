import pytest
import torch
import torch.nn.functional as F
from guards import guarded_outputs, surrounded
from launch_configs import launch
from numerics import assert_as_accurate_as_eager

from fastsam_rwkv.triton_kernels.operator import HAS_TRITON
from fastsam_rwkv.triton_kernels.stem import stem, stem_ref

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: kernels cannot run")
SMALL = dict.fromkeys(("stem", "stem.float32"), {"VALUES": 256, "num_warps": 1})
MEAN, STD = (123.0, 116.5, 104.25), (58.0, 57.0, 56.0)


def make(size, N, H, W, kind, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return surrounded((torch.randn(shape, generator=g) * scale).to(device, dtype))

    if kind == "uint8":
        pixels = torch.randint(0, 256, (*size, 3), generator=g, dtype=torch.uint8).to(device)
    else:
        pixels = normal(*size, 3)
    weights = [normal(N, 3, 3, 3, scale=27**-0.5), normal(N), normal(N), normal(N)]
    weights += [normal(N, N, 3, 3, scale=(9 * N) ** -0.5), normal(N)]
    return (pixels, MEAN, STD, *weights, H, W, 1e-6)


def step_by_step(pixels, mean, std, w1, b1, nw, nb, w2, b2, H, W, eps):
    """Definition in float64, channels first."""
    x = pixels.permute(0, 3, 1, 2).double()
    if pixels.dtype == torch.uint8:
        x = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    padded = x.new_zeros(len(x), 3, H, W)
    padded[:, :, : x.shape[2], : x.shape[3]] = x
    w1, b1, nw, nb, w2, b2 = (t.double() for t in (w1, b1, nw, nb, w2, b2))
    y = F.conv2d(padded, w1, b1, stride=2, padding=1).permute(0, 2, 3, 1)
    y = F.gelu(F.layer_norm(y, (len(w1),), nw, nb, eps)).permute(0, 3, 1, 2)
    return F.conv2d(y, w2, b2, padding=1).permute(0, 2, 3, 1)


CASES = [((1, 1, 1), 4, 2, 2), ((2, 3, 5), 7, 4, 6), ((1, 6, 4), 20, 6, 4), ((1, 5, 8), 33, 10, 8)]


@pytest.mark.parametrize("kind", ["uint8", "normalized"])
@pytest.mark.parametrize(("size", "N", "H", "W"), CASES)
def test_reference_is_the_definition(size, N, H, W, kind):
    args = make(size, N, H, W, kind, torch.float64)
    rtol = 1e-5 if kind == "uint8" else 1e-7  # uint8 is normalized in float32
    torch.testing.assert_close(stem_ref(*args), step_by_step(*args), rtol=rtol, atol=rtol)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocks", ["default", "small"])
@pytest.mark.parametrize("kind", ["uint8", "normalized"])
@pytest.mark.parametrize(("size", "N", "H", "W"), CASES)
def test_kernel_is_as_accurate_as_eager(size, N, H, W, kind, blocks, dtype, device, monkeypatch):
    args = make(size, N, H, W, kind, dtype, device)
    with guarded_outputs(monkeypatch):
        got = launch(stem, *args, settings={} if blocks == "default" else SMALL)
    assert_as_accurate_as_eager(got, stem_ref(*args), step_by_step(*args))


@pytest.mark.parametrize("kind", ["uint8", "normalized"])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (6, 8), (5, 2)])
def test_pixels_beyond_the_size_are_padding(size, kind, device):
    pixels, *rest = make((2, 6, 8), 7, 6, 8, kind, device=device)
    h, w = size
    whole, size = pixels[:, :h, :w], torch.tensor(size, dtype=torch.int32, device=device)
    torch.testing.assert_close(stem_ref(pixels, *rest, size), stem_ref(whole, *rest))
    if HAS_TRITON:
        torch.testing.assert_close(launch(stem, pixels, *rest, size), launch(stem, whole, *rest), rtol=0, atol=0)


@needs_triton
@pytest.mark.parametrize("N", [32, 64, 128, 160])
def test_model_widths(N, device):
    args = make((1, 6, 10), N, 6, 10, "uint8", torch.float16, device)
    assert_as_accurate_as_eager(launch(stem, *args), stem_ref(*args), step_by_step(*args))


@needs_triton
def test_strided_and_empty(device):
    pixels, *rest = make((2, 4, 6), 8, 4, 6, "uint8", device=device)
    want = launch(stem, pixels, *rest)
    channels_first = pixels.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    torch.testing.assert_close(launch(stem, channels_first, *rest), want)
    channels_last = [t.contiguous(memory_format=torch.channels_last) if getattr(t, "ndim", 0) == 4 else t for t in rest]
    torch.testing.assert_close(launch(stem, pixels, *channels_last), want)
    assert launch(stem, pixels[:0], *rest).shape == (0, 2, 3, 8)


@pytest.mark.parametrize("kind", ["uint8", "normalized"])
def test_op_contract(kind, device):
    torch.library.opcheck(torch.ops.fastsam_rwkv.stem.default, make((2, 3, 4), 4, 4, 6, kind, device=device))


def test_gradients():
    pixels, mean, std, *weights, H, W, eps = make((1, 3, 2), 3, 4, 2, "normalized", torch.float64)
    tensors = [t.detach().clone().requires_grad_() for t in (pixels, *weights)]
    assert torch.autograd.gradcheck(lambda p, *w: stem(p, mean, std, *w, H, W, eps), tensors)


def test_wrong_arguments_raise():
    args = list(make((1, 3, 4), 4, 4, 4, "uint8"))
    with pytest.raises(ValueError, match="3x4 pixels to an even size, got 2x4"):
        stem(*args[:9], 2, 4, 1e-6)
    with pytest.raises(ValueError, match="even size, got 5x4"):
        stem(*args[:9], 5, 4, 1e-6)
    for size in (torch.zeros(3, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"size \[2\] int32, got"):
            stem(*args, size)
    with pytest.raises(TypeError, match="uint8 or of the weights' torch.float32, got torch.float16"):
        stem(args[0].half(), *args[1:])
    with pytest.raises(ValueError, match=r"pixels \[B, h, w, 3\]"):
        stem(args[0][0], *args[1:])
