"""CUDA graphs: capture a function once per input shape, then replay it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import cache

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]
WARMUPS = 2  # before recording, kernels compile and libraries choose algorithms and allocate workspaces


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    """Return one stream per device, because PyTorch reuses memory only on the stream it was allocated on."""
    return torch.cuda.Stream(device)


class SideStream:
    """A side stream that runs a function; `results` waits for it, and the inputs must stay alive until then.

    Only for functions that `CudaGraphs` calls, because those run one at a time.
    """

    def __init__(self, function: Function, device: torch.device) -> None:
        self._function, self._stream = function, _second_stream(device)
        self._results: tuple[Tensor, ...] = ()

    def start(self, *inputs: Tensor) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._results = self._function(*inputs)

    def results(self) -> tuple[Tensor, ...]:
        torch.cuda.current_stream().wait_stream(self._stream)
        return self._results


class CudaGraphs:
    """LRU cache of the CUDA graphs of a few functions.

    Graphs share one memory pool: together they hold the memory of the largest, and their inputs and outputs. Calls may
    come from any thread and stream. They run one at a time, also across instances, because graphs share memory and
    nothing may synchronize during a recording. Results are copies.

    Args:
        capacity: Number of graphs kept.
    """

    _lock = threading.Lock()

    def __init__(self, capacity: int = 16) -> None:
        self.capacity = capacity
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._shared: _Shared | None = None

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Forget every graph."""
        with self._lock:
            self._graphs.clear()
            self._shared = None

    def __call__(self, key: Hashable, function: Function, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return `function(*inputs)`.

        Args:
            key: Identifies the function and everything it depends on besides the inputs.
            function: Maps tensors on one CUDA device to tensors, without synchronization or data-dependent shapes.
            inputs: Tensors. Their shapes and dtypes select the graph.
        """
        key = (key, *((tuple(t.shape), t.dtype, t.device) for t in inputs))
        with self._lock:
            graph = self._graphs.get(key)
            if graph is None:
                if self._shared is None:
                    self._shared = _Shared(inputs[0].device)
                with torch.inference_mode(False), torch.no_grad():  # callers in any mode may copy into its inputs
                    graph = self._graphs[key] = _Graph(function, inputs, self._shared)
                while len(self._graphs) > self.capacity:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
            return graph(inputs)

    def __reduce__(self) -> tuple[type[CudaGraphs], tuple[int]]:  # copies and pickles hold no graphs
        return CudaGraphs, (self.capacity,)


class _Shared:
    """Memory pool and stream of all graphs. PyTorch reuses a pool's blocks only on the stream they came from."""

    def __init__(self, device: torch.device) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)


class _Graph:
    """One recorded graph, with the tensors it reads and writes."""

    last_use: torch.cuda.Event | None = None  # of any graph, because they share memory

    def __init__(self, function: Function, inputs: Sequence[Tensor], shared: _Shared) -> None:
        self.device = inputs[0].device
        with torch.cuda.device(self.device):
            self.inputs = [torch.empty_like(t).copy_(t) for t in inputs]
            stream = shared.stream
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUPS):
                    function(*self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=shared.pool, stream=stream, capture_error_mode="thread_local"):
                self.outputs = function(*self.inputs)

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if _Graph.last_use is not None:
                stream.wait_event(_Graph.last_use)
            for mine, given in zip(self.inputs, inputs, strict=True):
                mine.copy_(given, non_blocking=True)
                mine.record_stream(stream)  # the graph may be dropped before the replay has read it
            self.graph.replay()
            results = tuple(t.clone() for t in self.outputs)
            _Graph.last_use = stream.record_event()
        return results
