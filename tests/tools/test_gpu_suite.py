"""The GPU suite on a CPU, at tiny shapes."""

import json
import os
import time

import pytest
import torch
from numerics import rel_rms
from small_model import CONFIG

from benchmarks.kernels import tune
from benchmarks.kernels.operator_calls import REFERENCES, operators_replaced
from benchmarks.speed import gpu_compile, gpu_records, gpu_rows, gpu_suite
from benchmarks.speed.gpu_baselines import compiled_encoder, transformer
from benchmarks.speed.gpu_rows import Row, Setup
from benchmarks.speed.gpu_suite import Results, measure, pending
from fastsam_rwkv import RWKVSAM
from fastsam_rwkv.triton_kernels import launch_config as launch_settings
from fastsam_rwkv.triton_kernels.bi_wkv import bi_wkv_ref
from fastsam_rwkv.triton_kernels.operator import HAS_TRITON


def run(output, *flags):
    return gpu_suite.main(["--tiny", "--minutes", "60", "--output", str(output), *flags])


def names(rows):
    return [row.name for row in rows]


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "results.json", dict.fromkeys(gpu_suite.SAME))


def test_all_stages_are_measured_once(tmp_path, capsys, monkeypatch):
    output = tmp_path / "out" / "cpu.json"
    assert run(output) == 0
    first = json.loads(output.read_text())
    rows = first["rows"]
    assert first["machine"]["device"] == "cpu" and first["machine"]["tiny"] is True
    assert {"cuda", "cudnn", "commit"} <= first["machine"].keys()
    assert all(row["seconds"] >= 0 for row in rows.values()) and rows["ceilings/copy"]["samples"]
    assert not any("error" in row for row in rows.values())
    operators = {name.split("/")[4] for name in rows if name.startswith("kernels/tiny/64/1/")}
    assert operators == set(REFERENCES)
    dense = {name.split("/")[4] for name, row in rows.items() if "dense_pieces_us" in row}
    assert dense == {"conv_norm", "fused_linear", "gated_key", "linears", "mbconv", "stem", "upscale"}
    assert rows["kernels/bi_wkv/1x64x36"]["bytes"] == 4 * 64 * 36 * 2
    assert any("stem" in launch for launch in rows["profile/tiny/64/1"]["launches"])
    assert "tests collected" in rows["tests"]["summary"] and "tests collected" in rows["golden"]["summary"]
    assert "bfloat16 masks, mean IoU" in capsys.readouterr().out
    monkeypatch.setattr(Setup, "time_calls", lambda *_: pytest.fail("measured again"))
    assert run(output) == 0
    assert json.loads(output.read_text()) == first


def test_run_that_reaches_its_time_limit_is_resumed(tmp_path, capsys):
    output = tmp_path / "cpu.json"
    flags = ["--stages", "ceilings", "encoder", "--rows", "copy|launches$"]
    assert run(output, *flags, "--minutes", "0") == 3
    assert "3 rows left, first ceilings/copy: give the command again" in capsys.readouterr().out
    assert run(output, *flags) == 0
    rows = {"ceilings/copy", "ceilings/cached_copy", "encoder/tiny/64/1/launches"}
    assert set(json.loads(output.read_text())["rows"]) == rows


def test_failed_killed_and_skipped_rows_come_again(results):
    def killed():
        raise KeyboardInterrupt

    long = Row("long", lambda: pytest.fail("started"), seconds=90)
    rows = [Row("ceilings/fails", lambda: 1 / 0), long, Row("good", dict, 30), Row("killed", killed), Row("new", dict)]
    assert measure(rows[:3], results, time.monotonic() + 60) == ["long"]
    with pytest.raises(KeyboardInterrupt):
        measure(rows[3:], results, time.monotonic() + 60)
    again = Results(results.output, results.setting)
    assert again.rows["ceilings/fails"]["error"] == "ZeroDivisionError: division by zero"
    assert again.rows["killed"] == {"error": "started, but not finished"}
    assert names(pending(rows, again)) == ["long", "new", "ceilings/fails", "killed"]


