"""Exported graphs in ONNX Runtime against PyTorch float32 on photographs; time, memory and size of the export.

    python -m benchmarks.speed.onnx_agreement FOLDER [--variants tiny small base] [--photos 5] [--image-size 1024]

On every photograph: one click, 7 prompts of 5 points, 7 boxes, 7 masks, and two images at once (see
`fastsam_rwkv.export.check`). Weights are random but for `bundled`: the default model at its own size. Each export is
timed in a process of its own, without the check.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.speed.timing import machine
from fastsam_rwkv import RWKVSAM, ModelConfig
from fastsam_rwkv.export import check_onnx

BUNDLED = "bundled"
EXPORT = r"""
import json, re, sys, time
from fastsam_rwkv.export import check, export_onnx
source, folder, size, precision = sys.argv[1:]
check.check_folder = lambda *args: ({}, [])  # what is measured is the export
started = time.perf_counter()
export_onnx(source or None, folder, image_size=int(size), precision=precision)
seconds = time.perf_counter() - started
# not ru_maxrss, which begins at what the parent process held
kib = int(re.search(r"VmHWM:\s*(\d+) kB", open("/proc/self/status").read())[1])
print(json.dumps([seconds, kib * 1024]))
"""


def export_cost(source: str, folder: Path, image_size: int, precision: str) -> tuple[float, int]:
    """Seconds and peak bytes of an export in a process of its own (Linux)."""
    command = [sys.executable, "-c", EXPORT, source, str(folder), str(image_size), precision]
    seconds, memory = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return seconds, memory


def measured(name: str, precision: str, image_size: int, photos: list[Path], work: Path) -> dict[str, Any]:
    """The row of one model in one precision."""
    source = ""
    model = None
    if name == BUNDLED:
        model = RWKVSAM.from_pretrained()
        image_size = model.config.image_size
    else:
        torch.manual_seed(0)
        model = RWKVSAM(ModelConfig.from_name(name, image_size=image_size, num_multimask_outputs=3)).eval()
        source = str(work / name)
        model.save_pretrained(source)
    folder = work / f"{name}-{precision}"
    seconds, memory = export_cost(source, folder, image_size, precision)
    figures = [check_onnx(folder, model, photo)[0] for photo in photos]
    on_photos = [f["photo"] for f in figures]
    return {
        "model": name,
        "precision": precision,
        "image_size": image_size,
        "photographs": len(photos),
        "masks": sum(row["masks"] for row in on_photos),
        "logits": max(row["logits"] for row in on_photos),
        "quality": max(row["quality"] for row in on_photos),
        "mask_iou_mean": float(np.mean([row["mask_iou_mean"] for row in on_photos])),
        "mask_iou_least_photograph": min(row["mask_iou_mean"] for row in on_photos),
        "mask_iou_least": min(row["mask_iou_least"] for row in on_photos),
        "random_logits": max(f["random"]["logits"] for f in figures),
        "export_seconds": seconds,
        "export_peak_bytes": memory,
        "encoder_bytes": os.path.getsize(folder / "encoder.onnx"),
        "decoder_bytes": os.path.getsize(folder / "decoder.onnx"),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.onnx_agreement", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="photographs (.jpg)")
    parser.add_argument("--variants", nargs="+", default=[BUNDLED, "tiny", "small", "base"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "fp16"])
    parser.add_argument("--photos", type=int, default=5)
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    options = parser.parse_args(arguments)
    photos = sorted(options.folder.rglob("*.jpg"))[: options.photos]
    if not photos:
        parser.error(f"no .jpg below {options.folder}")
    rows = []
    for name in options.variants:
        for precision in options.precisions:
            with tempfile.TemporaryDirectory() as work:
                rows.append(measured(name, precision, options.image_size, photos, Path(work)))
            print(json.dumps(rows[-1]), flush=True)
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
