"""Tests of the training recipe: samples, losses, and runs that learn, resume, share work and export."""

import io
import itertools
import json
import os
import socket
import subprocess
import sys
import tarfile
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from fastsam_rwkv import RWKVSAM
from fastsam_rwkv.modeling.pixels import normalize
from fastsam_rwkv.triton_kernels import prompt_tokens

RECIPE = Path(__file__).parents[2] / "recipes" / "synthetic_shapes"
sys.path.insert(0, str(RECIPE))

from data import (  # noqa: E402  # recipes are no package
    ABSENT,
    BOX,
    CLICK,
    FILLED,
    KINDS,
    MAX_AREA,
    MIN_PIXELS,
    NOT_A_POINT,
    PADDING,
    STUFF_BOX,
    Candidate,
    Scenes,
    _candidates,
    _choose,
    _crop,
    layers_of,
    render_all,
)
from rounds import Prompts, answers, batch_loss, best_by_score, corrections, depth, losses, prompt_loss  # noqa: E402  # recipes are no package
from train import Working, compact, initial_model, labeled_images, main, prepared  # noqa: E402  # recipes are no package

SIZE = (64, 64)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    render_all(folder / "scenes", count=8, size=96, seed=1, workers=1)
    return folder


@pytest.fixture(scope="module")
def scenes(rendered):
    return Scenes(rendered / "scenes", prompts=5, seed=3)


def test_samples_are_consistent_with_their_prompts(scenes):
    kinds = set()
    for number in range(30):
        sample, again = scenes.sample(number, SIZE), scenes.sample(number, SIZE)
        assert np.array_equal(sample.image, again.image) and np.array_equal(sample.coords, again.coords)
        assert sample.image.shape == (64, 64, 3) and sample.masks.shape == (5, 64, 64)
        assert sample.masks.sum((1, 2)).min() >= MIN_PIXELS and sample.masks.mean((1, 2)).max() <= MAX_AREA
        for mask, coords, labels in zip(sample.masks, sample.coords, sample.labels, strict=True):
            used = labels != ABSENT
            assert used.any() and not used[np.argmin(used) :].any() or used.all()  # what is absent comes last
            coords, labels = coords[used], labels[used]
            end = 2 if 2 in labels else 1
            assert labels[-end:].tolist() == ([2, 3] if end == 2 else [NOT_A_POINT])
            points = coords[:-end].astype(int)
            assert [int(mask[y, x]) for x, y in points] == labels[:-end].tolist()
            assert end == 2 or labels[0] == 1
            kinds.add((end == 2, len(points)))
            if end == 2:
                (x1, y1), (x2, y2) = coords[-2:]
                rows, columns = np.nonzero(mask)
                slack = 0.11 * max(x2 - x1, y2 - y1) + 1
                assert abs(x1 - columns.min()) <= slack and abs(x2 - columns.max() - 1) <= slack
                assert abs(y1 - rows.min()) <= slack and abs(y2 - rows.max() - 1) <= slack
    assert {(True, 0), (True, 1), (False, 1), (False, 2), (False, 3)} <= kinds


SHOWN = [
    Candidate((i,), area, stuff, is_object and not stuff, whole, 0.7 if area > 0.01 else 0.3)
    for i, (area, stuff, is_object, whole) in enumerate(
        itertools.product((0.004, 0.05, 0.3), (False, True), (False, True), (False, True))
    )
]


def test_few_boxes_are_on_stuff_and_most_prompted_things_are_whole():
    rng = np.random.default_rng(0)
    chosen = [pair for _ in range(300) for pair in _choose(rng, SHOWN, 8)]
    boxed = [c for c, box in chosen if box and not c.stuff]
    clicked = [c for c, box in chosen if not box and not c.stuff]
    boxed_stuff = [c for c, box in chosen if box and c.stuff]
    assert abs(len(boxed_stuff) / len(chosen) - KINDS[STUFF_BOX]) < 0.02
    assert all(c.filled >= FILLED for c in boxed_stuff)
    assert abs(len(boxed) / len(chosen) - KINDS[BOX]) < 0.05
    assert abs(len(clicked) / len(chosen) - KINDS[CLICK]) < 0.05
    assert 0.6 < np.mean([c.whole for c in boxed + clicked]) < 0.85
    assert 0.55 < np.mean([c.object for c in boxed + clicked]) < 0.9
    assert 0.3 < np.mean([c.area < 0.01 for c in clicked]) < 0.55


