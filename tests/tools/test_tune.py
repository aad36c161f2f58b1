import json

import pytest
import torch

from benchmarks.kernels import tune
from benchmarks.kernels.operator_calls import REFERENCES
from fastsam_rwkv.triton_kernels.launch_config import default_settings
from fastsam_rwkv.triton_kernels.operator import HAS_TRITON


def test_fastest_right_settings_are_kept(monkeypatch):
    """The test plays the clock and the launcher."""
    candidates = {"stem": ("stem", [{"VALUES": n, "num_warps": 1} for n in (1, 2, 3, 4, 5)])}

    def stem(*args, config):
        values = config.settings["stem"]["VALUES"]
        if values == 1:
            raise RuntimeError("out of resources")
        return REFERENCES["stem"](*args) * {2: 2.0, 5: float("nan")}.get(values, 1.0)  # fastest, and wrong

    times = {default_settings()["stem"]["VALUES"]: 100.0, 2: 1.0, 3: 60.0, 4: 70.0, 5: 1.0}
    monkeypatch.setattr(
        tune, "_time", lambda calls, on_gpu: times[calls[0].keywords["config"].settings["stem"]["VALUES"]]
    )
    kept = []
    chosen, table = tune.tune(
        torch.device("cpu"), 3600, candidates, lambda settings: kept.append(dict(settings)), {"stem": stem}
    )
    assert kept == [chosen]
    assert chosen == {"stem": {"VALUES": 3, "num_warps": 1}}
    assert table["stem"] == {"before_us": 100 * (1 + 1 / 16), "best_us": 60 * (1 + 1 / 16)}  # one image, and 16
    assert json.loads(tune.dumps(chosen)) == chosen


def test_settings_name_their_architecture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    stale = {"device": {"architecture": 80}, "stem": {"num_warps": 1}}
    assert tune.of_this_card(stale) == {"device": {"architecture": 90}, "stem": {"num_warps": 1}}


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: nothing compiles")
def test_candidates_compile_ahead_in_other_processes(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    fits, too_large = (
        {"BLOCK_M": 64, "BLOCK_C": 64, "num_warps": 4, "num_stages": stages, "maxnreg": 255} for stages in (2, 20)
    )
    candidates = {"upscale": ("upscale", [fits, too_large]), "conv_norm": ("conv_norm", [{"num_warps": 4}])}
    assert tune.compile_ahead(90, 120, candidates, processes=1) == {"upscale": [fits], "conv_norm": []}
    assert tune.compile_ahead(90, 0, candidates, processes=1) == {"upscale": [], "conv_norm": []}


def test_settings_serve_the_batches_they_are_timed_on():
    assert tune.batches_of("fused_linear.large") == (16,) and tune.batches_of("fused_linear") == (1,)
    assert tune.batches_of("mbconv_project") == (1, 16)


def test_every_setting_has_candidates():
    default = default_settings()
    assert set(tune.CANDIDATES) == {name for name in default if not name.endswith(".float32")}
    for name, (_, settings) in tune.CANDIDATES.items():
        assert settings and all(set(s) == set(default[name]) for s in settings)
