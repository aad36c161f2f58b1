import argparse
import json

import pytest
import torch
from small_model import small_model

from benchmarks.speed import cpu_encoder, timing


def test_candidates_take_turns_and_the_first_round_does_not_count(monkeypatch):
    calls = []
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def candidate(name: str, seconds: list[float]):
        def run():
            clock[0] += seconds[calls.count(name)]
            calls.append(name)

        return run

    rows = timing.compare({"a": candidate("a", [100, 1, 2, 9]), "b": candidate("b", [100, 2, 8, 9])}, repeats=3)
    assert calls == ["a", "b"] * 4
    assert rows == {"a": [1, 2, 9], "b": [2, 8, 9]}
    assert timing.ratio(rows, "b", "a") == {"what": "b / a", "median": 2, "min": 1, "max": 4}


@torch.inference_mode()
def test_scan_and_shift_are_replaced_within_the_context_only():
    model = small_model()
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    whole = model.encode_image(pixels).image_embed
    with cpu_encoder.without_scan_and_shift():
        without = model.encode_image(pixels).image_embed
    assert not torch.allclose(whole, without)
    assert torch.equal(whole, model.encode_image(pixels).image_embed)


def test_goals_are_reported_at_their_image_size_only(capsys, tmp_path):
    rows = {"tiny": [1.0, 1.0], "tiny-no-scan-no-shift": [0.9, 0.7], "sam-vit-b": [13.0, 16.0]}
    found = cpu_encoder.compared(rows, 1024)
    numbers = {"median": 14.5, "min": 13, "max": 16}
    assert found[0] == {"what": "sam-vit-b / tiny", **numbers, "goal": ">= 14", "met": True}
    assert found[1]["median"] == pytest.approx(0.8) and found[1]["met"] is False
    assert all("goal" not in entry for entry in cpu_encoder.compared(rows, 512))
    options = argparse.Namespace(image_size=1024, out=tmp_path / "new" / "results.json")
    timing.report(options, rows, found)
    printed = capsys.readouterr().out
    assert f"torch: {torch.__version__}" in printed and "goal >= 14: met" in printed and ">= 0.85: missed" in printed
    results = json.loads(options.out.read_text())
    sam = {"median": 14.5, "min": 13, "spread": 1.5, "repeats": 2, "samples": [13, 16]}
    assert results["rows"][2] == {"name": "sam-vit-b", **sam} and results["compared"] == found
