"""Time of image encoders in ONNX Runtime and in PyTorch on a CPU, in one interleaved run: ours, and SAM's ViT-B.

    python -m benchmarks.speed.onnx_cpu [--image-size 1024] [--repeats 5]

Ours are exported by `fastsam_rwkv.export`, SAM's by PyTorch's exporter with its own settings. Random weights, float32,
one image; both libraries have the same number of threads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnxruntime
import torch

from benchmarks.speed.cpu_encoder import SAM, VARIANTS, ours, sam_vit_b
from benchmarks.speed.timing import compare, cpu_parser, ratio, report
from fastsam_rwkv.export import export_onnx

AT_LEAST = 1.0  # goal: time of ours in PyTorch / in ONNX Runtime
NAMES = (*VARIANTS, SAM)


def candidates(names: list[str], image_size: int, folder: Path) -> dict[str, Callable[[], object]]:
    """Return each encoder in PyTorch and in ONNX Runtime, as `name` and `name-onnx`."""
    pixels = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    feeds = {"image": pixels.numpy()}
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = torch.get_num_threads()
    runs: dict[str, Callable[[], object]] = {}
    for name in names:
        if name == SAM:
            model = sam_vit_b(image_size)
            file = folder / "sam.onnx"
            eager = sam_vit_b(image_size, attention="eager")  # PyTorch 2.13 fails to export sdpa attention
            eager.load_state_dict(model.state_dict())
            torch.onnx.export(eager, (pixels,), file, input_names=["image"], dynamo=True, verbose=False)
            runs[name] = partial(model, pixels)
        else:
            rwkv = ours(name, image_size)
            export_onnx(rwkv, folder / name)
            file = folder / name / "encoder.onnx"
            runs[name] = partial(rwkv.encode_image, pixels)
        onnx = onnxruntime.InferenceSession(str(file), session_options, providers=["CPUExecutionProvider"])
        runs[f"{name}-onnx"] = partial(onnx.run, None, feeds)
    return runs


def main(arguments: list[str] | None = None) -> None:
    parser = cpu_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        runs = candidates(options.only, options.image_size, Path(folder))
        with torch.inference_mode():
            rows = compare(runs, options.repeats)
    found = [ratio(rows, name, f"{name}-onnx", None if name == SAM else AT_LEAST) for name in options.only]
    if SAM in options.only:
        found += [ratio(rows, f"{SAM}-onnx", f"{name}-onnx") for name in options.only if name != SAM]
    report(options, rows, found, onnxruntime=onnxruntime.__version__)


if __name__ == "__main__":
    main()
