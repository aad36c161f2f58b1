import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small_model import small_model

from benchmarks import accuracy
from benchmarks.accuracy import Photo, Target

TWO_REGIONS = np.array(  # 7 covers 6 of 20 pixels in two parts, 0 covers 14
    [
        [0, 7, 7, 0, 0],
        [0, 7, 7, 0, 0],
        [0, 0, 0, 0, 0],
        [7, 7, 0, 0, 0],
    ],
    dtype=np.uint8,
)


def brute_force_interior(mask: np.ndarray) -> tuple[int, int]:
    padded = np.pad(mask, 1)
    outside = np.argwhere(~padded)
    inside = np.argwhere(padded)  # row-major, and argmax takes the first of equals
    y, x = inside[((inside[:, None] - outside) ** 2).sum(-1).min(1).argmax()]
    return int(x) - 1, int(y) - 1


def test_region_is_all_pixels_of_a_label():
    (target,) = accuracy.targets(TWO_REGIONS)  # label 0 takes 70 %
    assert np.array_equal(target.mask, TWO_REGIONS == 7)
    assert target.box == (0, 0, 3, 4)
    assert target.point == (1, 0)
    assert target.area == 0.3


@pytest.mark.parametrize(("count", "included"), [(99, False), (100, True), (6000, True), (6001, False)])
@pytest.mark.parametrize("label", [0, 1, 40000])
def test_area_limits_are_inclusive_and_every_label_counts(count, included, label):
    label_map = np.full(10000, 12, dtype=np.uint16)
    label_map[:count] = label
    found = accuracy.targets(label_map.reshape(100, 100))
    assert (count in [round(target.area * 10000) for target in found]) == included


def test_interior_point_of_known_shapes():
    disc = np.hypot(*np.ogrid[-20:21, -30:31]) <= 9
    assert accuracy.interior_point(disc) == (30, 20)
    ring = disc & (np.hypot(*np.ogrid[-20:21, -30:31]) > 4)
    x, y = accuracy.interior_point(ring)
    assert ring[y, x]
    corner = np.zeros((40, 50), dtype=bool)
    corner[:21, :21] = True
    assert accuracy.interior_point(corner) == (10, 10)  # the image's border counts as outside
    pixel = np.zeros((3, 4), dtype=bool)
    pixel[2, 3] = True
    assert accuracy.interior_point(pixel) == (3, 2)


@pytest.mark.parametrize("density", [0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (13, 1), (17, 23), (31, 18)])
def test_interior_point_agrees_with_brute_force(shape, density):
    rng = np.random.default_rng(0)
    mask = rng.random(shape) < density
    mask.flat[0] = True
    assert accuracy.interior_point(mask) == brute_force_interior(mask)


def test_baselines():
    ellipse = accuracy.ellipse_mask((100, 300), (40, 20, 240, 90))
    assert ellipse.sum() == pytest.approx(np.pi / 4 * 200 * 70, rel=2e-3)
    assert accuracy.tight_box(ellipse) == (40, 20, 240, 90)
    assert np.array_equal(ellipse, np.flip(accuracy.ellipse_mask((100, 300), (60, 10, 260, 80))))
    box = accuracy.box_mask((100, 300), (40, 20, 240, 90))
    target = Target(ellipse, (40, 20, 240, 90), (140, 55), ellipse.mean())
    scores = accuracy.score_baselines([Photo(np.zeros((100, 300, 3), np.uint8), [target])])
    assert scores["inscribed_ellipse"]["mean_iou"] == 1
    assert scores["filled_box"]["mean_iou"] == ellipse.sum() / box.sum()


def test_summary():
    areas = np.array([0.01, 0.03, 0.299, 0.3, 0.6])
    ious = np.array([0.5, 0.6, 0.7, 0.2, 1.0])
    result = accuracy.summary(ious, areas, predicted=np.array([0.2, 0.3, 0.4, 0.1, 0.5]))
    assert result["targets"] == 5
    assert result["mean_iou"] == pytest.approx(0.6)
    assert result["iou_above_half"] == 0.6  # 0.5 itself is not above
    assert {name: entry["targets"] for name, entry in result["by_area"].items()} == {
        "1-3%": 1,
        "3-10%": 1,
        "10-30%": 1,
        "30-60%": 2,
    }
    assert result["by_area"]["30-60%"]["mean_iou"] == pytest.approx(0.6)
    assert result["score_spearman"] == pytest.approx(1)


def test_spearman():
    assert accuracy.spearman(np.array([1, 2, 3, 4]), np.array([9, 5, 1, 0])) == pytest.approx(-1)
    assert accuracy.spearman(np.array([1, 2, 3, 4, 5]), np.array([2, 1, 4, 3, 5])) == pytest.approx(0.8)
    assert accuracy.spearman(np.array([1, 1, 2]), np.array([1, 2, 3])) == pytest.approx(3**0.5 / 2)  # a tie
    assert accuracy.spearman(np.array([1, 1]), np.array([1, 2])) is None


class Rectangles:
    """Stands in for a model: a box prompt fills itself; a click draws nothing, then squares of 10, 20 and 30 pixels."""

    config = SimpleNamespace(image_size=256)
    device = torch.device("cpu")
    dtype = torch.float32
    SCORES = (0.5, 0.1, 0.2, 0.9)

    def encode_image(self, pixels):
        assert pixels.shape == (1, 3, 256, 256)

    def decode_all(self, embedding, boxes=None, point_coords=None, point_labels=None):
        if point_coords is not None:
            assert (point_labels == 1).all()
            centre = point_coords[:, 0] + 0.5
            boxes = torch.stack([torch.cat([centre - r, centre + r], 1) for r in (0, 5, 10, 15)], dim=1)
        else:
            boxes = boxes[:, None]
        x1, y1, x2, y2 = boxes[..., None, None].unbind(2)
        at = 4 * torch.arange(64) + 2  # centres of the low-resolution pixels
        inside = (at >= x1) & (at < x2) & (at[:, None] >= y1) & (at[:, None] < y2)
        return inside.float() - 0.5, torch.tensor(self.SCORES[: boxes.shape[1]]).expand(len(boxes), -1)


