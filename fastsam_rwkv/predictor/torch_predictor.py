"""`Predictor`: the PyTorch model behind the predictors' interface."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import weights_sha256
from ..errors import ImageError, short_repr
from ..modeling.embedding import ImageEmbedding
from ..modeling.pixels import normalize_values
from ..modeling.rwkv_sam import RWKVSAM
from .background import R, T
from .base import ImagePredictor
from .frame import ImageFrame
from .rle import scipy_ndimage, without_small_areas
from .sam_transform import ResizeLongestSide
from .transforms import masks_to_image

IMAGES_AT_ONCE = 8  # on a GPU

_loading = threading.Lock()


class Predictor(ImagePredictor[ImageEmbedding, Tensor]):
    """segment-anything's `SamPredictor` interface: embed an image once, then predict masks for prompts on it.

    Threads may share `predict_image` and `predict_images`. `set_image` changes the predictor: give each thread one of
    its own. They share the model.

    Args:
        model: A model from `RWKVSAM.from_pretrained`. By default the bundled model, which is loaded at first use.
        mask_threshold: Logits above it are inside a mask.
        max_hole_area: Holes in masks of at most this area are filled, in pixels of low-resolution masks. Needs scipy.
        max_sprinkle_area: Separate regions of at most this area are removed. Needs scipy.

    Source: the signatures and return values of segment-anything's `SamPredictor` and SAM 2's `SAM2ImagePredictor`.
    """

    def __init__(
        self,
        model: RWKVSAM | None = None,
        mask_threshold: float = 0.0,
        max_hole_area: float = 0.0,
        max_sprinkle_area: float = 0.0,
    ) -> None:
        super().__init__()
        self._model = model
        self.mask_threshold = mask_threshold
        self.max_hole_area, self.max_sprinkle_area = max_hole_area, max_sprinkle_area
        if max_hole_area > 0 or max_sprinkle_area > 0:
            scipy_ndimage("max_hole_area" if max_hole_area > 0 else "max_sprinkle_area")  # raises now, not at an image

    @property
    def model(self) -> RWKVSAM:
        """The model that runs."""
        if self._model is None:
            with _loading:  # once, from however many threads
                if self._model is None:
                    self._model = RWKVSAM.from_pretrained()
        return self._model

    @property
    def image_size(self) -> int:
        return self.model.config.image_size

    @property
    def has_multimask(self) -> bool:
        return self.model.config.num_multimask_outputs > 0

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    def embed(self, pixels: np.ndarray, frame: ImageFrame) -> ImageEmbedding:
        return self._encode_arrays(pixels[None], frame)

    @torch.no_grad()  # not inference mode: the embedding may feed a head that is being trained
    def _encode_arrays(self, pixels: np.ndarray, frame: ImageFrame) -> ImageEmbedding:
        return self._encode(torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2), frame)

    def _encode(self, pixels: Tensor, frame: ImageFrame) -> ImageEmbedding:
        """Encode resized images `[B, 3, h, w]` of the frame, uint8 or normalized."""
        return self.model.encode_image(pixels, frame.input_size)

    def _decode(
        self,
        embedding: ImageEmbedding,
        point_coords: Tensor | None,
        point_labels: Tensor | None,
        boxes: Tensor | None,
        mask_input: Tensor | None,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return low-resolution logits and predicted IoUs of prompts in the frame of `image_size`."""
        return self.model.decode_masks(embedding, point_coords, point_labels, boxes, mask_input, multimask_output)

    def embed_batch(self, pixels: Sequence[np.ndarray], frame: ImageFrame) -> list[ImageEmbedding]:
        try:
            return list(self._encode_arrays(np.stack(pixels), frame))
        except torch.OutOfMemoryError:
            if len(pixels) == 1:
                raise
        half = len(pixels) // 2  # outside of `except`, whose error keeps the tensors of the failed call
        return self.embed_batch(pixels[:half], frame) + self.embed_batch(pixels[half:], frame)

    def in_callers_stream(self, function: Callable[[T], R]) -> Callable[[T], R]:
        if self.device.type != "cuda":
            return function
        stream = torch.cuda.current_stream(self.device)  # of this thread; another thread begins with the default one

        def run(item: T) -> R:
            with torch.cuda.stream(stream):
                return function(item)

        return run

    @property
    def images_at_once(self) -> int:
        return IMAGES_AT_ONCE if self.device.type == "cuda" else 1

    @torch.inference_mode()
    def decode(
        self, embedding: ImageEmbedding, inputs: dict[str, np.ndarray], multimask_output: bool
    ) -> tuple[Tensor, np.ndarray]:
        prompts = {name: torch.from_numpy(array).to(self.device) for name, array in inputs.items()}
        points, labels, boxes, mask = (prompts.get(n) for n in ("point_coords", "point_labels", "boxes", "mask_input"))
        low, iou = self._decode(embedding, points, labels, boxes, mask, multimask_output)
        return low, iou.float().cpu().numpy()

    @torch.inference_mode()
    def enlarge(self, low_res_masks: Tensor, frame: ImageFrame, return_logits: bool) -> np.ndarray:
        logits = masks_to_image(low_res_masks, frame)
        return (logits if return_logits else logits > self.mask_threshold).cpu().numpy()

    def cleaned(self, low_res_masks: Tensor) -> Tensor:
        if (self.max_hole_area <= 0 and self.max_sprinkle_area <= 0) or len(low_res_masks) == 0:
            return low_res_masks
        areas = self.mask_threshold, self.max_hole_area, self.max_sprinkle_area
        flat = self.to_numpy(low_res_masks).reshape(-1, *low_res_masks.shape[2:])
        masks = [without_small_areas(mask, *areas) for mask in flat]
        return torch.from_numpy(np.stack(masks)).view(low_res_masks.shape).to(low_res_masks.device)

    def to_numpy(self, low_res_masks: Tensor) -> np.ndarray:
        return low_res_masks.float().cpu().numpy()

    @property
    def embedding(self) -> ImageEmbedding:
        """The embedding of the image that is set, for `set_embedding`, or `save` to a file.

        It names the image's size and the model's fingerprint, which takes some hundredths of a second.

        Raises:
            RuntimeError: No image is set.
        """
        size = self._set.frame.original_size
        return replace(self._embedding, original_size=size, fingerprint=self._fingerprint())

    def _fingerprint(self) -> str:
        return weights_sha256(self.model, torch.bfloat16)  # the same for models of several dtypes from one checkpoint

    def set_embedding(self, embedding: ImageEmbedding) -> None:
        """Use an embedding of one image instead of an image. Prompts cannot zoom then.

        Args:
            embedding: `Predictor.embedding` of a predictor with the same model, or `ImageEmbedding.load(file)` of it.
                It may be on any device and in any dtype, and the model that made it may have had another dtype.

        Raises:
            TypeError: Not an `ImageEmbedding`.
            ValueError: It was made by other weights, at another input size, or of several images, or it does not name
                its image's size. The previous image stays set.
        """
        if not isinstance(embedding, ImageEmbedding):
            raise TypeError(f"embedding must be an ImageEmbedding, got {short_repr(embedding)}")
        embedding.check()
        if len(embedding) != 1:
            raise ValueError(f"the embedding holds {len(embedding)} images; pass one of them, such as embedding[0]")
        if embedding.original_size is None:
            raise ValueError(
                "the embedding does not name its image's size; use `Predictor.embedding`, or "
                "`dataclasses.replace(embedding, original_size=(H, W))` for one of `encode_image`"
            )
        S = self.model.config.image_size
        if embedding.input_size != (S, S):
            H, W = embedding.input_size
            raise ValueError(f"the embedding is of an input of {H}x{W} pixels; this model's has {S} a side")
        if embedding.fingerprint not in (None, self._fingerprint()):
            raise ValueError("the embedding was made by a model with other weights; set the image again")
        self._set_embedding(embedding.to(self.device, self.model.dtype), embedding.original_size)

    @property
    def transform(self) -> ResizeLongestSide:
        """Resizing of images and coordinates to the model input, as in SAM."""
        return ResizeLongestSide(self.image_size)

    @property
    def original_size(self) -> tuple[int, int]:
        """`(H, W)` of the image that is set. Set it with `features` to restore an image, as programs for SAM do.

        Raises:
            RuntimeError: No image is set.
        """
        return self._set.frame.original_size

    @original_size.setter
    def original_size(self, size: tuple[int, int]) -> None:
        self._restored["original_size"] = (int(size[0]), int(size[1]))
        self._restore()

    @property
    def input_size(self) -> tuple[int, int]:
        """`(h, w)` of the resized image within the model input. It follows from `original_size`; setting it is ignored.

        Raises:
            RuntimeError: No image is set.
        """
        return self._set.frame.resized_size

    @input_size.setter
    def input_size(self, size: tuple[int, int]) -> None:
        pass

    @property
    def features(self) -> Tensor:
        """The embedding in one tensor, `ImageEmbedding.packed`: `[1, 1280, S/16, S/16]`. SAM's has 256 channels.

        Raises:
            RuntimeError: No image is set.
            ValueError: A tensor that is set has another shape.
        """
        return self._embedding.packed()

    @features.setter
    def features(self, tensor: Tensor | None) -> None:
        if tensor is None:  # as SAM's reset_image leaves it
            self.reset_image()
            return
        side = self.model.config.image_size // 16
        grid = self.model.prompt_encoder.grid(side, side)
        self._restored["features"] = ImageEmbedding.unpacked(tensor.to(self.device, self.model.dtype), grid)
        self._restore()

    @property
    def is_image_set(self) -> bool:
        """True after `set_image`. Setting it to False forgets the image, and to True is ignored."""
        return super().is_image_set

    @is_image_set.setter
    def is_image_set(self, value: bool) -> None:
        if not value:
            self.reset_image()

    def reset_image(self) -> None:
        super().reset_image()
        self._restored: dict[str, Any] = {}

    def _restore(self) -> None:
        """Set the image once its features and its size are there."""
        if self._restored.keys() == {"features", "original_size"}:
            self._set_embedding(self._restored["features"], self._restored["original_size"])

    @torch.no_grad()
    def set_torch_image(self, transformed_image: Tensor, original_image_size: tuple[int, ...]) -> None:
        """Embed an image that `transform.apply_image_torch` or `apply_image` resized.

        Args:
            transformed_image: `[1, 3, h, w]` RGB of 0..255, any dtype, with a longer side of `image_size`.
            original_image_size: `(H, W)` of the image before.

        Raises:
            ImageError: The shape does not fit.
        """
        frame = ImageFrame.of((int(original_image_size[0]), int(original_image_size[1])), self.image_size)
        if tuple(transformed_image.shape) != (1, 3, *frame.resized_size):
            h, w = frame.resized_size
            raise ImageError(
                f"transformed_image must be [1, 3, {h}, {w}], got {list(transformed_image.shape)}; "
                "predictor.transform.apply_image_torch(image) resizes it"
            )
        pixels = transformed_image.to(self.device)
        if pixels.dtype != torch.uint8:
            pixels = normalize_values(pixels)
        self._set_embedding(self._encode(pixels, frame), frame.original_size)

    @torch.no_grad()  # not inference mode: programs change the masks in place
    def predict_torch(
        self,
        point_coords: Tensor | None,
        point_labels: Tensor | None,
        boxes: Tensor | None = None,
        mask_input: Tensor | None = None,
        multimask_output: bool | None = None,
        return_logits: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predict masks for N prompts in the frame of the model input, with tensors on the model's device, as in SAM.

        Args:
            point_coords: `[N, P, 2]` (x, y) in the input frame, as `transform.apply_coords_torch` gives them.
            point_labels: `[N, P]`: 1 foreground, 0 background, -1 padding.
            boxes: `[N, 4]` (x1, y1, x2, y2) in the input frame.
            mask_input: `[N, 1, h, w]`, low-resolution logits of an earlier prediction.
            multimask_output: Return three masks instead of one. By default three if the model has them, as in SAM.
            return_logits: Return float32 logits in place of bool masks.

        Returns:
            Masks `[N, n, H, W]` in the image frame, predicted IoUs `[N, n]` and low-resolution logits `[N, n, h, w]`.
            The first takes 4 bytes per pixel while it is made: pass few prompts at once on large images.

        Raises:
            RuntimeError: No image is set.
            PromptError, TypeError: Prompts whose shapes or labels do not fit.
        """
        if multimask_output is None:
            multimask_output = self.has_multimask
        given = (point_coords, point_labels, boxes, mask_input)
        points, labels, corners, masks = (None if t is None else t.to(self.device) for t in given)
        low, iou = self._decode(self._embedding, points, labels, corners, masks, multimask_output)
        logits = masks_to_image(self.cleaned(low), self._set.frame)
        return (logits if return_logits else logits > self.mask_threshold), iou.float(), low.float()

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | os.PathLike[str] | None = None,
        *,
        mask_threshold: float = 0.0,
        max_hole_area: float = 0.0,
        max_sprinkle_area: float = 0.0,
        **options: Any,
    ) -> Predictor:
        """Return a predictor of `RWKVSAM.from_pretrained(model_id, **options)`, as SAM 2's predictors have it."""
        model = RWKVSAM.from_pretrained(model_id, **options)
        return cls(model, mask_threshold, max_hole_area, max_sprinkle_area)

    def get_image_embedding(self) -> Tensor:
        """Return the image embedding `[1, 256, h, w]`, channels first as in SAM.

        Raises:
            RuntimeError: No image is set.
        """
        return self._embedding.image_embed.permute(0, 3, 1, 2)


_default = Predictor()  # loads the bundled model at the first call and keeps it
predict = _default.predict_image
predict_images = _default.predict_images
