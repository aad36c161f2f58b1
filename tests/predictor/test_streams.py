"""Many images: the predictions of single ones, in order, whatever fails; and work in background threads."""

import itertools
import threading
from concurrent.futures import Future
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from small_model import small_model

import fastsam_rwkv
from fastsam_rwkv import AutomaticMaskGenerator, ImageError, Predictor, PromptError
from fastsam_rwkv.errors import ArgumentError
from fastsam_rwkv.predictor.background import AHEAD, in_background

BOX = {"box": [10, 10, 80, 70]}
SMALL_BOXES = {"box": [[5, 5, 15, 15], [40, 40, 50, 48], [10, 10, 80, 70]]}  # two windows and the whole image
CLICKS = {"point_coords": [[[30, 40]], [[60, 20]]], "point_labels": [[1], [1]]}
PROMPTS = [BOX, CLICKS, SMALL_BOXES, BOX, SMALL_BOXES]


@pytest.fixture(scope="module")
def predictor():
    return Predictor(small_model())


@pytest.fixture(scope="module")
def photos():
    rng = np.random.default_rng(0)
    return [
        rng.integers(0, 255, (*size, 3), np.uint8) for size in ((90, 150), (150, 90), (90, 150), (90, 90), (90, 150))
    ]


@pytest.mark.parametrize(
    "zoom, batch_size, largest",  # pixels of one shape make a batch: here those of windows or of images
    [("auto", None, 1), ("auto", 2, 2), ("auto", 100, 5), ("never", None, 1), ("never", 3, 2), ("never", 100, 3)],
)
def test_many_images_are_answered_as_single_ones(predictor, photos, zoom, batch_size, largest, monkeypatch):
    batches = []
    encode = predictor.model.encode_image
    monkeypatch.setattr(predictor.model, "encode_image", lambda x, size: batches.append(len(x)) or encode(x, size))
    found = list(predictor.predict_images(iter(photos), iter(PROMPTS), zoom=zoom, batch_size=batch_size))
    assert max(batches) == largest and sum(batches) == (9 if zoom == "auto" else 5)
    for prediction, photo, prompts in zip(found, photos, PROMPTS, strict=True):
        single = predictor.predict_image(photo, zoom=zoom, **prompts)
        assert prediction.masks.shape == single.masks.shape and prediction.masks.dtype == bool
        np.testing.assert_allclose(prediction.low_res_logits, single.low_res_logits, atol=1e-4)
        np.testing.assert_allclose(prediction.scores, single.scores, atol=1e-5)


def test_options_hold_for_all_images(predictor, photos):
    for prediction in predictor.predict_images(photos[:2], PROMPTS[:2], multimask_output=True, return_logits=True):
        assert prediction.masks.shape[-3] == 3 and prediction.masks.dtype == np.float32


def test_an_error_comes_after_the_predictions_before_it(predictor, photos, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    images = [photos[0], photos[1], tmp_path / "bad.png", photos[0], photos[0], photos[0]]
    prompts = [BOX, BOX, BOX, {"boxes": [0, 0, 9, 9]}, 3, {"box": [900, 900, 950, 950]}]
    for batch_size in (1, 4):
        found = predictor.predict_images(images, prompts, batch_size=batch_size)
        assert [next(found).masks.shape for _ in range(2)] == [(1, 90, 150), (1, 150, 90)]
        with pytest.raises(ImageError, match=r"images\[2\]: '.*bad.png' is not an image"):
            next(found)
        assert list(found) == []
        found = list(
            predictor.predict_images([*images, photos[0]], [*prompts, BOX], batch_size=batch_size, errors="return")
        )
        assert [type(item) for item in found[2:6]] == [ImageError, PromptError, PromptError, PromptError]
        for i, message in ((3, "not boxes"), (4, "must be a dict"), (5, "lies outside the image of 150x90")):
            assert f"images[{i}]: " in str(found[i]) and message in str(found[i])
        assert np.array_equal(found[6].masks, found[0].masks)


def test_images_and_prompts_must_be_as_many(predictor, photos):
    for images, prompts, message in (
        (photos[:2], PROMPTS[:1], "there are 1 prompts, and more images"),
        (photos[:1], PROMPTS[:3], "there are 1 images, and more prompts"),
    ):
        found = predictor.predict_images(images, prompts)
        next(found)
        with pytest.raises(PromptError, match=message):
            next(found)
    assert list(predictor.predict_images([], [])) == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({"errors": "skip"}, "errors must be 'raise' or 'return', got 'skip'"),
        ({"zoom": "yes"}, "zoom must be"),
        ({"multimask_output": 2}, "multimask_output must be True or False"),
    ],
)
def test_wrong_options_are_refused_at_once(predictor, options, message):
    with pytest.raises((PromptError, ArgumentError), match=message):
        predictor.predict_images([], [], **options)