def photo_of_squares(side: int) -> Photo:
    """A wide picture, 128 x 64: half the model's input."""
    label_map = np.zeros((64, 128), dtype=np.uint8)
    for label, (x, y) in enumerate([(8, 8), (40, 16), (92, 36)], 1):
        label_map[y : y + side, x : x + side] = label
    return Photo(np.zeros((64, 128, 3), np.uint8), accuracy.targets(label_map))


def test_prompts_reach_the_model_in_its_frame_and_masks_come_back():
    scores = accuracy.score_model(Rectangles(), [photo_of_squares(12), Photo(np.zeros((9, 9, 3), np.uint8), [])])
    assert scores["box"]["targets"] == 3
    assert scores["box"]["mean_iou"] > 0.97
    assert scores["box"]["score_spearman"] is None
    assert "box_oracle" not in scores


def test_each_way_of_choosing_among_three_masks():
    photo = photo_of_squares(10)  # 20 pixels in the input's frame: the second of the three squares
    scores = accuracy.score_model(Rectangles(), [photo])
    assert scores["point"]["mean_iou"] == 0
    assert scores["point_oracle"]["mean_iou"] > 0.6
    assert scores["point_best_score"]["mean_iou"] == pytest.approx(4 / 9, abs=0.1)


@pytest.mark.parametrize("chunk", [1, 2, 16])
def test_chunks_do_not_matter(monkeypatch, chunk):
    monkeypatch.setattr(accuracy, "PROMPTS_AT_ONCE", chunk)
    scores = accuracy.score_model(Rectangles(), [photo_of_squares(12)])
    assert scores["point_oracle"]["targets"] == 3
    assert scores["box"]["mean_iou"] > 0.97


def write_folder(folder, image_suffix=".jpg", nested=False, names=("b", "a")):
    for name in names:
        image, label = (folder / part if nested else folder for part in ("images", "labels"))
        image.mkdir(parents=True, exist_ok=True)
        label.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (128, 64), (90, 120, 30)).save(image / f"{name}{image_suffix}")
        label_map = np.zeros((64, 128), dtype=np.uint16)
        label_map[10:30, 20:60] = 999
        Image.fromarray(label_map).save(label / f"{name}.png")
    return folder


@pytest.mark.parametrize(("suffix", "nested"), [(".jpg", False), (".jpg", True), (".png", True)])
def test_folder_layouts(tmp_path, suffix, nested):
    write_folder(tmp_path, suffix, nested)
    assert [image.stem for image, _ in accuracy.find_pairs(tmp_path)] == ["a", "b"]
    (photo,) = accuracy.read_folder(tmp_path, limit=1)
    assert photo.image.shape == (64, 128, 3)
    assert [target.box for target in photo.targets] == [(20, 10, 60, 30)]


def test_evaluate_runs_a_model_with_three_masks(tmp_path):
    scores = accuracy.evaluate(small_model(), write_folder(tmp_path))
    assert set(scores) == {f"{prompt}{way}" for prompt in ("box", "point") for way in ("", "_best_score", "_oracle")}
    assert all(row["targets"] == 2 for row in scores.values())
    assert scores["box_oracle"]["mean_iou"] >= scores["box_best_score"]["mean_iou"]


@pytest.mark.parametrize("flags", [["--baselines-only"], []])
def test_command_line(tmp_path, capsys, monkeypatch, flags):
    monkeypatch.setattr(accuracy.RWKVSAM, "from_pretrained", lambda source, device: small_model())
    out = tmp_path / "results" / "x.json"
    accuracy.main([str(write_folder(tmp_path / "data")), "--out", str(out), "--limit", "1", *flags])
    printed = capsys.readouterr()
    assert "filled box" in printed.out
    assert printed.err == ""  # a pipe gets no progress
    report = json.loads(out.read_text())
    assert report["targets"] == 1
    assert report["scores"]["filled_box"]["mean_iou"] == 1
    assert ("point" in report["scores"]) == (not flags)
    assert report["machine"]["cpu"]
    if not flags:
        assert (report["image_size"], report["dtype"], report["model"]) == (128, "float32", "bundled")


@pytest.mark.parametrize("case", ["absent", "empty", "unlabelled"])
def test_useless_folders_are_explained(tmp_path, capsys, case):
    if case == "unlabelled":
        (write_folder(tmp_path) / "a.png").unlink()
    with pytest.raises(SystemExit):
        accuracy.main([str(tmp_path / "nowhere" if case == "absent" else tmp_path), "--baselines-only"])
    assert accuracy.LAYOUT in " ".join(capsys.readouterr().err.split())


def test_label_maps_that_do_not_fit_are_refused(tmp_path):
    write_folder(tmp_path, names=("a",))
    Image.new("L", (100, 64)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"\(64, 100\), its image \(64, 128\)"):
        list(accuracy.read_folder(tmp_path))
    Image.new("RGB", (128, 64)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="one channel, got mode 'RGB'"):
        list(accuracy.read_folder(tmp_path))
