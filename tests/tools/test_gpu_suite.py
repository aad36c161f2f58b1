"""The suite itself, on a CPU at tiny shapes; what it measures is measured on a GPU."""

import json
import re

import interpreter  # noqa: F401
import pytest
import torch
from numerics import rel_rms
from test_bi_wkv_kernel import formula

from benchmarks.kernels import tune
from benchmarks.kernels.operator_calls import REFERENCES, dense_pieces, operators_replaced, recorded_calls
from benchmarks.speed import gpu_suite
from benchmarks.speed.gpu_baselines import segment_scan, transformer
from fastsam_rwkv import RWKVSAM, ModelConfig
from fastsam_rwkv.modeling import layers
from fastsam_rwkv.triton_kernels.bi_wkv import bi_wkv_ref
from fastsam_rwkv.triton_kernels.operator import HAS_TRITON

CONFIG = ModelConfig.from_name("tiny", image_size=64)
QUICK = ["kernels", "profile", "encoder", "decoder", "baselines", "agreement", "tune"]


def run(output, *flags, stages=QUICK):
    return gpu_suite.main(["--device", "cpu", "--tiny", "--output", str(output), "--stages", *stages, *flags])


def test_rows_are_kept_and_measured_once(tmp_path, capsys, monkeypatch):
    output = tmp_path / "out" / "cpu.json"
    assert run(output) == 0
    first = json.loads(output.read_text())
    assert first["machine"]["device"] == "cpu" and first["machine"]["tiny"] is True
    kinds = {name.split("/")[4] for name in first["rows"] if name.startswith("kernels/tiny/64/1/")}
    assert kinds == {"attention", "bi_wkv", "conv_norm", "fused_linear", "mbconv", "norm_shift_mix", "stem", "upscale"}
    dense = {name.split("/")[4] for name, row in first["rows"].items() if "dense_pieces_us" in row}
    assert dense == {"conv_norm", "fused_linear", "stem", "upscale"}
    for row in first["rows"].values():
        assert "error" not in row and all(value == value for value in row.values() if isinstance(value, float))
    assert any("stem" in launch for launch in first["rows"]["profile/tiny/64/1"]["launches"])
    assert "bfloat16 masks, mean IoU" in capsys.readouterr().out
    monkeypatch.setattr(gpu_suite.Suite, "time", lambda *_: pytest.fail("measured again"))
    recorded = recorded_calls_counted(monkeypatch)
    assert run(output) == 0
    assert json.loads(output.read_text()) == first
    assert "cpu" not in recorded


def recorded_calls_counted(monkeypatch):
    """The devices that calls are recorded on from now on: those on the real one run every kernel."""
    devices = []

    def record(*args, device, **kwargs):
        devices.append(device.type)
        return recorded_calls(*args, device=device, **kwargs)

    monkeypatch.setattr(gpu_suite, "recorded_calls", record)
    return devices


def test_calls_are_not_recorded_for_nothing(tmp_path, monkeypatch):
    devices = recorded_calls_counted(monkeypatch)
    output = tmp_path / "cpu.json"
    assert run(output, "--rows", "^ceilings/copy", stages=["kernels"]) == 0
    assert devices == ["meta", "meta"] and not output.exists()
    assert run(output, "--minutes", "0", stages=["kernels"]) == 3
    assert devices == ["meta", "meta"]


def test_calls_tell_what_there_is_besides():
    """Operators take tensors that need not be there: with and without, calls differ."""
    calls = recorded_calls("small", 1024, 1, torch.device("meta"), prompts=1)
    found = [call[:2] for call in calls]
    refined = sorted(shapes for name, shapes in found if name == "conv_norm" and "256x256x64-32-1" in shapes)
    assert [shapes.partition("+")[2] for shapes in refined] == ["bias", "bias+residual"]
    seen = {name: shapes for name, shapes in found if shapes.endswith("+seen")}
    assert set(seen) == {"attention"}  # padded prompts are masked out, as in a graph


