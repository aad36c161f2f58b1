"""A model in the shape of segment-anything's `Sam`, for programs with a predictor or a generator of their own.

    from fastsam_rwkv.compat import SamAutomaticMaskGenerator, SamPredictor, sam_model_registry

    sam = sam_model_registry["vit_h"](checkpoint=None)  # the bundled model; or a folder, a file or a Hub id

The parts take and return tensors as SAM's do, channels first, in SAM's frame: images and coordinates of 1024 pixels,
low-resolution masks of 256. They resize to the model input inside. One thing differs: the image embedding holds all
maps in 1280 channels instead of 256, at a 16th of the model input.

Source: the names, arguments and results of https://github.com/facebookresearch/segment-anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .config import SAM_SIZE
from .errors import PromptError
from .modeling.embedding import ImageEmbedding
from .modeling.pixels import normalize, normalize_values, pad, resize_logits, resize_masks, shrink
from .modeling.rwkv_sam import RWKVSAM
from .predictor.automatic import AutomaticMaskGenerator
from .predictor.frame import ImageFrame
from .predictor.torch_predictor import Predictor


class ImageEncoder:
    """`sam.image_encoder`: pixels to an image embedding.

    Attributes:
        img_size: Side of the frame in pixels.
    """

    def __init__(self, model: RWKVSAM, img_size: int) -> None:
        self._model = model
        self.img_size = img_size

    def __call__(self, x: Tensor) -> Tensor:
        """Encode normalized and padded pixels `[B, 3, img_size, img_size]` to `[B, 1280, S/16, S/16]`."""
        return self._model.encode_image(shrink(x, self._model.config.image_size)).packed()


class PromptEncoder:
    """`sam.prompt_encoder`: points, boxes and masks to sparse and dense embeddings.

    Attributes:
        embed_dim: Channels, 256.
        image_embedding_size: `(S/16, S/16)` for a model input of S.
        input_image_size: `(img_size, img_size)`.
        mask_input_size: `(img_size/4, img_size/4)`.
    """

    embed_dim = 256

    def __init__(self, model: RWKVSAM, img_size: int) -> None:
        S = model.config.image_size
        self._model, self._scale = model, S / img_size
        self.image_embedding_size, self.input_image_size, self.mask_input_size = (
            (side, side) for side in (S // 16, img_size, img_size // 4)
        )

    def __call__(
        self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Encode N prompts in the frame.

        Args:
            points: Coordinates `[N, P, 2]` (x, y) and labels `[N, P]`: 1 foreground, 0 background, -1 padding.
            boxes: `[N, 4]` (x1, y1, x2, y2).
            masks: Low-resolution logits `[N, 1, img_size/4, img_size/4]`.

        Returns:
            Sparse `[N, M, 256]` and dense `[N, 256, S/16, S/16]` embeddings.

        Raises:
            PromptError: All three are None.
        """
        encoder, S = self._model.prompt_encoder, self._model.config.image_size
        device, dtype = self._model.device, self._model.dtype
        given = next((t for t in (points[0] if points else None, boxes, masks) if t is not None), None)
        if given is None:
            raise PromptError("no prompt: give points, boxes or masks")
        sparse = torch.empty(len(given), 0, self.embed_dim, device=device, dtype=dtype)
        if points is not None or boxes is not None:
            coords, labels = (None, None) if points is None else (points[0].to(device), points[1].to(device).long())
            corners = None if boxes is None else boxes.to(device).reshape(-1, 4) * self._scale
            coords = None if coords is None else coords * self._scale
            sparse = encoder(*encoder.points(coords, labels, corners), (S, S))
        if masks is None:
            dense = encoder.no_mask_embed[:, None, None].expand(len(given), -1, *self.image_embedding_size)
        else:
            logits = resize_logits(masks.to(device, dtype), S // 4)
            dense = encoder.mask_downscaling(logits.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return sparse, dense

    def get_dense_pe(self) -> Tensor:
        """Return the position encoding `[1, 256, S/16, S/16]` of the image embedding."""
        return self._model.prompt_encoder.grid(*self.image_embedding_size).permute(2, 0, 1)[None]


class MaskDecoder:
    """`sam.mask_decoder`: embeddings to masks."""

    def __init__(self, model: RWKVSAM, img_size: int) -> None:
        self._model, self._side = model, img_size // 4

    def __call__(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """Decode N prompts on one image.

        Args:
            image_embeddings: `[1, 1280, S/16, S/16]` of the image encoder.
            image_pe: `[1, 256, S/16, S/16]` of `get_dense_pe`.
            sparse_prompt_embeddings, dense_prompt_embeddings: Of the prompt encoder.
            multimask_output: Return the three masks for ambiguous prompts instead of the single one.

        Returns:
            Low-resolution logits `[N, n, img_size/4, img_size/4]` and predicted IoUs `[N, n]`, float32.

        Raises:
            ValueError: The embedding is not one of a single image by this model.
            PromptError: `multimask_output` with a model that has one mask.
        """
        device, dtype = self._model.device, self._model.dtype
        grid = image_pe[0].permute(1, 2, 0).to(device, dtype)
        embedding = ImageEmbedding.unpacked(image_embeddings.to(device, dtype), grid)
        mask_slice = self._model._mask_slice(embedding, multimask_output)  # checks both
        image_embed = embedding.image_embed + dense_prompt_embeddings.to(device, dtype).permute(0, 2, 3, 1)
        low, iou = self._model.mask_decoder(
            image_embed,
            grid,
            embedding.high_res_feats,
            sparse_prompt_embeddings.to(device, dtype),
            mask_slice,
        )
        return resize_logits(low.float(), self._side), iou.float()


class Sam(nn.Module):
    """A model in the shape of segment-anything's `Sam`.

    Args:
        model: The model that runs.
        img_size: Side of the frame that callers see, in pixels, a multiple of 4.

    Attributes:
        model: The same.
        image_encoder, prompt_encoder, mask_decoder: Its parts, which share its parameters and are no modules.
    """

    mask_threshold = 0.0
    image_format = "RGB"

    def __init__(self, model: RWKVSAM, img_size: int = SAM_SIZE) -> None:
        super().__init__()
        self.model = model
        self.image_encoder = ImageEncoder(model, img_size)
        self.prompt_encoder = PromptEncoder(model, img_size)
        self.mask_decoder = MaskDecoder(model, img_size)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    def preprocess(self, x: Tensor) -> Tensor:
        """Normalize pixels of 0..255 `[3, h, w]` or `[B, 3, h, w]`, and pad them to `img_size`."""
        batched = x if x.ndim == 4 else x[None]
        S = self.image_encoder.img_size
        pixels = normalize_values(batched.to(self.device)).permute(0, 2, 3, 1)
        pixels = pad(pixels, (S, S)).permute(0, 3, 1, 2)
        return pixels if x.ndim == 4 else pixels[0]

    def postprocess_masks(self, masks: Tensor, input_size: tuple[int, ...], original_size: tuple[int, ...]) -> Tensor:
        """Resize low-resolution logits `[N, n, h, w]` to float32 logits `[N, n, H, W]` in the image frame.

        Args:
            masks: Logits.
            input_size: `(h, w)` of the resized image, without the padding.
            original_size: `(H, W)` of the image.
        """
        S = self.image_encoder.img_size
        resized, original = ((int(size[0]), int(size[1])) for size in (input_size, original_size))
        return resize_masks(masks, (S, S), resized, original)

    @torch.no_grad()
    def forward(self, batched_input: list[dict[str, Any]], multimask_output: bool) -> list[dict[str, Tensor]]:
        """Predict masks for a list of images and their prompts.

        Args:
            batched_input: For each image a dict with `image` `[3, h, w]` of 0..255, resized to a longer side of
                `image_encoder.img_size`; `original_size` (H, W); and any of `point_coords` `[N, P, 2]` and
                `point_labels` `[N, P]`, `boxes` `[N, 4]` in that frame, and `mask_inputs` `[N, 1, h, w]`.
            multimask_output: Return the three masks for ambiguous prompts instead of the single one.

        Returns:
            For each image a dict with `masks` `[N, n, H, W]` bool, `iou_predictions` `[N, n]` and `low_res_logits`
            `[N, n, h, w]`.
        """
        results = []
        for one in batched_input:
            features = self.image_encoder(self.preprocess(one["image"])[None])
            points = (one["point_coords"], one["point_labels"]) if "point_coords" in one else None
            sparse, dense = self.prompt_encoder(points, one.get("boxes"), one.get("mask_inputs"))
            low, iou = self.mask_decoder(features, self.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output)
            logits = self.postprocess_masks(low, one["image"].shape[-2:], one["original_size"])
            results.append({"masks": logits > self.mask_threshold, "iou_predictions": iou, "low_res_logits": low})
        return results


class SamPredictor(Predictor):
    """`Predictor` with the constructor of segment-anything's class and its frame of 1024 pixels.

    `get_image_embedding` and `features` are the packed embedding. Decoders of `export onnx --contract sam` take it.
    """

    def __init__(self, sam_model: Sam | RWKVSAM) -> None:
        super().__init__(_unwrapped(sam_model))
        self._frame_size = sam_model.image_encoder.img_size if isinstance(sam_model, Sam) else SAM_SIZE

    @property
    def image_size(self) -> int:
        return self._frame_size

    def _encode(self, pixels: Tensor, frame: ImageFrame) -> ImageEmbedding:
        square = pad(normalize(pixels.permute(0, 2, 3, 1)), frame.input_size).permute(0, 3, 1, 2)
        return self.model.encode_image(shrink(square, self.model.config.image_size))

    def _decode(
        self,
        embedding: ImageEmbedding,
        point_coords: Tensor | None,
        point_labels: Tensor | None,
        boxes: Tensor | None,
        mask_input: Tensor | None,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        S = self.model.config.image_size
        points, corners = (None if t is None else t * (S / self.image_size) for t in (point_coords, boxes))
        masks = None if mask_input is None else resize_logits(mask_input, S // 4)
        low, iou = super()._decode(embedding, points, point_labels, corners, masks, multimask_output)
        return resize_logits(low.float(), self.image_size // 4), iou

    def get_image_embedding(self) -> Tensor:
        """Return the packed embedding `[1, 1280, S/16, S/16]` for a model input of S.

        Raises:
            RuntimeError: No image is set.
        """
        return self.features


class SamAutomaticMaskGenerator(AutomaticMaskGenerator):
    """`AutomaticMaskGenerator` of a `Sam`, with the arguments of segment-anything's class."""

    def __init__(self, model: Sam | RWKVSAM, *args: Any, **kwargs: Any) -> None:
        super().__init__(_unwrapped(model), *args, **kwargs)


def _unwrapped(model: Sam | RWKVSAM) -> RWKVSAM:
    return model.model if isinstance(model, Sam) else model


def build_sam(checkpoint: str | os.PathLike[str] | None = None) -> Sam:
    """Load a model as a `Sam`.

    Args:
        checkpoint: As in `RWKVSAM.from_pretrained`: a folder, a `.safetensors` file or a Hub id. By default the bundled
            model.

    Raises:
        CheckpointError, HubError, FileNotFoundError: As in `RWKVSAM.from_pretrained`.
    """
    return Sam(RWKVSAM.from_pretrained(checkpoint))


# whatever variant a program asks for, the checkpoint says what is built
sam_model_registry: dict[str, Callable[..., Sam]] = dict.fromkeys(
    ("default", "vit_h", "vit_l", "vit_b", "vit_t", "tiny", "small", "base", "large"), build_sam
)
