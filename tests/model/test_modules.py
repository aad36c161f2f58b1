"""Adapters, hooks and replaced modules: fused operators must not pass them by."""

import pytest
import torch
from small_model import small_model
from test_model import LABELS, POINTS, pixels
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils._pytree import tree_map

from fastsam_rwkv.modeling.layers import plain

MASK = torch.randn(3, 1, 24, 32, generator=torch.Generator().manual_seed(1))


def results(model, **prompts):
    prompts = prompts or {"point_coords": POINTS, "point_labels": LABELS, "mask_input": MASK}
    embedding = model.encode_image(pixels())
    return embedding.image_embed, embedding.high_res_feats, *model.decode_all(embedding, **prompts)


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def leaves(model):
    return {name: m for name, m in model.named_modules() if not list(m.children())}


def replace(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


class Adapter(nn.Module):
    """A linear layer with a low-rank addition, as LoRA's."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.Linear(base_layer.in_features, 4, bias=False)
        self.lora_B = nn.Linear(4, base_layer.out_features, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))

    def merged(self):
        merged = self.base_layer
        merged.weight.data += self.lora_B.weight @ self.lora_A.weight
        return merged


LINEARS = [name for name, m in leaves(small_model()).items() if isinstance(m, nn.Linear)]
KINDS = {".".join(part for part in name.split(".") if not part.isdigit()): name for name in LINEARS}


def test_there_are_linear_layers_of_every_kind():
    assert len(LINEARS) > 60 and len(KINDS) > 15
    assert "backbone.layers.channel_mix.key" in KINDS and "backbone.stage1.expand" in KINDS


def test_adapters_act_like_their_merged_weights_and_learn():
    model = small_model()
    before = results(model)
    adapters = {name: Adapter(model.get_submodule(name)) for name in KINDS.values()}
    for name, adapter in adapters.items():
        replace(model, name, adapter)
    got = results(model)
    sum(t.square().mean() for t in got).backward()
    for adapter in adapters.values():
        assert adapter.lora_A.weight.grad.abs().sum() > 0 and adapter.lora_B.weight.grad.abs().sum() > 0
    with torch.no_grad():
        for name, adapter in adapters.items():
            replace(model, name, adapter.merged())
        assert_same(got, results(model))
        assert not any(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(got, before, strict=True))


def call_every_leaf(model, register):
    """Return the names of the leaves whose hook `register(module, hook)` fires in a prediction."""
    fired = set()
    for name, module in leaves(model).items():
        register(module, lambda *_, name=name: fired.add(name))
    return fired


@pytest.mark.parametrize(
    "register",
    [nn.Module.register_forward_hook, nn.Module.register_forward_pre_hook, nn.Module.register_full_backward_hook],
)
def test_hooks_of_every_leaf_fire(register):
    model = small_model()
    want = results(model)
    fired = call_every_leaf(model, register)
    got = results(model)
    assert_same(got, want)
    sum(t.square().mean() for t in got).backward()
    without_gradient = {"prompt_encoder.position"} if register is nn.Module.register_full_backward_hook else set()
    assert leaves(model).keys() - fired == without_gradient


def test_hooks_of_containers_and_global_hooks_fire():
    model, fired = small_model(), set()
    want = results(model)
    names = {m: name for name, m in model.named_modules()}
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: fired.add(names.get(module)))
    try:
        assert_same(results(model), want)
    finally:
        handle.remove()
    assert leaves(model).keys() - fired == set()
    fired.clear()
    handles = [m.register_forward_hook(lambda module, *_: fired.add(names[module])) for m in model.modules()]
    assert_same(results(model), want)
    lists = {name for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    assert set(names.values()) - fired - lists == {"", "prompt_encoder"} - fired
    for handle in handles:
        handle.remove()
    fired.clear()
    assert all(torch.equal(a, b) for a, b in zip(results(model), want, strict=True))
    assert fired == set()


def test_a_hook_may_change_the_output_of_one_leaf():
    model = small_model()
    model.backbone.layers[1].channel_mix.key.register_forward_hook(lambda _m, _x, y: 0 * y)
    other = small_model()
    with torch.no_grad():
        other.backbone.layers[1].channel_mix.key.weight.zero_()
        assert_same(results(model), results(other))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: parametrizations.weight_norm(m),
        lambda m: nn.utils.weight_norm(m),
        lambda m: prune.identity(m, "weight"),
        lambda m: setattr(m, "forward", m.forward),
        lambda m: nn.utils.parametrize.register_parametrization(m, "weight", nn.Identity()),
    ],
    ids=["weight_norm", "old weight_norm", "pruning", "own forward", "parametrization"],
)
@torch.no_grad()
def test_changed_leaves_are_called(change):
    model = small_model()
    want = results(model)
    for name in KINDS.values():
        change(model.get_submodule(name))
        assert not plain(model.get_submodule(name))
    assert_same(results(model), want)


def test_pruning_has_an_effect_and_its_weight_a_gradient():
    model = small_model()
    want = results(model)
    prune.l1_unstructured(model.backbone.stage1[0].depthwise, "weight", 0.9)
    got = results(model)
    assert not torch.allclose(got[0], want[0])
    got[0].square().mean().backward()
    assert model.backbone.stage1[0].depthwise.weight_orig.grad.abs().sum() > 0


@torch.no_grad()
def test_a_linear_layer_with_a_bias_keeps_it():
    model, bias = small_model(), torch.randn(36)
    model.backbone.layers[0].spatial_mix.output.bias = nn.Parameter(bias)
    other = small_model()
    other.backbone.layers[0].spatial_mix.output.register_forward_hook(lambda _m, _x, y: y + bias)
    assert_same(results(model), results(other))
    assert not torch.allclose(results(model)[0], results(small_model())[0])


@torch.no_grad()
def test_dynamic_quantization_gives_nearly_the_same_masks():
    want = results(small_model())
    model = torch.ao.quantization.quantize_dynamic(small_model(), {nn.Linear}, dtype=torch.qint8)
    assert "quantized" in type(model.backbone.layers[0].channel_mix.key).__module__
    for a, b in zip(results(model), want, strict=True):
        assert (a - b).norm() < 0.1 * b.norm()


@torch.no_grad()
def test_compiled_parts_are_called():
    model = small_model()
    want = results(model)
    for name in (
        "backbone.patch",
        "mask_decoder.mix_out",
        "mask_decoder.upscale",
        "neck.0",
        "mask_decoder.stage1_proj",
    ):
        replace(model, name, torch.compile(model.get_submodule(name), backend="eager"))
    assert_same(results(model), want)


class Rounded(torch.Tensor):
    """A weight in 8 bits, as torchao's: operators that know nothing of it get its values."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        assert function.namespace == "aten", f"{function} reads the weight past its subclass"
        values = lambda t: t.codes * t.scale if isinstance(t, cls) else t  # noqa: E731  (two branches, used once)
        return function(*tree_map(values, args), **tree_map(values, kwargs or {}))


def test_weights_that_are_tensor_subclasses_keep_their_meaning():
    rounded, values = small_model().requires_grad_(False), small_model().requires_grad_(False)
    count = 0
    for a, b in zip(rounded.modules(), values.modules(), strict=True):
        if type(a) is nn.Linear:
            scale = a.weight.abs().max() / 127
            codes = (a.weight / scale).round().to(torch.int8)
            a.weight = nn.Parameter(Rounded(codes, scale), requires_grad=False)
            b.weight.copy_(codes * scale)
            count += 1
    assert count > 20
    with torch.inference_mode():
        assert_same(results(rounded), results(values))


@torch.no_grad()
@pytest.mark.parametrize("part", ["backbone", "neck", "backbone.norm"])
def test_hooks_see_the_last_map_normalized(part):
    """Without hooks the neck normalizes it."""
    model, seen = small_model(), {}
    want = model.encode_image(pixels()).image_embed

    def hook(module, inputs, output):
        seen["map"] = inputs[0] if part == "neck" else output[2] if part == "backbone" else output

    model.get_submodule(part).register_forward_hook(hook)
    torch.testing.assert_close(model.encode_image(pixels()).image_embed, want, rtol=1e-4, atol=1e-5)
    norm = model.backbone.norm
    normalized = (seen["map"] - norm.bias) / norm.weight
    torch.testing.assert_close(normalized.mean(-1), torch.zeros(1, 6, 8), rtol=0, atol=1e-4)
    torch.testing.assert_close(normalized.var(-1, correction=0), torch.ones(1, 6, 8), rtol=0, atol=1e-2)
