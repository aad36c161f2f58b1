"""Rasterize drawings of real things once: bodies with known parts, for `drawings.py` to place in scenes.

    sudo apt-get install openclipart-svg     # Debian's package, dedicated to the public domain by its authors
    pip install '.[recipe]'
    python recipes/synthetic_shapes/clipart.py --out runs/drawings.npz

A drawing is kept if it shows one connected body that is no filled rectangle. Shapes of one color make one part.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

SOURCE = Path("/usr/share/openclipart/svg")
FOLDERS = (
    "animals", "buildings", "computer/hardware", "containers", "decorations", "education", "electronics", "food",
    "office", "people", "plants", "recreation/music", "recreation/sports", "recreation/toys", "recreation/holiday",
    "recreation/party", "science", "tools", "transportation",
)  # fmt: skip
LEFT_OUT = ("aiga-symbols", "roadsigns", "smilies", "stickmen", "fantasy", "diagrams", "logo", "icon", "sign", "symbol")
SIDE = 320  # of the raster
MOST_SHAPES, MOST_BYTES = 600, 600_000
FEWEST_PIXELS = 0.04  # of the raster, covered by the body
SHAPES = {"path", "rect", "circle", "ellipse", "polygon", "polyline", "line"}
HIDDEN = {"defs", "clipPath", "mask", "pattern", "symbol", "marker", "linearGradient", "radialGradient", "metadata"}
REMOVED = {"text", "flowRoot", "foreignObject"}
REFUSED = {"image", "use"}


def rasterized(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Return colors `[H, W, 3]` uint8 and parts `[H, W]` uint8, 0 outside; None if the drawing is of no use.

    Parts are numbered from the largest to the smallest.
    """
    from resvg_py import svg_to_bytes

    if path.stat().st_size > MOST_BYTES:
        return None
    try:
        tree = ET.fromstring(path.read_bytes())
        for element in list(tree.iter()):
            for child in [child for child in element if _name(child) in REMOVED]:
                element.remove(child)
        if REFUSED & {_name(element) for element in tree.iter()}:
            return None
        sides = {"width": SIDE} if _aspect(tree) >= 1 else {"height": SIDE}
        options = {"skip_system_fonts": True, **sides}
        seen = _pixels(svg_to_bytes(svg_string=ET.tostring(tree, "unicode"), **options))
        paints = _numbered(tree)
        if not 1 <= len(paints) <= MOST_SHAPES:
            return None
        codes = _pixels(svg_to_bytes(svg_string=ET.tostring(tree, "unicode"), shape_rendering="crisp_edges", **options))
    except (ET.ParseError, ValueError, KeyError):
        return None
    if max(seen.shape) > 2 * SIDE or seen.shape != codes.shape:
        return None
    solid = seen[..., 3] > 127
    body = ndimage.binary_fill_holes(solid)
    if body.sum() <= 1.5 * solid.sum():
        body = solid  # with true holes; otherwise it is a line drawing, whose lines enclose the body
    labels, count = ndimage.label(body)
    if not count:
        return None
    areas = np.bincount(labels.ravel())[1:]
    if areas.max() < 0.85 * areas.sum() or areas.max() < FEWEST_PIXELS * SIDE * SIDE:
        return None
    body = labels == 1 + int(areas.argmax())
    rows, columns = np.flatnonzero(body.any(1)), np.flatnonzero(body.any(0))
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    body, seen, codes = body[window], seen[window], codes[window]
    if body.mean() > 0.93 or min(body.shape) < SIDE // 10:
        return None
    return seen[..., :3], _parts(body, codes, paints)


def _name(element: ET.Element) -> str:
    return element.tag.split("}")[-1] if isinstance(element.tag, str) else ""


def _aspect(tree: ET.Element) -> float:
    """Width over height of a drawing, which is given that size in pixels in place."""
    if "viewBox" in tree.attrib:
        width, height = (float(n) for n in re.split(r"[ ,]+", tree.attrib["viewBox"].strip())[2:])
    else:
        width, height = (float(re.match(r"[\d.]+", tree.attrib[side])[0]) for side in ("width", "height"))
        tree.set("viewBox", f"0 0 {width} {height}")
    tree.set("width", str(width))
    tree.set("height", str(height))
    if width <= 0 or height <= 0:
        raise ValueError("an empty drawing")
    return width / height


def _pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def _numbered(tree: ET.Element) -> list[str]:
    """Paint shape n of a drawing with the color of code n + 1, in place; return the paint that each shape had."""
    paints: list[str] = []

    def visit(element: ET.Element, inherited: dict[str, str]) -> None:
        name = _name(element)
        if name in HIDDEN:
            return
        style = {k: v for k, v in element.attrib.items() if k in ("fill", "stroke", "stroke-width", "display")}
        pairs = (pair.split(":", 1) for pair in element.attrib.get("style", "").split(";") if ":" in pair)
        style |= {key.strip(): value.strip() for key, value in pairs}
        style = inherited | style
        for attribute in ("style", "fill", "stroke", "opacity", "fill-opacity", "stroke-opacity", "filter", "mask"):
            element.attrib.pop(attribute, None)
        if style.get("display") == "none":
            element.set("display", "none")
            return
        if name in SHAPES:
            fill, line = style.get("fill", "#000000"), style.get("stroke", "none")
            paints.append(fill if fill != "none" else line)
            code = f"#{len(paints):06x}"
            element.set("fill", code if fill != "none" else "none")
            element.set("stroke", code if line != "none" else "none")
            element.set("stroke-width", style.get("stroke-width", "1"))
        for child in element:
            visit(child, {k: v for k, v in style.items() if k in ("fill", "stroke", "stroke-width")})

    visit(tree, {})
    return paints


def _parts(body: np.ndarray, codes: np.ndarray, paints: list[str]) -> np.ndarray:
    """Number the colors of a body `[H, W]` from the largest area to the smallest; pixels of none take the nearest."""
    code = (codes[..., :3].astype(np.int32) @ [65536, 256, 1]) * (codes[..., 3] > 127)
    code[code > len(paints)] = 0
    names = sorted(set(paints))
    table = np.array([-1, *(names.index(paint) for paint in paints)])
    paint = table[code]
    known = body & (paint >= 0)
    if not known.any():
        return body.astype(np.uint8)
    nearest = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
    paint = paint[tuple(nearest)]
    used, areas = np.unique(paint[body], return_counts=True)
    ranks = np.zeros(len(names), np.uint8)
    for rank, which in enumerate(areas.argsort()[::-1], 1):
        ranks[used[which]] = min(rank, 255)
    return np.where(body, ranks[paint], 0).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=SOURCE, help="folder of SVG files")
    parser.add_argument("--out", type=Path, required=True, help="the .npz file to write")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    files = sorted(
        file
        for folder in FOLDERS
        for file in (args.source / folder).rglob("*.svg")
        if not any(word in file.relative_to(args.source).as_posix().lower() for word in LEFT_OUT)
    )
    if not files:
        parser.error(f"no drawings in {str(args.source)!r}: apt-get install openclipart-svg, or give --source")
    with multiprocessing.get_context("fork").Pool(args.workers) as pool:
        found = [drawing for drawing in pool.imap(rasterized, files, chunksize=16) if drawing]
    arrays = {}
    for number, (colors, parts) in enumerate(found):
        arrays |= {f"colors_{number}": colors, f"parts_{number}": parts}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out, **arrays)
    print(f"{len(found)} of {len(files)} drawings", file=sys.stderr)


if __name__ == "__main__":
    main()
