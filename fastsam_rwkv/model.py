"""RWKV-SAM: `encode_image` once for an image, `decode_masks` for every prompt on it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from .backbone import Backbone, Neck
from .checkpoint import load_model, save_model
from .config import ModelConfig
from .cuda_graphs import Beside, CudaGraphs
from .mask_decoder import MaskDecoder
from .predictor import predict
from .prompt_encoder import PromptEncoder
from .prompts import Prediction, unknown_label
from .transforms import normalise, pad
from .triton_kernels._triton import HAS_TRITON, in_transform

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import ArrayLike
    from PIL import Image
    from typing_extensions import Self

Method = TypeVar("Method", bound=Callable[..., Any])

LARGEST_BATCH = 64  # prompts in one graph; more go through it in turns
SMALLEST_TOKENS = 2
ABSENT = -2  # label of a point that pads a graph's input


def bucket(count: int, smallest: int = 1) -> int:
    """The next power of two: sizes that graphs are recorded for."""
    return max(smallest, 1 << max(0, count - 1).bit_length())


def _in_own_dtype(method: Method) -> Method:
    """A method of a module that computes in the module's dtype: under `torch.autocast`, too."""

    @wraps(method)
    def call(self: RWKVSAM, *args: Any, **kwargs: Any) -> Any:
        device = self.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):  # which does not know "meta"
            return method(self, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return method(self, *args, **kwargs)

    return cast(Method, call)


@dataclass(frozen=True)
class ImageEmbedding:
    """All that depends on the image only. Maps are channels-last.

    Attributes:
        image_embed: `[B, H/16, W/16, 256]`.
        image_pe: `[H/16, W/16, 256]`, the position encoding of that grid; embeddings may share it.
        high_res_feats: two maps `[B, H/4, W/4, 64]`: what stage 1 and stage 2 add to the first convolution of the
            mask refinement.
        input_size: `(H, W)` of the encoded pixels.
    """

    image_embed: Tensor
    image_pe: Tensor
    high_res_feats: tuple[Tensor, Tensor]
    input_size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.image_embed)

    def __getitem__(self, index: int) -> ImageEmbedding:
        """The embedding of one image of the batch, with B = 1."""
        i = range(len(self))[index]
        stage1, stage2 = self.high_res_feats
        return ImageEmbedding(
            self.image_embed[i : i + 1], self.image_pe, (stage1[i : i + 1], stage2[i : i + 1]), self.input_size
        )

    def __iter__(self) -> Iterator[ImageEmbedding]:
        return (self[i] for i in range(len(self)))


