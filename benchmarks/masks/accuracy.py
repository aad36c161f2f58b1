"""Mean IoU and boundary IoU of masks on labeled photographs, for a box and for 1, 3 and 5 clicks.

    python -m benchmarks.masks.accuracy FOLDER [--annotations FILE] [--model SOURCE]
        [--grabcut] [--zoom auto] [--out FILE.json] [--sheet FILE.png]

FOLDER has a layout that `datasets` reads, or the images of a COCO or LVIS annotation file, which `coco` reads. The box
prompt is the target's tight box, or its annotated one. The first click is the target's most interior pixel. Each next
click is the center of the largest error, with the last low-resolution mask as mask prompt. Two baselines see the box
alone: the filled box and the inscribed ellipse.

With --out, every image's rows are kept in FILE.rows.jsonl as soon as they are measured. The same command resumes there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm  # huggingface_hub, a dependency of the package, brings it

from benchmarks.masks.coco import find_annotated
from benchmarks.masks.contact_sheet import Cell, draw_sheet
from benchmarks.masks.datasets import MAX_AREA, MIN_AREA, Entry, Photograph, Target, find_photographs
from benchmarks.masks.mask_geometry import boundary, box_mask, ellipse_mask, grabcut_mask, mask_iou, next_click
from benchmarks.speed.timing import machine, source_files
from fastsam_rwkv import RWKVSAM, Predictor, __version__
from fastsam_rwkv.predictor.answers import Zoom
from fastsam_rwkv.predictor.transforms import masks_to_image, preprocess

CLICKS = {1: "point", 3: "clicks_3", 5: "clicks_5"}
PROMPTS = {"box": "box", "point": "1 click", "clicks_3": "3 clicks", "clicks_5": "5 clicks"}
CHOICES = {"": "", "_best_score": ", best of 3 by score", "_oracle": ", best of 3 by truth"}
TITLES = {"filled_box": "filled box", "inscribed_ellipse": "inscribed ellipse", "grabcut": "GrabCut"} | {
    prompt + choice: f"model, {title}{chosen}"
    for prompt, title in PROMPTS.items()
    for choice, chosen in CHOICES.items()
}
AREA_BINS = ((0, 0.01), (0.01, 0.03), (0.03, 0.1), (0.1, 0.3), (0.3, 0.6), (0.6, 1))
ALWAYS_SHOWN = AREA_BINS[1:5]  # areas of the targets of label maps
COCO_SIZES = {"S": (0, 32**2), "M": (32**2, 96**2), "L": (96**2, math.inf)}  # pixels: pycocotools' COCOeval
OPENCV = "opencv-python-headless"
PROMPTS_AT_ONCE = 16  # limits the float masks at the model's input size, four per prompt
PIXELS_AT_ONCE = 2**24  # limits the float masks at the image's size
# "area", "pixels", "box" and "clicks" of a target; "scores": key of TITLES to IoU, boundary IoU, predicted IoU;
# "reversed": key of TITLES to whether the answer to the box is reversed
Row = dict[str, Any]


class Answer(NamedTuple):
    """Masks for one kind of prompt and N targets: the single mask first, then the three if the model has them."""

    prompt: str  # key of PROMPTS
    first: int  # index of the first target in its photograph
    masks: Tensor  # [N, n, H, W] bool, at the image's size
    iou: Tensor  # [N, n], IoU with the truth
    predicted: Tensor  # [N, n], predicted IoU
    clicks: list[list[tuple[int, int, int]]]  # (x, y, label) in image pixels; label -1 pads after a perfect mask

    def choices(self, i: int) -> dict[str, int]:
        """Return the index of target i's mask for each way to choose one, by key of TITLES."""
        chosen = {self.prompt: 0}
        if self.iou.shape[1] > 1:
            chosen[f"{self.prompt}_best_score"] = 1 + int(self.predicted[i, 1:].argmax())
            chosen[f"{self.prompt}_oracle"] = 1 + int(self.iou[i, 1:].argmax())
        return chosen