def test_windows_without_things_or_without_stuff_are_prompted():
    rng = np.random.default_rng(0)
    stuff = [c for c in SHOWN if c.stuff]
    assert all(c.stuff and c.filled >= FILLED for c, box in _choose(rng, stuff, 40) if box)
    thin = [c for c in stuff if c.filled < FILLED]
    assert not any(box for _, box in _choose(rng, thin, 40))
    things = [c for c in SHOWN if not c.stuff]
    assert {box for _, box in _choose(rng, things, 40)} == {False, True}


def test_a_target_repeats_only_after_all_others():
    rng = np.random.default_rng(0)
    one_size = [Candidate((i,), 0.05, False, True, True, 0.7) for i in range(4)]
    taken = [c.parts for c, _ in _choose(rng, one_size, 8)]
    assert len(set(taken[:4])) == 4


def test_most_windows_hold_a_whole_thing():
    layers = np.zeros((128, 128), np.uint8)
    layers[40:70, 2:32] = 1  # at the scene's edge: random windows would mostly cut it
    scene = {"targets": [[0], [1]], "objects": [1], "stuff": [0]}
    image = np.zeros((128, 128, 3), np.uint8)
    whole = []
    for seed in range(100):
        _, visible = _crop(np.random.default_rng(seed), image, layers, scene, (64, 64))
        whole += [c.whole for c in _candidates(visible, scene) if not c.stuff]
    assert len(whole) > 80 and np.mean(whole) > 0.75


@pytest.mark.parametrize("size", [(64, 64), (32, 64)])
def test_zoomed_windows_enlarge_a_thing_in_their_middle(monkeypatch, size):
    monkeypatch.setattr("data.ZOOMED", 1)
    layers = np.zeros((128, 128), np.uint8)
    layers[60:76, 40:60] = 1  # 16 x 20
    layers[100:110, 100:110] = 2  # too small
    layers[:90, 90:] = 3  # at the frame
    scene = {"targets": [[0], [1], [2], [3]], "objects": [1, 2, 3], "stuff": [0]}
    sides = []
    for seed in range(40):
        _, visible = _crop(np.random.default_rng(seed), np.zeros((128, 128, 3), np.uint8), layers, scene, size)
        assert visible.shape == size
        rows, columns = np.nonzero(visible == 1)
        sides.append(np.ptp(columns) + 1)
        assert abs(rows.mean() - size[0] / 2) < 3 and abs(columns.mean() - 32) < 3
    assert 64 / 5 - 1 <= min(sides) < 16 and 22 < max(sides) <= 64 / 2.5 + 1
    layers[layers == 1] = 0
    for seed in range(40):  # no thing is left to zoom to: the small one is not enlarged
        _, visible = _crop(np.random.default_rng(seed), np.zeros((128, 128, 3), np.uint8), layers, scene, size)
        assert (visible == 2).any(0).sum() <= 11


def test_overlapping_masks_become_layers():
    a, b, c = np.zeros((3, 20, 20), bool)
    a[2:10, 2:10] = b[6:14, 6:14] = c[3:5, 3:5] = True
    layers, targets = layers_of([a, b, c, a], (20, 20))
    for mask, parts in zip((a, b, c, a), targets, strict=True):
        assert np.array_equal(np.isin(layers, parts), mask) and 0 not in parts
    assert len(np.unique(layers)) == 5
    dots = np.eye(400, dtype=bool).reshape(400, 20, 20)
    layers, targets = layers_of(dots, (20, 20))
    assert len(targets) == 255 and layers.max() == 255


def test_labeled_images_are_mixed_in(rendered, tmp_path):
    for name in "ab":
        labels = np.zeros((40, 60), np.uint8)
        labels[10:30, 20:40] = 1
        Image.fromarray(labels).save(tmp_path / f"{name}.png")
        Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(tmp_path / f"{name}.jpg")
    images = labeled_images(str(tmp_path))
    image, layers, scene = images[0]
    assert image.shape == (512, 768, 3) and layers.shape == (512, 768)
    assert scene["objects"] == [0] and len(images) == 2
    mixed = Scenes(rendered / "scenes", 2, 0, [images], 0.5)
    real = [(mixed.view(number, SIZE).image == 200).all() for number in range(40)]
    assert 10 < sum(real) < 30
    sample = mixed.sample(real.index(True), SIZE)
    assert sample.masks.any((1, 2)).all()


