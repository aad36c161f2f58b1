"""RWKV-SAM: `encode_image` once for an image, `decode_masks` for every prompt on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..checkpoint import load_model, save_model
from ..config import ModelConfig
from ..errors import PromptError
from ..prompt_checks import check_labels, check_shapes
from ..triton_kernels.prompt_tokens import ABSENT
from .backbone import Backbone, Neck
from .embedding import ImageEmbedding
from .graphed import GraphedCalls, can_use_graph
from .layers import has_global_hooks, plain
from .mask_decoder import MaskDecoder
from .prompt_encoder import PromptEncoder

if TYPE_CHECKING:
    from typing_extensions import Self

_COMPILED = ("encode_image", "decode_masks")

Method = TypeVar("Method", bound=Callable[..., Any])


def _in_own_dtype(method: Method) -> Method:
    """Wrap a method so that it computes in the module's dtype, also under `torch.autocast`."""

    @wraps(method)
    def call(self: RWKVSAM, *args: Any, **kwargs: Any) -> Any:
        device = self.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):  # autocast does not know "meta"
            return method(self, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return method(self, *args, **kwargs)

    return cast(Method, call)


class RWKVSAM(nn.Module):
    """A promptable segmenter with a bidirectional-RWKV backbone.

    It computes in its parameters' dtype, with or without `torch.autocast`. For bfloat16 use
    `from_pretrained(..., dtype=torch.bfloat16)` or `model.to(torch.bfloat16)`.

    On CUDA with Triton, without gradients, `encode_image` and `decode_masks` run in CUDA graphs, recorded once for each
    shape. Graphs hold the addresses of the parameters. After a change to part of a model that has run, such as
    `model.backbone.to(...)`, `model.neck = ...` or `model.prompt_encoder.load_state_dict(...)`, call
    `model.to(model.device)`, which forgets the graphs.

    Attributes:
        config: The model's sizes.
        cuda_graphs: Set to False to disable CUDA graphs.

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
        self._graphed = GraphedCalls()
        self._all_parameters: tuple[Tensor, ...] = ()  # cached: collecting them takes as long as a prompt
        self._all_hooks: tuple[Mapping[int, Any], ...] = ()  # likewise; PyTorch changes the dicts in place

    def _forget(self) -> None:
        self._graphed.clear()
        self._all_parameters, self._all_hooks = (), ()

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> RWKVSAM:
        self._forget()  # `to`, `half` and `cuda` give parameters new addresses
        super()._apply(fn, *args, **kwargs)
        if self.device.type == "cuda":
            super()._apply(_as_kernels_read)
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load a state dict as `nn.Module.load_state_dict` does."""
        self._forget()
        return super().load_state_dict(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.mask_decoder.iou_token.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters, in which the model computes."""
        return self.mask_decoder.iou_token.dtype

    @_in_own_dtype
    def encode_image(self, pixels: Tensor, input_size: tuple[int, int] | None = None) -> ImageEmbedding:
        """Run the backbone, the neck and the part of the decoder that depends on the image alone.

        Args:
            pixels: `[B, 3, h, w]` RGB. Either uint8, or floating point and normalized as `transforms.preprocess` does;
                the latter are cast to the model's dtype.
            input_size: `(H, W)`, multiples of 16. Normalized pixels are padded to it with zeros on the right and
                below. By default (h, w).

        Raises:
            TypeError: Pixels are neither floating point nor uint8.
            ValueError: A shape or a size does not fit.
        """
        if not pixels.is_floating_point() and pixels.dtype != torch.uint8:
            raise TypeError(
                f"pixels must be floating point and normalized, or uint8, got {pixels.dtype}; "
                "`transforms.preprocess` makes the former from an image, `transforms.resize` the latter"
            )
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"pixels must be [B, 3, h, w], got {list(pixels.shape)}")
        h, w = pixels.shape[2:]
        if 0 in (h, w):
            raise ValueError(f"pixels are empty: {list(pixels.shape)}")
        H, W = (h, w) if input_size is None else input_size
        if H % 16 or W % 16:
            sides = "height and width of pixels" if input_size is None else "numbers in input_size"
            raise ValueError(f"the {sides} must be multiples of 16, got {H}x{W}; a larger input_size pads the pixels")
        if h > H or w > W:
            raise ValueError(f"pixels of {h}x{w} are larger than input_size {H}x{W}; resize them first")
        if pixels.is_floating_point():
            pixels = pixels.to(self.dtype)
        if not pixels.is_cuda:  # the kernel takes any layout
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        x = pixels.permute(0, 2, 3, 1)
        tensors = self._graphed.encode(self, x, (H, W)) if self._use_graph(x) else None
        if tensors is not None:
            image_pe = self._graphed.grid(self.prompt_encoder.grid, H // 16, W // 16)
        else:
            image_embed, *stages = self.embed(x, (H, W))
            tensors = image_embed, self.mask_decoder.project_image(*stages)
            image_pe = self.prompt_encoder.grid(H // 16, W // 16)
        image_embed, high_res_feats = tensors
        return ImageEmbedding(image_embed, image_pe, high_res_feats, (H, W))

    def embed(self, pixels: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Run backbone, whose arguments these are, and neck. Return image_embed and the maps of stages 1 and 2."""
        backbone, neck = self.backbone, self.neck
        if plain(backbone, neck, kinds=(Backbone, Neck)) and plain(backbone.norm, *neck):
            *stages, final = backbone(pixels, *options, normed=False)
            return neck(final, backbone.norm), *stages
        *stages, final = backbone(pixels, *options)
        return neck(final), *stages

    def forward(
        self,
        pixels: Tensor,
        point_coords: Tensor | None = None,
        point_labels: Tensor | None = None,
        boxes: Tensor | None = None,
        mask_input: Tensor | None = None,
        multimask_output: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Encode images and decode the same number of prompts on each, for wrappers that call the model.

        `encode_image` and `decode_masks` serve interactive use, which encodes an image once for many prompts.

        Args:
            pixels: `[B, 3, H, W]`, as in `encode_image`.
            point_coords: `[B, N, P, 2]` (x, y) in the input frame, or `[N, P, 2]` for a single image.
            point_labels: `[B, N, P]` or `[N, P]` integer, as in `decode_masks`.
            boxes: `[B, N, 4]` or `[N, 4]` (x1, y1, x2, y2) in the input frame.
            mask_input: `[B, N, 1, H/4, W/4]` or `[N, 1, H/4, W/4]` logits.
            multimask_output: Return the three masks for ambiguous prompts instead of the single one.

        Returns:
            low_res_masks: `[B, N, n, H/4, W/4]` logits, or `[N, n, H/4, W/4]` if the prompts have no B.
            iou_predictions: `[B, N, n]` or `[N, n]`, the predicted IoU of each mask.

        Raises:
            TypeError, ValueError, PromptError: As `encode_image` and `decode_masks` do, or if the prompts are not one
                set for each image.
        """
        given = (point_coords, point_labels, boxes, mask_input)
        batched = {t.ndim == rank for t, rank in zip(given, (4, 3, 3, 5), strict=True) if isinstance(t, Tensor)}
        B = len(pixels)
        if batched == {True}:
            sets = {len(t) for t in given if t is not None}
            if sets != {B}:
                raise PromptError(f"there are {B} images, but prompts for {sorted(sets)}")
        elif B != 1 or len(batched) > 1:
            raise PromptError(f"{B} images need prompts [{B}, N, ...], one set for each image")
        embedding = self.encode_image(pixels)
        if batched != {True}:
            return self.decode_masks(embedding, *given, multimask_output)
        results = []
        for i, one in enumerate(embedding):
            points, labels, box, mask = (None if t is None else t[i] for t in given)
            results.append(self.decode_masks(one, points, labels, box, mask, multimask_output))
        low, iou = zip(*results, strict=True)
        return torch.stack(low), torch.stack(iou)

    def compile(self, **options: Any) -> None:
        """Compile `encode_image` and `decode_masks` in place, and so `forward`, which calls them.

        Copies and pickles of the model are not compiled.

        Args:
            options: Keywords of `torch.compile`, such as `dynamic=True` for images and prompts of any size.
        """
        for name in _COMPILED:
            setattr(self, name, torch.compile(getattr(type(self), name).__get__(self), **options))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in (*_COMPILED, "_compiled_call_impl")}

    def _use_graph(self, on_device: Tensor, *others: Tensor | None) -> bool:
        if not self.cuda_graphs or getattr(self, "_is_replica", False):  # DataParallel's copies last one call
            return False
        usable = can_use_graph(on_device, lambda: self._needs_grad(on_device, *others))
        return usable and on_device.device == self.device and not self._has_hooks()

    def _has_hooks(self) -> bool:
        if not self._all_hooks:
            self._all_hooks = tuple(h for m in self.modules() for h in (m._forward_hooks, m._forward_pre_hooks))
        return any(self._all_hooks) or has_global_hooks()  # a graph would not call them

    def _needs_grad(self, *tensors: Tensor | None) -> bool:
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
        """Decode the masks of N prompts on one image. Stateless: safe to call from several threads.

        Args:
            embedding: Embedding of one image; `embedding[i]` picks one of a batch.
            point_coords: `[N, P, 2]` (x, y) in the input frame.
            point_labels: `[N, P]` integer, or float with whole values: 1 foreground, 0 background, -1 padding. Values
                are checked on the CPU only, because reading them on a GPU would synchronize.
            boxes: `[N, 4]` (x1, y1, x2, y2) in the input frame.
            mask_input: `[N, 1, H/4, W/4]` logits, as returned for an earlier prompt.
            multimask_output: Return the three masks for ambiguous prompts instead of the single one.

        Returns:
            low_res_masks: `[N, n, H/4, W/4]` logits; a pixel belongs to the mask if its logit is positive.
            iou_predictions: `[N, n]`, the predicted IoU of each mask.

        Raises:
            TypeError: A prompt is not a tensor.
            PromptError: Shapes or labels do not fit, there is no prompt, or `multimask_output` on a single-mask model.
            ValueError: The embedding holds several images.
        """
        mask_slice = self._mask_slice(embedding, multimask_output)
        return self._decode(embedding, mask_slice, point_coords, point_labels, boxes, mask_input)

    def decode_all(
        self,
        embedding: ImageEmbedding,
        point_coords: Tensor | None = None,
        point_labels: Tensor | None = None,
        boxes: Tensor | None = None,
        mask_input: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Decode every mask output, as `decode_masks` does: the single mask first, then the three; for training."""
        return self._decode(embedding, slice(None), point_coords, point_labels, boxes, mask_input)

    @_in_own_dtype
    def decode_where(
        self,
        embedding: ImageEmbedding,
        point_coords: Tensor,
        point_labels: Tensor,
        keep: Callable[[Tensor], Tensor],
        multimask_output: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Decode only the masks that promise well: others are not upscaled, which takes most of a prompt's time.

        Args:
            embedding, point_coords, point_labels, multimask_output: As in `decode_masks`.
            keep: Function from predicted IoUs `[N, n]` to the prompts `[N]` bool whose masks are wanted.

        Returns:
            low_res_masks: `[K, n, H/4, W/4]` logits of the K prompts that are kept.
            iou_predictions: `[N, n]` of all prompts.

        Raises:
            TypeError, PromptError, ValueError: As `decode_masks` does.
        """
        mask_slice = self._mask_slice(embedding, multimask_output)
        _check_prompts(embedding.input_size, point_coords, point_labels, None, None)
        coords, labels = self.prompt_encoder.points(point_coords, point_labels.long(), None)
        device = embedding.image_embed.device
        return self._masks(embedding, coords.to(device), labels.to(device), None, mask_slice, keep=keep)

    def _mask_slice(self, embedding: ImageEmbedding, multimask_output: bool) -> slice:
        if len(embedding) != 1:
            raise ValueError(f"embedding holds {len(embedding)} images; decode them one at a time with embedding[i]")
        if multimask_output and not self.config.num_multimask_outputs:
            raise PromptError("multimask_output=True needs a model with num_multimask_outputs=3; this one has one mask")
        return slice(1, None) if multimask_output else slice(0, 1)

    @_in_own_dtype
    def _decode(self, embedding: ImageEmbedding, mask_slice: slice, *prompts: Tensor | None) -> tuple[Tensor, Tensor]:
        if len(embedding) != 1:
            raise ValueError(f"embedding holds {len(embedding)} images; decode them one at a time with embedding[i]")
        N = _check_prompts(embedding.input_size, *prompts)
        point_coords, point_labels, boxes, mask_input = prompts
        image_embed = embedding.image_embed
        if N == 0:
            H, W = embedding.input_size
            n = len(range(1 + self.config.num_multimask_outputs)[mask_slice])
            return image_embed.new_empty(0, n, H // 4, W // 4), image_embed.new_empty(0, n)
        if point_coords is None and boxes is None:
            assert mask_input is not None
            coords, labels = mask_input.new_empty(N, 0, 2), mask_input.new_empty((N, 0), dtype=torch.long)
        else:
            given = None if point_labels is None else point_labels.long()
            coords, labels = self.prompt_encoder.points(point_coords, given, boxes)
        coords, labels = coords.to(image_embed.device), labels.to(image_embed.device)
        if self._use_graph(image_embed, coords, mask_input):
            found = self._graphed.decode(self._masks, embedding, coords, labels, mask_input, mask_slice)
            if found is not None:
                return found
        return self._masks(embedding, coords, labels, mask_input, mask_slice)

    def _masks(
        self,
        embedding: ImageEmbedding,
        coords: Tensor,
        labels: Tensor,
        mask_input: Tensor | None,
        mask_slice: slice,
        padded: bool = False,
        keep: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Decode points, of which those of label ABSENT are not to be seen if `padded`."""
        if mask_input is None:
            dense = self.prompt_encoder.no_mask_embed
        else:
            dense = self.prompt_encoder.mask_downscaling(mask_input.to(self.device, self.dtype).permute(0, 2, 3, 1))
        encoder, decoder, size = self.prompt_encoder, self.mask_decoder, embedding.input_size
        maps = (embedding.image_embed + dense, embedding.image_pe, embedding.high_res_feats)
        if type(encoder) is PromptEncoder and type(decoder) is MaskDecoder:  # else wrapped
            joined = encoder.joined(coords, labels, size, decoder.iou_token, decoder.mask_tokens)
            if joined is not None:
                tokens, seen = joined
                return decoder(*maps, tokens, mask_slice, seen if padded else None, keep, joined=True)
        return decoder(*maps, encoder(coords, labels, size), mask_slice, labels != ABSENT if padded else None, keep)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load a model, ready for inference.

        Args:
            source: Hub id ("organization/name"), folder with `config.json` and `model.safetensors`, or `.safetensors`
                file with its config in the metadata or beside it. By default the bundled tiny model.
            device: Device of the model, by default the CPU.
            dtype: torch.float32 (default), torch.float16, torch.bfloat16, or one of their names. "auto" is bfloat16 if
                the device has instructions for it, else float32.
            revision: Branch, tag or commit on the Hub.
            cache_dir: Folder for downloads, by default huggingface_hub's cache.
            token: Access token for private or gated models.
            local_files_only: Use the cache, never the network.

        Raises:
            CheckpointError: The files are not a model this release can load.
            DeviceError: The device or dtype cannot be used.
            HubError: The Hub or the cache cannot be used.
            FileNotFoundError: No such file or model.
        """
        return load_model(cls, source, device, dtype, revision, cache_dir, token, local_files_only)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.json`, `model.safetensors` and a model card into `folder`, in the model's dtype.

        Parts may be wrapped by `torch.compile`, DataParallel or FSDP. Existing files are replaced only if the new ones
        can be loaded.

        Raises:
            CheckpointError: The model could not be loaded again: it has adapters that are not merged, parametrizations,
                pruned or quantized tensors, tensors that its config does not describe, or NaN or infinite values.
            OSError: `folder` cannot be written.
        """
        save_model(type(self), self.config, self.state_dict(), folder)


def _as_kernels_read(t: Tensor) -> Tensor:
    """Return convolution weights `[N, C, k, k]` in the memory layout the kernels read, so that no call copies them.

    The innermost axis in memory is C, or N for depthwise convolutions. Other tensors are returned as they are.
    """
    if t.ndim != 4:
        return t
    if t.shape[1:] == (1, 3, 3):
        return t.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    return t.contiguous(memory_format=torch.channels_last)


def _check_prompts(input_size: tuple[int, int], *given: Tensor | None) -> int:
    """Return the number of prompts N after checking types, shapes and, on the CPU, labels."""
    names = ("point_coords", "point_labels", "boxes", "mask_input")
    prompts = {name: prompt for name, prompt in zip(names, given, strict=True) if prompt is not None}
    for name, prompt in prompts.items():
        if not isinstance(prompt, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(prompt).__name__}; `Predictor` takes any array")
    if "point_coords" in prompts and "point_labels" not in prompts:
        raise PromptError("point_coords were given without point_labels")
    if prompts and torch.compiler.is_compiling():  # `check_shapes` counts by a set, which would fix the sizes
        count = next(iter(prompts.values())).shape[0]
        if any(prompt.shape[0] != count for prompt in prompts.values()):
            raise PromptError("prompts differ in number")
    else:
        count, _ = check_shapes(prompts, (input_size[0] // 4, input_size[1] // 4), optional_batch=False)
    if (labels := prompts.get("point_labels")) is not None:
        if labels.is_complex() or labels.dtype == torch.bool:
            raise PromptError(f"point_labels must be integers or whole floats, got {labels.dtype}")
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            check_labels(labels.flatten().tolist())
    if (mask_input := prompts.get("mask_input")) is not None and mask_input.dtype in (torch.bool, torch.uint8):
        raise PromptError(
            f"mask_input must be logits, got a mask of {mask_input.dtype}; "
            "`fastsam_rwkv.mask_to_low_res_logits` makes logits from a mask [H, W]"
        )
    return count
