"""ONNX Runtime sessions of exported graphs, with this package's errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .manifest import ExportError

Providers = Sequence[str | tuple[str, dict[str, Any]]]


class Session:
    """`onnxruntime.InferenceSession` of a graph.

    Args:
        file: ONNX file.
        providers: Execution providers, the preferred one first.
        options: `onnxruntime.SessionOptions`.

    Raises:
        ExportError: ONNX Runtime cannot load the file.
    """

    def __init__(self, file: Path, providers: Providers = ("CPUExecutionProvider",), options: Any = None) -> None:
        import onnxruntime

        self._file = file
        with self._errors("load"):
            self._session = onnxruntime.InferenceSession(str(file), options, providers=list(providers))

    @property
    def providers(self) -> list[str]:
        """Execution providers in use."""
        return list(self._session.get_providers())

    def run(self, outputs: Sequence[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Compute the named outputs.

        Raises:
            ExportError: The graph has other inputs or outputs, or ONNX Runtime fails.
        """
        with self._errors("run"):
            return list(self._session.run(list(outputs), feeds))

    @contextmanager
    def _errors(self, verb: str) -> Iterator[None]:
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions have no common base, and this block runs no other code
            reason = " ".join(str(error).split())
            raise ExportError(
                f"ONNX Runtime cannot {verb} {str(self._file)!r}: {type(error).__name__}: {reason}; "
                "if the file is damaged or was changed, export again"
            ) from error