def test_clicks_on_stuff_may_lie_in_the_box_of_a_thing(scenes, monkeypatch):
    """The same place then has two answers: the thing by its box, what lies around it by the click."""
    inside = []
    for paired in (0.0, 1.0):
        monkeypatch.setattr("data.PAIRED", paired)
        found = []
        for number in range(60):
            view, sample = scenes.view(number, SIZE), scenes.sample(number, SIZE)
            boxes = [c[(m == 2) | (m == 3)] for c, m in zip(sample.coords, sample.labels, strict=True) if 2 in m]
            for (candidate, boxed), coords, mask in zip(view.chosen, sample.coords, sample.masks, strict=True):
                if candidate.stuff and not boxed and boxes:
                    (x, y), corners = coords[0], np.stack(boxes)
                    assert mask[int(y), int(x)]
                    found.append(((corners[:, 0] <= (x, y)) & ((x, y) < corners[:, 1])).all(1).any())
        inside.append(np.mean(found))
    assert inside[1] > inside[0] + 0.2


def test_candidates_are_large_enough_and_marked_as_whole_or_cut():
    layers = np.zeros((64, 64), np.uint8)
    layers[20:34, 20:34] = 1  # 196 pixels
    layers[:20, :20] = 2
    layers[50:60, 50:60] = 3
    scene = {"targets": [[0], [1], [2], [3], [1, 3], [1, 9], [0, 1, 2, 3]], "objects": [5], "stuff": [0]}
    found = {c.parts: c for c in _candidates(layers, scene)}
    assert set(found) == {(1,), (2,), (1, 3)}  # the ground is too large, part 3 too small; 9 is out of sight
    assert found[1,].whole and found[1, 3].whole and not found[2,].whole
    assert found[1,].object and not found[1, 3].object  # [1, 9], of which 9 is hidden, is the object
    assert found[2,].area == pytest.approx(400 / 4096) and found[2,].filled == 1
    assert found[1, 3].filled == pytest.approx((196 + 100) / 40**2)


def test_squares_are_padded_and_other_shapes_are_not(scenes):
    assert abs(normalize(torch.tensor(PADDING, dtype=torch.uint8))).max() < 0.01
    padded = 0
    for number in range(30):
        sample = scenes.sample(number, SIZE)
        blank = (sample.image == PADDING).all(-1)
        rows, columns = (64 - np.argmin(blank[::-1, 0]), 64 - np.argmin(blank[0, ::-1]))
        assert blank[rows:].all() and blank[:, columns:].all() and 64 in (rows, columns)
        assert min(rows, columns) in (64, *range(35, 55)) and not sample.masks[:, blank].any()
        assert sample.masks.sum((1, 2)).max() <= MAX_AREA * rows * columns
        padded += min(rows, columns) < 64
        for size in ((32, 64), (96, 64)):
            other = scenes.sample(number, size)
            assert other.image.shape == (*size, 3) and other.masks.shape == (5, *size)
            assert (other.image != PADDING).any(-1)[[0, -1]].any(1).all()
    assert 10 < padded < 30


def test_a_batch_is_its_samples(scenes):
    batch = scenes.batch(7, 3, SIZE)
    for i in range(3):
        assert np.array_equal(batch.image[i], scenes.sample(7 + i, SIZE).image)
        assert np.array_equal(batch.masks[i], scenes.sample(7 + i, SIZE).masks)
    pixels, prompts = prepared(compact(batch), torch.device("cpu"))
    assert pixels.shape == (3, 3, 64, 64) and pixels.dtype == torch.uint8
    assert prompts.image.tolist() == [0] * 5 + [1] * 5 + [2] * 5 and prompts.target.shape == (15, 32, 32)
    pooled = batch.masks[1, 1].reshape(32, 2, 32, 2).mean((1, 3))
    assert np.array_equal(prompts.target[6].numpy(), pooled.astype(np.float32))


