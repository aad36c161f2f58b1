"""segment-anything's `SamPredictor` interface, independent of what runs the model. No PyTorch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, Literal, get_args, overload

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ImageError, PromptError, short_repr
from .answers import Array, Embedding, Prediction, Request, Zoom
from .background import R, T
from .frame import ImageFrame
from .image_io import ImageLike, load_image, resize_image
from .prompts import Prompts, mask_to_low_res_logits
from .streams import check_errors, embedded, of_image, predictions, raised

PROMPTS_AT_ONCE = 32  # bounds the memory of the decoder
WINDOWS_KEPT = 4  # embeddings of windows of one image


class ImagePredictor(ABC, Generic[Embedding, Array]):
    """Embed an image once, then predict masks for prompts on it. A subclass runs the model."""

    mask_threshold = 0.0  # logits above it are inside

    def __init__(self) -> None:
        self.reset_image()

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Side of the model input in pixels."""

    @property
    @abstractmethod
    def has_multimask(self) -> bool:
        """True if the model has three masks for an ambiguous prompt."""

    @abstractmethod
    def embed(self, pixels: np.ndarray, frame: ImageFrame) -> Embedding:
        """Return the embedding of resized pixels, uint8 `[h, w, 3]`."""

    @abstractmethod
    def decode(
        self, embedding: Embedding, inputs: dict[str, np.ndarray], multimask_output: bool
    ) -> tuple[Array, np.ndarray]:
        """Return logits `[N, n, h, w]` and predicted IoUs `[N, n]` float32 for N of `Prompts.inputs`."""

    @abstractmethod
    def enlarge(self, low_res_masks: Array, frame: ImageFrame, return_logits: bool) -> np.ndarray:
        """Resize logits `[N, n, h, w]` to masks `[N, n, H, W]` in the image frame: bool, or float32 logits."""

    @abstractmethod
    def to_numpy(self, low_res_masks: Array) -> np.ndarray:
        """Return the logits as a float32 array."""

    def embed_batch(self, pixels: Sequence[np.ndarray], frame: ImageFrame) -> Sequence[Embedding]:
        """Return the embeddings of images of one shape, uint8 `[h, w, 3]` each."""
        return [self.embed(one, frame) for one in pixels]

    def cleaned(self, low_res_masks: Array) -> Array:
        """Return the logits that masks are made of. `low_res_logits` stay as they are."""
        return low_res_masks

    def in_callers_stream(self, function: Callable[[T], R]) -> Callable[[T], R]:
        """Return a function for another thread that queues its work on the GPU behind that of this thread."""
        return function

    @property
    def images_at_once(self) -> int:
        """Number of images in one call of `embed_batch` that suits the device."""
        return 1

    @property
    def prompts_at_once(self) -> int:
        """Largest number of prompts in one call of `decode`."""
        return PROMPTS_AT_ONCE

    def reset_image(self) -> None:
        """Forget the image, and those of a batch."""
        self._views: _Views[Embedding] | None = None
        self._batch: list[_Views[Embedding]] | None = None

    def reset_predictor(self) -> None:
        """Forget the image; `reset_image` by SAM 2's name."""
        self.reset_image()

    @property
    def is_image_set(self) -> bool:
        """True after `set_image`."""
        return self._views is not None

    @property
    def _set(self) -> _Views[Embedding]:
        if self._views is None:
            raise RuntimeError("an image must be set with .set_image(...) first")
        return self._views

    @property
    def _embedding(self) -> Embedding:
        return self._set.embedding(self._set.frame)

    def set_image(self, image: ImageLike, image_format: str = "RGB") -> None:
        """Embed an image.

        Args:
            image: uint8 array `[H, W, 3]`, or a float array of 0..255; PIL image, path, or bytes of a file. EXIF
                orientation is applied to the last three. `load_image` reads images of 8 to 14 bits in 16, with
                `value_range`.
            image_format: "RGB" or "BGR", the channel order of an array.

        Raises:
            ImageError, TypeError, FileNotFoundError: An image that cannot be used. The previous one stays set.
        """
        if not (isinstance(image_format, str) and image_format in ("RGB", "BGR")):
            raise ImageError(f"image_format must be 'RGB' or 'BGR', got {short_repr(image_format)}")
        array = _own(image)
        if image_format == "BGR":
            if not isinstance(image, np.ndarray):
                raise ImageError("image_format='BGR' is for arrays; paths and PIL images are read as RGB")
            array = np.ascontiguousarray(array[..., ::-1])
        self.reset_image()
        views = _Views(array.shape, array, self)
        views.embedding(views.frame)
        self._views = views

    def set_image_batch(self, image_list: Sequence[ImageLike]) -> None:
        """Embed several images for `predict_batch`, as SAM 2 does. All stay in memory; `predict_images` keeps none.

        Args:
            image_list: Images of any sizes, each as in `set_image`.

        Raises:
            ImageError, TypeError, FileNotFoundError: An image that cannot be used. The previous ones stay set.
        """
        arrays = [_own(image) for image in image_list]
        if not arrays:
            raise ImageError("image_list holds no image")
        self.reset_image()
        batch = [_Views(array.shape, array, self) for array in arrays]
        pixels = [resize_image(array, self.image_size)[0] for array in arrays]
        for i, embedding in embedded(self, pixels, [views.frame for views in batch], self.images_at_once):
            batch[i].set(embedding)
        self._batch = batch

    def _set_embedding(self, embedding: Embedding, original_size: tuple[int, int]) -> None:
        self.reset_image()
        self._views = _Views(original_size, None, self)
        self._views.set(embedding)

    def predict(
        self,
        point_coords: ArrayLike | None = None,
        point_labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        multimask_output: bool | None = None,
        return_logits: bool = False,
        normalize_coords: bool = True,
        *,
        zoom: Zoom = "never",
    ) -> Prediction:
        """Predict masks for prompts on the image that is set, with the defaults of `SamPredictor.predict`.

        Args:
            point_coords, point_labels, return_logits: As in `predict_image`. Points outside the image are moved to its
                edge with a warning. Beside a box, `point_coords` may be empty.
            box: `[4]` or, as in SAM, `[1, 4]` for one prompt; `[N, 4]` for N prompts.
            mask_input: As in `predict_image`, or `[1, 256, 256]` as SAM's, which are resized.
            multimask_output: Return three masks instead of one. By default three if the model has them, as in SAM.
            normalize_coords: As in SAM 2: points and boxes are in pixels. False: in 0..1, as parts of width and height.
            zoom: As in `predict_image`, but off by default. The embeddings of the last windows are kept.

        Returns:
            Masks `[n, H, W]`, predicted IoUs `[n]` and low-resolution logits `[n, h, w]`, with N in front for N
            prompts.

        Raises:
            RuntimeError: No image is set.
            PromptError: A prompt that cannot be used.
        """
        if multimask_output is None:
            multimask_output = self.has_multimask
        self._check_options(multimask_output, return_logits, zoom)
        given = (point_coords, point_labels, box, mask_input)
        return self._predict(self._set, given, (multimask_output, return_logits, zoom), normalize_coords)

    def _predict(
        self,
        views: _Views[Embedding],
        given: tuple[ArrayLike | None, ...],
        options: tuple[bool, bool, Zoom],
        normalize_coords: bool,
    ) -> Prediction:
        prompts = Prompts(views.frame, *given, as_sam=True, relative=not normalize_coords)
        return self._answer(Request(self, prompts, *options), views)

    def predict_batch(
        self,
        point_coords_batch: Sequence[ArrayLike | None] | None = None,
        point_labels_batch: Sequence[ArrayLike | None] | None = None,
        box_batch: Sequence[ArrayLike | None] | None = None,
        mask_input_batch: Sequence[ArrayLike | None] | None = None,
        multimask_output: bool | None = None,
        return_logits: bool = False,
        normalize_coords: bool = True,
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        """Predict masks for prompts on the images of `set_image_batch`, as SAM 2 does.

        Args:
            point_coords_batch, point_labels_batch, box_batch, mask_input_batch: For each image an argument of
                `predict`, or None; or None for all.
            multimask_output, return_logits, normalize_coords: As in `predict`, for all images.

        Returns:
            Masks, predicted IoUs and low-resolution logits of each image, as `predict` returns them.

        Raises:
            RuntimeError: No images are set.
            PromptError: A prompt that cannot be used, or prompts for another number of images.
        """
        if self._batch is None:
            raise RuntimeError("images must be set with .set_image_batch(...) first")
        if multimask_output is None:
            multimask_output = self.has_multimask
        self._check_options(multimask_output, return_logits, "never")
        named = {
            "point_coords_batch": point_coords_batch, "point_labels_batch": point_labels_batch,
            "box_batch": box_batch, "mask_input_batch": mask_input_batch,
        }  # fmt: skip
        for name, prompts in named.items():
            if prompts is not None and len(prompts) != len(self._batch):
                raise PromptError(f"{name} is for {len(prompts)} images; {len(self._batch)} are set")
        found = []
        for i, views in enumerate(self._batch):
            given = tuple(None if prompts is None else prompts[i] for prompts in named.values())
            try:
                found.append(self._predict(views, given, (multimask_output, return_logits, "never"), normalize_coords))
            except PromptError as error:
                raise of_image(i, error) from error
        masks, scores, low_res_logits = zip(*found, strict=True)
        return list(masks), list(scores), list(low_res_logits)

    def predict_image(
        self,
        image: ImageLike,
        point_coords: ArrayLike | None = None,
        point_labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        multimask_output: bool = False,
        return_logits: bool = False,
        zoom: Zoom = "auto",
    ) -> Prediction:
        """Predict masks for prompts on an image, in one call that keeps nothing.

        Coordinates are (x, y) in pixels of the image, after EXIF orientation.

        Args:
            image: Path, bytes of a file, PIL image, or uint8 array `[H, W, 3]` RGB. EXIF orientation is applied to the
                first three.
                `load_image` reads images of 8 to 14 bits in 16, with `value_range`.
            point_coords: `[P, 2]` for one prompt, `[N, P, 2]` for N prompts.
            point_labels: `[P]` or `[N, P]`: 1 foreground, 0 background, -1 padding. All foreground by default.
            box: `[4]` (x1, y1, x2, y2) for one prompt, `[N, 4]` for N prompts; x2 and y2 are exclusive. A box may
                reach beyond the image. As in SAM it is not clipped.
            mask_input: `[1, h, w]` or `[N, 1, h, w]`, the low-resolution logits of an earlier prediction. For a mask
                `[H, W]`, pass `mask_to_low_res_logits(mask)`.
            multimask_output: Return three masks for an ambiguous prompt instead of one.
            return_logits: Return float32 logits in `masks` instead of booleans.
            zoom: "auto" encodes a window around each small target instead of the whole image, "always" around each
                target, "never" around none. The window is enlarged to the model input. The box prompt locates the
                target, or without one `mask_input`. Points alone are never zoomed to. Outside the window, logits are
                -10.

        Returns:
            Masks `[n, H, W]`, predicted IoUs `[n]` and low-resolution logits `[n, h, w]`, with N in front for N
            prompts.

        Raises:
            ImageError, TypeError: An image that cannot be used.
            PromptError: A prompt that cannot be used.
            FileNotFoundError: The file does not exist.
        """
        self._check_options(multimask_output, return_logits, zoom)
        array = load_image(image)
        views = _Views(array.shape, array, self)
        prompts = Prompts(views.frame, point_coords, point_labels, box, mask_input)  # raises before the encoder's work
        return self._answer(Request(self, prompts, multimask_output, return_logits, zoom), views)

    @overload
    def predict_images(
        self,
        images: Iterable[ImageLike],
        prompts: Iterable[Mapping[str, Any]],
        multimask_output: bool = False,
        return_logits: bool = False,
        zoom: Zoom = "auto",
        *,
        batch_size: int | None = None,
        errors: Literal["raise"] = "raise",
    ) -> Iterator[Prediction]: ...

    @overload
    def predict_images(
        self,
        images: Iterable[ImageLike],
        prompts: Iterable[Mapping[str, Any]],
        multimask_output: bool = False,
        return_logits: bool = False,
        zoom: Zoom = "auto",
        *,
        batch_size: int | None = None,
        errors: Literal["return"],
    ) -> Iterator[Prediction | Exception]: ...

    def predict_images(
        self,
        images: Iterable[ImageLike],
        prompts: Iterable[Mapping[str, Any]],
        multimask_output: bool = False,
        return_logits: bool = False,
        zoom: Zoom = "auto",
        *,
        batch_size: int | None = None,
        errors: Literal["raise", "return"] = "raise",
    ) -> Iterator[Prediction] | Iterator[Prediction | Exception]:
        """Predict masks for the prompts of many images, which may come one by one from an iterator.

        Images are read, and masks are brought to their size, in background threads while the model works on others.
        Beyond what the caller keeps, memory holds one image, the resized pixels of some more, and three predictions.

        Args:
            images: Images of any sizes, each as in `predict_image`.
            prompts: For each image, a dict with `point_coords`, `point_labels`, `box` and `mask_input` as in
                `predict_image`; one or N prompts.
            multimask_output, return_logits, zoom: As in `predict_image`, for all images.
            batch_size: Images and windows that are encoded together, if their pixels have one shape. By default 8 on a
                GPU and 1 elsewhere.
            errors: "raise" raises the error of the first image or prompt that cannot be used, after the predictions of
                all images before it. "return" yields the error as a value and goes on.

        Yields:
            The prediction of each image, in order: the one of `predict_image`, up to rounding.

        Raises:
            ImageError, TypeError, PromptError, FileNotFoundError: As `predict_image` does. The message begins with
                `images[i]`.
        """
        self._check_options(multimask_output, return_logits, zoom)
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise PromptError(f"batch_size must be a positive integer, got {short_repr(batch_size)}")
        check_errors(errors)
        options = {"multimask_output": multimask_output, "return_logits": return_logits, "zoom": zoom}
        found = predictions(self, images, prompts, options, batch_size or self.images_at_once)
        return raised(found) if errors == "raise" else found

    def mask_to_low_res_logits(self, mask: ArrayLike) -> np.ndarray:
        """Turn a mask at the image's size into logits for `mask_input`.

        Args:
            mask: `[H, W]` or `[N, H, W]` in the image frame: bool, or numbers 0 and 1, or 0 and 255.

        Returns:
            Float32 `[1, h, w]` or `[N, 1, h, w]`, -10..10, at a quarter of the model input's size.

        Raises:
            PromptError: The shape or the values are not those of a mask.
        """
        return mask_to_low_res_logits(mask, self.image_size)

    def _check_options(self, multimask_output: bool, return_logits: bool, zoom: Zoom) -> None:
        for name, flag in (("multimask_output", multimask_output), ("return_logits", return_logits)):
            if not isinstance(flag, (bool, np.bool_, int)) or flag not in (0, 1):
                raise PromptError(f"{name} must be True or False, got {short_repr(flag)}")
        if multimask_output and not self.has_multimask:
            problem = "needs a model with num_multimask_outputs=3; this one has one mask"
            raise PromptError(f"multimask_output=True {problem}", f"--multimask {problem}")
        if not (isinstance(zoom, str) and zoom in get_args(Zoom)):
            raise PromptError(f"zoom must be 'never', 'auto' or 'always', got {short_repr(zoom)}")

    @staticmethod
    def _answer(request: Request[Embedding, Array], views: _Views[Embedding]) -> Prediction:
        return request.prediction(
            answer for frame in request.rows_of for answer in request.decode(frame, views.embedding(frame))
        )


def _own(image: ImageLike) -> np.ndarray:
    """Load an image into memory that the caller cannot change before a window is encoded."""
    if isinstance(image, np.ndarray) and image.dtype.kind == "f" and image.size:
        low, high = image.min(), image.max()
        if low >= 0 and 1 < high <= 255:  # as programs for SAM pass them; up to 1 they may mean another range
            image = np.rint(image).astype(np.uint8)
    array = load_image(image)
    return array.copy() if isinstance(image, np.ndarray) and np.may_share_memory(array, image) else array


class _Views(Generic[Embedding]):
    """An image's embedding and those of the last windows of it, each made at first use.

    The image is None if only its embedding is there.
    """

    def __init__(
        self, original_size: tuple[int, ...], image: np.ndarray | None, predictor: ImagePredictor[Embedding, Any]
    ) -> None:
        self._image, self._predictor = image, predictor
        self.frame = ImageFrame.of((original_size[0], original_size[1]), predictor.image_size)
        self._embeddings: dict[ImageFrame, Embedding] = {}

    def set(self, embedding: Embedding) -> None:
        """Use this embedding of the image."""
        self._embeddings[self.frame] = embedding

    def embedding(self, frame: ImageFrame) -> Embedding:
        """Return the embedding of the image or of a window, by its frame."""
        if frame not in self._embeddings:
            if self._image is None:
                raise PromptError("zoom needs the image, and only its embedding is set: pass zoom='never' or set_image")
            pixels, _ = resize_image(self._image[frame.pixels], self._predictor.image_size)
            windows = [window for window in self._embeddings if window != self.frame]
            for window in windows[: max(0, len(windows) - WINDOWS_KEPT + 1)]:
                del self._embeddings[window]
            self._embeddings[frame] = self._predictor.embed(pixels, frame)
        return self._embeddings[frame]
