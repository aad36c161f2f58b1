"""How well masks fit labelled photographs: mean IoU for a box and for a single click.

    python -m benchmarks.accuracy FOLDER [--model SOURCE]

A target is every region of 1% to 60% of an image, a region being all pixels of one label value. The box prompt is its
tight box, the click its most interior pixel. Beside the model stand the two baselines that look at the box alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.timing import machine
from fastsam_rwkv import RWKVSAM
from fastsam_rwkv.transforms import load_image, preprocess

T = TypeVar("T")
MIN_AREA, MAX_AREA = 0.01, 0.6
AREA_BINS = ((0.01, 0.03), (0.03, 0.1), (0.1, 0.3), (0.3, 0.6))
PROMPTS_AT_ONCE = 16  # four float masks a prompt at the model's input size
LAYOUT = "expected FOLDER/<id>.jpg with FOLDER/<id>.png, or FOLDER/images/<id>.jpg|png with FOLDER/labels/<id>.png"
TITLES = {
    "filled_box": "filled box",
    "inscribed_ellipse": "inscribed ellipse",
    "box": "model, box",
    "box_best_score": "model, box, best of 3 by score",
    "box_oracle": "model, box, best of 3 by truth",
    "point": "model, 1 click",
    "point_best_score": "model, 1 click, best of 3 by score",
    "point_oracle": "model, 1 click, best of 3 by truth",
}


class Target(NamedTuple):
    """One region to be found.

    Attributes:
        mask: `[H, W]` bool.
        box: (x1, y1, x2, y2) in pixels, x2 and y2 exclusive.
        point: (x, y), column and row of the most interior pixel.
        area: fraction of the image.
    """

    mask: np.ndarray
    box: tuple[int, int, int, int]
    point: tuple[int, int]
    area: float


class Photo(NamedTuple):
    """A uint8 RGB image `[H, W, 3]` and its targets."""

    image: np.ndarray
    targets: list[Target]


def targets(label_map: np.ndarray) -> list[Target]:
    """The regions of `[H, W]` integer labels that take 1% to 60% of the image, both included; any label counts."""
    found = []
    for label, count in zip(*np.unique(label_map, return_counts=True), strict=True):
        area = int(count) / label_map.size
        if MIN_AREA <= area <= MAX_AREA:
            mask = label_map == label
            box = tight_box(mask)
            found.append(Target(mask, box, interior_point(mask), area))
    return found


def tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(x1, y1, x2, y2) of a mask that is not empty, x2 and y2 exclusive."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def interior_point(mask: np.ndarray) -> tuple[int, int]:
    """(x, y) of the pixel farthest (Euclidean) from the outside, to which the image's border belongs.

    The first in row-major order if there are several. Exact: distances along columns, then the lower envelope along
    rows, widened until no pixel can come closer.
    """
    x1, y1, x2, y2 = tight_box(mask)
    inside = np.pad(mask[y1:y2, x1:x2], 1)
    row = np.arange(len(inside), dtype=np.int32)[:, None]
    above = row - np.maximum.accumulate(np.where(inside, 0, row), axis=0)
    below = np.minimum.accumulate(np.where(inside, row[-1], row)[::-1], axis=0)[::-1] - row
    in_column = np.minimum(above, below) ** 2
    squared = in_column.copy()
    for step in itertools.count(1):
        if step**2 >= squared.max():
            break
        np.minimum(squared[:, step:], in_column[:, :-step] + step**2, out=squared[:, step:])
        np.minimum(squared[:, :-step], in_column[:, step:] + step**2, out=squared[:, :-step])
    y, x = divmod(int(squared.argmax()), squared.shape[1])
    return x1 + x - 1, y1 + y - 1


def box_mask(shape: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    """The filled box, `[H, W]` bool."""
    x1, y1, x2, y2 = box
    mask = np.zeros(shape, dtype=bool)
    mask[y1:y2, x1:x2] = True
    return mask


def ellipse_mask(shape: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    """The ellipse inscribed in the box, `[H, W]` bool: pixels whose centre lies in it."""
    x1, y1, x2, y2 = box
    y, x = (np.arange(side) + 0.5 for side in shape)
    dy, dx = (2 * y - y1 - y2) / (y2 - y1), (2 * x - x1 - x2) / (x2 - x1)
    return dy[:, None] ** 2 + dx**2 <= 1


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two bool masks; 0 where both are empty."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 0.0


def score_baselines(photos: Iterable[Photo]) -> dict[str, Any]:
    """Summaries of the filled box and the inscribed ellipse."""
    found = [target for photo in photos for target in photo.targets]
    areas = np.array([target.area for target in found])
    fills = {"filled_box": box_mask, "inscribed_ellipse": ellipse_mask}
    return {
        name: summary(np.array([iou(fill(t.mask.shape, t.box), t.mask) for t in found]), areas)
        for name, fill in fills.items()
    }


@torch.inference_mode()
def score_model(model: RWKVSAM, photos: Iterable[Photo], image_size: int | None = None) -> dict[str, Any]:
    """Summaries of a model: keys "box" and "point" for its single mask.

    With three more outputs, "_best_score" and "_oracle" are the one of the three that the model, or the truth, prefers.

    Args:
        model: in evaluation or training, on any device.
        photos: images with targets; see `read_folder`.
        image_size: side of the model's input; the model's own when left out.
    """
    scores: dict[str, list[Tensor]] = {}
    areas: list[float] = []
    for photo in photos:
        if not photo.targets:
            continue
        pixels, frame = preprocess(photo.image, image_size or model.config.image_size, model.device, model.dtype)
        embedding = model.encode_image(pixels)
        areas += [target.area for target in photo.targets]
        for first in range(0, len(photo.targets), PROMPTS_AT_ONCE):
            chunk = photo.targets[first : first + PROMPTS_AT_ONCE]
            truth = torch.from_numpy(np.stack([target.mask for target in chunk])).to(model.device)
            points = torch.tensor([[target.point] for target in chunk], dtype=torch.float32, device=model.device)
            boxes = torch.tensor([target.box for target in chunk], dtype=torch.float32, device=model.device)
            labels = torch.ones(len(chunk), 1, dtype=torch.long, device=model.device)
            prompts: dict[str, dict[str, Tensor]] = {
                "box": {"boxes": frame.boxes_to_input(boxes)},
                "point": {"point_coords": frame.points_to_input(points), "point_labels": labels},
            }
            for name, prompt in prompts.items():
                low_res_masks, predicted = model.decode_all(embedding, **prompt)
                fit = _mask_iou(frame.masks_to_image(low_res_masks) > 0, truth)
                for key, values in _choices(name, fit, predicted.float()).items():
                    scores.setdefault(key, []).append(values.cpu())
    joined = {key: torch.cat(parts).double().numpy() for key, parts in scores.items()}
    return {key: summary(values[:, 0], np.array(areas), values[:, 1]) for key, values in joined.items()}


def _mask_iou(masks: Tensor, truth: Tensor) -> Tensor:
    """Bool masks `[N, n, H, W]` against `[N, H, W]`: IoU `[N, n]`."""
    truth = truth[:, None]
    intersection, union = (masks & truth).sum((2, 3)), (masks | truth).sum((2, 3))
    return intersection / union.clamp(min=1)


def _choices(name: str, fit: Tensor, predicted: Tensor) -> dict[str, Tensor]:
    """True and predicted IoU `[N, 2]` of the mask that each way of choosing takes from `[N, n]`."""
    both = torch.stack([fit, predicted], dim=-1)
    chosen = {name: both[:, 0]}
    if fit.shape[1] > 1:
        row = torch.arange(len(fit), device=fit.device)
        chosen[f"{name}_best_score"] = both[row, 1 + predicted[:, 1:].argmax(1)]
        chosen[f"{name}_oracle"] = both[row, 1 + fit[:, 1:].argmax(1)]
    return chosen


def summary(ious: np.ndarray, areas: np.ndarray, predicted: np.ndarray | None = None) -> dict[str, Any]:
    """Mean IoU, share above one half, means by area and, given predicted scores, their rank correlation with truth."""
    by_area = {}
    for low, high in AREA_BINS:
        inside = (areas >= low) & ((areas < high) | (high == MAX_AREA))
        mean = float(ious[inside].mean()) if inside.any() else None
        by_area[f"{100 * low:.0f}-{100 * high:.0f}%"] = {"targets": int(inside.sum()), "mean_iou": mean}
    result: dict[str, Any] = {
        "targets": len(ious),
        "mean_iou": float(ious.mean()) if len(ious) else None,
        "iou_above_half": float((ious > 0.5).mean()) if len(ious) else None,
        "by_area": by_area,
    }
    if predicted is not None:
        result["score_spearman"] = spearman(predicted, ious)
    return result


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rank correlation, ties sharing their mean rank; None where one side is constant."""
    if min(len(np.unique(a)), len(np.unique(b))) < 2:
        return None
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def find_pairs(folder: str | Path) -> list[tuple[Path, Path]]:
    """Images and their label maps, in the order of their names.

    Raises:
        FileNotFoundError: no such folder, no image in it, or an image without a label map.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {str(folder)!r}; {LAYOUT}")
    images, labels, suffixes = folder, folder, {".jpg", ".jpeg"}
    if (folder / "images").is_dir():
        images, labels, suffixes = folder / "images", folder / "labels", {".jpg", ".jpeg", ".png"}
    pairs = [(p, labels / f"{p.stem}.png") for p in sorted(images.iterdir()) if p.suffix.lower() in suffixes]
    if not pairs:
        raise FileNotFoundError(f"no images in {str(folder)!r}; {LAYOUT}")
    if missing := [label for _, label in pairs if not label.is_file()]:
        raise FileNotFoundError(f"{len(missing)} of {len(pairs)} label maps lack, first {str(missing[0])!r}; {LAYOUT}")
    return pairs


def read_photo(image_path: Path, label_path: Path) -> Photo:
    """Read an image and the targets of its label map.

    Raises:
        ValueError: the label map has more than one channel, or another size than the image.
    """
    image = load_image(image_path)
    with Image.open(label_path) as picture:
        label_map = np.asarray(picture)
    if label_map.ndim != 2:
        raise ValueError(f"label map {str(label_path)!r} must have one channel, got mode {picture.mode!r}")
    if label_map.shape != image.shape[:2]:
        raise ValueError(f"{str(label_path)!r} is {label_map.shape}, its image {image.shape[:2]} (height, width)")
    return Photo(image, targets(label_map))


def read_folder(folder: str | Path, limit: int | None = None) -> Iterator[Photo]:
    """The first `limit` photographs of a folder, or all of them. Progress goes to a terminal, never into a pipe."""
    for pair in _with_progress(find_pairs(folder)[:limit]):
        yield read_photo(*pair)


def _with_progress(items: Sequence[T]) -> Iterator[T]:
    show = sys.stderr.isatty()
    for index, item in enumerate(items):
        if show:
            print(f"\r{index + 1}/{len(items)} ", end="", file=sys.stderr, flush=True)
        yield item
    if show:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def evaluate(
    model: RWKVSAM, folder: str | Path, limit: int | None = None, image_size: int | None = None
) -> dict[str, Any]:
    """`score_model` on a folder. To score often, keep `list(read_folder(folder))` and call that directly."""
    return score_model(model, read_folder(folder, limit), image_size)


def table(summaries: dict[str, Any]) -> str:
    """Summaries as text: mean IoU, share above one half, means by area, rank correlation of the predicted score."""
    width = max(map(len, TITLES.values()))
    bins = next(iter(summaries.values()))["by_area"]
    counts = [f"n={entry['targets']}" for entry in bins.values()]
    lines = [
        "  ".join([f"{'':{width}}", " mIoU", " >0.5", *(f"{name:>7}" for name in bins), "  rho"]),
        "  ".join([f"{'':{width}}", *[" " * 5] * 2, *(f"{count:>7}" for count in counts)]),
    ]
    for key, row in summaries.items():
        numbers = [
            _number(row["mean_iou"], 5),
            _number(row["iou_above_half"], 5),
            *(_number(entry["mean_iou"], 7) for entry in row["by_area"].values()),
            _number(row.get("score_spearman"), 5, 2),
        ]
        lines.append("  ".join([f"{TITLES[key]:{width}}", *numbers]))
    return "\n".join(lines)


def _number(value: float | None, width: int, digits: int = 3) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="images with label maps")
    parser.add_argument("--model", help="Hub id, folder or .safetensors file; the bundled model by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--image-size", type=int, help="side of the model's input; its own by default")
    parser.add_argument("--limit", type=int, help="take the first N images only")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--baselines-only", action="store_true", help="do not run a model")
    options = parser.parse_args(arguments)
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit must be at least 1, got {options.limit}")

    try:
        photos = list(read_folder(options.folder, options.limit))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    count = sum(len(photo.targets) for photo in photos)
    if not count:
        parser.error(f"no region of 1% to 60% in the {len(photos)} label maps of {str(options.folder)!r}")
    report: dict[str, Any] = {"data": options.folder.resolve().name, "images": len(photos), "targets": count}
    scores = score_baselines(photos)
    if not options.baselines_only:
        model = RWKVSAM.from_pretrained(options.model, device=options.device)
        size = options.image_size or model.config.image_size
        start = time.perf_counter()
        scores |= score_model(model, _with_progress(photos), size)
        report |= {
            "model": options.model or "bundled",
            "variant": model.config.variant,
            "dtype": str(model.dtype).removeprefix("torch."),
            "image_size": size,
            "seconds": round(time.perf_counter() - start, 1),
        }
    report["machine"] = machine(options.device)
    report["versions"] = {name: version(name) for name in ("fastsam-rwkv", "numpy", "pillow")}
    print("  ".join(f"{key}: {value}" for key, value in report.items() if not isinstance(value, dict)))
    print("  ".join(f"{key}: {value}" for key, value in report["machine"].items()))
    print(table(scores))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report | {"scores": scores}, indent=1) + "\n")


if __name__ == "__main__":
    main()
