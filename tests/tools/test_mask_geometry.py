import numpy as np
import pytest
import torch
from scipy import ndimage

from benchmarks.masks.mask_geometry import (
    boundary,
    box_mask,
    deepest,
    ellipse_mask,
    interior_point,
    mask_iou,
    next_click,
    tight_box,
)


def rectangle(shape, x1, y1, x2, y2):
    mask = np.zeros(shape, dtype=bool)
    mask[y1:y2, x1:x2] = True
    return mask


def test_interior_point_of_known_shapes():
    disc = np.hypot(*np.ogrid[-20:21, -30:31]) <= 9
    assert interior_point(disc) == (30, 20)
    x, y = interior_point(ring := disc & (np.hypot(*np.ogrid[-20:21, -30:31]) > 4))
    assert ring[y, x]
    assert interior_point(rectangle((40, 50), 0, 0, 21, 21)) == (10, 10)  # beyond the image is outside
    assert interior_point(rectangle((3, 4), 3, 2, 4, 3)) == (3, 2)


@pytest.mark.parametrize("density", [0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (13, 1), (17, 23), (31, 18)])
def test_deepest_of_noise(shape, density):
    """Compare with the distances to every pixel outside; argmax takes the first of equals."""
    mask = np.random.default_rng(0).random(shape) < density
    mask.flat[0] = True
    outside = np.argwhere(~np.pad(mask, 1)) - 1
    squared = np.array([((outside - pixel) ** 2).sum(1).min() for pixel in np.ndindex(shape)]).reshape(shape)
    y, x = np.unravel_index(squared.argmax(), shape)
    assert deepest(mask) == (x, y, squared.max())


def test_deepest_takes_the_first_of_equals():
    two = rectangle((100, 200), 120, 10, 161, 51) | rectangle((100, 200), 20, 30, 61, 71)
    assert deepest(two) == (140, 30, 21**2)
    bar = rectangle((300, 100), 40, 0, 51, 300)
    assert deepest(bar) == (45, 5, 36)


def test_next_click_is_the_center_of_the_largest_error():
    truth = rectangle((80, 120), 20, 20, 60, 60)
    assert next_click(truth, truth) is None
    assert next_click(np.zeros_like(truth), truth) == (39, 39, 1)
    half = rectangle((80, 120), 20, 20, 37, 60)  # 23 columns missed,
    assert next_click(half, truth) == (48, 31, 1)
    assert next_click(half | rectangle((80, 120), 70, 20, 91, 60), truth) == (48, 31, 1)  # 21 spilled,
    x, y, label = next_click(half | rectangle((80, 120), 70, 20, 95, 60), truth)  # 25 spilled
    assert (x, label) == (82, 0)
    assert truth[31, 48] and not truth[y, x]
    as_large = truth ^ rectangle((80, 120), 20, 20, 25, 25) ^ rectangle((80, 120), 90, 20, 95, 25)
    assert next_click(as_large, truth) == (92, 22, 0)
    # the depth of an error counts, not its area
    deep = truth & ~rectangle((80, 120), 30, 30, 41, 41)
    assert next_click(deep | rectangle((80, 120), 0, 70, 120, 79), truth) == (35, 35, 1)


def published_boundary(mask: np.ndarray, dilation_ratio: float) -> np.ndarray:
    """Pad the mask with zeros, erode it by a 3 x 3 square d times, and subtract that, as defined."""
    height, width = mask.shape
    d = max(1, int(round(dilation_ratio * np.sqrt(height**2 + width**2))))
    eroded = np.pad(mask, 1)
    for _ in range(d):
        around = np.pad(eroded, 1)
        shifts = [around[y : y + height + 2, x : x + width + 2] for y in range(3) for x in range(3)]
        eroded = np.logical_and.reduce(shifts)
    return mask & ~eroded[1:-1, 1:-1]


@pytest.mark.parametrize("ratio", [0.001, 0.02, 0.1])
@pytest.mark.parametrize("shape", [(1, 1), (7, 40), (60, 90), (133, 71)])
def test_boundary_is_the_published_one(shape, ratio):
    rng = np.random.default_rng(0)
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), 3)
    for mask in (noise > 0, noise < np.quantile(noise, 0.9), rng.random(shape) < 0.98, np.ones(shape, bool)):
        assert np.array_equal(boundary(mask, ratio), published_boundary(mask, ratio))
    assert not boundary(np.zeros(shape, bool), ratio).any()


def test_boundary_iou_by_hand():
    shape = (100, 100)  # 2 % of the diagonal of 141.4 is 2.8: three pixels
    square, moved = rectangle(shape, 20, 20, 40, 40), rectangle(shape, 23, 20, 43, 40)
    edge = boundary(square)
    assert edge.sum() == 20**2 - 14**2
    assert boundary(rectangle(shape, 0, 80, 20, 100)).sum() == 20**2 - 14**2  # the image's border is one
    # both hold 20 x 17 pixels, of which the two cores of 14 x 14, 11 x 14 of them common, are no boundary
    common = 20 * 17 - (2 * 14 * 14 - 11 * 14)
    assert mask_iou(edge, boundary(moved)) == common / (2 * 204 - common) == 1 / 3


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy])
def test_mask_iou_of_batches_and_empty_masks(convert):
    a, b = np.zeros((2, 3, 4, 5), bool), np.zeros((2, 1, 4, 5), bool)
    a[0, 0, :2], a[0, 1, 1:3], b[0, 0, 1:3] = True, True, True
    assert mask_iou(convert(a), convert(b)).tolist() == [[pytest.approx(1 / 3), 1, 0], [1, 1, 1]]


def test_boxes_and_ellipses():
    ellipse = ellipse_mask((100, 300), (40, 20, 240, 90))
    assert ellipse.sum() == pytest.approx(np.pi / 4 * 200 * 70, rel=2e-3)
    assert tight_box(ellipse) == (40, 20, 240, 90)
    assert np.array_equal(ellipse, np.flip(ellipse_mask((100, 300), (60, 10, 260, 80))))
    box = box_mask((100, 300), (40, 20, 240, 90))
    assert np.array_equal(box, rectangle((100, 300), 40, 20, 240, 90))
    between_pixels = box_mask((100, 300), (39.6, 19.5, 240.4, 90.5))  # centers at 39.5 and 240.5 are outside
    assert np.array_equal(between_pixels, rectangle((100, 300), 40, 19, 240, 90))
    assert not box_mask((5, 5), (2, 2, 2, 4)).any()
    assert not ellipse_mask((5, 5), (2, 2, 2, 4)).any()
