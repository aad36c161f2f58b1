import pytest
import torch
import torch.nn.functional as F
from guards import guarded_outputs, surrounded
from launch_configs import config_of, launch
from numerics import INTERPRETED, INTERPRETER_TRUNCATES, assert_as_accurate_as_eager, rel_rms

from fastsam_rwkv.triton_kernels._triton import HAS_TRITON, gelu, tl, triton
from fastsam_rwkv.triton_kernels.mbconv import choose_blocks, mbconv, mbconv_ref

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: kernels cannot run")
BLOCKS = {
    "BLOCK_M": 16,
    "BLOCK_N": 16,
    "BLOCK_C": 16,
    "BLOCK_D": 16,
    "PIXELS": 2,
    "LINES": 2,
    "num_warps": 1,
    "num_stages": 1,
}
SMALL = {f"mbconv_{kernel}{suffix}": BLOCKS for kernel in ("expand", "project") for suffix in ("", ".float32")}
SINGLE = {name: blocks | {"PIXELS": 1, "LINES": 1} for name, blocks in SMALL.items()}


@triton.jit
def _gelu_kernel(x_ptr, y_ptr, N, FLOAT: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N, other=0.0)
    if FLOAT:
        x = x.to(tl.float32)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    tl.store(y_ptr + offs, gelu(x, dtype).to(dtype), mask=offs < N)


def gelu_of(x, of_float=True):
    y = torch.empty_like(x)
    _gelu_kernel[(triton.cdiv(len(x), 4096),)](x, y, len(x), of_float, 4096)
    return y


def make(size, C, N, stride, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    D = 4 * N

    def normal(*shape, scale=1.0):
        return surrounded((torch.randn(shape, generator=g) * scale).to(device, dtype))

    x = surrounded((torch.randn(*size, C, generator=g) * 2 + 3).to(device, dtype))
    weights = [normal(C), normal(C), normal(D, C, scale=C**-0.5), normal(D), normal(D, 1, 3, 3, scale=0.3), normal(D)]
    weights += [normal(N, D, scale=D**-0.5), normal(N)]
    shortcut = [None, None] if C == N else [normal(N, C, scale=C**-0.5), normal(N)]
    return (x, *weights, *shortcut, stride, 1e-6)


def as_double(args):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in args]


def step_by_step(x, nw, nb, ew, eb, dw, db, pw, pb, sw, sb, stride, eps):
    """Definition with PyTorch's own operators, channels first."""
    h = F.gelu(F.layer_norm(x, x.shape[-1:], nw, nb, eps) @ ew.T + eb).permute(0, 3, 1, 2)
    h = F.gelu(F.conv2d(h, dw, db, stride, padding=1, groups=len(dw)))
    y = F.conv2d(h, pw[:, :, None, None], pb)
    short = x.permute(0, 3, 1, 2)
    if stride == 2:
        ones = torch.ones_like(short)
        total, count = (F.avg_pool2d(t, 3, 2, padding=1, divisor_override=1) for t in (short, ones))
        short = total / count
    if sw is not None:
        short = F.conv2d(short, sw[:, :, None, None], sb)
    return (y + short).permute(0, 2, 3, 1)


CASES = [
    ((1, 1, 1), 4, 4, 1),
    ((2, 3, 9), 6, 6, 1),
    ((2, 3, 5), 7, 7, 1),
    ((1, 4, 6), 5, 9, 2),
    ((2, 2, 2), 6, 6, 2),
    ((1, 6, 10), 20, 36, 2),
    ((1, 4, 4), 32, 32, 1),
]


@pytest.mark.parametrize(("size", "C", "N", "stride"), CASES)
def test_reference_is_the_definition(size, C, N, stride):
    args = make(size, C, N, stride, torch.float64)
    torch.testing.assert_close(mbconv_ref(*args), step_by_step(*args))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocks", ["default", "small", "single pixels"])
@pytest.mark.parametrize(("size", "C", "N", "stride"), CASES)
def test_kernels_are_as_accurate_as_eager(size, C, N, stride, blocks, dtype, device, monkeypatch):
    args = make(size, C, N, stride, dtype, device)
    with guarded_outputs(monkeypatch):
        got = launch(mbconv, *args, settings={"default": {}, "small": SMALL, "single pixels": SINGLE}[blocks])
    assert_as_accurate_as_eager(got, mbconv_ref(*args), step_by_step(*as_double(args)))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("C", "N", "stride"), [(6, 6, 1), (20, 20, 2), (20, 36, 2)])
def test_bias_of_the_input(C, N, stride, dtype, device):
    args = make((1, 4, 6), C, N, stride, dtype, device)
    bias = args[1] + 1
    as_oracle = as_double(args)
    as_oracle[0] = as_oracle[0] + bias.double()
    got = launch(mbconv, *args, bias)
    torch.testing.assert_close(mbconv_ref(*as_double(args), bias.double()), step_by_step(*as_oracle))
    assert_as_accurate_as_eager(got, mbconv_ref(*args, bias), step_by_step(*as_oracle))


@needs_triton
@pytest.mark.parametrize("blocks", ["default", "small"])
@pytest.mark.parametrize("programs", [1, 2])
def test_programs_with_several_blocks_of_columns(programs, blocks, device, monkeypatch):
    """One program computes 144 columns, or two compute 128 and 16 (small blocks: 96 and 48)."""
    monkeypatch.setattr("fastsam_rwkv.triton_kernels.mbconv.ENOUGH_PROGRAMS", programs)
    args = make((1, 2, 4), 20, 36, 2, torch.float16, device)
    with guarded_outputs(monkeypatch):
        got = launch(mbconv, *args, settings={} if blocks == "default" else SMALL)
    assert_as_accurate_as_eager(got, mbconv_ref(*args), step_by_step(*as_double(args)))


