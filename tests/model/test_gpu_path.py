"""The operators that the decoder calls on a GPU only: the same masks as its modules give, and no module passed by."""

import pytest
import torch
from small_model import small_model
from test_model import BOXES, LABELS, POINTS, pixels
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks.kernels.operator_calls import REFERENCES, operators_replaced
from fastsam_rwkv.modeling.mask_decoder import TwoWayLayer
from fastsam_rwkv.triton_kernels.prompt_tokens import ABSENT

MASK = torch.randn(3, 1, 24, 32, generator=torch.Generator().manual_seed(1))
PROMPTS = {
    "points": {"point_coords": POINTS, "point_labels": LABELS},
    "boxes": {"boxes": BOXES},
    "one box": {"boxes": BOXES[:1]},
    "points, boxes and masks": {"point_coords": POINTS, "point_labels": LABELS, "boxes": BOXES, "mask_input": MASK},
}
CALLED = {"linears", "mask_product", "prompt_tokens"}


def both_ways(model, decode):
    """Return results without and with the operators, and the names of those that were called."""
    names = set()

    def counting(name):
        def call(*args):
            names.add(name)
            return REFERENCES[name](*args)

        return call

    embedding = model.encode_image(pixels())
    want = decode(embedding)
    with operators_replaced({name: counting(name) for name in CALLED}):
        got = decode(embedding)
    return got, want, names


@torch.no_grad()
@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("method", ["single", "multimask", "all", "padded"])
def test_same_masks(prompts, method):
    model, given = small_model(), PROMPTS[prompts]

    def decode(embedding):
        if method == "all":
            return model.decode_all(embedding, **given)
        if method != "padded":
            return model.decode_masks(embedding, **given, multimask_output=method == "multimask")
        boxes, mask = given.get("boxes"), given.get("mask_input")
        coords, labels = model.prompt_encoder.points(given.get("point_coords"), given.get("point_labels"), boxes)
        coords, labels = nn.functional.pad(coords, (0, 0, 0, 2)), nn.functional.pad(labels, (0, 2), value=ABSENT)
        return model._masks(embedding, coords, labels, mask, slice(0, 1), True)

    got, want, names = both_ways(model, decode)
    assert names == CALLED
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("part", "left"),
    [
        ("mask_decoder.transformer.layers.1", {"prompt_tokens", "mask_product", "linears"}),
        ("mask_decoder.transformer.final_attn.q_proj", {"prompt_tokens", "mask_product", "linears"}),
        ("mask_decoder.iou_head", {"prompt_tokens", "mask_product", "linears"}),
        ("prompt_encoder", {"mask_product", "linears"}),
        ("prompt_encoder.position", {"mask_product", "linears"}),
        ("mask_decoder.mix_out.2", {"prompt_tokens", "linears"}),
    ],
)
def test_hooks_are_called(part, left):
    model, seen = small_model(), []
    model.get_submodule(part).register_forward_hook(lambda *_: seen.append(part))
    got, want, names = both_ways(model, lambda embedding: model.decode_masks(embedding, boxes=BOXES))
    for_the_grid = part == "prompt_encoder.position"
    assert len(seen) == 2 + for_the_grid and names == left
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_replaced_layers_are_called():
    class Louder(TwoWayLayer):
        def forward(self, *args):
            tokens, image = super().forward(*args)
            return 2 * tokens, image

    model = small_model()
    model.mask_decoder.transformer.layers[0].__class__ = Louder
    got, want, _ = both_ways(model, lambda embedding: model.decode_masks(embedding, boxes=BOXES))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_compiled_code_takes_any_number_of_prompts():
    model = small_model()
    embedding, counter = model.encode_image(pixels()), CompileCounterWithBackend("eager")
    with operators_replaced({}):
        decode = torch.compile(model.decode_masks, backend=counter, dynamic=True)
        for N, P in ((3, 4), (2, 3), (5, 7)):
            coords, labels = 90 * torch.rand(N, P, 2), torch.randint(0, 2, (N, P))
            for a, b in zip(
                decode(embedding, coords, labels), model.decode_masks(embedding, coords, labels), strict=True
            ):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