def test_depth_is_largest_in_the_middle_and_zero_outside():
    region = torch.zeros(1, 32, 32, dtype=torch.bool)
    region[:, 4:20, 6:22] = True
    d = depth(region)[0]
    assert (d[~region[0]] == 0).all() and (d[region[0]] >= 1).all()
    y, x = divmod(int(d.argmax()), 32)
    assert 10 <= y <= 13 and 12 <= x <= 15
    thin = torch.zeros(1, 32, 32, dtype=torch.bool)
    thin[:, 5] = True
    assert (depth(thin)[0] > 0).equal(thin[0])


def test_corrective_clicks_lie_in_the_error_with_its_label():
    torch.manual_seed(0)
    truth, mask = torch.zeros(2, 60, 32, 32, dtype=torch.bool)
    truth[:30, 4:28, 4:14] = True  # missed, and a smaller spill
    mask[:30, 10:12, 20:22] = True
    mask[30:50, 2:20, 2:20] = True  # spilled alone
    places, labels = corrections(mask, truth)
    assert places.shape == (60, 1, 2) and labels.shape == (60, 1)
    x, y = places[:, 0].long().T
    wrong = (mask != truth)[torch.arange(60), y, x]
    assert wrong[:50].all() and labels[50:].eq(NOT_A_POINT).all()
    assert torch.equal(labels[:50, 0].bool(), truth[torch.arange(50), y[:50], x[:50]])
    centerd = ((x[:30] - 8.5).abs() <= 2) & ((y[:30] - 15.5).abs() <= 8)
    assert 12 <= centerd.sum() < 30  # two in three at the center of the larger error, the others anywhere


def test_losses_are_smallest_for_the_true_mask():
    target = torch.zeros(1, 8, 8)
    target[:, 2:6, 2:6] = 1
    right = (20 * (target - 0.5))[:, None]
    loss, iou = losses(torch.cat([right, -right, torch.full_like(right, 10.0)], 1), target)
    assert loss[0, 0] < 1e-3 and iou.tolist() == [[1.0, 0.0, 0.25]]
    assert loss[0, 0] < loss[0, 2] < loss[0, 1]


def test_the_best_mask_by_truth_and_the_best_by_score_count_most():
    target = torch.zeros(1, 8, 8)
    target[:, 2:6, 2:6] = 1
    logits = torch.stack([20 * (target - 0.5), 9 * (0.5 - target), 8 * (target - 0.5), torch.ones_like(target)], 1)
    logits.requires_grad_()
    predicted = torch.tensor([[0.1, 0.2, 0.3, 0.9]])  # of the three the second is best, the third has the best score
    prompt_loss(logits, predicted, target)[0].sum().backward()
    losses(again := logits.detach().requires_grad_(), target)[0].sum().backward()
    weights = [(a.norm() / b.norm()).item() for a, b in zip(logits.grad[0], again.grad[0], strict=True)]
    assert weights == pytest.approx([1, 0.1 / 3, 0.5 + 0.1 / 3, 0.5 + 0.1 / 3], rel=1e-3)


def test_the_score_loss_prefers_a_right_choice():
    target = torch.zeros(1, 8, 8)
    target[:, 2:6, 2:6] = 1
    one_more = target.clone()
    one_more[:, 2, 6] = 1
    logits = torch.stack([target, target, one_more, torch.ones_like(target)], 1) * 20 - 10
    found = losses(logits, target)[1]
    predicted = found.clone().requires_grad_()  # right already: what is left is the choice between the close ones
    prompt_loss(logits, predicted, target)[0].sum().backward()
    single, best, second, worst = predicted.grad[0].tolist()
    assert single == 0 and best < -0.05 and second > 0.05 and 0 <= worst < 0.05
    assert best + second + worst == pytest.approx(0, abs=1e-6)
    swapped = found[:, [0, 2, 1, 3]]
    assert (prompt_loss(logits, swapped, target)[0] > prompt_loss(logits, found, target)[0]).all()


