"""Contract of every operator beside its results."""

import pytest
import test_attention
import test_fused_linear
import torch
from launch_configs import launch
from test_strided_vectors import CALLS
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels.operator_calls import OPERATORS, outputs_of
from fastsam_rwkv.triton_kernels.attention import attention, attention_ref
from fastsam_rwkv.triton_kernels.bi_wkv import bi_wkv, bi_wkv_ref
from fastsam_rwkv.triton_kernels.conv_norm import conv_norm
from fastsam_rwkv.triton_kernels.fused_linear import fused_linear, gated_key
from fastsam_rwkv.triton_kernels.operator import HAS_TRITON, checked, in_forward_ad

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: kernels cannot run")
CALLS = CALLS | {
    "attention": lambda device: test_attention.make((1, 2), 3, 20, 2, 4, device=device),
    "gated_key": lambda device: test_fused_linear.make_pair((2, 3), 8, 5, 4, device=device),
}


def is_float(a):
    return isinstance(a, torch.Tensor) and a.is_floating_point()


@pytest.mark.parametrize("name", CALLS)
def test_mixed_dtypes_and_devices_raise(name):
    """The check runs on CUDA only; references raise their own errors."""
    args = CALLS[name]("cpu")
    launcher = checked(name, OPERATORS[name].launcher)
    last = max(i for i, a in enumerate(args) if is_float(a))
    for dtype in (torch.bfloat16, torch.float64):
        mixed = [a.to(dtype) if i == last else a for i, a in enumerate(args)]
        with pytest.raises(TypeError, match=f"{name} kernel needs .* the same for all, got .*{dtype}"):
            launcher(*mixed)
    with pytest.raises(TypeError, match=f"{name} kernel needs float32, float16 or bfloat16"):
        launcher(*(a.double() if is_float(a) else a for a in args))
    with pytest.raises(ValueError, match=f"{name} needs all its tensors on one device, got .* on meta"):
        launcher(*(a.to("meta") if i == last else a for i, a in enumerate(args)))


@needs_triton
def test_decay_and_bonus_are_of_any_dtype(device):
    w, u, k, v, r = CALLS["bi_wkv"](device)
    launcher = checked("bi_wkv", bi_wkv.launcher)
    torch.testing.assert_close(launcher(w.double(), u.double(), k, v, r=r), launcher(w, u, k, v, r))


