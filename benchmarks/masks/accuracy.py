"""How well masks fit labelled photographs: IoU and boundary IoU for a box and for 1, 3 and 5 clicks.

    python -m benchmarks.masks.accuracy FOLDER [--annotations FILE] [--model SOURCE]
        [--out FILE.json] [--sheet FILE.png]

FOLDER holds label maps, or is laid out as DIS5K, COIFT, HRSOD or ThinObject5K are (see `photographs`), or holds the
images of a COCO or LVIS annotation file (see `coco`). The box prompt is the target's tight box, or its annotated one.
The first click is its most interior pixel; each next one is the centre of the largest error, with the last answer as
mask prompt. Beside the model stand the two baselines that look at the box alone.

With --out, what was measured on each image is kept beside the results, in FILE.rows.jsonl: the same command goes on
where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm  # huggingface_hub, a dependency of the package, brings it

import fastsam_rwkv
from benchmarks.masks.coco import find_annotated
from benchmarks.masks.contact_sheet import Cell, draw_sheet
from benchmarks.masks.datasets import MAX_AREA, Entry, Photo, find_photographs
from benchmarks.masks.mask_geometry import boundary, box_mask, ellipse_mask, iou, next_click
from benchmarks.speed.timing import machine
from fastsam_rwkv import RWKVSAM, triton_kernels
from fastsam_rwkv.predictor.transforms import preprocess

CLICKS = {1: "point", 3: "clicks_3", 5: "clicks_5"}
PROMPTS = {"box": "box", "point": "1 click", "clicks_3": "3 clicks", "clicks_5": "5 clicks"}
WAYS = {"": "", "_best_score": ", best of 3 by score", "_oracle": ", best of 3 by truth"}
BASELINES = {"filled_box": box_mask, "inscribed_ellipse": ellipse_mask}
TITLES = {"filled_box": "filled box", "inscribed_ellipse": "inscribed ellipse"} | {
    prompt + way: f"model, {title}{chosen}" for prompt, title in PROMPTS.items() for way, chosen in WAYS.items()
}
AREA_BINS = ((0, 0.01), (0.01, 0.03), (0.03, 0.1), (0.1, 0.3), (0.3, 0.6), (0.6, 1))
ALWAYS_SHOWN = AREA_BINS[1:5]  # the sizes that targets of label maps have
PROMPTS_AT_ONCE = 16  # four float masks a prompt at the model's input size,
PIXELS_AT_ONCE = 2**24  # and at the image's size
Row = dict[str, Any]  # a target's "area", "box", "clicks", and "scores": key of TITLES to IoU, boundary IoU, predicted


class Answer(NamedTuple):
    """A model's answers to one kind of prompt for N targets: the single mask first, then the three if it has them.

    Attributes:
        prompt: key of PROMPTS.
        first: number of the first target in its photograph.
        masks: `[N, n, H, W]` bool, at the image's size.
        fit: `[N, n]`, true IoU.
        predicted: `[N, n]`, the model's.
        clicks: (x, y, label) in the image's pixels for each target; label -1 pads where no correction was needed.
    """

    prompt: str
    first: int
    masks: Tensor
    fit: Tensor
    predicted: Tensor
    clicks: list[list[tuple[int, int, int]]]

    def choices(self, i: int) -> dict[str, int]:
        """For each way of choosing, as a key of TITLES, which of target i's n masks it takes."""
        chosen = {self.prompt: 0}
        if self.fit.shape[1] > 1:
            chosen[f"{self.prompt}_best_score"] = 1 + int(self.predicted[i, 1:].argmax())
            chosen[f"{self.prompt}_oracle"] = 1 + int(self.fit[i, 1:].argmax())
        return chosen


