import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small_model import small_model

from benchmarks.masks import accuracy, datasets
from benchmarks.masks.datasets import Photograph, Target


def blank(H, W, targets=()):
    return Photograph(np.zeros((H, W, 3), np.uint8), list(targets))


def scores(model, photograph):
    return accuracy.summaries(accuracy.model_rows(model, photograph))


def test_baselines_of_an_ellipse():
    ellipse = accuracy.ellipse_mask((100, 300), (40, 20, 240, 90))
    box = accuracy.box_mask((100, 300), (40, 20, 240, 90))
    found = accuracy.summaries(accuracy.baseline_rows(blank(100, 300, [Target.of(ellipse)])))
    assert found["inscribed_ellipse"]["mean_iou"] == found["inscribed_ellipse"]["mean_boundary_iou"] == 1
    assert found["filled_box"]["mean_iou"] == ellipse.sum() / box.sum()
    assert 0.1 < found["filled_box"]["mean_boundary_iou"] < 0.5


def test_summary():
    areas = np.array([0.0099, 0.01, 0.03, 0.299, 0.3, 0.6, 0.601, 1.0])
    ious = np.array([0.8, 0.5, 0.6, 0.7, 0.2, 1.0, 0.2, 0.4])
    pixels = np.array([1, 1023, 1024, 9215, 9216, 9217, 99999, 99999])
    result = accuracy.summary(areas, pixels, ious, ious / 2, predicted=ious**2)
    assert (result["targets"], result["mean_iou"]) == (8, pytest.approx(0.55))
    assert result["mean_iou_from_1_percent"] == pytest.approx(3.6 / 7)
    sizes = {name: (entry["targets"], entry["mean_iou"]) for name, entry in result["by_size"].items()}
    assert sizes == {"S": (2, pytest.approx(0.65)), "M": (2, pytest.approx(0.65)), "L": (4, pytest.approx(0.45))}
    assert result["mean_boundary_iou"] == pytest.approx(0.275)
    assert result["iou_above_half"] == 0.5  # 0.5 itself is not above
    assert result["score_spearman"] == pytest.approx(1)
    assert {name: (entry["targets"], entry["mean_iou"]) for name, entry in result["by_area"].items()} == {
        "0-1%": (1, 0.8),
        "1-3%": (1, 0.5),
        "3-10%": (1, 0.6),
        "10-30%": (1, 0.7),
        "30-60%": (2, pytest.approx(0.6)),
        "60-100%": (2, pytest.approx(0.3)),
    }
    by_area = accuracy.summary(areas[:1], pixels[:1], ious[:1], ious[:1])["by_area"]
    assert list(by_area) == ["0-1%", "1-3%", "3-10%", "10-30%", "30-60%"] and by_area["1-3%"]["mean_iou"] is None


def test_reversed_answers_are_counted():
    target = Target.of(accuracy.box_mask((50, 50), (10, 10, 20, 20)), box=(10, 10, 30, 30))
    rest = accuracy.box_mask((50, 50), target.box) & ~target.mask
    assert accuracy.is_reversed(rest, target)
    assert accuracy.is_reversed(rest | target.mask, target)  # IoU 3/4 with the rest, 1/4 with the target
    assert not accuracy.is_reversed(target.mask, target)
    assert not accuracy.is_reversed(np.zeros((50, 50), bool), target)
    (row,) = accuracy.baseline_rows(blank(50, 50, [target]))
    rows = [row | {"reversed": {"filled_box": flag}, "area": area} for flag, area in ((True, 0.001), (False, 0.5))]
    found = accuracy.summaries(rows)["filled_box"]
    assert (found["reversed"], found["reversed_from_1_percent"]) == (0.5, 0)


def test_grabcut():
    rng = np.random.default_rng(0)
    disc = accuracy.ellipse_mask((90, 120), (40, 20, 90, 70))
    image = np.where(disc[..., None], [180, 60, 40], [60, 90, 160]) + rng.integers(-20, 20, (90, 120, 3))
    target = Target.of(disc, box=(32, 12, 98, 78))
    (row,) = accuracy.baseline_rows(Photograph(image.astype(np.uint8), [target]), grabcut=True)
    assert row["scores"]["grabcut"][0] > 0.98 > 0.5 > row["scores"]["filled_box"][0]
    assert row["reversed"] == {"grabcut": False}
    whole = accuracy.grabcut_mask(image.astype(np.uint8), (-5, 0, 120, 90))
    assert whole.all()  # no pixel is left for the background's model