@needs_triton
@pytest.mark.parametrize(("C", "N"), [(32, 64), (64, 128), (160, 320)])
def test_model_widths(C, N, device):
    args = make((1, 2, 4), C, N, 2, torch.float16, device)
    assert_as_accurate_as_eager(launch(mbconv, *args), mbconv_ref(*args), step_by_step(*as_double(args)))


@needs_triton
def test_strided_and_empty(device):
    x, *rest = make((2, 4, 6), 8, 8, 1, device=device)
    want = launch(mbconv, x, *rest)
    channels_first = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    torch.testing.assert_close(launch(mbconv, channels_first, *rest), want)
    assert launch(mbconv, x[:0], *rest).shape == (0, 4, 6, 8)


@pytest.mark.parametrize("case", [((1, 2, 4), 4, 4, 1), ((1, 2, 4), 4, 6, 2)])
def test_op_contract(case, device):
    torch.library.opcheck(torch.ops.fastsam_rwkv.mbconv.default, make(*case, device=device))


def test_gradients():
    *tensors, stride, eps = make((1, 2, 2), 2, 3, 2, torch.float64)
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: mbconv(*t, stride, eps), tensors)


def test_wrong_arguments_raise():
    args = list(make((1, 3, 4), 4, 6, 2))
    with pytest.raises(ValueError, match="stride 2 on 3x4"):
        mbconv(*args)
    for stride, shortcut in ((2, (None, None)), (1, args[9:11])):
        with pytest.raises(ValueError, match=f"Got stride {stride}, .*shortcut"):
            mbconv(*args[:9], *shortcut, stride, 1e-6)
    with pytest.raises(ValueError, match=r"x \[3, 4, 4\]"):
        mbconv(args[0][0], *args[1:])


@needs_triton
def test_more_lines_than_a_grid_holds_raise(device, monkeypatch):
    args = make((3, 8, 2), 4, 4, 2, device=device)
    launch(mbconv, *args)  # 12 lines, 4 in a program
    monkeypatch.setattr("fastsam_rwkv.triton_kernels.mbconv.MOST_IN_BATCH", 2)
    with pytest.raises(ValueError, match="at most 8 lines, got 12; split the batch"):
        launch(mbconv, *args)


def test_rows_and_columns_of_the_first_kernel():
    def expand(M, C, D, BLOCK_M, num_warps):
        settings = {"mbconv_expand": {"BLOCK_M": BLOCK_M, "BLOCK_D": 64, "num_warps": num_warps}}
        chosen, _ = choose_blocks(M, C, D, 64, 1, torch.float16, config_of("cpu", settings))
        return chosen["BLOCK_M"], chosen["num_warps"], chosen["SPAN"]

    large = 512 * 512
    assert expand(large, 128, 256, 128, 8) == (128, 8, 256)
    assert expand(large, 160, 256, 128, 8) == (64, 4, 256)
    assert expand(large, 256, 256, 64, 4) == (64, 4, 256)
    assert expand(large, 320, 256, 64, 4) == (64, 8, 256)
    assert expand(large, 320, 256, 32, 4) == (32, 4, 256)
    assert expand(128 * 128, 64, 512, 64, 4) == (64, 4, 256)  # 256 blocks of rows
    assert expand(1, 64, 160, 64, 4) == (64, 4, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@needs_triton
def test_gelu_over_the_whole_range(dtype, device):
    """The kernels' GELU errs by at most 2e-6 in half precision, apart from rounding the result."""
    x = torch.linspace(-40, 40, 1 << 16).to(dtype)
    x = torch.cat([x, torch.tensor([0.0, -0.0, 3e4, -3e4], dtype=dtype)])
    got = gelu_of(x.to(device)).cpu().double()
    want = F.gelu(x.double())
    eps = torch.finfo(dtype).eps
    rounding = want.abs() * (eps if dtype in INTERPRETER_TRUNCATES else eps / 2)
    smallest = torch.finfo(dtype).tiny * eps  # of float16's subnormal numbers
    exact = 3e-7 * x.double().abs().clamp(max=10) if dtype == torch.float32 else 2e-6
    assert ((got - want).abs() <= rounding + smallest + exact).all()
    assert gelu_of(torch.tensor([torch.nan], dtype=dtype, device=device)).isnan().all()


@pytest.mark.skipif(INTERPRETED, reason="compiled kernels need a GPU, or FASTSAM_RWKV_EMULATE=90")
def test_gelu_of_two_values(device):
    """Half precision in half precision errs by 1.5e-3 of max(1, |x|) at most, and keeps what is not finite apart."""
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    got, x = gelu_of(x.to(device), of_float=False).cpu().double(), x.double()
    want = F.gelu(x.clamp(-65504, 65504))
    assert got[x.isnan()].isnan().all() and not got[~x.isnan()].isnan().any()
    finite = ~x.isnan()
    error = (got - want)[finite].abs() / x[finite].clamp(-65504, 65504).abs().clamp(min=1)
    assert error.max() <= 1.5e-3
    x = torch.randn(1 << 15, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.5
    want = F.gelu(x)
    half = rel_rms(gelu_of(x.half().to(device), of_float=False).cpu(), want)
    assert 5e-4 < half < 8.5e-4 < rel_rms(want.bfloat16(), want)


@needs_triton
def test_vectors_at_odd_addresses(device):
    """Words of two bfloat16 values must be aligned."""
    args = list(make((1, 3, 5), 8, 8, 1, torch.bfloat16, device))
    want = launch(mbconv, *args)
    bias = args[6]
    args[6] = torch.cat([bias[:1], bias])[1:]
    assert args[6].data_ptr() % 4
    torch.testing.assert_close(launch(mbconv, *args), want, rtol=0, atol=0)
