"""ONNX Runtime sessions of exported graphs, with this package's errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .manifest import ExportError, require

Providers = Sequence[str | tuple[str, dict[str, Any]]]


class Session:
    """`onnxruntime.InferenceSession` of a graph.

    Args:
        file: ONNX file.
        providers: Execution providers, the preferred one first.
        options: `onnxruntime.SessionOptions`.

    Raises:
        ExportError: ONNX Runtime is missing, or cannot load the file.
    """

    def __init__(self, file: Path, providers: Providers = ("CPUExecutionProvider",), options: Any = None) -> None:
        require("onnxruntime")
        import onnxruntime

        self._file = file
        try:
            self._session = onnxruntime.InferenceSession(str(file), options, providers=list(providers))
        except Exception as error:  # its errors have no common base
            raise self._error("load", error) from error

    @property
    def providers(self) -> list[str]:
        """Execution providers in use."""
        return list(self._session.get_providers())

    def run(self, outputs: Sequence[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Compute the named outputs.

        Raises:
            ExportError: The graph has other inputs or outputs, or ONNX Runtime fails.
        """
        try:
            return list(self._session.run(list(outputs), feeds))
        except Exception as error:
            raise self._error("run", error) from error

    def _error(self, verb: str, error: Exception) -> ExportError:
        reason = " ".join(str(error).split())
        return ExportError(
            f"ONNX Runtime cannot {verb} {str(self._file)!r}: {type(error).__name__}: {reason}; export again, or use a "
            "newer onnxruntime"
        )
