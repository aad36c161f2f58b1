import json

import pytest
import torch

from fastsam_rwkv.triton_kernels._triton import CAN_OVERLAP
from fastsam_rwkv.triton_kernels.launch_config import (
    LARGE,
    LaunchConfig,
    block_that_divides,
    default_settings,
    device_file,
    launch_config,
    shipped_settings,
    tuned_settings,
)

HALF = torch.float16


def test_default_settings_are_integers():
    default = default_settings()
    assert set(default) >= {"bi_wkv", "norm_shift_mix"}
    for settings in default.values():
        assert all(isinstance(value, int) for value in settings.values())
        assert 1 <= settings["num_warps"] <= 32
    assert launch_config(torch.device("cpu")) == LaunchConfig(default, arch=0, sms=132)


def test_name_of_a_device_file():
    names = {"NVIDIA H200": "nvidia_h200", "NVIDIA GeForce RTX 4090 (Laptop)": "nvidia_geforce_rtx_4090_laptop"}
    assert {name: device_file(name).name for name in names} == {n: f"tuned_{file}.json" for n, file in names.items()}


def test_settings_by_dtype_and_size():
    config = LaunchConfig({"a": {"x": 1}, "b": {"x": 2}, "b.float32": {"x": 4}, "b.large": {"x": 5}})
    assert [config.settings_for("b", HALF, values)["x"] for values in (0, LARGE - 1, LARGE)] == [2, 2, 5]
    assert [config.settings_for("b", torch.float32, values)["x"] for values in (0, LARGE)] == [4, 4]
    assert [config.settings_for("a", dtype, LARGE)["x"] for dtype in (HALF, torch.float32)] == [1, 1]
    changed = config.with_settings({"b": {"x": 3}})
    assert [changed.settings_for(op, HALF)["x"] for op in "ab"] == [1, 3] and config.settings_for("b", HALF)["x"] == 2


def test_settings_of_another_release_are_ignored(tmp_path):
    (tmp_path / "default.json").write_text(json.dumps({"a": {"x": 1, "new": 1}, "b": {"x": 2}}))
    tuned = {"device": {"architecture": 90}, "a": {"x": 3}, "b": {"x": 4, "maxnreg": 255}, "gone": {"x": 5}}
    (tmp_path / "tuned_some_gpu.json").write_text(json.dumps(tuned))
    with pytest.warns(UserWarning, match="tuned_some_gpu.json was written for another release: a, gone use"):
        assert tuned_settings("Some GPU", tmp_path) == {"device": {"architecture": 90}, "b": {"x": 4, "maxnreg": 255}}
    assert tuned_settings("Another GPU", tmp_path) == {}
    assert set(shipped_settings(tmp_path)) == {"default", "tuned_some_gpu"}


def test_options_of_a_launch():
    settings = {"BLOCK_M": 64, "num_warps": 4, "maxnreg": 255}
    own = {"num_warps": 4, "maxnreg": 255, "enable_fp_fusion": True}
    for arch in (0, 89):
        assert LaunchConfig({}, arch).options(settings) == own | {"OVERLAP": False}
    overlapping = {"OVERLAP": True, "launch_pdl": True} if CAN_OVERLAP else {"OVERLAP": False}
    assert LaunchConfig({}, 90).options(settings) == own | overlapping


def test_blocks_divide_the_size_if_possible():
    assert [block_that_divides(384, block) for block in (64, 128, 256)] == [64, 128, 128]
    assert [block_that_divides(192, block) for block in (64, 128, 256)] == [64, 64, 64]
    assert block_that_divides(36, 128) == 128
