import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small_model import small_model

from benchmarks.masks import accuracy, datasets
from benchmarks.masks.datasets import Photo, Target


def test_baselines():
    ellipse = accuracy.ellipse_mask((100, 300), (40, 20, 240, 90))
    box = accuracy.box_mask((100, 300), (40, 20, 240, 90))
    scores = accuracy.score_baselines([Photo(np.zeros((100, 300, 3), np.uint8), [Target.of(ellipse)])])
    assert scores["inscribed_ellipse"]["mean_iou"] == scores["inscribed_ellipse"]["mean_boundary_iou"] == 1
    assert scores["filled_box"]["mean_iou"] == ellipse.sum() / box.sum()
    assert 0.1 < scores["filled_box"]["mean_boundary_iou"] < 0.5


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
    assert "mean_boundary_iou" not in result


def test_summary_of_objects_of_any_size():
    areas = np.array([0.6, 0.601, 1.0, 0.0099])
    result = accuracy.summary(np.array([0.1, 0.2, 0.4, 0.8]), areas, boundary_ious=np.array([0.1, 0.1, 0.2, 0.2]))
    assert result["mean_boundary_iou"] == pytest.approx(0.15)
    by_area = {name: (entry["targets"], entry["mean_iou"]) for name, entry in result["by_area"].items()}
    assert by_area == {
        "0-1%": (1, 0.8),
        "1-3%": (0, None),
        "3-10%": (0, None),
        "10-30%": (0, None),
        "30-60%": (1, 0.1),
        "60-100%": (2, pytest.approx(0.3)),
    }


def test_spearman():
    assert accuracy.spearman(np.array([1, 2, 3, 4]), np.array([9, 5, 1, 0])) == pytest.approx(-1)
    assert accuracy.spearman(np.array([1, 2, 3, 4, 5]), np.array([2, 1, 4, 3, 5])) == pytest.approx(0.8)
    assert accuracy.spearman(np.array([1, 1, 2]), np.array([1, 2, 3])) == pytest.approx(3**0.5 / 2)  # a tie
    assert accuracy.spearman(np.array([1, 1]), np.array([1, 2])) is None


class Rectangles:
    """Stands in for a model: a box prompt fills itself; the first click draws nothing, or squares of 10, 20, 30 pixels.

    `calls` holds the clicks, labels and mask prompts it was given and the logits it returned.
    """

    config = SimpleNamespace(image_size=256)
    device = torch.device("cpu")
    dtype = torch.float32
    SCORES = (0.5, 0.1, 0.2, 0.9)

    def __init__(self):
        self.encoded = 0
        self.calls = []

    def encode_image(self, pixels):
        assert pixels.shape == (1, 3, 256, 256)
        self.encoded += 1

    def decode_all(self, embedding, boxes=None, point_coords=None, point_labels=None, mask_input=None):
        if point_coords is not None:
            assert (point_labels[:, 0] == 1).all()
            centre = point_coords[:, 0] + 0.5
            boxes = torch.stack([torch.cat([centre - r, centre + r], 1) for r in (0, 5, 10, 15)], dim=1)
        else:
            boxes = boxes[:, None]
        x1, y1, x2, y2 = boxes[..., None, None].unbind(2)
        at = 4 * torch.arange(64) + 2  # centres of the low-resolution pixels
        inside = (at >= x1) & (at < x2) & (at[:, None] >= y1) & (at[:, None] < y2)
        low_res_masks = inside.float() - 0.5
        if point_coords is not None:
            self.calls.append((point_coords, point_labels, mask_input, low_res_masks))
        return low_res_masks, torch.tensor(self.SCORES[: boxes.shape[1]]).expand(len(boxes), -1)


def photo_of_squares(side: int) -> Photo:
    """A wide picture, 128 x 64: half the model's input."""
    label_map = np.zeros((64, 128), dtype=np.uint8)
    for label, (x, y) in enumerate([(8, 8), (40, 16), (92, 36)], 1):
        label_map[y : y + side, x : x + side] = label
    return Photo(np.zeros((64, 128, 3), np.uint8), datasets.targets(label_map))


