import math

import pytest
import torch
from numerics import rel_rms

from fastsam_rwkv.triton_kernels.bi_wkv import _prefix_sums, _rescaled_doubling, bi_wkv_ref


def quadratic_sum(w, u, k, v):
    """Formula in float64, one channel at a time, in O(T^2)."""
    w, u, k, v = (t.double() for t in (w, u, k, v))
    T = k.shape[1]
    place = torch.arange(T, device=k.device)
    distance = (place[:, None] - place).abs()
    y = torch.empty_like(v)
    for c in range(k.shape[2]):
        exponent = torch.where(distance == 0, u[c], -(distance - 1) * w[c]) + k[:, None, :, c]  # [B, t, i]
        y[:, :, c] = (exponent.softmax(-1) @ v[:, :, c, None])[..., 0]
    return y


def make(B, T, decays, sigma=4.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    C = len(decays)
    k, v = torch.randn(B, T, C, generator=g) * sigma, torch.randn(B, T, C, generator=g)
    return torch.tensor(decays) / T, torch.randn(C, generator=g), k, v


DECAYS = [-40.0, -10.0, -0.3, 0.0, 2.0, 10.0, 40.0]


@pytest.mark.parametrize("T", [1, 2, 3, 63, 64, 65, 196, 1000, 4096])
def test_matches_the_quadratic_sum(T):
    args = make(2 if T < 1000 else 1, T, DECAYS)
    got, want = bi_wkv_ref(*args), quadratic_sum(*args)
    for c in range(len(DECAYS)):  # per channel, because large ones hide errors of small ones
        assert rel_rms(got[..., c], want[..., c]) <= 1e-5, DECAYS[c]


@pytest.mark.parametrize("T", [1, 2, 63, 196, 2048])
@pytest.mark.parametrize("decay", [-1e5, -120.0, 120.0, 1e5])
def test_rescales_beyond_the_range_of_one_shift(T, decay):
    args = make(1, T, [decay, decay / 3, 1.0], sigma=20.0)
    args = (args[0], args[1] * 300, *args[2:])  # a large bonus too
    assert rel_rms(bi_wkv_ref(*args), quadratic_sum(*args)) <= 1e-5


@pytest.mark.parametrize("T", [1, 2, 100, 1024])
def test_both_forms_agree(T):
    args = make(2, T, DECAYS)
    torch.testing.assert_close(_prefix_sums(*args), _rescaled_doubling(*args), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decay", [-40.0, 0.0, 40.0, 120.0])
def test_keys_of_plus_and_minus_80(decay):
    w, u, k, v = make(1, 512, [decay, -decay])
    k = torch.where(k > 0, 80.0, -80.0)
    for keys in (k, torch.full_like(k, 80.0), torch.full_like(k, -80.0), k.sort(1).values, k.sort(1).values.flip(1)):
        y = bi_wkv_ref(w, u, keys, v)
        assert torch.isfinite(y).all()
        assert rel_rms(y, quadratic_sum(w, u, keys, v)) <= 1e-5


def test_65536_tokens_of_equal_weight_average():
    w, u, k, v = make(1, 65536, [0.0, 0.0])
    mean = v.double().mean(1, keepdim=True).expand_as(v)
    y = bi_wkv_ref(w, torch.zeros(2), torch.zeros_like(k), v)
    assert (y - mean).abs().max().item() < 1e-7
    w, u, k, v = make(1, 65536, [40.0, -40.0])
    y = bi_wkv_ref(w, u, k, v)
    for t in (0, 1, 30000, 65535):  # formula at single tokens
        distance = (torch.arange(65536) - t).abs().double()[:, None]
        exponent = torch.where(distance == 0, u.double(), -(distance - 1) * w.double()) + k[0].double()
        want = (exponent.softmax(0) * v[0].double()).sum(0)
        torch.testing.assert_close(y[0, t].double(), want, rtol=1e-4, atol=1e-5)


def test_empty_batch_and_half_precision():
    w, u, k, v = make(2, 10, DECAYS)
    assert bi_wkv_ref(w, u, k[:0], v[:0]).shape == (0, 10, 7)
    y = bi_wkv_ref(w, u, k.bfloat16(), v.bfloat16())
    assert y.dtype == torch.bfloat16
    assert rel_rms(y, quadratic_sum(w, u, k.bfloat16(), v.bfloat16())) <= 2**-8


def test_gradients():
    args = [t.double().requires_grad_() for t in make(2, 9, [3.0, -5.0, 0.0], sigma=1.0)]
    assert torch.autograd.gradcheck(bi_wkv_ref, args)
    assert torch.autograd.gradcheck(_rescaled_doubling, args)


def test_wrong_shapes_raise():
    w, u, k, v = make(1, 4, DECAYS)
    with pytest.raises(ValueError, match=r"w \[3\]"):
        bi_wkv_ref(w[:3], u, k, v)


def test_quadratic_sum_of_two_tokens():
    """Check the oracle of this file by hand."""
    w, u = torch.tensor([0.7]), torch.tensor([0.2])
    k, v = torch.tensor([[[0.5], [-0.4]]]), torch.tensor([[[2.0], [3.0]]])
    a, b, bonus = math.exp(0.5), math.exp(-0.4), math.exp(0.2)
    first = (b * 3 + bonus * a * 2) / (b + bonus * a)
    assert quadratic_sum(w, u, k, v)[0, 0, 0].item() == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize("decay", [10.0, 90.0])
def test_channels_in_parts_change_nothing(decay):
    g = torch.Generator().manual_seed(2)
    w, u = torch.rand(70, generator=g) * decay, torch.randn(70, generator=g)
    k, v, r = torch.randn(3, 2, 19, 70, generator=g)
    whole = bi_wkv_ref(w, u, k, v, r, 1 / 19)  # one part, because gradients are enabled
    with torch.no_grad():
        torch.testing.assert_close(bi_wkv_ref(w, u, k, v, r, 1 / 19), whole)
