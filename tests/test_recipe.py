"""The recipe for the default weights: its pictures and samples, and that a run can be stopped, resumed and exported."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastsam_rwkv import RWKVSAM

RECIPE = Path(__file__).parents[1] / "recipes" / "synthetic_shapes"
sys.path.insert(0, str(RECIPE))

from data import MAX_AREA, MIN_AREA, Scenes, render_all  # noqa: E402
from scenes import render_scene, target_masks  # noqa: E402


@pytest.mark.parametrize("seed", range(6))
def test_scenes_are_determined_by_their_seed(seed):
    a, b = (render_scene(np.random.default_rng([9, seed]), 128) for _ in range(2))
    assert np.array_equal(a.image, b.image) and np.array_equal(a.layers, b.layers) and a.targets == b.targets
    assert a.image.shape == (128, 128, 3) and a.image.dtype == np.uint8 and a.layers.shape == (128, 128)
    assert a.image.std() > 1
    known = {part for target in a.targets for part in target}
    assert set(np.unique(a.layers)) <= known | {0}  # 0: a plain background is no target


def test_targets_have_areas_in_range_and_vary():
    masks = [target_masks(render_scene(np.random.default_rng([9, i]), 128), 0.005, 0.7) for i in range(12)]
    areas = np.concatenate([m.mean((1, 2)) for m in masks])
    assert areas.min() >= 0.005 and areas.max() <= 0.7
    assert len(areas) > 60 and (areas > 0.1).mean() > 0.1 and (areas < 0.05).mean() > 0.2


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    render_all(folder / "scenes", count=6, size=96, seed=1, workers=1)
    return folder


def test_samples_hold_what_they_say(rendered):
    scenes = Scenes(rendered / "scenes", crop=64, prompts=5, seed=3)
    kinds = set()
    for number in range(30):
        sample, again = scenes[number], scenes[number]
        assert np.array_equal(sample.image, again.image) and np.array_equal(sample.masks, again.masks)
        assert sample.image.shape == (64, 64, 3) and sample.masks.shape == (5, 64, 64)
        areas = sample.masks.mean((1, 2))
        assert areas.min() >= MIN_AREA and areas.max() <= MAX_AREA
        kinds.add((sample.boxes is not None, sample.points is not None))
        if sample.boxes is not None:
            for (x1, y1, x2, y2), mask in zip(sample.boxes, sample.masks, strict=True):
                rows, columns = np.nonzero(mask)
                slack = 0.11 * max(x2 - x1, y2 - y1) + 1
                assert abs(x1 - columns.min()) <= slack and abs(x2 - columns.max() - 1) <= slack
                assert abs(y1 - rows.min()) <= slack and abs(y2 - rows.max() - 1) <= slack
        if sample.points is not None:
            for points, labels, mask in zip(sample.points.astype(int), sample.labels, sample.masks, strict=True):
                assert labels[0] == 1
                assert [int(mask[y, x]) for x, y in points] == labels.tolist()
    assert kinds == {(True, False), (False, True), (True, True)}


def test_a_run_resumes_where_it_stopped_and_exports(rendered):
    def train(*arguments):
        command = [sys.executable, str(RECIPE / "train.py"), "--run", str(rendered), *arguments]
        subprocess.run(command, check=True, capture_output=True, timeout=300)

    shape = ["--image-size", "64", "--batch", "2", "--prompts", "2"]
    train(*shape, "--images", "4")
    train(*shape, "--images", "8", "--resume")
    starts = [json.loads(line)["start"] for line in (rendered / "log.jsonl").read_text().splitlines()]
    assert starts == [0, 4]
    train(*shape, "--export", str(rendered / "model"))
    model = RWKVSAM.from_pretrained(rendered / "model")
    assert model.config.image_size == 64 and model.config.num_multimask_outputs == 3
