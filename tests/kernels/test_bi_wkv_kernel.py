import contextlib
import importlib

import pytest
import torch
from guards import guarded_outputs, surrounded
from numerics import INTERPRETED, INTERPRETER_TRUNCATES, rel_rms
from test_bi_wkv import quadratic_sum

from fastsam_rwkv.triton_kernels.bi_wkv import bi_wkv, bi_wkv_ref, bi_wkv_triton
from fastsam_rwkv.triton_kernels.launch_config import override, shipped_settings
from fastsam_rwkv.triton_kernels.operator import HAS_TRITON

module = importlib.import_module("fastsam_rwkv.triton_kernels.bi_wkv")
pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: kernels cannot run"),
    # NumPy's, in the interpreter: plain sums that are not safe are replaced, tokens that are not there not stored
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


def check(args, scale, slack=1.5):
    """House rule against float64; beside it, the rounding of exponents of |k|'s size where they are not differences."""
    judge(args, *(op(*args, scale=scale) for op in (formula, bi_wkv_triton, bi_wkv_ref)), slack)


def judge(args, want, got, eager, slack=1.5):
    dtype = got.dtype
    assert got.shape == want.shape and dtype == args[2].dtype and torch.isfinite(got).all()
    rounding = torch.finfo(dtype).eps * (1.0 if dtype in INTERPRETER_TRUNCATES else 0.25)
    exponents = torch.finfo(torch.float32).eps / 4 * args[2].abs().max().item()
    assert rel_rms(got, want) <= slack * rel_rms(eager, want) + rounding + exponents


@pytest.fixture(params=["default", "tiny tiles", "tiny tiles in groups"])
def tiles(request):
    """`tiles(block_c)` for a while. Small tiles make many of few tokens: a group each, or several in a group, the last
    one unfinished."""

    def use(block_c):
        if request.param == "default":
            return contextlib.nullcontext()
        segments, length, block_n = (2, 4, 4) if request.param == "tiny tiles" else (4, 1, 2)
        settings = {"SEGMENTS": segments, "LENGTH": length, "BLOCK_C": block_c, "BLOCK_N": block_n, "num_warps": 1}
        return override({"bi_wkv": settings})

    return use


@pytest.mark.parametrize("plain_sums", [True, False], ids=["plain sums", "rescaled sums"])
@pytest.mark.parametrize("T", [1, 2, 7, 45])
def test_every_tiling_and_both_paths(T, plain_sums, tiles, device, monkeypatch):
    monkeypatch.setitem(module.TILE_DECAY, torch.float32, 5.0 if plain_sums else -1.0)
    args = make(2, T, MILD, device=device)
    with guarded_outputs(monkeypatch), tiles(block_c=4):
        got = bi_wkv_triton(*args, scale=1 / 128)
    want, eager = formula(*args, scale=1 / 128), bi_wkv_ref(*args, scale=1 / 128)
    for c in range(len(MILD)):  # each channel by itself: none hides behind the others
        assert rel_rms(got[..., c], want[..., c]) <= 2e-6
    judge(args, want, got, eager)


@pytest.mark.parametrize("plain_sums", [True, False], ids=["plain sums", "rescaled sums"])
def test_tiles_that_come_out_even(plain_sums, tiles, device, monkeypatch):
    """As at 1024 x 1024 pixels: then nothing is masked."""
    monkeypatch.setitem(module.TILE_DECAY, torch.float32, 5.0 if plain_sums else -1.0)
    with tiles(block_c=4):
        check(make(2, 48, [*MILD, -1.0, 2.0, 8.0], device=device), 1 / 128)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large_tiles(dtype, device):
    with override({"bi_wkv": shipped_settings()["default"]["bi_wkv.large"]}):
        check(make(1, 512, [i / 2 for i in range(-4, 28)], dtype, device), 1 / 512)


def test_channels_in_pairs(tiles, device):
    """bfloat16 tiles that come out even are read two channels at a time, where all begin at a word of four bytes."""
    C = 8
    w, u, k, v, r = make(2, 48, [float(i) for i in range(-2, C - 2)], torch.bfloat16, device)
    with tiles(block_c=4):
        want = bi_wkv_triton(w, u, k, v, r, scale=1 / 128)
        judge([w, u, k, v, r], formula(w, u, k, v, r, 1 / 128), want, bi_wkv_ref(w, u, k, v, r, 1 / 128))
        for width in (3 * C, 3 * C + 1):  # rows of whole words; every other row begins in the middle of one
            for first in (0, 1, 2):
                wide = torch.zeros(2, 48, width + 2, dtype=k.dtype, device=device)
                wide[..., first : first + 3 * C] = torch.cat([k, v, r], dim=2)
                rows = wide[..., first : first + 3 * C].split(C, dim=2)
                torch.testing.assert_close(bi_wkv_triton(w, u, *rows, scale=1 / 128), want, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 129])