def test_prompts_reach_the_model_in_its_frame_and_masks_come_back():
    scores = accuracy.score_model(Rectangles(), [photo_of_squares(12), Photo(np.zeros((9, 9, 3), np.uint8), [])])
    assert scores["box"]["targets"] == 3
    assert scores["box"]["mean_iou"] > 0.97
    assert scores["box"]["mean_boundary_iou"] > 0.9
    assert scores["box"]["score_spearman"] is None
    assert "box_oracle" not in scores


def test_each_way_of_choosing_among_three_masks():
    photo = photo_of_squares(10)  # 20 pixels in the input's frame: the second of the three squares
    scores = accuracy.score_model(Rectangles(), [photo])
    assert scores["point"]["mean_iou"] == 0
    assert scores["point_oracle"]["mean_iou"] > 0.6
    assert scores["point_best_score"]["mean_iou"] == pytest.approx(4 / 9, abs=0.1)


def test_clicks_correct_the_answer_that_a_user_sees():
    model = Rectangles()
    photo = photo_of_squares(12)  # 24 pixels in the input's frame
    photo.targets[1:] = []
    (row,) = accuracy.model_rows(model, photo)
    assert model.encoded == 1
    assert list(row["scores"]) == [
        f"{prompt}{way}"
        for prompt in accuracy.PROMPTS
        for way in accuracy.WAYS
        if prompt != "box" or not way  # this model answers boxes with a single mask
    ]
    prompts, labels, mask_inputs, returned = zip(*model.calls, strict=True)
    # of the first three the model believes the last most, which spills over; afterwards the single mask is empty
    assert labels[-1].tolist() == [[1, 0, 1, 1, 1]]
    assert mask_inputs[0] is None
    assert torch.equal(mask_inputs[1], returned[0][:, 3:])
    for count in (2, 3, 4):
        assert torch.equal(mask_inputs[count], returned[count - 1][:, :1])
        assert torch.equal(prompts[count][:, :count], prompts[count - 1])
    in_image = (prompts[4][0] / 2).long().tolist()
    assert row["clicks"] == [(x, y, label) for (x, y), label in zip(in_image, labels[4][0].tolist(), strict=True)]
    (x, y), spill = photo.targets[0].point, row["clicks"][1]
    assert not photo.targets[0].mask[spill[1], spill[0]]
    assert row["clicks"][2] == (x, y, 1)


def test_no_click_is_added_to_a_perfect_answer():
    class Halves(Rectangles):
        def decode_all(self, embedding, boxes=None, point_coords=None, point_labels=None, mask_input=None):
            given = boxes if boxes is not None else point_coords[:, 0]
            left = (given[:, 0] < 100)[:, None, None, None]
            low_res_masks = torch.where(left == (torch.arange(64) < 32), 1.0, -1.0).expand(-1, 1, 64, 64)
            self.calls.append(point_labels)
            return low_res_masks, torch.full((len(given), 1), 0.9)

    model = Halves()
    label_map = np.repeat(np.repeat(np.array([[1, 2]], np.uint8), 64, 1), 64, 0)
    rows = accuracy.model_rows(model, Photo(np.zeros((64, 128, 3), np.uint8), datasets.targets(label_map)))
    assert [row["scores"]["clicks_5"][:2] for row in rows] == [[1, 1], [1, 1]]
    assert model.calls[-1].tolist() == [[1, -1, -1, -1, -1]] * 2


def test_fewer_clicks_can_be_asked_for():
    model = Rectangles()
    assert "clicks_3" not in accuracy.score_model(model, [photo_of_squares(12)], clicks=(1,))
    assert len(model.calls) == 1


