"""Train RWKV-SAM on rendered scenes alone.

    python recipes/synthetic_shapes/train.py --run runs/tiny --render 8000       # render, then train
    python recipes/synthetic_shapes/train.py --run runs/tiny --resume            # go on from the last saved state
    python recipes/synthetic_shapes/train.py --run runs/tiny --export folder     # averaged weights as a model folder

The learning rate warms up, stays, and falls to zero over the last third of `--images`, so that a run can be ended
earlier than planned by resuming it with a smaller `--images`.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import Sample, Scenes, render_all
from torch import Tensor

from fastsam_rwkv import RWKVSAM, ModelConfig
from fastsam_rwkv.transforms import PIXEL_MEAN, PIXEL_STD

SEED = 20


def initial_model(variant: str, image_size: int) -> RWKVSAM:
    torch.manual_seed(SEED)
    model = RWKVSAM(ModelConfig.from_name(variant, image_size=image_size, num_multimask_outputs=3))
    for module in model.mask_decoder.modules():
        if hasattr(module, "q_proj"):  # attention to one's own position from the start: reading coordinates is learnt
            module.k_proj.load_state_dict(module.q_proj.state_dict())  # in half the steps
    return model


def losses(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """2 * BCE + dice, and the true IoU, for logits `[N, n, h, w]` against `[N, h, w]` in 0..1; both `[N, n]`."""
    target = target[:, None].expand_as(logits)
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((2, 3))
    p = logits.sigmoid()
    dice = 1 - (2 * (p * target).sum((2, 3)) + 1) / (p.sum((2, 3)) + target.sum((2, 3)) + 1)
    with torch.no_grad():
        mask, truth = logits > 0, target > 0.5
        iou = (mask & truth).sum((2, 3)) / (mask | truth).sum((2, 3)).clamp(min=1)
    return 2 * bce + dice, iou


def prompt_loss(logits: Tensor, predicted_iou: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of the single mask, of the best of the three, and of the predicted quality; and the single mask's IoU."""
    loss, iou = losses(logits, target)
    single, three = loss[:, 0], loss[:, 1:]
    quality = (predicted_iou - iou).square().mean(1)
    return (single + 0.9 * three.amin(1) + 0.1 * three.mean(1) + 0.5 * quality).mean(), iou


