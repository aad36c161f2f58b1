import pytest
import torch
import torch.nn.functional as F
from guards import guarded_outputs, surrounded
from launch_configs import launch
from numerics import assert_as_accurate_as_eager

from fastsam_rwkv.triton_kernels.mask_product import mask_product, mask_product_ref
from fastsam_rwkv.triton_kernels.operator import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: kernels cannot run")
SMALL = dict.fromkeys(("mask_product", "mask_product.float32"), {"BLOCK_P": 16, "num_warps": 1, "num_stages": 1})
# prompts, masks, height, width, C, K
CASES = [(1, 1, 4, 6, 32, 64), (2, 3, 5, 7, 20, 24), (3, 4, 1, 9, 8, 16), (1, 17, 6, 1, 16, 8), (1, 1, 1, 1, 5, 3)]


def make(B, n, H, W, C, K, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return surrounded((torch.randn(shape, generator=g) * scale).to(device, dtype))

    conv = normal(C, K, 3, 3, scale=(9 * K) ** -0.5)
    return normal(B, n, C), normal(B, H, W, C), normal(B, H, W, K), conv, normal(C)


def step_by_step(weights, m, x, conv_weight, conv_bias):
    """Definition in float64, with the convolution's output."""
    weights, m, x, conv_weight, conv_bias = (t.double() for t in (weights, m, x, conv_weight, conv_bias))
    y = m.permute(0, 3, 1, 2) + F.conv2d(x.permute(0, 3, 1, 2), conv_weight, conv_bias, padding=1)
    return torch.einsum("bnc,bchw->bnhw", weights, y)


@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_reference_is_the_definition(sizes):
    args = make(*sizes, torch.float64)
    torch.testing.assert_close(mask_product_ref(*args), step_by_step(*args), rtol=1e-5, atol=1e-5)  # float32 inside


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocks", ["default", "small"])
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_kernel_is_as_accurate_as_eager(sizes, blocks, dtype, device, monkeypatch):
    args = make(*sizes, dtype, device)
    with guarded_outputs(monkeypatch):
        got = launch(mask_product, *args, settings={} if blocks == "default" else SMALL)
    assert_as_accurate_as_eager(got, mask_product_ref(*args), step_by_step(*args))


@needs_triton
def test_strided_and_empty(device):
    weights, m, x, conv, bias = make(2, 3, 5, 7, 20, 24, device=device)
    want = launch(mask_product, weights, m, x, conv, bias)
    got = launch(
        mask_product,
        weights.transpose(0, 1).contiguous().transpose(0, 1),
        m.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        conv.contiguous(memory_format=torch.channels_last),
        bias,
    )
    torch.testing.assert_close(got, want)
    assert launch(mask_product, weights[:0], m[:0], x[:0], conv, bias).shape == (0, 3, 5, 7)


def test_op_contract(device):
    torch.library.opcheck(torch.ops.fastsam_rwkv.mask_product.default, make(2, 3, 5, 7, 20, 24, device=device))


def test_gradients():
    tensors = [t.detach().clone().requires_grad_() for t in make(1, 2, 3, 4, 3, 2, torch.float64)]
    want = torch.autograd.grad(step_by_step(*tensors).square().sum(), tensors)
    for got, right in zip(torch.autograd.grad(mask_product(*tensors).square().sum(), tensors), want, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)  # float32 inside


def test_wrong_shapes_raise():
    weights, m, x, conv, bias = make(2, 3, 5, 7, 20, 24)
    with pytest.raises(ValueError, match=r"conv_weight \[20, 23, 3, 3\]"):
        mask_product_ref(weights, m, x, conv[:, 1:], bias)
    with pytest.raises(ValueError, match=r"weights \[1, 3, 20\]"):
        mask_product_ref(weights[:1], m, x, conv, bias)