@pytest.mark.parametrize(("prompts", "pixels"), [(1, 2**24), (2, 2**24), (16, 2 * 64 * 128), (16, 1)])
def test_chunks_do_not_matter(monkeypatch, prompts, pixels):
    photo = photo_of_squares(12)
    together = accuracy.model_rows(Rectangles(), photo)
    monkeypatch.setattr(accuracy, "PROMPTS_AT_ONCE", prompts)
    monkeypatch.setattr(accuracy, "PIXELS_AT_ONCE", pixels)
    model = Rectangles()
    assert accuracy.model_rows(model, photo) == together
    assert max(len(call[0]) for call in model.calls) == min(prompts, max(1, pixels // (64 * 128)), 3)


def write_folder(folder, names=("b", "a")):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 128, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.jpg")
        label_map = np.zeros((64, 128), dtype=np.uint16)
        label_map[10:30, 20 + number : 60] = 999
        Image.fromarray(label_map).save(folder / f"{name}.png")
    return folder


def test_evaluate_runs_a_model_with_three_masks(tmp_path):
    scores = accuracy.evaluate(small_model(), write_folder(tmp_path))
    assert list(scores) == list(accuracy.TITLES)[2:]
    assert all(row["targets"] == 2 for row in scores.values())
    assert scores["box_oracle"]["mean_iou"] >= scores["box_best_score"]["mean_iou"]


@pytest.fixture
def main(monkeypatch):
    """The command, with a small model in place of the bundled one; the names of the images it reads."""
    read = []
    load = datasets.load_image
    monkeypatch.setattr(accuracy.RWKVSAM, "from_pretrained", lambda source, device: small_model())
    monkeypatch.setattr(datasets, "load_image", lambda path: (read.append(path.name), load(path))[1])

    def run(*arguments):
        read.clear()
        accuracy.main([str(argument) for argument in arguments])
        return list(read)

    run.read = read
    return run


@pytest.mark.parametrize("flags", [["--baselines-only"], []])
def test_command_line(tmp_path, capsys, main, flags):
    out = tmp_path / "results" / "x.json"
    main(write_folder(tmp_path / "data"), "--out", out, "--limit", 1, *flags)
    printed = capsys.readouterr()
    assert "filled box" in printed.out
    assert printed.err == ""  # a pipe gets no progress
    report = json.loads(out.read_text())
    assert report["targets"] == 1
    assert report["scores"]["filled_box"]["mean_iou"] == report["scores"]["filled_box"]["mean_boundary_iou"] == 1
    assert ("point" in report["scores"]) == ("clicks_5" in report["scores"]) == (not flags)
    assert report["machine"]["cpu"]
    if not flags:
        assert (report["image_size"], report["dtype"], report["model"]) == (128, "float32", "bundled")


def scores_of(path):
    return json.loads(path.read_text())["scores"]


def test_an_interrupted_run_goes_on(tmp_path, capsys, main, monkeypatch):
    data = write_folder(tmp_path / "data", names="abcd")
    main(data, "--out", tmp_path / "whole.json")
    measure = accuracy.model_rows
    with monkeypatch.context() as patch:

        def stop(model, photo, size):
            if len(main.read) == 3:
                raise KeyboardInterrupt
            return measure(model, photo, size)

        patch.setattr(accuracy, "model_rows", stop)
        with pytest.raises(KeyboardInterrupt):
            main(data, "--out", tmp_path / "parts.json")
    rows = tmp_path / "parts.rows.jsonl"
    with rows.open("a") as file:
        file.write('{"image": "c.jpg", "seco')  # killed while it wrote
    capsys.readouterr()
    assert main(data, "--out", tmp_path / "parts.json") == ["c.jpg", "d.jpg"]
    assert "2 of 4 images are in" in capsys.readouterr().out
    assert scores_of(tmp_path / "parts.json") == scores_of(tmp_path / "whole.json")
    assert main(data, "--out", tmp_path / "parts.json", "--limit", 2) == []
    assert scores_of(tmp_path / "parts.json")["box"]["targets"] == 2
    rows.write_text("{}\n")
    with pytest.raises(SystemExit):
        main(data, "--out", tmp_path / "parts.json")
    assert "is damaged ('fingerprint'); delete it" in capsys.readouterr().err


@pytest.mark.parametrize("changed", ["model", "image_size", "data", "code"])
def test_rows_of_another_run_are_not_mixed_in(tmp_path, capsys, main, monkeypatch, changed):
    data = write_folder(tmp_path / "data")
    main(data, "--out", tmp_path / "x.json", "--limit", 1)
    flags = []
    if changed == "model":
        other = small_model()
        torch.nn.init.zeros_(other.mask_decoder.iou_token)
        monkeypatch.setattr(accuracy.RWKVSAM, "from_pretrained", lambda source, device: other)
    elif changed == "image_size":
        flags = ["--image-size", 64]
    elif changed == "code":
        (tmp_path / "accuracy.py").write_text("another")
        for name in ("coco", "mask_geometry", "photographs"):
            (tmp_path / f"{name}.py").touch()
        monkeypatch.setattr(accuracy, "__file__", str(tmp_path / "accuracy.py"))
    else:
        write_folder(data, names="c")
    with pytest.raises(SystemExit):
        main(data, "--out", tmp_path / "x.json", *flags)
    error = " ".join(capsys.readouterr().err.split())
    assert f"x.rows.jsonl' holds rows of another run ({changed}: " in error
    assert "delete it to measure anew, or give another --out" in error


def test_seed_draws_images(tmp_path, main):
    data = write_folder(tmp_path, names="abcdefgh")
    drawn = [main(data, "--limit", 3, "--seed", seed, "--baselines-only") for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert main(data, "--limit", 3, "--baselines-only") == ["a.jpg", "b.jpg", "c.jpg"]


def test_sheet_shows_best_median_and_worst(tmp_path, main, monkeypatch):
    cells = []
    monkeypatch.setattr(
        accuracy,
        "draw_sheet",
        lambda found, columns, draw=accuracy.draw_sheet: (cells.extend(found), draw(found, columns))[1],
    )
    main(
        write_folder(tmp_path / "data", names="abc"),
        "--sheet",
        tmp_path / "pictures" / "x.png",
        "--out",
        tmp_path / "x.json",
    )
    with Image.open(tmp_path / "pictures" / "x.png") as sheet:
        assert sheet.size == (3 * (608 + 8) + 8, 4 * (150 + 14 + 8) + 8)
    assert len(cells) == 12
    report = [json.loads(line) for line in (tmp_path / "x.rows.jsonl").read_text().splitlines()[1:]]
    ranked = sorted(line["rows"][0]["scores"]["clicks_3"][0] for line in report)
    for cell, which, fit in zip(cells[6:9], ("best", "median", "worst"), reversed(ranked), strict=True):
        assert cell.caption.startswith(f"model, 3 clicks: {which}, IoU {fit:.3f}")
        assert accuracy.iou(cell.answer, cell.truth) == pytest.approx(fit, abs=1e-3)
        assert len(cell.points) == 3 and not cell.boxes
    assert [len(cell.boxes) for cell in cells] == [1] * 3 + [0] * 9
    assert "best of 3 by score" in cells[3].caption


def test_annotation_files(tmp_path, capsys, main):
    pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed; pip install '.[test]'")
    data = write_folder(tmp_path / "data", names="a")
    images = [{"id": 1, "file_name": "a.jpg", "height": 64, "width": 128}]
    shapes = [{"image_id": 1, "bbox": [4, 4, 8, 8], "segmentation": [[4, 4, 12, 4, 12, 12, 4, 12]]}] * 2
    (tmp_path / "instances.json").write_text(json.dumps({"images": images, "annotations": shapes}))
    main(data, "--annotations", tmp_path / "instances.json", "--out", tmp_path / "x.json")
    report = json.loads((tmp_path / "x.json").read_text())
    assert (report["annotations"], report["targets"]) == ("instances.json", 2)
    assert report["scores"]["filled_box"]["mean_iou"] == 1
    assert report["scores"]["box"]["by_area"]["0-1%"]["targets"] == 2
    with pytest.raises(SystemExit):
        main(data, "--annotations", tmp_path / "nowhere.json")
    assert "No such file or directory" in (error := capsys.readouterr().err) and "nowhere.json" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--seed", "1"], "--seed draws the images that --limit takes"),
        (["--sheet", "x.png", "--baselines-only"], "--sheet shows a model's masks"),
        (["--sheet", "x"], "--sheet 'x' must end as a picture does"),
        ([], datasets.LAYOUT),
    ],
)
def test_useless_commands_are_explained(tmp_path, capsys, main, flags, message):
    with pytest.raises(SystemExit):
        main(tmp_path, *flags)
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_file_that_does_not_fit_is_named(tmp_path, capsys, main):
    data = write_folder(tmp_path)
    Image.new("L", (5, 5)).save(data / "b.png")
    with pytest.raises(SystemExit):
        main(data, "--out", tmp_path / "x.json")
    assert "b.png' is (5, 5), its image (64, 128)" in capsys.readouterr().err
    write_folder(data, names="b")
    with pytest.raises(SystemExit):
        main(data, "--baselines-only", "--out", tmp_path / "x.json")
    Image.new("L", (128, 64)).save(data / "a.png")
    with pytest.raises(SystemExit):
        main(data, "--baselines-only", "--limit", 1)
    assert "no target in the 1 images" in capsys.readouterr().err
