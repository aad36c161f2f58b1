"""Stand-in for TensorRT, polygraphy's builder and the GPU: engines run their graph in ONNX Runtime.

It tests the package's calls of these interfaces, not TensorRT itself.
"""

import ctypes
import pickle
import sys
import types

import numpy as np
import onnxruntime
import torch

MAGIC = b"stand-in engine"
DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}


class Context:
    def __init__(self, engine):
        self.engine, self.shapes, self.addresses = engine, {}, {}

    def set_input_shape(self, name, shape):
        assert all(isinstance(n, int) for n in shape)
        smallest, _, largest = self.engine.profile.get(name, (shape, shape, shape))
        self.shapes[name] = shape
        return all(a <= n <= b for a, n, b in zip(smallest, shape, largest, strict=True))

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def get_tensor_shape(self, name):
        sizes = {}
        for value in self.engine.session.get_inputs():
            sizes |= {k: n for k, n in zip(value.shape, self.shapes[value.name], strict=True) if isinstance(k, str)}
        (value,) = (v for v in self.engine.session.get_outputs() if v.name == name)
        return [sizes.get(n, n) for n in value.shape]

    def _array(self, value, shape):
        dtype = np.dtype(DTYPES[value.type])
        size = int(np.prod(shape)) * dtype.itemsize
        memory = (ctypes.c_char * size).from_address(self.addresses[value.name])
        return np.frombuffer(memory, dtype).reshape(shape)

    def execute_async_v3(self, stream):
        assert stream == 7
        session = self.engine.session
        feeds = {value.name: self._array(value, self.shapes[value.name]) for value in session.get_inputs()}
        for value, result in zip(session.get_outputs(), session.run(None, feeds), strict=True):
            self._array(value, result.shape)[...] = result + self.engine.error
        return True


class Engine:
    def __init__(self, graph, profile, error):
        self.session, self.profile, self.error = onnxruntime.InferenceSession(graph), profile, error
        self.values = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.num_io_tensors = len(self.values)

    def get_tensor_name(self, i):
        return self.values[i].name

    def get_tensor_mode(self, name):
        return "output" if name in {v.name for v in self.session.get_outputs()} else "input"

    def get_tensor_dtype(self, name):
        (value,) = (v for v in self.values if v.name == name)
        return DTYPES[value.type]

    def create_execution_context(self):
        return Context(self)


class Stream:
    cuda_stream = 7

    def wait_stream(self, other):
        assert isinstance(other, Stream)


def install(monkeypatch, version="10.8.0.43", gpu="Stand-in GPU", error=0.0):
    """Install the stand-in as the modules `tensorrt` and `polygraphy.backend.trt`.

    Args:
        error: Number added to every output of an engine.

    Returns:
        Arguments of polygraphy's builder, one dict a build.
    """
    trt = types.ModuleType("tensorrt")
    trt.__version__, trt.float32, trt.float16 = version, "float32", "float16"
    trt.TensorIOMode = types.SimpleNamespace(INPUT="input", OUTPUT="output")
    trt.Logger = type("Logger", (), {"WARNING": 2, "__init__": lambda self, severity: None})

    class Runtime:
        def __init__(self, logger):
            assert isinstance(logger, trt.Logger)

        def deserialize_cuda_engine(self, plan):
            return Engine(*pickle.loads(plan[len(MAGIC) :])) if plan.startswith(MAGIC) else None

    trt.Runtime = Runtime
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    builds = []

    class Profile(dict):
        def add(self, name, min, opt, max):
            self[name] = (min, opt, max)

    def network_from_onnx_path(path, strongly_typed):
        assert strongly_typed
        return path

    def engine_bytes_from_network(network, config, save_timing_cache):
        builds.append({"graph": network, **config, "save_timing_cache": save_timing_cache})
        if save_timing_cache:
            with open(save_timing_cache, "ab") as cache:
                cache.write(b"tactics")
        with open(network, "rb") as graph:
            return MAGIC + pickle.dumps(
                (graph.read(), dict(config["profiles"][0]) if config["profiles"] else {}, error)
            )

    import polygraphy.backend.trt as backend

    for name, value in {
        "Profile": Profile,
        "CreateConfig": dict,
        "network_from_onnx_path": network_from_onnx_path,
        "engine_bytes_from_network": engine_bytes_from_network,
    }.items():
        monkeypatch.setattr(backend, name, value, raising=False)

    empty = torch.empty

    def empty_on_cpu(*args, **options):
        return empty(*args, **options | ({"device": "cpu"} if options.get("device") == "cuda" else {}))

    monkeypatch.setattr(torch, "empty", empty_on_cpu)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    for name, value in {
        "is_available": lambda: True,
        "get_device_name": lambda: gpu,
        "get_device_capability": lambda: (9, 0),
        "Stream": Stream,
        "current_stream": Stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return builds