def test_runs_are_in_order_and_share_no_row(tmp_path, results, monkeypatch):
    monkeypatch.setattr(gpu_rows, "recorded_calls", lambda *_, **__: [("stem", "1", (), 1)])
    setup = Setup(False, gpu_rows.ROOT / "examples", tmp_path / "a.json", 0.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    rows = [row for stage in gpu_rows.STAGES.values() for row in stage(setup)]
    first = [
        "ceilings/copy", "ceilings/cached_copy", "ceilings/matmul", "profile/small/1024/1", "profile/small/1024/16",
        "encoder/small/1024/1/graphs", "encoder/small/1024/16/graphs", "decoder/small/1024/1", "decoder/small/1024/16",
        "decoder/small/1024/64", "kernels/bi_wkv/1x4096x384", "kernels/bi_wkv/16x4096x384",
        "kernels/bi_wkv/1x65536x384", "tune", "tuned",
    ]  # fmt: skip
    ordered = names(pending(rows, results))
    assert ordered[: len(first)] == first and ordered[len(first) : len(first) + 2] == ["tests", "golden"]
    runs = {run: gpu_suite.of_run(rows, run) for run in gpu_suite.RUNS}
    assert names(pending(runs["first"], results)) == first
    second, baselines = names(runs["second"]), names(runs["baselines"])
    assert {"agreement/bfloat16/examples", "kernels/small/1024/1/stem/1", "encoder/small/4096/1/graphs"} <= set(second)
    assert len(baselines) == 7 and not set(first) & set(second) and not set(second) & set(baselines)
    assert names(gpu_suite.of_run(rows, None)) == names(rows)
    figures = dict.fromkeys(["us", "gb_s", "bytes", "images_s", "times_faster", "mean_iou"], 1.0)
    tuned = dict.fromkeys(["encoder_1_after_us", "encoder_16_after_us", "decoder_1_after_us"], 1.0)
    assert len(gpu_suite.goals(dict.fromkeys(names(rows), figures | tuned))) == 16


def test_compiled_kernels_are_found_again_and_others_refused(tmp_path, monkeypatch):
    """The test plays the compiler: what is checked is the key."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(gpu_compile, "triton_key", lambda: "one")
    monkeypatch.setattr(gpu_compile, "compile_ahead", lambda *_: None)
    monkeypatch.setattr(tune, "compile_ahead", lambda *args: {name: [] for name in args[2]})
    monkeypatch.setenv("TRITON_CACHE_DIR", "before")
    with pytest.raises(SystemExit, match="make the cache with --compile-only"):
        gpu_compile.use_cache(cache, 90)
    assert gpu_suite.main(["--compile-only", str(cache), "--minutes", "0"]) == 0
    monkeypatch.setenv("TRITON_CACHE_DIR", "before")
    gpu_compile.use_cache(cache, 90)
    assert os.environ["TRITON_CACHE_DIR"] == str(cache)
    with pytest.raises(SystemExit, match="compiled with architecture 90, here it is 100"):
        gpu_compile.use_cache(cache, 100)
    monkeypatch.setattr(gpu_compile, "triton_key", lambda: "other")
    with pytest.raises(SystemExit, match="compiled with triton_key one, here it is other"):
        gpu_compile.use_cache(cache, 90)


@pytest.mark.parametrize(("factor", "kept"), [(0.9, True), (1.1, False)])
def test_tuned_settings_that_slow_the_encoder_are_refused(factor, kept, tmp_path, monkeypatch):
    """The test plays the clock, which shows the settings that a call was recorded with."""
    setup = Setup(True, gpu_rows.ROOT / "examples", tmp_path / "a.json", 0.0)
    file = tmp_path / "tuned_gpu.json"
    file.write_text(json.dumps({"device": {"architecture": 90}, "stem": {"VALUES": 1}}))

    def recorded(setup, batch, prompts):
        tuned = launch_settings.tuned_settings("any")
        return lambda: factor if tuned == {"stem": {"VALUES": 1}} else 1.0

    monkeypatch.setattr(gpu_rows, "_model_call", recorded)
    monkeypatch.setattr(Setup, "time_calls", lambda self, call: {"us": call()})
    result = gpu_rows.judge_settings(setup, file)
    assert result["encoder_16_before_us"] == 1.0 and result["decoder_1_after_us"] == factor
    assert result["kept"] == kept == file.exists() and file.with_suffix(".refused").exists() != kept
    assert result["slower_at_batch"] == ([] if kept else [1, 16])


def test_nvidia_smi_is_read(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 1980 MHz, 3201 MHz, 123.45 W, 40\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    state = gpu_records.smi(gpu_records.STATE)
    assert state == {
        "clocks.sm": "1980 MHz", "clocks.mem": "3201 MHz", "power.draw": "123.45 W", "temperature.gpu": "40"
    }  # fmt: skip
    tool.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_records.smi(gpu_records.STATE) == {}


def test_goals_are_judged():
    rows = {
        "kernels/bi_wkv/1x4096x384": {"us": 11.0, "times_faster": 9.0},
        "encoder/small/1024/1/graphs": {"us": 1300.0},
        "baselines/reference eager/small/1024/1": {"us": 13000.0},
        "agreement/bfloat16/a": {"mean_iou": 0.995},
    }
    assert {title: met for title, _, _, met in gpu_suite.goals(rows)} == {
        "bi_wkv (1, 4096, 384), us": True,
        "bi_wkv, times the published algorithm": False,
        "encoder small 1024 batch 1, ms": False,
        "eager reference / ours": True,
        "bfloat16 masks, mean IoU": True,
    }


def test_output_of_a_failed_command_is_kept(tmp_path, monkeypatch):
    assert gpu_rows.command(["json.tool", "--help"], 60).keys() == {"summary"}
    assert "exit status 1\n" in gpu_rows.command(["no_such_module"], 60)["error"]
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\necho collected\nexec sleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(gpu_rows.sys, "executable", str(sleeper))
    assert gpu_rows.command([], 1)["error"] == "stopped after 1 s\ncollected"


def test_results_of_another_machine_are_not_mixed(tmp_path):
    output = tmp_path / "cpu.json"
    output.write_text(json.dumps({"machine": {"device": "some GPU"}, "rows": {}}))
    with pytest.raises(SystemExit, match="another device, torch, triton, tiny, code: move it away"):
        run(output)


@pytest.mark.parametrize("build", [RWKVSAM, transformer])
@torch.no_grad()
def test_compiled_encoder_is_exact_and_has_static_shapes(build):
    """Dynamic shapes for the second size would take minutes to compile and be another baseline."""
    inputs = []

    def backend(graph, example_inputs):
        inputs.append(example_inputs)
        return graph

    for side in (64, 128):
        model = build(CONFIG).eval()
        x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        with operators_replaced(REFERENCES):
            want = model.encode_image(x).image_embed
            inputs.clear()
            with compiled_encoder(model, backend=backend):
                got = model.encode_image(x).image_embed
        assert rel_rms(got, want) <= 1e-6
        assert len(inputs) == 3  # backbone, neck, the decoder's image part
        assert all(type(size) is int for graph in inputs for x in graph for size in getattr(x, "shape", [x]))


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: kernels cannot run")
@pytest.mark.parametrize("T", [1, 7, 20])
def test_segment_scan_computes_the_bi_wkv(T, device):
    from benchmarks.speed.published_scan import segment_scan

    g = torch.Generator().manual_seed(T)
    w, u = (torch.randn(5, generator=g).to(device) for _ in range(2))
    k, v = (torch.randn(2, T, 5, generator=g).to(device) for _ in range(2))
    want = bi_wkv_ref(*(x.double() for x in (w, u, k, v)), None, 0.5)
    assert rel_rms(segment_scan(w, u, k, v, 0.5, length=4), want) <= 1e-6
