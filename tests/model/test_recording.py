"""Recording and replaying of CUDA graphs, with stand-ins for PyTorch's streams, events and graphs: no GPU is needed."""

import contextlib
import ctypes
import gc
import threading
from types import SimpleNamespace

import pytest
import torch

from fastsam_rwkv.modeling import cuda_graphs
from fastsam_rwkv.modeling.cuda_graphs import MOST_FAILURES, CudaGraphs, SideStream
from fastsam_rwkv.triton_kernels import cuda_driver

DEVICE = torch.device("cpu")
CALLERS = "the caller's stream"


class Stream:
    """A stream that lists the streams and events it waits for."""

    def __init__(self, name):
        self.name, self.waits = name, []

    def wait_stream(self, other):
        self.waits.append(other)

    def wait_event(self, event):
        self.waits.append(event)

    def record_event(self):
        return f"event of {self.name}"


class Graph:
    """A recording of a function's calls under `capture`; `replay` runs them again."""

    recorded = None

    def replay(self):
        self.recorded()


@pytest.fixture
def cuda(monkeypatch):
    """Stand-ins for what `cuda_graphs` uses of `torch.cuda`. `broken` makes the end of a capture fail."""
    state = SimpleNamespace(stream=Stream(CALLERS), streams=[], ended=[], broken=False, capturing=0, most_capturing=0)

    def create_stream(device):
        state.streams.append(Stream(f"stream {len(state.streams)}"))
        return state.streams[-1]

    @contextlib.contextmanager
    def on_stream(stream):
        before, state.stream = state.stream, stream
        try:
            yield
        finally:
            state.stream = before

    @contextlib.contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        before, state.stream = state.stream, stream
        state.capturing += 1
        state.most_capturing = max(state.most_capturing, state.capturing)
        try:
            yield
        finally:
            state.capturing -= 1
            if state.broken:  # as `torch.cuda.graph` does: it leaves its stream the current one
                raise RuntimeError("operation failed due to a previous error during capture")
            state.stream = before

    pools = iter(range(1, 100))
    monkeypatch.setattr(cuda_graphs, "create_stream", create_stream)
    monkeypatch.setattr(cuda_graphs._Generation, "_spare", {})
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, next(pools)))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: state.stream)
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(state, "stream", stream))
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        note = lambda device, pool, name=name: state.ended.append((name, pool))  # noqa: E731  (bound to its name)
        monkeypatch.setattr(torch._C, name, note, raising=False)
    return state


def double(graphs, size, key="double", device=DEVICE):
    """Return twice `size` ones through a graph. Its replay computes them again."""

    def function(side, x):
        y = 2 * x
        Graph.recorded = staticmethod(lambda: y.copy_(2 * x))
        return (y,)

    return graphs(key, device, function, (torch.ones(size),))


def test_results_and_number_of_graphs(cuda):
    graphs = CudaGraphs()
    for size in (1, 2, 1):
        assert torch.equal(double(graphs, size)[0], torch.full((size,), 2.0))
    assert len(graphs) == 2 and cuda.stream.name == CALLERS


def test_all_graphs_go_together_if_there_are_too_many(cuda):
    graphs, kept = CudaGraphs(capacity=2), []
    for size in (1, 2, 1, 3, 1):
        double(graphs, size)
        kept.append(len(graphs))
    assert kept == [1, 2, 2, 1, 2]
    assert len(cuda.streams) == 2  # the next graphs take over the streams, and wait for replays that may still run
    assert all(f"event of {CALLERS}" in stream.waits for stream in cuda.streams)


def test_streams_belong_to_one_instance(cuda):
    first, second = CudaGraphs(), CudaGraphs()
    double(first, 1)
    double(second, 1)
    assert len(cuda.streams) == 4
    third = CudaGraphs()
    del first
    gc.collect()
    double(third, 1)  # takes over the streams of the one that is gone
    assert len(cuda.streams) == 4 and len(third) == len(second) == 1


def test_every_replay_waits_for_the_one_before(cuda):
    graphs = CudaGraphs()
    double(graphs, 1)
    double(graphs, 2)
    assert f"event of {CALLERS}" in cuda.stream.waits


def test_a_new_device_drops_the_graphs(cuda):
    graphs = CudaGraphs()
    double(graphs, 1)
    double(graphs, 2, device=torch.device("cuda:1"))
    assert len(graphs) == 1 and graphs._generations[0].device == torch.device("cuda:1")


def fail(error, when):
    """Return a function that raises at call number `when`: two calls warm up, the third is recorded."""
    calls = []

    def function(side, x):
        calls.append(x)
        if len(calls) == when:
            raise error
        return (x,)

    return function


@pytest.mark.parametrize("when", [1, 3])
def test_a_failed_recording_is_tried_again(when, cuda):
    graphs = CudaGraphs()
    double(graphs, 1)
    with pytest.warns(RuntimeWarning, match=r"not recorded \(ValueError: a wrong shape\); .* slower$"):
        assert graphs("fails", DEVICE, fail(ValueError("a wrong shape"), when), (torch.ones(1),)) is None
    assert len(graphs) == 0 and cuda.stream.name == CALLERS
    assert double(graphs, 1)[0] == 2 and len(cuda.streams) == 4  # streams that may be capturing are not used again


