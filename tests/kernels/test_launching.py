"""Checks before a launch, and the answer to a launch that the driver refuses. No GPU is needed."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastsam_rwkv.triton_kernels import (
    attention,
    bi_wkv,
    conv_norm,
    launch_config,
    mask_edges,
    mbconv,
    norm_shift_mix,
    operator,
    stem,
    upscale,
)
from fastsam_rwkv.triton_kernels.launch_config import LaunchConfig, default_settings
from fastsam_rwkv.triton_kernels.operator import HAS_TRITON, checked

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
HOPPER = LaunchConfig(default_settings(), arch=90)


def meta(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


LIMIT = 1 << 31
TOO_LARGE = {  # each just fits without the last block, of which no row may wrap
    "conv_norm": lambda: conv_norm.conv_norm_triton(
        meta(1, LIMIT - 1, 1, 16), meta(16, 16, 1, 1), *[None] * 6, 1, False, 1e-6
    ),
    "upscale": lambda: upscale.upscale_triton(meta(1, LIMIT - 1, 1, 16), meta(64, 16), meta(16), None, None, 1e-6),
    "upscale: lines": lambda: upscale.upscale_triton(
        meta(1, LIMIT // 2, 1, 16), meta(64, 16), meta(16), None, None, 1e-6
    ),
    "norm_shift_mix": lambda: norm_shift_mix.norm_shift_mix_triton(
        meta(1, 2, LIMIT // 2, 4), meta(4), meta(4), meta(2, 4), 1e-6
    ),
    "bi_wkv": lambda: bi_wkv.bi_wkv_triton(meta(4), meta(4), *[meta(1, LIMIT - 1, 4)] * 2),
    "attention: queries": lambda: attention.attention_triton(meta(1, LIMIT // 32, 32), *[meta(1, 8, 32)] * 2, None, 1),
    "attention: keys": lambda: attention.attention_triton(meta(1, 8, 32), *[meta(1, LIMIT // 32, 32)] * 2, None, 1),
    "stem": lambda: stem.stem_triton(
        meta(1, 3, 1 << 15, 1 << 15).permute(0, 2, 3, 1), [0.0] * 3, [1.0] * 3, meta(32, 3, 3, 3), *[meta(32)] * 3,
        meta(32, 32, 3, 3), meta(32), 1 << 15, 1 << 15, 1e-6,
    ),
    "mbconv": lambda: mbconv.mbconv_triton(
        meta(1, 2, LIMIT // 128, 16), *[meta(16)] * 2, meta(64, 16), meta(64), meta(64, 1, 3, 3), meta(64),
        meta(16, 64), meta(16), None, None, 1, 1e-6,
    ),
    "mask_edges": lambda: mask_edges.mask_edges_triton(
        meta(1, 8, 8), *[t for side in (1 << 16, LIMIT >> 16) for t in (meta(side), meta(side, 3))], None, 0
    ),
    "mask_edges: weights": lambda: mask_edges.mask_edges_triton(
        meta(1, 8, 8), *[t for side in (1, LIMIT // 3) for t in (meta(side), meta(side, 3))], None, 0
    ),
}  # fmt: skip


@needs_triton
@pytest.mark.parametrize("name", TOO_LARGE)
def test_counts_beyond_32_bits_are_refused(name):
    with pytest.raises(ValueError, match=rf"the {name.split(':')[0]} kernel counts .* in 32 bits, got \d+; split"):
        TOO_LARGE[name]()


@needs_triton
@pytest.mark.parametrize(
    "fixed, early", [(nn.Parameter, 1), (lambda t: t, 0), (lambda t: nn.Parameter(t[..., ::2]), 0)],
    ids=["parameter", "tensor", "copied parameter"],
)  # fmt: skip
def test_only_parameters_are_read_before_the_previous_launch_has_ended(fixed, early, monkeypatch):
    C, found = 64, []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: found.append((args[11], options["OVERLAP"]))

    monkeypatch.setattr(norm_shift_mix, "_norm_shift_mix_kernel", Kernel())
    double = 2 if fixed(torch.zeros(2)).shape == (1,) else 1
    weight, bias, mix = (fixed(torch.ones(*shape, C * double)) for shape in ((), (), (2,)))
    norm_shift_mix.norm_shift_mix_triton(torch.ones(1, 8, 8, C), weight, bias, mix, 1e-6, config=HOPPER)
    assert found == [(early, HOPPER.overlaps)]


@pytest.fixture
def can_overlap(monkeypatch):
    monkeypatch.setattr(launch_config, "CAN_OVERLAP", True)
    monkeypatch.setattr(launch_config, "_refused", set())
    monkeypatch.setattr(operator, "launch_config", lambda device: HOPPER)


def launcher(refused):
    """Return a launcher whose driver answers `refused` to every overlapping launch."""
    calls = []

    def launch(x, *, config=HOPPER):
        calls.append(config.overlaps)
        if refused and config.overlaps:
            raise RuntimeError(refused)
        return x

    return launch, calls


def test_a_refused_overlap_is_given_up(can_overlap):
    launch, calls = launcher("Triton Error [CUDA]: operation not supported")
    with pytest.warns(RuntimeWarning, match="cpu refuses programmatic dependent launch .*not supported"):
        assert checked("op", launch)(torch.ones(1)) == 1
    assert calls == [True, False] and launch_config._refused == {torch.device("cpu")}


def test_errors_that_overlap_does_not_cause_are_raised(can_overlap):
    launch, calls = launcher("another error")
    with pytest.raises(RuntimeError, match="another error"):
        checked("op", launch)(torch.ones(1))
    assert calls == [True] and not launch_config._refused

    def out_of_memory(x, *, config=HOPPER):
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        checked("op", out_of_memory)(torch.ones(1))
    assert not launch_config._refused


@pytest.mark.parametrize(
    "arch, driver, refused, overlaps",
    [(9, 12030, False, True), (8, 12030, False, False), (9, 12020, False, False), (9, 12030, True, False)],
)
def test_overlap_needs_architecture_and_driver(arch, driver, refused, overlaps, can_overlap, monkeypatch):
    device = torch.device("cuda:7")
    properties = SimpleNamespace(major=arch, minor=0, multi_processor_count=100)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU without a file")
    monkeypatch.setattr(launch_config, "driver_version", lambda: driver)
    monkeypatch.setattr(launch_config, "_refused", {device} if refused else set())
    try:
        assert launch_config.launch_config(device).overlaps is overlaps
    finally:
        launch_config.launch_config.cache_clear()


def test_settings_without_overlap():
    assert "launch_pdl" not in replace(HOPPER, overlap=False).options({"num_warps": 4})
    assert HOPPER.without_overlap().options({"num_warps": 4})["OVERLAP"] is False
