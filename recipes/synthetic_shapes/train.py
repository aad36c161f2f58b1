"""Train RWKV-SAM on rendered scenes alone.

    python recipes/synthetic_shapes/train.py --run runs/tiny --render 4000      # draw the scenes
    python recipes/synthetic_shapes/train.py --run runs/tiny                    # train on them
    python recipes/synthetic_shapes/train.py --run runs/tiny --resume           # go on from the last saved state
    python recipes/synthetic_shapes/train.py --run runs/tiny --export folder    # averaged weights as a model folder
    python recipes/synthetic_shapes/train.py --run runs/tiny --validate runs/other    # measure on scenes of other seeds

The learning rate warms up, stays, and falls to zero over the last part (`--fall`) of `--images` or of `--hours`,
whichever ends first, so that a run can be ended earlier than planned by resuming it with less.

Several processes share the work under `python -m torch.distributed.run --nproc-per-node N train.py ...`: each takes
every N-th batch, and gradients are averaged.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from data import ABSENT, Labeled, Sample, Scenes, render_all
from rounds import Prompts, answers, batch_loss, best_by_score
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastsam_rwkv import RWKVSAM, ModelConfig
from fastsam_rwkv.modeling.embedding import ImageEmbedding

SEED = 20
VALIDATED = 320
LABELED_SIZE = 768  # longer side of labeled images; windows of them are cut from this
SizeAndBatch = tuple[tuple[int, int], int]  # (height, width), images per batch
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
ATTENTION = {"cpu": SDPBackend.MATH, "cuda": FUSED}  # the fused CPU kernel is slow for few tokens: 1.2x in all
# parameters that depend on the image only, for --bf16; in bfloat16 gradients of `mix_out` are mostly rounding (RUNS.md)
IMAGE_ALONE = tuple(f"model.{name}" for name in ("backbone.", "neck.", "mask_decoder.stage", "mask_decoder.mix_stage"))


def initial_model(variant: str, image_size: int) -> RWKVSAM:
    torch.manual_seed(SEED)
    model = RWKVSAM(ModelConfig.from_name(variant, image_size=image_size, num_multimask_outputs=3))
    for module in model.mask_decoder.modules():
        if hasattr(module, "q_proj"):  # tokens attend to their own position from the start:
            module.k_proj.load_state_dict(module.q_proj.state_dict())  # coordinates are learned in half the steps
    return model


def _image_size(mix: list[SizeAndBatch]) -> int:
    """Return the largest side of the mix as a model's `image_size`, a multiple of 64."""
    return -(-max(max(size) for size, _ in mix) // 64) * 64


def _given_model(args: argparse.Namespace) -> RWKVSAM:
    model = initial_model(args.variant, _image_size(args.mix))
    if args.init:
        model.load_state_dict(RWKVSAM.from_pretrained(args.init, device="cpu").state_dict())
    return model


class Working(torch.nn.Module):
    """The model with one call for all prompts of a batch, on any of its images."""

    def __init__(self, model: RWKVSAM) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, prompts: Prompts, rounds: int, share: float) -> tuple[Tensor, Tensor]:
        return batch_loss(self.decode, self.model.encode_image(pixels), prompts, rounds, share)

    def decode(
        self, images: ImageEmbedding, image: Tensor, coords: Tensor, labels: Tensor, mask_input: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        image_embed, high_res_feats = images.image_embed[image].float(), images.high_res_feats[image].float()
        each = ImageEmbedding(image_embed, images.image_pe.float(), high_res_feats, images.input_size)
        return self.model._masks(each, coords, labels, mask_input, slice(None), padded=True)


class Batches(torch.utils.data.IterableDataset):
    """Batches from number `start` on, the same for any number of loading processes."""

    def __init__(self, scenes: Scenes, mix: list[SizeAndBatch], start: int, images: int, rank: int, world: int):
        self.scenes, self.mix, self.start, self.images, self.rank, self.world = scenes, mix, start, images, rank, world

    def __iter__(self) -> Iterator[list[Tensor]]:
        worker = torch.utils.data.get_worker_info()
        number, of = (0, 1) if worker is None else (worker.id, worker.num_workers)
        step, first = self.start, self.images
        while True:
            size, count = self.mix[step % len(self.mix)]
            if (step - self.start) % of == number:
                yield compact(self.scenes.batch(first + self.rank * count, count, size))
            first += count * self.world
            step += 1


def compact(batch: Sample) -> list[Tensor]:
    """Return image, masks, coords and labels as tensors for the training process.

    Masks are at half the size: the count 0..4 of pixels inside, `[B, N, H/2, W/2]` uint8.
    """
    m = batch.masks.view(np.uint8)
    m = m[..., ::2, :] + m[..., 1::2, :]
    return [torch.from_numpy(a) for a in (batch.image, m[..., ::2] + m[..., 1::2], batch.coords, batch.labels)]


def prepared(batch: list[Tensor], device: torch.device) -> tuple[Tensor, Prompts]:
    """Return pixels `[B, 3, H, W]` uint8 and all prompts of a batch of `compact`."""
    image, masks, coords, labels = (t.to(device, non_blocking=True) for t in batch)
    B, N = masks.shape[:2]
    of = torch.arange(B, device=device).repeat_interleave(N)
    labels = labels.flatten(0, 1)
    used = int((batch[3] != ABSENT).sum(2).max())
    prompts = Prompts(of, coords.flatten(0, 1)[:, :used], labels[:, :used], masks.flatten(0, 1).float() / 4)
    return image.permute(0, 3, 1, 2), prompts


def labeled_images(source: str) -> Labeled:
    """Return the images of FOLDER, or of FOLDER=FILE with a COCO or LVIS annotation file."""
    sys.path.insert(0, str(Path(__file__).parents[2]))  # of the repository: benchmarks are not installed
    from benchmarks.masks.coco import find_annotated
    from benchmarks.masks.datasets import find_photographs

    folder, _, annotations = source.partition("=")
    return Labeled(find_annotated(folder, annotations) if annotations else find_photographs(folder), LABELED_SIZE)


def left_of(args: argparse.Namespace, images: int, seconds: float) -> float:
    """Return the share of the run that is still to come."""
    return max(0.0, 1 - max(images / args.images, seconds / (3600 * args.hours)))


def average_gradients(parameters: list[Tensor], world: int) -> None:
    gradients = [p.grad for p in parameters if p.grad is not None]  # the same parameters in every process
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for g, part in zip(gradients, (flat / world).split([g.numel() for g in gradients]), strict=True):
        g.copy_(part.view_as(g))


def train(args: argparse.Namespace) -> None:
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    state_file = args.run / "state.pt"
    if state_file.exists() and not args.resume:
        raise SystemExit(f"{state_file} holds a run: go on with it by --resume, or take another --run")
    if world > 1:
        if args.device != "cpu":
            raise SystemExit("several processes share the work on a CPU only; on a GPU run one")
        dist.init_process_group("gloo")
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # denormal gradients are a hundred times slower than zeros
    model = _given_model(args).to(device)
    working = Working(model)
    named = dict(working.named_parameters())
    parameters = list(named.values())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images, step, seconds = 0, 0, 0.0
    if args.resume:
        state = torch.load(state_file, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, images, step, seconds = state["average"], state["images"], state["step"], state["seconds"]
        for group in optimizer.param_groups:
            group["betas"] = tuple(group["betas"])
    log = (args.run / "log.jsonl").open("a") if rank == 0 else None
    if log:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        start = {"start": images, "commit": commit, "command": sys.argv[1:], "processes": world}
        log.write(json.dumps(start | {"torch": torch.__version__, "device": args.device}) + "\n")

    labeled = [labeled_images(source) for source in args.data]
    scenes = Scenes(args.scenes or args.run / "scenes", args.prompts, args.seed, labeled, args.data_share)
    batches = torch.utils.data.DataLoader(
        Batches(scenes, args.mix, step * args.accumulate, images, rank, world),
        batch_size=None,
        num_workers=args.workers,
        prefetch_factor=4 if args.workers else None,
    )
    started, saved, recent = time.time() - seconds, time.time(), []
    batches = iter(batches)
    while (left := left_of(args, images, seconds)) > 0:
        warm = min(1.0, (step + 1) / args.warm)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * min(1.0, left / args.fall)
        optimizer.zero_grad()
        seen = 0
        for number in range(step * args.accumulate, (step + 1) * args.accumulate):
            # seeded for each batch, so that a resumed run draws the same
            torch.manual_seed(args.seed + (images + seen) * world + rank)
            pixels, prompts = prepared(next(batches), device)
            rounds = args.rounds[number % len(args.rounds)]
            tensors = {
                k: p.to(torch.bfloat16) if args.bf16 and k.startswith(IMAGE_ALONE) else p for k, p in named.items()
            }
            with sdpa_kernel(ATTENTION[args.device]):
                loss, iou = torch.func.functional_call(working, tensors, (pixels, prompts, rounds, args.share))
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()} at image {images + seen}")
            (loss * len(pixels)).backward()
            seen += len(pixels)
            boxes = prompts.boxed
            recent.append([loss.detach(), iou[boxes, 0].mean(), iou[~boxes, 0].mean()])
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= seen
        if world > 1:
            average_gradients(parameters, world)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        images, step = images + seen * world, step + 1
        decay = min(args.ema, (step + 1) / (step + 50))  # a short average at the beginning
        for name, tensor in model.state_dict().items():
            average[name].lerp_(tensor, 1 - decay)
        seconds = _agreed(time.time() - started, world)
        if log and step % args.log_every == 0:
            values = torch.tensor(recent).nanmean(0).tolist()
            row = dict(zip(("loss", "box_iou", "point_iou"), (round(v, 4) for v in values), strict=True))
            row = {"images": images, "hours": round(seconds / 3600, 3), **row}
            print(json.dumps(row), flush=True)
            log.write(json.dumps(row) + "\n")
            log.flush()
            recent = []
        if log and (time.time() - saved > args.save_every or left_of(args, images, seconds) == 0):
            saved = time.time()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            state |= {"images": images, "step": step, "seconds": seconds, "image_size": _image_size(args.mix)}
            torch.save(state, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)
    if world > 1:
        dist.destroy_process_group()


def _agreed(seconds: float, world: int) -> float:
    """Return the seconds of the first process, so that all processes stop at the same step."""
    if world == 1:
        return seconds
    clock = torch.tensor([seconds], dtype=torch.float64)
    dist.broadcast(clock, 0)
    return clock.item()


def export(args: argparse.Namespace) -> None:
    """Write the averaged weights, or their mean with the models of `--mean-with`, in half precision."""
    state = torch.load(args.run / "state.pt", weights_only=True, map_location="cpu")
    model = initial_model(args.variant, args.image_size or state["image_size"])
    others = [RWKVSAM.from_pretrained(source, device="cpu").state_dict() for source in args.mean_with]
    model.load_state_dict(
        {name: torch.stack([own, *(o[name] for o in others)]).mean(0) for name, own in state["average"].items()}
    )
    model.half().save_pretrained(args.export)
    print(f"{args.export}: {state['images']} images seen, {state['seconds'] / 3600:.2f} hours")


def validate(args: argparse.Namespace) -> None:
    """Print how well the averaged weights, or those of `--init`, answer first prompts on other scenes.

    Sizes are those of `--mix` in turn; VALIDATED images, or `--images` if that is fewer.
    """
    torch.set_num_threads(args.threads)
    model = _given_model(args)
    if not args.init:
        model.load_state_dict(torch.load(args.run / "state.pt", weights_only=True, map_location="cpu")["average"])
    working = Working(model.to(args.device))
    seen, rows = 0, []
    for batch in Batches(Scenes(args.validate / "scenes", args.prompts, args.seed), args.mix, 0, 0, 0, 1):
        pixels, prompts = prepared(batch, torch.device(args.device))
        with sdpa_kernel(ATTENTION[args.device]):  # prompts of several images are decoded together only with gradients
            found = answers(working.decode, model.encode_image(pixels), prompts)
        by_score = found.iou.gather(1, best_by_score(found.predicted)[:, None])[:, 0]
        values = (found.loss.detach(), found.iou[:, 0], by_score, found.iou[:, 1:].amax(1), prompts.boxed)
        rows.append(torch.stack(values, 1))
        seen += len(pixels)
        if seen >= min(args.images, VALIDATED):
            break
    table = torch.cat(rows)
    for kind, boxed in (("box", 1), ("clicks", 0)):
        chosen = table[table[:, -1] == boxed]
        means = (round(value, 4) for value in chosen.mean(0).tolist())
        named = dict(zip(("loss", "single", "by_score", "by_truth"), means, strict=False))
        print(json.dumps({"prompts": kind, "count": len(chosen), **named}))


def _size_and_batch(text: str) -> SizeAndBatch:
    found = re.fullmatch(r"(\d+)(?:x(\d+))?:(\d+)", text)
    if found:
        height, width, batch = (int(number) for number in (found[1], found[2] or found[1], found[3]))
        if min(height, width, batch) > 0 and height % 32 == width % 32 == 0:
            return (height, width), batch
    raise argparse.ArgumentTypeError(
        f"{text!r} is not SIZE:BATCH or HEIGHTxWIDTH:BATCH with multiples of 32, such as 256:4 or 352x512:1"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the scenes, the state and the log")
    parser.add_argument("--render", type=int, default=0, metavar="N", help="render N scenes, and do no more")
    parser.add_argument("--render-size", type=int, default=512, metavar="PIXELS")
    parser.add_argument("--drawings", type=Path, metavar="FILE", help="outlines from `clipart.py` for --render")
    parser.add_argument("--seed", type=int, default=SEED, help="of what is rendered, or of the crops and prompts")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--init", metavar="MODEL", help="start from these weights, with a fresh optimizer")
    parser.add_argument("--export", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--mean-with", nargs="+", default=[], metavar="MODEL", help="export the mean of the run's weights and these"
    )
    parser.add_argument(
        "--validate", type=Path, metavar="FOLDER", help="measure on scenes rendered with another --seed"
    )
    parser.add_argument("--image-size", type=int, help="of the exported model; the run's largest when left out")
    parser.add_argument("--variant", default="tiny")
    parser.add_argument("--images", type=int, default=10**9, help="images to see in all")
    parser.add_argument("--hours", type=float, default=10**6, help="hours to train in all")
    parser.add_argument("--fall", type=float, default=1 / 3, help="share of the run in which the rate falls")
    parser.add_argument(
        "--mix", type=_size_and_batch, nargs="+", default=[((256, 256), 4)], metavar="SIZE:BATCH",
        help="image size (a side, or HEIGHTxWIDTH) and images per batch, for each process; batches take turns",
    )  # fmt: skip
    parser.add_argument(
        "--scenes", type=Path, nargs="+", metavar="FOLDER", help="scenes to train on; the run's by default"
    )
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="FOLDER[=FILE]",
        help="labeled images to train on, too: folders that benchmarks.masks.accuracy reads, or with a COCO file",
    )  # fmt: skip
    parser.add_argument("--data-share", type=float, default=0.5, help="share of the images that come from --data")
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="batches whose gradients make a step")
    parser.add_argument("--warm", type=int, default=100, metavar="STEPS", help="steps in which the rate rises")
    parser.add_argument("--prompts", type=int, default=6, help="prompts an image")
    parser.add_argument(
        "--rounds", type=int, nargs="+", default=[0, 1, 0, 3], help="corrective clicks; batches take turns"
    )
    parser.add_argument("--share", type=float, default=0.5, help="share of the prompts that are corrected")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.99)
    parser.add_argument(
        "--bf16", action="store_true", help="encode images in bfloat16; the prompts' part and all weights stay float32"
    )
    parser.add_argument("--device", choices=list(ATTENTION), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch, for each process")
    parser.add_argument("--save-every", type=float, default=120, metavar="SECONDS", help="how often the state is saved")
    parser.add_argument("--log-every", type=int, default=25, metavar="STEPS")
    parser.add_argument("--workers", type=int, default=1, help="loading processes, for each process")
    args = parser.parse_args()
    if args.mean_with and not args.export:
        parser.error("--mean-with is for --export FOLDER")
    if args.render:
        render_all(args.run / "scenes", args.render, args.render_size, args.seed, args.threads, args.drawings)
    elif args.export:
        export(args)
    elif args.validate:
        validate(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
