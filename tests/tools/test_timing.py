import re

import pytest
import torch
from small_model import small_model

from benchmarks.speed import cpu_encoder, timing


def test_candidates_take_turns_and_warmup_does_not_count(monkeypatch):
    calls = []
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def candidate(name: str, seconds: list[float]):
        def run():
            clock[0] += seconds[calls.count(name)]
            calls.append(name)

        return run

    rows = timing.compare(
        {"a": candidate("a", [100, 1, 2, 9]), "b": candidate("b", [100, 2, 8, 9])}, repeats=3, warmup=1
    )
    assert calls == ["a", "b"] * 4
    assert [row.samples for row in rows] == [(1, 2, 9), (2, 8, 9)]
    assert [(row.name, row.median, row.min, row.repeats) for row in rows] == [("a", 2, 1, 3), ("b", 8, 2, 3)]
    assert timing.ratios(rows[1], rows[0]) == (2, 1, 4)  # of 2/1, 8/2 and 9/9, round by round


@pytest.mark.parametrize(
    ("samples", "spread"),
    [((3.0,), 0.0), ((1.0, 3.0), 1.0), ((5.0, 1.0, 4.0, 2.0, 3.0), 2.0), ((1.0, 1.0, 1.0, 1.0, 50.0), 0.0)],
)
def test_spread_is_the_interquartile_range(samples, spread):
    assert timing.summarize("x", samples).spread == pytest.approx(spread)


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 1), (1, -1)])
def test_impossible_counts_are_refused(repeats, warmup):
    with pytest.raises(ValueError, match=f"{repeats} and {warmup}"):
        timing.compare({}, repeats, warmup)


def test_table_is_in_milliseconds():
    header, row = timing.table([timing.summarize("encoder", (0.1, 0.2, 0.3))]).splitlines()
    assert re.split(r"\s{2,}", header.strip()) == ["median ms", "min ms", "spread ms", "repeats"]
    assert row.split() == ["encoder", "200.00", "100.00", "100.00", "3"]


def test_machine_names_what_a_timing_depends_on():
    info = timing.machine()
    assert info["torch"] == torch.__version__
    assert info["threads"] == torch.get_num_threads()
    assert info["device"] == "cpu"
    assert all(info[key] for key in ("cpu", "platform", "cores", "python"))


@torch.inference_mode()
def test_scan_and_shift_are_replaced_for_the_run_only():
    model = small_model()
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    whole = model.encode_image(pixels).image_embed
    with cpu_encoder.identity_scan():
        no_scan = model.encode_image(pixels).image_embed
    with cpu_encoder.identity_scan(keep_shift=False):
        neither = model.encode_image(pixels).image_embed
    assert not torch.allclose(whole, no_scan)
    assert not torch.allclose(no_scan, neither)
    assert torch.equal(whole, model.encode_image(pixels).image_embed)


def test_quotients_and_shares_come_with_goals_at_their_image_size_only():
    times = {"tiny": (1.0, 1.0), "tiny-no-scan-no-shift": (0.9, 0.7), "sam-vit-b": (13.0, 16.0)}
    rows = {name: timing.summarize(name, samples) for name, samples in times.items()}
    quotient, share = cpu_encoder.compared(rows, 1024)
    assert quotient == {
        "what": "sam-vit-b / tiny",
        "median": 14.5,
        "min": 13,
        "max": 16,
        "goal": ">= 14",
        "met": True,
    }
    assert share["median"] == pytest.approx(0.2)
    assert (share["min"], share["max"]) == pytest.approx((0.1, 0.3))
    assert (share["goal"], share["met"]) == ("<= 0.15", False)
    assert all(entry["goal"] is None for entry in cpu_encoder.compared(rows, 512))