class RWKVSAM(nn.Module):
    """A promptable segmenter with a bidirectional-RWKV backbone.

    It computes in its parameters' dtype, whether `torch.autocast` is on or not: for bfloat16 use
    `from_pretrained(..., dtype=torch.bfloat16)` or `model.to(torch.bfloat16)`.

    Attributes:
        config: the sizes.
        cuda_graphs: on CUDA with Triton, without gradients, `encode_image` and `decode_masks` are recorded once for
            every shape and replayed from then on; set it to False to launch kernel by kernel. Graphs hold the
            parameters' addresses, and the position encoding of the last size is kept. So after a change to a part of
            a model that has run, as by `model.backbone.to(...)`, `model.neck = ...` or
            `model.prompt_encoder.load_state_dict(...)`, call `model.to(model.device)`, which forgets them.

    Source: arXiv 2406.19369; prompt encoder and mask decoder after SAM (arXiv 2304.02643).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.neck = Neck(config.embed_dim)
        self.prompt_encoder = PromptEncoder()
        self.mask_decoder = MaskDecoder(config)
        self.cuda_graphs = True
        self._graphs = CudaGraphs()
        self._last_grid: Tensor | None = None
        self._all_parameters: tuple[Tensor, ...] = ()  # once asked for: collecting them takes as long as a prompt

    def _forget(self) -> None:
        self._graphs.clear()
        self._last_grid = None
        self._all_parameters = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> RWKVSAM:
        self._forget()  # `to`, `half`, `cuda` give parameters new addresses
        super()._apply(fn, *args, **kwargs)
        if self.device.type == "cuda":  # the layout the kernels read filters in, which they would copy them into
            super()._apply(_as_kernels_read)
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """`nn.Module.load_state_dict`."""
        self._forget()
        return super().load_state_dict(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        return self.mask_decoder.iou_token.device

    @property
    def dtype(self) -> torch.dtype:
        return self.mask_decoder.iou_token.dtype

    @_in_own_dtype
    def encode_image(self, pixels: Tensor, input_size: tuple[int, int] | None = None) -> ImageEmbedding:
        """Run the backbone, the neck and the image-only part of the decoder.

        Args:
            pixels: `[B, 3, h, w]` RGB: floating point, normalised as `transforms.preprocess` does and cast to the
                model's dtype here; or uint8, normalised here.
            input_size: `(H, W)` to which normalised pixels are padded with zeros, to the right and below; (h, w) if
                left out. Multiples of 16.

        Raises:
            TypeError: pixels are neither floating point nor uint8.
            ValueError: wrong shape, or a size that does not fit.
        """
        if not pixels.is_floating_point() and pixels.dtype != torch.uint8:
            raise TypeError(
                f"pixels must be floating point and normalised, or uint8, got {pixels.dtype}; "
                "`transforms.preprocess` makes the former from an image, `transforms.resize` the latter"
            )
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"pixels must be [B, 3, h, w], got {list(pixels.shape)}")
        h, w = pixels.shape[2:]
        if 0 in (h, w):
            raise ValueError(f"pixels are empty: {list(pixels.shape)}")
        H, W = (h, w) if input_size is None else input_size
        if H % 16 or W % 16:
            whose = "height and width of pixels" if input_size is None else "numbers in input_size"
            raise ValueError(
                f"the {whose} must be multiples of 16, got {H}x{W}; give an input_size that is, and pixels are padded"
            )
        if h > H or w > W:
            raise ValueError(f"pixels of {h}x{w} are larger than input_size {H}x{W}; resize them first")
        if pixels.is_floating_point():
            pixels = pixels.to(self.dtype)
        if not pixels.is_cuda:  # where the kernel takes any layout
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        x = pixels.permute(0, 2, 3, 1)
        if self._graphs_serve(x):
            if (h, w) != (H, W):  # photographs differ in shape, and each shape would be recorded
                x = pad(normalise(x).to(self.dtype), (H, W))
            tensors = self._graphs(("encode", H, W), partial(self._encode_in_graph, input_size=(H, W)), (x,))
            image_pe = self._grid(H // 16, W // 16)
        else:
            tensors = self._encode(x, (H, W))
            image_pe = self.prompt_encoder.grid(H // 16, W // 16)
        image_embed, from_stage1, from_stage2 = tensors
        return ImageEmbedding(image_embed, image_pe, (from_stage1, from_stage2), (H, W))

    def _encode(self, x: Tensor, input_size: tuple[int, int]) -> tuple[Tensor, ...]:
        stage1, stage2, final = self.backbone(x, input_size)
        return self.neck(final), *self.mask_decoder.project_image(stage1, stage2)

    def _encode_in_graph(self, x: Tensor, input_size: tuple[int, int]) -> tuple[Tensor, ...]:
        """`_encode`, with the decoder's part beside the layers, each of which leaves room on the GPU for one image."""
        projected = Beside(self.mask_decoder.project_image, x.device)
        *stages, final = self.backbone(x, input_size, projected.start)  # the stages' maps, which must live till the end
        image_embed = self.neck(final)
        return image_embed, *projected.results()

    def _grid(self, h: int, w: int) -> Tensor:
        """The position encoding of the last size asked for: 16 small launches, an encoder's thirtieth part."""
        known = self._last_grid
        if known is None or known.shape[:2] != (h, w):
            with torch.inference_mode(False), torch.no_grad():  # any caller may use it in any mode
                known = self._last_grid = self.prompt_encoder.grid(h, w)
            torch.cuda.current_stream(known.device).synchronize()  # any stream may
        return known

    def _graphs_serve(self, on_device: Tensor, *others: Tensor | None) -> bool:
        return (
            HAS_TRITON  # the reference looks at values, which waits for the GPU
            and self.cuda_graphs
            and on_device.is_cuda
            and not torch.compiler.is_compiling()
            and not torch.cuda.is_current_stream_capturing()
            and not (torch.is_grad_enabled() and self._wants_gradient(on_device, *others))
            and not in_transform()
        )

    def _wants_gradient(self, *tensors: Tensor | None) -> bool:
        if not self._all_parameters:
            self._all_parameters = tuple(self.parameters())
        return any(t is not None and t.requires_grad for t in (*tensors, *self._all_parameters))

    def decode_masks(
        self,
        embedding: ImageEmbedding,
        point_coords: Tensor | None = None,
        point_labels: Tensor | None = None,
        boxes: Tensor | None = None,
        mask_input: Tensor | None = None,
        multimask_output: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Masks of N prompts on one image. Stateless: safe to call from several threads.

        Args:
            embedding: of one image (`embedding[i]` picks one of a batch).
            point_coords: `[N, P, 2]` (x, y) in model-input pixels.
            point_labels: `[N, P]` integer: 1 foreground, 0 background, -1 padding. Values are checked on the CPU only.
            boxes: `[N, 4]` (x1, y1, x2, y2) in model-input pixels.
            mask_input: `[N, 1, H/4, W/4]` logits, as returned for an earlier prompt.
            multimask_output: return the three masks for ambiguous prompts instead of the single one.

        Returns:
            low_res_masks: `[N, n, H/4, W/4]` logits; the mask is where they are positive.
            iou_predictions: `[N, n]`, the predicted quality of each mask.

        Raises:
            TypeError: a prompt is not a tensor.
            ValueError: shapes or labels do not fit, no prompt is given, or `multimask_output` on a single-mask model.
        """
        if multimask_output and not self.config.num_multimask_outputs:
            raise ValueError("multimask_output=True needs a model with num_multimask_outputs=3; this one has a single")
        chosen = slice(1, None) if multimask_output else slice(0, 1)
        return self._decode(embedding, point_coords, point_labels, boxes, mask_input, chosen)

    def decode_all(
        self,
        embedding: ImageEmbedding,
        point_coords: Tensor | None = None,
        point_labels: Tensor | None = None,
        boxes: Tensor | None = None,
        mask_input: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Like `decode_masks`, but every mask output: the single mask first, then the three; training needs them."""
        return self._decode(embedding, point_coords, point_labels, boxes, mask_input, slice(None))

    @_in_own_dtype
    def _decode(
        self,
        embedding: ImageEmbedding,
        point_coords: Tensor | None,
        point_labels: Tensor | None,
        boxes: Tensor | None,
        mask_input: Tensor | None,
        chosen: slice,
    ) -> tuple[Tensor, Tensor]:
        if len(embedding) != 1:
            raise ValueError(f"embedding holds {len(embedding)} images; decode them one at a time with embedding[i]")
        N = _check_prompts(embedding.input_size, point_coords, point_labels, boxes, mask_input)
        if N == 0:
            H, W = embedding.input_size
            n = len(range(1 + self.config.num_multimask_outputs)[chosen])
            return embedding.image_embed.new_empty(0, n, H // 4, W // 4), embedding.image_embed.new_empty(0, n)
        if point_coords is None and boxes is None:
            assert mask_input is not None
            coords, labels = mask_input.new_empty(N, 0, 2), mask_input.new_empty((N, 0), dtype=torch.long)
        else:
            given = None if point_labels is None else point_labels.long()
            coords, labels = self.prompt_encoder.points(point_coords, given, boxes)
        if not self._graphs_serve(embedding.image_embed, coords, mask_input):
            return self._masks(embedding, coords, labels, mask_input, chosen)
        return self._masks_by_graph(embedding, coords, labels, mask_input, chosen)

    def _masks(
        self,
        embedding: ImageEmbedding,
        coords: Tensor,
        labels: Tensor,
        mask_input: Tensor | None,
        chosen: slice,
        seen: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if mask_input is None:
            dense = self.prompt_encoder.no_mask_embed
        else:
            dense = self.prompt_encoder.mask_downscaling(mask_input.to(self.dtype).permute(0, 2, 3, 1))
        tokens = self.prompt_encoder(coords, labels, embedding.input_size)
        image_embed = embedding.image_embed + dense
        return self.mask_decoder(image_embed, embedding.image_pe, embedding.high_res_feats, tokens, chosen, seen)

    def _masks_by_graph(
        self, embedding: ImageEmbedding, coords: Tensor, labels: Tensor, mask_input: Tensor | None, chosen: slice
    ) -> tuple[Tensor, Tensor]:
        """Prompts padded to the next size there is a graph for; the padding is masked out, so masks do not change."""
        maps = (embedding.image_embed, embedding.image_pe, *embedding.high_res_feats)
        input_size = embedding.input_size

        def masks(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            image_embed, image_pe, stage1, stage2, coords, labels, *mask = tensors
            one = ImageEmbedding(image_embed, image_pe, (stage1, stage2), input_size)
            seen = labels != ABSENT
            return self._masks(one, coords, labels, mask[0] if mask else None, chosen, seen)

        N, M = labels.shape
        M_padded = bucket(M, SMALLEST_TOKENS)
        parts = []
        for first in range(0, N, LARGEST_BATCH):
            n = min(N - first, LARGEST_BATCH)
            padded = bucket(n)
            point_coords = coords.new_zeros(padded, M_padded, 2, dtype=torch.float32, device=self.device)
            point_labels = labels.new_full((padded, M_padded), ABSENT, dtype=torch.long, device=self.device)
            point_coords[:n, :M] = coords[first : first + n]
            point_labels[:n, :M] = labels[first : first + n]
            prompts = [point_coords, point_labels]
            if mask_input is not None:
                mask = mask_input.new_zeros(padded, *mask_input.shape[1:], dtype=self.dtype, device=self.device)
                mask[:n] = mask_input[first : first + n]
                prompts.append(mask)
            low, iou = self._graphs(("decode", *input_size, chosen.start, chosen.stop), masks, (*maps, *prompts))
            parts.append((low[:n], iou[:n]))
        if len(parts) == 1:
            return parts[0]
        low, iou = (torch.cat(column) for column in zip(*parts, strict=True))
        return low, iou

    def predict(
        self,
        image: str | os.PathLike[str] | Image.Image | np.ndarray,
        *,
        point_coords: ArrayLike | None = None,
        point_labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        boxes: ArrayLike | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = False,
        return_logits: bool = False,
    ) -> Prediction:
        """Masks at the image's size for prompts in the image's pixels.

        Args:
            image: a path, a PIL image, or a uint8 array `[H, W, 3]` RGB. EXIF orientation is applied to paths and PIL
                images, and prompts are in the upright picture.
            point_coords: `[P, 2]` (x, y) for one prompt, or `[N, P, 2]` for N prompts.
            point_labels: `[P]` or `[N, P]`: 1 foreground, 0 background. All foreground when left out.
            box: `[4]` (x1, y1, x2, y2), x2 and y2 exclusive: one prompt, with the points if there are any.
            boxes: `[N, 4]`, N prompts.
            mask_input: `[1, h, w]` or `[N, 1, h, w]` low-resolution logits of an earlier prediction.
            multimask_output: three masks for an ambiguous prompt, each with its score, instead of one.
            return_logits: float logits instead of booleans in `masks`.

        Returns:
            `Prediction(masks, scores, low_res_logits)`, numpy: `[n, H, W]`, `[n]`, `[n, h, w]` for one prompt, with N
            in front for N prompts.

        Raises:
            ValueError, TypeError: an image or a prompt that cannot be used; the message names it and the remedy.
            FileNotFoundError: there is no such file.
        """
        return predict(
            self,
            image,
            point_coords=point_coords,
            point_labels=point_labels,
            box=box,
            boxes=boxes,
            mask_input=mask_input,
            multimask_output=multimask_output,
            return_logits=return_logits,
        )

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load a model, ready for inference.

        Args:
            source: a Hub id ("organisation/name"), a folder with `config.json` and `model.safetensors`, or a
                `.safetensors` file with its config in the metadata or beside it. The bundled tiny model by default.
            device: where to put the model; the CPU by default.
            dtype: torch.float32 (default), torch.float16 or torch.bfloat16.
            revision: branch, tag or commit on the Hub.
            cache_dir: where downloads are kept; huggingface_hub's cache by default.
            token: access token for private or gated models.
            local_files_only: use the cache, never the network.

        Raises:
            CheckpointError: the files are not a model this release can load.
            OSError: the Hub or the cache cannot be used, or there is no such file or model.
        """
        return load_model(
            cls,
            source,
            device=device,
            dtype=dtype,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.json`, `model.safetensors` and a model card into `folder`, in the model's dtype."""
        save_model(self, folder)


def _as_kernels_read(t: Tensor) -> Tensor:
    """A convolution's weights `[N, C, k, k]` with channels innermost in memory: C, or N where it is depthwise."""
    if t.ndim != 4:
        return t
    if t.shape[1:] == (1, 3, 3):
        return t.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    return t.contiguous(memory_format=torch.channels_last)


def _check_labels(labels: Tensor) -> None:
    if labels.device.type != "cpu" or torch.compiler.is_compiling():  # on a GPU, looking is waiting
        return
    for label in labels.flatten().tolist():
        if label not in (-1, 0, 1):
            raise unknown_label(label)


def _check_prompts(
    input_size: tuple[int, int],
    point_coords: Tensor | None,
    point_labels: Tensor | None,
    boxes: Tensor | None,
    mask_input: Tensor | None,
) -> int:
    """The number of prompts N, once all shapes agree on it."""
    H, W = input_size
    given = {"point_coords": point_coords, "point_labels": point_labels, "boxes": boxes, "mask_input": mask_input}
    for name, prompt in given.items():
        if prompt is not None and not isinstance(prompt, Tensor):
            raise TypeError(
                f"{name} must be a torch.Tensor, got {type(prompt).__name__}; `predict` takes arrays and lists"
            )
    counts = {}
    if (point_coords is None) != (point_labels is None):
        raise ValueError("point_coords and point_labels must be given together")
    if point_coords is not None and point_labels is not None:
        if point_coords.ndim != 3 or point_coords.shape[2] != 2 or point_labels.shape != point_coords.shape[:2]:
            raise ValueError(
                "point_coords must be [N, P, 2] and point_labels [N, P], "
                f"got {list(point_coords.shape)} and {list(point_labels.shape)}"
            )
        if point_labels.is_floating_point() or point_labels.dtype == torch.bool:
            raise ValueError(f"point_labels must be integers, got {point_labels.dtype}")
        _check_labels(point_labels)
        counts["point_coords"] = len(point_coords)
    if boxes is not None:
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise ValueError(f"boxes must be [N, 4], got {list(boxes.shape)}")
        counts["boxes"] = len(boxes)
    if mask_input is not None:
        if mask_input.ndim != 4 or mask_input.shape[1:] != (1, H // 4, W // 4):
            raise ValueError(f"mask_input must be [N, 1, {H // 4}, {W // 4}], got {list(mask_input.shape)}")
        counts["mask_input"] = len(mask_input)
    if not counts:
        raise ValueError("no prompt: give point_coords with point_labels, boxes or mask_input")
    if len(set(counts.values())) > 1:
        raise ValueError(f"prompts differ in number: {counts}")
    return next(iter(counts.values()))
