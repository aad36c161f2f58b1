import pytest
import torch
import torch.nn.functional as F
from guards import guarded_outputs, surrounded
from launch_configs import launch
from numerics import assert_as_accurate_as_eager

from fastsam_rwkv.triton_kernels.conv_norm import conv_norm, conv_norm_ref
from fastsam_rwkv.triton_kernels.operator import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: kernels cannot run")
BLOCKS = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_C": 16, "WIDE_M": 16, "CACHED": 0, "num_warps": 1, "num_stages": 1}
SMALL = {"conv_norm": BLOCKS, "conv_norm.float32": BLOCKS}
IN_STAGES = BLOCKS | {"BLOCK_M": 32, "CACHED": 1, "num_warps": 4, "num_stages": 3}  # copies of x through L1
SETTINGS = {"default": {}, "small": SMALL, "cached": {"conv_norm": IN_STAGES, "conv_norm.float32": IN_STAGES}}


def make(size, C, N, k=3, stride=1, parts="", dtype=torch.float32, device="cpu", seed=0):
    """Make arguments with `parts` of bias, in_norm, add, norm, gelu; capitals: shared by the batch."""
    g = torch.Generator().manual_seed(seed)
    B, H, W = size
    out = ((H - 1) // stride + 1, (W - 1) // stride + 1, N)

    def normal(*shape, scale=1.0, mean=0.0):
        return surrounded((torch.randn(shape, generator=g) * scale + mean).to(device, dtype))

    wanted = parts.split()

    def pair(name, width):
        return (normal(width, mean=1.0), normal(width)) if name in wanted else (None, None)

    def map_(name):
        return normal(B, *out) if name in wanted else normal(1, *out) if name.upper() in wanted else None

    x, weight = normal(*size, C, mean=2.0), normal(N, C, k, k, scale=(C * k * k) ** -0.5)
    bias, in_norm, norm = normal(N) if "bias" in wanted else None, pair("in_norm", C), pair("norm", N)
    return (x, weight, bias, *in_norm, map_("add"), *norm, stride, "gelu" in wanted, 1e-6)


def as_double(args):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in args]


def step_by_step(x, weight, bias, in_w, in_b, add, norm_w, norm_b, stride, activate, eps):
    """Definition with an explicit sum over taps."""
    if in_w is not None:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt() * in_w + in_b
    B, H, W, _ = x.shape
    k = weight.shape[2]
    padded = F.pad(x, (0, 0, k // 2, k // 2, k // 2, k // 2))
    y = 0
    for i in range(k):
        for j in range(k):
            y = y + padded[:, i : i + H : stride, j : j + W : stride] @ weight[:, :, i, j].T
    y = y if bias is None else y + bias
    y = y if add is None else y + add
    if norm_w is not None:
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + eps).sqrt() * norm_w + norm_b
    return 0.5 * y * (1 + torch.erf(y / 2**0.5)) if activate else y


CASES = {
    "one pixel": dict(size=(1, 1, 1), C=3, N=5, parts="bias norm gelu"),
    "odd": dict(size=(2, 3, 5), C=17, N=20, parts="bias"),
    "stride 2, odd": dict(size=(2, 5, 3), C=6, N=9, stride=2, parts="in_norm bias"),
    "patch": dict(size=(1, 4, 6), C=40, N=70, stride=2, parts="in_norm bias"),
    "1x1": dict(size=(1, 3, 4), C=33, N=24, k=1, parts="norm"),
    "neck 1x1": dict(size=(1, 3, 4), C=33, N=24, k=1, parts="in_norm norm"),
    "neck 3x3": dict(size=(1, 3, 4), C=24, N=24, parts="norm"),
    "projection": dict(size=(2, 3, 3), C=8, N=16, parts="bias norm gelu"),
    "mix": dict(size=(3, 2, 3), C=8, N=16, parts="bias ADD norm gelu"),
    "mix out": dict(size=(3, 2, 3), C=16, N=8, parts="bias"),
    "all": dict(size=(2, 3, 2), C=8, N=12, parts="bias in_norm add norm gelu"),
    "1x1 stride 2": dict(size=(1, 3, 5), C=8, N=12, k=1, stride=2, parts="bias in_norm"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reference_is_the_definition(case):
    args = make(**case, dtype=torch.float64)
    torch.testing.assert_close(conv_norm_ref(*args), step_by_step(*args))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel_is_as_accurate_as_eager(case, settings, dtype, device, monkeypatch):
    args = make(**case, dtype=dtype, device=device)
    with guarded_outputs(monkeypatch):
        got = launch(conv_norm, *args, settings=settings)
    assert_as_accurate_as_eager(got, conv_norm_ref(*args), step_by_step(*as_double(args)))


@needs_triton
@pytest.mark.parametrize(("C", "N", "k"), [(192, 256, 1), (256, 256, 3), (320, 1024, 3)])
def test_model_widths(C, N, k, device):
    parts = {1: "in_norm norm", 3: "norm" if N == 256 else "in_norm bias"}[k]
    args = make((1, 2, 2), C, N, k, parts=parts, dtype=torch.float16, device=device)
    assert_as_accurate_as_eager(launch(conv_norm, *args), conv_norm_ref(*args), step_by_step(*as_double(args)))


@needs_triton
def test_layouts_and_empty(device):
    x, weight, *rest = make((2, 4, 6), 8, 8, parts="bias", device=device)
    want = launch(conv_norm, x, weight, *rest)
    channels_first = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    channels_last = weight.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(launch(conv_norm, channels_first, channels_last, *rest), want)
    assert launch(conv_norm, x[:0], weight, *rest).shape == (0, 4, 6, 8)


def test_op_contract(device):
    torch.library.opcheck(
        torch.ops.fastsam_rwkv.conv_norm.default,
        make((2, 3, 4), 4, 6, parts="bias in_norm ADD norm gelu", device=device),
    )
    torch.library.opcheck(torch.ops.fastsam_rwkv.conv_norm.default, make((1, 3, 4), 4, 6, stride=2, device=device))


def test_gradients():
    args = make((1, 2, 3), 2, 3, parts="bias in_norm ADD norm gelu", dtype=torch.float64)
    tensors = [t.detach().clone().requires_grad_() for t in args if isinstance(t, torch.Tensor)]
    assert torch.autograd.gradcheck(lambda *t: conv_norm(*t, *args[8:]), tensors)


def test_wrong_arguments_raise():
    x, weight, *rest = make((1, 3, 4), 4, 6)
    with pytest.raises(ValueError, match=r"\[6, 3, 3, 3\]"):
        conv_norm(x, weight[:, :3], *rest)
    with pytest.raises(ValueError, match="stride 1 or 2, got 3"):
        conv_norm(x, weight, *rest[:6], 3, False, 1e-6)
    with pytest.raises(ValueError, match=r"add must be \[1, 3, 4, 6\]"):
        conv_norm(x, weight, *rest[:3], torch.zeros(1, 3, 4, 5), *rest[4:])
