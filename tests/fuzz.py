"""Random inputs to the public interface: `python -m tests.fuzz --cases 3000` counts what comes of them.

Each case ends with a sound result or with an exception that the function documents. Anything else fails, as does a
message of 500 characters or a case that takes over 20 seconds. hypothesis prints the smallest input that fails.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))  # as pytest does
from exports import Exports
from small_model import small_model

from fastsam_rwkv import (
    RWKVSAM,
    CheckpointError,
    ImageEmbedding,
    ImageError,
    Predictor,
    PromptError,
    load_image,
    mask_to_low_res_logits,
)
from fastsam_rwkv.convert import convert_file
from fastsam_rwkv.export import ExportError, OnnxPredictor
from fastsam_rwkv.export.manifest import describe

LONGEST_MESSAGE = 500  # characters
LONGEST_TIME = 20  # seconds
SIZE = 128  # of the small model's input

SPECIAL = [0, 1, -1, 2, 3, 0.5, 255, 256, 65535, float("nan"), float("inf"), -1e30, 1e308, 2**63, -(2**70)]
numbers = st.one_of(st.sampled_from(SPECIAL), st.floats(-300, 300), st.integers(-5, 300))
texts = st.one_of(st.text(max_size=12), st.sampled_from(["", "a\0b", "/", "~nobody/x", "x" * 5000, "../..", "\ud800"]))
leaves = st.one_of(st.none(), st.booleans(), numbers, texts)
json_values = st.recursive(leaves, lambda v: st.one_of(st.lists(v, max_size=4), st.dictionaries(texts, v, max_size=3)))
junk = st.one_of(json_values, st.binary(max_size=9), st.builds(object), st.just(np.array({}, dtype=object)))
any_array = npst.arrays(
    st.one_of(npst.scalar_dtypes(), npst.byte_string_dtypes(), npst.unicode_string_dtypes()),
    npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6),
)
actions = st.sampled_from(["flip", "cut", "insert", "remove", "number"])
edits = st.lists(st.tuples(actions, st.floats(0, 1), st.integers(0, 2**32 - 1)), max_size=4)


def rarely(odd: st.SearchStrategy[Any], usual: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Draw from `odd` one time in eight."""
    return st.integers(0, 7).flatmap(lambda n: odd if n == 7 else usual)


def edited(data: bytes, changes: list[tuple[str, float, int]]) -> bytes:
    """Apply edits: what is done, where as a share of the length, and a number."""
    result = bytearray(data)
    for what, share, number in changes:
        place = int(share * share * len(result))  # headers oftener
        if what == "flip" and result:
            result[min(place, len(result) - 1)] ^= 1 + number % 255
        elif what == "cut":
            del result[place:]
        elif what == "insert":
            result[place:place] = number.to_bytes(4, "little") * (1 + number % 5)
        elif what == "remove":
            del result[place : place + 1 + number % 40]
        elif what == "number":
            result[place : place + 4] = number.to_bytes(4, "little")
    return bytes(result)