def test_spearman():
    assert accuracy.spearman(np.array([1, 2, 3, 4]), np.array([9, 5, 1, 0])) == pytest.approx(-1)
    assert accuracy.spearman(np.array([1, 2, 3, 4, 5]), np.array([2, 1, 4, 3, 5])) == pytest.approx(0.8)
    assert accuracy.spearman(np.array([1, 1, 2]), np.array([1, 2, 3])) == pytest.approx(3**0.5 / 2)  # a tie
    assert accuracy.spearman(np.array([1, 1]), np.array([1, 2])) is None


class Rectangles:
    """Stand-in for a model. A box prompt fills itself; the first click draws nothing, or squares of 10, 20, 30 pixels.

    `calls` records the clicks, labels and mask prompts it received and the logits it returned.
    """

    config = SimpleNamespace(image_size=256)
    device = torch.device("cpu")
    dtype = torch.float32
    PREDICTED = (0.5, 0.1, 0.2, 0.9)

    def __init__(self):
        self.encoded = 0
        self.calls = []

    def encode_image(self, pixels):
        assert pixels.shape == (1, 3, 256, 256)
        self.encoded += 1

    def decode_all(self, embedding, boxes=None, point_coords=None, point_labels=None, mask_input=None):
        if point_coords is not None:
            assert (point_labels[:, 0] == 1).all()
            center = point_coords[:, 0] + 0.5
            boxes = torch.stack([torch.cat([center - r, center + r], 1) for r in (0, 5, 10, 15)], dim=1)
        else:
            boxes = boxes[:, None]
        x1, y1, x2, y2 = boxes[..., None, None].unbind(2)
        at = 4 * torch.arange(64) + 2  # centers of the low-resolution pixels
        inside = (at >= x1) & (at < x2) & (at[:, None] >= y1) & (at[:, None] < y2)
        low_res_masks = inside.float() - 0.5
        if point_coords is not None:
            self.calls.append((point_coords, point_labels, mask_input, low_res_masks))
        return low_res_masks, torch.tensor(self.PREDICTED[: boxes.shape[1]]).expand(len(boxes), -1)


def squares(side: int) -> Photograph:
    """A wide image, 128 x 64: half the model input."""
    label_map = np.zeros((64, 128), dtype=np.uint8)
    for label, (x, y) in enumerate([(8, 8), (40, 16), (92, 36)], 1):
        label_map[y : y + side, x : x + side] = label
    return blank(64, 128, datasets.targets(label_map))


def test_prompts_reach_the_input_frame_and_masks_return():
    box = scores(Rectangles(), squares(12))["box"]
    assert box["targets"] == 3 and box["mean_iou"] > 0.97 and box["mean_boundary_iou"] > 0.9
    assert box["score_spearman"] is None
    assert accuracy.model_rows(Rectangles(), blank(9, 9)) == []


def test_choices_among_three_masks():
    found = scores(Rectangles(), squares(10))  # 20 pixels in the input frame: the second of the three squares
    assert "box_oracle" not in found
    assert found["point"]["mean_iou"] == 0
    assert found["point_oracle"]["mean_iou"] > 0.6
    assert found["point_best_score"]["mean_iou"] == pytest.approx(4 / 9, abs=0.1)


def test_clicks_correct_the_mask_that_a_user_sees():
    model, photograph = Rectangles(), squares(12)  # 24 pixels in the input frame
    photograph.targets[1:] = []
    (row,) = accuracy.model_rows(model, photograph)
    assert model.encoded == 1
    assert list(row["scores"]) == [
        f"{prompt}{choice}"
        for prompt in accuracy.PROMPTS
        for choice in accuracy.CHOICES
        if prompt != "box" or not choice  # this model has a single mask for a box
    ]
    prompts, labels, mask_inputs, returned = zip(*model.calls, strict=True)
    # the last of the first three masks has the highest predicted IoU and spills over; later single masks are empty
    assert labels[-1].tolist() == [[1, 0, 1, 1, 1]]
    assert mask_inputs[0] is None
    assert torch.equal(mask_inputs[1], returned[0][:, 3:])
    for count in (2, 3, 4):
        assert torch.equal(mask_inputs[count], returned[count - 1][:, :1])
        assert torch.equal(prompts[count][:, :count], prompts[count - 1])
    in_image = (prompts[4][0] / 2).long().tolist()
    assert row["clicks"] == [(x, y, label) for (x, y), label in zip(in_image, labels[4][0].tolist(), strict=True)]
    (x, y), spill = photograph.targets[0].point, row["clicks"][1]
    assert not photograph.targets[0].mask[spill[1], spill[0]]
    assert row["clicks"][2] == (x, y, 1)


