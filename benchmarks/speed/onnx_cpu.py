"""Time of image encoders in ONNX Runtime and in PyTorch on a CPU, in one interleaved run: ours, and SAM's ViT-B.

    python -m benchmarks.speed.onnx_cpu [--image-size 1024] [--repeats 5] [--threads 2]

Ours are exported by `fastsam_rwkv.export`, SAM's by PyTorch's exporter with its own settings. Random weights, float32,
one image; both libraries have the same number of threads.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch

from benchmarks.speed.cpu_encoder import SAM, VARIANTS, ours, sam_vit_b
from benchmarks.speed.timing import compare, cpu_parser, machine, ratio, report
from fastsam_rwkv.export import export_onnx

AT_MOST = 1.0  # goal: ours in ONNX Runtime / ours in PyTorch
NAMES = (*VARIANTS, SAM)


def candidates(names: list[str], image_size: int, threads: int, folder: Path) -> dict[str, Callable[[], object]]:
    """Return each encoder in PyTorch and in ONNX Runtime, as `name` and `name-onnx`."""
    pixels = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    feeds = {"image": pixels.numpy()}
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = threads
    runs: dict[str, Callable[[], object]] = {}
    for name in names:
        if name == SAM:
            model = sam_vit_b(image_size)
            file = folder / "sam.onnx"
            eager = sam_vit_b(image_size, attention="eager")  # PyTorch 2.13 fails to export sdpa attention
            eager.load_state_dict(model.state_dict())
            torch.onnx.export(eager, (pixels,), file, input_names=["image"], dynamo=True, verbose=False)
            runs[name] = lambda model=model: model(pixels)
        else:
            rwkv = ours(name, image_size)
            export_onnx(rwkv, folder / name)
            file = folder / name / "encoder.onnx"
            runs[name] = lambda model=rwkv: model.encode_image(pixels)
        onnx = onnxruntime.InferenceSession(str(file), session_options, providers=["CPUExecutionProvider"])
        runs[f"{name}-onnx"] = lambda onnx=onnx: onnx.run(None, feeds)
    return runs


def main(arguments: list[str] | None = None) -> None:
    parser = cpu_parser("benchmarks.speed.onnx_cpu", __doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        runs = candidates(options.only, options.image_size, options.threads, Path(folder))
        setting = machine() | {"onnxruntime": onnxruntime.__version__, "image_size": options.image_size}
        setting |= {"dtype": "float32", "load_before": round(os.getloadavg()[0], 2)}
        with torch.inference_mode():
            rows = compare(runs, options.repeats)
    found = [ratio(rows[f"{name}-onnx"], rows[name]) for name in options.only]
    for entry, name in zip(found, options.only, strict=True):
        if name in VARIANTS:
            entry |= {"goal": f"<= {AT_MOST}", "met": entry["median"] <= AT_MOST}
    if SAM in options.only:
        found += [ratio(rows[f"{SAM}-onnx"], rows[f"{name}-onnx"]) for name in options.only if name != SAM]
    report(setting, rows, found, options.out)


if __name__ == "__main__":
    main()