@torch.inference_mode()
def answers(
    model: RWKVSAM,
    photograph: Photograph,
    image_size: int | None = None,
    clicks: Collection[int] = CLICKS,
    zoom: Zoom = "never",
) -> Iterator[Answer]:
    """Encode a photograph once, then decode the box and the clicks of all its targets, some targets at a time.

    As in SAM's evaluation (arXiv 2304.02643, D.1), one click is ambiguous: the mask with the highest predicted IoU
    follows it. Later clicks correct the single mask. Its low-resolution logits are the next mask prompt.

    Args:
        model: Model on any device.
        photograph: Image with any number of targets.
        image_size: Side of the model input, by default the model's own.
        clicks: Keys of CLICKS to yield.
        zoom: As in `Predictor.predict`.
    """
    if not photograph.targets:
        return
    at_once = max(1, min(PROMPTS_AT_ONCE, PIXELS_AT_ONCE // photograph.image[..., 0].size))
    if zoom == "never":
        decode = _decoder(model, photograph.image, image_size or model.config.image_size)
    else:
        decode, at_once = _zooming_decoder(model, photograph.image, zoom), 1  # few windows are kept
    most = max(clicks, default=0)
    for first in range(0, len(photograph.targets), at_once):
        chunk = photograph.targets[first : first + at_once]
        truth = torch.from_numpy(np.stack([target.mask for target in chunk])).to(model.device)[:, None]
        boxes = torch.tensor([target.box for target in chunk], dtype=torch.float32, device=model.device)
        _, masks, predicted = decode(box=boxes)
        yield Answer("box", first, masks, mask_iou(masks, truth), predicted, [[] for _ in chunk])
        given = [[(*target.point, 1)] for target in chunk]
        mask_input = None
        row = torch.arange(len(chunk), device=model.device)
        for count in range(1, most + 1):
            points = torch.tensor(given, device=model.device)
            low_res_masks, masks, predicted = decode(
                point_coords=points[..., :2].float(), point_labels=points[..., 2], mask_input=mask_input
            )
            if count in clicks:
                yield Answer(CLICKS[count], first, masks, mask_iou(masks, truth), predicted, given)
            if count == most:
                break
            followed = torch.zeros_like(row)
            if count == 1 and predicted.shape[1] > 1:
                followed = 1 + predicted[:, 1:].argmax(1)
            mask_input = low_res_masks[row, followed][:, None]
            wrong = zip(masks[row, followed].cpu().numpy(), chunk, given, strict=True)
            given = [[*old, next_click(mask, target.mask) or (*old[-1][:2], -1)] for mask, target, old in wrong]


Decoder = Callable[..., tuple[Tensor, Tensor, Tensor]]  # prompts in the image frame to logits, masks, predicted IoUs


def _decoder(model: RWKVSAM, image: np.ndarray, image_size: int) -> Decoder:
    """Encode an image and decode prompts on it: the single mask and the three from one pass."""
    pixels, frame = preprocess(image, image_size, model.device, model.dtype)
    embedding = model.encode_image(pixels)

    def decode(
        box: Tensor | None = None, point_coords: Tensor | None = None, **prompts: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        if box is not None:
            prompts["boxes"] = frame.boxes_to_input(box)
        if point_coords is not None:
            prompts["point_coords"] = frame.points_to_input(point_coords)
        low_res_masks, predicted = model.decode_all(embedding, **prompts)
        return low_res_masks, masks_to_image(low_res_masks, frame) > 0, predicted.float()

    return decode


def _zooming_decoder(model: RWKVSAM, image: np.ndarray, zoom: Zoom) -> Decoder:
    """Return the same for one prompt, answered by `Predictor.predict`."""
    predictor = Predictor(model)
    predictor.set_image(image)

    def decode(**prompts: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        one: dict[str, Any] = {name: value[0] for name, value in prompts.items() if value is not None}
        kinds = (False, True) if predictor.has_multimask else (False,)
        found = [predictor.predict(**one, multimask_output=kind, zoom=zoom) for kind in kinds]
        masks, predicted, low = (torch.from_numpy(np.concatenate(parts))[None] for parts in zip(*found, strict=True))
        return low.to(model.device), masks.to(model.device), predicted.to(model.device)

    return decode


def baseline_rows(photograph: Photograph, grabcut: bool = False) -> list[Row]:
    """Score the filled box, the inscribed ellipse and, if asked for, GrabCut; one row per target."""
    rows = []
    for target in photograph.targets:
        edge, shape = boundary(target.mask), target.mask.shape
        masks = {"filled_box": box_mask(shape, target.box), "inscribed_ellipse": ellipse_mask(shape, target.box)}
        row = _row(target)
        if grabcut:
            masks["grabcut"] = grabcut_mask(photograph.image, target.box)
            row["reversed"] = {"grabcut": is_reversed(masks["grabcut"], target)}
        row["scores"] = {name: [_iou(m, target.mask), _iou(boundary(m), edge)] for name, m in masks.items()}
        rows.append(row)
    return rows


def _row(target: Target) -> Row:
    row = {"area": target.area, "pixels": int(target.mask.sum()), "box": list(target.box)}
    return row | {"clicks": [], "scores": {}, "reversed": {}}


def is_reversed(mask: np.ndarray, target: Target) -> bool:
    """Return whether a mask `[H, W]` fits the rest of the target's box better than the target."""
    rest = box_mask(target.mask.shape, target.box) & ~target.mask
    return _iou(mask, rest) > _iou(mask, target.mask)


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return float(mask_iou(a, b))


def model_rows(
    model: RWKVSAM,
    photograph: Photograph,
    image_size: int | None = None,
    clicks: Collection[int] = CLICKS,
    zoom: Zoom = "never",
) -> list[Row]:
    """Score a model; one row per target. See `answers` for the arguments."""
    rows = [_row(target) for target in photograph.targets]
    edges = [boundary(target.mask) for target in photograph.targets]
    for answer in answers(model, photograph, image_size, clicks, zoom):
        ious, predicted = answer.iou.tolist(), answer.predicted.tolist()
        masks = answer.masks.cpu().numpy()
        for i, row in enumerate(rows[answer.first : answer.first + len(masks)]):
            choices = answer.choices(i)
            edge = {n: _iou(boundary(masks[i, n]), edges[answer.first + i]) for n in set(choices.values())}
            row["scores"] |= {key: [ious[i][n], edge[n], predicted[i][n]] for key, n in choices.items()}
            row["clicks"] = answer.clicks[i] or row["clicks"]
            if answer.prompt == "box":
                target = photograph.targets[answer.first + i]
                row["reversed"] = {key: is_reversed(masks[i, n], target) for key, n in choices.items()}
    return rows


def summaries(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the `summary` of every score in the rows, by key of TITLES."""
    areas, pixels = (np.array([row[name] for row in rows]) for name in ("area", "pixels"))
    result = {}
    for key in (key for key in TITLES if rows and key in rows[0]["scores"]):
        result[key] = summary(areas, pixels, *np.array([row["scores"][key] for row in rows]).T)
        if key in rows[0]["reversed"]:
            flags = np.array([row["reversed"][key] for row in rows])
            result[key] |= {"reversed": _mean(flags), "reversed_from_1_percent": _mean(flags[areas >= MIN_AREA])}
    return result


def summary(
    areas: np.ndarray,
    pixels: np.ndarray,
    ious: np.ndarray,
    boundary_ious: np.ndarray,
    predicted: np.ndarray | None = None,
) -> dict[str, Any]:
    """Average IoU and boundary IoU, count IoU above one half, and rank predicted IoU against IoU.

    Areas below 1 % and above 60 % have a bin if there are any. Sizes are COCO's small, medium and large.
    """
    by_area = {}
    for low, high in AREA_BINS:
        above = areas > low if low == MAX_AREA else areas >= low
        inside = above & (areas <= high if high >= MAX_AREA else areas < high)
        if inside.any() or (low, high) in ALWAYS_SHOWN:
            by_area[f"{100 * low:.0f}-{100 * high:.0f}%"] = _bin(ious[inside])
    result: dict[str, Any] = {"targets": len(ious), "mean_iou": _mean(ious)}
    result["mean_iou_from_1_percent"] = _mean(ious[areas >= MIN_AREA])
    result["mean_boundary_iou"] = _mean(boundary_ious)
    result["iou_above_half"] = _mean(ious > 0.5)
    result["by_area"] = by_area
    result["by_size"] = {
        name: _bin(ious[(pixels >= low) & (pixels < high)]) for name, (low, high) in COCO_SIZES.items()
    }
    if predicted is not None:
        result["score_spearman"] = spearman(predicted, ious)
    return result


def _bin(ious: np.ndarray) -> dict[str, Any]:
    return {"targets": len(ious), "mean_iou": _mean(ious)}


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Return Spearman's rank correlation, or None if one side is constant. Ties share their mean rank."""
    if min(len(np.unique(a)), len(np.unique(b))) < 2:
        return None
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def fingerprint(
    model: RWKVSAM | None,
    image_size: int | None,
    entries: Iterable[Entry],
    annotations: Path | None = None,
    grabcut: bool = False,
    zoom: Zoom = "never",
) -> dict[str, Any]:
    """Identify all that rows depend on: code, weights and their use, and data by name, size and annotations."""
    code = _digest(path.read_bytes() for path in (*source_files(), *sorted(Path(__file__).parent.glob("*.py"))))
    sizes = [[entry.name, *(path.stat().st_size for path in entry.files)] for entry in entries]
    data = _digest([json.dumps(sizes).encode(), annotations.read_bytes() if annotations else b""])
    result: dict[str, Any] = {"code": code, "data": data, "grabcut": grabcut and version(OPENCV), "model": None}
    if model is not None:
        state = (tensor.cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in model.state_dict().values())
        result["model"] = _digest([repr(model.config).encode(), *(tensor.numpy().tobytes() for tensor in state)])
        result["dtype"] = str(model.dtype).removeprefix("torch.")
        result |= {"device": model.device.type, "image_size": image_size, "zoom": zoom}
    return result


def _digest(parts: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def read_rows(path: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Read the rows of an earlier run from `path`, as image name to {"seconds", "rows"}, and remove an unfinished line.

    The file has one JSON object per line: {"fingerprint"} first, then {"image", "seconds", "rows"} for each image. A
    missing file is created.

    Raises:
        ValueError: The rows are of another model, other data or other settings, or the file is damaged.
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
    grabcut: bool = False,
    zoom: Zoom = "never",
) -> dict[str, Any]:
    """Score the baselines and a model, if there is one: image name to {"seconds", "rows"}.

    Args:
        model: See `answers`, as for `image_size`.
        entries: Photographs to measure.
        image_size: Side of the model input.
        done: Images measured already; see `read_rows`.
        rows_path: File to which each image's rows are appended.
        grabcut: Score GrabCut, too.
        zoom: As in `Predictor.predict`.
    """
    done = dict(done or {})
    left = [entry for entry in entries if entry.name not in done]
    progress = {"initial": len(entries) - len(left), "total": len(entries)}
    for entry in tqdm(left, disable=None, unit="image", leave=False, **progress):
        start = time.perf_counter()
        photograph = entry.read()
        rows = baseline_rows(photograph, grabcut)
        if model is not None:
            for row, scored in zip(rows, model_rows(model, photograph, image_size, zoom=zoom), strict=True):
                row["clicks"] = scored["clicks"]
                row |= {name: row[name] | scored[name] for name in ("scores", "reversed")}
        done[entry.name] = {"seconds": round(time.perf_counter() - start, 3), "rows": rows}
        if rows_path:
            with rows_path.open("a") as file:
                file.write(json.dumps({"image": entry.name, **done[entry.name]}) + "\n")
    return done


def contact_sheet(
    model: RWKVSAM,
    entries: Iterable[Entry],
    done: dict[str, Any],
    image_size: int | None = None,
    zoom: Zoom = "never",
) -> Image.Image:
    """Draw the targets of best, median and worst IoU for each prompt: the truth, and a fresh mask with its prompt.

    For one click the mask is the best of three by score, if there are three, else the single one.
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
            iou, boundary_iou, name, index = ranked[place]
            caption = f"{TITLES[key]}: {which}, IoU {iou:.3f}, boundary IoU {boundary_iou:.3f}, {name}"
            photograph = by_name[name].read()
            photograph = photograph._replace(targets=photograph.targets[index : index + 1])
            clicks = [count for count, its_prompt in CLICKS.items() if its_prompt == prompt]
            *_, answer = answers(model, photograph, image_size, clicks, zoom)
            mask = answer.masks[0, answer.choices(0)[key]].cpu().numpy()
            boxes = [photograph.targets[0].box] if prompt == "box" else []
            points = [click for click in answer.clicks[0] if click[2] >= 0]
            cells.append(Cell(photograph.image, photograph.targets[0].mask, mask, points, boxes, caption))
    return draw_sheet(cells, columns=3)


def table(found: dict[str, Any]) -> str:
    """Format `summaries`: one row per prompt; see the header's names.

    mIoU, mBIoU: mean IoU and boundary IoU. >=1%: mean IoU of targets of 1 % of the image and more. >0.5: share of IoU
    above one half. S, M, L: mean IoU by COCO's sizes, then by area. rev: share of reversed answers, of targets of 1 %
    and more. rho: rank correlation of predicted IoU and IoU.
    """
    width = max(map(len, TITLES.values()))
    first = next(iter(found.values()))
    bins = first["by_size"] | first["by_area"]
    counts = [f"n={entry['targets']}" for entry in bins.values()]
    lines = [
        "  ".join(
            [f"{'':{width}}", " mIoU", " >=1%", "mBIoU", " >0.5", *(f"{name:>7}" for name in bins), "  rev", "  rho"]
        ),
        "  ".join([f"{'':{width}}", *[" " * 5] * 4, *(f"{count:>7}" for count in counts)]),
    ]
    means = ("mean_iou", "mean_iou_from_1_percent", "mean_boundary_iou", "iou_above_half")
    for key, row in found.items():
        numbers = [
            *(_number(row[name], 5) for name in means),
            *(_number(entry["mean_iou"], 7) for entry in (row["by_size"] | row["by_area"]).values()),
            _number(row.get("reversed_from_1_percent"), 5),
            _number(row.get("score_spearman"), 5, 2),
        ]
        lines.append("  ".join([f"{TITLES[key]:{width}}", *numbers]))
    return "\n".join(lines)


def _number(value: float | None, width: int, digits: int = 3) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.masks.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="images with label maps or masks, or the images of --annotations")
    parser.add_argument("--annotations", type=Path, help="COCO or LVIS instances file of the images in the folder")
    parser.add_argument("--model", help="Hub id, folder or .safetensors file; the bundled model by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--image-size", type=int, help="side of the model input; the model's own by default")
    parser.add_argument("--limit", type=int, help="take the first N images only")
    parser.add_argument("--seed", type=int, help="with --limit: draw N images with this seed")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file, and resume from an earlier run")
    parser.add_argument("--sheet", type=Path, help="draw the best, median and worst masks into this image file")
    parser.add_argument("--grabcut", action="store_true", help="score OpenCV's GrabCut, too; it needs '.[benchmark]'")
    parser.add_argument("--zoom", choices=get_args(Zoom), default="never", help="encode windows around targets")
    parser.add_argument("--baselines-only", action="store_true", help="do not run a model")
    options = parser.parse_args(arguments)
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit must be at least 1, got {options.limit}")
    if options.seed is not None and options.limit is None:
        parser.error("--seed draws the images that --limit takes; give both")
    if options.zoom != "never" and options.image_size:
        parser.error("--zoom takes the model's own image size; leave out --image-size")
    if options.sheet and options.baselines_only:
        parser.error("--sheet shows a model's masks; give it without --baselines-only")

    model, size = None, None
    try:
        if options.annotations:
            entries = find_annotated(options.folder, options.annotations)
        else:
            entries = find_photographs(options.folder)
        if not options.baselines_only:
            model = RWKVSAM.from_pretrained(options.model, device=options.device)
            size = options.image_size or model.config.image_size
        run = fingerprint(model, size, entries, options.annotations, options.grabcut, options.zoom)
        if options.seed is not None:
            random.Random(options.seed).shuffle(entries)
        entries = entries[: options.limit]
        rows_path = options.out and options.out.with_suffix(".rows.jsonl")
        done = read_rows(rows_path, run) if rows_path else {}
        if known := sum(entry.name in done for entry in entries):
            print(f"{known} of {len(entries)} images are in {rows_path} already")
        done = measure(model, entries, size, done, rows_path, options.grabcut, options.zoom)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    rows = [row for entry in entries for row in done[entry.name]["rows"]]
    if not rows:
        parser.error(
            f"no target in the {len(entries)} images of {str(options.folder)!r}; "
            "label maps need a region of 1 % to 60 % of the image"
        )
    report: dict[str, Any] = {"data": options.folder.resolve().name}
    report |= {"annotations": options.annotations.name} if options.annotations else {}
    report |= {} if options.seed is None else {"seed": options.seed}
    report |= {"images": len(entries), "targets": len(rows)}
    if model is not None:
        report |= {"model": options.model or "bundled", "variant": model.config.variant, "dtype": run["dtype"]}
        report |= {
            "image_size": size,
            "zoom": options.zoom,
            "seconds": round(sum(done[entry.name]["seconds"] for entry in entries), 1),
        }
    report["fingerprint"] = run
    report["machine"] = machine(options.device)
    report["versions"] = {"fastsam-rwkv": __version__} | {name: version(name) for name in ("numpy", "pillow")}
    scores = summaries(rows)
    print("  ".join(f"{key}: {value}" for key, value in report.items() if not isinstance(value, dict)))
    print("  ".join(f"{key}: {value}" for key, value in report["machine"].items()))
    print(table(scores))
    if options.out:
        options.out.write_text(json.dumps(report | {"scores": scores}, indent=1) + "\n")
    if options.sheet and model is not None:
        options.sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(model, entries, done, size, options.zoom).save(options.sheet)


if __name__ == "__main__":
    main()