def test_zoom_measures_the_predictor():
    """Boxes of small targets are answered in windows; single masks and three masks agree with `Predictor.predict`."""
    image = np.random.default_rng(0).integers(0, 255, (64, 128, 3), np.uint8)
    photograph = squares(12)._replace(image=image)
    model = small_model()
    found = list(accuracy.answers(model, photograph, clicks=[1, 3], zoom="auto"))
    assert [(answer.prompt, answer.first) for answer in found] == [
        (prompt, i) for i in range(3) for prompt in ("box", "point", "clicks_3")
    ]
    predictor = accuracy.Predictor(model)
    predictor.set_image(image)
    for answer in found[::3]:
        box = photograph.targets[answer.first].box
        one, three = (predictor.predict(box=box, multimask_output=kind, zoom="auto") for kind in (False, True))
        assert np.array_equal(answer.masks[0], np.concatenate([one.masks, three.masks]))
        np.testing.assert_allclose(answer.predicted[0], np.concatenate([one.scores, three.scores]))
        assert not np.array_equal(one.masks, predictor.predict(box=box, multimask_output=False).masks)


def test_no_click_is_added_to_a_perfect_mask():
    class Halves(Rectangles):
        def decode_all(self, embedding, boxes=None, point_coords=None, point_labels=None, mask_input=None):
            given = boxes if boxes is not None else point_coords[:, 0]
            left = (given[:, 0] < 100)[:, None, None, None]
            low_res_masks = torch.where(left == (torch.arange(64) < 32), 1.0, -1.0).expand(-1, 1, 64, 64)
            self.calls.append(point_labels)
            return low_res_masks, torch.full((len(given), 1), 0.9)

    model = Halves()
    label_map = np.repeat(np.repeat(np.array([[1, 2]], np.uint8), 64, 1), 64, 0)
    rows = accuracy.model_rows(model, blank(64, 128, datasets.targets(label_map)))
    assert [row["scores"]["clicks_5"][:2] for row in rows] == [[1, 1], [1, 1]]
    assert model.calls[-1].tolist() == [[1, -1, -1, -1, -1]] * 2


