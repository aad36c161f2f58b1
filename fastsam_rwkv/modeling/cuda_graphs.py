"""CUDA graphs: capture a function once per input shape, then replay it."""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..errors import shorten
from ..triton_kernels.cuda_driver import create_stream

Function = Callable[..., tuple[Tensor, ...]]
WARMUPS = 2  # before recording, kernels compile and libraries choose algorithms and allocate workspaces
MOST_FAILURES = 3  # recordings that fail in a row, before no more are tried

_Streams = tuple[torch.cuda.Stream, torch.cuda.Stream]  # for recording, and beside it


class SideStream:
    """A second stream of a recording, as a context manager that joins it to the current stream.

    The inputs of `start` must stay alive until then. It joins after an error too, because a capture cannot end before.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream, self._started = stream, False
        self.result: Any = None

    def __enter__(self) -> SideStream:
        return self

    def start(self, function: Callable[..., Any], *inputs: Tensor) -> None:
        """Run the function on the side stream, after what the current stream has been given so far."""
        self._stream.wait_stream(torch.cuda.current_stream())
        self._started = True
        with torch.cuda.stream(self._stream):
            self.result = function(*inputs)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._started:
            torch.cuda.current_stream().wait_stream(self._stream)


class CudaGraphs:
    """The CUDA graphs of a few functions of one model.

    Calls may come from any thread and stream. Those of one instance run one at a time, because its graphs share memory.
    Recordings run one at a time in the process, because nothing may synchronize meanwhile. Results are copies.

    Graphs share a memory pool: together they hold the memory of the largest, and their inputs and outputs. They share
    cuBLAS workspaces too, because PyTorch keeps one per stream and frees it with the first graph of that stream
    (pytorch/pytorch#193402). So all graphs are dropped together: if there are more than `capacity`, or after an error.

    Args:
        capacity: Largest number of graphs.
    """

    _recording = threading.Lock()

    def __init__(self, capacity: int = 32) -> None:
        self.capacity = capacity
        self._lock = threading.Lock()
        self._failures = 0  # in a row
        self._generations: list[_Generation] = []  # at most one; a list, which the finalizer can hold
        weakref.finalize(self, _retire_all, self._generations).atexit = False

    def __len__(self) -> int:
        return sum(len(generation.graphs) for generation in self._generations)

    def clear(self) -> None:
        """Forget every graph, and failed recordings."""
        with self._lock:
            self._failures = 0
            _retire_all(self._generations)

    def __call__(
        self, key: Hashable, device: torch.device, function: Function, inputs: Sequence[Tensor], kept: int = 0
    ) -> tuple[Tensor, ...] | None:
        """Return `function(side_stream, *inputs)`, or None if it could not be recorded. None comes with a warning.

        Args:
            key: Identifies the function and everything it depends on besides the inputs.
            device: Device of the model and of the inputs.
            function: Maps a stream, for `SideStream`, and tensors to tensors, without synchronization or data-dependent
                shapes.
            inputs: Tensors. Their shapes and dtypes select the graph.
            kept: Number of first inputs that often stay the same. They are copied only if they changed.
        """
        key = (key, *((tuple(t.shape), t.dtype) for t in inputs))
        with self._lock:
            if self._generations and self._generations[0].device != device:
                _retire_all(self._generations)
            graph = self._generations[0].graphs.get(key) if self._generations else None
            try:
                graph = graph or self._recorded(key, device, function, inputs, kept)
                return None if graph is None else graph(inputs)
            except BaseException:  # whatever failed may have left memory and streams in any state
                _retire_all(self._generations, reusable=False)
                raise

    def _recorded(
        self, key: Hashable, device: torch.device, function: Function, inputs: Sequence[Tensor], kept: int
    ) -> _Graph | None:
        if self._failures >= MOST_FAILURES:
            return None
        if len(self) >= self.capacity:
            _retire_all(self._generations)
        try:
            if not self._generations:
                self._generations.append(_Generation(device))
            # callers in any mode may copy into the graph's inputs
            with self._recording, torch.inference_mode(False), torch.no_grad():
                graph = self._generations[0].graphs[key] = _Graph(function, Inputs(inputs, kept), self._generations[0])
        except Exception as error:  # of any kind: the caller runs the same work, and meets the function's own errors
            _retire_all(self._generations, reusable=False)
            self._failures += 1
            until = ", until `model.to(model.device)` is called" if self._failures == MOST_FAILURES else ""
            warnings.warn(
                f"a CUDA graph was not recorded ({shorten(f'{type(error).__name__}: {error}', 300)}); "
                f"kernels are launched one by one, which is slower{until}",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        self._failures = 0
        return graph

    def __reduce__(self) -> tuple[type[CudaGraphs], tuple[int]]:  # copies and pickles hold no graphs
        return CudaGraphs, (self.capacity,)


class _Generation:
    """Graphs that are dropped together, with their pool and streams. Streams belong to one generation at a time.

    PyTorch reuses a pool's blocks only on the stream they came from.
    """

    _spare: dict[torch.device, list[_Streams]] = {}

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.graphs: dict[Hashable, _Graph] = {}
        self.last_use: torch.cuda.Event | None = None  # of any graph, because they share memory
        self.pool = torch.cuda.graph_pool_handle()
        self._spare_here = self._spare.setdefault(device, [])
        self.streams = self._spare_here.pop() if self._spare_here else (create_stream(device), create_stream(device))

    def retire(self, reusable: bool) -> None:
        """Drop the graphs, and keep the streams for reuse unless they may be capturing. Does not synchronize."""
        self.graphs.clear()
        if reusable:
            if self.last_use is not None:  # PyTorch reuses workspaces on their stream at once
                for stream in self.streams:
                    stream.wait_event(self.last_use)
            self._spare_here.append(self.streams)


def _retire_all(generations: list[_Generation], reusable: bool = True) -> None:
    while generations:
        generations.pop().retire(reusable)


class Inputs:
    """Copies of a function's inputs, on the device of the first one. The first `kept` are renewed only if they changed.

    A tensor is recognized by its storage, its place in it and PyTorch's count of its changes. Inference tensors have no
    such count, so they are always copied. After an error the copies are dropped with their graph.
    """

    def __init__(self, inputs: Sequence[Tensor], kept: int) -> None:
        self.tensors = [torch.empty_like(t, device=inputs[0].device).copy_(t) for t in inputs]
        self._seen = [_identity(t) for t in inputs[:kept]]

    def renew(self, inputs: Sequence[Tensor]) -> int:
        """Copy inputs, and return the number of copies."""
        copies = 0
        for place, (mine, given) in enumerate(zip(self.tensors, inputs, strict=True)):
            if place < len(self._seen):
                identity, last = _identity(given), self._seen[place]
                if identity and last and last[0]() is given.untyped_storage() and identity[1:] == last[1:]:
                    continue
                self._seen[place] = identity
            mine.copy_(given, non_blocking=True)
            copies += 1
        return copies


def _identity(t: Tensor) -> tuple[weakref.ref[Any], int, int, tuple[int, ...]] | None:
    """Return storage, place and number of changes of a tensor; None if PyTorch does not count them."""
    if t.is_inference():
        return None
    return weakref.ref(t.untyped_storage()), t.data_ptr(), t._version, t.stride()


class _Graph:
    """One recorded graph, with the tensors it reads and writes."""

    def __init__(self, function: Function, inputs: Inputs, generation: _Generation) -> None:
        self.generation, self.inputs = generation, inputs
        stream, side = generation.streams
        with torch.cuda.device(generation.device):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUPS):
                    function(side, *inputs.tensors)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            current = torch.cuda.current_stream()
            try:
                with torch.cuda.graph(
                    self.graph, pool=generation.pool, stream=stream, capture_error_mode="thread_local"
                ):
                    self.outputs = function(side, *inputs.tensors)
            except BaseException:
                torch.cuda.set_stream(current)  # `torch.cuda.graph` leaves its own if the capture cannot end
                _leave_pool(generation)
                raise

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with torch.cuda.device(self.generation.device):
            stream = torch.cuda.current_stream()
            if self.generation.last_use is not None:
                stream.wait_event(self.generation.last_use)
            self.inputs.renew(inputs)
            for tensor in self.inputs.tensors:
                tensor.record_stream(stream)  # the graph may be dropped before the replay has read it
            self.graph.replay()
            with torch.inference_mode(False), torch.no_grad():  # so that PyTorch counts changes, see Inputs
                results = tuple(t.clone() for t in self.outputs)
            self.generation.last_use = stream.record_event()
        return results


def _leave_pool(generation: _Generation) -> None:
    """Let PyTorch's allocator leave the pool of a capture that was invalidated, as `torch.cuda.use_mem_pool` does.

    `CUDAGraph.capture_end` raises before it does so, and no public function does. The allocator would then never free
    blocks that several streams have used.
    """
    with contextlib.suppress(AttributeError, RuntimeError):  # another PyTorch; it has left the pool already
        torch._C._cuda_endAllocateToPool(generation.device.index, generation.pool)
        torch._C._cuda_releasePool(generation.device.index, generation.pool)
