"""`fastsam_rwkv.compat`: a program's own predictor on a SAM-shaped model gives what `Predictor` gives."""

import numpy as np
import pytest
import torch
from PIL import Image
from small_model import CONFIG, small_model

from fastsam_rwkv import ModelConfig, Predictor, PromptError
from fastsam_rwkv.compat import Sam, SamAutomaticMaskGenerator, SamPredictor, sam_model_registry
from fastsam_rwkv.modeling.pixels import shrink
from fastsam_rwkv.predictor.sam_transform import ResizeLongestSide

BOX, POINTS, LABELS = [20, 15, 110, 80], [[40, 50], [100, 20]], [1, 0]


@pytest.fixture(scope="module")
def sam():
    return Sam(small_model())


@pytest.fixture(scope="module")
def photo():
    return np.random.default_rng(0).integers(0, 255, (90, 150, 3), np.uint8)


@torch.no_grad()
def own_predictor(sam, photo, boxes=None, points=None, masks=None, multimask_output=True):
    """The steps of segment-anything's predictor with a model, from its description."""
    transform = ResizeLongestSide(sam.image_encoder.img_size)
    pixels = torch.from_numpy(transform.apply_image(photo)).permute(2, 0, 1).contiguous()[None].to(sam.device)
    features = sam.image_encoder(sam.preprocess(pixels))
    if points is not None:
        coords = torch.as_tensor(transform.apply_coords(np.array(points[0]), photo.shape[:2]), dtype=torch.float)
        points = coords[None], torch.as_tensor(points[1], dtype=torch.int)[None]
    if boxes is not None:
        boxes = torch.as_tensor(transform.apply_boxes(np.array(boxes), photo.shape[:2]), dtype=torch.float)
    sparse, dense = sam.prompt_encoder(points=points, boxes=boxes, masks=masks)
    low, iou = sam.mask_decoder(
        image_embeddings=features,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask_output,
    )
    logits = sam.postprocess_masks(low, tuple(pixels.shape[-2:]), photo.shape[:2])
    return logits > sam.mask_threshold, iou, low


