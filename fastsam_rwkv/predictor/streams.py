"""Predictions for many images: reading, model and masks overlap, and encodings are batched. No PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..errors import ArgumentError, InputError, PromptError, listed, short_repr, shorten
from .answers import Decoded, Prediction, Request
from .background import AHEAD, in_background
from .frame import ImageFrame
from .image_io import load_image, resize_image
from .prompts import Prompts

if TYPE_CHECKING:
    from .base import ImagePredictor

Result = TypeVar("Result")

UNUSABLE = (InputError, OSError, TypeError)  # what an image or a prompt that cannot be used raises
NAMES = ("point_coords", "point_labels", "box", "mask_input")  # of the prompts of an image
_NONE = object()


@dataclass
class _Job:
    """An image's prompts, the pixels to encode for them by frame, resized, and the decoder's answers."""

    request: Request[Any, Any]
    pixels: dict[ImageFrame, np.ndarray]
    answers: list[Decoded[Any]] = field(default_factory=list)


def predictions(
    predictor: ImagePredictor[Any, Any],
    images: Iterable[Any],
    prompts: Iterable[Mapping[str, Any]],
    options: Mapping[str, Any],
    batch_size: int,
) -> Iterator[Prediction | Exception]:
    """Yield the prediction of each image, or the error of one that cannot be used, in order.

    Args:
        predictor: Runs the model, in the caller's thread.
        images, prompts: As in `ImagePredictor.predict_images`.
        options: `multimask_output`, `return_logits` and `zoom` of `Request`.
        batch_size: Images and windows that are encoded together.

    Raises:
        PromptError: There are more images than prompts, or fewer.
    """

    def prepared(item: tuple[int, Any, Any]) -> _Job | Exception:
        number, image, given = item
        try:
            array = load_image(image)
            frame = ImageFrame.of((array.shape[0], array.shape[1]), predictor.image_size)
            request = Request(predictor, Prompts(frame, **_checked(given)), **options)
            pixels = {view: resize_image(array[view.pixels], predictor.image_size)[0] for view in request.rows_of}
            return _Job(request, pixels)
        except UNUSABLE as error:
            return of_image(number, error)

    def finished(job: _Job | Exception) -> Prediction | Exception:
        return job.request.prediction(job.answers) if isinstance(job, _Job) else job

    jobs = in_background(prepared, _pairs(images, prompts), max(AHEAD, batch_size), prefetch=True)
    return in_background(predictor.in_callers_stream(finished), _answered(predictor, jobs, batch_size))


def check_errors(errors: str) -> None:
    """Raise an ArgumentError unless `errors` says what is to be done with an error."""
    if errors not in ("raise", "return"):
        raise ArgumentError(f"errors must be 'raise' or 'return', got {short_repr(errors)}")


def raised(results: Iterable[Result | Exception]) -> Iterator[Result]:
    """Yield results up to the first error, and raise it."""
    for result in results:
        if isinstance(result, Exception):
            raise result
        yield result


def of_image(number: int, error: Exception) -> Exception:
    """Return the same error with the number of the image in its message."""
    named = type(error)(f"images[{number}]: {shorten(error, 440)}")
    named.__cause__ = error
    return named


def _pairs(images: Iterable[Any], prompts: Iterable[Any]) -> Iterator[tuple[int, Any, Any]]:
    for number, (image, given) in enumerate(itertools.zip_longest(images, prompts, fillvalue=_NONE)):
        if image is _NONE or given is _NONE:
            fewer, more = ("images", "prompts") if image is _NONE else ("prompts", "images")
            raise PromptError(f"each image needs its prompts: there are {number} {fewer}, and more {more}")
        yield number, image, given


def _checked(given: Any) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise PromptError(f"the prompts of an image must be a dict such as {{'box': ...}}, got {short_repr(given)}")
    if unknown := [name for name in given if name not in NAMES]:
        raise PromptError(f"prompts can have {', '.join(NAMES)}, not {listed(unknown)}")
    return given


def _answered(
    predictor: ImagePredictor[Any, Any], jobs: Iterable[_Job | Exception], batch_size: int
) -> Iterator[_Job | Exception]:
    """Fill in the answers of jobs, with the views of several images in one batch."""
    waiting: list[_Job | Exception] = []
    views: list[tuple[_Job, ImageFrame]] = []
    for job in jobs:
        waiting.append(job)
        views += [(job, frame) for frame in job.pixels] if isinstance(job, _Job) else []
        if len(views) >= batch_size:
            _answer(predictor, views, batch_size)
            yield from waiting
            waiting, views = [], []
    _answer(predictor, views, batch_size)
    yield from waiting


def _answer(predictor: ImagePredictor[Any, Any], views: list[tuple[_Job, ImageFrame]], batch_size: int) -> None:
    pixels = [job.pixels[frame] for job, frame in views]
    for i, embedding in embedded(predictor, pixels, [frame for _, frame in views], batch_size):
        job, frame = views[i]
        job.answers += job.request.decode(frame, embedding)


def embedded(
    predictor: ImagePredictor[Any, Any], pixels: Sequence[np.ndarray], frames: Sequence[ImageFrame], batch_size: int
) -> Iterator[tuple[int, Any]]:
    """Yield the number and the embedding of each image or window. Pixels of one shape make batches."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, array in enumerate(pixels):
        by_shape.setdefault(array.shape, []).append(i)
    for same in by_shape.values():
        for first in range(0, len(same), batch_size):
            batch = same[first : first + batch_size]
            yield from zip(batch, predictor.embed_batch([pixels[i] for i in batch], frames[batch[0]]), strict=True)
