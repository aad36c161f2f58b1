"""Tests of the statistics of segmentation targets: known colors, shapes and frames give known figures."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks.masks.target_statistics import figures, lab, main, report, summary

SIZE = 64


@pytest.fixture
def square():
    mask = np.zeros((SIZE, SIZE), bool)
    mask[16:48, 16:48] = True
    return mask


def flat(color):
    return lab(np.full((SIZE, SIZE, 3), color, np.uint8))


def test_lab_gives_published_values():
    colors = np.array([[[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 0, 255], [119, 119, 119]]], np.uint8)
    want = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86], [50.03, 0, 0]]
    np.testing.assert_allclose(lab(colors)[0], want, atol=0.05)


def test_one_color_has_no_spread_and_no_gradient_and_is_shared_with_itself(square):
    found = figures(flat((90, 120, 30)), square)
    assert found.color_spread == pytest.approx(0, abs=1e-3) and found.gradient == pytest.approx(0, abs=1e-3)
    assert found.shared_colors == pytest.approx(1)
    assert found.area == pytest.approx(0.25) and found.box_filled == 1 and found.pieces == 1


def test_two_halves_are_spread_by_half_their_distance(square):
    colors = flat((0, 0, 0)).copy()
    colors[:, 32:, 0] = 60
    found = figures(colors, square)
    assert found.color_spread == pytest.approx(30)


def test_the_gradient_inside_takes_no_notice_of_the_outline(square):
    colors = flat((0, 0, 0)).copy()
    colors[square, 0] = 80
    assert figures(colors, square).gradient == 0
    colors[..., 0] += 2 * np.arange(SIZE)
    assert figures(colors, square).gradient == pytest.approx(2)


def test_colors_are_shared_as_far_as_histograms_overlap(square):
    colors = flat((0, 0, 0)).copy()
    colors[..., 0] = 90
    colors[square, 0] = 10
    assert figures(colors, square).shared_colors == 0
    colors[16:48, 16:24, 0] = 90  # a quarter of the inside has the color of all that is around
    assert figures(colors, square).shared_colors == pytest.approx(0.25)


def test_a_target_at_the_edge_touches_the_frame_and_crumbs_are_no_pieces(square):
    colors = flat((9, 9, 9))
    assert not figures(colors, square).touches_frame
    square[:, 20:24] = True
    assert figures(colors, square).touches_frame
    square[2:14, 40:52] = True
    square[60, 60] = True
    assert figures(colors, square).pieces == 2


def test_a_summary_holds_medians_and_shares(square):
    whole, cut = square.copy(), square.copy()
    cut[:, 16:18] = True
    found = summary([figures(flat((9, 9, 9)), mask) for mask in (whole, whole, cut)])
    assert found["targets"] == 3 and found["touches_frame"] == pytest.approx(1 / 3)
    assert found["area"] == pytest.approx(0.25) and found["10-30 %"] == 1 and found["0-0.1 %"] == 0
    assert "Lab color spread inside" in report({"targets": found})
    with pytest.raises(ValueError, match="no target"):
        summary([])


def test_a_folder_of_label_maps_is_measured(tmp_path, capsys):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(tmp_path / "a.jpg")
    labels = np.zeros((48, 64), np.uint8)
    labels[10:20, 10:20] = 1
    Image.fromarray(labels).save(tmp_path / "a.png")
    main([str(tmp_path), "--json", str(tmp_path / "out.json")])
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["targets"]["targets"] == 1 and told["targets"]["area"] == pytest.approx(100 / (48 * 64), rel=0.05)
    assert "targets >= 1 %" in capsys.readouterr().out


def test_fresh_scenes_are_measured_as_training_draws_them(capsys):
    main(["--render", "2", "--seed", "5"])
    told = capsys.readouterr().out
    assert "things" in told and "touches the frame" in told


def test_one_source_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "one of FOLDER, --scenes and --render" in capsys.readouterr().err
