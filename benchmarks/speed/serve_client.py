"""A client of `fastsam-rwkv serve` in the standard library, and the server as a process; for measurements and tests."""

from __future__ import annotations

import collections
import http.client
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PATIENCE = 120.0  # seconds


class Client:
    """A connection to the server, which is kept open."""

    def __init__(self, port: int, token: str | None = None) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    def ask(
        self,
        path: str,
        body: bytes | None = None,
        kind: str = "application/json",
        method: str | None = None,
        **headers: str,
    ) -> tuple[int, bytes]:
        """Return the status and the body of an answer."""
        named = {**self._headers, **({"Content-Type": kind} if body is not None else {}), **headers}
        try:
            self._connection.request(method or ("GET" if body is None else "POST"), path, body, named)
            response = self._connection.getresponse()
            return response.status, response.read()
        except BaseException:
            self._connection.close()  # opened again by the next request
            raise

    def json(self, path: str, value: Any = None) -> Any:
        """Return the answer to a value, or to none, and raise RuntimeError unless it is 200."""
        return json.loads(_good(path, *self.ask(path, None if value is None else json.dumps(value).encode())))

    def form(self, path: str, image: bytes, **fields: Any) -> bytes:
        """Return the answer to an image with fields, and raise RuntimeError unless it is 200."""
        return _good(path, *self.ask(path, *form(image, **fields)))

    def embed(self, image: bytes) -> dict[str, Any]:
        """Return the answer of `/v1/embeddings`."""
        answer: dict[str, Any] = json.loads(self.form("/v1/embeddings", image))
        return answer


def form(photo: bytes | None, **fields: Any) -> tuple[bytes, str]:
    """Return the body and the content type of a form."""
    boundary = "fastsam-rwkv-form"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="%s"'
    parts = [f"{head % name}\r\n\r\n{value}\r\n".encode() for name, value in fields.items()]
    if photo is not None:
        parts.append(f'{head % "image"}; filename="a"\r\n\r\n'.encode() + photo + b"\r\n")
    return b"".join(parts) + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def _good(path: str, status: int, body: bytes) -> bytes:
    if status != 200:
        raise RuntimeError(f"{path} answers {status}: {body[:300]!r}")
    return body


@contextmanager
def serving(*options: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """Run `fastsam-rwkv serve` on a free port, and yield the port and the process."""
    command = [sys.executable, "-m", "fastsam_rwkv", "serve", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"running on http://[^:]+:(\d+)", line):
                break
        else:
            raise RuntimeError(f"the server ended: {''.join(lines)}")
        threading.Thread(target=collections.deque, args=(process.stderr, 0), daemon=True).start()  # empties the pipe
        port = int(found[1])
        for _ in range(600):
            with suppress(OSError):
                Client(port).json("/healthz")
                break
            time.sleep(0.05)
        yield port, process
    finally:
        process.kill()
        process.wait()


def memory_of(process: subprocess.Popen[str]) -> int:
    """Return the resident bytes of a process; 0 where there is no /proc."""
    with suppress(OSError):
        return 1024 * int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[0])
    return 0
