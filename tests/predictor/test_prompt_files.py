"""`fastsam-rwkv predict --prompts`: COCO files and lists, their outputs, and what cannot be used."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO
from small_model import small_model

from fastsam_rwkv import Predictor
from fastsam_rwkv.cli import main, tight_box

BOXES = {7: [[20, 30, 90, 80], [150, 100, 60, 70]], 9: [[40, 40, 120, 100]]}  # x, y, width, height


@pytest.fixture
def photos(request, tmp_path):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    coffee = Image.open(request.config.rootpath / "examples" / "coffee.jpg")
    coffee.crop((100, 50, 400, 350)).save(folder / "a.png")
    coffee.crop((300, 100, 560, 300)).save(folder / "more" / "a.png")
    return folder


@pytest.fixture
def annotations(photos):
    """COCO annotations with ids that do not count from 1, and an image without any."""
    names = {7: ("a.png", 300, 300), 9: ("more/a.png", 260, 200), 11: ("none.png", 5, 5)}
    data = {
        "images": [{"id": i, "file_name": n, "width": w, "height": h, "license": 3} for i, (n, w, h) in names.items()],
        "annotations": [
            {"id": 100 * image_id + i, "image_id": image_id, "category_id": 44 + i, "bbox": box}
            for image_id, boxes in BOXES.items()
            for i, box in enumerate(boxes)
        ],
        "categories": [{"id": 44, "name": "cup"}, {"id": 45, "name": "spoon"}],
    }
    file = photos / "instances.json"
    file.write_text(json.dumps(data))
    return file


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def run(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    options = ["--model", str(folder), "--dtype", "float32"]
    return lambda *arguments: main(["predict", *map(str, arguments), *options])


def test_coco_boxes_give_a_coco_file(run, model, photos, annotations, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--prompts", annotations, "--output", out) == 0
    printed, noted = capsys.readouterr()
    assert [(row["image"], row["masks"]) for row in map(json.loads, printed.splitlines())] == [
        ("a.png", 2),
        ("more/a.png", 1),
    ]
    assert "1 of 3 images have no box" in noted
    merged = COCO(out / "annotations.json")
    assert merged.imgs[9]["license"] == 3 and [c["name"] for c in merged.cats.values()] == ["cup", "spoon"]
    for image_id, boxes in BOXES.items():
        corners = [[x, y, x + w, y + h] for x, y, w, h in boxes]
        masks, scores, _ = Predictor(model).predict_image(photos / merged.imgs[image_id]["file_name"], box=corners)
        found = merged.loadAnns(merged.getAnnIds(image_id))
        for i, (annotation, mask, score) in enumerate(zip(found, masks[:, 0], scores[:, 0], strict=True)):
            assert annotation["prompt_id"] == 100 * image_id + i and annotation["category_id"] == 44 + i
            decoded = merged.annToMask(annotation).astype(bool)
            assert np.array_equal(decoded, mask) and annotation["area"] == decoded.sum()
            assert abs(annotation["score"] - score) < 1e-5
            assert coco.toBbox(annotation["segmentation"]).tolist() == annotation["bbox"]
    assert {str(file.relative_to(out)) for file in out.rglob("*.json")} == {
        "annotations.json", "a.png.json", "more/a.png.json"
    }  # fmt: skip
    assert merged.loadRes([a for a in merged.anns.values()]).getImgIds() == [7, 9, 9][::2]


def test_a_second_run_answers_what_is_missing(run, annotations, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--prompts", annotations, "--output", out) == 0
    before = json.loads((out / "annotations.json").read_text())
    (out / "a.png.json").unlink()
    capsys.readouterr()
    assert run("--prompts", annotations, "--output", out) == 0
    printed, noted = capsys.readouterr()
    assert len(printed.splitlines()) == 1 and "1 of 2 images are done already" in noted
    assert json.loads((out / "annotations.json").read_text()) == before


def test_a_list_of_prompts(run, model, photos, tmp_path, capsys):
    entries = [
        {"image": "a.png", "point_coords": [[60, 70], [200, 130]], "point_labels": [1, 0]},
        {"image": str(photos / "more" / "a.png"), "box": [[40, 40, 160, 140], [5, 5, 60, 50]]},
    ]
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(entries))
    assert run(photos, "--prompts", file, "--output", tmp_path / "coco") == 2  # an absolute path keeps its name only
    assert "would both be written to" in capsys.readouterr().err
    (photos / "more" / "a.png").rename(photos / "b.png")
    entries[1]["image"] = str(photos / "b.png")
    file.write_text(json.dumps(entries))
    for kind in ("coco", "npz", "png"):
        options = ["--format", kind, "--multimask", "--zoom", "never"]
        assert run(photos, "--prompts", file, "--output", tmp_path / kind, *options) == 0
    boxed = Predictor(model).predict_image(photos / "b.png", box=entries[1]["box"], multimask_output=True, zoom="never")
    arrays = np.load(tmp_path / "npz" / "b.png.npz")
    assert np.array_equal(arrays["masks"], boxed.masks) and arrays["prompt_id"].tolist() == ["0", "1"]
    np.testing.assert_allclose(arrays["scores"], boxed.scores, atol=1e-5)
    found = json.loads((tmp_path / "coco" / "b.png.json").read_text())["annotations"]
    assert [(a["prompt_id"], a["mask"]) for a in found] == [(i, k) for i in range(2) for k in range(3)]
    for annotation, mask in zip(found, boxed.masks.reshape(6, 200, 260), strict=True):
        assert np.array_equal(coco.decode(annotation["segmentation"]), mask)
        x1, y1, x2, y2 = tight_box(mask) or (0, 0, 0, 0)
        assert annotation["bbox"] == [x1, y1, x2 - x1, y2 - y1]
    assert len(json.loads((tmp_path / "coco" / "a.png.json").read_text())["annotations"]) == 3
    assert Image.open(tmp_path / "png" / "b.png.png").size == (260, 200)


def test_what_cannot_be_used_is_named_and_the_rest_is_done(run, photos, annotations, tmp_path, capsys):
    data = json.loads(annotations.read_text())
    data["annotations"] += [
        {"id": 1, "image_id": 7, "bbox": [5, 5, 0, 9]},
        {"id": 2, "image_id": 9, "bbox": "left"},
        {"id": 3, "image_id": 11, "bbox": [1, 1, 2, 2]},
        {"id": 4, "image_id": 13, "bbox": [1, 1, 2, 2]},
        {"id": 5, "image_id": 15, "bbox": [900, 900, 2, 2]},
    ]
    data["images"] += [
        {"id": 13, "file_name": "turned.png", "width": 200, "height": 300},
        {"id": 15, "file_name": "outside.png"},
    ]
    (photos / "turned.png").write_bytes((photos / "a.png").read_bytes())
    (photos / "outside.png").write_bytes((photos / "a.png").read_bytes())
    annotations.write_text(json.dumps(data))
    out = tmp_path / "out"
    assert run("--prompts", annotations, "--output", out) == 1
    printed, noted = capsys.readouterr()
    assert len(printed.splitlines()) == 2
    for message in (
        "annotation 1 has an empty bbox, [5, 5, 0, 9]",
        "annotation 2 has no bbox [x, y, width, height], but 'left'",
        "no image file at",
        "turned.png: the image has 300x300 pixels once it is upright, and its prompts are for 200x300",
        "outside.png: box [900.0, 900.0, 902.0, 902.0] lies outside",
        "3 of 5 images could not be segmented: none.png, turned.png, outside.png",
    ):
        assert message in noted
    assert len(COCO(out / "annotations.json").anns) == 3


def test_names_cannot_leave_the_folder_of_outputs(run, photos, tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps([{"image": "more/../a.png", "box": [20, 30, 110, 110]}]))
    out = tmp_path / "deep" / "out"
    assert run(photos, "--prompts", file, "--output", out) == 0
    assert (out / "a.png.json").exists()
    assert {f.name for f in tmp_path.rglob("*.json")} == {"prompts.json", "a.png.json", "annotations.json"}


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("3", "holds neither an object nor a list"),
        ("[]", "it names no image"),
        ('[{"file": "a.jpg"}]', "entry 0 names no image"),
        ('[{"image": "a.jpg"}, {"image": "a.jpg"}]', "image 'a.jpg' is there twice"),
        ("{}", "'images' is not a list"),
        ('{"images": [], "annotations": 3}', "'annotations' is not a list"),
        ('{"images": [{"id": 1}], "annotations": []}', "image 1 has no file_name"),
        ('{"images": [3], "annotations": []}', "an image has no id: 3"),
        ('{"images": [], "annotations": [{"image_id": 4}]}', "an annotation is of image 4, which is not there"),
    ],
)
def test_files_without_prompts(run, content, message, tmp_path, capsys):
    file = tmp_path / "prompts.json"
    file.write_text(content)
    assert run("--prompts", file, "--output", tmp_path / "out") == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ([], 2, "give an IMAGE, or --prompts FILE.json for many"),
        ([".", "--box", "1,2,3,4"], 1, "'.' is a folder; give an image, or --prompts FILE.json"),
        (["a.jpg", "--box", "1,2,3,4", "--output", "out"], 2, "--output goes with --prompts"),
        (["--prompts", "p.json"], 2, "--prompts needs --output DIR"),
        (["--prompts", "p.json", "--output", "out", "--point", "1,2"], 2, "--point does not go with --prompts"),
        (["--prompts", "p.json", "--output", "out", "--value-range", "auto"], 2, "--value-range does not go"),
        (["--prompts", "missing.json", "--output", "out"], 1, "cannot read prompts from 'missing.json': No such file"),
        (["p.json", "--prompts", "p.json", "--output", "out"], 2, "'p.json' is not a folder"),
        (["--prompts", "p.json", "--output", "p.json"], 2, "--output 'p.json' is not a folder"),
    ],
)
def test_wrong_arguments(run, arguments, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.json").write_text('[{"image": "a.jpg", "box": [1, 2, 30, 40]}]')
    assert run(*arguments) == code
    assert message in capsys.readouterr().err
