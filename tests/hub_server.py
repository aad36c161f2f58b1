"""A stand-in for the Hub on loopback, for the requests with which huggingface_hub fetches single files.

It answers HEAD and GET of /{repo}/resolve/{revision}/{file} with the Hub's headers: commit, ETag and error codes. It
serves ranges, private and gated repositories, an outage, and a connection that breaks in the middle of a file.
"""

from __future__ import annotations

import hashlib
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


@dataclass
class Repo:
    """Files at each commit, and the commits that branches and tags name."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False

    def commit(self, folder: Path, name: str = "main") -> str:
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        digest = hashlib.sha1()
        for file_name in sorted(files):
            digest.update(file_name.encode() + files[file_name])
        self.commits[digest.hexdigest()] = files
        self.names[name] = digest.hexdigest()
        return digest.hexdigest()


class HubServer:
    """Serves `repos`.

    `break_after` cuts each of the next `breaks` bodies of .safetensors files after so many bytes; `status`, when set,
    is all that any request gets.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.break_after = 0
        self.breaks = 0
        self.status: int | None = None
        self.requests: list[tuple[str, str]] = []
        self._connections: set[socket.socket] = set()
        self.on_request = lambda method, path: None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                hub._connections.add(self.connection)

            def finish(self) -> None:
                hub._connections.discard(self.connection)
                super().finish()

            def do_HEAD(self) -> None:
                hub._answer(self, send_body=False)

            def do_GET(self) -> None:
                hub._answer(self, send_body=True)

            def log_message(self, *_args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._connections):  # those kept alive would still be answered
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, request: BaseHTTPRequestHandler, send_body: bool) -> None:
        path = request.path.partition("?")[0]
        name, found, rest = path.lstrip("/").partition("/resolve/")
        if not found or "/" not in rest:  # not for a file
            return _refuse(request, 404)
        self.requests.append((request.command, unquote(path)))
        self.on_request(request.command, unquote(path))
        if self.status is not None:
            return _refuse(request, self.status)
        revision, file = map(unquote, rest.split("/", 1))  # a slash in a branch's name comes escaped
        repo = self.repos.get(unquote(name))
        token = _bearer(request)
        if repo is not None and repo.token is not None and token not in (None, repo.token):
            return _refuse(request, 401, message="Invalid credentials in Authorization header")
        if repo is None or (repo.token is not None and token is None):
            return _refuse(request, 401, "RepoNotFound")  # as on the Hub: a private repository looks like a missing one
        if repo.gated:
            return _refuse(request, 403, "GatedRepo")
        commit = repo.names.get(revision, revision)
        if commit not in repo.commits:
            return _refuse(request, 404, "RevisionNotFound")
        if file not in repo.commits[commit]:
            return _refuse(request, 404, "EntryNotFound", commit=commit)
        self._send(request, repo.commits[commit][file], commit, send_body, breakable=file.endswith(".safetensors"))

    def _send(
        self, request: BaseHTTPRequestHandler, data: bytes, commit: str, send_body: bool, breakable: bool
    ) -> None:
        start = 0
        if wanted := request.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.send_header("Content-Length", str(len(data) - start))
        request.send_header("Accept-Ranges", "bytes")
        request.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        request.send_header("X-Repo-Commit", commit)
        request.end_headers()
        if not send_body:
            return
        body = data[start:]
        if breakable and self.breaks > 0:
            self.breaks -= 1
            body = body[: max(0, self.break_after - start)]
            request.close_connection = True
        with suppress(ConnectionError):  # a client that gives up half way is not news
            request.wfile.write(body)


def _bearer(request: BaseHTTPRequestHandler) -> str | None:
    header = request.headers.get("Authorization")
    return header.removeprefix("Bearer ") if header else None


def _refuse(
    request: BaseHTTPRequestHandler,
    status: int,
    code: str | None = None,
    message: str | None = None,
    commit: str | None = None,
) -> None:
    request.send_response(status)
    request.send_header("Content-Length", "0")
    for name, value in (("X-Error-Code", code), ("X-Error-Message", message), ("X-Repo-Commit", commit)):
        if value is not None:
            request.send_header(name, value)
    request.end_headers()
