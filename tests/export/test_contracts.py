"""Tests of exported graphs in the calls that programs for SAM and SAM 2 make, and of folders of the previous format."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exports import model_to_export
from onnx import TensorProto, helper
from PIL import Image

from fastsam_rwkv import Predictor
from fastsam_rwkv.compat import Sam, SamPredictor
from fastsam_rwkv.export import ExportError, Manifest, OnnxPredictor, check_onnx
from fastsam_rwkv.export.graphs import SamEncoderGraph
from fastsam_rwkv.export.manifest import describe
from fastsam_rwkv.modeling.pixels import normalize_values
from fastsam_rwkv.predictor.frame import ImageFrame


@pytest.fixture(scope="module")
def model():
    return model_to_export()


def sessions(folder):
    return [onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("encoder", "decoder")]


def gradient(H, W):
    y, x = np.mgrid[:H, :W]
    return np.stack([255 * x // W, 255 * y // H, (x // 8 + y // 8) % 256], -1).astype(np.uint8)


def sam2_program(folder, image, points, labels, has_mask=0.0):
    """Give and take everything by position, as AnyLabeling, X-AnyLabeling and samexporter do with SAM 2's graphs."""
    encoder, decoder = sessions(folder)
    height, width = encoder.get_inputs()[0].shape[2:]
    pixels = np.asarray(Image.fromarray(image).resize((width, height)), np.float64) / 255
    pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    feed = {encoder.get_inputs()[0].name: pixels.transpose(2, 0, 1)[None].astype(np.float32)}
    high_res_0, high_res_1, embed = encoder.run([o.name for o in encoder.get_outputs()], feed)
    coords = np.array([points], np.float32) / image.shape[1::-1] * [width, height]
    mask = np.zeros((1, 1, height // 4, width // 4), np.float32)
    given = (embed, high_res_0, high_res_1, coords.astype(np.float32), np.array([labels], np.float32), mask)
    names = [i.name for i in decoder.get_inputs()]
    inputs = dict(zip(names, (*given, np.array([has_mask], np.float32)), strict=True))
    return decoder.run([o.name for o in decoder.get_outputs()], inputs)


def sam_program(folder, image, points, labels, has_mask=0.0, size=None):
    """Give unnormalized pixels of up to 1024 and take masks by position, as the programs do with SAM's graphs."""
    encoder, decoder = sessions(folder)
    scale = 1024 / max(image.shape[:2])
    resized = Image.fromarray(image).resize([round(side * scale) for side in image.shape[1::-1]])
    (embedding,) = encoder.run(None, {encoder.get_inputs()[0].name: np.asarray(resized)})
    inputs = {
        "image_embeddings": embedding,
        "point_coords": np.concatenate([np.array(points) * scale, [[0, 0]]])[None].astype(np.float32),
        "point_labels": np.array([[*labels, -1]], np.float32),
        "mask_input": np.zeros((1, 1, 256, 256), np.float32),
        "has_mask_input": np.array([has_mask], np.float32),
        "orig_im_size": np.array(size or image.shape[:2], np.float32),
    }
    return decoder.run(None, inputs)


def test_sam2_programs_take_everything_by_position(exports, model):
    image = gradient(128, 128)  # programs stretch other images to a square
    masks, scores = sam2_program(exports["fp32"], image, [[20, 30], [90, 100]], [2, 3])
    predictor = Predictor(model)
    predictor.set_image(image)
    for many, part in ((False, slice(0, 1)), (True, slice(1, 4))):
        _, iou, low = predictor.predict(box=[20, 30, 90, 100], multimask_output=many)
        np.testing.assert_allclose(masks[0, part], low, atol=1e-4)
        np.testing.assert_allclose(scores[0, part], iou, atol=1e-5)


@pytest.mark.parametrize("size", [(1024, 1024), (768, 1024), (333, 512)])
def test_sam_programs_get_the_mask_of_the_predictor(size, exports, model):
    """A model of 128 pixels answers in the frame of 1024."""
    image = gradient(*size)
    H, W = size
    box = [[W // 8, H // 4], [W // 2, H // 2]]
    masks, scores, low = sam_program(exports["sam"], image, box, [2, 3])
    assert masks.shape == (1, 1, H, W) and scores.shape == (1, 1) and low.shape == (1, 1, 256, 256)
    predictor = Predictor(model)
    predictor.set_image(image)
    points = {"point_coords": [[0, 0]], "point_labels": [-1]}  # the padding that programs append
    want = predictor.predict(box=np.ravel(box), **points, multimask_output=False)
    got, expected = masks[0, 0] > 0, want.masks[0]
    assert 0.02 < expected.mean() < 0.98
    least = 0.99 if max(size) == 1024 else 0.95  # programs enlarge smaller images, and the graph shrinks them again
    assert (got & expected).sum() / (got | expected).sum() > least
    np.testing.assert_allclose(scores[0], want.scores, atol=2e-3)


def test_sam_chooses_by_the_number_of_points(exports, model):
    """The best of three for a click and its padding, the single mask for more points."""
    image = gradient(1024, 1024)
    predictor = Predictor(model)
    predictor.set_image(image)
    _, scores, _ = sam_program(exports["sam"], image, [[300, 400]], [1])
    several = predictor.predict([[300, 400]], [1], multimask_output=True).scores
    np.testing.assert_allclose(scores[0, 0], several.max(), atol=2e-3)
    _, scores, _ = sam_program(exports["sam"], image, [[300, 400], [600, 500]], [1, 0])
    single = predictor.predict([[300, 400], [600, 500]], [1, 0], multimask_output=False).scores
    np.testing.assert_allclose(scores[0, 0], single[0], atol=2e-3)
    assert abs(several.max() - several.min()) > 5e-3  # the choice can be wrong


def test_a_predictor_of_tensors_feeds_sams_decoder(exports, model):
    """The order of calls of segment-anything's ONNX notebook and of label-studio's ONNX mode."""
    image = gradient(300, 400)
    predictor = SamPredictor(Sam(model))
    predictor.set_image(image)
    embedding = predictor.get_image_embedding().cpu().numpy()
    points = np.concatenate([np.array([[100, 80], [350, 250]]), np.array([[0.0, 0.0]])], axis=0)[None]
    feeds = {
        "image_embeddings": embedding,
        "point_coords": predictor.transform.apply_coords(points, image.shape[:2]).astype(np.float32),
        "point_labels": np.array([2, 3, -1], np.float32)[None],
        "mask_input": np.zeros((1, 1, 256, 256), np.float32),
        "has_mask_input": np.zeros(1, np.float32),
        "orig_im_size": np.array(image.shape[:2], np.float32),
    }
    masks, scores, low = sessions(exports["sam"])[1].run(None, feeds)
    want = predictor.predict(
        box=[100, 80, 350, 250], point_coords=[[0, 0]], point_labels=[-1], multimask_output=False, return_logits=True
    )
    np.testing.assert_allclose(low[0], want.low_res_logits, atol=1e-4)
    np.testing.assert_allclose(masks[0], want.masks, atol=1e-4)
    np.testing.assert_allclose(scores[0], want.scores, atol=1e-5)
    feeds |= {"mask_input": low, "has_mask_input": np.ones(1, np.float32)}
    again = sessions(exports["sam"])[1].run(None, feeds)[2]
    assert np.abs(again - low).max() > 1e-3


@pytest.mark.parametrize("program, form", [(sam2_program, "fp32"), (sam_program, "sam")])
def test_has_mask_input_below_zero_says_no(program, form, exports):
    """osam sends -1."""
    image = gradient(128, 128)
    none, minus, one = (program(exports[form], image, [[60, 70]], [1], value)[0] for value in (0.0, -1.0, 1.0))
    np.testing.assert_array_equal(none, minus)
    assert np.abs(none - one).max() > 1e-3


@pytest.mark.parametrize("size", [(90, 150), (150, 90), (700, 333), (1, 300)])
def test_masks_of_sams_decoder_match_image_frame(size, exports):
    masks, _, low = sam_program(exports["sam"], gradient(64, 64), [[30, 20]], [1], size=size)
    np.testing.assert_allclose(masks, ImageFrame.of(size, 1024).masks_to_image(low), atol=1e-4)


def test_osams_encoder_takes_normalized_pixels(exports, model):
    """The graph differs from "sam" in this alone."""
    manifest = Manifest.read(exports["sam"])
    image = torch.from_numpy(gradient(1024, 1024))
    osam = Manifest(**{**vars(manifest), "contract": "osam", "uint8": False})
    assert osam.image_input == "x"
    with torch.inference_mode():
        want = SamEncoderGraph(model, manifest)(image)
        got = SamEncoderGraph(model, osam)(normalize_values(image.permute(2, 0, 1)[None]))
    torch.testing.assert_close(got, want)


def test_onnx_predictor_runs_sams_graphs(exports, model):
    image = gradient(200, 300)
    predictor, reference = OnnxPredictor(exports["sam"]), Predictor(model)
    assert (predictor.image_size, predictor.has_multimask) == (1024, False)
    for points, labels in (([[100, 80]], [1]), ([[100, 80], [30, 20]], [1, 0])):
        got = predictor.predict_image(image, points, labels)
        assert got.masks.shape == (1, 200, 300) and got.low_res_logits.shape == (1, 256, 256)
    want = reference.predict_image(image, points, labels, multimask_output=False)
    assert (got.masks == want.masks).mean() > 0.97
    predictor.predict_image(image, box=[100, 80, 120, 90], zoom="always")
    assert predictor.predict_image(image, points, labels, mask_input=got.low_res_logits).masks.shape == (1, 200, 300)
    predictor.set_image(image)
    assert predictor.get_image_embedding().shape == (1, 1280, 8, 8)


def test_configs_name_the_graphs_and_the_kind(exports):
    lines = {
        file: dict(line.split(": ") for line in (exports["sam"] / file).read_text().splitlines())
        for file in ("config.yaml", "x-anylabeling.yaml")
    }
    for config in lines.values():
        assert config["type"] == "segment_anything"
        assert (config["input_size"], config["max_width"], config["max_height"]) == ("1024", "1024", "1024")
        for part in ("encoder", "decoder"):
            assert (exports["sam"] / config[f"{part}_model_path"]).is_file()
        assert {"name", "display_name", "provider"} <= set(config)
    assert not (exports["fp32"] / "config.yaml").exists()


def in_format_2(folder):
    """Turn an export into one of format 2, which had one map of 64 channels behind `image_embed`."""
    file = folder / "encoder.onnx"
    encoder = onnx.load(file)
    first, second, embed = encoder.graph.output
    encoder.graph.node.append(helper.make_node("Concat", [first.name, second.name], ["high_res_feats"], axis=1))
    whole = helper.make_tensor_value_info("high_res_feats", TensorProto.FLOAT, ["batch", 64, 32, 32])
    outputs = [onnx.ValueInfoProto.FromString(embed.SerializeToString()), whole]
    del encoder.graph.output[:]
    encoder.graph.output.extend(outputs)
    onnx.save(encoder, file)
    file = folder / "decoder.onnx"
    decoder = onnx.load(file)
    halves = [i.name for i in decoder.graph.input if i.name.startswith("high_res_feats_")]
    kept = [i for i in decoder.graph.input if i.name not in halves]
    del decoder.graph.input[:]
    whole = helper.make_tensor_value_info("high_res_feats", TensorProto.FLOAT, [1, 64, 32, 32])
    decoder.graph.input.extend([kept[0], whole, *kept[1:]])
    decoder.graph.node.insert(0, helper.make_node("Split", ["high_res_feats"], halves, axis=1, num_outputs=2))
    onnx.save(decoder, file)
    manifest = json.loads((folder / "export.json").read_text())
    del manifest["contract"]
    files = {name: describe(folder / name) for name in ("decoder.onnx", "encoder.onnx")}
    manifest |= {"format_version": 2, "sam_compatible": False, "files": files}
    (folder / "export.json").write_text(json.dumps(manifest))


def test_folders_of_format_2_run(exports, tmp_path):
    folder = exports.copy("fp32", tmp_path / "old")
    in_format_2(folder)
    assert Manifest.read(folder).contract == "v2"
    image = gradient(90, 150)
    for prompt in ({"box": [20, 10, 120, 80]}, {"point_coords": [[60, 40]]}):
        got, want = (OnnxPredictor(f).predict_image(image, **prompt) for f in (folder, exports["fp32"]))
        np.testing.assert_allclose(got.low_res_logits, want.low_res_logits, atol=1e-5)
    with pytest.raises(ExportError, match="has format 2, which predictors run but nothing checks; export again"):
        check_onnx(folder)
    manifest = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps({**manifest, "sam_compatible": True}))
    assert Manifest.read(folder).takes_size