@torch.inference_mode()
def answers(
    model: RWKVSAM, photo: Photo, image_size: int | None = None, clicks: Collection[int] = CLICKS
) -> Iterator[Answer]:
    """Encode a photograph once, then answer the box and the clicks for all its targets, some targets at a time.

    As SAM is used and evaluated (arXiv 2304.02643, A and D.1), the answer to correct after one click, which is
    ambiguous, is the one of the three that the model believes most; after several it is the single mask. Its
    low-resolution logits are the next mask prompt.

    Args:
        model: in evaluation or training, on any device.
        photo: with any number of targets.
        image_size: side of the model's input; the model's own when left out.
        clicks: which of CLICKS to give answers for.
    """
    if not photo.targets:
        return
    pixels, frame = preprocess(photo.image, image_size or model.config.image_size, model.device, model.dtype)
    embedding = model.encode_image(pixels)
    height, width = photo.image.shape[:2]
    at_once = max(1, min(PROMPTS_AT_ONCE, PIXELS_AT_ONCE // (height * width)))
    most = max(clicks, default=0)
    for first in range(0, len(photo.targets), at_once):
        chunk = photo.targets[first : first + at_once]
        truth = torch.from_numpy(np.stack([target.mask for target in chunk])).to(model.device)
        boxes = torch.tensor([target.box for target in chunk], dtype=torch.float32, device=model.device)
        low_res_masks, predicted = model.decode_all(embedding, boxes=frame.boxes_to_input(boxes))
        masks = frame.masks_to_image(low_res_masks) > 0
        yield Answer("box", first, masks, _mask_iou(masks, truth), predicted.float(), [[] for _ in chunk])
        given = [[(*target.point, 1)] for target in chunk]
        mask_input = None
        row = torch.arange(len(chunk), device=model.device)
        for count in range(1, most + 1):
            points = torch.tensor(given, device=model.device)
            low_res_masks, predicted = model.decode_all(
                embedding,
                point_coords=frame.points_to_input(points[..., :2].float()),
                point_labels=points[..., 2],
                mask_input=mask_input,
            )
            masks = frame.masks_to_image(low_res_masks) > 0
            if count in clicks:
                yield Answer(CLICKS[count], first, masks, _mask_iou(masks, truth), predicted.float(), given)
            if count == most:
                break
            followed = torch.zeros_like(row)
            if count == 1 and predicted.shape[1] > 1:
                followed = 1 + predicted[:, 1:].argmax(1)
            mask_input = low_res_masks[row, followed][:, None]
            wrong = zip(masks[row, followed].cpu().numpy(), chunk, given, strict=True)
            given = [[*old, next_click(mask, target.mask) or (*old[-1][:2], -1)] for mask, target, old in wrong]


def _mask_iou(masks: Tensor, truth: Tensor) -> Tensor:
    """Bool masks `[N, n, H, W]` against `[N, H, W]`: IoU `[N, n]`."""
    truth = truth[:, None]
    intersection, union = (masks & truth).sum((2, 3)), (masks | truth).sum((2, 3))
    return intersection / union.clamp(min=1)


def baseline_rows(photo: Photo) -> list[Row]:
    """The scores of the filled box and of the inscribed ellipse, a row a target."""
    rows = []
    for target in photo.targets:
        edge = boundary(target.mask)
        fills = {name: fill(target.mask.shape, target.box) for name, fill in BASELINES.items()}
        scores = {name: [iou(mask, target.mask), iou(boundary(mask), edge)] for name, mask in fills.items()}
        rows.append({"area": target.area, "box": list(target.box), "clicks": [], "scores": scores})
    return rows


def model_rows(
    model: RWKVSAM, photo: Photo, image_size: int | None = None, clicks: Collection[int] = CLICKS
) -> list[Row]:
    """The scores of a model, a row a target. For the arguments see `answers`."""
    rows: list[Row] = [{"area": t.area, "box": list(t.box), "clicks": [], "scores": {}} for t in photo.targets]
    edges = [boundary(target.mask) for target in photo.targets]
    for answer in answers(model, photo, image_size, clicks):
        fit, predicted = answer.fit.tolist(), answer.predicted.tolist()
        masks = answer.masks.cpu().numpy()
        for i, row in enumerate(rows[answer.first : answer.first + len(masks)]):
            choices = answer.choices(i)
            edge = {n: iou(boundary(masks[i, n]), edges[answer.first + i]) for n in set(choices.values())}
            row["scores"] |= {key: [fit[i][n], edge[n], predicted[i][n]] for key, n in choices.items()}
            row["clicks"] = answer.clicks[i] or row["clicks"]
    return rows


def summaries(rows: Sequence[Row]) -> dict[str, Any]:
    """`summary` of every score in the rows, by key of TITLES."""
    areas = np.array([row["area"] for row in rows])
    result = {}
    for key in (key for key in TITLES if rows and key in rows[0]["scores"]):
        ious, boundary_ious, *predicted = np.array([row["scores"][key] for row in rows]).T
        result[key] = summary(ious, areas, *predicted, boundary_ious=boundary_ious)
    return result


def score_baselines(photos: Iterable[Photo]) -> dict[str, Any]:
    """Summaries of the filled box and the inscribed ellipse."""
    return summaries([row for photo in photos for row in baseline_rows(photo)])


def score_model(
    model: RWKVSAM, photos: Iterable[Photo], image_size: int | None = None, clicks: Collection[int] = CLICKS
) -> dict[str, Any]:
    """Summaries of a model: keys "box", "point", "clicks_3" and "clicks_5" for its single mask.

    With three more outputs, "_best_score" and "_oracle" are the one of the three that the model, or the truth, prefers.
    For the arguments see `answers`; `clicks=(1,)` takes a fraction of the time.
    """
    return summaries([row for photo in photos for row in model_rows(model, photo, image_size, clicks)])


def summary(
    ious: np.ndarray,
    areas: np.ndarray,
    predicted: np.ndarray | None = None,
    boundary_ious: np.ndarray | None = None,
) -> dict[str, Any]:
    """Mean IoU and boundary IoU, share above one half, means by area, rank correlation of predicted scores with truth.

    Areas below 1% and above 60% have a mean of their own where there are any.
    """
    by_area = {}
    for low, high in AREA_BINS:
        above = areas > low if low == MAX_AREA else areas >= low
        inside = above & (areas <= high if high >= MAX_AREA else areas < high)
        if inside.any() or (low, high) in ALWAYS_SHOWN:
            mean = float(ious[inside].mean()) if inside.any() else None
            by_area[f"{100 * low:.0f}-{100 * high:.0f}%"] = {"targets": int(inside.sum()), "mean_iou": mean}
    result: dict[str, Any] = {"targets": len(ious), "mean_iou": float(ious.mean()) if len(ious) else None}
    if boundary_ious is not None:
        result["mean_boundary_iou"] = float(boundary_ious.mean())
    result["iou_above_half"] = float((ious > 0.5).mean()) if len(ious) else None
    result["by_area"] = by_area
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


def read_folder(folder: str | Path, limit: int | None = None) -> Iterator[Photo]:
    """The first `limit` photographs of a folder, or all of them. Progress goes to a terminal, never into a pipe."""
    for entry in _with_progress(find_photographs(folder)[:limit]):
        yield entry.read()


def _with_progress(entries: Sequence[Entry], done: int = 0) -> Iterable[Entry]:
    return tqdm(entries, disable=None, unit="image", initial=done, total=done + len(entries), leave=False)


def evaluate(
    model: RWKVSAM, folder: str | Path, limit: int | None = None, image_size: int | None = None
) -> dict[str, Any]:
    """`score_model` on a folder. To score often, keep `list(read_folder(folder))` and call that directly."""
    return score_model(model, read_folder(folder, limit), image_size)


def fingerprint(
    model: RWKVSAM | None, image_size: int | None, entries: Iterable[Entry], annotations: Path | None = None
) -> dict[str, Any]:
    """What rows depend on: the code, the data by names, sizes and annotations, the weights and how they are run."""
    kernels = Path(triton_kernels.__file__).parent
    sources = [*Path(fastsam_rwkv.__file__).parent.glob("*.py"), *kernels.glob("*.py")]
    sources += [Path(__file__).with_name(f"{name}.py") for name in ("accuracy", "coco", "mask_geometry", "photographs")]
    code = _digest(path.read_bytes() for path in sorted(sources))
    sizes = [[entry.name, *(path.stat().st_size for path in entry.files)] for entry in entries]
    data = _digest([json.dumps(sizes).encode(), annotations.read_bytes() if annotations else b""])
    result: dict[str, Any] = {"code": code, "data": data, "model": None}
    if model is not None:
        state = (tensor.cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in model.state_dict().values())
        result["model"] = _digest([repr(model.config).encode(), *(tensor.numpy().tobytes() for tensor in state)])
        result["dtype"] = str(model.dtype).removeprefix("torch.")
        result |= {"device": model.device.type, "image_size": image_size}
    return result


def _digest(parts: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def read_rows(path: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run has left in `path`: image name to {"seconds", "rows"}. A line that was cut off is removed.

    The file has one JSON object a line: first {"fingerprint"}, then {"image", "seconds", "rows"} an image. It is made
    when there is none.

    Raises:
        ValueError: the rows are of another model, of other data or settings, or the file is damaged.
    """
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    if lines and not lines[-1].endswith("\n"):
        del lines[-1]
    lines = lines or [json.dumps({"fingerprint": expected}) + "\n"]
    try:
        header, *rows = map(json.loads, lines)
        found = header["fingerprint"]
        done = {row["image"]: {"seconds": row["seconds"], "rows": row["rows"]} for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}); delete it to measure anew") from error
    if found != expected:
        changed = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
        raise ValueError(
            f"{str(path)!r} holds rows of another run ("
            + ", ".join(f"{key}: {found.get(key)} there, {expected.get(key)} here" for key in changed)
            + "); delete it to measure anew, or give another --out"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))
    return done


def measure(
    model: RWKVSAM | None,
    entries: Sequence[Entry],
    image_size: int | None = None,
    done: dict[str, Any] | None = None,
    rows_path: Path | None = None,
) -> dict[str, Any]:
    """Baselines, and a model's scores if there is one: image name to {"seconds", "rows"}.

    Args:
        model, image_size: see `answers`.
        entries: what to measure.
        done: what need not be measured any more, see `read_rows`.
        rows_path: where each image is added as soon as it is done.
    """
    done = dict(done or {})
    left = [entry for entry in entries if entry.name not in done]
    for entry in _with_progress(left, len(entries) - len(left)):
        start = time.perf_counter()
        photo = entry.read()
        rows = baseline_rows(photo)
        if model is not None:
            for row, scored in zip(rows, model_rows(model, photo, image_size), strict=True):
                row |= {"clicks": scored["clicks"], "scores": row["scores"] | scored["scores"]}
        done[entry.name] = {"seconds": round(time.perf_counter() - start, 3), "rows": rows}
        if rows_path:
            with rows_path.open("a") as file:
                file.write(json.dumps({"image": entry.name, **done[entry.name]}) + "\n")
    return done


def picture_sheet(
    model: RWKVSAM, entries: Iterable[Entry], done: dict[str, Any], image_size: int | None = None
) -> Image.Image:
    """The targets of best, median and worst IoU for each prompt, answered once more: truth, and answer with prompt.

    After one click that is the best of three by score, where there are three, and the single mask otherwise.
    """
    by_name = {entry.name: entry for entry in entries}
    cells = []
    for prompt in PROMPTS:
        ranked = []
        for name in by_name:
            for index, row in enumerate(done[name]["rows"]):
                key = "point_best_score" if prompt == "point" and "point_best_score" in row["scores"] else prompt
                ranked.append((*row["scores"][key][:2], name, index))
        ranked.sort()
        for which, place in {"best": -1, "median": (len(ranked) - 1) // 2, "worst": 0}.items():
            fit, edge_fit, name, index = ranked[place]
            caption = f"{TITLES[key]}: {which}, IoU {fit:.3f}, boundary IoU {edge_fit:.3f}, {name}"
            photo = by_name[name].read()
            photo = photo._replace(targets=photo.targets[index : index + 1])
            clicks = [count for count, its_prompt in CLICKS.items() if its_prompt == prompt]
            *_, answer = answers(model, photo, image_size, clicks)
            mask = answer.masks[0, answer.choices(0)[key]].cpu().numpy()
            boxes = [photo.targets[0].box] if prompt == "box" else []
            points = [click for click in answer.clicks[0] if click[2] >= 0]
            cells.append(Cell(photo.image, photo.targets[0].mask, mask, points, boxes, caption))
    return draw_sheet(cells, columns=3)


def table(found: dict[str, Any]) -> str:
    """`summaries` as text: mean IoU, mean boundary IoU, share above one half, means by area, rank correlation."""
    width = max(map(len, TITLES.values()))
    bins = next(iter(found.values()))["by_area"]
    counts = [f"n={entry['targets']}" for entry in bins.values()]
    lines = [
        "  ".join([f"{'':{width}}", " mIoU", "mBIoU", " >0.5", *(f"{name:>7}" for name in bins), "  rho"]),
        "  ".join([f"{'':{width}}", *[" " * 5] * 3, *(f"{count:>7}" for count in counts)]),
    ]
    for key, row in found.items():
        numbers = [
            _number(row["mean_iou"], 5),
            _number(row["mean_boundary_iou"], 5),
            _number(row["iou_above_half"], 5),
            *(_number(entry["mean_iou"], 7) for entry in row["by_area"].values()),
            _number(row.get("score_spearman"), 5, 2),
        ]
        lines.append("  ".join([f"{TITLES[key]:{width}}", *numbers]))
    return "\n".join(lines)


def _number(value: float | None, width: int, digits: int = 3) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.masks.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="images with label maps or masks, or those of --annotations")
    parser.add_argument("--annotations", type=Path, help="COCO or LVIS instances file for the images in the folder")
    parser.add_argument("--model", help="Hub id, folder or .safetensors file; the bundled model by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--image-size", type=int, help="side of the model's input; its own by default")
    parser.add_argument("--limit", type=int, help="take the first N images only")
    parser.add_argument("--seed", type=int, help="with --limit: take N images drawn with this seed, not the first")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file, and go on where it was left")
    parser.add_argument("--sheet", type=Path, help="write a picture of the best, median and worst masks")
    parser.add_argument("--baselines-only", action="store_true", help="do not run a model")
    options = parser.parse_args(arguments)
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit must be at least 1, got {options.limit}")
    if options.seed is not None and options.limit is None:
        parser.error("--seed draws the images that --limit takes; give both")
    if options.sheet and options.baselines_only:
        parser.error("--sheet shows a model's masks; give it without --baselines-only")
    writable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE}
    if options.sheet and options.sheet.suffix.lower() not in writable:
        parser.error(f"--sheet {str(options.sheet)!r} must end as a picture does, in .png for example")

    for option, file in (("--out", options.out), ("--sheet", options.sheet)):
        if file and file.is_dir():
            parser.error(f"{option} {str(file)!r} is a folder; give a file's name")

    model, size = None, None
    try:
        if options.annotations:
            entries = find_annotated(options.folder, options.annotations)
        else:
            entries = find_photographs(options.folder)
        if not options.baselines_only:
            model = RWKVSAM.from_pretrained(options.model, device=options.device)
            size = options.image_size or model.config.image_size
        run = fingerprint(model, size, entries, options.annotations)
        if options.seed is not None:
            random.Random(options.seed).shuffle(entries)
        entries = entries[: options.limit]
        rows_path = options.out and options.out.with_suffix(".rows.jsonl")
        done = read_rows(rows_path, run) if rows_path else {}
        if known := sum(entry.name in done for entry in entries):
            print(f"{known} of {len(entries)} images are in {rows_path} already")
        done = measure(model, entries, size, done, rows_path)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    rows = [row for entry in entries for row in done[entry.name]["rows"]]
    if not rows:
        parser.error(
            f"no target in the {len(entries)} images of {str(options.folder)!r}; "
            "label maps need a region of 1% to 60% of the image"
        )
    report: dict[str, Any] = {"data": options.folder.resolve().name}
    if options.annotations:
        report["annotations"] = options.annotations.name
    if options.seed is not None:
        report["seed"] = options.seed
    report |= {"images": len(entries), "targets": len(rows)}
    if model is not None:
        report |= {"model": options.model or "bundled", "variant": model.config.variant, "dtype": run["dtype"]}
        report |= {"image_size": size, "seconds": round(sum(done[entry.name]["seconds"] for entry in entries), 1)}
    report["fingerprint"] = run
    report["machine"] = machine(options.device)
    report["versions"] = {name: version(name) for name in ("fastsam-rwkv", "numpy", "pillow")}
    scores = summaries(rows)
    print("  ".join(f"{key}: {value}" for key, value in report.items() if not isinstance(value, dict)))
    print("  ".join(f"{key}: {value}" for key, value in report["machine"].items()))
    print(table(scores))
    if options.out:
        options.out.write_text(json.dumps(report | {"scores": scores}, indent=1) + "\n")
    if options.sheet and model is not None:
        options.sheet.parent.mkdir(parents=True, exist_ok=True)
        picture_sheet(model, entries, done, size).save(options.sheet)


if __name__ == "__main__":
    main()
