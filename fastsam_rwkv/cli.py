"""The `fastsam-rwkv` command: predict, everything, convert, info, export, serve."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import ArgumentError, ImageError, InputError, short_repr, shorten

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from .modeling.rwkv_sam import RWKVSAM


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: success. 1: an image, a prompt, a model or a file cannot be used. 2: wrong arguments; argparse raises
    SystemExit(2). 130: interrupted. Other exceptions are bugs and keep their traceback.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except ArgumentError as error:
        _print_error(error.command_message)
        return 2
    except BrokenPipeError:  # the reader of the output is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except InputError as error:
        _print_error(error.command_message)
        return 1
    except OSError as error:
        _print_error(shorten(str(error)))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _print_error(message: str) -> None:
    print("fastsam-rwkv: error:", message.replace("\n", " "), file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"fastsam-rwkv: error: {shorten(message)}\n")


def _parser() -> argparse.ArgumentParser:
    from . import __version__
    from .everything import add_command
    from .export.cli import add_commands
    from .outputs import add_format_option, add_model_options, add_ray_option
    from .serve import cli as serve

    parser = _Parser(prog="fastsam-rwkv", description="Segment what you click on, with RWKV-SAM.")
    parser.add_argument("--version", action="version", version=f"fastsam-rwkv {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    predict = commands.add_parser(
        "predict",
        help="masks for clicks and boxes on an image",
        description="Prints one JSON line per mask: its score, area in pixels and tight box. All --point together are "
        "one prompt, with the box if there is one. Each of several --box is a prompt. Coordinates are pixels of the "
        "upright image; write negative ones with an equals sign, --box=-5,0,60,80. With --prompts, many images are "
        "segmented, and a second run skips those that have an output.",
    )
    predict.add_argument(
        "image", metavar="IMAGE", nargs="?", help="with --prompts the folder of the images, by default FILE's"
    )
    predict.add_argument(
        "--point", type=_point, action="append", default=[], metavar="X,Y[,LABEL]", help="label 1: object, 0: not"
    )
    predict.add_argument("--box", type=_box, action="append", default=[], metavar="X1,Y1,X2,Y2")
    predict.add_argument("--multimask", action="store_true", help="three masks for an ambiguous prompt")
    predict.add_argument(
        "--zoom",
        choices=["never", "auto", "always"],
        default="auto",
        help="encode a window around the box instead of the image; auto (default): around a small box",
    )
    predict.add_argument(
        "--max-pixels", type=_count, metavar="N", help="largest image to read, in pixels; default: Pillow's limit"
    )
    predict.add_argument(
        "--value-range",
        choices=["full", "auto"],
        help="scale 16-bit values 0..65535 (full) or the image's own range (auto) to 8 bits; default: full, and refuse "
        "images without a value above 16383",
    )
    add_model_options(predict)
    predict.add_argument("--mask", type=_path, metavar="PNG", help="write masks, 0 and 255; numbered if there are many")
    predict.add_argument("--overlay", type=_path, metavar="PNG", help="write the image with masks and prompts drawn in")
    predict.add_argument(
        "--prompts",
        type=_path,
        metavar="FILE.json",
        help='prompts for many images: COCO annotations, whose boxes are used, or a list such as [{"image": "a.jpg", '
        '"point_coords": [[320, 240]]}] with the arguments of predict() in Python',
    )
    predict.add_argument("--output", metavar="DIR", help="with --prompts: folder for one file per image")
    add_format_option(predict)
    add_ray_option(predict, "with --prompts: ")
    predict.set_defaults(run=_predict)

    convert = commands.add_parser("convert", help="convert a checkpoint of the published code to a model folder")
    convert.add_argument("src", metavar="SRC", help=".pth or .safetensors file with the published names")
    convert.add_argument("dst", metavar="DST", help="folder to write")
    convert.add_argument(
        "--variant", choices=["tiny", "small", "base", "large"], help="expected variant, checked against the shapes"
    )
    convert.add_argument(
        "--image-size", type=int, default=1024, help="side in pixels of its training images (default 1024)"
    )
    convert.set_defaults(run=_convert)

    info = commands.add_parser("info", help="sizes, parameters and cost of a model")
    info.add_argument("model", metavar="MODEL", nargs="?", help="Hub id, folder or .safetensors file; default: bundled")
    info.add_argument("--json", action="store_true")
    info.set_defaults(run=_info)

    add_command(commands)
    add_commands(commands)
    serve.add_command(commands)
    return parser


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def _point(text: str) -> tuple[float, float, int]:
    parts = text.split(",")
    if len(parts) not in (2, 3):
        raise argparse.ArgumentTypeError(f"{short_repr(text)} is not X,Y or X,Y,LABEL")
    try:
        x, y, label = float(parts[0]), float(parts[1]), int(parts[2]) if len(parts) == 3 else 1
    except ValueError:
        label = -1
    if label not in (0, 1):
        raise argparse.ArgumentTypeError(f"{short_repr(text)}: X and Y are numbers, LABEL is 1 (object) or 0 (not)")
    return x, y, label


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{short_repr(text)} is not a positive integer")
    return count


def _box(text: str) -> list[float]:
    try:
        x1, y1, x2, y2 = (float(part) for part in text.split(","))
    except ValueError:  # not numbers, or not four
        raise argparse.ArgumentTypeError(f"{short_repr(text)} is not four numbers X1,Y1,X2,Y2") from None
    return [x1, y1, x2, y2]


@contextmanager
def _step(name: str) -> Iterator[None]:
    """Print the name and duration of a step to a terminal; print nothing to a pipe."""
    if not sys.stderr.isatty():
        yield
        return
    start = time.perf_counter()
    print(f"{name} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    except BaseException:
        print(file=sys.stderr)
        raise
    print(f" {time.perf_counter() - start:.1f} s", file=sys.stderr)


def _predict(args: argparse.Namespace) -> None:
    if args.prompts is not None:
        from . import prompt_files

        with _pixel_limit(args.max_pixels):
            prompt_files.run(args)
        return
    if args.image is None:
        raise ArgumentError("give an IMAGE, or --prompts FILE.json for many")
    if os.path.isdir(args.image):
        raise ImageError(f"{short_repr(args.image)} is a folder; give an image, or --prompts FILE.json for many")
    if args.ray is not None:
        raise ArgumentError("--ray goes with --prompts; one image is segmented here")
    if args.output is not None:
        raise ArgumentError("--output goes with --prompts; --mask and --overlay name the files of one image")
    if not args.point and not args.box:
        raise ArgumentError("no prompt: give --point X,Y or --box X1,Y1,X2,Y2")
    if args.point and len(args.box) > 1:
        raise ArgumentError(f"points go with one box, not with {len(args.box)}; run once for each box")
    mask_files = _mask_files(args.mask, max(1, len(args.box)) * (3 if args.multimask else 1))
    _check_outputs(args, mask_files)

    with _step("reading the image"):
        from .predictor.image_io import load_image

        with _pixel_limit(args.max_pixels):
            image = load_image(args.image, args.value_range)
    with _step("loading the model"):
        from .modeling.rwkv_sam import RWKVSAM
        from .predictor.torch_predictor import Predictor

        predictor = Predictor(RWKVSAM.from_pretrained(args.model, device=args.device, dtype=args.dtype))
    with _step("segmenting"):
        prompts: dict[str, Any] = {}
        if args.point:
            prompts["point_coords"] = [point[:2] for point in args.point]
            prompts["point_labels"] = [point[2] for point in args.point]
        if args.box:
            prompts["box"] = args.box[0] if len(args.box) == 1 else args.box
        masks, scores, _ = predictor.predict_image(image, multimask_output=args.multimask, zoom=args.zoom, **prompts)
    masks, scores = masks.reshape(-1, *masks.shape[-2:]), scores.reshape(-1)

    for file, mask in zip(mask_files, masks, strict=False):  # files first: the reader of the lines may be gone
        _write_png(file, _mask_image(mask))
    if args.overlay is not None:
        from .visualize import overlay

        _write_png(args.overlay, overlay(image, masks, args.point, args.box))
    for i, (mask, score) in enumerate(zip(masks, scores, strict=True)):
        row = {"mask": i, "score": round(float(score), 4), "area": int(mask.sum()), "box": tight_box(mask)}
        print(json.dumps(row))


def _mask_files(file: Path | None, count: int) -> list[Path]:
    if file is None:
        return []
    return [file] if count == 1 else [file.with_name(f"{file.stem}_{i}{file.suffix}") for i in range(count)]


def _check_outputs(args: argparse.Namespace, mask_files: list[Path]) -> None:
    """Raise an ArgumentError for output files that cannot be written, before any work is done."""
    for option, file in (("--mask", args.mask), ("--overlay", args.overlay)):
        if file is not None and not _is_name(file):
            raise ArgumentError(f"{option} {str(file)!r} is not a file's name")
        if file is not None and file.suffix.lower() != ".png":
            raise ArgumentError(f"{option} {str(file)!r}: the name must end in .png")
    outputs = [("--mask", file) for file in mask_files]
    if args.overlay is not None:
        outputs.append(("--overlay", args.overlay))
    taken = {os.path.realpath(args.image): "the input image"} if _is_name(args.image) else {}
    for option, file in outputs:
        target = os.path.realpath(file)  # not resolve(), which raises RuntimeError for a loop of symlinks
        if (other := taken.get(target)) is not None:
            raise ArgumentError(f"{option} would overwrite {other}, {str(file)!r}")
        taken[target] = option
        if not os.path.isdir(file.parent):
            raise ArgumentError(f"{option}: there is no folder {str(file.parent)!r}")
        if os.path.isdir(file):
            raise ArgumentError(f"{option} {str(file)!r} is a folder; give a file's name")
        for path in (file, Path(target).parent):  # the folder too, because the file gets its name when it is whole
            if os.path.exists(path) and not os.access(path, os.W_OK):
                raise ArgumentError(f"{option}: may not write to {str(path)!r}")


def _is_name(path: str | Path) -> bool:
    try:
        return b"\0" not in os.fsencode(path)
    except ValueError:  # a character that the file system cannot encode
        return False


def tight_box(mask: np.ndarray) -> list[int] | None:
    """Return (x1, y1, x2, y2) of a mask `[H, W]`, x2 and y2 exclusive; None if it is empty."""
    import numpy as np

    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(rows):
        return None
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def _mask_image(mask: np.ndarray) -> Image.Image:
    from PIL import Image

    return Image.fromarray(mask.astype("uint8") * 255)


def _write_png(file: Path, image: Image.Image) -> None:
    from .files import whole_file

    with whole_file(file) as stream:
        image.save(stream, "PNG")


@contextmanager
def _pixel_limit(pixels: int | None) -> Iterator[None]:
    """Let Pillow read images of up to `pixels` pixels; None for its own limit."""
    from PIL import Image

    from .predictor.image_io import set_most_pixels

    before = Image.MAX_IMAGE_PIXELS
    if pixels is not None:
        set_most_pixels(pixels)
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _convert(args: argparse.Namespace) -> None:
    with _step("converting"):
        from .convert import convert_file

        config = convert_file(args.src, args.dst, variant=args.variant, image_size=args.image_size)
    print(f"{args.dst}: {config.variant}, {1 + config.num_multimask_outputs} mask outputs, {config.image_size} pixels")


def _info(args: argparse.Namespace) -> None:
    with _step("loading the model"):
        import torch

        from .checkpoint import check_names, locate, read_checkpoint
        from .modeling.rwkv_sam import RWKVSAM

        config_file, weights_file = locate(args.model)
        config, state_dict = read_checkpoint(config_file, weights_file)
        with torch.device("meta"):
            model = RWKVSAM(config)
        check_names(model, state_dict, weights_file)
    rows = {
        "variant": config.variant,
        "image_size": config.image_size,
        "mask_outputs": 1 + config.num_multimask_outputs,
        "widths": [config.stem_dim, config.stage1_dim, config.stage2_dim, config.embed_dim],
        "rwkv_layers": config.depth,
        "stored_dtype": ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in state_dict.values()})),
        **_cost(model),
        "kernels": _where_kernels_run(),
    }
    if args.json:
        print(json.dumps(rows))
        return
    for name, value in rows.items():
        text = f"{value:,}" if isinstance(value, int) and name != "image_size" else value
        print(f"{name.replace('_', ' '):24}{text}")


def _cost(model: RWKVSAM) -> dict[str, float]:
    """Return the parameters and GMACs of a model on the meta device, counted over matrix products and convolutions.

    The image is a square of `image_size` pixels; the prompt is one click.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad():
        pixels = torch.empty(1, 3, model.config.image_size, model.config.image_size)
        with FlopCounterMode(display=False) as encoder:
            embedding = model.encode_image(pixels)
        with FlopCounterMode(display=False) as decoder:
            model.decode_masks(embedding, torch.empty(1, 1, 2), torch.empty(1, 1, dtype=torch.long))
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "gmacs_per_image": round(encoder.get_total_flops() / 2e9, 2),
        "gmacs_per_prompt": round(decoder.get_total_flops() / 2e9, 2),
    }


def _where_kernels_run() -> str:
    import torch

    from .triton_kernels.operator import why_no_kernels

    reason = why_no_kernels()
    if not torch.cuda.is_available():
        return "plain PyTorch: there is no CUDA device" + (f"; {reason}" if reason else "")
    gpu = torch.cuda.get_device_name()
    if reason:
        return f"plain PyTorch on {gpu}: {reason}"
    return f"Triton kernels with device='cuda' ({gpu}), plain PyTorch on other devices"
