"""`RwkvSamForMaskGeneration`: RWKV-SAM behind the interface of Hugging Face transformers' `SamModel`.

    from transformers import SamProcessor
    from fastsam_rwkv.hf import RwkvSamForMaskGeneration

    model = RwkvSamForMaskGeneration.from_pretrained("organization/model")
    processor = SamProcessor.from_pretrained("organization/model")

Importing this module registers the model with transformers' Auto classes. Folders of `save_pretrained` also name it for
`trust_remote_code=True`. Needs the extra `transformers`.

Source: the names, arguments and results of `SamModel` in https://github.com/huggingface/transformers.
"""

from __future__ import annotations

import os
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from .config import MODEL_TYPE, ModelConfig
from .errors import InputError, listed
from .modeling.embedding import ImageEmbedding
from .modeling.rwkv_sam import RWKVSAM

try:
    from transformers import AutoConfig, AutoModel, AutoModelForMaskGeneration, PretrainedConfig, PreTrainedModel
    from transformers.models.sam.modeling_sam import SamImageSegmentationOutput
except ImportError as error:
    raise ImportError(f"{error}; pip install 'fastsam-rwkv[transformers]'") from error

PADDING = -10  # label of points that transformers' processor adds to make prompts of one length
# arguments of transformers' loader that change nothing here
IGNORED = {
    "trust_remote_code", "_from_auto", "_from_pipeline", "_commit_hash", "adapter_kwargs", "low_cpu_mem_usage",
    "use_safetensors", "weights_only", "code_revision",
}  # fmt: skip


class RwkvSamConfig(PretrainedConfig):
    """Sizes of a model: the fields of `ModelConfig`. Without arguments those of tiny."""

    model_type = MODEL_TYPE

    def __init__(self, **kwargs: Any) -> None:
        sizes = asdict(ModelConfig.from_name("tiny"))
        for name in sizes:
            setattr(self, name, kwargs.pop(name, sizes[name]))
        super().__init__(**kwargs)

    def model_config(self) -> ModelConfig:
        """Return the same as a `ModelConfig`.

        Raises:
            TypeError, ValueError: A field cannot be used.
        """
        return ModelConfig(**{field.name: getattr(self, field.name) for field in fields(ModelConfig)})


