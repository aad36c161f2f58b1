"""Print what segmentation targets look like: colors, gradients, frame, pieces and sizes.

    python -m benchmarks.masks.target_statistics FOLDER [--annotations FILE]    # labeled photographs
    python -m benchmarks.masks.target_statistics --scenes FOLDER                # rendered scenes, as trained on
    python -m benchmarks.masks.target_statistics --render 50                    # freshly rendered scenes

FOLDER is what `benchmarks.masks.accuracy` reads. All images are brought to a longer side of 512 pixels. Each figure is
a median over targets, or a share of them. A generator of training data is judged by these figures before a run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

RECIPE = Path(__file__).parents[2] / "recipes" / "synthetic_shapes"
SIDE = 512
SIZE_BOUNDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.6)
SMALL = 0.01  # bound between the two columns
MIN_PIXELS = 30  # below these, a figure of a target's inside means nothing
BIN = 20.0  # side of a color bin, in Lab units
TITLES = {
    "color_spread": "Lab color spread inside",
    "gradient": "lightness gradient inside",
    "shared_colors": "colors shared with the surroundings",
    "touches_frame": "touches the frame (share)",
    "pieces": "pieces",
    "box_filled": "box filled",
    "area": "area",
}


class Figures(NamedTuple):
    """The statistics of one target.

    Attributes:
        color_spread: root of the summed variances of L, a and b inside.
        gradient: mean length of the gradient of L inside, away from the outline, in units a pixel.
        shared_colors: intersection in 0..1 of the color histograms inside and around; around is the rest of the box
            enlarged to 1.5 times its sides.
        touches_frame: True if the target reaches the edge of the image.
        pieces: connected pieces of at least 1 % of the target's area.
        box_filled: share of its box that the target fills.
        area: share of the image.
    """

    color_spread: float
    gradient: float
    shared_colors: float
    touches_frame: bool
    pieces: int
    box_filled: float
    area: float


def lab(image: np.ndarray) -> np.ndarray:
    """Convert `[H, W, 3]` uint8 sRGB to CIE Lab under D65, `[H, W, 3]` float32."""
    values = np.arange(256) / 255
    linear = np.where(values > 0.04045, ((values + 0.055) / 1.055) ** 2.4, values / 12.92).astype(np.float32)[image]
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    xyz = linear @ (np.array(to_xyz, np.float32) / np.array([[0.95047], [1.0], [1.08883]], np.float32)).T
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def figures(colors: np.ndarray, mask: np.ndarray) -> Figures:
    """Measure one target.

    Args:
        colors: `[H, W, 3]` Lab.
        mask: `[H, W]` bool, not empty.
    """
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    y0, y1, x0, x1 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    dy, dx = max(2, (y1 - y0) // 4), max(2, (x1 - x0) // 4)
    window = np.s_[max(0, y0 - dy) : y1 + dy, max(0, x0 - dx) : x1 + dx]
    colors, inside = colors[window], mask[window]
    own = colors[inside]
    core = ndimage.binary_erosion(inside, np.ones((3, 3)), border_value=1)
    if core.sum() < MIN_PIXELS:
        core = inside
    gy, gx = np.gradient(colors[..., 0])
    labels, count = ndimage.label(inside, np.ones((3, 3)))
    pieces = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    return Figures(
        color_spread=float(np.sqrt(own.var(0).sum())),
        gradient=float(np.hypot(gy, gx)[core].mean()),
        shared_colors=_shared(own, colors[~inside]),
        touches_frame=bool(y0 == 0 or x0 == 0 or y1 == height or x1 == width),
        pieces=int((pieces >= 0.01 * len(own)).sum()),
        box_filled=len(own) / ((y1 - y0) * (x1 - x0)),
        area=len(own) / mask.size,
    )


def _shared(inside: np.ndarray, around: np.ndarray) -> float:
    """Intersection in 0..1 of the histograms of two sets of Lab colors `[N, 3]`."""
    if not len(around):
        return 0.0
    bins = [np.floor(colors / BIN).astype(int) + 64 for colors in (inside, around)]
    codes, inverse = np.unique(np.concatenate(bins) @ [128 * 128, 128, 1], return_inverse=True)
    first = np.bincount(inverse[: len(inside)], minlength=len(codes)) / len(inside)
    second = np.bincount(inverse[len(inside) :], minlength=len(codes)) / len(around)
    return float(np.minimum(first, second).sum())


def of_photographs(folder: Path, annotations: Path | None) -> Iterator[Figures]:
    """Measure the targets of labeled photographs."""
    from benchmarks.masks.coco import find_annotated
    from benchmarks.masks.datasets import find_photographs

    for entry in find_annotated(folder, annotations) if annotations else find_photographs(folder):
        photo = entry.read()
        height, width = photo.image.shape[:2]
        scale = SIDE / max(height, width)
        size = (round(width * scale), round(height * scale))
        colors = lab(np.asarray(Image.fromarray(photo.image).resize(size, Image.Resampling.BILINEAR)))
        for target in photo.targets:
            mask = np.asarray(Image.fromarray(target.mask).resize(size, Image.Resampling.NEAREST))
            if mask.sum() >= MIN_PIXELS:
                yield figures(colors, mask)


def of_scenes(folder: Path, count: int, seed: int, prompts: int = 8) -> dict[str, list[Figures]]:
    """Measure the targets that training would draw from rendered scenes, things apart from stuff."""
    sys.path.insert(0, str(RECIPE))
    from data import Scenes

    found: dict[str, list[Figures]] = {"things": [], "stuff": []}
    scenes = Scenes(folder, prompts, seed)
    for number in range(count):
        view = scenes.view(number, (SIDE, SIDE))
        colors = lab(view.image)
        for candidate, _ in view.chosen:
            found["stuff" if candidate.stuff else "things"].append(figures(colors, view.mask(candidate)))
    return found


def rendered(count: int, seed: int, drawings: Path | None = None) -> dict[str, list[Figures]]:
    """Render `count` scenes into a temporary folder and measure their targets."""
    sys.path.insert(0, str(RECIPE))
    from data import render_all

    with tempfile.TemporaryDirectory() as folder:
        render_all(Path(folder), count, SIDE, seed, workers=1, drawings=drawings)
        return of_scenes(Path(folder), count, seed)


def summary(found: Iterable[Figures]) -> dict[str, float]:
    """Medians over targets, the share that touches the frame, and the shares of the sizes.

    Raises:
        ValueError: no target.
    """
    table = np.array(list(found), float)
    if not len(table):
        raise ValueError(f"no target of {MIN_PIXELS} pixels or more")
    result = {"targets": float(len(table))}
    for name, column in zip(Figures._fields, table.T, strict=True):
        result[name] = float(column.mean() if name == "touches_frame" else np.median(column))
    bounds = (0, *SIZE_BOUNDS, 1.001)
    for low, high in zip(bounds, bounds[1:], strict=False):
        areas = table[:, Figures._fields.index("area")]
        result[f"{100 * low:g}-{min(100 * high, 100):g} %"] = float(((areas >= low) & (areas < high)).mean())
    return result


def _by_size(groups: dict[str, list[Figures]]) -> dict[str, list[Figures]]:
    """Split each group at SMALL, beside the whole of it; leave out what is empty."""
    result = {}
    for title, found in groups.items():
        result[title] = found
        result[f"{title} < {100 * SMALL:g} %"] = [f for f in found if f.area < SMALL]
        result[f"{title} >= {100 * SMALL:g} %"] = [f for f in found if f.area >= SMALL]
    return {title: found for title, found in result.items() if found}


def report(columns: dict[str, dict[str, float]]) -> str:
    """Return a table with a line for each figure and a column for each summary."""
    names = list(next(iter(columns.values())))
    width = max(len(TITLES.get(name, name)) for name in names)
    lines = [f"{'':{width}}" + "".join(f"  {title:>18}" for title in columns)]
    for name in names:
        cells = (
            f"{values[name]:18.0f}" if name == "targets" else f"{values[name]:18.3f}" for values in columns.values()
        )
        lines.append(f"{TITLES.get(name, name):{width}}" + "".join(f"  {cell}" for cell in cells))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.masks.target_statistics",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("folder", type=Path, nargs="?", help="labeled photographs")
    parser.add_argument("--annotations", type=Path, help="COCO or LVIS instances file for the images in the folder")
    parser.add_argument("--scenes", type=Path, metavar="FOLDER", help="scenes rendered by recipes/synthetic_shapes")
    parser.add_argument("--render", type=int, metavar="N", help="render N scenes and measure them")
    parser.add_argument(
        "--drawings", type=Path, metavar="FILE", help="outlines from the recipe's clipart.py for --render"
    )
    parser.add_argument("--count", type=int, default=200, help="windows to draw from --scenes")
    parser.add_argument("--seed", type=int, default=1, help="of the rendered scenes, their windows and prompts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file, too")
    options = parser.parse_args(arguments)
    if sum(source is not None for source in (options.folder, options.scenes, options.render)) != 1:
        parser.error("give one of FOLDER, --scenes and --render")
    try:
        if options.folder:
            groups = {"targets": list(of_photographs(options.folder, options.annotations))}
        elif options.scenes:
            groups = of_scenes(options.scenes, options.count, options.seed)
        else:
            groups = rendered(options.render, options.seed, options.drawings)
        columns = {title: summary(found) for title, found in _by_size(groups).items()}
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    print(report(columns))
    if options.json:
        options.json.write_text(json.dumps(columns, indent=1) + "\n")


if __name__ == "__main__":
    main()
