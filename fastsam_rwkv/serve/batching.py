"""One thread that runs a model for many, with work that waits in one batch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from ..modeling.embedding import ImageEmbedding
from ..predictor.answers import Prediction, Request
from ..predictor.frame import ImageFrame
from ..predictor.prompts import Prompts
from ..predictor.torch_predictor import Predictor

DECODES_IN_A_ROW = 8  # batches of prompts that go before a waiting image, which takes many times as long


@dataclass(eq=False)
class _Work:
    """Work for the model.

    Attributes:
        key: Work of one key may share a batch.
        rows: Images or prompts.
        most: Images or prompts in a batch.
        run: Takes what is given of each work in a batch, and returns the results in order.
        given: Pixels, or prompts.
        gone: Set once nobody waits for the result.
        done: The result.
    """

    key: Hashable
    rows: int
    most: int
    run: Callable[[list[Any]], Sequence[Any]]
    given: Any
    gone: threading.Event
    done: Future[Any] = field(default_factory=Future)


class Batcher:
    """One thread that encodes images and decodes prompts.

    Args:
        predictor: Runs the model.
        batching: Run waiting encodings of one size, and waiting prompts on one embedding, in one batch. Otherwise one
            after the other, with results that equal those of `Predictor` bit for bit.
        images_at_once: Most images in a batch; by default the device's.
        observe: Called with "encode" or "decode" and the number of images or prompts of each batch.
    """

    def __init__(
        self, predictor: Predictor, batching: bool, images_at_once: int | None, observe: Callable[[str, int], None]
    ) -> None:
        self.predictor = predictor
        self._images_at_once = images_at_once or predictor.images_at_once
        self._batching, self._observe = batching, observe
        self._images: deque[_Work] = deque()
        self._prompts: deque[_Work] = deque()
        self._in_a_row = 0
        self._caller = threading.local()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="fastsam-rwkv-model", daemon=True)
        self._thread.start()

    def encode(self, pixels: np.ndarray, frame: ImageFrame) -> ImageEmbedding:
        """Return the embedding of resized pixels, uint8 `[h, w, 3]`."""

        def run(images: list[np.ndarray]) -> Sequence[ImageEmbedding]:
            self._observe("encode", len(images))
            embeddings = self.predictor.embed_batch(images, frame)
            return embeddings if len(images) == 1 else [_alone(embedding) for embedding in embeddings]

        return self._result(self._images, _Work(pixels.shape, 1, self._images_at_once, run, pixels, self.gone()))

    def decode(
        self, embedding: ImageEmbedding, inputs: dict[str, np.ndarray], multimask_output: bool
    ) -> tuple[Tensor, np.ndarray]:
        """Return logits `[N, n, h, w]` and predicted IoUs `[N, n]` for N of `Prompts.inputs`."""
        shapes = tuple(sorted((name, array.shape[1:]) for name, array in inputs.items()))
        key = (id(embedding.image_embed), multimask_output, shapes)  # the caller keeps the tensor alive
        count = len(next(iter(inputs.values())))

        def run(several: list[dict[str, np.ndarray]]) -> Sequence[tuple[Tensor, np.ndarray]]:
            counts = [len(next(iter(one.values()))) for one in several]
            self._observe("decode", sum(counts))
            together = {name: np.concatenate([one[name] for one in several]) for name in inputs}
            low, iou = self.predictor.decode(embedding, together, multimask_output)
            ends = np.cumsum(counts)
            return [(low[end - n : end], iou[end - n : end]) for n, end in zip(counts, ends, strict=True)]

        most = self.predictor.prompts_at_once
        return self._result(self._prompts, _Work(key, count, most, run, inputs, self.gone()))

    def close(self) -> None:
        """End the thread once its work is done. Later work is refused."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    @contextmanager
    def on_behalf(self, gone: threading.Event) -> Iterator[None]:
        """Drop the work of this thread within the block if it has not begun when `gone` is set."""
        self._caller.gone = gone
        try:
            yield
        finally:
            del self._caller.gone

    def gone(self) -> threading.Event:
        """Return the event of the block in which this thread is."""
        return getattr(self._caller, "gone", None) or threading.Event()

    def _result(self, queue: deque[_Work], work: _Work) -> Any:
        with self._changed:
            if self._closed:
                raise RuntimeError("the server is stopping")
            queue.append(work)
            self._changed.notify()
        return work.done.result()

    def _next(self) -> list[_Work]:
        """Return the prompts or the image that waited longest, and what may share the batch; nothing once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._images or self._prompts or self._closed)
            prompts_first = self._prompts and (self._in_a_row < DECODES_IN_A_ROW or not self._images)
            queue = self._prompts if prompts_first else self._images
            if not queue:
                return []
            self._in_a_row = self._in_a_row + 1 if prompts_first else 0
            first = queue.popleft()
            batch, rows = [first], first.rows
            if self._batching:
                for work in list(queue):
                    if work.key == first.key and rows + work.rows <= first.most:
                        batch.append(work)
                        rows += work.rows
                        queue.remove(work)
            return batch

    def _run(self) -> None:
        while batch := self._next():
            for work in batch:
                if work.gone.is_set():
                    work.done.cancel()
            batch = [work for work in batch if not work.done.cancelled()]
            if not batch:
                continue
            try:
                results = batch[0].run([work.given for work in batch])
            except BaseException as error:  # of any type: each caller raises it
                for work in batch:
                    work.done.set_exception(error)
            else:
                for work, result in zip(batch, results, strict=True):
                    work.done.set_result(result)


class SharedPredictor(Predictor):
    """A predictor whose model runs in a batcher's thread. Threads may share one, but not `set_image`."""

    def __init__(self, batcher: Batcher) -> None:
        super().__init__(batcher.predictor.model)
        self._batcher = batcher

    def predict_embedded(
        self, embedding: ImageEmbedding, size: tuple[int, int], prompts: Mapping[str, Any], multimask_output: bool
    ) -> Prediction:
        """Predict masks on an image of `size` (H, W) by its embedding, as `predict_image` does without zoom.

        Raises:
            PromptError: A prompt that cannot be used.
        """
        self._check_options(multimask_output, False, "never")
        checked = Prompts(ImageFrame.of(size, self.image_size), **prompts)
        request = Request(self, checked, multimask_output, False, "never")
        return request.prediction(request.decode(checked.frame, embedding))

    def embed(self, pixels: np.ndarray, frame: ImageFrame) -> ImageEmbedding:
        return self._batcher.encode(pixels, frame)

    def decode(
        self, embedding: ImageEmbedding, inputs: dict[str, np.ndarray], multimask_output: bool
    ) -> tuple[Tensor, np.ndarray]:
        return self._batcher.decode(embedding, inputs, multimask_output)


def _alone(embedding: ImageEmbedding) -> ImageEmbedding:
    """Return one embedding of a batch with memory of its own, so that a cache keeps no other."""
    return replace(
        embedding, image_embed=embedding.image_embed.clone(), high_res_feats=embedding.high_res_feats.clone()
    )