class Cases:
    """Inputs for each area, in folders under `root`. A method draws an input, and returns what it does with it."""

    def __init__(self, root: Path, exports: Exports | None = None) -> None:
        self.root = root
        root.mkdir(exist_ok=True)
        self._exports = exports

    @cached_property
    def exports(self) -> Exports:
        return self._exports or Exports(self.root / "exports")

    @cached_property
    def predictor(self) -> Predictor:
        """A predictor with an image of 60 x 90 pixels."""
        predictor = Predictor(small_model().requires_grad_(False))
        predictor.set_image(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
        return predictor

    @cached_property
    def encoded(self) -> list[bytes]:
        """A small image in many formats."""
        image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 13, 4), dtype=np.uint8), "RGBA")
        exif = Image.Exif()
        exif[0x0112] = 6
        files = []
        for kind, mode in (
            ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "I;16"), ("PNG", "1"), ("JPEG", "RGB"), ("JPEG", "CMYK"),
            ("WEBP", "RGBA"), ("TIFF", "RGB"), ("TIFF", "F"), ("TIFF", "I;16"), ("BMP", "RGB"), ("GIF", "P"),
            ("PPM", "RGB"), ("PPM", "L"), ("JPEG2000", "RGB"), ("ICO", "RGBA"), ("PCX", "L"), ("TGA", "RGBA"),
            ("SGI", "RGB"), ("AVIF", "RGB"), ("EPS", "RGB"), ("PDF", "RGB"),
        ):  # fmt: skip
            with suppress(Exception):  # a format, or a mode of it, that this Pillow cannot write
                stream = io.BytesIO()
                converted = image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)
                converted.save(stream, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}))
                files.append(stream.getvalue())
        return files

    def images(self, draw: Callable[[Any], Any]) -> Callable[[], str]:
        """Read arrays, PIL images and anything else as an image."""
        value_range = draw(rarely(junk, st.sampled_from([None, "full", "auto"])))
        kind = draw(st.sampled_from(["pixels", "PIL", "pixels", "array", "PIL", "other"]))
        image: Any
        if kind == "array":
            image = draw(any_array)
        elif kind == "pixels":
            shape = draw(st.sampled_from([(5, 7), (5, 7, 1), (5, 7, 2), (5, 7, 3), (5, 7, 4), (0, 7, 3), (1, 1, 3)]))
            odd = st.sampled_from([">u2", "i4", "f4", "f8", "?", "c8"])
            image = draw(npst.arrays(rarely(odd, st.sampled_from(["u1", "u2"])), shape))
            image = image[:: draw(st.sampled_from([1, -1, 2]))]
        elif kind == "PIL":
            modes = ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16", "I;16B", "LA", "PA"]
            image = Image.new(draw(st.sampled_from(modes)), draw(st.tuples(st.integers(0, 9), st.integers(0, 9))))
            image.info.update(draw(st.dictionaries(st.sampled_from(["transparency", "exif", "icc_profile"]), junk)))
        else:
            image = draw(st.one_of(junk, st.builds(torch.zeros, st.just(3)), st.just(self.root), st.just(Path("none"))))
        return lambda: self._read(image, value_range)

    def files(self, draw: Callable[[Any], Any]) -> Callable[[], str]:
        """Read damaged files as an image."""
        file = self.root / f"image{draw(st.sampled_from(['', '.png', '.jpg', '.tif', '.eps']))}"
        file.write_bytes(edited(draw(st.sampled_from(self.encoded)), draw(edits)))
        return lambda: self._read(file, draw(st.sampled_from([None, "auto"])))

    def _read(self, image: Any, value_range: Any) -> str:
        array = load_image(image, value_range)
        assert array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3 and array.size > 0, array.shape
        return "read"

    def prompts(self, draw: Callable[[Any], Any]) -> Callable[[], str]:
        """Predict with prompts that may be anything."""
        N, P = (draw(rarely(st.just(0), st.sampled_from([1, 2, 3]))) for _ in range(2))

        def one(*shape: int) -> Any:
            dtype = draw(rarely(st.sampled_from(["i4", "u1", "?"]), st.sampled_from(["f4", "f8", "i8"])))
            places = st.integers(0, 59) if dtype in ("i4", "i8") else st.floats(0, 59, width=32)
            usual = npst.arrays(dtype, shape, elements=places if dtype not in ("u1", "?") else None)
            ordered = usual.map(lambda box: np.sort(box) + np.array([0, 0, 9, 9], box.dtype) if shape[-1] == 4 else box)
            value = draw(rarely(st.one_of(any_array, junk, usual), st.one_of(st.none(), ordered)))
            how = draw(st.sampled_from(["array", "list", "tensor"]))
            if isinstance(value, np.ndarray) and how == "list":
                return value.tolist()
            if (
                isinstance(value, np.ndarray)
                and how == "tensor"
                and value.dtype.kind in "fiub"
                and value.dtype != ">f4"
            ):
                with suppress(TypeError, ValueError):
                    return torch.from_numpy(value.copy())
            return value

        lead = draw(st.sampled_from([(), (N,)]))
        given = {"point_coords": one(*lead, P, 2), "box": one(*lead, 4)}
        if given["point_coords"] is not None:
            labels = npst.arrays("i8", (*lead, P), elements=st.sampled_from([1, 0, -1]))
            given["point_labels"] = draw(rarely(st.one_of(any_array, junk), st.one_of(st.none(), labels)))
        if draw(st.integers(0, 5)) == 0:
            side = draw(st.sampled_from([SIZE // 4, SIZE // 4, 7]))
            logits = np.full((*lead, 1, side, side), draw(st.sampled_from([-3.0, 0.0, 1.0, 20.0, np.nan, np.inf])))
            logits[..., : side // 2] = draw(st.sampled_from([0.0, 1.0, 5.0]))
            given["mask_input"] = draw(rarely(st.one_of(any_array, junk), st.just(logits)))
        flag = rarely(st.one_of(any_array, junk), st.booleans())
        options = {"multimask_output": draw(flag), "return_logits": draw(flag)}
        options["zoom"] = draw(rarely(junk, st.sampled_from(["never", "auto", "always"])))

        def predict() -> str:
            masks, scores, low = self.predictor.predict(**given, **options)
            assert masks.shape[-2:] == (60, 90) and scores.shape == masks.shape[:-2] == low.shape[:-2]
            assert np.isfinite(scores).all() and np.isfinite(low).all()
            return "masks"

        def enlarge() -> str:
            logits = mask_to_low_res_logits(mask, SIZE)
            assert np.abs(logits).max() <= 10
            return "logits"

        mask = draw(st.one_of(any_array, npst.arrays("?", (5, 7)), junk))
        return predict if draw(st.integers(0, 5)) else enlarge

    def tensors(self, draw: Callable[[Any], Any]) -> Callable[[], str]:
        """Decode tensors of any shape and dtype."""
        dtypes = [torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool]
        given: dict[str, Any] = {}
        N, P = draw(st.sampled_from([0, 1, 2])), draw(st.sampled_from([0, 1, 2]))
        for name, usual in (
            ("point_coords", (N, P, 2)), ("point_labels", (N, P)), ("boxes", (N, 4)),
            ("mask_input", (N, 1, SIZE // 4, SIZE // 4)),
        ):  # fmt: skip
            if draw(st.booleans()):
                shapes = rarely(st.lists(st.integers(0, 3), max_size=4), st.just(usual))
                tensor = torch.full(draw(shapes), draw(st.sampled_from([0.0, 1.0, -1.0, 50.0, 0.5, float("nan")])))
                given[name] = draw(rarely(junk, st.just(tensor.to(draw(st.sampled_from(dtypes))))))
        multimask = draw(st.booleans())

        def decode() -> str:
            low, iou = self.predictor.model.decode_masks(self._embedding, **given, multimask_output=multimask)
            assert low.shape[:2] == iou.shape and low.shape[2:] == (SIZE // 4, SIZE // 4)
            return "masks"

        return decode

    @cached_property
    def _embedding(self) -> ImageEmbedding:
        return self.predictor.embedding

    def checkpoints(self, draw: Callable[[Any], Any]) -> Callable[[], str]:
        """Load or convert damaged models."""
        folder = self.root / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.exports.model, folder)
        config, weights = folder / "config.json", folder / "model.safetensors"
        kind = draw(st.sampled_from(["config", "config bytes", "weights", "tensors", "pickle", "name"]))
        source: Any = folder
        if kind == "config":
            fields = json.loads(config.read_text())
            fields[draw(st.sampled_from([*fields, "more"]))] = draw(json_values)
            config.write_text(json.dumps(fields))
        elif kind == "config bytes":
            config.write_bytes(edited(config.read_bytes(), draw(edits)))
        elif kind == "weights":
            weights.write_bytes(edited(weights.read_bytes(), draw(edits)))
        elif kind in ("tensors", "pickle"):
            tensors = load_file(weights)
            name = draw(st.sampled_from(sorted(tensors)))
            other = draw(st.sampled_from([None, torch.zeros(2, 3), tensors[name] / 0, tensors[name].long()]))
            changed = {**tensors, draw(st.sampled_from([name, "more", f"module.{name}"])): other}
            changed = {name: tensor for name, tensor in changed.items() if tensor is not None}
            if kind == "tensors":
                save_file(changed, weights, metadata={"config": draw(texts).encode(errors="replace").decode()})
            else:
                source, stream = folder / "model.pth", io.BytesIO()
                wrapped = draw(st.sampled_from([changed, {"state_dict": changed}, [changed], {"model": draw(junk)}]))
                with suppress(Exception):  # junk that cannot be pickled
                    torch.save(wrapped, stream, _use_new_zipfile_serialization=draw(st.booleans()))
                source.write_bytes(edited(stream.getvalue(), draw(edits)))
                return lambda: self._convert(source)
        else:
            source = draw(st.one_of(texts, st.sampled_from([folder / "config.json", weights, self.root / "none"])))
        return lambda: self._load(source)

    def _load(self, source: Any) -> str:
        model = RWKVSAM.from_pretrained(source, local_files_only=True)
        assert all(torch.isfinite(p).all() for p in model.parameters())
        return "loaded"

    def _convert(self, source: Path) -> str:
        convert_file(source, self.root / "converted")
        return "converted"

    def embeddings(self, draw: Callable[[Any], Any]) -> Callable[[], str]:
        """Load damaged embeddings and use them."""
        file = self.root / "embedding.safetensors"
        embedding = self._embedding
        embedding.save(file)
        if draw(st.booleans()):
            file.write_bytes(edited(file.read_bytes(), draw(edits)))
        else:
            about = {"input_size": [SIZE, SIZE], "original_size": [60, 90], "fingerprint": None}
            about[draw(st.sampled_from(list(about)))] = draw(json_values)
            metadata = {"fastsam_rwkv": "fastsam_rwkv.ImageEmbedding 1", "embedding": json.dumps(about)}
            save_file(load_file(file), file, metadata)

        def use() -> str:
            loaded = ImageEmbedding.load(file)
            small = replace(
                loaded, original_size=loaded.original_size and tuple(min(s, 99) for s in loaded.original_size)
            )
            other = Predictor(self.predictor.model)
            try:
                other.set_embedding(small)
            except ValueError as error:
                return f"refused: {type(error).__name__}"
            assert np.isfinite(other.predict(box=[5, 5, 50, 50]).scores).all()
            return "used"

        return use

    def onnx(self, draw: Callable[[Any], Any]) -> Callable[[], str]:
        """Run damaged exports. Half of the damaged graphs get a fitting description."""
        folder = self.exports.copy("fp32", self.root / "exported")
        file = folder / draw(st.sampled_from(["export.json", "encoder.onnx", "decoder.onnx"]))
        if file.suffix == ".json" and draw(st.booleans()):
            fields = json.loads(file.read_text())
            fields[draw(st.sampled_from([*fields, "more"]))] = draw(json_values)
            file.write_text(json.dumps(fields))
        else:
            file.write_bytes(edited(file.read_bytes(), draw(edits)))
        if file.suffix == ".onnx" and draw(st.booleans()):
            manifest = json.loads((folder / "export.json").read_text())
            manifest["files"][file.name] = describe(file)
            (folder / "export.json").write_text(json.dumps(manifest))

        def run() -> str:
            found = OnnxPredictor(folder).predict_image(np.zeros((60, 90, 3), np.uint8), box=[5, 5, 50, 50])
            assert found.masks.shape == (1, 60, 90)
            return "masks"

        return run


AREAS: dict[str, tuple[type[Exception], ...]] = {  # with the exceptions that are documented
    "images": (ImageError, TypeError, OSError),
    "files": (ImageError, OSError),
    "prompts": (PromptError,),
    "tensors": (PromptError, TypeError),
    "checkpoints": (CheckpointError, OSError),
    "embeddings": (CheckpointError, OSError),
    "onnx": (ExportError,),
}


def fuzz(area: str, cases: int, folder: Path, exports: Exports | None = None, seed: int | None = None) -> Counter[str]:
    """Run random cases of an area.

    Args:
        area: One of AREAS.
        cases: Their number.
        folder: Folder for their files.
        exports: Exported folders that are there already.
        seed: Seed of the cases. By default the same cases every time.

    Returns:
        The number of each outcome.

    Raises:
        AssertionError, Exception: A case failed. hypothesis has printed it.
    """
    outcomes: Counter[str] = Counter()
    tried = Cases(folder, exports)
    act_on: Callable[..., Callable[[], str]] = getattr(tried, area)

    def case(data: st.DataObject) -> None:
        act = act_on(data.draw)
        started = time.perf_counter()
        try:
            outcome = act()
        except AREAS[area] as error:
            assert len(str(error)) < LONGEST_MESSAGE, f"a message of {len(str(error))} characters"
            outcome = type(error).__name__
        assert time.perf_counter() - started < LONGEST_TIME, "too slow"
        outcomes[outcome] += 1

    checks = settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=seed is None,
        suppress_health_check=list(HealthCheck),
    )
    test = checks(given(st.data())(case))
    (test if seed is None else hypothesis.seed(seed)(test))()
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=3000, help="of all areas together")
    parser.add_argument("--areas", nargs="+", default=list(AREAS), choices=list(AREAS))
    parser.add_argument("--seed", type=int, help="other cases than those of every time")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"hypothesis {hypothesis.__version__}, torch {torch.__version__}, numpy {np.__version__}")
    for area in args.areas:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            outcomes = fuzz(area, -(-args.cases // len(args.areas)), Path(folder) / area, seed=args.seed)
        listed = ", ".join(f"{outcome} {count}" for outcome, count in outcomes.most_common())
        print(f"{area}: {sum(outcomes.values())} cases in {time.perf_counter() - started:.0f} s: {listed}", flush=True)


if __name__ == "__main__":
    main()
