"""Benchmarks of exported graphs, with a small model."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from small_model import CONFIG, small_model

from benchmarks.speed import onnx_agreement, onnx_cpu


def test_agreement(tmp_path, monkeypatch, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)).save(tmp_path / "a.jpg")
    configs = SimpleNamespace(from_name=lambda name, **sizes: CONFIG)
    monkeypatch.setattr(onnx_agreement, "ModelConfig", configs)
    out = tmp_path / "out.json"
    options = ["--variants", "tiny", "--precisions", "fp32", "--image-size", "128", "--out", str(out)]
    onnx_agreement.main([str(tmp_path), *options])
    (row,) = json.loads(out.read_text())["rows"]
    assert json.loads(capsys.readouterr().out) == row
    assert row["photographs"] == 1 and row["masks"] == 22 * 4 and row["image_size"] == 128
    assert row["logits"] < 1e-3 and row["mask_iou_mean"] > 0.999
    assert row["export_seconds"] > 0 and 1e8 < row["export_peak_bytes"] < 4e9
    assert row["encoder_bytes"] > 1e5 and row["decoder_bytes"] > 1e5


def test_empty_folder_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        onnx_agreement.main([str(tmp_path)])
    assert "no .jpg below" in capsys.readouterr().err


def test_encoders_are_timed_in_both_libraries(exports, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx_cpu, "ours", lambda name, image_size: small_model())
    monkeypatch.setattr(onnx_cpu, "export_onnx", lambda model, folder: exports.copy("fp32", folder))
    out = tmp_path / "out.json"
    onnx_cpu.main(["--image-size", "128", "--only", "tiny", "--repeats", "2", "--out", str(out)])
    report = json.loads(out.read_text())
    assert [row["name"] for row in report["rows"]] == ["tiny", "tiny-onnx"]
    (compared,) = report["compared"]
    assert compared["what"] == "tiny / tiny-onnx" and compared["goal"] == ">= 1.0" and compared["median"] > 0
    assert report["machine"]["onnxruntime"] in capsys.readouterr().out
