"""Losses of masks for a prompt, then for the prompt with corrective clicks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from data import NOT_A_POINT
from torch import Tensor

from fastsam_rwkv.modeling.embedding import ImageEmbedding

Decode = Callable[[ImageEmbedding, Tensor, Tensor, Tensor, "Tensor | None"], tuple[Tensor, Tensor]]


class Prompts(NamedTuple):
    """K prompts on the images of a batch.

    Attributes:
        image: `[K]`, the image's number in the batch.
        coords: `[K, M, 2]`, labels: `[K, M]`, as in `data.Sample`.
        target: `[K, H/2, W/2]` float32 in 0..1.
    """

    image: Tensor
    coords: Tensor
    labels: Tensor
    target: Tensor

    @property
    def boxed(self) -> Tensor:
        """`[K]` bool, True for a prompt with a box."""
        return (self.labels == 2).any(1)

    def chosen(self, which: Tensor) -> Prompts:
        return Prompts(*(t[which] for t in self))


def losses(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return 2 * BCE + dice and the true IoU, both `[K, n]`, of logits `[K, n, h, w]` for targets `[K, h, w]`."""
    target = target[:, None].expand_as(logits)
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((2, 3))
    p = logits.sigmoid()
    dice = 1 - (2 * (p * target).sum((2, 3)) + 1) / (p.sum((2, 3)) + target.sum((2, 3)) + 1)
    with torch.no_grad():
        mask, truth = logits > 0, target > 0.5
        iou = (mask & truth).sum((2, 3)) / (mask | truth).sum((2, 3)).clamp(min=1)
    return 2 * bce + dice, iou


def best_by_score(predicted: Tensor) -> Tensor:
    """Index `[K]` of the best of the three masks by predicted IoU `[K, n]`."""
    return 1 + predicted[:, 1:].argmax(1)


def prompt_loss(logits: Tensor, predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss `[K]` of all masks and of the predicted IoU, and the true IoU `[K, n]`.

    Of the three masks, the best by truth and the best by predicted IoU count most. The predicted IoU has a squared
    error. A last term is the IoU that is lost if a mask is chosen with probability softmax(predicted / 0.1).
    """
    loss, iou = losses(logits, target)
    single, three = loss[:, 0], loss[:, 1:]
    by_score = loss.gather(1, best_by_score(predicted)[:, None])[:, 0]
    score = (predicted - iou).square().mean(1)
    lost = ((predicted[:, 1:] / 0.1).softmax(1) * (iou[:, 1:].amax(1, keepdim=True) - iou[:, 1:])).sum(1)
    return single + 0.5 * three.amin(1) + 0.5 * by_score + 0.1 * three.mean(1) + 8 * score + 0.5 * lost, iou


def depth(region: Tensor) -> Tensor:
    """Distance of each pixel of `[K, h, w]` bool from the outside, float; 0 outside.

    It counts erosions by a 3 x 3 square at half the size, plus 1.
    """
    part = region[:, None].float()
    left = (F.avg_pool2d(part, 2) > 0.5).float()
    total = left
    for _ in range(left.shape[2] // 4):
        left = -F.max_pool2d(F.pad(-left, (1, 1, 1, 1)), 3, 1)  # pixels beyond the image are outside
        total = total + left
    return ((1 + F.interpolate(total, scale_factor=2)) * part)[:, 0]


@torch.no_grad()
def corrections(mask: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a corrective click for each mask `[K, h, w]` bool: points `[K, 1, 2]` (x, y) and labels `[K, 1]`.

    Two in three are at the center of the largest error, the others anywhere in an error. The label is NOT_A_POINT if
    nothing is wrong.
    """
    wrong = torch.cat([truth & ~mask, mask & ~truth])
    missed, spilled = depth(wrong).flatten(1).chunk(2)
    interior = torch.maximum(missed, spilled)
    noise = torch.rand_like(interior)
    anywhere = torch.rand(len(mask), 1, device=mask.device) < 1 / 3
    place = (torch.where(anywhere, 1 + noise, interior + noise) * (interior > 0)).argmax(1)
    side = mask.shape[2]
    click = torch.stack([place % side, place // side], -1)[:, None]
    label = truth.flatten(1).gather(1, place[:, None]).long()
    nothing = (interior.amax(1) == 0)[:, None]
    return click.float(), torch.where(nothing, NOT_A_POINT, label)


class Answers(NamedTuple):
    """Answers to K prompts: low-resolution logits, logits at the target's size, predicted IoU, loss `[K]`, IoU."""

    low: Tensor
    logits: Tensor
    predicted: Tensor
    loss: Tensor
    iou: Tensor


def answers(decode: Decode, embedding: ImageEmbedding, prompts: Prompts, mask_input: Tensor | None = None) -> Answers:
    low, predicted = decode(embedding, *prompts[:3], mask_input)
    logits = F.interpolate(low.float(), prompts.target.shape[1:], mode="bilinear", align_corners=False)
    return Answers(low, logits, predicted, *prompt_loss(logits, predicted.float(), prompts.target))


def batch_loss(
    decode: Decode, embedding: ImageEmbedding, prompts: Prompts, rounds: int, share: float
) -> tuple[Tensor, Tensor]:
    """Return the mean loss over all answers, and the first round's IoU `[K, n]`.

    After the first round, a `share` of the prompts gets `rounds` more with one corrective click each: at first on the
    best of the three masks by predicted IoU, as in use, later on the single mask. The logits of the corrected mask are
    the next mask prompt.
    """
    low, logits, predicted, loss, first_iou = answers(decode, embedding, prompts)
    total = [loss]
    if rounds:
        which = torch.randperm(len(loss), device=loss.device)[: max(1, round(share * len(loss)))]
        prompts, low, logits, predicted = prompts.chosen(which), low[which], logits[which], predicted[which]
    for number in range(rounds):
        row = torch.arange(len(low), device=low.device)
        followed = best_by_score(predicted) if number == 0 else torch.zeros_like(row)
        click, label = corrections(logits[row, followed] > 0, prompts.target > 0.5)
        prompts = prompts._replace(
            coords=torch.cat([2 * click + 0.5, prompts.coords], 1), labels=torch.cat([label, prompts.labels], 1)
        )
        mask_input = low[row, followed][:, None].detach()
        low, logits, predicted, loss, _ = answers(decode, embedding, prompts, mask_input)
        total.append(loss)
    return torch.cat(total).mean(), first_iou
