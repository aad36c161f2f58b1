"""`export.json`, the description of an exported folder. Standard library only."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_origin, get_type_hints

from ..config import SAM_SIZE, ModelConfig
from ..errors import InputError, listed, short_repr
from ..files import sweep, temporary_folder, whole_file

FORMAT_VERSION = 3
MANIFEST, ENCODER, DECODER = "export.json", "encoder.onnx", "decoder.onnx"
STAGE = "unchecked-"  # prefix of folders with files that are not checked yet
STAGED = {".onnx", ".data", ".json", ".plan", ".cache"}  # suffixes of those files
PRECISIONS = ("fp32", "fp16")
# By contract the encoder's input and outputs; the decoder takes the outputs
CONTRACTS = {
    "sam2": ("image", ("high_res_feats_0", "high_res_feats_1", "image_embed")),
    "sam": ("input_image", ("image_embeddings",)),
    "osam": ("x", ("image_embeddings",)),
}
OLD_CONTRACTS = {  # of format 2, which is still read
    "v2": ("image", ("image_embed", "high_res_feats")),
    "v2 with orig_im_size": ("image", ("image_embed", "high_res_feats")),
}
MOST_BYTES = 1 << 20  # of a JSON file; ours have some thousand


class ExportError(InputError, ValueError):
    """Failed export, or exported files that cannot be used. The message names the remedy."""


@dataclass(frozen=True)
class Manifest:
    """Description of the files in an exported folder.

    Attributes:
        version: Version of fastsam-rwkv that wrote them.
        source: Hub id or path of the model. None for the bundled model and for a model passed as an object.
        weights_sha256: Digest of the model's parameters in float32. It identifies the model.
        config: The model's `ModelConfig` as a dict.
        image_size: Side of the model input in pixels.
        precision: "fp32" or "fp16".
        batch: Fixed number of images in a call of the encoder; None for any number.
        uint8: The encoder takes RGB bytes, channels last.
        contract: Names, order and frames of inputs and outputs: "sam2", "sam" or "osam", or one of `OLD_CONTRACTS`.
        single_mask: The decoder computes only the single mask.
        opset: ONNX opset.
        exporter: Versions of torch, onnx and onnxscript.
        files: Size in bytes and sha256 by file name.
        check: Differences from PyTorch, measured by `check_onnx`. `quality` is the difference of predicted IoUs.
            `min_mask_iou` is there if `adopt_onnx` recorded the files.
    """

    version: str
    source: str | None
    weights_sha256: str
    config: dict[str, Any]
    image_size: int
    precision: str
    batch: int | None
    uint8: bool
    contract: str
    single_mask: bool
    opset: int
    exporter: dict[str, str]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    check: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            kind = hint if isinstance(hint, UnionType) else get_origin(hint) or hint
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
                raise TypeError(f"{name!r} cannot be {short_repr(value)}")
        for name, value in (("image_size", self.image_size), ("batch", self.batch)):
            if value is not None and value < 1:
                raise ValueError(f"{name!r} cannot be {short_repr(value)}")
        ModelConfig.from_dict(self.config)
        if wrong := [n for n, file in self.files.items() if Path(n).name != n or not isinstance(file, dict)]:
            raise ValueError(f"'files' cannot have {listed(wrong)}")
        if not isinstance(limit := self.check.get("min_mask_iou", 0.0), (int, float)):
            raise TypeError(f"'min_mask_iou' cannot be {short_repr(limit)}")
        for name, among in (("precision", PRECISIONS), ("contract", CONTRACTS | OLD_CONTRACTS)):
            if getattr(self, name) not in among:
                raise ValueError(f"{name!r} cannot be {short_repr(getattr(self, name))}")

    @property
    def for_sam(self) -> bool:
        """True for graphs in segment-anything's frame, which return one mask for a prompt."""
        return self.contract in ("sam", "osam")

    @property
    def num_masks(self) -> int:
        """Number of masks the decoder returns for a prompt: the single one, then the three for ambiguous prompts."""
        return 1 if self.single_mask or self.for_sam else 1 + int(self.config["num_multimask_outputs"])

    @property
    def image_input(self) -> str:
        """Name of the encoder's input."""
        return (CONTRACTS | OLD_CONTRACTS)[self.contract][0]

    @property
    def embedding(self) -> tuple[str, ...]:
        """Names of the encoder's outputs, which the decoder takes."""
        return (CONTRACTS | OLD_CONTRACTS)[self.contract][1]

    @property
    def takes_size(self) -> bool:
        """True if the decoder takes `orig_im_size` and returns `masks` of that size."""
        return self.for_sam or self.contract == "v2 with orig_im_size"

    @property
    def frame_size(self) -> int:
        """Side of the frame of coordinates, which is 4 times that of low-resolution masks."""
        return SAM_SIZE if self.for_sam else self.image_size

    def write(self, folder: Path) -> None:
        """Write `export.json` into `folder`."""
        text = json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2)
        with whole_file(folder / MANIFEST) as stream:
            stream.write(f"{text}\n".encode())

    @classmethod
    def read(cls, folder: str | os.PathLike[str], *, verify: bool = True) -> Manifest:
        """Read `export.json` in `folder`, and check the files it names unless `verify` is False.

        Raises:
            ExportError: The folder holds no export or one of another format, or a file is missing or was changed.
        """
        folder = Path(os.path.expanduser(folder))
        remedy = "create it with `fastsam-rwkv export onnx MODEL OUTDIR`"
        if not os.path.isdir(folder):  # False for a name that cannot be one, where pathlib raises
            raise ExportError(f"no folder {short_repr(str(folder))}; {remedy}")
        file = folder / MANIFEST
        if not file.is_file():
            raise ExportError(f"{str(folder)!r} holds no {MANIFEST}; {remedy}")
        data = read_json(file, f"export again: {remedy}")
        found = data.pop("format_version", None)
        if found == 2:
            data["contract"] = list(OLD_CONTRACTS)[data.pop("sam_compatible", False) is True]
        elif found != FORMAT_VERSION:
            raise ExportError(
                f"{str(folder)!r} was exported by fastsam-rwkv {short_repr(data.get('version', '?'))} in format "
                f"{short_repr(found)}; this release reads 2 and {FORMAT_VERSION}. Export again, or install that release"
            )
        names = {f.name for f in fields(cls)}
        if set(data) != names:
            wrong = listed(sorted(set(data) ^ names))
            raise ExportError(f"{str(file)!r} is damaged: wrong keys {wrong}; export again: {remedy}")
        try:
            manifest = cls(**data)
        except (TypeError, ValueError) as error:
            raise ExportError(f"{str(file)!r} is damaged: {error}; export again: {remedy}") from error
        if verify:
            manifest.verify(folder)
        return manifest

    def verify(self, folder: Path) -> None:
        """Check that the files exist and match their sha256.

        Raises:
            ExportError: A file is missing or was changed.
        """
        for name, written in self.files.items():
            if not (folder / name).is_file():
                raise ExportError(f"{str(folder / name)!r} is missing; copy the whole folder, or export again")
            if describe(folder / name) != written:
                raise ExportError(
                    f"{str(folder / name)!r} was damaged or changed: its size or sha256 differs from {MANIFEST}; "
                    f"export again, or if you changed it on purpose: "
                    f"fastsam-rwkv export onnx --adopt {shlex.quote(str(folder))}"
                )


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object from a file of ours.

    Raises:
        ExportError: The file is not one. The message ends with `remedy`.
    """
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        data = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise TypeError(f"it holds {short_repr(data)}, no object")
    except (ValueError, TypeError, RecursionError) as error:
        raise ExportError(f"{str(file)!r} is damaged ({error}); {remedy}") from error
    return data


@contextmanager
def make_stage(folder: Path) -> Iterator[Path]:
    """Create an empty temporary folder inside `folder` for files that have not passed the check.

    Such folders of killed processes are removed first, if they hold nothing but files of an export.

    Raises:
        ExportError: `folder` is not writable.
    """
    stage = temporary_folder(folder, STAGE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(path for path in folder.glob(f"{STAGE}*") if _is_stage(path))
        path = stage.__enter__()
    except OSError as error:
        reason = error.strerror or error
        raise ExportError(f"cannot write to {str(folder)!r}: {reason}; choose another folder") from error
    with ExitStack() as stack:
        stack.push(stage)
        yield path


def _is_stage(folder: Path) -> bool:
    return folder.is_dir() and all(file.suffix in STAGED and file.is_file() for file in folder.iterdir())


def reject(stage: Path) -> Path:
    """Move files that failed the check to `rejected` beside the stage, and return that folder."""
    folder = stage.with_name("rejected")
    shutil.rmtree(folder, ignore_errors=True)
    return stage.rename(folder)


def describe(file: Path) -> dict[str, Any]:
    """Return the size and sha256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def require(*libraries: str, extra: str = "onnx") -> None:
    """Check that libraries can be imported.

    Raises:
        ExportError: A library cannot be imported. The message names it and the command that installs it.
    """
    for library in libraries:
        try:
            importlib.import_module(library)
        except ImportError as error:
            raise ExportError(f"{library} cannot be imported ({error}); pip install 'fastsam-rwkv[{extra}]'") from error