def test_as_accurate_as_eager(T, dtype, device):
    check(make(1, T, MILD, dtype, device), 1 / T)
    check(make(1, T, MILD, dtype, device, gated=False), 1 / T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_model_width(dtype, device):
    """In the interpreter, whose time goes by tiles, in one that is wide enough."""
    settings = shipped_settings()["default"]["bi_wkv"] | ({"BLOCK_C": 256} if INTERPRETED else {})
    with override({"bi_wkv": settings}):
        check(make(1, 40, [i * 20 / 191 for i in range(192)], dtype, device, sigma=1.0), 1 / 40)


def test_decays_of_either_sign(tiles, device):
    """Channels by themselves and side by side in one tile: the interpreter's time goes by tiles."""
    decays = [share * decay for decay in (-1e5, -120.0, 120.0, 1e5) for share in (1, 0.5)] + [1.0]
    args = make(1, 33, decays, device=device, sigma=20.0)
    with tiles(block_c=16):
        want, got, eager = (op(*args, scale=1 / 33) for op in (formula, bi_wkv_triton, bi_wkv_ref))
    for c in range(len(decays)):
        judge([t[..., c : c + 1] for t in args], *(y[..., c : c + 1] for y in (want, got, eager)))


@pytest.mark.parametrize("plain_sums", [True, False], ids=["plain sums", "rescaled sums"])
def test_keys_of_plus_and_minus_80(plain_sums, tiles, device, monkeypatch):
    monkeypatch.setitem(module.TILE_DECAY, torch.float32, 20.0 if plain_sums else -1.0)
    w, u, k, v = make(1, 40, [0.0, 0.0, 3.0, -3.0], device=device, gated=False)
    k = torch.where(k > 0, 80.0, -80.0)
    keys = (k, torch.full_like(k, 80.0), torch.full_like(k, -80.0), k.sort(1).values, k.sort(1).values.flip(1))
    w, u, v, k = w.repeat(5), u.repeat(5), v.repeat(1, 1, 5), torch.cat(keys, 2)  # side by side, as above
    with tiles(block_c=16):
        y = bi_wkv_triton(w, u, k, v, scale=1 / 40)
    want = formula(w, u, k, v, scale=1 / 40)
    assert torch.isfinite(y).all()
    for got, right in zip(y.split(2, 2), want.split(2, 2), strict=True):
        assert rel_rms(got, right) <= 2e-5  # exponents of 80 are exact to 4e-6 in float32


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
    few_tokens_a_thread = shipped_settings()["default"]["bi_wkv"] | {"LENGTH": 4}  # less to interpret
    with override({"bi_wkv": few_tokens_a_thread}):
        want = bi_wkv_triton(w, u, k, v, r)
        for kvr in views:
            torch.testing.assert_close(bi_wkv_triton(w, u, *kvr), want)


def test_empty(device):
    w, u, k, v, r = make(2, 3, MILD, device=device)
    assert bi_wkv_triton(w, u, k[:0], v[:0], r[:0]).shape == (0, 3, 5)
    assert bi_wkv_triton(w, u, k[:, :0], v[:, :0]).shape == (2, 0, 5)


def test_op_contract(device):
    args = make(1, 6, MILD, device=device)
    torch.library.opcheck(torch.ops.fastsam_rwkv.bi_wkv.default, (*args, 1 / 6))
    torch.library.opcheck(torch.ops.fastsam_rwkv.bi_wkv.default, (*args[:4],))


def test_op_has_the_gradients_of_the_reference(device):
    args = [t.double().requires_grad_() for t in make(2, 9, MILD, sigma=1.0)]
    got, want = bi_wkv(*args, 1 / 9), bi_wkv_ref(*args, 1 / 9)
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, args, grad), torch.autograd.grad(want, args, grad), strict=True):
        torch.testing.assert_close(a, b)
    w, u, k, v, r = args  # where only some are wanted, the others are not computed
    (only,) = torch.autograd.grad(bi_wkv(w.detach(), u.detach(), k, v.detach(), r.detach(), 1 / 9), [k], grad)
    torch.testing.assert_close(only, torch.autograd.grad(bi_wkv_ref(w, u, k, v, r, 1 / 9), [k], grad)[0])


def test_what_cannot_be_computed_is_named(device):
    w, u, k, v, r = make(1, 4, MILD, device=device)
    with pytest.raises(ValueError, match=r"w \[3\]"):
        bi_wkv_triton(w[:3], u, k, v)
    with pytest.raises(ValueError, match=r"r \[1, 2, 5\]"):
        bi_wkv_triton(w, u, k, v, r[:, :2])
    with pytest.raises(ValueError, match="float16"):
        bi_wkv_triton(w, u, k, v.half())
    with pytest.raises(ValueError, match="at most 65535, got 65536; split it"):
        bi_wkv_triton(w, u, k.expand(1 << 16, 4, 5), v.expand(1 << 16, 4, 5))
