"""`export.json`: what lies in an exported folder. Standard library only."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import InputError

FORMAT_VERSION = 1
MANIFEST, ENCODER, DECODER = "export.json", "encoder.onnx", "decoder.onnx"


class ExportError(InputError, ValueError):
    """An export that cannot be made, or exported files that cannot be used; the message names the remedy."""


@dataclass(frozen=True)
class Manifest:
    """What the files of an exported folder are.

    Attributes:
        version: of fastsam-rwkv that wrote them.
        source: the model as it was given: a Hub id or a path; None for the bundled one, and for one given as an object.
        weights_sha256: of the model's parameters, to tell whether a model is the one that was exported.
        config: the model's `ModelConfig` as a dict.
        image_size: side of the input in pixels.
        precision: "fp32" or "fp16".
        batch: images that the encoder takes at once, None for any number.
        uint8: the encoder takes uint8 `[B, h, w, 3]`, instead of normalised `[B, 3, S, S]`.
        sam_compatible: the decoder also takes `orig_im_size` and gives `masks`.
        single_mask: the decoder gives the single mask alone.
        opset: ONNX's.
        exporter: versions of what made the files.
        files: name to size in bytes and sha256.
        check: what the quality gate measured.
    """

    version: str
    source: str | None
    weights_sha256: str
    config: dict[str, Any]
    image_size: int
    precision: str
    batch: int | None
    uint8: bool
    sam_compatible: bool
    single_mask: bool
    opset: int
    exporter: dict[str, str]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    check: dict[str, Any] = field(default_factory=dict)

    @property
    def num_masks(self) -> int:
        """Masks that the decoder gives for a prompt: the single one, then the three for ambiguous prompts."""
        return 1 if self.single_mask else 1 + int(self.config["num_multimask_outputs"])

    def write(self, folder: Path) -> None:
        text = json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: str | os.PathLike[str], verify: bool = True) -> Manifest:
        """Read `export.json`, and see that the files it names are there and unchanged.

        Raises:
            ExportError: no export lies there, it is of another format, or its files were changed.
        """
        folder = Path(folder)
        remedy = "make it with `fastsam-rwkv export onnx MODEL OUTDIR`"
        if not folder.is_dir():
            raise ExportError(f"no folder {str(folder)!r}; {remedy}")
        file = folder / MANIFEST
        if not file.is_file():
            raise ExportError(f"{str(folder)!r} holds no {MANIFEST}, so it is not an export; {remedy}")
        try:
            data = dict(json.loads(file.read_text(encoding="utf-8")))
            found = data.pop("format_version", None)
        except (ValueError, TypeError) as error:
            raise ExportError(f"{str(file)!r} is damaged ({error}); export again: {remedy}") from error
        if found != FORMAT_VERSION:
            raise ExportError(
                f"{str(folder)!r} was exported by fastsam-rwkv {data.get('version', '?')} in format {found!r}; "
                f"this release reads {FORMAT_VERSION}. Export again with this one, or install that one"
            )
        names = {f.name for f in fields(cls)}
        if set(data) != names:
            raise ExportError(f"{str(file)!r} is damaged: its keys differ by {sorted(set(data) ^ names)}; export again")
        manifest = cls(**data)
        if verify:
            manifest.verify(folder)
        return manifest

    def verify(self, folder: Path) -> None:
        """See that the files are there and unchanged."""
        for name, written in self.files.items():
            if not (folder / name).is_file():
                raise ExportError(f"{str(folder / name)!r} is missing; copy the whole folder, or export again")
            if describe(folder / name) != written:
                raise ExportError(
                    f"{str(folder / name)!r} is not the file that was exported (its size or sha256 differs from "
                    f"{MANIFEST}): it was damaged or changed; export again"
                )


def make_stage(folder: Path) -> Path:
    """An empty folder inside `folder`, where files wait for the check.

    Raises:
        ExportError: `folder` cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="unchecked-", dir=folder))
    except OSError as error:
        raise ExportError(
            f"cannot write to {str(folder)!r}: {error.strerror or error}; choose another folder"
        ) from error


def describe(file: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256") if hasattr(hashlib, "file_digest") else _digest(stream)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def _digest(stream: Any) -> Any:
    """`hashlib.file_digest` for Python 3.10."""
    digest = hashlib.sha256()
    while part := stream.read(1 << 20):
        digest.update(part)
    return digest


def require(*libraries: str, extra: str = "onnx") -> None:
    """See that libraries can be imported.

    Raises:
        ExportError: names the first that cannot, and how to install it.
    """
    for library in libraries:
        try:
            importlib.import_module(library)
        except ImportError as error:
            raise ExportError(
                f"{library} cannot be imported ({error}); install it: pip install 'fastsam-rwkv[{extra}]'"
            ) from error