def test_answers_are_scored_at_the_size_of_the_target():
    target = torch.zeros(2, 32, 32)
    target[:, 8:24, 8:24] = 1
    prompts = Prompts(torch.zeros(2, dtype=torch.long), torch.zeros(2, 2, 2), torch.tensor([[1, -1], [2, 3]]), target)

    def decode(embedding, image, coords, labels, mask_input):
        small = target[:, ::2, ::2]
        low = torch.stack([-small, small - 0.5, torch.ones_like(small), -torch.ones_like(small)], 1)
        return low, torch.tensor([0.9, 0.1, 0.8, 0.2]).expand(2, 4)

    found = answers(decode, None, prompts)
    assert prompts.boxed.tolist() == [False, True] and best_by_score(found.predicted).tolist() == [2, 2]
    assert found.logits.shape == (2, 4, 32, 32) and found.iou.tolist() == [[0, 1, 0.25, 0]] * 2


def test_prompts_of_a_batch_decode_as_single_prompts(scenes):
    model = initial_model("tiny", 64)
    pixels, prompts = prepared(compact(scenes.batch(0, 2, SIZE)), torch.device("cpu"))
    embedding = model.encode_image(pixels)
    low, quality = Working(model).decode(embedding, *prompts[:3], None)
    for k in range(len(prompts.image)):
        used = prompts.labels[k] >= 0
        box = prompts.coords[k][prompts.labels[k] >= 2].reshape(-1, 4)
        points = prompts.coords[k][used & (prompts.labels[k] < 2)][None]
        labels = prompts.labels[k][used & (prompts.labels[k] < 2)][None]
        given = {"point_coords": points, "point_labels": labels} if points.numel() else {}
        given |= {"boxes": box} if box.numel() else {}
        want_low, want_quality = model.decode_all(embedding[int(prompts.image[k])], **given)
        torch.testing.assert_close(low[k : k + 1], want_low, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(quality[k : k + 1], want_quality, atol=2e-5, rtol=1e-4)


def test_each_round_adds_a_click_and_the_last_mask():
    asked = []

    def decode(embedding, image, coords, labels, mask_input):
        asked.append((coords, labels, mask_input))
        low = torch.full((len(image), 4, 16, 16), -1.0)
        low[:, 3] = 1.0
        return low, torch.tensor([0.9, 0.1, 0.2, 0.8]).expand(len(image), 4)

    target = torch.zeros(4, 32, 32)
    target[:, 8:24, 8:24] = 1
    prompts = Prompts(torch.zeros(4, dtype=torch.long), torch.zeros(4, 2, 2), torch.tensor([[1, -1]] * 4), target)
    loss, iou = batch_loss(decode, None, prompts, rounds=2, share=0.5)
    assert torch.isfinite(loss) and iou.shape == (4, 4)
    assert [labels.shape for _, labels, _ in asked] == [(4, 2), (2, 3), (2, 4)]
    assert asked[0][2] is None
    assert (asked[1][2] == 1).all()  # first the best of the three by predicted quality, which filled everything:
    assert (asked[1][1][:, 0] == 0).all()  # a click on the background
    assert (asked[2][2] == -1).all() and (asked[2][1][:, 0] == 1).all()  # then the single mask, which was empty


def run(folder, *arguments, processes=1):
    """The script's output. One process is this one: starting Python and PyTorch takes longer than the steps."""
    fixed = ["--run", str(folder), "--prompts", "3", "--threads", "1"]
    if processes > 1:  # as `python -m torch.distributed.run` starts them, without its own process
        command = [sys.executable, str(RECIPE / "train.py"), *fixed, *arguments]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
        started = [
            subprocess.Popen(
                command, env={**os.environ, **shared, "RANK": str(rank)}, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True,
            )
            for rank in range(processes)
        ]  # fmt: skip
        try:
            told = [process.communicate(timeout=300) for process in started]
        finally:
            for process in started:
                process.kill()
        assert not any(process.returncode for process in started), told
        return told[0][0]
    threads = torch.get_num_threads()
    try:
        with patch.object(sys, "argv", ["train.py", *fixed, *arguments]), redirect_stdout(io.StringIO()) as told:
            main()
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
    return told.getvalue()


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def fresh(rendered, tmp_path):
    (tmp_path / "scenes").symlink_to(rendered / "scenes")
    return tmp_path


def test_thirty_steps_reduce_the_loss(fresh):
    run(fresh, "--mix", "64:4", "--images", "120", "--log-every", "10", "--lr", "2e-3", "--ema", "0.9")
    losses = [row["loss"] for row in rows(fresh)[1:]]
    assert len(losses) == 3 and losses[2] < 0.95 * losses[0], losses


def test_a_run_resumes_and_exports(fresh):
    shape = ["--mix", "64:2", "96x64:1", "--bf16"]
    run(fresh, *shape, "--images", "4")
    with pytest.raises(SystemExit, match="holds a run: .*--resume"):
        run(fresh, *shape, "--images", "8")
    assert torch.load(fresh / "state.pt")["images"] == 5  # steps of 2, 1 and 2
    run(fresh, *shape, "--images", "8", "--resume")
    assert [row["start"] for row in rows(fresh) if "start" in row] == [0, 5]
    run(fresh, "--export", str(fresh / "model"))
    model = RWKVSAM.from_pretrained(fresh / "model")
    assert model.config.image_size == 128 and model.config.num_multimask_outputs == 3


def test_a_resumed_run_takes_the_steps_of_an_uninterrupted_run(fresh, tmp_path_factory):
    straight = tmp_path_factory.mktemp("straight")
    (straight / "scenes").symlink_to(fresh / "scenes")
    shape = ["--mix", "64:2", "--rounds", "1", "--fall", "1e-9"]
    run(straight, *shape, "--images", "6")
    run(fresh, *shape, "--images", "2")
    run(fresh, *shape, "--images", "6", "--resume")
    got, want = (torch.load(folder / "state.pt", weights_only=True) for folder in (fresh, straight))
    assert got["images"] == want["images"] == 6 and got["step"] == want["step"] == 3
    for name, tensor in want["average"].items():
        assert torch.equal(got["average"][name], tensor) and torch.equal(got["model"][name], want["model"][name])
    moments = want["optimizer"]["state"]
    assert moments and all(
        torch.equal(got["optimizer"]["state"][i]["exp_avg"], m["exp_avg"]) for i, m in moments.items()
    )


def test_seeds_draw_different_samples_and_export_takes_the_mean_of_models(fresh):
    averages = []
    for seed in ("1", "2", "3"):
        run(fresh, "--mix", "64:1", "--images", "1", "--lr", "0.1", "--seed", seed)
        averages.append(torch.load(fresh / "state.pt")["average"])
        if seed != "3":
            run(fresh, "--export", str(fresh / seed))
            (fresh / "state.pt").unlink()
    run(fresh, "--export", str(fresh / "mean"), "--mean-with", str(fresh / "1"), str(fresh / "2"))
    mean = RWKVSAM.from_pretrained(fresh / "mean").state_dict()
    of_all, spread = (torch.cat([f([a[n] for a in averages]).flatten() for n in mean]) for f in (_mean, _spread))
    off = (torch.cat([t.flatten() for t in mean.values()]) - of_all).abs()
    assert (spread > 1e-4).float().mean() > 0.5  # samples differed
    assert (off <= 1e-3 * of_all.abs() + 1e-3 * spread + 1e-6).all()  # half precision, twice


def _mean(tensors):
    return torch.stack(tensors).mean(0)


def _spread(tensors):
    return torch.stack(tensors).amax(0) - torch.stack(tensors).amin(0)


def test_a_mean_without_an_export_raises(fresh, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(fresh, "--mean-with", str(fresh))
    assert "--mean-with is for --export" in capsys.readouterr().err


def test_accumulated_batches_make_the_step_of_one_large_batch(fresh, tmp_path_factory):
    at_once = tmp_path_factory.mktemp("at_once")
    (at_once / "scenes").symlink_to(fresh / "scenes")
    shape = ["--images", "8", "--rounds", "0", "--warm", "1", "--lr", "1e-4"]
    run(at_once, "--mix", "64:4", *shape)
    run(fresh, "--mix", "64:2", "--accumulate", "2", "--workers", "0", *shape)
    one, two = (torch.load(folder / "state.pt") for folder in (at_once, fresh))
    assert one["images"] == two["images"] == 8 and one["step"] == two["step"] == 2
    initial = initial_model("tiny", 64).state_dict()
    moved = torch.cat([(one["model"][k] - initial[k]).flatten() for k in initial])
    apart = torch.cat([(one["model"][k] - two["model"][k]).flatten() for k in initial])
    assert moved.norm() > 0 and apart.norm() < 0.1 * moved.norm(), (apart.norm() / moved.norm()).item()


def test_a_run_takes_scenes_of_several_folders(rendered):
    both = Scenes([rendered / "scenes", rendered / "scenes"], prompts=2, seed=0)
    assert len(both) == 2 * len(Scenes(rendered / "scenes", prompts=2, seed=0))


def test_two_processes_take_the_steps_of_one_with_double_batches(fresh, tmp_path_factory):
    alone = tmp_path_factory.mktemp("alone")
    (alone / "scenes").symlink_to(fresh / "scenes")
    shape = ["--images", "8", "--rounds", "0"]
    run(alone, "--mix", "64:4", *shape)
    run(fresh, "--mix", "64:2", *shape, processes=2)
    one, two = (torch.load(folder / "state.pt") for folder in (alone, fresh))
    assert one["images"] == two["images"] == 8
    initial = initial_model("tiny", 64).state_dict()
    moved = torch.cat([(one["model"][k] - initial[k]).flatten() for k in initial])
    apart = torch.cat([(one["model"][k] - two["model"][k]).flatten() for k in initial])
    assert moved.norm() > 0 and apart.norm() < 0.1 * moved.norm(), (apart.norm() / moved.norm()).item()


def test_render_draws_scenes_and_does_not_train(tmp_path):
    other = tmp_path / "other"
    run(tmp_path, "--render", "2", "--render-size", "64")
    run(other, "--render", "2", "--render-size", "64", "--seed", "7")
    assert len(Scenes(tmp_path / "scenes", prompts=1, seed=0)) == 2 and not (tmp_path / "log.jsonl").exists()
    first, second = (np.load(folder / "scenes" / "000000.images.npy") for folder in (tmp_path, other))
    assert first.shape == second.shape and not np.array_equal(first, second)
    run(tmp_path, "--render", "3", "--render-size", "64")
    assert len(Scenes(tmp_path / "scenes", prompts=1, seed=0)) == 3
    for different in (["--seed", "7", "--render-size", "64"], ["--render-size", "96"]):
        with pytest.raises(ValueError, match="scenes of another size, seed or version"):
            run(tmp_path, "--render", "3", *different)


def test_validation_reports_boxes_and_clicks_separately(rendered, tmp_path):
    RWKVSAM(initial_model("tiny", 64).config).save_pretrained(tmp_path / "model")
    told = run(
        tmp_path, "--init", str(tmp_path / "model"), "--validate", str(rendered), "--mix", "64:4", "--images", "8"
    )
    boxes, clicks = (json.loads(line) for line in told.splitlines())
    assert boxes["prompts"] == "box" and clicks["prompts"] == "clicks" and boxes["count"] + clicks["count"] == 24
    for row in (boxes, clicks):
        assert row["loss"] > 0 and 0 <= row["by_score"] <= row["by_truth"] <= 1 and 0 <= row["single"] <= 1


def test_a_wrong_mix_raises(fresh, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(fresh, "--mix", "250:4")
    assert "'250:4' is not SIZE:BATCH" in capsys.readouterr().err


def test_gpu_script_at_toy_size(tmp_path):
    """Renders, trains for ten seconds and exports, here on the CPU; the parts of the archive hold the model."""
    settings = {"MINUTES": "1", "DEVICE": "cpu", "SCENES": "2", "RENDER_SIZE": "96"}
    settings["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run([RECIPE / "gpu.sh", tmp_path], env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts = sorted(tmp_path.glob("model.tar.*"))
    assert len(parts) == 2 and max(part.stat().st_size for part in parts) <= 15 << 20
    with tarfile.open(fileobj=io.BytesIO(b"".join(part.read_bytes() for part in parts))) as archive:
        archive.extractall(tmp_path / "joined", filter="data")
    assert RWKVSAM.from_pretrained(tmp_path / "joined" / "model").config.image_size == 512
    assert (tmp_path / "log.jsonl").read_text().count('"loss"') >= 1


def test_labels_of_no_token_are_the_packages():
    assert ABSENT == prompt_tokens.ABSENT