def test_fractions_need_no_ceiling_of_another_run(tmp_path):
    output = tmp_path / "cpu.json"
    assert run(output, "--rows", "kernels/bi_wkv", stages=["kernels"]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert set(rows) == {"ceilings/copy", "kernels/bi_wkv/1x64x36"} and rows["kernels/bi_wkv/1x64x36"]["of_copy"] > 0


def test_a_row_is_kept_though_time_ends_with_it(tmp_path):
    suite = gpu_suite.Suite("cpu", True, tmp_path / "x.json", minutes=1)

    def measure():
        suite.deadline -= 60
        return gpu_suite.fractions(suite, {"us": 1.0, "bytes": 1}) | {"us": 1.0}

    assert suite.row("a", measure) == {"us": 1.0}


def test_a_ceiling_that_fails_leaves_fractions_out(tmp_path, monkeypatch):
    output = tmp_path / "cpu.json"
    with monkeypatch.context() as patch:
        patch.setattr(gpu_suite, "ceilings", lambda suite: None)
        assert run(output, "--rows", "kernels/bi_wkv", stages=["kernels"]) == 0
    assert "of_copy" not in json.loads(output.read_text())["rows"]["kernels/bi_wkv/1x64x36"]


@torch.no_grad()
def test_dense_pieces_are_the_operators_own():
    """Where nothing else is in an operator's call its products or convolutions are all of it."""
    x, g = torch.randn(2, 6, 10, 8), torch.Generator().manual_seed(0)
    weight, kernel, scale = (torch.randn(shape, generator=g) for shape in ((12, 8), (12, 8, 3, 3), (12,)))
    residual, plain = torch.randn(2, 6, 10, 12), [None] * 6
    for name, args in (
        ("fused_linear", (x, weight)),
        ("fused_linear", (x, weight, False, None, None, torch.ones(12), residual)),
        ("conv_norm", (x, kernel, scale, *plain, 1, False, 1e-6)),
        ("conv_norm", (x, kernel, scale, *plain, 2, False, 1e-6)),
        ("conv_norm", (x, weight[..., None, None], None, *plain, 1, False, 1e-6)),
    ):
        (got,), want = dense_pieces(name, args)(), REFERENCES[name](*args)
        if name == "fused_linear" and args[-1] is residual:
            want = want - residual  # which is left to what follows the product
        got = got.permute(0, 2, 3, 1) if got.ndim == 4 and got.shape != want.shape else got
        torch.testing.assert_close(got.reshape(want.shape), want)
    counts = {}
    for name, _, args, _ in recorded_calls("tiny", 64, 1, torch.device("cpu"), prompts=1):
        pieces = dense_pieces(name, args)
        found = pieces() if pieces else []
        assert all(piece.numel() == REFERENCES[name](*args).numel() for piece in found), name
        counts.setdefault(name, set()).add(len(found))
    assert counts == {
        "stem": {1}, "mbconv": {0}, "norm_shift_mix": {0}, "bi_wkv": {0}, "fused_linear": {1, 2}, "conv_norm": {1},
        "upscale": {1}, "attention": {0},
    }  # fmt: skip


def test_a_failure_is_a_row_that_is_tried_again(tmp_path, capsys, monkeypatch):
    output = tmp_path / "cpu.json"
    with monkeypatch.context() as patch:
        patch.setattr(gpu_suite, "_pixels", lambda *_: 1 / 0)
        assert run(output, stages=["ceilings", "decoder"]) == 1
    assert "FAILED decoder/tiny/64/1: ZeroDivisionError" in capsys.readouterr().out
    assert run(output, stages=["decoder", "ceilings"]) == 0
    assert "error" not in json.loads(output.read_text())["rows"]["decoder/tiny/64/1"]


def test_only_the_rows_wanted_are_measured(tmp_path):
    output = tmp_path / "cpu.json"
    assert run(output, "--rows", "^ceilings/.*copy|launches$", stages=["ceilings", "encoder"]) == 0
    rows = {"ceilings/copy", "ceilings/cached_copy", "encoder/tiny/64/1/launches"}
    assert set(json.loads(output.read_text())["rows"]) == rows
    assert run(output, "--rows", "graphs", stages=["ceilings", "encoder"]) == 0
    assert set(json.loads(output.read_text())["rows"]) == rows | {"encoder/tiny/64/1/graphs"}


def test_what_failed_before_comes_last(tmp_path, capsys):
    """It may be what leaves the GPU unusable."""
    output = tmp_path / "cpu.json"
    run(output, stages=["ceilings"])
    stored = json.loads(output.read_text())
    stored["rows"] = {"ceilings/copy": {"error": "illegal memory access"}}
    output.write_text(json.dumps(stored))
    capsys.readouterr()
    assert run(output, stages=["ceilings"]) == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("ceilings/")]
    assert lines == ["ceilings/cached_copy", "ceilings/matmul", "ceilings/copy"]


