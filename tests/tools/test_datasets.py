import numpy as np
import pytest
from PIL import Image

from benchmarks.masks import datasets
from benchmarks.masks.datasets import find_photographs

TWO_REGIONS = np.array(  # 7 covers 6 of 20 pixels in two parts, 0 covers 14
    [[0, 7, 7, 0, 0], [0, 7, 7, 0, 0], [0, 0, 0, 0, 0], [7, 7, 0, 0, 0]], dtype=np.uint8
)
MASK = np.zeros((64, 128), dtype=np.uint8)
MASK[10:30, 20:60] = 255
MASK[40:, 100:] = 128  # not above 128: background


def write(folder, images, labels, label, suffix=".jpg", names=("b", "a")):
    for name in names:
        (folder / images).mkdir(parents=True, exist_ok=True)
        (folder / labels).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (128, 64), (90, 120, 30)).save(folder / images / f"{name}{suffix}")
        Image.fromarray(label).save(folder / labels / f"{name}.png")
    return folder


def test_region_is_all_pixels_of_a_label():
    (target,) = datasets.targets(TWO_REGIONS)  # label 0 covers 70 %
    assert np.array_equal(target.mask, TWO_REGIONS == 7)
    assert target[1:] == ((0, 0, 3, 4), (1, 0), 0.3)


@pytest.mark.parametrize(("count", "included"), [(99, False), (100, True), (6000, True), (6001, False)])
@pytest.mark.parametrize("label", [0, 40000])
def test_area_limits_are_inclusive_and_every_label_counts(count, included, label):
    label_map = np.full(10000, 12, dtype=np.uint16)
    label_map[:count] = label
    found = datasets.targets(label_map.reshape(100, 100))
    assert (count in [round(target.area * 10000) for target in found]) == included


@pytest.mark.parametrize(
    ("images", "labels", "suffix"), [("", "", ".jpg"), ("images", "labels", ".jpg"), ("images", "labels", ".png")]
)
def test_folders_of_label_maps(tmp_path, images, labels, suffix):
    write(tmp_path, images, labels, (MASK == 255).astype(np.uint16) * 999, suffix)
    entries = find_photographs(tmp_path)
    assert [entry.name for entry in entries] == [f"a{suffix}", f"b{suffix}"]
    photograph = entries[0].read()
    assert photograph.image.shape == (64, 128, 3)
    assert [target.box for target in photograph.targets] == [(20, 10, 60, 30)]


@pytest.mark.parametrize(("images", "masks"), datasets.MASK_FOLDERS)
def test_folders_of_masks(tmp_path, images, masks):
    write(tmp_path, images, masks, MASK)
    entries = find_photographs(tmp_path)
    assert [entry.name for entry in entries] == ["a.jpg", "b.jpg"]
    (target,) = entries[1].read().targets
    assert np.array_equal(target.mask, MASK == 255)
    assert (target.box, target.area) == ((20, 10, 60, 30), 800 / (64 * 128))


def test_masks_of_255_precede_masks_of_1(tmp_path):
    write(tmp_path, "images", "masks", np.minimum(MASK, 1))
    write(tmp_path, "images", "masks_max255", MASK)
    assert find_photographs(tmp_path)[0].read().targets[0].area == 800 / (64 * 128)


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGB", "RGBA"])
def test_masks_of_any_mode(tmp_path, mode):
    write(tmp_path, "im", "gt", MASK, names=("a",))
    mask = Image.fromarray(np.where(MASK == 255, MASK, 0))
    mask.convert(mode).save(tmp_path / "gt" / "a.png")
    (target,) = find_photographs(tmp_path)[0].read().targets
    assert np.array_equal(target.mask, MASK == 255)


def test_masks_of_any_area(tmp_path):
    mask = np.full_like(MASK, 255)
    write(tmp_path, "im", "gt", mask, names=("a",))
    assert find_photographs(tmp_path)[0].read().targets[0].area == 1
    mask[:] = 0
    mask[5, 7] = 255
    write(tmp_path, "im", "gt", mask, names=("a",))
    assert find_photographs(tmp_path)[0].read().targets[0].box == (7, 5, 8, 6)


@pytest.mark.parametrize(
    ("layout", "removed", "named"),
    [
        (None, None, "nowhere"),
        (("images", "labels"), "labels", "nowhere"),  # images alone
        (("im", "gt"), "im/*", "im"),
        (("", ""), "a.png", "a.png"),
        (("im", "gt"), "gt/b.png", "b.png"),
    ],
)
def test_unusable_folders_are_explained(tmp_path, layout, removed, named):
    folder = tmp_path / "nowhere"
    if layout:
        write(folder, *layout, MASK)
        for path in list(folder.glob(removed)):
            path.rename(tmp_path / path.name)
    with pytest.raises(FileNotFoundError) as raised:
        find_photographs(folder)
    assert datasets.LAYOUT in str(raised.value) and f"{named}'" in str(raised.value)


def save_damaged(path):
    Image.effect_noise((128, 64), 90).save(path)
    path.write_bytes(path.read_bytes()[:900])


@pytest.mark.parametrize(
    ("layout", "save", "message"),
    [
        (("", ""), Image.new("L", (100, 64)).save, r"a\.png' is \(64, 100\), its image \(64, 128\)"),
        (("", ""), Image.new("RGB", (128, 64)).save, "one channel, got mode 'RGB'"),
        (("", ""), save_damaged, r"a\.png' is damaged"),
        (("im", "gt"), Image.new("L", (100, 64)).save, r"a\.png' is \(64, 100\), its image \(64, 128\)"),
        (("im", "gt"), Image.new("L", (128, 64), 1).save, r"a\.png' has no object: .*largest value is 1; scale"),
        (("im", "gt"), Image.fromarray(MASK.astype(np.uint16) * 257).save, "8 bits a channel, got mode 'I;16'"),
        (("im", "gt"), save_damaged, r"a\.png' is damaged"),
    ],
)
def test_unusable_labels_are_refused(tmp_path, layout, save, message):
    write(tmp_path, *layout, MASK, names=("a",))
    save(tmp_path / layout[1] / "a.png")
    with pytest.raises(ValueError, match=message):
        find_photographs(tmp_path)[0].read()
