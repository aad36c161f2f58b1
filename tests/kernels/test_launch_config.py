import json

import pytest
import torch

from fastsam_rwkv.triton_kernels import launch_config
from fastsam_rwkv.triton_kernels._triton import CAN_OVERLAP

HALF = torch.float16


def test_default_settings_are_whole_numbers_for_every_operator():
    default = launch_config.shipped_settings()["default"]
    assert set(default) >= {"bi_wkv", "norm_shift_mix"}
    for settings in default.values():
        assert all(isinstance(value, int) for value in settings.values())
        assert 1 <= settings["num_warps"] <= 32
    assert launch_config.launch_settings("bi_wkv", torch.device("cpu"), HALF) == default["bi_wkv"]


def test_a_device_has_a_file_of_its_own():
    assert launch_config.device_file("NVIDIA H200").name == "tuned_nvidia_h200.json"
    assert (
        launch_config.device_file("NVIDIA GeForce RTX 4090 (Laptop)").name
        == "tuned_nvidia_geforce_rtx_4090_laptop.json"
    )


def test_a_tuned_device_overrides_the_default_op_by_op(tmp_path, monkeypatch):
    (tmp_path / "default.json").write_text(
        json.dumps({"a": {"x": 1}, "b": {"x": 2}, "b.float32": {"x": 4}, "b.large": {"x": 5}})
    )
    (tmp_path / "tuned_some_gpu.json").write_text(json.dumps({"b": {"x": 3}}))
    monkeypatch.setattr(launch_config, "FOLDER", tmp_path)
    monkeypatch.setattr(launch_config, "_device_name", lambda index: "Some GPU")
    launch_config._settings.cache_clear()
    try:
        assert launch_config.launch_settings("a", torch.device("cuda", 0), HALF) == {"x": 1}
        assert launch_config.launch_settings("b", torch.device("cuda", 0), HALF) == {"x": 3}
        assert launch_config.launch_settings("b", torch.device("cpu"), HALF) == {"x": 2}
        assert launch_config.launch_settings("b", torch.device("cuda", 0), torch.float32) == {"x": 4}
        assert launch_config.launch_settings("a", torch.device("cuda", 0), torch.float32) == {"x": 1}
        assert launch_config.launch_settings("b", torch.device("cpu"), HALF, launch_config.LARGE - 1) == {"x": 2}
        assert launch_config.launch_settings("b", torch.device("cpu"), HALF, launch_config.LARGE) == {"x": 5}
        assert launch_config.launch_settings("b", torch.device("cpu"), torch.float32, launch_config.LARGE) == {"x": 4}
        assert launch_config.launch_settings("a", torch.device("cpu"), HALF, launch_config.LARGE) == {"x": 1}
        assert set(launch_config.shipped_settings()) == {"default", "tuned_some_gpu"}
    finally:
        launch_config._settings.cache_clear()


def test_settings_of_another_release_are_named_and_left_out(tmp_path, monkeypatch):
    (tmp_path / "default.json").write_text(json.dumps({"a": {"x": 1, "new": 1}, "b": {"x": 2}}))
    tuned = {"device": {"architecture": 90}, "a": {"x": 3}, "b": {"x": 4, "maxnreg": 255}, "gone": {"x": 5}}
    (tmp_path / "tuned_some_gpu.json").write_text(json.dumps(tuned))
    monkeypatch.setattr(launch_config, "FOLDER", tmp_path)
    monkeypatch.setattr(launch_config, "_device_name", lambda index: "Some GPU")
    launch_config._settings.cache_clear()
    try:
        with pytest.warns(UserWarning, match="tuned_some_gpu.json was written for another release: a, gone as"):
            assert launch_config.launch_settings("a", torch.device("cuda", 0), HALF) == {"x": 1, "new": 1}
        assert launch_config.launch_settings("b", torch.device("cuda", 0), HALF) == {"x": 4, "maxnreg": 255}
    finally:
        launch_config._settings.cache_clear()


def test_launch_options_are_tritons_own():
    settings, cpu = {"BLOCK_M": 64, "num_warps": 4, "maxnreg": 255}, torch.device("cpu")
    own = {"num_warps": 4, "maxnreg": 255, "enable_fp_fusion": True}
    assert launch_config.launch_options(settings, cpu) == own | {"OVERLAP": False}
    with launch_config.assume_architecture(89):
        assert launch_config.launch_options(settings, cpu) == own | {"OVERLAP": False}
    with launch_config.assume_architecture(90):
        overlapping = {"OVERLAP": True, "launch_pdl": True} if CAN_OVERLAP else {"OVERLAP": False}
        assert launch_config.launch_options(settings, cpu) == own | overlapping


def test_override_ends_with_its_context():
    cpu = torch.device("cpu")
    before = launch_config.launch_settings("bi_wkv", cpu, HALF)
    with pytest.raises(RuntimeError), launch_config.override({"bi_wkv": {"x": 1}}):
        with launch_config.override({"bi_wkv": {"x": 2}}):
            assert launch_config.launch_settings("bi_wkv", cpu, HALF) == {"x": 2}
        assert launch_config.launch_settings("bi_wkv", cpu, HALF) == {"x": 1}
        raise RuntimeError
    assert launch_config.launch_settings("bi_wkv", cpu, HALF) == before


def test_blocks_divide_the_size_where_they_can():
    assert [launch_config.block_that_divides(384, block) for block in (64, 128, 256)] == [64, 128, 128]
    assert [launch_config.block_that_divides(192, block) for block in (64, 128, 256)] == [64, 64, 64]
    assert launch_config.block_that_divides(36, 128) == 128
