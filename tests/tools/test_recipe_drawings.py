"""Tests of the drawings: what is kept of an SVG file, and how its body and parts are placed in a scene."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "synthetic_shapes"))

from clipart import SIDE, rasterized  # noqa: E402  # recipes are no package
from drawings import drawing  # noqa: E402  # recipes are no package
from scenes import render_scene  # noqa: E402  # recipes are no package


def svg(shapes, size='width="100" height="100"'):
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{shapes}</svg>'


BODY = '<circle cx="50" cy="50" r="40" style="fill:#aa0000;opacity:0.9"/>'
HEAD = '<g fill="#00ff00"><rect x="40" y="40" width="20" height="20"/></g>'


@pytest.fixture
def read(tmp_path):
    pytest.importorskip("resvg_py", reason="SVG files are rasterized by resvg-py")

    def read(text):
        (tmp_path / "a.svg").write_text(text)
        return rasterized(tmp_path / "a.svg")

    return read


def test_a_drawing_is_cut_to_its_body_and_parts_are_numbered_by_area(read):
    colors, parts = read(svg(BODY + HEAD))
    assert colors.shape == (*parts.shape, 3) and abs(max(parts.shape) - 0.8 * SIDE) <= 2
    areas = np.bincount(parts.ravel())
    assert len(areas) == 3 and areas[1] > areas[2]
    assert areas[1] + areas[2] == pytest.approx(np.pi / 4 * parts.size, rel=0.02)
    assert areas[2] == pytest.approx(0.04 * SIDE**2, rel=0.05)
    assert tuple(colors[parts == 2].mean(0).round()) == (0, 255, 0)


def test_shapes_of_one_color_are_one_part_and_a_hidden_one_is_none(read):
    hidden = '<rect width="90" height="90" style="fill:#0000ff;display:none"/>'
    _, parts = read(svg(BODY + HEAD + '<rect x="45" y="70" width="9" height="9" style="fill:#00ff00"/>' + hidden))
    assert parts.max() == 2


def test_the_body_of_a_line_drawing_is_what_its_lines_enclose(read):
    _, parts = read(svg('<circle cx="50" cy="50" r="40" fill="none" stroke="#000000" stroke-width="3"/>'))
    assert parts.astype(bool).mean() == pytest.approx(np.pi / 4, rel=0.05)


def test_drawings_of_no_use_are_left_out(read):
    assert read(svg('<rect width="100" height="100"/>')) is None  # fills its box
    assert read(svg('<circle cx="20" cy="20" r="15"/><circle cx="80" cy="80" r="15"/>')) is None  # two bodies
    assert read(svg('<circle cx="50" cy="50" r="5"/>')) is None  # too small
    assert read(svg(BODY + '<image href="a.png"/>')) is None
    assert read("<svg") is None


def test_a_drawing_without_a_size_takes_it_from_its_view(read):
    assert read(svg(BODY, 'viewBox="0 0 100 100" width="nan" height="100%"')) is not None


@pytest.fixture
def file(tmp_path):
    parts = np.zeros((80, 40), np.uint8)
    parts[:, 5:35] = 1
    parts[:30, 10:30] = 2
    parts[60:62, 20:26] = 3
    colors = np.zeros((80, 40, 3), np.uint8)
    colors[parts == 2] = 255
    np.savez_compressed(tmp_path / "drawings.npz", colors_0=colors, parts_0=parts)
    return tmp_path / "drawings.npz"


def test_a_placed_drawing_has_a_body_parts_and_marks(file):
    own = 0
    for seed in range(20):
        body, part, mark = drawing(np.random.default_rng(seed), 128, np.array([64.0, 60.0]), 40.0, file)
        assert not body.mark and not part.mark and mark.mark
        assert body.alpha.shape == (128, 128) and body.alpha.max() == 1
        assert (part.alpha <= body.alpha + 1e-6).all() and (mark.alpha <= body.alpha + 1e-6).all()
        assert part.alpha.sum() / body.alpha.sum() == pytest.approx(600 / 2400, rel=0.05)
        assert body.alpha.sum() == pytest.approx(2400, rel=0.05)  # the longer side of 80 is twice the radius
        y, x = np.nonzero(body.alpha > 0.5)
        assert abs(y.mean() - 60) < 1.5 and abs(x.mean() - 64) < 1.5
        if part.color is not None:
            own += 1
            assert part.color.min() > 0.9 > 0.1 > body.color.max()
    assert 4 <= own <= 16


def test_a_drawing_outside_the_canvas_is_empty(file):
    assert not any(p.alpha.any() for p in drawing(np.random.default_rng(0), 64, np.array([900.0, 900.0]), 20.0, file))


def test_scenes_hold_drawings_and_the_seed_decides(file):
    first, again, without = (render_scene(np.random.default_rng(6), 96, drawings) for drawings in (file, file, None))
    assert np.array_equal(first.image, again.image) and first.targets == again.targets
    assert not np.array_equal(first.image, without.image)
    assert first.objects and all(0 <= number < len(first.targets) for number in first.objects)