@pytest.mark.parametrize(("prompts", "pixels"), [(2, 2**24), (16, 2 * 64 * 128), (16, 1)])
def test_chunks_do_not_change_the_rows(monkeypatch, prompts, pixels):
    together = accuracy.model_rows(Rectangles(), squares(12))
    monkeypatch.setattr(accuracy, "PROMPTS_AT_ONCE", prompts)
    monkeypatch.setattr(accuracy, "PIXELS_AT_ONCE", pixels)
    model = Rectangles()
    assert accuracy.model_rows(model, squares(12)) == together
    assert max(len(call[0]) for call in model.calls) == min(prompts, max(1, pixels // (64 * 128)))


def write_folder(folder, names=("b", "a")):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 128, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.jpg")
        label_map = np.zeros((64, 128), dtype=np.uint16)
        label_map[10:30, 20 + number : 60] = 999
        Image.fromarray(label_map).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def main(monkeypatch):
    """Run the command with a small model in place of the bundled one; return the names of the images it reads."""
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
    main(write_folder(tmp_path / "data"), "--out", out, "--limit", 1, "--grabcut", *flags)
    printed = capsys.readouterr()
    assert "filled box" in printed.out
    assert printed.err == ""  # no progress bar in a pipe
    report = json.loads(out.read_text())
    assert report["targets"] == 1
    assert list(report["scores"]) == list(accuracy.TITLES)[: 3 if flags else None]
    assert "GrabCut" in printed.out
    assert report["scores"]["filled_box"]["mean_iou"] == report["scores"]["filled_box"]["mean_boundary_iou"] == 1
    assert report["machine"]["cpu"]
    if not flags:
        assert (report["image_size"], report["dtype"], report["model"]) == (128, "float32", "bundled")


def test_interrupted_run_resumes(tmp_path, capsys, main, monkeypatch):
    def scores_of(name):
        return json.loads((tmp_path / name).read_text())["scores"]

    data = write_folder(tmp_path / "data", names="abcd")
    main(data, "--out", tmp_path / "whole.json")
    measure = accuracy.model_rows
    with monkeypatch.context() as patch:

        def stop(*args, **options):
            if len(main.read) == 3:
                raise KeyboardInterrupt
            return measure(*args, **options)

        patch.setattr(accuracy, "model_rows", stop)
        with pytest.raises(KeyboardInterrupt):
            main(data, "--out", tmp_path / "parts.json")
    rows = tmp_path / "parts.rows.jsonl"
    with rows.open("a") as file:
        file.write('{"image": "c.jpg", "seco')  # killed while it wrote
    capsys.readouterr()
    assert main(data, "--out", tmp_path / "parts.json") == ["c.jpg", "d.jpg"]
    assert "2 of 4 images are in" in capsys.readouterr().out
    assert scores_of("parts.json") == scores_of("whole.json")
    assert main(data, "--out", tmp_path / "parts.json", "--limit", 2) == []
    assert scores_of("parts.json")["box"]["targets"] == 2
    rows.write_text("{}\n")
    with pytest.raises(SystemExit):
        main(data, "--out", tmp_path / "parts.json")
    assert "is damaged ('fingerprint'); delete it" in capsys.readouterr().err


@pytest.mark.parametrize("changed", ["model", "image_size", "data", "code", "zoom"])
def test_rows_of_another_run_are_refused(tmp_path, capsys, main, monkeypatch, changed):
    data = write_folder(tmp_path / "data")
    main(data, "--out", tmp_path / "x.json", "--limit", 1)
    flags = []
    if changed == "model":
        other = small_model()
        torch.nn.init.zeros_(other.mask_decoder.iou_token)
        monkeypatch.setattr(accuracy.RWKVSAM, "from_pretrained", lambda source, device: other)
    elif changed == "image_size":
        flags = ["--image-size", 64]
    elif changed == "zoom":
        flags = ["--zoom", "auto"]
    elif changed == "code":
        files = accuracy.source_files()
        assert {"cli.py", "backbone.py", "frame.py", "bi_wkv.py", "default.json"} <= {file.name for file in files}
        monkeypatch.setattr(accuracy, "source_files", lambda: files[1:])
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
    cells, draw = [], accuracy.draw_sheet
    monkeypatch.setattr(accuracy, "draw_sheet", lambda found, columns: (cells.extend(found), draw(found, columns))[1])
    sheet = tmp_path / "sheets" / "x.png"
    main(write_folder(tmp_path / "data", names="abc"), "--sheet", sheet, "--out", tmp_path / "x.json")
    with Image.open(sheet) as image:
        assert image.size == (3 * (608 + 8) + 8, 4 * (150 + 14 + 8) + 8)
    assert len(cells) == 12
    report = [json.loads(line) for line in (tmp_path / "x.rows.jsonl").read_text().splitlines()[1:]]
    ranked = sorted(line["rows"][0]["scores"]["clicks_3"][0] for line in report)
    for cell, which, iou in zip(cells[6:9], ("best", "median", "worst"), reversed(ranked), strict=True):
        assert cell.caption.startswith(f"model, 3 clicks: {which}, IoU {iou:.3f}")
        assert accuracy.mask_iou(cell.mask, cell.truth) == pytest.approx(iou, abs=1e-3)
        assert len(cell.points) == 3 and not cell.boxes
    assert [len(cell.boxes) for cell in cells] == [1] * 3 + [0] * 9
    assert "best of 3 by score" in cells[3].caption


def test_annotation_file(tmp_path, capsys, main):
    pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed; pip install '.[test]'")
    data = write_folder(tmp_path / "data", names="a")
    images = [{"id": 1, "file_name": "a.jpg", "height": 64, "width": 128}]
    shapes = [{"id": 1, "image_id": 1, "bbox": [4, 4, 8, 8], "segmentation": [[4, 4, 12, 4, 12, 12, 4, 12]]}] * 2
    (tmp_path / "instances.json").write_text(json.dumps({"images": images, "annotations": shapes}))
    main(data, "--annotations", tmp_path / "instances.json", "--out", tmp_path / "x.json")
    report = json.loads((tmp_path / "x.json").read_text())
    assert (report["annotations"], report["targets"]) == ("instances.json", 2)
    assert report["scores"]["filled_box"]["mean_iou"] == 1
    assert report["scores"]["box"]["by_area"]["0-1%"]["targets"] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--seed", "1"], "--seed draws the images that --limit takes"),
        (["--zoom", "auto", "--image-size", "64"], "--zoom takes the model's own image size"),
        (["--sheet", "x.png", "--baselines-only"], "--sheet shows a model's masks"),
        (["--annotations", "nowhere.json"], "No such file or directory: 'nowhere.json'"),
        ([], datasets.LAYOUT),
    ],
)
def test_command_line_errors(tmp_path, capsys, main, flags, message):
    with pytest.raises(SystemExit):
        main(tmp_path, *flags)
    assert message in " ".join(capsys.readouterr().err.split())


def test_unusable_labels_are_named(tmp_path, capsys, main):
    data = write_folder(tmp_path)
    Image.new("L", (5, 5)).save(data / "b.png")
    Image.new("L", (128, 64)).save(data / "a.png")
    with pytest.raises(SystemExit):
        main(data, "--baselines-only")
    assert "b.png' is (5, 5), its image (64, 128)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(data, "--baselines-only", "--limit", 1)
    assert "no target in the 1 images" in capsys.readouterr().err
