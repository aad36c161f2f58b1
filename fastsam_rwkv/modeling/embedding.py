"""The encoder's output."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from ..checkpoint import check_values, read_tensors
from ..errors import CheckpointError, short_repr, shorten
from ..files import whole_file

FORMAT = "fastsam_rwkv.ImageEmbedding 1"
MAPS = ("image_embed", "image_pe", "high_res_feats")  # names in a file
PACKED = 256 + 64 * 16  # channels of all maps in one tensor
LARGEST_SIDE = 1 << 20  # pixels of a model input or an image


@dataclass(frozen=True)
class ImageEmbedding:
    """Everything the decoder needs that depends on the image alone. Maps are channels-last.

    Attributes:
        image_embed: `[B, H/16, W/16, 256]`.
        image_pe: `[H/16, W/16, 256]`, the dense position encoding. Embeddings of one size may share it.
        high_res_feats: `[B, H/4, W/4, 64]`, the contribution of stages 1 and 2 to the first convolution of the mask
            refinement.
        input_size: `(H, W)` of the model input.
        original_size: `(H, W)` of the image, which a predictor needs. `Predictor.embedding` sets it.
        fingerprint: Digest of the model's weights, which a predictor compares. `Predictor.embedding` sets it.
    """

    image_embed: Tensor
    image_pe: Tensor
    high_res_feats: Tensor
    input_size: tuple[int, int]
    original_size: tuple[int, int] | None = None
    fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.image_embed)

    def __getitem__(self, index: int) -> ImageEmbedding:
        """Return the embedding of one image of the batch, with B = 1."""
        i = range(len(self))[index]
        one = slice(i, i + 1)
        return replace(self, image_embed=self.image_embed[one], high_res_feats=self.high_res_feats[one])

    def __iter__(self) -> Iterator[ImageEmbedding]:
        return (self[i] for i in range(len(self)))

    def to(self, *args: Any, **kwargs: Any) -> ImageEmbedding:
        """Return the embedding on another device or in another dtype, with the arguments of `torch.Tensor.to`."""
        image_embed, image_pe, high_res_feats = (
            tensor.to(*args, **kwargs) for tensor in (self.image_embed, self.image_pe, self.high_res_feats)
        )
        return replace(self, image_embed=image_embed, image_pe=image_pe, high_res_feats=high_res_feats)

    def packed(self) -> Tensor:
        """Return everything that depends on the image as one tensor `[B, 1280, H/16, W/16]`, channels first.

        The first 256 channels are `image_embed`, the others a `pixel_unshuffle` by 4 of `high_res_feats`.
        """
        maps = self.image_embed.permute(0, 3, 1, 2), F.pixel_unshuffle(self.high_res_feats.permute(0, 3, 1, 2), 4)
        return torch.cat(maps, 1)

    @classmethod
    def unpacked(cls, tensor: Tensor, image_pe: Tensor) -> ImageEmbedding:
        """Undo `packed`.

        Args:
            tensor: `[B, 1280, H/16, W/16]`.
            image_pe: `[H/16, W/16, 256]`, the position encoding of that size.

        Raises:
            ValueError: The shapes are not those of a packed embedding.
        """
        h, w = image_pe.shape[:2]
        if tensor.ndim != 4 or tuple(tensor.shape[1:]) != (PACKED, h, w):
            raise ValueError(f"a packed embedding is [B, {PACKED}, {h}, {w}], got {list(tensor.shape)}")
        image_embed, high_res_feats = tensor.split([256, PACKED - 256], 1)
        maps = image_embed, F.pixel_shuffle(high_res_feats, 4)
        image_embed, high_res_feats = (t.permute(0, 2, 3, 1).contiguous() for t in maps)
        return cls(image_embed, image_pe, high_res_feats, (16 * h, 16 * w))

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write a safetensors file that `load` reads. It appears whole or not at all.

        Raises:
            OSError: The file cannot be written.
        """
        about = {
            "input_size": self.input_size, "original_size": self.original_size, "fingerprint": self.fingerprint
        }  # fmt: skip
        tensors = (self.image_embed, self.image_pe, self.high_res_feats)
        # copies, because images of a batch may share memory, which safetensors refuses
        maps = {name: t.detach().cpu().clone().contiguous() for name, t in zip(MAPS, tensors, strict=True)}
        data = save(maps, metadata={"format": "pt", "fastsam_rwkv": FORMAT, "embedding": json.dumps(about)})
        with whole_file(os.path.expanduser(file)) as stream:
            stream.write(data)

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> ImageEmbedding:
        """Read a file of `save`. Tensors are on the CPU, in their dtype.

        Raises:
            CheckpointError: The file is damaged, or it holds no embedding.
            FileNotFoundError: The file does not exist.
        """
        path = Path(os.path.expanduser(file))
        if not os.path.isfile(path):  # False for a name that cannot be one
            raise FileNotFoundError(f"no file {short_repr(str(path))}")
        metadata, tensors = read_tensors(path)
        try:
            if metadata.get("fastsam_rwkv") != FORMAT or set(tensors) != set(MAPS):
                raise ValueError("it was not written by `ImageEmbedding.save` of this release")
            about = json.loads(metadata["embedding"])
            image_embed, image_pe, high_res_feats = (tensors[name].clone() for name in MAPS)  # not mapped from the file
            embedding = cls(
                image_embed,
                image_pe,
                high_res_feats,
                _size(about["input_size"]),
                None if about["original_size"] is None else _size(about["original_size"]),
                None if about["fingerprint"] is None else str(about["fingerprint"])[:64],
            )
            embedding.check()
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise CheckpointError(f"{str(path)!r} holds no image embedding: {shorten(error, 250)}") from error
        check_values(tensors, repr(str(path)))
        return embedding

    def check(self) -> None:
        """Check that the maps fit each other and the input size.

        Raises:
            ValueError: They do not.
        """
        H, W = self.input_size
        B = len(self.image_embed) if self.image_embed.ndim else 0
        maps = (self.image_embed, self.image_pe, self.high_res_feats)
        want = [(B, H // 16, W // 16, 256), (H // 16, W // 16, 256), (B, H // 4, W // 4, 64)]
        if H % 16 or W % 16 or B == 0 or [tuple(t.shape) for t in maps] != want:
            raise ValueError(f"maps of an input of {H}x{W} cannot be {[list(t.shape) for t in maps]}")


def _size(value: Any) -> tuple[int, int]:
    height, width = value
    for side in (height, width):
        if type(side) is not int or not 0 < side <= LARGEST_SIDE:
            raise ValueError(f"a side cannot be {shorten(repr(side), 80)}")
    return height, width