def sample_loss(model: RWKVSAM, embedding, sample: Sample, refine: bool) -> tuple[Tensor, Tensor]:
    """The loss of one picture's prompts; with `refine` also of a second round: the mask and a corrective click."""
    side = embedding.input_size[0] // 2
    target = F.avg_pool2d(torch.from_numpy(sample.masks)[:, None].float(), 2)[:, 0]
    boxes, points, labels = (
        None if a is None else torch.from_numpy(a) for a in (sample.boxes, sample.points, sample.labels)
    )
    low, quality = model.decode_all(embedding, points, labels, boxes)
    logits = F.interpolate(low, (side, side), mode="bilinear", align_corners=False)
    loss, iou = prompt_loss(logits, quality, target)
    if refine and points is not None:
        with torch.no_grad():
            best = iou.argmax(1)
            chosen = torch.arange(len(iou)), best
            wrong = (logits[chosen] > 0) != (target > 0.5)
            place = torch.multinomial(wrong.flatten(1).float() + 1e-6, 1)  # one wrong pixel, if there is any
            click = torch.stack([place % side, place // side], -1) * 2.0  # [N, 1, 2] (x, y)
            label = (target.flatten(1).gather(1, place) > 0.5).long()
        points, labels = torch.cat([points, click], 1), torch.cat([labels, label], 1)
        low, quality = model.decode_all(embedding, points, labels, boxes, low[chosen][:, None].detach())
        logits = F.interpolate(low, (side, side), mode="bilinear", align_corners=False)
        second, _ = prompt_loss(logits, quality, target)
        loss = (loss + second) / 2
    return loss, iou


class Batches(torch.utils.data.IterableDataset):
    """Batches of samples from number `start` on, the same whatever the number of workers."""

    def __init__(self, scenes: Scenes, batch: int, start: int) -> None:
        self.scenes, self.batch, self.start = scenes, batch, start

    def __iter__(self) -> Iterator[list[Sample]]:
        number = self.start
        while True:
            yield [self.scenes[number + i] for i in range(self.batch)]
            number += self.batch


def learning_rate(images: int, args: argparse.Namespace) -> float:
    warmup = min(1.0, (images + args.batch) / (100 * args.batch))
    left = max(0.0, 1 - images / args.images)
    return args.lr * warmup * min(1.0, 3 * left)


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # vanishing gradients are a hundred times slower as denormals than as zeros
    model = initial_model(args.variant, args.image_size)
    if args.init:
        model.load_state_dict(RWKVSAM.from_pretrained(args.init).state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images, seconds = 0, 0.0
    state_file = args.run / "state.pt"
    if args.resume:
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, images, seconds = state["average"], state["images"], state["seconds"]
        torch.set_rng_state(state["rng"])
        for group in optimizer.param_groups:
            group["betas"] = tuple(group["betas"])
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    log = (args.run / "log.jsonl").open("a")
    log.write(
        json.dumps({"start": images, "commit": commit, "command": sys.argv[1:], "torch": torch.__version__}) + "\n"
    )

    scenes = Scenes(args.run / "scenes", args.image_size, args.prompts, SEED)
    batches = torch.utils.data.DataLoader(
        Batches(scenes, args.batch, images), batch_size=None, num_workers=1, prefetch_factor=4
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    started, saved, recent = time.time() - seconds, time.time(), []
    for samples in batches:
        if images >= args.images:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(images, args)
        pixels = torch.stack([(torch.from_numpy(s.image).permute(2, 0, 1) - mean) / std for s in samples])
        embeddings = model.encode_image(pixels)
        results = [
            sample_loss(model, embeddings[i], sample, refine=(images + i) % 5 == 0) for i, sample in enumerate(samples)
        ]
        loss = torch.stack([r[0] for r in results]).mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at image {images}")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        images += len(samples)
        decay = min(args.ema, images / (images + 50 * args.batch))  # short memory while all is still new
        for name, tensor in model.state_dict().items():
            average[name].lerp_(tensor, 1 - decay)
        iou = [(r[1], s) for r, s in zip(results, samples, strict=True)]
        recent.append((loss.item(), *(_mean_iou(iou, boxes) for boxes in (True, False))))
        if images // args.batch % 25 == 0:
            row = dict(zip(("loss", "box_iou", "point_iou"), np.nanmean(recent, axis=0).round(4).tolist(), strict=True))
            row = {"images": images, "hours": round((time.time() - started) / 3600, 3), **row}
            print(json.dumps(row), flush=True)
            log.write(json.dumps(row) + "\n")
            log.flush()
            recent = []
        if time.time() - saved > 120 or images >= args.images:
            saved = time.time()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            state |= {"images": images, "seconds": saved - started, "rng": torch.get_rng_state()}
            torch.save(state, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)


def _mean_iou(results: list[tuple[Tensor, Sample]], boxes: bool) -> float:
    ious = [iou[:, 0].mean().item() for iou, sample in results if (sample.boxes is not None) == boxes]
    return math.nan if not ious else sum(ious) / len(ious)


def export(args: argparse.Namespace) -> None:
    """Write the averaged weights in half precision."""
    state = torch.load(args.run / "state.pt", weights_only=True)
    model = initial_model(args.variant, args.image_size)
    model.load_state_dict(state["average"])
    model.half().save_pretrained(args.export)
    print(f"{args.export}: {state['images']} images seen, {state['seconds'] / 3600:.2f} hours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the scenes, the state and the log")
    parser.add_argument("--render", type=int, default=0, metavar="N", help="render N scenes first")
    parser.add_argument("--render-size", type=int, default=320)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--init", metavar="MODEL", help="start from these weights, with a fresh optimizer")
    parser.add_argument("--export", type=Path, metavar="FOLDER")
    parser.add_argument("--variant", default="tiny")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--images", type=int, default=20_000, help="images to see in all")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=6, help="prompts an image")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.99)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.export:
        export(args)
        return
    if args.render:
        render_all(args.run / "scenes", args.render, args.render_size, SEED, workers=args.threads)
    train(args)


if __name__ == "__main__":
    main()
