"""Work of the server: threads, the cache, and what is measured."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, Literal, TypeVar, get_args

import numpy as np
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from starlette.exceptions import HTTPException
from starlette.requests import Request

from .. import __version__
from ..checkpoint import weights_sha256
from ..errors import ArgumentError, ImageError
from ..modeling.rwkv_sam import RWKVSAM
from ..predictor.automatic import AutomaticMaskGenerator
from ..predictor.image_io import load_image, open_image, resize_image
from ..predictor.rle import coco_box_of_record
from ..predictor.torch_predictor import Predictor
from .batching import Batcher, SharedPredictor
from .cache import Cache, LocalCache
from .guard import refused
from .schemas import Embedded, ImagePrompt, Masks, Model, Prompt, answer
from .settings import Settings

R = TypeVar("R")
Kind = Literal["images", "prompts", "search"]

MOST_CROP_LAYERS = 1
DECODED_AT_ONCE = 2  # images; each takes up to 20 bytes per pixel while it is decoded


class Metrics:
    """Counters of `/metrics`, in a registry of their own."""

    def __init__(self, service: Service) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory, CPU time and start of the process, on Linux
        name = "fastsam_rwkv"
        about = {**service.model.model_dump(), "version": __version__, "pid": os.getpid()}
        Info(name, "Model and process", registry=registry).info({key: str(value) for key, value in about.items()})
        self.requests = Counter(f"{name}_requests", "Requests", ["path", "status"], registry=registry)
        self.seconds = Histogram(f"{name}_request_seconds", "Time until the answer", ["path"], registry=registry)
        self.batches = Histogram(
            f"{name}_batch_size",
            "Images or prompts in a batch",
            ["work"],
            buckets=(1, 2, 4, 8, 16, 32),
            registry=registry,
        )
        for suffix, meaning, value in (
            ("queue_length", "Requests that wait or run", lambda: service.queued),
            ("embeddings", "Embeddings that are kept", lambda: service.cache.usage()[0]),
            ("embeddings_bytes", "Bytes of the embeddings that are kept", lambda: service.cache.usage()[1]),
        ):
            Gauge(f"{name}_{suffix}", meaning, registry=registry).set_function(value)


class Service:
    """A model for many clients at once.

    Args:
        model: The model.
        settings: Limits and options.
        cache: Keeps embeddings; by default in this process.

    Attributes:
        queued: Requests that wait or run.
    """

    def __init__(self, model: RWKVSAM, settings: Settings, cache: Cache | None = None) -> None:
        self.settings, self.queued = settings, 0
        self.cache = LocalCache(settings.cache_bytes) if cache is None else cache
        predictor = Predictor(model)
        self._batcher = Batcher(predictor, settings.batching, settings.images_at_once, self._observe)
        self._predictor = SharedPredictor(self._batcher)
        # threads of their own, so that a click waits neither for many images nor for a search
        self._pools = {
            kind: ThreadPoolExecutor(1 if kind == "search" else settings.workers, f"fastsam-rwkv-{kind}")
            for kind in get_args(Kind)
        }
        self._decoding = threading.BoundedSemaphore(DECODED_AT_ONCE)
        self._lock = threading.Lock()
        self.model = Model(
            variant=model.config.variant,
            image_size=model.config.image_size,
            multimask=predictor.has_multimask,
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            weights_sha256=weights_sha256(model),
        )
        self.metrics = Metrics(self)

    def close(self) -> None:
        """Finish what runs, drop what waits, and end the threads."""
        for pool in self._pools.values():
            pool.shutdown(cancel_futures=True)
        self._batcher.close()

    def is_full(self) -> bool:
        """Return True if no more requests may be taken."""
        return self.queued >= self.settings.queue

    async def run(self, request: Request, kind: Kind, work: Callable[..., R], *args: Any) -> R:
        """Return `work(*args)`, computed in a thread.

        Args:
            request: Dropped if its client leaves before the work begins.
            kind: Pool of threads.
            work: Blocks.
            args: Its arguments.

        Raises:
            HTTPException: 503 if too many requests wait, or if the time is over; 499 if the client left.
        """
        with self._lock:
            if self.is_full():
                raise refused(503, "too many requests wait; come again")
            self.queued += 1
        left = threading.Event()

        def job() -> R:
            with self._batcher.on_behalf(left):
                return work(*args)

        future = self._pools[kind].submit(job)
        future.add_done_callback(self._finished)  # also of work that nobody waits for any more
        answer, gone = asyncio.wrap_future(future), asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait((answer, gone), timeout=self.settings.timeout, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            if gone.done():
                raise HTTPException(499, "the client left")
            raise refused(503, f"no answer within {self.settings.timeout:g} seconds: the server is busy; come again")
        finally:
            gone.cancel()
            answer.cancel()  # which drops the job if it has not begun
            left.set()  # and what it waits for

    def embed(self, file: BinaryIO) -> Embedded:
        """Embed an image and keep its embedding.

        Raises:
            HTTPException: 413 if the image has too many pixels.
            ImageError: The image cannot be used.
        """
        image = self._image(file)
        pixels, frame = resize_image(image, self._predictor.image_size)
        H, W = frame.original_size
        embedding = self._predictor.embed(pixels, frame)
        return Embedded(id=self.cache.put(embedding, (H, W)), height=H, width=W)

    def masks(self, id: str, prompt: Prompt) -> Masks:
        """Predict masks on an image that is embedded.

        Raises:
            HTTPException: 404 if the embedding is not there.
            PromptError: A prompt that cannot be used.
        """
        found = self.cache.get(id)
        if found is None:
            raise HTTPException(404, f"no embedding {id[:40]!r}: it was dropped or never made; send the image again")
        prompts = prompt.prompts(self.settings)
        prediction = self._predictor.predict_embedded(*found, prompts, prompt.multimask_output)
        return answer(prediction, prompt.format, prompt.low_res_logits)

    def masks_of_image(self, file: BinaryIO, prompt: ImagePrompt) -> Masks:
        """Predict masks on an image that is not kept.

        Raises:
            HTTPException: 413 if the image has too many pixels.
            ImageError, PromptError: An image or a prompt that cannot be used.
        """
        prompts = prompt.prompts(self.settings)
        prediction = self._predictor.predict_image(
            self._image(file), **prompts, multimask_output=prompt.multimask_output, zoom=prompt.zoom
        )
        return answer(prediction, prompt.format, prompt.low_res_logits)

    def everything(self, file: BinaryIO, options: dict[str, Any]) -> tuple[tuple[int, int], Iterator[dict[str, Any]]]:
        """Search an image, and return its size and the records of its masks, the best first.

        Raises:
            HTTPException: 413 if the image has too many pixels.
            ImageError, ArgumentError: An image or an option that cannot be used.
        """
        for name, least, most in (
            ("points_per_side", 1, self.settings.max_points_per_side),
            ("crop_n_layers", 0, MOST_CROP_LAYERS),
        ):
            if not least <= options[name] <= most:
                raise ArgumentError(f"{name} must be {least} to {most}, got {options[name]}")
        generator = _Search(self._predictor, self._batcher.gone(), options)
        image = self._image(file)
        records = ({**record, "bbox": coco_box_of_record(record)} for record in generator.records(image))
        return (image.shape[0], image.shape[1]), records

    def _image(self, file: BinaryIO) -> np.ndarray:
        most = f"at most {self.settings.max_pixels} pixels are taken"
        try:
            opened = open_image(file, "the image")
        except ImageError as error:
            if isinstance(error.__cause__, Image.DecompressionBombError):  # even more than Pillow takes
                raise refused(413, f"the image is too large: {most}") from error
            raise
        with opened as image:
            W, H = image.size
            if self.settings.max_pixels < W * H:
                raise refused(413, f"the image has {W}x{H} pixels; {most}")
            with self._decoding:
                return load_image(image)

    def _observe(self, work: str, count: int) -> None:
        self.metrics.batches.labels(work).observe(count)

    def _finished(self, future: Future[Any]) -> None:
        with self._lock:
            self.queued -= 1


class _Search(AutomaticMaskGenerator):
    """A generator that stops once nobody waits for its masks."""

    def __init__(self, predictor: Predictor, gone: threading.Event, options: dict[str, Any]) -> None:
        super().__init__(predictor, output_mode="coco_rle", **options)
        self._gone = gone

    def before_batch(self) -> None:
        if self._gone.is_set():
            raise HTTPException(499, "the client left, or the time is over")


async def _left(request: Request) -> None:
    """Wait until the client of a request, whose body is read, closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
