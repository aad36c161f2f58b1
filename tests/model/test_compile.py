"""`forward`, `compile`, wrappers that call the model, and sizes that stay free under tracing."""

import copy
import pickle

import pytest
import torch
from small_model import small_model
from test_model import BOXES, LABELS, POINTS, pixels
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from fastsam_rwkv import PromptError
from fastsam_rwkv.modeling.embedding import ImageEmbedding


@pytest.fixture
def model():
    torch._dynamo.reset()
    return small_model().requires_grad_(False)


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_forward_is_encoding_and_decoding(model):
    want = model.decode_masks(model.encode_image(pixels()), POINTS, LABELS, multimask_output=True)
    assert_same(model(pixels(), POINTS, LABELS, multimask_output=True), want)
    low, iou = model(pixels(B=2), POINTS.expand(2, 3, 2, 2), LABELS.expand(2, 3, 2), multimask_output=True)
    assert low.shape == (2, 3, 3, 24, 32) and iou.shape == (2, 3, 3)
    for i, one in enumerate(model.encode_image(pixels(B=2))):
        assert_same((low[i], iou[i]), model.decode_masks(one, POINTS, LABELS, multimask_output=True))


def test_prompts_that_are_not_one_set_for_each_image_are_refused(model):
    with pytest.raises(PromptError, match=r"2 images need prompts \[2, N, ...\]"):
        model(pixels(B=2), boxes=BOXES)
    with pytest.raises(PromptError, match=r"there are 2 images, but prompts for \[3\]"):
        model(pixels(B=2), boxes=BOXES.expand(3, 3, 4))
    with pytest.raises(PromptError, match="one set for each image"):
        model(pixels(), POINTS[None], LABELS[None], BOXES)
    with pytest.raises(PromptError, match="no prompt"):
        model(pixels())
    with pytest.raises(TypeError, match="boxes must be a torch.Tensor, got list"):
        model(pixels(), boxes=BOXES.tolist())


def test_data_parallel_calls_the_model(model):
    assert_same(nn.DataParallel(model)(pixels(), boxes=BOXES), model(pixels(), boxes=BOXES))
    model._is_replica = True
    assert not model._use_graph(torch.zeros(1))


def test_a_compiled_model_gives_the_same_masks(model):
    want = model(pixels(), boxes=BOXES)
    counter = CompileCounterWithBackend("eager")
    assert_same(torch.compile(model, backend=counter)(pixels(), boxes=BOXES), want)
    assert counter.frame_count > 0


def test_compile_compiles_both_methods(model):
    want = model(pixels(), boxes=BOXES)
    counter = CompileCounterWithBackend("eager")
    model.compile(backend=counter)
    embedding = model.encode_image(pixels())
    assert counter.frame_count == 1
    assert_same(model.decode_masks(embedding, boxes=BOXES), want)
    assert counter.frame_count == 2
    assert_same(model(pixels(), boxes=BOXES), want)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(other(pixels(), boxes=BOXES), want)
        assert "encode_image" not in other.__dict__


@torch.no_grad()
def test_images_of_other_sizes_are_not_compiled_each(model):
    counter = CompileCounterWithBackend("aot_eager")
    encode = torch.compile(model.encode_image, backend=counter, dynamic=True)
    for H, W in ((96, 128), (64, 96), (160, 80), (80, 192)):
        got, want = encode(pixels(1, H, W)), model.encode_image(pixels(1, H, W))
        assert got.input_size == (H, W)
        assert_same((got.image_embed, got.high_res_feats), (want.image_embed, want.high_res_feats))
    assert counter.frame_count <= 2


def test_pixels_are_padded_to_other_sizes(model):
    encode = torch.compile(model.encode_image, backend="eager", dynamic=True)
    for H, W in ((96, 128), (64, 96)):
        image = torch.randint(0, 256, (1, 3, H - 5, W - 9), dtype=torch.uint8)
        assert_same([encode(image, (H, W)).image_embed], [model.encode_image(image, (H, W)).image_embed])


def test_numbers_of_prompts_and_points_stay_free(model):
    embedding = model.encode_image(pixels())
    counter = CompileCounterWithBackend("eager")
    decode = torch.compile(model.decode_masks, backend=counter, dynamic=True)
    for N, P in ((3, 4), (2, 3), (5, 7)):
        coords, labels = 90 * torch.rand(N, P, 2), torch.randint(0, 2, (N, P))
        assert_same(decode(embedding, coords, labels), model.decode_masks(embedding, coords, labels))
    assert counter.frame_count == 1
    with pytest.raises(PromptError, match="differ in number"):
        decode(embedding, POINTS, LABELS, BOXES[:2])


class Decoder(nn.Module):
    def __init__(self, model, embedding):
        super().__init__()
        self.model, self.input_size = model, embedding.input_size
        self.maps = (embedding.image_embed, embedding.image_pe, embedding.high_res_feats)

    def forward(self, coords, labels):
        embedding = ImageEmbedding(*self.maps, self.input_size)
        return self.model.decode_masks(embedding, coords, labels)


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_exported_programs_take_any_number_of_prompts_and_points(model, strict):
    decoder, free = Decoder(model, model.encode_image(pixels())), {0: Dim("N"), 1: Dim("P")}
    program = torch.export.export(
        decoder, (POINTS[:, [0, 1, 0, 1]], LABELS[:, [0, 1, 0, 1]]), dynamic_shapes=(free, free), strict=strict
    ).module()
    for N, P in ((2, 3), (5, 7)):
        prompts = 90 * torch.rand(N, P, 2), torch.randint(0, 2, (N, P))
        assert_same(program(*prompts), decoder(*prompts))
