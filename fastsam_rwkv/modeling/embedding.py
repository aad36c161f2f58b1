"""The encoder's output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ImageEmbedding:
    """Everything the decoder needs that depends on the image alone. Maps are channels-last.

    Attributes:
        image_embed: `[B, H/16, W/16, 256]`.
        image_pe: `[H/16, W/16, 256]`, the dense position encoding. Embeddings of one size may share it.
        high_res_feats: Two maps `[B, H/4, W/4, 64]`. They are the contributions of stage 1 and stage 2 to the first
            convolution of the mask refinement.
        input_size: `(H, W)` of the model input.
    """

    image_embed: Tensor
    image_pe: Tensor
    high_res_feats: tuple[Tensor, Tensor]
    input_size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.image_embed)

    def __getitem__(self, index: int) -> ImageEmbedding:
        """Return the embedding of one image of the batch, with B = 1."""
        i = range(len(self))[index]
        one = slice(i, i + 1)
        stage1, stage2 = self.high_res_feats
        return ImageEmbedding(self.image_embed[one], self.image_pe, (stage1[one], stage2[one]), self.input_size)

    def __iter__(self) -> Iterator[ImageEmbedding]:
        return (self[i] for i in range(len(self)))
