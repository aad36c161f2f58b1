import json
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks.masks import accuracy, coco

SQUARE = [[10, 20, 30, 20, 30, 40, 10, 40]]  # x 10 to 30, y 20 to 40
IMAGE = {"id": 1, "file_name": "a.jpg", "height": 64, "width": 128}


def annotation(image_id=1, segmentation=SQUARE, **more):
    return {
        "id": 7,
        "category_id": 1,
        "image_id": image_id,
        "bbox": [9.5, 19.25, 21, 22.5],
        "segmentation": segmentation,
        **more,
    }


def write(folder, annotations, images=(IMAGE,), at=None):
    folder = folder / "images"
    for image in images:
        path = folder / (at or image["file_name"])
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (128, 64), (90, 120, 30)).save(path)
    path = folder.parent / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": []}))
    return folder, path


@pytest.fixture
def pycocotools():
    return pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed; pip install '.[test]'")


def test_boxes_and_masks_are_as_annotated(tmp_path, pycocotools):
    images = [IMAGE | {"id": i, "file_name": f"{i}.jpg"} for i in (3, 1, 2)]
    crowd = annotation(1, {"size": [64, 128], "counts": [0, 64 * 128]}, iscrowd=1)
    empty = annotation(1, [[10, 20, 30, 20]])
    entries = coco.find_annotated(*write(tmp_path, [crowd, annotation(1), empty, annotation(3), crowd], images))
    assert [entry.name for entry in entries] == ["3.jpg", "1.jpg"]  # 2 has no annotation
    (target,) = entries[1].read().targets
    expected = np.zeros((64, 128), bool)
    expected[20:40, 10:30] = True
    assert np.array_equal(target.mask, expected)
    assert (target.box, target.point) == ((9.5, 19.25, 30.5, 41.75), (19, 29))


def test_file_that_is_listed_twice_is_two_images(tmp_path, pycocotools):
    triangle = annotation(2, [[10, 20, 30, 20, 30, 40]])
    entries = coco.find_annotated(*write(tmp_path, [annotation(1), triangle], [IMAGE, IMAGE | {"id": 2}]))
    assert [entry.name for entry in entries] == ["a.jpg", "a.jpg#2"]
    first, second = (rows["rows"][0]["scores"] for rows in accuracy.measure(None, entries).values())
    assert first != second


@pytest.mark.parametrize("at", ["val2017/000000000042.jpg", "000000000042.jpg"])
@pytest.mark.parametrize("more", [{}, {"file_name": "COCO_val2014_000000000042.jpg"}])
def test_images_of_LVIS_are_found_by_their_address(tmp_path, pycocotools, at, more):
    address = "http://images.cocodataset.org/val2017/000000000042.jpg"
    images = [{"id": 5, "coco_url": address, "height": 64, "width": 128, **more}]
    (entry,) = coco.find_annotated(*write(tmp_path, [annotation(5)], images, at=at))
    assert entry.name == at
    assert len(entry.read().targets) == 1


def read_mask(tmp_path, segmentation):
    (entry,) = coco.find_annotated(*write(tmp_path, [annotation(segmentation=segmentation)]))
    return entry.read().targets[0].mask


@pytest.mark.parametrize("packed", [False, True])
def test_run_lengths(tmp_path, pycocotools, packed):
    mask = np.zeros((64, 128), bool)
    mask[1:, 1] = mask[0, 2] = True  # run lengths go down the columns
    counts = [65, 64, 64 * 126 - 1]
    if packed:
        mask = np.random.default_rng(0).random((64, 128)) < 0.4
        counts = pycocotools.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    assert np.array_equal(read_mask(tmp_path, {"size": [64, 128], "counts": counts}), mask)


def test_polygons_are_joined(tmp_path, pycocotools):
    both = read_mask(tmp_path, [[0, 0, 8, 0, 8, 4, 0, 4], [6, 0, 12, 0, 12, 4, 6, 4], [50, 50, 60, 60]])
    assert np.array_equal(both, np.pad(np.ones((4, 12), bool), ((0, 60), (0, 116))))


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (
            {"size": [64, 64], "counts": "S66j1000000000m]3"},
            r"annotation 7 of .*a\.jpg.* is \(64, 64\), its image \(64, 128\)",
        ),
        ({"size": [64, 128], "counts": [1, 2]}, r"annotation 7 of .*a\.jpg .*run lengths sum to 3"),
        ({"size": [64, 128]}, "KeyError: 'counts'"),
        ("mask.png", "TypeError"),
    ],
)
def test_unreadable_segmentations_are_named(tmp_path, pycocotools, segmentation, message):
    (entry,) = coco.find_annotated(*write(tmp_path, [annotation(segmentation=segmentation)]))
    with pytest.raises(ValueError, match=message):
        entry.read()


def test_missing_image_and_wrong_size_are_named(tmp_path, pycocotools):
    (entry,) = coco.find_annotated(*write(tmp_path, [annotation()], [IMAGE | {"width": 100}]))
    with pytest.raises(ValueError, match=r"annotation of .*a\.jpg' is \(64, 100\), its image \(64, 128\)"):
        entry.read()
    folder, path = write(tmp_path, [annotation()])
    (folder / "a.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 1 images.*a\.jpg.*val2017"):
        coco.find_annotated(folder, path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no JSON", "JSONDecodeError"),
        ("[]", "AssertionError"),
        ('{"images": [], "annotations": []}', "no object is annotated"),
        ('{"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "a cat"}]}', "KeyError: 'id'"),
        ('{"images": [{"id": 1}], "annotations": [{"id": 1, "image_id": 1}]}', "coco_url"),
    ],
)
def test_other_files_are_refused(tmp_path, pycocotools, content, message):
    path = tmp_path / "captions.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        coco.find_annotated(tmp_path, path)
    assert "captions.json" in str(raised.value) and coco.FORMAT in str(raised.value)


def test_missing_pycocotools_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pycocotools"):
        coco.find_annotated(*write(tmp_path, [annotation()]))
