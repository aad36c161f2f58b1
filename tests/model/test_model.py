from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
import torch.nn.functional as F
from small_model import CONFIG, small_model
from torch.utils.flop_counter import FlopCounterMode

from fastsam_rwkv import RWKVSAM, ModelConfig
from fastsam_rwkv.modeling import layers
from fastsam_rwkv.modeling.layers import MBConv, Stem
from fastsam_rwkv.modeling.rwkv_sam import _as_kernels_read
from fastsam_rwkv.predictor.transforms import preprocess, resize
from fastsam_rwkv.triton_kernels import rows


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def embedding(model):
    with torch.inference_mode():
        return model.encode_image(pixels())


def pixels(B=1, H=96, W=128, seed=0):
    return torch.randn(B, 3, H, W, generator=torch.Generator().manual_seed(seed))


POINTS = torch.tensor([[[30.0, 40.0], [90.0, 20.0]], [[64.0, 50.0], [3.0, 80.0]], [[100.0, 10.0], [11.0, 12.0]]])
LABELS = torch.tensor([[1, 0], [1, 1], [0, 1]])
BOXES = torch.tensor([[10.0, 10.0, 60.0, 70.0], [50.0, 5.0, 120.0, 90.0], [0.0, 0.0, 128.0, 96.0]])


@pytest.mark.parametrize(
    "variant, backbone_millions, backbone_gmacs",
    [("tiny", 5.0, 26.7), ("small", 19.7, 106), ("base", 78.7, 422), ("large", 139.1, 725)],
)
def test_published_sizes(variant, backbone_millions, backbone_gmacs):
    with torch.device("meta"):
        backbone = RWKVSAM(ModelConfig.from_name(variant)).backbone
        x = torch.empty(1, 1024, 1024, 3)
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(backbone_millions, abs=0.06)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone(x)
    assert counter.get_total_flops() / 2e9 == pytest.approx(backbone_gmacs, rel=0.01)


def test_one_more_prompt_costs_at_most_two_fifths_of_the_published_decoder():
    with torch.device("meta"):
        model = RWKVSAM(ModelConfig.from_name("tiny"))
        embedding = model.encode_image(torch.empty(1, 3, 1024, 1024))
        coords, labels = torch.empty(5, 1, 2), torch.empty(5, 1, dtype=torch.long)
    macs = []
    for n in (1, 5):
        counter = FlopCounterMode(display=False)
        with counter:
            model.decode_masks(embedding, coords[:n], labels[:n])
        macs.append(counter.get_total_flops() / 2e9)
    assert (macs[1] - macs[0]) / 4 <= 0.4 * 12.0
    assert macs[0] <= 0.4 * 12.0


@pytest.mark.parametrize("values", [1, 3000, 1 << 20])
@pytest.mark.parametrize("size", [(2, 4), (6, 10), (34, 18)])
@pytest.mark.parametrize("make", [lambda: MBConv(8, 8, 1), lambda: MBConv(8, 12, 2), lambda: Stem(8)])
def test_strips_equal_the_whole_map(make, size, values, monkeypatch):
    module = make()
    x = torch.randn(2, *size, 3 if isinstance(module, Stem) else 8)
    args = (x, *size) if isinstance(module, Stem) else (x,)
    whole = module(*args)  # with gradients there is a single strip
    monkeypatch.setattr(rows, "STRIP_VALUES", values)
    with torch.no_grad():
        torch.testing.assert_close(module(*args), whole)


def test_upscale_is_a_transposed_convolution():
    module = layers.Upscale2x(6, 4)
    torch.nn.init.normal_(module.out_bias)
    weight = module.weight.view(2, 2, 4, 6).permute(3, 2, 0, 1)  # [in, out, 2, 2]
    x = torch.randn(2, 3, 5, 6)
    want = F.conv_transpose2d(x.permute(0, 3, 1, 2), weight, module.out_bias, stride=2).permute(0, 2, 3, 1)
    torch.testing.assert_close(module(x), want)
    norm, gelu = torch.nn.LayerNorm(4, layers.LN_EPS), torch.nn.GELU()
    torch.testing.assert_close(layers.fused_upscale(x, module, None, gelu), F.gelu(want))
    torch.testing.assert_close(layers.fused_upscale(x, module, norm, gelu), F.gelu(norm(want)))


def test_prompts_of_a_batch_are_independent(model, embedding):
    low, iou = model.decode_masks(embedding, POINTS, LABELS, BOXES)
    assert low.shape == (3, 1, 24, 32) and iou.shape == (3, 1)
    for i in range(3):
        alone = model.decode_masks(embedding, POINTS[i : i + 1], LABELS[i : i + 1], BOXES[i : i + 1])
        torch.testing.assert_close(alone[0][0], low[i], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone[1][0], iou[i], rtol=1e-4, atol=1e-4)


