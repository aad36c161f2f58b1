import importlib
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from guards import guarded_outputs, surrounded
from launch_configs import launch
from numerics import INTERPRETED, INTERPRETER_TRUNCATES, rel_rms
from test_bi_wkv import quadratic_sum

from fastsam_rwkv.triton_kernels.bi_wkv import bi_wkv, bi_wkv_ref
from fastsam_rwkv.triton_kernels.launch_config import default_settings
from fastsam_rwkv.triton_kernels.operator import HAS_TRITON

module = importlib.import_module("fastsam_rwkv.triton_kernels.bi_wkv")
pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: kernels cannot run"),
    # NumPy in the interpreter: unsafe plain sums are overwritten, missing tokens are not stored
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MILD = (-5.0, -0.5, 0.0, 1.0, 3.0)


def make(B, T, decays, dtype=torch.float32, device="cpu", sigma=4.0, gated=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    C = len(decays)
    k, v, r = (torch.randn(B, T, C, generator=g) for _ in range(3))
    w, u = torch.tensor(decays), torch.randn(C, generator=g) * T
    tensors = [w.to(device), u.to(device)] + [surrounded(t.to(device, dtype)) for t in (k * sigma, v, r * 3)]
    return tensors if gated else tensors[:4]


def formula(w, u, k, v, r=None, scale=1.0):
    y = quadratic_sum(w.double() * scale, u.double() * scale, k, v)
    return y if r is None else torch.sigmoid(r.double()) * y


scan = partial(launch, bi_wkv)


def check(args, scale, slack=1.5, settings=None):
    """Launch the kernels and judge the result."""
    judge(args, *(op(*args, scale=scale) for op in (formula, partial(scan, settings=settings), bi_wkv_ref)), slack)


def judge(args, want, got, eager, slack=1.5):
    """Bound the error by that of eager PyTorch, rounding, and rounding of exponents as large as |k|."""
    dtype = got.dtype
    assert got.shape == want.shape and dtype == args[2].dtype and torch.isfinite(got).all()
    rounding = torch.finfo(dtype).eps * (1.0 if dtype in INTERPRETER_TRUNCATES else 0.25)
    exponents = torch.finfo(torch.float32).eps / 4 * args[2].abs().max().item()
    assert rel_rms(got, want) <= slack * rel_rms(eager, want) + rounding + exponents


@pytest.fixture(params=["default", "tiny tiles", "tiny tiles in groups"])
def tiles(request):
    """Settings `tiles(block_c)`. Tiny tiles divide few tokens into many tiles; the last group is not full."""

    def use(block_c):
        if request.param == "default":
            return {}
        segments, length, block_n = (2, 4, 4) if request.param == "tiny tiles" else (4, 1, 2)
        settings = {"SEGMENTS": segments, "LENGTH": length, "BLOCK_C": block_c, "BLOCK_N": block_n, "num_warps": 1}
        return {"bi_wkv": settings}

    return use


@pytest.mark.parametrize("plain_sums", [True, False], ids=["plain sums", "rescaled sums"])
@pytest.mark.parametrize("T", [1, 2, 7, 45])
def test_every_tiling_and_both_paths(T, plain_sums, tiles, device, monkeypatch):
    monkeypatch.setitem(module.TILE_DECAY, torch.float32, 5.0 if plain_sums else -1.0)
    args = make(2, T, MILD, device=device)
    with guarded_outputs(monkeypatch):
        got = scan(*args, scale=1 / 128, settings=tiles(block_c=4))
    want, eager = formula(*args, scale=1 / 128), bi_wkv_ref(*args, scale=1 / 128)
    for c in range(len(MILD)):  # per channel, because large ones hide errors of small ones
        assert rel_rms(got[..., c], want[..., c]) <= 2e-6
    judge(args, want, got, eager)


@pytest.mark.parametrize("plain_sums", [True, False], ids=["plain sums", "rescaled sums"])
def test_whole_tiles(plain_sums, tiles, device, monkeypatch):
    """Whole tiles use no masks, as at 1024 x 1024 pixels."""
    monkeypatch.setitem(module.TILE_DECAY, torch.float32, 5.0 if plain_sums else -1.0)
    check(make(2, 48, [*MILD, -1.0, 2.0, 8.0], device=device), 1 / 128, settings=tiles(block_c=4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large_tiles(dtype, device):
    settings = {"bi_wkv": default_settings()["bi_wkv.large"]}
    check(make(1, 512, [i / 2 for i in range(-4, 28)], dtype, device), 1 / 512, settings=settings)


def test_channels_in_pairs(tiles, device):
    """Whole bfloat16 tiles load words of two channels if they are aligned."""
    C = 8
    w, u, k, v, r = make(2, 48, [float(i) for i in range(-2, C - 2)], torch.bfloat16, device)
    words = partial(scan, scale=1 / 128, settings=tiles(block_c=4))
    want = words(w, u, k, v, r)
    judge([w, u, k, v, r], formula(w, u, k, v, r, 1 / 128), want, bi_wkv_ref(w, u, k, v, r, 1 / 128))
    for width in (3 * C, 3 * C + 1):  # aligned rows; every other row is not aligned
        for first in (0, 1, 2):
            wide = torch.zeros(2, 48, width + 2, dtype=k.dtype, device=device)
            wide[..., first : first + 3 * C] = torch.cat([k, v, r], dim=2)
            rows = wide[..., first : first + 3 * C].split(C, dim=2)
            torch.testing.assert_close(words(w, u, *rows), want, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 129])
def test_as_accurate_as_eager(T, dtype, device):
    check(make(1, T, MILD, dtype, device), 1 / T)
    check(make(1, T, MILD, dtype, device, gated=False), 1 / T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_model_width(dtype, device):
    """The interpreter gets one wide tile, because its time is proportional to the number of tiles."""
    settings = default_settings()["bi_wkv"] | ({"BLOCK_C": 256} if INTERPRETED else {})
    args = make(1, 40, [i * 20 / 191 for i in range(192)], dtype, device, sigma=1.0)
    check(args, 1 / 40, settings={"bi_wkv": settings})


def test_decays_of_either_sign(tiles, device):
    """Judge channels one by one that share a tile, because each tile costs the interpreter time."""
    decays = [share * decay for decay in (-1e5, -120.0, 120.0, 1e5) for share in (1, 0.5)] + [1.0]
    args = make(1, 33, decays, device=device, sigma=20.0)
    kernels = partial(scan, settings=tiles(block_c=16))
    want, got, eager = (op(*args, scale=1 / 33) for op in (formula, kernels, bi_wkv_ref))
    for c in range(len(decays)):
        judge([t[..., c : c + 1] for t in args], *(y[..., c : c + 1] for y in (want, got, eager)))


@pytest.mark.parametrize("plain_sums", [True, False], ids=["plain sums", "rescaled sums"])
def test_keys_of_plus_and_minus_80(plain_sums, tiles, device, monkeypatch):
    monkeypatch.setitem(module.TILE_DECAY, torch.float32, 20.0 if plain_sums else -1.0)
    w, u, k, v = make(1, 40, [0.0, 0.0, 3.0, -3.0], device=device, gated=False)
    k = torch.where(k > 0, 80.0, -80.0)
    keys = (k, torch.full_like(k, 80.0), torch.full_like(k, -80.0), k.sort(1).values, k.sort(1).values.flip(1))
    w, u, v, k = w.repeat(5), u.repeat(5), v.repeat(1, 1, 5), torch.cat(keys, 2)  # in one tile, as above
    y = scan(w, u, k, v, scale=1 / 40, settings=tiles(block_c=16))
    want = formula(w, u, k, v, scale=1 / 40)
    assert torch.isfinite(y).all()
    for got, right in zip(y.split(2, 2), want.split(2, 2), strict=True):
        assert rel_rms(got, right) <= 2e-5  # exponents of 80 are exact to 4e-6 in float32


@pytest.mark.parametrize("bound, exact", [(None, False), (40.0, False), (90.0, True)])
def test_bound_chooses_the_kernel(bound, exact, device, monkeypatch):
    """Tiles of 4 tokens of 40: plain sums in float32 up to a decay of 40 over the sequence."""
    settings = {"bi_wkv": {"SEGMENTS": 2, "LENGTH": 2, "BLOCK_C": 8, "BLOCK_N": 16, "num_warps": 1}}
    args = make(1, 40, MILD, device=device)
    args[1] /= 40
    want = formula(*args, 1 / 40)
    monkeypatch.setattr(module, "_bi_wkv_kernel" if exact else "_bi_wkv_exact_kernel", None)  # must not be used
    got = scan(*args, None, bound, settings=settings)
    judge(args, want, got, bi_wkv_ref(*args, None, bound))


def test_unknown_values_in_a_capture_are_summed_exactly(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_gpu = SimpleNamespace(is_meta=False, is_cuda=True)
    assert not module._fits(on_gpu, on_gpu, 1.0, None, 128, 20.0, unknown=False)
    assert module._fits(on_gpu, on_gpu, 1 / 1024, 16.0, 128, 20.0, unknown=False)


def test_strided_views(device):
    w, u, k, v, r = make(2, 20, MILD, device=device)
    wide = torch.cat([k, v, r], dim=2)
    every_other = torch.stack([k, k * 0], dim=2).flatten(1, 2)[:, ::2]
    views = (
        torch.stack([k, v, r]),
        wide.split(5, dim=2),
        [t.mT.contiguous().mT for t in (k, v, r)],
        [every_other, v, r],
    )
    short = partial(scan, settings={"bi_wkv": default_settings()["bi_wkv"] | {"LENGTH": 4}})  # less to interpret
    want = short(w, u, k, v, r)
    for kvr in views:
        torch.testing.assert_close(short(w, u, *kvr), want)


def test_empty(device):
    w, u, k, v, r = make(2, 3, MILD, device=device)
    assert scan(w, u, k[:0], v[:0], r[:0]).shape == (0, 3, 5)
    assert scan(w, u, k[:, :0], v[:, :0]).shape == (2, 0, 5)


def test_op_contract(device):
    args = make(1, 6, MILD, device=device)
    torch.library.opcheck(torch.ops.fastsam_rwkv.bi_wkv.default, (*args, 1 / 6))
    torch.library.opcheck(torch.ops.fastsam_rwkv.bi_wkv.default, (*args[:4],))


def test_gradients(device):
    args = [t.double().requires_grad_() for t in make(2, 9, MILD, sigma=1.0)]
    got, want = bi_wkv(*args, 1 / 9), bi_wkv_ref(*args, 1 / 9)
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, args, grad), torch.autograd.grad(want, args, grad), strict=True):
        torch.testing.assert_close(a, b)
    w, u, k, v, r = args  # a gradient for one tensor only
    (only,) = torch.autograd.grad(bi_wkv(w.detach(), u.detach(), k, v.detach(), r.detach(), 1 / 9), [k], grad)
    torch.testing.assert_close(only, torch.autograd.grad(bi_wkv_ref(w, u, k, v, r, 1 / 9), [k], grad)[0])


def test_wrong_arguments_raise(device):
    w, u, k, v, r = make(1, 4, MILD, device=device)
    with pytest.raises(ValueError, match=r"w \[3\]"):
        scan(w[:3], u, k, v)
    with pytest.raises(ValueError, match=r"r \[1, 2, 5\]"):
        scan(w, u, k, v, r[:, :2])
    with pytest.raises(ValueError, match="float16"):
        scan(w, u, k, v.half())
    with pytest.raises(ValueError, match="at most 65535, got 65536; split it"):
        scan(w, u, k.expand(1 << 16, 4, 5), v.expand(1 << 16, 4, 5))