@pytest.mark.parametrize("multimask_output", [True, False])
def test_parts_give_what_the_predictor_gives(sam, photo, multimask_output):
    predictor = SamPredictor(sam)
    assert isinstance(predictor, Predictor) and predictor.model is sam.model
    predictor.set_image(photo)
    boxes = [BOX, [0, 0, 60, 60]]
    for found, want in (
        (own_predictor(sam, photo, boxes=boxes, multimask_output=multimask_output), predictor.predict(
            box=boxes, multimask_output=multimask_output)),
        (own_predictor(sam, photo, points=(POINTS, LABELS), multimask_output=multimask_output), predictor.predict(
            [POINTS], [LABELS], multimask_output=multimask_output)),
    ):  # fmt: skip
        for a, b in zip(found, want, strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(a.double(), b.astype(float), atol=1e-4)
    low = found[2][:, :1]
    again = own_predictor(sam, photo, points=(POINTS, LABELS), masks=low, multimask_output=multimask_output)
    want = predictor.predict([POINTS], [LABELS], mask_input=low, multimask_output=multimask_output)
    np.testing.assert_allclose(again[2], want.low_res_logits, atol=1e-4)
    only = own_predictor(sam, photo, masks=low, multimask_output=multimask_output)
    np.testing.assert_allclose(only[2], predictor.predict(
        mask_input=low, multimask_output=multimask_output).low_res_logits, atol=1e-4)  # fmt: skip


def test_the_frame_of_1024_pixels_changes_no_mask(sam):
    """An image of 1024 pixels is resized once, by `Predictor` before the model and by SAM's predictor inside it."""
    y, x = np.mgrid[:768, :1024]
    image = np.stack([x // 4, y // 3, (x // 8 + y // 8) % 256], -1).astype(np.uint8)
    box, found = [100, 200, 600, 500], []
    for predictor in (
        SamPredictor(sam),
        SamPredictor(sam.model),
        SamPredictor(Sam(sam.model, 128)),
        Predictor(sam.model),
    ):
        predictor.set_image(image)
        found.append(predictor.predict(box=box, multimask_output=False))
    assert [len(f.low_res_logits[0]) for f in found] == [256, 256, 32, 32]
    for result in found:
        np.testing.assert_allclose(result.scores, found[-1].scores, atol=2e-3)
        both, either = ((op(result.masks, found[-1].masks)).sum() for op in (np.logical_and, np.logical_or))
        assert both > 1000 and both / either > 0.97  # a low-resolution pixel is 32 x 32 pixels here
    assert SamPredictor(sam).transform.target_length == 1024


@pytest.mark.parametrize("side", [96, 48, 32, 24])
def test_pixels_shrink_as_in_pillow(side):
    x = np.random.default_rng(0).random((96, 96)).astype(np.float32)
    want = np.asarray(Image.fromarray(x).resize((side, side), Image.Resampling.BILINEAR))
    got = shrink(torch.from_numpy(x)[None, None].expand(1, 3, -1, -1), side)
    np.testing.assert_allclose(got[0, :, 1:-1, 1:-1], np.stack([want[1:-1, 1:-1]] * 3), atol=1e-6)
    np.testing.assert_allclose(got[0, 0], want, atol=0.06)  # the outermost pixels are repeated, not left out


def test_features_restore_an_image_in_the_frame(sam, photo):
    predictor = SamPredictor(sam)
    predictor.set_image(photo)
    want = predictor.predict(box=BOX).low_res_logits
    features, size = predictor.get_image_embedding(), predictor.original_size
    assert features.shape == (1, 1280, 8, 8) and predictor.input_size == (614, 1024)
    other = SamPredictor(sam)
    other.features, other.original_size = features, size
    np.testing.assert_array_equal(other.predict(box=BOX).low_res_logits, want)
    other.set_embedding(predictor.embedding)
    np.testing.assert_array_equal(other.predict(box=BOX).low_res_logits, want)


def test_the_model_itself_takes_a_batch(sam, photo):
    transform = ResizeLongestSide(sam.image_encoder.img_size)
    other = photo[:, :80].copy()
    batch = []
    for image in (photo, other):
        tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
        boxes = transform.apply_boxes_torch(torch.tensor([[5, 5, 60, 70], [10, 20, 40, 50]]), image.shape[:2])
        batch.append(
            {"image": transform.apply_image_torch(tensor)[0], "boxes": boxes, "original_size": image.shape[:2]}
        )
    found = sam(batch, multimask_output=False)
    for result, image in zip(found, (photo, other), strict=True):
        assert result["masks"].shape == (2, 1, *image.shape[:2]) and result["masks"].dtype == torch.bool
        assert result["iou_predictions"].shape == (2, 1) and result["low_res_logits"].shape == (2, 1, 256, 256)
    want = SamPredictor(sam)
    want.set_torch_image(batch[1]["image"][None], other.shape[:2])
    masks, _, low = want.predict_torch(None, None, boxes=batch[1]["boxes"], multimask_output=False)
    np.testing.assert_allclose(found[1]["low_res_logits"], low, atol=1e-4)
    assert (found[1]["masks"] == masks).float().mean() > 0.999


def test_sizes_devices_and_parameters(sam):
    encoder = sam.prompt_encoder
    assert (encoder.input_image_size, encoder.image_embedding_size, encoder.mask_input_size) == (
        (1024, 1024), (8, 8), (256, 256)
    )  # fmt: skip
    assert sam.image_format == "RGB" and sam.mask_threshold == 0 and encoder.embed_dim == 256
    assert sam.preprocess(torch.zeros(3, 77, 128)).shape == (3, 1024, 1024)
    own = Sam(sam.model, img_size=128)
    assert own.preprocess(torch.zeros(3, 77, 128)).shape == (3, 128, 128)
    assert sam.to("cpu").eval().device.type == "cpu"
    assert sum(p.numel() for p in sam.parameters()) == sum(p.numel() for p in sam.model.parameters())


def test_wrong_embeddings_and_prompts(sam):
    with pytest.raises(PromptError, match="give points, boxes or masks"):
        sam.prompt_encoder(points=None, boxes=None, masks=None)
    sparse, dense = sam.prompt_encoder(None, torch.zeros(1, 4), None)
    pe = sam.prompt_encoder.get_dense_pe()
    with pytest.raises(ValueError, match=r"\[B, 1280, 8, 8\], got \[1, 256, 8, 8\]"):
        sam.mask_decoder(torch.zeros(1, 256, 8, 8), pe, sparse, dense, True)
    with pytest.raises(ValueError, match="holds 2 images"):
        sam.mask_decoder(torch.zeros(2, 1280, 8, 8), pe, sparse, dense, True)
    single = Sam(small_model(ModelConfig(**{**CONFIG.__dict__, "num_multimask_outputs": 0})))
    with pytest.raises(PromptError, match="num_multimask_outputs=3"):
        single.mask_decoder(torch.zeros(1, 1280, 8, 8), pe, sparse, dense, True)


def test_the_registry_and_the_generator(sam, photo, tmp_path):
    sam.model.save_pretrained(tmp_path)
    built = sam_model_registry["vit_h"](checkpoint=tmp_path)
    assert isinstance(built, Sam) and built.model.config.image_size == 128
    assert sam_model_registry["default"]().model.config.image_size == 512  # the bundled model
    generator = SamAutomaticMaskGenerator(model=built, points_per_side=2, pred_iou_thresh=-9, stability_score_thresh=0)
    assert generator.generate(photo)