def test_operators_that_cannot_be_recorded_are_a_row(tmp_path, monkeypatch):
    output = tmp_path / "cpu.json"
    with monkeypatch.context() as patch:
        patch.setattr(gpu_suite, "recorded_calls", lambda *_, **__: 1 / 0)
        assert run(output, stages=["kernels"]) == 1
    rows = json.loads(output.read_text())["rows"]
    assert "ZeroDivisionError" in rows["kernels/tiny/64/1"]["error"] and "kernels/bi_wkv/1x64x36" in rows
    assert run(output, stages=["kernels"]) == 0
    assert "kernels/tiny/64/1" not in json.loads(output.read_text())["rows"]


def test_tuning_is_not_begun_late(tmp_path, monkeypatch):
    suite = gpu_suite.Suite("cpu", True, tmp_path / "x.json", minutes=9)
    monkeypatch.setattr(gpu_suite.Suite, "on_gpu", True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "some GPU")
    monkeypatch.setattr(tune, "tune", lambda *_, **__: pytest.fail("begun"))
    suite.deadline -= 60 * 9 - gpu_suite.TUNING_SECONDS[0] + 10
    gpu_suite.tune_stage(suite)
    assert "tune" not in suite.rows and suite.skipped == ["tune"]


def test_a_run_out_of_time_says_so_and_goes_on(tmp_path, capsys):
    output = tmp_path / "cpu.json"
    assert run(output, "--minutes", "0", stages=["ceilings"]) == 3
    assert "give the command again, without --fresh" in capsys.readouterr().out
    assert run(output, stages=["ceilings"]) == 0


def test_a_row_that_needs_more_time_than_there_is_stops_no_other(tmp_path, capsys, monkeypatch):
    output = tmp_path / "cpu.json"
    suite = gpu_suite.Suite("cpu", True, output, minutes=1)
    suite.row("long", lambda: pytest.fail("begun"), seconds=90)
    assert suite.row("short", lambda: {"us": 1.0}, seconds=30) == {"us": 1.0} and suite.skipped == ["long"]
    monkeypatch.setattr(gpu_suite, "decoder", lambda suite: suite.row("decoder/long", dict, seconds=1e6))
    assert run(output, stages=["decoder", "ceilings"]) == 3
    assert "decoder/long left: give the command again" in capsys.readouterr().out
    assert "ceilings/copy" in json.loads(output.read_text())["rows"]


def test_a_row_that_was_killed_comes_last(tmp_path, monkeypatch):
    output = tmp_path / "cpu.json"
    suite = gpu_suite.Suite("cpu", True, output, minutes=1)

    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        suite.row("a", killed)
    again, order = gpu_suite.Suite("cpu", True, output, minutes=1), []
    for _ in range(2):
        for name in "ab":
            again.row(name, lambda name=name: order.append(name) or {"us": 1.0})
        again.retry()
    assert order == ["b", "a"]


