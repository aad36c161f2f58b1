"""Tests of the TensorRT export against a stand-in. None of them runs TensorRT."""

import json
import shutil
import sys

import numpy as np
import pytest
import tensorrt_standin

from fastsam_rwkv.cli import main
from fastsam_rwkv.export import (
    ExportError,
    OnnxPredictor,
    TensorRTPredictor,
    build_tensorrt,
    tensorrt,
)
from fastsam_rwkv.export.tensorrt import Ranges, shapes, trtexec_commands


@pytest.fixture(params=["fp32", "fp16"])
def folder(request, exports, tmp_path):
    return exports.copy(request.param, tmp_path / "folder")


def test_profile_shapes(exports):
    ranges = Ranges((1, 2, 4), (1, 8, 32), (1, 3, 16))
    plain, uint8 = (shapes(OnnxPredictor(exports[name]).manifest, ranges) for name in ("fp32", "fp16"))
    assert plain == {
        "encoder.onnx": {"image": tuple((n, 3, 128, 128) for n in (1, 2, 4))},
        "decoder.onnx": {
            "point_coords": ((1, 1, 2), (8, 3, 2), (32, 16, 2)),
            "point_labels": ((1, 1), (8, 3), (32, 16)),
            "mask_input": tuple((n, 1, 32, 32) for n in (1, 8, 32)),
        },
    }
    assert uint8["encoder.onnx"] == {"image": ((1, 1, 1, 3), (2, 96, 128, 3), (4, 128, 128, 3))}


def test_trtexec_commands(exports):
    encoder, decoder = trtexec_commands(exports["fp32"], Ranges(batch=(1, 2, 4)))
    assert encoder.startswith("trtexec --onnx=") and "--stronglyTyped" in encoder and "fp16" not in encoder
    assert "--minShapes=image:1x3x128x128 --optShapes=image:2x3x128x128 --maxShapes=image:4x3x128x128" in encoder
    assert "--maxShapes=point_coords:32x16x2,point_labels:32x16,mask_input:32x1x32x32" in decoder


@pytest.mark.parametrize("values", [(2, 1, 4), (0, 1, 4), (1, 5, 4), (1, 2)])
def test_invalid_ranges_are_refused(values):
    with pytest.raises(ExportError, match="prompts must be MIN,OPT,MAX"):
        Ranges(prompts=values)


