"""Auxiliary losses on every pixel of an image, for training alone: which regions there are, and where they end."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from data import UNKNOWN
from torch import Tensor, nn

from fastsam_rwkv.modeling.embedding import ImageEmbedding

TEMPERATURE = 0.1
SMALLEST = 1.0  # region that counts, in positions of the image embedding


class DenseHeads(nn.Module):
    """Heads on the image embedding. No exported model has them.

    One maps each position of the image embedding to a vector that shall be like the mean vector of its region. The
    other predicts which pixels of a quarter of the input's size are at a region's edge.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(256, 64)
        self.coarse = nn.Linear(256, 64)
        self.edge = nn.Linear(64, 1)

    def forward(self, images: ImageEmbedding, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses of regions and edges.

        Args:
            images: B images.
            regions: `[B, H/4, W/4]` uint8, the region of each pixel, or UNKNOWN.
        """
        embed = images.image_embed.float()
        fine = F.interpolate(self.coarse(embed).permute(0, 3, 1, 2), scale_factor=4, mode="bilinear")
        for feats in images.high_res_feats:
            fine = fine + feats.float().permute(0, 3, 1, 2)
        edge = self.edge(F.gelu(fine).permute(0, 2, 3, 1))[..., 0]
        vectors = F.normalize(self.embed(embed), dim=-1)
        each = [region_loss(v, r) for v, r in zip(vectors, regions, strict=True)]
        return torch.stack(each).mean(), edge_loss(edge, regions)


def shares(regions: Tensor) -> Tensor:
    """Return the share of each region in squares of 4 x 4 pixels of `[h, w]`: `[h/4, w/4, R]` float32.

    Regions below SMALLEST squares in all, and UNKNOWN, are left out.
    """
    found = torch.nn.functional.one_hot(regions.long(), 256)[..., :UNKNOWN].permute(2, 0, 1).float()
    pooled = F.avg_pool2d(found, 4)
    return pooled[pooled.sum((1, 2)) >= SMALLEST].permute(1, 2, 0)


def region_loss(vectors: Tensor, regions: Tensor) -> Tensor:
    """Return the cross-entropy of each position's region, told by the likeness of its vector to the regions' means.

    Regions count alike, whatever their size.

    Args:
        vectors: `[h, w, C]` of length 1.
        regions: `[4 h, 4 w]` uint8.
    """
    part = shares(regions).flatten(0, 1)
    if part.shape[1] < 2:
        return vectors.sum() * 0
    vectors = vectors.flatten(0, 1)
    means = F.normalize(part.T @ vectors, dim=-1)
    entropy = -(vectors @ means.T / TEMPERATURE).log_softmax(1)
    return ((entropy * part).sum(0) / part.sum(0)).mean()


def edge_loss(logits: Tensor, regions: Tensor) -> Tensor:
    """Return BCE + dice of logits `[B, h, w]` for the pixels whose right or lower neighbor is of another region."""
    known = regions != UNKNOWN
    target = torch.zeros_like(logits)
    for axis in (1, 2):
        length = regions.shape[axis] - 1
        here, beside = (regions.narrow(axis, first, length) for first in (0, 1))
        both = known.narrow(axis, 0, length) & known.narrow(axis, 1, length)
        at = target.narrow(axis, 0, length)
        at.copy_(torch.maximum(at, ((here != beside) & both).float()))
    bce = F.binary_cross_entropy_with_logits(logits, target, known.float())
    p = logits.sigmoid() * known
    return bce + 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)
