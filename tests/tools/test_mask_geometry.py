import numpy as np
import pytest
from scipy import ndimage

from benchmarks.masks import mask_geometry


def rectangle(shape, x1, y1, x2, y2):
    mask = np.zeros(shape, dtype=bool)
    mask[y1:y2, x1:x2] = True
    return mask


def brute_force_interior(mask: np.ndarray) -> tuple[int, int]:
    padded = np.pad(mask, 1)
    outside = np.argwhere(~padded)
    inside = np.argwhere(padded)  # row-major, and argmax takes the first of equals
    y, x = inside[((inside[:, None] - outside) ** 2).sum(-1).min(1).argmax()]
    return int(x) - 1, int(y) - 1


def test_interior_point_of_known_shapes():
    disc = np.hypot(*np.ogrid[-20:21, -30:31]) <= 9
    assert mask_geometry.interior_point(disc) == (30, 20)
    ring = disc & (np.hypot(*np.ogrid[-20:21, -30:31]) > 4)
    x, y = mask_geometry.interior_point(ring)
    assert ring[y, x]
    corner = rectangle((40, 50), 0, 0, 21, 21)
    assert mask_geometry.interior_point(corner) == (10, 10)  # the image's border counts as outside
    pixel = rectangle((3, 4), 3, 2, 4, 3)
    assert mask_geometry.interior_point(pixel) == (3, 2)


@pytest.mark.parametrize("density", [0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (13, 1), (17, 23), (31, 18)])
def test_interior_point_agrees_with_brute_force(shape, density):
    rng = np.random.default_rng(0)
    mask = rng.random(shape) < density
    mask.flat[0] = True
    assert mask_geometry.interior_point(mask) == brute_force_interior(mask)


@pytest.mark.parametrize("blur", [1, 4, 15])
@pytest.mark.parametrize("covered", [0.1, 0.5, 0.95])
def test_deepest_agrees_with_the_whole_distance_transform(blur, covered):
    noise = ndimage.gaussian_filter(np.random.default_rng(blur).standard_normal((143, 210)), blur)
    mask = noise < np.quantile(noise, covered)
    squared = np.rint(ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1] ** 2).astype(int)
    y, x = np.unravel_index(squared.argmax(), mask.shape)
    assert mask_geometry.deepest(mask) == (x, y, squared.max())


def test_deepest_takes_the_first_of_equals():
    two = rectangle((100, 200), 120, 10, 161, 51) | rectangle((100, 200), 20, 30, 61, 71)
    assert mask_geometry.deepest(two) == (140, 30, 21**2)
    bar = rectangle((300, 100), 40, 0, 51, 300)
    assert mask_geometry.deepest(bar) == (45, 5, 36)


def test_next_click_is_the_centre_of_the_largest_error():
    truth = rectangle((80, 120), 20, 20, 60, 60)
    assert mask_geometry.next_click(truth, truth) is None
    assert mask_geometry.next_click(np.zeros_like(truth), truth) == (39, 39, 1)
    half = rectangle((80, 120), 20, 20, 37, 60)  # 23 columns missed,
    assert mask_geometry.next_click(half, truth) == (48, 31, 1)
    assert mask_geometry.next_click(half | rectangle((80, 120), 70, 20, 91, 60), truth) == (48, 31, 1)  # 21 spilled,
    x, y, label = mask_geometry.next_click(half | rectangle((80, 120), 70, 20, 95, 60), truth)  # 25 spilled
    assert (x, label) == (82, 0)
    assert truth[31, 48] and not truth[y, x]
    as_large = truth ^ rectangle((80, 120), 20, 20, 25, 25) ^ rectangle((80, 120), 90, 20, 95, 25)
    assert mask_geometry.next_click(as_large, truth) == (92, 22, 0)
    # what counts is how deep an error is, not its area
    deep = truth & ~rectangle((80, 120), 30, 30, 41, 41)
    assert mask_geometry.next_click(deep | rectangle((80, 120), 0, 70, 120, 79), truth) == (35, 35, 1)


def published_boundary(mask: np.ndarray, dilation_ratio: float) -> np.ndarray:
    """The definition word for word: zeros all around, eroded by a 3 x 3 square d times, taken from the mask."""
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
        assert np.array_equal(mask_geometry.boundary(mask, ratio), published_boundary(mask, ratio))
    assert not mask_geometry.boundary(np.zeros(shape, bool), ratio).any()


def test_boundary_iou_by_hand():
    shape = (100, 100)  # a diagonal of 141.4, 2 % of which is 2.8: three pixels
    square, moved = rectangle(shape, 20, 20, 40, 40), rectangle(shape, 23, 20, 43, 40)
    edge = mask_geometry.boundary(square)
    assert edge.sum() == 20**2 - 14**2
    assert mask_geometry.boundary(rectangle(shape, 0, 80, 20, 100)).sum() == 20**2 - 14**2  # the image's border is one
    # both hold 20 x 17 pixels, of which the two cores of 14 x 14, 11 x 14 of them common, are no boundary
    common = 20 * 17 - (2 * 14 * 14 - 11 * 14)
    assert mask_geometry.iou(edge, mask_geometry.boundary(moved)) == common / (2 * 204 - common) == 1 / 3
    assert mask_geometry.iou(edge, edge) == 1
    assert mask_geometry.iou(edge, mask_geometry.boundary(~square & False)) == 0


def test_boxes_and_ellipses():
    ellipse = mask_geometry.ellipse_mask((100, 300), (40, 20, 240, 90))
    assert ellipse.sum() == pytest.approx(np.pi / 4 * 200 * 70, rel=2e-3)
    assert mask_geometry.tight_box(ellipse) == (40, 20, 240, 90)
    assert np.array_equal(ellipse, np.flip(mask_geometry.ellipse_mask((100, 300), (60, 10, 260, 80))))
    box = mask_geometry.box_mask((100, 300), (40, 20, 240, 90))
    assert np.array_equal(box, rectangle((100, 300), 40, 20, 240, 90))
    between_pixels = mask_geometry.box_mask((100, 300), (39.6, 19.5, 240.4, 90.5))  # centres at 39.5 and 240.5 are out
    assert np.array_equal(between_pixels, rectangle((100, 300), 40, 19, 240, 90))
    assert not mask_geometry.box_mask((5, 5), (2, 2, 2, 4)).any()
    assert not mask_geometry.ellipse_mask((5, 5), (2, 2, 2, 4)).any()
