import pytest
import torch
import torch.nn.functional as F
from guards import guarded_outputs, surrounded
from launch_configs import launch
from numerics import assert_as_accurate_as_eager

from fastsam_rwkv.triton_kernels.operator import HAS_TRITON
from fastsam_rwkv.triton_kernels.upscale import upscale, upscale_ref

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: kernels cannot run")
SMALL = dict.fromkeys(("upscale", "upscale.float32"), {"BLOCK_M": 16, "BLOCK_C": 16, "num_warps": 1, "num_stages": 1})
CASES = [((1, 1, 1), 3, 20), ((2, 3, 5), 20, 7), ((1, 4, 6), 33, 16), ((1, 2, 9), 64, 40)]


def make(size, C, N, norm=True, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return surrounded((torch.randn(shape, generator=g) * scale).to(device, dtype))

    x, weight, bias = normal(*size, C), normal(4 * N, C, scale=C**-0.5), normal(N)
    return (x, weight, bias, *((normal(N), normal(N)) if norm else (None, None)), 1e-6)


def step_by_step(x, weight, bias, norm_weight, norm_bias, eps):
    """Definition in float64, as a transposed convolution."""
    x, weight, bias, norm_weight, norm_bias = (
        None if t is None else t.double() for t in (x, weight, bias, norm_weight, norm_bias)
    )
    kernel = weight.view(2, 2, len(bias), x.shape[3]).permute(3, 2, 0, 1)  # [in, out, 2, 2]
    y = F.conv_transpose2d(x.permute(0, 3, 1, 2), kernel, bias, stride=2).permute(0, 2, 3, 1)
    return F.gelu(y if norm_weight is None else F.layer_norm(y, bias.shape, norm_weight, norm_bias, eps))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("size", "C", "N"), CASES)
def test_reference_is_the_definition(size, C, N, norm):
    args = make(size, C, N, norm, torch.float64)
    torch.testing.assert_close(upscale_ref(*args), step_by_step(*args))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocks", ["default", "small"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("size", "C", "N"), CASES)
def test_kernel_is_as_accurate_as_eager(size, C, N, norm, blocks, dtype, device, monkeypatch):
    args = make(size, C, N, norm, dtype, device)
    with guarded_outputs(monkeypatch):
        got = launch(upscale, *args, settings={} if blocks == "default" else SMALL)
    assert_as_accurate_as_eager(got, upscale_ref(*args), step_by_step(*args))


@needs_triton
@pytest.mark.parametrize(("C", "N", "norm"), [(256, 64, True), (64, 32, False), (320, 64, True)])
def test_model_widths(C, N, norm, device):
    args = make((2, 2, 3), C, N, norm, torch.float16, device)
    assert_as_accurate_as_eager(launch(upscale, *args), upscale_ref(*args), step_by_step(*args))


@needs_triton
def test_strided_and_empty(device):
    x, *rest = make((2, 4, 6), 8, 12, device=device)
    want = launch(upscale, x, *rest)
    torch.testing.assert_close(launch(upscale, x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), *rest), want)
    rest[0] = rest[0].T.contiguous().T
    torch.testing.assert_close(launch(upscale, x, *rest), want)
    assert launch(upscale, x[:0], *rest).shape == (0, 8, 12, 12)


@pytest.mark.parametrize("norm", [True, False])
def test_op_contract(norm, device):
    torch.library.opcheck(torch.ops.fastsam_rwkv.upscale.default, make((2, 3, 4), 4, 6, norm, device=device))


def test_gradients():
    *args, eps = make((1, 2, 3), 2, 3, dtype=torch.float64)
    tensors = [t.detach().clone().requires_grad_() for t in args]
    assert torch.autograd.gradcheck(lambda *t: upscale(*t, eps), tensors)


def test_wrong_shapes_raise():
    x, weight, bias, *norm, eps = make((1, 2, 3), 4, 6)
    with pytest.raises(ValueError, match=r"weight \[4 \* N, C\].* weight \[23, 4\]"):
        upscale(x, weight[1:], bias, *norm, eps)
    with pytest.raises(ValueError, match=r"norm_weight \[6\], norm_bias None"):
        upscale(x, weight, bias, norm[0], None, eps)
    with pytest.raises(ValueError, match=r"x \[2, 3, 4\]"):
        upscale(x[0], weight, bias, *norm, eps)
