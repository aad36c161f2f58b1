"""Arguments and output of `fastsam-rwkv export` and `fastsam-rwkv demo`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from .manifest import ExportError


def add_commands(commands: Any) -> None:
    """Add `export onnx`, `export web`, `export tensorrt` and `demo` to the subparsers of `fastsam-rwkv`."""
    export = commands.add_parser("export", help="ONNX graphs, a page in the browser, and TensorRT engines")
    targets = export.add_subparsers(dest="target", required=True)

    onnx = targets.add_parser(
        "onnx",
        help="write encoder.onnx and decoder.onnx, checked against PyTorch",
        description="Writes encoder.onnx, decoder.onnx and export.json into OUTDIR. Prints how the graphs differ from "
        "PyTorch on an image and on random pixels. If they differ by more than the tolerance, OUTDIR keeps its files, "
        "the new ones go to OUTDIR/rejected, and the exit code is 1.",
    )
    _add_model_and_folder(onnx)
    onnx.add_argument("--precision", default="fp32", help="fp32 (default) or fp16 (norms and the scan stay float32)")
    onnx.add_argument("--batch", type=int, metavar="N", help="fixed number of images; default: any number")
    onnx.add_argument("--uint8", action="store_true", help="the encoder takes uint8 [B, h, w, 3], normalizes and pads")
    onnx.add_argument(
        "--contract",
        default="sam2",
        help="programs that the graphs are for: sam2 (default), sam, or osam, which is sam with another encoder input",
    )
    onnx.add_argument(
        "--config", action="store_true", help="also write config.yaml for AnyLabeling and x-anylabeling.yaml"
    )
    onnx.add_argument("--single-mask", action="store_true", help="the decoder returns only the single mask")
    onnx.add_argument("--photo", metavar="FILE", help="image to check with (default: the installed one)")
    onnx.add_argument("--opset", type=int, default=20, help="18, 19 or 20 (default)")
    onnx.add_argument("--check", metavar="DIR", help="check the export in DIR and write nothing")
    onnx.add_argument(
        "--adopt", metavar="DIR", help="check graphs in DIR that you changed, and record them in export.json"
    )
    onnx.add_argument(
        "--min-mask-iou", type=float, metavar="IOU", help="least mean IoU with PyTorch's masks for --adopt (0.99)"
    )
    onnx.set_defaults(run=_onnx)

    web = targets.add_parser(
        "web",
        help="write a page that segments photographs in the visitor's browser",
        description="Writes index.html, app.js, the two graphs and an example photograph into OUTDIR, for any web "
        "server. The page runs onnxruntime-web. Photographs never leave the visitor's machine.",
    )
    _add_model_and_folder(web)
    web.add_argument("--precision", default="fp16", help="fp16 (default), which halves the download, or fp32")
    web.add_argument("--offline", action="store_true", help="copy onnxruntime-web with npm; default: from a CDN")
    web.set_defaults(run=_web)

    demo = commands.add_parser(
        "demo",
        help="segment photographs in a browser on this machine",
        description="Exports the page of `export web` into the user's cache, serves it on 127.0.0.1 and opens it.",
    )
    demo.add_argument("--model", metavar="MODEL", help="Hub id, folder or .safetensors file; default: the bundled")
    demo.add_argument("--port", type=int, default=0, help="default: a free one")
    demo.add_argument("--offline", action="store_true", help="copy onnxruntime-web with npm; default: from a CDN")
    demo.add_argument("--no-browser", action="store_true", help="only print the address")
    demo.set_defaults(run=_demo)

    tensorrt = targets.add_parser(
        "tensorrt",
        help="build engines from exported graphs, checked against ONNX Runtime",
        description="Writes encoder.plan, decoder.plan and engines.json beside the graphs in DIR. Needs TensorRT 10.8 "
        "or later and an NVIDIA GPU. Without them, prints the trtexec commands that build the same engines.",
    )
    tensorrt.add_argument("dir", metavar="DIR", nargs="?", help="folder that `export onnx` wrote")
    for name, default in (("batch", "1,1,1"), ("prompts", "1,1,32"), ("points", "1,2,16")):
        tensorrt.add_argument(
            f"--{name}", type=_range, default=_range(default), metavar="MIN,OPT,MAX", help=f"default {default}"
        )
    tensorrt.add_argument("--timing-cache", metavar="FILE", help="timing cache to read, if it exists, and to write")
    tensorrt.add_argument(
        "--self-check", action="store_true", help="export the bundled model, build, compare and time it; print a report"
    )
    tensorrt.set_defaults(run=_tensorrt)


def _add_model_and_folder(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="Hub id, folder or .safetensors; default: the bundled")
    add("outdir", metavar="OUTDIR", nargs="?", help="folder to write")
    add("--image-size", type=int, help="side of the model input, a multiple of 64 (default: the model's)")


def _range(text: str) -> tuple[int, int, int]:
    try:
        smallest, best, largest = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not three integers MIN,OPT,MAX") from None
    return smallest, best, largest


def _onnx(args: argparse.Namespace) -> None:
    from .check import adopt_onnx, check_onnx
    from .onnx import export_onnx

    if args.min_mask_iou is not None and args.adopt is None:
        raise ArgumentError("--min-mask-iou is for --adopt DIR")
    if args.adopt is not None:
        if args.check is not None or args.outdir is not None:
            raise ArgumentError("--adopt DIR takes neither --check nor OUTDIR")
        limit = {} if args.min_mask_iou is None else {"min_mask_iou": args.min_mask_iou}
        _print(adopt_onnx(args.adopt, args.model, args.photo, **limit).check)
        return
    if args.check is not None:
        if args.outdir is not None:
            raise ArgumentError(f"--check DIR writes nothing; omit OUTDIR {args.outdir!r}")
        figures, problems = check_onnx(args.check, args.model, args.photo)
        _print(figures)
        if problems:
            raise ExportError(f"the graphs differ from PyTorch: {'; '.join(problems)}")
        return
    model, outdir = _outdir(args, "onnx")
    manifest = export_onnx(
        model,
        outdir,
        image_size=args.image_size,
        precision=args.precision,
        batch=args.batch,
        uint8=args.uint8,
        contract=args.contract,
        single_mask=args.single_mask,
        configs=args.config,
        opset=args.opset,
        photo=args.photo,
    )
    _print(manifest.check)
    for name, file in manifest.files.items():
        print(f"{Path(outdir) / name}: {file['bytes'] / 1e6:.1f} MB")


def _outdir(args: argparse.Namespace, target: str) -> tuple[str | None, str]:
    """Return model and folder of `export TARGET [MODEL] OUTDIR`."""
    model, outdir = (args.model, args.outdir) if args.outdir is not None else (None, args.model)
    if outdir is None:
        raise ArgumentError(f"no folder to write to; run fastsam-rwkv export {target} [MODEL] OUTDIR")
    return model, outdir


def _web(args: argparse.Namespace) -> None:
    from .web import export_web

    model, outdir = _outdir(args, "web")
    manifest = export_web(model, outdir, image_size=args.image_size, precision=args.precision, offline=args.offline)
    _print(manifest.check)
    print(f"{Path(outdir) / 'index.html'}: serve this folder, such as with `python -m http.server -d {outdir}`")


def _demo(args: argparse.Namespace) -> None:
    from .web import demo

    if not 0 <= args.port <= 65535:
        raise ArgumentError(f"--port must be 0 to 65535, got {args.port}")
    demo(args.model, port=args.port, offline=args.offline, open_browser=not args.no_browser)


def _print(figures: dict[str, Any]) -> None:
    print(f"ONNX Runtime {figures['onnxruntime']} compared with PyTorch {figures['torch']}:")
    for name in ("photo", "random"):
        row = figures[name]
        print(
            f"  {name:7} {row['masks']} masks: mean IoU {row['mask_iou_mean']:.5f}, least {row['mask_iou_least']:.5f}; "
            f"logits within {row['logits']:.1e}, predicted IoU within {row['quality']:.1e}, "
            f"embedding {row['embedding_relative_rms']:.1e} relative"
        )


def _tensorrt(args: argparse.Namespace) -> None:
    from .tensorrt import Ranges, build_tensorrt, self_check, trtexec_commands

    if args.self_check:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(self_check(Path(folder)), indent=2))
        return
    if args.dir is None:
        raise ArgumentError("no folder; pass the one that `export onnx` wrote, or --self-check")
    ranges = Ranges(args.batch, args.prompts, args.points)
    commands = trtexec_commands(args.dir, ranges)
    try:
        built = build_tensorrt(args.dir, ranges, args.timing_cache)
    except ExportError:
        print("trtexec builds the same engines without the check:", *commands, sep="\n", file=sys.stderr)
        raise
    print(json.dumps(built, indent=2))