def test_multimask_outputs_follow_the_single_one(model, embedding):
    every, every_iou = model.decode_all(embedding, POINTS, LABELS)
    single, iou = model.decode_masks(embedding, POINTS, LABELS)
    three, three_iou = model.decode_masks(embedding, POINTS, LABELS, multimask_output=True)
    assert every.shape[1] == 4 and three.shape[1] == 3
    torch.testing.assert_close(torch.cat([single, three], 1), every)
    torch.testing.assert_close(torch.cat([iou, three_iou], 1), every_iou)


def test_images_of_a_batch_are_independent(model):
    both = model.encode_image(pixels(B=2))
    alone = model.encode_image(pixels(B=2)[1:])
    assert len(both) == 2 and len(both[1]) == 1 and len(both[-1]) == 1
    torch.testing.assert_close(both[1].image_embed, alone.image_embed, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        model.decode_masks(both[1], boxes=BOXES)[0], model.decode_masks(alone, boxes=BOXES)[0], rtol=1e-3, atol=1e-3
    )
    with pytest.raises(ValueError, match=r"2 images.*embedding\[i\]"):
        model.decode_masks(both, boxes=BOXES)
    with pytest.raises(IndexError):
        both[2]


def test_a_mask_prompt_changes_the_mask_and_needs_no_points(model, embedding):
    mask = torch.randn(3, 1, 24, 32)
    with_mask, _ = model.decode_masks(embedding, boxes=BOXES, mask_input=mask)
    assert not torch.allclose(with_mask, model.decode_masks(embedding, boxes=BOXES)[0])
    assert model.decode_masks(embedding, mask_input=mask)[0].shape == (3, 1, 24, 32)


def test_coordinates_of_padding_points_are_ignored(model, embedding):
    """A point with label -1 becomes the learned padding token, independent of its coordinates."""
    coords = torch.cat([POINTS, torch.full((3, 1, 2), 7.0)], 1)
    moved = torch.cat([POINTS, torch.full((3, 1, 2), 99.0)], 1)
    labels = torch.cat([LABELS, torch.full((3, 1), -1)], 1)
    torch.testing.assert_close(
        model.decode_masks(embedding, coords, labels)[0], model.decode_masks(embedding, moved, labels)[0]
    )


def test_threads_share_a_model(model, embedding):
    want = [model.decode_masks(embedding, boxes=BOXES[i : i + 1])[0] for i in range(3)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda i: model.decode_masks(embedding, boxes=BOXES[i % 3 : i % 3 + 1])[0], range(24)))
    for i, low in enumerate(got):
        torch.testing.assert_close(low, want[i % 3])