class RwkvSamForMaskGeneration(PreTrainedModel):
    """RWKV-SAM with the interface of transformers' `SamModel`, for inference.

    Attributes:
        model: The `RWKVSAM` that runs.
    """

    config_class = RwkvSamConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"

    def __init__(self, config: RwkvSamConfig, model: RWKVSAM | None = None) -> None:
        super().__init__(config)
        self.model = RWKVSAM(config.model_config()) if model is None else model
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        pass  # modules initialize themselves

    @classmethod
    def from_pretrained(  # type: ignore[override]  # what this model does not take is refused
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        config: PretrainedConfig | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: str | torch.device | None = None,
        **kwargs: Any,
    ) -> RwkvSamForMaskGeneration:
        """Load a model with `RWKVSAM.from_pretrained`.

        Args:
            pretrained_model_name_or_path: Hub id, folder or file. None is the bundled model.
            model_args: None are taken.
            config: Ignored: the files describe the model.
            dtype, torch_dtype: Dtype, or its name. None and "auto" are float32, in which CPUs are fastest.
            device_map: One device for all of the model, by default the CPU.
            kwargs: `revision`, `cache_dir`, `token` and `local_files_only`.

        Raises:
            InputError: Arguments that this model does not take.
            CheckpointError, DeviceError, HubError, FileNotFoundError: As in `RWKVSAM.from_pretrained`.
        """
        dtype = dtype if torch_dtype is None else torch_dtype
        names = {"revision", "cache_dir", "token", "local_files_only"} & kwargs.keys()
        known = {name: kwargs.pop(name) for name in names}
        given = sorted(name for name in kwargs if name not in IGNORED and kwargs[name] is not None)
        if given or model_args:
            raise InputError(f"from_pretrained does not take {listed([*given, *map(repr, model_args)])} for this model")
        if device_map is not None and not isinstance(device_map, (str, torch.device)):
            raise InputError(f"device_map must be one device such as 'cuda', got {device_map!r}")
        device = None if device_map == "auto" else device_map
        model = RWKVSAM.from_pretrained(
            pretrained_model_name_or_path, device=device, dtype=None if dtype == "auto" else dtype, **known
        )
        return cls(RwkvSamConfig(**asdict(model.config)), model).eval()

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:  # type: ignore[override]  # one file
        """Write the files of `RWKVSAM.save_pretrained`, which both `from_pretrained` read.

        Raises:
            InputError: `push_to_hub` is set; use the method `push_to_hub`.
            OSError: The folder cannot be written.
        """
        if kwargs.get("push_to_hub"):
            raise InputError("save_pretrained does not upload; call model.push_to_hub(repo_id)")
        self.model.save_pretrained(save_directory)

    @torch.no_grad()
    def get_image_embeddings(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """Encode normalized and padded pixels `[B, 3, S, S]` of an image processor to `[B, 1280, S/16, S/16]`."""
        return self.model.encode_image(pixel_values).packed()

    def get_image_wide_positional_embeddings(self) -> Tensor:
        """Return the position encoding `[1, 256, S/16, S/16]` of the image embedding."""
        return self._grid().permute(2, 0, 1)[None]

    def _grid(self) -> Tensor:
        side = self.config.image_size // 16
        return self.model.prompt_encoder.grid(side, side)

    @torch.no_grad()
    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_points: Tensor | None = None,
        input_labels: Tensor | None = None,
        input_boxes: Tensor | None = None,
        input_masks: Tensor | None = None,
        image_embeddings: Tensor | None = None,
        multimask_output: bool = True,
        **kwargs: Any,
    ) -> SamImageSegmentationOutput:
        """Predict masks for N prompts on each of B images, in the frame of the processor's `size`.

        Args:
            pixel_values: `[B, 3, S, S]` of the image processor.
            input_points: `[B, N, P, 2]` (x, y).
            input_labels: `[B, N, P]`: 1 foreground, 0 background, -1 and -10 padding. By default all are foreground.
            input_boxes: `[B, N, 4]` (x1, y1, x2, y2).
            input_masks: `[B or N, 1, S/4, S/4]`, low-resolution logits of an earlier prediction.
            image_embeddings: `[B, 1280, S/16, S/16]` of `get_image_embeddings`, instead of pixels.
            multimask_output: Return the three masks for ambiguous prompts instead of the single one.
            kwargs: What the processor returns besides is ignored.

        Returns:
            `pred_masks` `[B, N, n, S/4, S/4]` and `iou_scores` `[B, N, n]`, float32.

        Raises:
            ValueError: Both or none of `pixel_values` and `image_embeddings`, or shapes that do not fit.
            PromptError: No prompt, or prompts that do not fit.
        """
        if (pixel_values is None) == (image_embeddings is None):
            raise ValueError("give either pixel_values or image_embeddings")
        packed = self.get_image_embeddings(pixel_values) if pixel_values is not None else image_embeddings
        assert packed is not None
        images = ImageEmbedding.unpacked(packed.to(self.device, self.dtype), self._grid())
        if input_points is not None and input_labels is None:
            input_labels = torch.ones(input_points.shape[:-1], dtype=torch.int64)
        if input_labels is not None:
            input_labels = input_labels.masked_fill(input_labels == PADDING, -1)
        for name, tensor, dims in (("input_points", input_points, 4), ("input_boxes", input_boxes, 3)):
            if tensor is not None and (tensor.ndim != dims or len(tensor) != len(images)):
                shape = "[B, N, P, 2]" if dims == 4 else "[B, N, 4]"
                raise ValueError(f"{name} must be {shape} with B = {len(images)}, got {list(tensor.shape)}")
        masks, scores = [], []
        for i, image in enumerate(images):
            points, labels, boxes = (
                None if t is None else t[i].to(self.device) for t in (input_points, input_labels, input_boxes)
            )
            low, iou = self.model.decode_masks(
                image,
                None if points is None else points.float(),
                labels,
                None if boxes is None else boxes.float(),
                None if input_masks is None else self._mask_input(input_masks, i, len(images), points, boxes),
                multimask_output,
            )
            masks.append(low.float())
            scores.append(iou.float())
        return SamImageSegmentationOutput(iou_scores=torch.stack(scores), pred_masks=torch.stack(masks))

    def _mask_input(
        self, input_masks: Tensor, image: int, images: int, points: Tensor | None, boxes: Tensor | None
    ) -> Tensor:
        """Return the mask prompts of one image. A single one serves all its prompts."""
        own = input_masks if images == 1 else input_masks[image : image + 1]
        given = next((t for t in (points, boxes) if t is not None), own)
        own = own.expand(len(given), -1, -1, -1) if len(own) == 1 else own
        return own.to(self.device, self.dtype)


AutoConfig.register(MODEL_TYPE, RwkvSamConfig, exist_ok=True)
AutoModel.register(RwkvSamConfig, RwkvSamForMaskGeneration, exist_ok=True)
AutoModelForMaskGeneration.register(RwkvSamConfig, RwkvSamForMaskGeneration, exist_ok=True)