def test_missing_tensorrt_names_the_install_command_and_trtexec(exports, capsys):
    assert "tensorrt" not in sys.modules
    with pytest.raises(ExportError, match=r"pip install 'fastsam-rwkv\[tensorrt\]'"):
        build_tensorrt(exports["fp32"])
    assert main(["export", "tensorrt", str(exports["fp32"])]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("fastsam-rwkv: error: tensorrt cannot be imported")
    assert lines[-3:-1] == trtexec_commands(exports["fp32"])
    assert main(["export", "tensorrt", "--self-check"]) == 1
    assert "tensorrt cannot be imported" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ([], 2, "no folder; pass the one"),
        (["./nothing"], 1, "no folder 'nothing'"),
        (["SAM"], 1, "has the contract 'sam': the size of its masks depends"),
        (["PLAIN", "--prompts", "3,2,1"], 1, "prompts must be MIN,OPT,MAX"),
    ],
)
def test_invalid_commands_print_one_error(arguments, code, message, exports, capsys):
    names = {"SAM": str(exports["sam"]), "PLAIN": str(exports["fp32"])}
    assert main(["export", "tensorrt", *(names.get(a, a) for a in arguments)]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


def test_range_must_be_three_integers(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["export", "tensorrt", "x", "--batch", "1,2"])
    assert stopped.value.code == 2 and "'1,2' is not three integers MIN,OPT,MAX" in capsys.readouterr().err


def test_build_then_predict_matches_onnx_predictor(folder, monkeypatch, tmp_path):
    builds = tensorrt_standin.install(monkeypatch)
    cache = tmp_path / "timing.cache"
    built = build_tensorrt(folder, Ranges(prompts=(2, 2, 3)), timing_cache=cache)
    assert built["check"]["mask_iou_mean"] > 0.9999 and built["check"]["masks"] == (1 + 7 + 7) * 3
    assert [b["load_timing_cache"] for b in builds] == [None, str(cache)]  # the first build wrote it
    assert built == json.loads((folder / "engines.json").read_text()) | {"ranges": vars(Ranges(prompts=(2, 2, 3)))}
    assert (built["tensorrt"], built["gpu"], built["compute_capability"]) == ("10.8.0.43", "Stand-in GPU", "9.0")
    assert {"encoder.plan", "decoder.plan", "engines.json"} <= {file.name for file in folder.iterdir()}
    assert not [file for file in folder.iterdir() if file.name.startswith("unchecked")]

    image = np.random.default_rng(0).integers(0, 256, (60, 100, 3), np.uint8)
    ours, reference = TensorRTPredictor(folder), OnnxPredictor(folder)
    half = reference.manifest.precision == "fp16"  # then ONNX Runtime 1.20 rounds chunks of 3 and of 7 prompts apart
    for predictor in (ours, reference):
        predictor.set_image(image)
    for prompt in (
        {"point_coords": [[5, 6]]},
        {"box": [[1, 2, 30, 40]] * 7},  # takes three calls
        {"point_coords": [[5, 6]] * 3, "point_labels": [1, 0, 1], "box": [3, 4, 50, 50], "multimask_output": False},
        {"point_coords": [[5, 6]], "mask_input": np.full((1, 32, 32), 2.0)},
    ):
        prediction = ours.predict(**prompt, return_logits=True)
        for got, want in zip(prediction, reference.predict(**prompt, return_logits=True), strict=True):
            assert got.shape == want.shape
            np.testing.assert_allclose(got, want, atol=2**-10 if half else 1e-4)
        np.testing.assert_array_equal(ours.predict(**prompt)[0], prediction[0] > 0)
    assert tuple(ours.get_image_embedding().shape) == reference.get_image_embedding().shape
    with pytest.raises(ValueError, match=r"a prompt has 31 points .* 1 to 16; build it with --points 1,2,31"):
        ours.predict(point_coords=np.ones((30, 2)))
    with pytest.raises(ValueError, match="no mask_input without points"):
        ours.predict(mask_input=np.full((1, 32, 32), 2.0))


def test_engines_that_fail_the_check_are_rejected(folder, monkeypatch):
    tensorrt_standin.install(monkeypatch, error=3.0)
    with pytest.raises(ExportError, match=r"masks differ from ONNX Runtime's: mean IoU .*rejected"):
        build_tensorrt(folder)
    assert not (folder / "encoder.plan").exists() and (folder / "rejected" / "encoder.plan").exists()


def test_unusable_engines_are_refused(folder, monkeypatch):
    tensorrt_standin.install(monkeypatch)
    with pytest.raises(ExportError, match=r"holds no engines .*build them: fastsam-rwkv export tensorrt"):
        TensorRTPredictor(folder)
    build_tensorrt(folder)
    for change, message in (
        ({"version": "10.9.0"}, "built for tensorrt '10.8.0.43', but this machine has '10.9.0'"),
        ({"gpu": "Another"}, "built for gpu 'Stand-in GPU', but this machine has 'Another'"),
        ({"version": "10.7.0"}, "TensorRT 10.7.0 is older than 10.8"),
    ):
        with monkeypatch.context() as patch:
            tensorrt_standin.install(patch, **change)
            with pytest.raises(ExportError, match=message):
                TensorRTPredictor(folder)
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises(ExportError, match="needs an NVIDIA GPU"):
            TensorRTPredictor(folder)
    file = folder / "engines.json"
    text = file.read_text()
    for changed, message in (
        ("{", "damaged"),
        (text.replace('"format_version": 1', '"format_version": 5'), "have format 5, not 1"),
        (text.replace(json.loads(text)["graphs"]["encoder.onnx"], "0"), "built from other graphs"),
    ):
        file.write_text(changed)
        with pytest.raises(ExportError, match=message):
            TensorRTPredictor(folder)
    file.write_text(text)
    (folder / "decoder.plan").write_bytes(b"cut off")
    with pytest.raises(ExportError, match=r"decoder\.plan' is missing or was changed"):
        TensorRTPredictor(folder)


def test_self_check_reports_every_form(exports, monkeypatch, capsys):
    folders = {name: exports[name] for name in ("fp32", "fp16")}  # exported before the stand-in replaces torch.cuda
    exported = []

    def export(model, folder, **form):
        assert model is None  # the bundled model
        exported.append(form)
        shutil.copytree(folders[form.get("precision", "fp32")], folder)

    tensorrt_standin.install(monkeypatch)
    monkeypatch.setattr(tensorrt, "_times", lambda predictor: {"set_image": 1.0})  # needs CUDA events
    monkeypatch.setattr(tensorrt, "export_onnx", export)
    assert main(["export", "tensorrt", "--self-check"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert exported == [{}, {"precision": "fp16"}, {"precision": "fp16", "uint8": True}]
    assert set(report["forms"]) == {"fp32", "fp16", "uint8"}
    assert all(form["check"]["mask_iou_mean"] > 0.99 for form in report["forms"].values())
