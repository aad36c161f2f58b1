import json

import pytest
import torch

from benchmarks.kernels import tune
from benchmarks.kernels.operator_calls import REFERENCES
from fastsam_rwkv.triton_kernels.launch_config import default_settings
from fastsam_rwkv.triton_kernels.operator import HAS_TRITON


def test_fastest_right_settings_are_kept(monkeypatch, tmp_path, capsys):
    """The test plays the compiler, the launcher and the clock."""

    def stem(*args, config):
        values = config.settings["stem"]["VALUES"]
        if values == 1:
            raise RuntimeError("out of resources")
        return REFERENCES["stem"](*args) * {2: 2.0, 5: float("nan")}.get(values, 1.0)  # fastest, and wrong

    def samples(calls, rep):
        return [times[calls[0].keywords["config"].settings["stem"]["VALUES"]]]

    times = {default_settings()["stem"]["VALUES"]: 100.0, 2: 1.0, 3: 60.0, 4: 70.0, 5: 1.0}
    trials = [{"VALUES": n, "num_warps": 1} for n in (1, 2, 3, 4, 5)]
    monkeypatch.setattr(tune, "MODEL", ("tiny", 64))
    monkeypatch.setattr(tune, "MASKS_OF", (15, 22))
    monkeypatch.setattr(tune, "LAUNCHERS", {"stem": stem})
    monkeypatch.setattr(tune, "compile_ahead", lambda *_: {"stem": trials})
    monkeypatch.setattr(tune, "graph_samples", samples)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "no such device")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    tune.tune(torch.device("cpu"), 3600, {"stem": ("stem", trials)}, tmp_path / "tuned.json")
    written = json.loads((tmp_path / "tuned.json").read_text())
    assert written == {"device": {"architecture": 0}, "stem": trials[2]}
    assert " 106.25 us to     63.75 us" in capsys.readouterr().out  # one image, and 16


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: nothing compiles")
def test_candidates_compile_ahead_in_other_processes(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    fits, too_large = (
        {"BLOCK_M": 64, "BLOCK_C": 64, "num_warps": 4, "num_stages": stages, "maxnreg": 255} for stages in (2, 20)
    )
    candidates = {"upscale": ("upscale", [fits, too_large]), "conv_norm": ("conv_norm", [{"num_warps": 4}])}
    assert tune.compile_ahead(90, 120, candidates, processes=1) == {"upscale": [fits], "conv_norm": []}
    assert tune.compile_ahead(90, 0, candidates, processes=1) == {"upscale": [], "conv_norm": []}


def test_every_setting_has_candidates():
    default = default_settings()
    assert set(tune.CANDIDATES) == {name for name in default if not name.endswith(".float32")}
    for name, (_, settings) in tune.CANDIDATES.items():
        assert settings and all(set(s) == set(default[name]) for s in settings)
