"""Exported graphs in ONNX Runtime against PyTorch float32 on photographs; time, memory and size of the export.

    python -m benchmarks.speed.onnx_agreement FOLDER [--variants tiny small base] [--image-size 1024]

Each of five photographs gets the prompts of `fastsam_rwkv.export.check`, two images at once. Weights are random but for
`bundled`, the default model at its own size. Each export is timed in a process of its own, without the check.
"""

from __future__ import annotations

import argparse
import json
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
check.check_folder = lambda *args: ({}, [])  # the export alone is measured
started = time.perf_counter()
export_onnx(source or None, folder, image_size=int(size), precision=precision)
seconds = time.perf_counter() - started
# not ru_maxrss, which begins at the size of the parent process
kib = int(re.search(r"VmHWM:\s*(\d+) kB", open("/proc/self/status").read())[1])
print(json.dumps([seconds, kib * 1024]))
"""


def measure(name: str, precision: str, image_size: int, photographs: list[Path], work: Path) -> dict[str, Any]:
    """Export one model in one precision below `work` and compare it on the photographs (Linux)."""
    source = ""
    if name == BUNDLED:
        model = RWKVSAM.from_pretrained()
        image_size = model.config.image_size
    else:
        torch.manual_seed(0)
        model = RWKVSAM(ModelConfig.from_name(name, image_size=image_size, num_multimask_outputs=3)).eval()
        source = str(work / name)
        model.save_pretrained(source)
    folder = work / f"{name}-{precision}"
    command = [sys.executable, "-c", EXPORT, source, str(folder), str(image_size), precision]
    seconds, memory = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    figures = [check_onnx(folder, model, photograph)[0] for photograph in photographs]
    rows = [f["photo"] for f in figures]
    return {
        "model": name,
        "precision": precision,
        "image_size": image_size,
        "photographs": len(rows),
        "masks": sum(row["masks"] for row in rows),
        "logits": max(row["logits"] for row in rows),
        "mask_iou_mean": float(np.mean([row["mask_iou_mean"] for row in rows])),
        "mask_iou_least": min(row["mask_iou_least"] for row in rows),
        "random_logits": max(f["random"]["logits"] for f in figures),
        "export_seconds": seconds,
        "export_peak_bytes": memory,
        "encoder_bytes": (folder / "encoder.onnx").stat().st_size,
        "decoder_bytes": (folder / "decoder.onnx").stat().st_size,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.speed.onnx_agreement", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="photographs (.jpg)")
    parser.add_argument("--variants", nargs="+", default=[BUNDLED, "tiny", "small", "base"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "fp16"])
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    options = parser.parse_args(arguments)
    photographs = sorted(options.folder.rglob("*.jpg"))[:5]
    if not photographs:
        parser.error(f"no .jpg below {options.folder}")
    rows = []
    for name in options.variants:
        for precision in options.precisions:
            with tempfile.TemporaryDirectory() as work:
                rows.append(measure(name, precision, options.image_size, photographs, Path(work)))
            print(json.dumps(rows[-1]), flush=True)
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