def along_itself(function, t):
    """Tangent of `function` at `t` in the direction of `t`, by forward-mode AD without `torch.func`."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(t, t))).tangent


TRANSFORMS = {
    "dual tensor": along_itself,
    "jvp": lambda f, t: torch.func.jvp(f, (t,), (t,))[1],
    "jvp of jvp": lambda f, t: torch.func.jvp(lambda t: torch.func.jvp(f, (t,), (t,))[1], (t,), (t,))[1],
    "grad": lambda f, t: torch.func.grad(f)(t),
    "jvp of grad": lambda f, t: torch.func.jvp(torch.func.grad(f), (t,), (t,))[1],
    "vmap": lambda f, t: torch.func.vmap(f)(torch.stack([t, 2 * t])),
    "vmap of grad": lambda f, t: torch.func.vmap(torch.func.grad(f))(torch.stack([t, 2 * t])),
}
MAY_RAISE = {
    "grad of vmap": lambda f, t: torch.func.grad(lambda t: torch.func.vmap(f)(t).sum())(torch.stack([t, 2 * t])),
    "jvp of vmap": lambda f, t: torch.func.jvp(torch.func.vmap(f), (torch.stack([t, t]),), (torch.stack([t, t]),))[1],
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap calls the operator once for each element
@pytest.mark.parametrize("transform", [*TRANSFORMS, *MAY_RAISE])
@pytest.mark.parametrize("name", CALLS)
def test_transforms_are_right_or_raise(name, transform):
    args = CALLS[name]("cpu")
    at = max(i for i, a in enumerate(args) if is_float(a))

    def of(function):
        def value(t):
            outputs = function(*(t if i == at else a for i, a in enumerate(args)))
            return sum(y.square().mean() for y in outputs_of(outputs) if y.is_floating_point())

        return value

    derive = (TRANSFORMS | MAY_RAISE)[transform]
    with sdpa_kernel(SDPBackend.MATH):  # the backend with forward-mode AD
        want = derive(of(OPERATORS[name].reference), args[at])
        assert want.abs().max() > 0
        try:
            got = derive(of(OPERATORS[name]), args[at])
        except RuntimeError:
            assert transform in MAY_RAISE
        else:
            torch.testing.assert_close(got, want)


def test_forward_mode_is_noticed():
    t = torch.ones(2)
    assert not in_forward_ad(t)
    with forward_ad.dual_level():
        assert in_forward_ad(t)
    assert torch.func.jvp(lambda x: x * in_forward_ad(t), (t,), (t,))[1].all()


def test_keywords_and_defaults():
    w, u, k, v, r = CALLS["bi_wkv"]("cpu")
    assert torch.equal(bi_wkv(w, u, k, v, scale=0.1), bi_wkv_ref(w, u, k, v, None, 0.1))
    assert torch.equal(bi_wkv(w=w, u=u, k=k, v=v, r=r), bi_wkv_ref(w, u, k, v, r))
    k.requires_grad_()
    assert bi_wkv(w, u, v=v, k=k).requires_grad


def test_outputs_are_contiguous():
    """Compiled code relies on the strides of fake tensors."""
    x, weight = torch.randn(2, 5, 3, 4).permute(0, 2, 3, 1), torch.randn(6, 5, 3, 3)
    args = (x, weight, *[None] * 6, 1, False, 1e-6)
    assert conv_norm(*args).is_contiguous()
    torch.library.opcheck(torch.ops.fastsam_rwkv.conv_norm.default, args, test_utils="test_faketensor")
    args = list(test_fused_linear.make((2, 3), 8, 5, "residual"))
    args[-1] = args[-1].permute(0, 2, 1).contiguous().permute(0, 2, 1)
    assert fused_linear(*args).is_contiguous()
    torch.library.opcheck(torch.ops.fastsam_rwkv.fused_linear.default, args, test_utils="test_faketensor")


@pytest.mark.parametrize("T", [16, 100])
def test_reference_takes_any_layout(T):
    k, v = torch.randn(2, 2, T, 5).unbind()
    w, u = torch.randn(5), torch.randn(5)
    want = bi_wkv_ref(w, u, k, v, None, 1 / T)
    for order in ((0, 2, 1), (1, 0, 2), (2, 1, 0)):
        other_k, other_v = (
            t.permute(order).contiguous().permute(torch.tensor(order).argsort().tolist()) for t in (k, v)
        )
        torch.testing.assert_close(bi_wkv_ref(w, u, other_k, other_v, None, 1 / T), want)
    one = k[:, :1].expand(-1, T, -1)
    torch.testing.assert_close(bi_wkv_ref(w, u, one, v), bi_wkv_ref(w, u, one.contiguous(), v))


@needs_triton
def test_squared_relu_keeps_nan(device):
    x, *weights = test_fused_linear.make_pair((2, 3), 8, 5, 4, device=device)
    x[0, 1, 2, 3] = float("nan")
    key, gate = launch(gated_key, x, *weights)
    assert key.isnan().sum() == key[1, 2].isnan().sum() == 5 and not gate.isnan().any()


@needs_triton
@pytest.mark.parametrize("splits", [False, True])
def test_query_without_visible_keys_is_zero(splits, device):
    q, k, v, seen, heads = test_attention.make((2, 2), 3, 97, 2, 16, device=device)
    seen[0] = False
    settings = test_attention.SMALL if splits else {}
    got = launch(attention, q, k, v, seen, heads, settings=settings)
    assert (got[0] == 0).all()
    torch.testing.assert_close(got, attention_ref(q, k, v, seen, heads))
    assert (launch(attention, q, k[:, :0], v[:, :0], None, heads, settings=settings) == 0).all()
