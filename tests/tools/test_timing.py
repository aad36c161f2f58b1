import re

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
    assert [row.samples for row in rows.values()] == [(1, 2, 9), (2, 8, 9)]
    assert [(row.name, row.median, row.min, row.repeats) for row in rows.values()] == [("a", 2, 1, 3), ("b", 8, 2, 3)]
    assert timing.ratio(rows["b"], rows["a"]) == {"what": "b / a", "median": 2, "min": 1, "max": 4}
    with pytest.raises(ValueError, match="at least 1, got 0"):
        timing.compare({}, repeats=0)


@pytest.mark.parametrize(("samples", "spread"), [((3.0,), 0.0), ((1.0, 3.0), 1.0), ((5.0, 1.0, 4.0, 2.0, 3.0), 2.0)])
def test_spread_is_the_interquartile_range(samples, spread):
    assert timing.summarize("x", samples).spread == pytest.approx(spread)


def test_table_is_in_milliseconds():
    header, row = timing.table([timing.summarize("encoder", (0.1, 0.2, 0.3))]).splitlines()
    assert re.split(r"\s{2,}", header.strip()) == ["median ms", "min ms", "spread ms", "repeats"]
    assert row.split() == ["encoder", "200.00", "100.00", "100.00", "3"]


@torch.inference_mode()
def test_scan_and_shift_are_replaced_within_the_context_only():
    model = small_model()
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    whole = model.encode_image(pixels).image_embed
    with cpu_encoder.without_scan_and_shift():
        without = model.encode_image(pixels).image_embed
    assert not torch.allclose(whole, without)
    assert torch.equal(whole, model.encode_image(pixels).image_embed)


def test_goals_of_encoders_hold_at_their_image_size_only(capsys):
    times = {"tiny": (1.0, 1.0), "tiny-no-scan-no-shift": (0.9, 0.7), "sam-vit-b": (13.0, 16.0)}
    rows = {name: timing.summarize(name, samples) for name, samples in times.items()}
    quotient, share = found = cpu_encoder.compared(rows, 1024)
    numbers = {"median": 14.5, "min": 13, "max": 16}
    assert quotient == {"what": "sam-vit-b / tiny", **numbers, "goal": ">= 14", "met": True}
    assert share["median"] == pytest.approx(0.2)
    assert (share["min"], share["max"]) == pytest.approx((0.1, 0.3))
    assert (share["goal"], share["met"]) == ("<= 0.15", False)
    assert all(entry["goal"] is None for entry in cpu_encoder.compared(rows, 512))
    timing.report(timing.machine(), rows, found, None)
    printed = capsys.readouterr().out
    assert f"torch: {torch.__version__}" in printed and "goal >= 14: met" in printed and "<= 0.15: missed" in printed
