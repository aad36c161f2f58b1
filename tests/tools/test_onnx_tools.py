"""Tests that common tools read the exported graphs, and compute what ONNX Runtime computes."""

import cv2
import numpy as np
import onnx
import onnxruntime
import onnxsim
import openvino
import pytest
from exports import feeds_of
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process

from fastsam_rwkv.export import OnnxPredictor, adopt_onnx


def by_opencv(file, feeds, names):
    net = cv2.dnn.readNetFromONNX(str(file), cv2.dnn.ENGINE_NEW)
    for name, array in feeds.items():
        net.setInput(array, name)
    return net.forward(names)


def by_openvino(file, feeds, names):
    compiled = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = compiled(feeds)
    return [results[name] for name in names]


def by_preprocessed(file, feeds, names):
    quant_pre_process(str(file), str(file.with_suffix(".inferred")))
    return onnxruntime.InferenceSession(file.with_suffix(".inferred")).run(names, feeds)


def by_onnxsim(file, feeds, names):
    simplify(file)
    return onnxruntime.InferenceSession(file).run(names, feeds)


def simplify(file):
    graph, same = onnxsim.simplify(onnx.load(file))
    assert same
    onnx.save(graph, file)


@pytest.mark.parametrize("form", ["fp32", "sam"])
@pytest.mark.parametrize("tool", [by_preprocessed, by_onnxsim, by_openvino, by_opencv])
def test_common_tools_read_both_graphs(tool, form, exports, tmp_path):
    folder = exports.copy(form, tmp_path / "copy")
    for name in ("encoder", "decoder"):
        file = folder / f"{name}.onnx"
        assert not [n for n in onnx.load(file).graph.node if n.op_type == "Constant"]
        session = onnxruntime.InferenceSession(file)
        names, feeds = [output.name for output in session.get_outputs()], feeds_of(session)
        want = session.run(names, feeds)
        for got, w in zip(tool(file, feeds, names), want, strict=True):
            np.testing.assert_allclose(got, w, rtol=1e-3, atol=1e-3 * np.abs(w).max())


def test_simplified_graphs_can_be_adopted(exports, tmp_path):
    folder = exports.copy("fp32", tmp_path / "copy")
    for name in ("encoder.onnx", "decoder.onnx"):
        simplify(folder / name)
    assert adopt_onnx(folder, min_mask_iou=0.999).check["min_mask_iou"] == 0.999
    OnnxPredictor(folder)


def test_quantized_graphs_can_be_adopted(exports, tmp_path):
    folder = exports.copy("fp32", tmp_path / "copy")
    for name in ("encoder.onnx", "decoder.onnx"):
        quant_pre_process(str(folder / name), str(tmp_path / "inferred"))
        quantize_dynamic(str(tmp_path / "inferred"), str(folder / name))
    assert 0.8 <= adopt_onnx(folder, min_mask_iou=0.8).check["photo"]["mask_iou_mean"] < 1
    OnnxPredictor(folder)