def test_goals_come_first(tmp_path, capsys):
    output = tmp_path / "cpu.json"
    assert run(output, stages=["goals"]) == 0
    assert set(json.loads(output.read_text())["rows"]) == {
        "ceilings/copy", "kernels/bi_wkv/1x64x36", "agreement/bfloat16/examples"
    }  # fmt: skip
    assert run(output, "--rows", "^ceilings", stages=["goals"]) == 0
    judged = [
        "ceilings/copy", "kernels/bi_wkv/1x4096x384", "kernels/bi_wkv/16x4096x384", "encoder/small/1024/1/graphs",
        "encoder/small/1024/16/graphs", "encoder/small/2048/1/graphs", "encoder/small/4096/1/graphs",
        "decoder/small/1024/1", "baselines/reference eager/small/1024/1", "baselines/reference compiled/small/1024/1",
        "baselines/transformer compiled/small/1024/1", "baselines/transformer compiled/small/2048/1",
        "agreement/bfloat16/photos",
    ]  # fmt: skip
    assert all(re.search(gpu_suite.GOALS, name) for name in judged)
    others = ["encoder/small/512/1/graphs", "encoder/small/1024/4/graphs", "decoder/small/1024/16", "golden/a"]
    assert not any(re.search(gpu_suite.GOALS, name) for name in others)
    suite = gpu_suite.Suite("cpu", True, tmp_path / "x.json", 1)
    suite.rows = {
        name: dict.fromkeys(["us", "gb_s", "bytes", "images_s", "times_faster", "mean_iou"], 1.0) for name in judged
    }
    assert len(gpu_suite.goals(suite)) == 12


def test_why_tests_did_not_run_is_kept(tmp_path, monkeypatch):
    suite = gpu_suite.Suite("cpu", True, tmp_path / "x.json", minutes=1)
    monkeypatch.setattr(gpu_suite.sys, "executable", "false")
    gpu_suite.tests(suite)
    assert "nothing was printed" in suite.rows["tests"]["error"]
    suite.settled.clear()
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\necho collected\nexec sleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(gpu_suite.sys, "executable", str(sleeper))
    monkeypatch.setattr(gpu_suite, "max", lambda *_: 1.0, raising=False)
    gpu_suite.tests(suite)
    assert "not done in 1 s" in suite.rows["tests"]["error"] and "collected" in suite.rows["tests"]["error"]


def test_photographs_must_be_there(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path / "cpu.json", "--photos", str(tmp_path / "nothing"), stages=["ceilings"])
    assert "there is no folder" in capsys.readouterr().err


def test_results_of_another_machine_are_not_mixed(tmp_path):
    output = tmp_path / "cpu.json"
    output.write_text(json.dumps({"machine": {"device": "some GPU"}, "rows": {}}))
    with pytest.raises(SystemExit, match="another device, torch, triton, tiny, code: move it away .* --fresh"):
        run(output)
    assert run(output, "--fresh", stages=["ceilings"]) == 0
    assert json.loads(output.with_suffix(".old").read_text())["machine"]["device"] == "some GPU"


