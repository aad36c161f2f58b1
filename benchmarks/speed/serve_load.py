"""Load on the server, and clients that misbehave: `python -m benchmarks.speed.serve_load [--out FILE.json]`.

Starts `fastsam-rwkv serve` on loopback. Measures the time of clicks of one client and of many, and the server's memory.
Then come slow and broken clients, malformed requests, an image with too many pixels, and a restart after SIGKILL.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import re
import signal
import socket
import statistics
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.speed.serve_client import Client, form, memory_of, serving
from benchmarks.speed.timing import machine

ROUNDS = 4  # of the clicks of many clients
IMAGES = sorted((Path(__file__).parents[2] / "examples").glob("c*.jpg"))  # photographs of the examples


def embeddings(port: int, count: int) -> list[dict[str, Any]]:
    """Return the answers to `count` uploads."""
    client = Client(port)
    return [client.embed(IMAGES[number % len(IMAGES)].read_bytes()) for number in range(count)]


def clicks(port: int, clients: int, count: int, embedded: Sequence[dict[str, Any]] | None = None) -> list[float]:
    """Return the seconds of `count` clicks of each of `clients`, of which two share an embedding."""
    seconds: list[float] = []
    failures: list[BaseException] = []
    embedded = embedded or embeddings(port, -(-clients // 2))

    def work(number: int) -> None:
        try:
            rng, client, image = random.Random(number), Client(port), embedded[number // 2]
            for _ in range(count):
                x, y = rng.uniform(0, image["width"]), rng.uniform(0, image["height"])
                start = time.perf_counter()
                client.json(f"/v1/embeddings/{image['id']}/masks", {"point_coords": [[x, y]]})
                seconds.append(time.perf_counter() - start)
        except BaseException as error:  # of any type: raised below, in the caller's thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return seconds


@contextmanager
def misbehaving(port: int, count: int) -> Iterator[list[str]]:
    """Keep clients busy who send half a body, or a byte a second, or leave before the answer. Yield what they got."""
    image = IMAGES[0].read_bytes()
    body, kind = form(image)
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    over, answers = threading.Event(), []

    def half() -> None:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head.encode() + body[: len(body) // 2])
            over.wait()

    def drip() -> None:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head.encode())
            connection.settimeout(1)
            for byte in body:
                with suppress(OSError):
                    connection.sendall(bytes([byte]))
                with suppress(OSError):
                    if answer := connection.recv(64):
                        answers.append(answer.decode(errors="replace").split("\r\n")[0])
                        return
                if over.is_set():
                    return

    def leave() -> None:
        while not over.wait(1):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(head.encode() + body)

    threads = [threading.Thread(target=[half, drip, leave][i % 3], daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        over.set()
        for thread in threads:
            thread.join()


def malformed(port: int, count: int, seed: int = 0) -> collections.Counter[int]:
    """Return the number of each status among the answers to `count` requests that are wrong."""
    rng, client, image = random.Random(seed), Client(port), IMAGES[0].read_bytes()
    id = client.embed(image)["id"]
    numbers: Sequence[Any] = (
        -1, 0, 1e308, 10**400, -5e9, None, "a", True, [], {}, [[]], [[1]], [[1, 2, 3]], [["x", 1]], [[[1, 2]], []],
        [[1e9, 1e9]], [[0.2, 0.3]], "\ud800", [[[[1]]]], [1, 2, 3], [5, 5, 1, 1], float("nan"), [[float("inf"), 1]],
    )  # fmt: skip
    keys = ("point_coords", "point_labels", "box", "mask_input", "multimask_output", "format", "other", "\udfff")

    def prompts() -> bytes:
        value: Any = {rng.choice(keys): rng.choice(numbers) for _ in range(rng.randint(0, 3))}
        if rng.random() < 0.2:
            shape = rng.choice(([1, 4, 4], [0], [1, -1, 4], [10**9] * 3))
            value["mask_input"] = {"shape": shape, "data": rng.choice(("", "!", "AAAA"))}
        text = json.dumps(value).encode()
        return rng.choice((text, text[: rng.randint(0, len(text))], b"[" * 100_000, b"\xff\xfe", b"", b"null", b"3"))

    def damaged() -> bytes:
        cut, png = image[: rng.randint(0, len(image) // 2)], b"\x89PNG\r\n\x1a\n" + rng.randbytes(90)
        return rng.choice((cut, rng.randbytes(500), b"", b"GIF89a" + rng.randbytes(40), png))

    sides, others = (0, -1, 65, 10**30, "x", "1.5"), ("points", "crop_n_layers", "pred_iou_thresh")
    paths = ("/v1/embeddings", "/v1/everything", "/v1/../etc/passwd", "/%00", "/v1//masks")
    box = '{"box": [1, 2, 30, 40]}'
    requests: Sequence[Callable[[], tuple[int, bytes]]] = (
        lambda: client.ask(f"/v1/embeddings/{id}/masks", prompts()),
        lambda: client.ask(f"/v1/embeddings/{rng.randbytes(6).hex()}/masks", box.encode()),
        lambda: client.ask("/v1/embeddings", *form(damaged())),
        lambda: client.ask("/v1/embeddings", prompts()),
        lambda: client.ask("/v1/embeddings", rng.randbytes(300), "multipart/form-data; boundary=x"),
        lambda: client.ask("/v1/embeddings", b"--x", "multipart/form-data"),
        lambda: client.ask("/v1/masks", *form(image, prompts=prompts().decode(errors="replace"))),
        lambda: client.ask("/v1/masks", *form(damaged(), prompts=box)),
        lambda: client.ask("/v1/masks", *form(None, image="a text", prompts="{}")),
        lambda: client.ask("/v1/everything", *form(image, points_per_side=rng.choice(sides))),
        lambda: client.ask("/v1/everything", *form(image, **{rng.choice(others): "x"})),
        lambda: client.ask(rng.choice(("/v1/model", "/healthz", "/metrics")), b"{}"),
        lambda: client.ask(rng.choice(paths)),
        lambda: client.ask("/v1/masks", b"{}", "text/plain", method=rng.choice(("PUT", "DELETE", "PATCH"))),
        lambda: client.ask("/v1/embeddings", b"a", "multipart/form-data", **{"Content-Length": str(10**12)}),
    )
    return collections.Counter(rng.choice(requests)()[0] for _ in range(count))


def bomb(side: int = 30_000) -> bytes:
    """Return a PNG of a few kilobytes that would take `side`^2 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    lines = zlib.compress(bytes((side // 8 + 1) * side), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def batch_sizes(port: int) -> dict[str, int]:
    """Return how many batches had at most so many prompts."""
    text = Client(port).ask("/metrics")[1].decode()
    return {
        most: int(float(n)) for most, n in re.findall(r'batch_size_bucket\{le="([\d.]+)",work="decode"\} (\S+)', text)
    }


def _milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=20)
    return {"p50_ms": round(1e3 * cuts[9], 1), "p95_ms": round(1e3 * cuts[18], 1), "count": len(seconds)}


def measure(clients: int, count: int) -> dict[str, Any]:
    """Return all figures."""
    rows: dict[str, Any] = {}
    with serving() as (port, process):
        clicks(port, 1, 20)  # warms up
        rows["one client"] = _milliseconds(clicks(port, 1, count))
        embedded, rounds = embeddings(port, clients // 2), []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            row = _milliseconds(clicks(port, clients, count // ROUNDS, embedded))
            taken = time.perf_counter() - start
            rounds.append({**row, "clicks_per_second": row["count"] / taken, "memory_mb": memory_of(process) / 2**20})
        rows[f"{clients} clients, in {ROUNDS} rounds"] = rounds
        rows["prompts in a batch"] = batch_sizes(port)
        rows["one client again"] = _milliseconds(clicks(port, 1, count))
        with misbehaving(port, 30):
            rows["one client beside 30 that misbehave"] = _milliseconds(clicks(port, 1, count))
        rows["malformed"] = dict(sorted(malformed(port, 300).items()))
        image = bomb()
        start = time.perf_counter()
        status, _ = Client(port).ask("/v1/embeddings", *form(image))
        rows["bomb"] = {"bytes": len(image), "status": status, "ms": round(1e3 * (time.perf_counter() - start), 1)}
        process.send_signal(signal.SIGKILL)
        process.wait()
    start = time.perf_counter()
    with serving() as (port, _):
        rows["restart_seconds"] = round(time.perf_counter() - start, 1)
        rows["after restart"] = _milliseconds(clicks(port, 1, 20))
    with serving("--no-batching") as (port, _):
        clicks(port, 1, 20)
        rows[f"{clients} clients, no batching"] = _milliseconds(clicks(port, clients, count))
    return rows


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--clicks", type=int, default=200, help="of each client")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    rows = measure(args.clients, args.clicks)
    command = " ".join(["python -m benchmarks.speed.serve_load", *sys.argv[1:]])
    result = {"machine": machine(), "command": command, "rows": rows}
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + os.linesep)


if __name__ == "__main__":
    main()