def test_a_full_device_halves_the_batch(predictor, photos, monkeypatch):
    encode, sizes = predictor.model.encode_image, []

    def small(x, size):
        sizes.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError
        return encode(x, size)

    monkeypatch.setattr(predictor.model, "encode_image", small)
    found = list(predictor.predict_images(photos[:1] * 5, [BOX] * 5, batch_size=5))
    assert sizes == [5, 2, 3, 1, 2] and len(found) == 5
    assert np.array_equal(found[0].masks, found[4].masks)

    def full(x, size):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(predictor.model, "encode_image", full)
    with pytest.raises(torch.OutOfMemoryError):
        next(predictor.predict_images(photos[:1], [BOX]))


def test_the_model_runs_in_the_callers_thread(predictor, photos, monkeypatch):
    threads = set()
    encode, enlarge = predictor.embed_batch, predictor.enlarge
    monkeypatch.setattr(predictor, "embed_batch", lambda *a: threads.add(threading.get_ident()) or encode(*a))
    others = set()
    monkeypatch.setattr(predictor, "enlarge", lambda *a: others.add(threading.get_ident()) or enlarge(*a))
    list(predictor.predict_images(photos, PROMPTS))
    assert threads == {threading.get_ident()} and len(others) == 1 and not others & threads


def test_masks_are_made_in_the_callers_stream(predictor, monkeypatch):
    """Without a GPU: the stream is that of the calling thread, which other threads do not have."""
    assert predictor.in_callers_stream(abs) is abs
    entered, current = [], threading.local()
    current.stream = "the caller's"
    monkeypatch.setattr(Predictor, "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current.stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: entered.append(stream) or nullcontext())
    assert list(in_background(predictor.in_callers_stream(abs), [-1, -2])) == [1, 2]
    assert entered == ["the caller's"] * 2


def test_images_are_taken_as_they_are_needed(predictor, photos):
    taken = []
    endless = (taken.append(i) or photos[0] for i in itertools.count())
    found = predictor.predict_images(endless, itertools.repeat(BOX), batch_size=2)
    for _ in range(3):
        next(found)
    found.close()
    assert len(taken) <= 3 + 2 + 2 * (AHEAD + 1)


def test_the_default_model_is_shared(monkeypatch):
    assert fastsam_rwkv.predict_images.__self__ is fastsam_rwkv.predict.__self__


def test_everything_in_many_images(predictor, photos, tmp_path):
    generator = AutomaticMaskGenerator(
        predictor, points_per_side=3, pred_iou_thresh=0, stability_score_thresh=0, output_mode="coco_rle"
    )
    single = [generator.generate(image) for image in photos]
    assert all(single) and list(generator.generate_images(iter(photos))) == single
    missing = tmp_path / "missing.png"
    found = generator.generate_images([photos[0], missing, photos[2]])
    assert next(found) == single[0]
    with pytest.raises(FileNotFoundError, match=r"images\[1\]: no image file"):
        next(found)
    found = list(generator.generate_images([photos[0], missing, photos[2]], errors="return"))
    assert isinstance(found[1], FileNotFoundError) and [found[0], found[2]] == [single[0], single[2]]
    with pytest.raises(ArgumentError, match="errors must be"):
        generator.generate_images([], errors="none")


def test_results_keep_their_order():
    slow = threading.Event()

    def wait_for_the_second(i):
        if i == 0:
            slow.wait(10)
        return i * i

    def items():
        for i in range(20):
            if i == 1:
                slow.set()  # taken before the first result is waited for
            yield i

    assert list(in_background(wait_for_the_second, items())) == [i * i for i in range(20)]


class AtOnce:
    """An executor that computes in `submit`, so that every result is ready."""

    def __init__(self, workers):
        assert workers == 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, item):
        future = Future()
        future.set_result(function(item))
        return future


def test_a_ready_result_is_yielded_before_the_next_item_is_taken(monkeypatch):
    monkeypatch.setattr("fastsam_rwkv.predictor.background.ThreadPoolExecutor", AtOnce)
    for prefetch, ahead in ((False, 1), (True, 4)):
        items = iter(range(9))
        found = in_background(lambda i: i, items, 3, prefetch=prefetch)
        assert next(found) == 0 and next(items) == ahead
        assert list(found) == [i for i in range(1, 9) if i != ahead]


def test_an_exception_waits_for_its_turn():
    def broken():
        yield from (1, 2, 0, 3)

    found = in_background(lambda i: 6 // i, broken())
    assert [next(found), next(found)] == [6, 3]
    with pytest.raises(ZeroDivisionError):
        next(found)

    def ends():
        yield 1
        raise RuntimeError("no more")

    found = in_background(lambda i: i, ends())
    assert next(found) == 1
    with pytest.raises(RuntimeError, match="no more"):
        next(found)


def test_no_thread_is_left():
    before = threading.active_count()
    found = in_background(lambda i: i, itertools.count())
    next(found)
    found.close()
    assert threading.active_count() == before
