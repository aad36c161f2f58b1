"""Commands on a Ray cluster: actors do the work of `everything` and `predict --prompts`, and encode the outputs."""

from __future__ import annotations

import io
import logging
import pickle
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, Protocol

from .errors import ArgumentError, InputError, shorten
from .ray import ActorPoolStrategy, one_line, pa, prepare_process, ray

PATIENCE = 5.0  # seconds until a cluster answers


class Job(Protocol):
    """Work of a command on images, which a local process and actors do alike."""

    def results(self, items: Sequence[Any]) -> Iterable[Any]:
        """Yield the result of each item, or the error of one that cannot be used."""

    def write(self, item: Any, result: Any, stream: BinaryIO) -> int:
        """Write the output of an item and return its number of masks."""


class Encoded:
    """Output of an image as an actor wrote it.

    Args:
        count: Number of masks.
        data: Content of the file.
    """

    def __init__(self, count: int, data: bytes) -> None:
        self.count, self.data = count, data

    @staticmethod
    def write(image: str, result: Encoded, stream: BinaryIO) -> int:
        """Write the output to a stream, for `OutputFolder.fill`."""
        stream.write(result.data)
        return result.count


class _JobActor:
    """Actor that runs a job of a command. A model that cannot be used is reported as a row, because Ray hides it."""

    def __init__(self, make: Callable[[], Job], max_pixels: int | None) -> None:
        prepare_process(1, max_pixels)
        self._job: Job | str
        try:
            self._job = make()
        except InputError as error:
            self._job = error.command_message
        except OSError as error:
            self._job = str(error)

    def __call__(self, table: pa.Table) -> pa.Table:
        job = self._job
        if isinstance(job, str):
            return self._table([{"fatal": job}] * len(table))
        items = [pickle.loads(value.as_py()) for value in table["item"]]
        rows: list[dict[str, Any]] = []
        for item, result in zip(items, job.results(items), strict=True):
            if isinstance(result, Exception):
                rows.append({"error": one_line(result)})
                continue
            stream = io.BytesIO()
            count = job.write(item, result, stream)
            rows.append({"count": count, "data": stream.getvalue()})
        return self._table(rows)

    @staticmethod
    def _table(rows: list[dict[str, Any]]) -> pa.Table:
        types = {"count": pa.int64(), "data": pa.large_binary(), "error": pa.string(), "fatal": pa.string()}
        return pa.table({name: pa.array([row.get(name) for row in rows], type) for name, type in types.items()})


def _check_reachable(address: str) -> None:
    """Raise an InputError if nothing answers at `host:port`, for which Ray would wait for minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(f"no Ray cluster at {address!r}: {error}; start one with `ray start --head`") from error


def distributed(
    make: Callable[[], Job], items: Sequence[Any], address: str, device: str, max_pixels: int | None = None
) -> Iterator[Encoded | Exception]:
    """Yield the output of each item of a command, or the error of one that cannot be used, in order.

    Args:
        make: Makes the job in each actor; pickled, as are the items.
        items: What the job takes.
        address: Of a cluster as `ray.init` has it; "local" starts one on this machine. A process that is connected to
            a cluster stays there.
        device: "cuda" gives each actor a GPU. Otherwise each has one core.
        max_pixels: Largest image to read; None for Pillow's limit.

    Raises:
        ArgumentError: `address` is none, the cluster lacks GPUs, or `device` names one of several.
        InputError: There is no such cluster, or the model cannot be used.
    """
    if address not in ("local", "auto") and ":" not in address:
        raise ArgumentError(f"--ray {address!r} is not auto or host:port; write --ray after the images")
    if ":" in address:
        _check_reachable(address)
    if device.startswith("cuda:"):
        raise ArgumentError(f"--device {device} does not go with --ray, which chooses the GPU; give --device cuda")
    started = not ray.is_initialized()
    if started:
        options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:  # Ray raises one or the other
            raise InputError(f"no Ray cluster at {address!r}: {shorten(error, 200)}") from error
    try:
        kind = "GPU" if device == "cuda" else "CPU"
        actors = int(ray.cluster_resources().get(kind, 0))
        if actors < 1:
            raise ArgumentError(f"the cluster has no {kind} for --device {device}")
        batch_size = max(1, min(16, len(items) // (4 * actors)))
        batches = -(-len(items) // batch_size)
        rows = [{"item": pickle.dumps(item)} for item in items]
        dataset = ray.data.from_items(rows, override_num_blocks=batches)
        dataset.context.execution_options.preserve_order = True
        dataset.context.enable_progress_bars = False  # the command has its own
        done = dataset.map_batches(
            _JobActor,
            fn_constructor_args=(make, max_pixels),
            batch_format="pyarrow",
            batch_size=batch_size,
            compute=ActorPoolStrategy(size=min(actors, batches)),
            num_cpus=1 if kind == "CPU" else None,
            num_gpus=1 if kind == "GPU" else None,
        )
        batch: Any
        for batch in done.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in batch.to_pylist():
                if row["fatal"] is not None:
                    raise InputError(row["fatal"])
                yield Encoded(row["count"], row["data"]) if row["error"] is None else InputError(row["error"])
    finally:
        if started:
            ray.shutdown()