def test_recordings_that_always_fail_end(cuda):
    graphs, function = CudaGraphs(), fail(ValueError("always"), 1)
    for n in range(MOST_FAILURES):
        with pytest.warns(RuntimeWarning, match="until `model.to" if n == MOST_FAILURES - 1 else "slower$"):
            assert graphs("fails", DEVICE, fail(ValueError("always"), 1), (torch.ones(1),)) is None
    assert graphs("fails", DEVICE, function, (torch.ones(1),)) is None  # without a warning, which pytest would raise
    graphs.clear()
    assert double(graphs, 1)[0] == 2


def test_an_invalid_capture_gives_stream_and_pool_back(cuda):
    graphs, cuda.broken = CudaGraphs(), True
    with pytest.warns(RuntimeWarning, match="previous error during capture"):
        assert double(graphs, 1) is None
    assert cuda.stream.name == CALLERS
    assert cuda.ended == [("_cuda_endAllocateToPool", (0, 1)), ("_cuda_releasePool", (0, 1))]
    cuda.broken = False
    assert double(graphs, 1)[0] == 2


@pytest.mark.parametrize("when", [2, 3])
def test_an_interrupted_recording(when, cuda):
    graphs = CudaGraphs()
    double(graphs, 1)
    with pytest.raises(KeyboardInterrupt):
        graphs("stops", DEVICE, fail(KeyboardInterrupt(), when), (torch.ones(1),))
    assert len(graphs) == 0 and cuda.stream.name == CALLERS
    assert double(graphs, 1)[0] == 2  # no lock is held


def test_a_failed_replay_drops_the_graphs(cuda):
    graphs = CudaGraphs()
    double(graphs, 1)

    def out_of_memory():
        raise MemoryError

    next(iter(graphs._generations[0].graphs.values())).graph.replay = out_of_memory
    with pytest.raises(MemoryError):
        double(graphs, 1)
    assert len(graphs) == 0 and double(graphs, 1)[0] == 2


def test_the_side_stream_joins_after_an_error(cuda):
    side = Stream("side")
    with SideStream(side) as unused:
        pass
    assert unused.result is None and cuda.stream.waits == []  # waiting for a stream outside the capture is an error
    with pytest.raises(KeyboardInterrupt), SideStream(side) as used:
        used.start(lambda x: (x,), 1)
        raise KeyboardInterrupt
    assert used.result == (1,) and side.waits == [cuda.stream] and cuda.stream.waits == [side]


def test_instances_replay_at_the_same_time(cuda):
    """Models on several GPUs do not wait for each other."""
    busy, other = CudaGraphs(), CudaGraphs()
    double(busy, 1)
    double(other, 1)
    entered, leave = threading.Event(), threading.Event()

    def slow_replay():
        entered.set()
        assert leave.wait(20)

    next(iter(busy._generations[0].graphs.values())).graph.replay = slow_replay
    thread = threading.Thread(target=double, args=(busy, 1))
    thread.start()
    assert entered.wait(20)
    done = threading.Thread(target=double, args=(other, 1))
    done.start()
    done.join(10)
    assert not done.is_alive()
    leave.set()
    thread.join(20)


def test_recordings_run_one_at_a_time(cuda):
    """`torch.cuda.graph` synchronizes, which must not happen during another capture."""
    holding, waiting = CudaGraphs(), CudaGraphs()
    entered, leave = threading.Event(), threading.Event()

    def slow(side, x):
        entered.set()
        assert leave.wait(20)
        return (x,)

    first = threading.Thread(target=holding, args=("slow", DEVICE, slow, (torch.ones(1),)))
    first.start()
    assert entered.wait(20)
    second = threading.Thread(target=double, args=(waiting, 1))
    second.start()
    second.join(0.2)
    assert second.is_alive() and len(waiting) == 0
    leave.set()
    first.join(20)
    second.join(20)
    assert len(waiting) == 1 and cuda.most_capturing == 1


class Driver:
    """The functions of libcuda that are called."""

    def __init__(self, error=0):
        self.error, self.flags = error, []

    def cuStreamCreate(self, handle, flags):
        self.flags.append(flags.value)
        handle._obj.value = None if self.error else 4711
        return self.error

    def cuDriverGetVersion(self, version):
        version._obj.value = 12040
        return self.error


def test_own_streams_come_from_the_driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(cuda_driver, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(query=lambda: True))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: (handle, device))
    assert cuda_driver.create_stream(DEVICE) == (4711, DEVICE) and driver.flags == [1]
    assert cuda_driver.driver_version() == 12040
    driver.error = 2
    with pytest.raises(RuntimeError, match="created no stream on cpu: error 2"):
        cuda_driver.create_stream(DEVICE)
    assert cuda_driver.driver_version() == 0


def test_no_driver(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    cuda_driver._driver.cache_clear()
    try:
        assert cuda_driver.driver_version() == 0
    finally:
        cuda_driver._driver.cache_clear()
