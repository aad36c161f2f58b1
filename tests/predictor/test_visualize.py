import tracemalloc

import numpy as np
import pytest

from fastsam_rwkv import visualize
from fastsam_rwkv.visualize import COLORS, overlay, tinted


def masks(H, W):
    y, x = np.mgrid[:H, :W]
    return np.stack([(x - 40) ** 2 + (y - 30) ** 2 < 400, (x > 20) & (y > 10), np.zeros((H, W), bool)])


def test_a_mask_is_tinted_and_outlined():
    image = np.full((60, 90, 3), 100, np.uint8)
    mask = np.zeros((60, 90), bool)
    mask[10:40, :50] = True
    drawn = np.asarray(overlay(image, mask[None]))
    inner = np.zeros_like(mask)
    inner[11:39, 1:49] = True  # the border of the image is an outline too
    assert (drawn[~mask] == 100).all()
    assert (drawn[mask & ~inner] == COLORS[0]).all()
    assert (drawn[inner] == (COLORS[0] * 0.5 + 50).astype(np.uint8)).all()


@pytest.mark.parametrize("strip", [1, 90 * 7])
def test_strips_do_not_show(strip, monkeypatch):
    image = np.random.default_rng(0).integers(0, 255, (60, 1700, 3), np.uint8)  # outlines of 4 pixels
    prompts = [(30, 20, 1), (70, 50, 0)], [(5, 5, 80, 50)]
    whole = overlay(image, masks(60, 1700), *prompts)
    monkeypatch.setattr(visualize, "STRIP", strip)
    assert np.array_equal(overlay(image, masks(60, 1700), *prompts), whole)


def test_memory_beside_the_image_is_bounded():
    image, mask = np.zeros((6000, 4000, 3), np.uint8), np.ones((1, 6000, 4000), bool)
    tracemalloc.start()
    overlay(image, mask)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150 << 20  # 288 MB for the whole image as floats


def test_boxes_may_reach_far_beyond_the_image():
    image, none = np.zeros((60, 90, 3), np.uint8), np.zeros((0, 60, 90), bool)
    want = np.asarray(overlay(image, none, boxes=[(10, -99, 199, 40)]))
    assert (
        (want[:40, 10] == (255, 255, 0)).all() and (want[40, 10:] == (255, 255, 0)).all() and not want[:38, 13:].any()
    )
    for far in (1e6, 3e9, 1e37):
        assert np.array_equal(overlay(image, none, boxes=[(10, -far, far, 40)]), want)


def test_later_masks_are_tinted_over_earlier_ones():
    image = np.zeros((4, 6, 3), np.uint8)
    large, small = np.zeros((4, 6), bool), np.zeros((4, 6), bool)
    large[:, :4], small[1, 1] = True, True
    result = tinted(image, iter([large, small]))
    assert (result[1, 1] != result[0, 0]).any() and (result[0, 0] == result[3, 3]).all()
    assert not result[:, 4:].any() and not image.any()