def test_every_parameter_gets_a_gradient():
    model = small_model().train()
    embedding = model.encode_image(pixels())
    mask = torch.randn(3, 1, 24, 32)
    low, iou = model.decode_all(embedding, POINTS, LABELS, BOXES, mask)
    no_mask, _ = model.decode_all(embedding, POINTS, torch.where(LABELS == 0, -1, LABELS))
    (low.square().mean() + iou.square().mean() + no_mask.square().mean()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_embedding_is_frozen(embedding):
    with pytest.raises(FrozenInstanceError):
        embedding.input_size = (1, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = small_model()
    frequencies = model.prompt_encoder.position.frequencies.clone()
    with torch.inference_mode():
        want, _ = model.decode_masks(model.encode_image(pixels()), POINTS, LABELS)
        model.to(dtype)
        got, _ = model.decode_masks(model.encode_image(pixels()), POINTS, LABELS)
    assert got.dtype == dtype
    assert torch.equal(model.prompt_encoder.position.frequencies, frequencies)  # rounding them would move the clicks
    assert (got.float() - want).norm() / want.norm() < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(model, embedding, dtype):
    want = model.decode_masks(embedding, POINTS, LABELS, mask_input=torch.ones(3, 1, 24, 32))
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        again = model.encode_image(pixels())
        got = model.decode_masks(again, POINTS, LABELS, mask_input=torch.ones(3, 1, 24, 32))
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(again.image_embed, embedding.image_embed)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_on_the_meta_device_first(model):
    with torch.device("meta"):
        late = RWKVSAM(CONFIG)
    late.half().to_empty(device="cpu")
    assert late.prompt_encoder.position.frequencies.dtype == torch.float32
    late.float().load_state_dict(model.state_dict())
    assert torch.equal(late.encode_image(pixels()).image_pe, model.encode_image(pixels()).image_pe)


def test_fourier_frequencies_stay_float32(model):
    narrow = small_model()
    narrow.load_state_dict({name: t.bfloat16() for name, t in model.state_dict().items()}, assign=True)
    narrow.decode_masks(narrow.encode_image(pixels()), POINTS, LABELS)
    assert narrow.float().prompt_encoder.position.frequencies.dtype == torch.float32


def test_a_batch_embedding_splits_into_images(model):
    both = model.encode_image(pixels(B=2))
    assert [one.image_embed.shape[0] for one in both] == [1, 1]
    assert torch.equal(torch.cat([one.image_embed for one in both]), both.image_embed)


@pytest.mark.parametrize(
    "bad, error, message",
    [
        (torch.zeros(1, 3, 100, 128), ValueError, "100x128"),
        (torch.zeros(3, 64, 64), ValueError, r"\[3, 64, 64\]"),
        (torch.zeros(1, 4, 64, 64), ValueError, r"\[1, 4, 64, 64\]"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.int64), TypeError, "int64"),
        (torch.zeros(1, 3, 0, 64), ValueError, r"empty: \[1, 3, 0, 64\]"),
    ],
)
def test_pixels_of_wrong_shape_or_dtype_are_refused(model, bad, error, message):
    with pytest.raises(error, match=message):
        model.encode_image(bad)


def test_uint8_pixels_and_padding(model):
    image = torch.randint(0, 256, (60, 70, 3), dtype=torch.uint8).numpy()
    normalized, _ = preprocess(image, 96)
    resized, frame = resize(image, 96)
    h, w = frame.resized_size
    assert resized.dtype == torch.uint8 and resized.shape == (1, 3, h, w)
    want = model.encode_image(normalized)
    for got in (
        model.encode_image(resized, (96, 96)),
        model.encode_image(normalized[:, :, :h, :w], (96, 96)),
    ):
        assert got.input_size == (96, 96)
        torch.testing.assert_close(got.image_embed, want.image_embed, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="input_size must be multiples of 16, got 96x100"):
        model.encode_image(resized, (96, 100))
    with pytest.raises(ValueError, match="82x96 are larger than input_size 80x96"):
        model.encode_image(resized, (80, 96))


@pytest.mark.parametrize(
    "prompts, message",
    [
        ({}, "no prompt"),
        ({"point_coords": POINTS}, "without point_labels"),
        ({"point_coords": POINTS, "point_labels": LABELS[:2]}, r"shape \[3, 2\], got \[2, 2\]"),
        ({"point_coords": POINTS, "point_labels": LABELS.bool()}, "whole floats, got torch.bool"),
        ({"point_coords": POINTS, "point_labels": LABELS.to(torch.complex64)}, "whole floats, got torch.complex64"),
        ({"point_coords": POINTS, "point_labels": LABELS / 2}, "point label 0.5: labels are 1"),
        ({"point_coords": POINTS, "point_labels": LABELS * float("nan")}, "point label nan"),
        ({"point_coords": POINTS, "point_labels": LABELS + 3}, "point label 4: labels are 1"),
        ({"point_coords": POINTS, "point_labels": LABELS * 2}, "point label 2: .*as `box`"),
        ({"point_coords": POINTS, "point_labels": LABELS - 2}, "point label -2"),
        ({"boxes": BOXES[0]}, r"\[N, 4\]"),
        ({"boxes": BOXES, "point_coords": POINTS[:2], "point_labels": LABELS[:2]}, "differ in number"),
        ({"boxes": BOXES, "mask_input": torch.zeros(3, 1, 32, 32)}, r"\[N, 1, 24, 32\]"),
        ({"boxes": BOXES, "mask_input": torch.ones(3, 1, 24, 32).bool()}, "logits, got a mask of torch.bool.*_logits"),
        ({"boxes": BOXES, "mask_input": torch.ones(3, 1, 24, 32).byte()}, "logits, got a mask of torch.uint8"),
    ],
)
def test_prompts_of_wrong_shape_or_label_are_refused(model, embedding, prompts, message):
    with pytest.raises(ValueError, match=message):
        model.decode_masks(embedding, **prompts)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float32, torch.float16, torch.bfloat16])
def test_labels_of_any_real_type(model, embedding, dtype):
    want = model.decode_masks(embedding, POINTS, LABELS)[0]
    assert torch.equal(model.decode_masks(embedding, POINTS, LABELS.to(dtype))[0], want)


def test_multimask_output_needs_a_multimask_model(embedding):
    model = small_model(replace(CONFIG, num_multimask_outputs=0))
    with pytest.raises(ValueError, match="num_multimask_outputs=3"):
        model.decode_masks(embedding, boxes=BOXES, multimask_output=True)


def test_prompts_that_are_not_tensors_are_refused(model):
    with pytest.raises(TypeError, match="boxes must be a torch.Tensor, got list"):
        model.decode_masks(model.encode_image(pixels()), boxes=BOXES.tolist())


def test_weights_have_the_layout_that_kernels_read():
    model = small_model()
    for weight in (p for p in model.parameters() if p.ndim == 4):
        laid_out = _as_kernels_read(weight)
        assert torch.equal(laid_out, weight)
        depthwise = weight.shape[1:] == (1, 3, 3)
        assert laid_out.permute((2, 3, 1, 0) if depthwise else (0, 2, 3, 1)).is_contiguous()
        assert _as_kernels_read(laid_out).stride() == laid_out.stride()
    bias = model.backbone.stem.conv1.bias
    assert _as_kernels_read(bias) is bias
