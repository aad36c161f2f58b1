"""Image encoders in ONNX Runtime and in PyTorch on a CPU, in one interleaved run: ours, and SAM's ViT-B.

    python -m benchmarks.speed.onnx_cpu [--image-size 1024] [--repeats 5] [--threads 2]

Ours are exported by `fastsam_rwkv.export`, SAM's by PyTorch's exporter with its own settings. Random weights, float32,
one image; both libraries with the same number of threads.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import onnxruntime
import torch

from benchmarks.speed.cpu_encoder import SAM, ours, sam_vit_b
from benchmarks.speed.timing import compare, machine, ratios, table
from fastsam_rwkv.export import export_onnx

VARIANTS = ("tiny", "small")
AT_MOST = 1.0  # ours in ONNX Runtime, of ours in PyTorch


def session(file: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def candidates(names: list[str], image_size: int, threads: int, folder: Path) -> dict[str, Callable[[], object]]:
    """Each encoder in PyTorch and in ONNX Runtime, as `name` and `name-onnx`."""
    pixels = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    feeds = {"image": pixels.numpy()}
    runs: dict[str, Callable[[], object]] = {}
    for name in names:
        if name == SAM:
            model = sam_vit_b(image_size)
            file = folder / "sam.onnx"
            eager = sam_vit_b(image_size, attention="eager")  # PyTorch 2.13 fails to export the other form
            eager.load_state_dict(model.state_dict())
            torch.onnx.export(eager, (pixels,), file, input_names=["image"], dynamo=True, verbose=False)
            runs[name] = lambda model=model: model(pixels)
        else:
            rwkv = ours(name, image_size)
            export_onnx(rwkv, folder / name)
            file = folder / name / "encoder.onnx"
            runs[name] = lambda model=rwkv: model.encode_image(pixels)
        onnx = session(file, threads)
        runs[f"{name}-onnx"] = lambda onnx=onnx: onnx.run(None, feeds)
    return runs


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.onnx_cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", choices=[*VARIANTS, SAM], default=[*VARIANTS, SAM])
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    options = parser.parse_args(arguments)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)  # now, not when all is measured
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        runs = candidates(options.only, options.image_size, options.threads, Path(folder))
        setting = machine() | {
            "onnxruntime": onnxruntime.__version__,
            "shape": [1, 3, options.image_size, options.image_size],
            "dtype": "float32",
            "repeats": options.repeats,
            "warmup": options.warmup,
            "load_before": round(os.getloadavg()[0], 2),
        }
        if SAM in options.only:
            setting["transformers"] = version("transformers")
        with torch.inference_mode():
            rows = compare(runs, options.repeats, options.warmup)
    print("  ".join(f"{key}: {value}" for key, value in setting.items()))
    print(table(rows))
    by_name = {row.name: row for row in rows}
    found = []
    for numerator, denominator in [(f"{n}-onnx", n) for n in options.only] + [
        (f"{SAM}-onnx", f"{n}-onnx") for n in options.only if n != SAM and SAM in options.only
    ]:
        median, low, high = ratios(by_name[numerator], by_name[denominator])
        goal = AT_MOST if denominator in VARIANTS else None
        found.append({"what": f"{numerator} / {denominator}", "median": median, "min": low, "max": high, "goal": goal})
        told = "" if goal is None else f"  goal <= {goal}: {'met' if median <= goal else 'missed'}"
        print(f"{found[-1]['what']:36} {median:7.3f}  ({low:.3f} to {high:.3f}){told}")
    if options.out:
        report = {"machine": setting, "rows": [row._asdict() for row in rows], "compared": found}
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