def test_golden_and_tests_stages(tmp_path):
    output = tmp_path / "cpu.json"
    assert run(output, stages=["golden", "tests"]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert max(rows["golden/small_backbone_256x320/float32"].values()) <= 1e-4
    assert 1e-4 < rows["golden/small_backbone_256x320/bfloat16"]["emb"] < 0.05
    assert "1 passed" in rows["tests"]["summary"]


def test_no_gpu_is_said(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        gpu_suite.main([])
    assert "there is no CUDA device" in capsys.readouterr().err


def test_goals_are_judged(tmp_path):
    suite = gpu_suite.Suite("cpu", True, tmp_path / "x.json", 1)
    suite.rows = {
        "kernels/bi_wkv/1x4096x384": {"us": 11.0, "times_faster": 9.0},
        "encoder/small/1024/1/graphs": {"us": 1300.0},
        "baselines/reference eager/small/1024/1": {"us": 13000.0},
        "agreement/bfloat16/a": {"mean_iou": 0.995},
    }
    met = {name: ok for name, _, _, ok in gpu_suite.goals(suite)}
    assert met == {
        "bi_wkv (1, 4096, 384), us": True,
        "bi_wkv, times the published algorithm": False,
        "encoder small 1024 batch 1, ms": False,
        "eager reference / ours": True,
        "bfloat16 masks, mean IoU": True,
    }


@torch.no_grad()
def test_baselines_are_the_same_model():
    x = torch.randn(1, 64, 64, 3)
    before = layers.bi_wkv
    with operators_replaced(REFERENCES):
        assert layers.bi_wkv is bi_wkv_ref
        maps = transformer(CONFIG).backbone(x)
    assert layers.bi_wkv is before
    assert [tuple(m.shape) for m in maps] == [(1, 16, 16, 32), (1, 8, 8, 64), (1, 4, 4, 192)]


@torch.no_grad()
def test_a_compiled_encoder_computes_the_same():
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for model in (RWKVSAM(CONFIG).eval(), transformer(CONFIG)):
        layer, forward = type(model.backbone.layers[0]), type(model.backbone.layers[0]).forward
        with operators_replaced(REFERENCES):
            want = model.encode_image(x).image_embed
            with gpu_suite.compiled_encoder(model, backend="aot_eager"):
                torch._dynamo.utils.counters.clear()
                got = model.encode_image(x).image_embed
        assert rel_rms(got, want) <= 1e-6
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3  # backbone, neck, decoder's part
        assert layer.forward is forward and "project_image" not in vars(model.mask_decoder)


@torch.no_grad()
def test_compiled_encoders_are_for_one_size_each():
    """A second size must not be compiled for sizes that vary: that takes minutes and is another baseline."""
    inputs = []

    def backend(graph, example_inputs):
        inputs.extend(example_inputs)
        return graph

    for side in (64, 128):
        model = RWKVSAM(CONFIG).eval()
        with operators_replaced(REFERENCES), gpu_suite.compiled_encoder(model, backend=backend):
            inputs.clear()
            model.encode_image(torch.randn(1, 3, side, side))
        assert inputs and all(type(size) is int for x in inputs for size in getattr(x, "shape", [x]))


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: kernels cannot run")
@pytest.mark.parametrize("T", [1, 7, 20])
def test_segment_scan_computes_the_same(T, device):
    g = torch.Generator().manual_seed(T)
    w, u = (torch.randn(5, generator=g).to(device) for _ in range(2))
    k, v = (torch.randn(2, T, 5, generator=g).to(device) for _ in range(2))
    assert rel_rms(segment_scan(w, u, k, v, 0.5, length=4), formula(w, u, k, v, scale=0.5)) <= 1e-6


def test_tuning_keeps_what_is_right_and_faster(monkeypatch):
    """Settings do not reach a CPU's operators, so the clock and the operator are played by the test."""
    candidates = {"stem": ("stem", [{"VALUES": n, "num_warps": 1} for n in (1, 2, 3, 4, 5)])}
    real = torch.ops.fastsam_rwkv.stem
    current = {"VALUES": 0}

    def override(settings):
        current["VALUES"] = settings.get("stem", {}).get("VALUES", 0)
        return torch.no_grad()

    def stem(*args):
        if current["VALUES"] == 1:
            raise RuntimeError("out of resources")
        return real(*args) * {2: 2.0, 5: float("nan")}.get(current["VALUES"], 1.0)  # fastest, and wrong

    times = {0: 100.0, 2: 1.0, 3: 60.0, 4: 70.0, 5: 1.0}

    def fake_time(in_turn, on_gpu):
        in_turn[0]()
        return times[current["VALUES"]]

    monkeypatch.setattr(tune, "override", override)
    monkeypatch.setattr(tune, "_time", fake_time)
    monkeypatch.setattr(torch.ops.fastsam_rwkv, "stem", stem)
    kept = []
    chosen, table = tune.tune(torch.device("cpu"), 60, candidates, lambda settings: kept.append(dict(settings)))
    assert kept == [chosen]
    assert chosen == {"stem": {"VALUES": 3, "num_warps": 1}}
    assert table["stem"] == {"before_us": 100 * (1 + 1 / 16), "best_us": 60 * (1 + 1 / 16)}  # one image, and 16
    assert json.loads(tune.dumps(chosen)) == chosen


def test_settings_name_the_architecture_they_are_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    stale = {"device": {"architecture": 80}, "stem": {"num_warps": 1}}
    assert tune.of_this_card(stale) == {
        "device": {"architecture": 90},
        "stem": {"num_warps": 1},
    }


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: nothing compiles")
def test_candidates_are_compiled_ahead_in_other_processes(monkeypatch):
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


def test_every_setting_that_ships_is_tuned():
    from fastsam_rwkv.triton_kernels.launch_config import shipped_settings

    default = shipped_settings()["default"]
    assert set(tune.CANDIDATES) == {name for name in default if not name.endswith(".float32")}
    for name, (_, settings) in tune.CANDIDATES.items():
        assert settings and all(set(s) == set(default[name]) for s in settings)
