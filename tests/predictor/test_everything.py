"""`fastsam-rwkv everything`: outputs, resuming, and images that cannot be read."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO

from fastsam_rwkv.cli import main

FEW = ["--points-per-side", "3", "--pred-iou-thresh", "0.2", "--stability-score-thresh", "0.3"]


@pytest.fixture
def photos(request, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    coffee = Image.open(request.config.rootpath / "examples" / "coffee.jpg")
    for i in range(3):
        coffee.crop((100 * i, 0, 100 * i + 300, 300)).save(folder / f"{i}.jpg")
    return folder


def test_coco_files_load_and_round_trip(photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["everything", str(photos), "--output", str(out), *FEW]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in printed] == [str(photos / f"{i}.jpg") for i in range(3)]
    merged = COCO(out / "annotations.json")
    assert sorted(merged.getImgIds()) == [1, 2, 3] and len(merged.getAnnIds()) == sum(row["masks"] for row in printed)
    for annotation in merged.loadAnns(merged.getAnnIds()):
        mask = merged.annToMask(annotation)
        assert mask.shape == (300, 300) and mask.sum() == annotation["area"]
        assert coco.toBbox(annotation["segmentation"]).tolist() == annotation["bbox"]
    assert {file.name for file in out.iterdir()} == {"annotations.json", *(f"{i}.jpg.json" for i in range(3))}
    one = COCO(out / "1.jpg.json")
    assert len(one.getAnnIds()) == printed[1]["masks"] and one.imgs[1]["file_name"] == "1.jpg"


def test_a_second_run_skips_what_is_done(photos, tmp_path, capsys):
    out = tmp_path / "out"
    (photos / "1.jpg").rename(photos / "later.jpg")
    assert main(["everything", str(photos / "0.jpg"), "--output", str(out), *FEW]) == 0
    before = (out / "0.jpg.json").stat().st_mtime_ns
    capsys.readouterr()
    assert main(["everything", str(photos), "--output", str(out), *FEW]) == 0
    printed, noted = capsys.readouterr()
    assert len(printed.splitlines()) == 2 and "1 of 3 images are done already" in noted
    assert (out / "0.jpg.json").stat().st_mtime_ns == before
    assert main(["everything", str(photos), "--output", str(out), *FEW]) == 0
    assert capsys.readouterr().out == ""
    assert len(COCO(out / "annotations.json").getImgIds()) == 3


def test_bad_images_are_reported_and_the_others_done(photos, tmp_path, capsys):
    (photos / "1.jpg").write_bytes(b"no image")
    missing = str(photos / "missing.jpg")
    out = tmp_path / "out"
    assert main(["everything", str(photos), missing, "--output", str(out), *FEW]) == 1
    printed, noted = capsys.readouterr()
    assert [json.loads(line)["image"][-5:] for line in printed.splitlines()] == ["0.jpg", "2.jpg"]
    assert "2 of 4 images could not be segmented" in noted and "missing.jpg" in noted
    assert {file.name for file in out.iterdir()} == {"0.jpg.json", "2.jpg.json", "annotations.json"}
    merged = COCO(out / "annotations.json")
    assert [image["file_name"] for image in merged.imgs.values()] == ["0.jpg", "2.jpg"]


def test_no_file_is_written_if_no_image_can_be_read(tmp_path, capsys):
    (tmp_path / "0.jpg").write_bytes(b"no image")
    assert main(["everything", str(tmp_path / "0.jpg"), "--output", str(tmp_path / "out"), *FEW]) == 1
    assert "1 of 1 images could not be segmented" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_full_disk_is_named_and_leaves_no_file(photos, tmp_path, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    out = tmp_path / "out"
    assert main(["everything", str(photos), "--output", str(out), *FEW]) == 1
    assert f"cannot write '{out}/0.jpg.json': [Errno 28] No space left" in capsys.readouterr().err
    assert list(out.iterdir()) == []


def test_arrays_and_pictures(photos, tmp_path):
    for kind in ("npz", "png"):
        assert main(["everything", str(photos / "0.jpg"), "--output", str(tmp_path), "--format", kind, *FEW]) == 0
    arrays = np.load(tmp_path / "0.jpg.npz")
    masks = arrays["masks"]
    assert masks.dtype == bool and masks.shape[1:] == (300, 300) and masks.any((1, 2)).all()
    assert len(masks) == len(arrays["predicted_iou"]) == len(arrays["stability_score"]) == len(arrays["bbox"])
    painted, photo = (np.asarray(Image.open(file)).astype(int) for file in (tmp_path / "0.jpg.png", photos / "0.jpg"))
    changed = (painted != photo).any(-1)
    assert not changed[~masks.any(0)].any() and changed[masks.any(0)].mean() > 0.99


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["empty"], "holds no image"),
        (["photos", "copy/0.jpg"], "would both be written to"),
        (["photos", "--points-per-side", "0"], "--points-per-side must be at least 1, got 0"),
        (["photos", "--crop-n-layers", "-1"], "--crop-n-layers must be at least 0, got -1"),
    ],
)
def test_wrong_arguments(arguments, message, photos, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "copy").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["everything", *arguments, "--output", "out"]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused(photos, capsys):
    assert main(["everything", str(photos), "--output", str(photos / "0.jpg")]) == 2
    assert "0.jpg' is not a folder" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_run_loses_and_doubles_nothing(photos, tmp_path):
    for i in range(3, 9):
        (photos / f"{i}.jpg").write_bytes((photos / f"{i % 3}.jpg").read_bytes())
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fastsam_rwkv", "everything", str(photos), "--output", str(out), *FEW]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    process.stdout.readline()  # one image is done
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    process.stdout.close()
    done = {file.name: file.read_bytes() for file in out.glob("*.jpg.json")}
    assert 1 <= len(done) < 9 and all(json.loads(data)["images"] for data in done.values())
    time.sleep(0.01)
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert len(finished.stdout.splitlines()) == 9 - len(done)
    assert all((out / name).read_bytes() == data for name, data in done.items())
    assert {file.name for file in out.iterdir()} == {"annotations.json", *(f"{i}.jpg.json" for i in range(9))}
    assert len(COCO(out / "annotations.json").getImgIds()) == 9
