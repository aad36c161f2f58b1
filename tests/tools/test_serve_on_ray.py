"""The server as a Ray Serve application, on a local cluster with two replicas."""

import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from photos import photo, png
from small_model import CONFIG, small_model
from test_serve import masks_of

from benchmarks.speed.serve_client import Client
from fastsam_rwkv import Predictor
from fastsam_rwkv.errors import ArgumentError

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")

from ray import serve  # noqa: E402  # needs what is checked above

from fastsam_rwkv.serve.on_ray import build, model_options  # noqa: E402  # the same


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    small_model(CONFIG).save_pretrained(folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # spelled as Ray reads it; 15 by default
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        arguments = {
            "model": str(folder),
            "num_replicas": "2",
            "dtype": "float32",
            "batching": "false",
            "timeout": "30",
        }
        serve.run(build(arguments))
        yield port
    finally:
        serve.shutdown()
        ray.shutdown()


def replicas():
    """Return the process ids of the replicas."""
    titles = {int(p.parent.name): p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()}
    return {pid for pid, title in titles.items() if title.startswith(b"ray::ServeReplica:default:fastsam-rwkv")}


def answered(port):
    """Return how many prompts each replica answered, as far as a few requests reach."""
    counts = {}
    for _ in range(40):
        text = Client(port).ask("/metrics")[1].decode()
        pid = re.search(r'fastsam_rwkv_info\{.*pid="(\d+)"', text)[1]
        found = re.search(r'requests_total\{path="/v1/embeddings/\{id\}/masks",status="200"\} (\d+)', text)
        counts[pid] = int(found[1]) if found else 0
    return list(counts.values())


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc to find the replicas")
def test_two_replicas_share_embeddings_and_survive_one(port):
    image, box = photo(), {"box": [20, 10, 100, 70], "low_res_logits": True}
    embedded = Client(port).embed(png(image))
    want = Predictor(small_model(CONFIG)).predict_image(image, box=box["box"], zoom="never")
    for _ in range(20):
        answer = Client(port).json(f"/v1/embeddings/{embedded['id']}/masks", box)
        np.testing.assert_array_equal(masks_of(answer), want.masks)
        assert answer["masks"][0]["score"] == want.scores[0]
    counts = answered(port)
    assert len(counts) == 2 and min(counts) > 0 and sum(counts) == 20
    assert Client(port).ask("/v1/embeddings/none/masks", json.dumps(box).encode())[0] == 404
    before = replicas()
    assert len(before) == 2
    os.kill(min(before), signal.SIGKILL)
    deadline = time.monotonic() + 240  # Serve looks after its replicas every ten seconds
    while len(replicas() - before) < 1 or len(replicas()) < 2:
        assert time.monotonic() < deadline, "the replica was not started again"
        time.sleep(0.1)
    for _ in range(100):  # a proxy may still ask the replica that is gone
        status, _ = Client(port).ask("/healthz")
        if status == 200:
            break
        time.sleep(0.1)
    status, answer = Client(port).ask(f"/v1/embeddings/{embedded['id']}/masks", json.dumps(box).encode())
    assert status in (200, 404), answer  # 404 if the embedding was the dead replica's
    embedded = Client(port).embed(png(image))
    for _ in range(4):
        answer = Client(port).json(f"/v1/embeddings/{embedded['id']}/masks", box)
        np.testing.assert_array_equal(masks_of(answer), want.masks)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"replicas": 2}, "unknown arguments: replicas; known are num_replicas"),
        ({"queue": "many"}, "queue must be a number, got 'many'"),
        ({"batching": "no"}, "batching must be true or false"),
        ({"max_pixels": "0"}, "max_pixels must be a positive number"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        build(arguments)


def test_replicas_with_a_gpu_use_it():
    assert model_options({"num_gpus": 1}) == {"device": "cuda", "dtype": "auto"}
    assert model_options({"num_gpus": 1, "device": "cpu", "dtype": "float32"}) == {"device": "cpu", "dtype": "float32"}
    assert model_options({}) == {"device": "cpu", "dtype": "auto"}
