"""Export of a static page that segments photographs in the visitor's browser, and a local server for it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .. import __version__
from ..checkpoint import weights_sha256
from ..files import whole_file
from ..modeling.rwkv_sam import RWKVSAM
from .check import PHOTO
from .manifest import ExportError, Manifest
from .onnx import export_onnx

PAGE = Path(__file__).with_name("web")  # the page's own files
RUNTIME = "1.30.0"  # of onnxruntime-web
CDN = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{RUNTIME}/dist/"
RUNTIME_FILES = (
    "ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm",
)  # fmt: skip
LOCAL = "./ort/"  # where `offline` puts these
EXAMPLE = "example.jpg"
IN_BROWSER = "It is computed in this browser. The photograph never leaves your machine."
ON_SERVER = "The photograph is sent to the server of this page, which computes the mask."
# so that the page may use threads, and loads nothing from elsewhere
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def export_web(
    model: RWKVSAM | str | os.PathLike[str] | None,
    folder: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    precision: str = "fp16",
    offline: bool = False,
) -> Manifest:
    """Write a static site that segments photographs in the browser with onnxruntime-web.

    The folder holds `index.html`, `app.js`, the two graphs, `export.json` and an example photograph. Any web server can
    serve it. Photographs never leave the visitor's machine.

    Args:
        model: Model, or an argument of `RWKVSAM.from_pretrained`.
        folder: Folder to write to; created if missing.
        image_size: Side of the model input in pixels, a multiple of 64. By default the model's.
        precision: "fp16", which halves the download, or "fp32".
        offline: Copy onnxruntime-web into the folder, with npm. Otherwise the page loads it from a CDN.

    Returns:
        The content of `export.json`.

    Raises:
        ExportError: As `export_onnx` raises, or npm is missing or fails.
        CheckpointError, OSError: The model cannot be loaded, or the folder cannot be written.
    """
    folder = Path(os.path.expanduser(folder))
    manifest = export_onnx(model, folder, image_size=image_size, precision=precision, flips=True)
    if offline:
        _copy_runtime(folder / LOCAL)
    _write_page(folder, offline)
    return manifest


def _write_page(folder: Path, offline: bool) -> None:
    """Write everything but the graphs and onnxruntime-web."""
    origin = "" if offline else "{0.scheme}://{0.netloc}".format(urlsplit(CDN))
    page, script = _page_files(origin, LOCAL if offline else CDN, on_server=False)
    for name, text in (("index.html", page), ("app.js", script)):
        with whole_file(folder / name) as stream:
            stream.write(text.encode())
    with whole_file(folder / EXAMPLE) as stream:
        stream.write(PHOTO.read_bytes())


def _page_files(origin: str, runtime: str, on_server: bool) -> tuple[str, str]:
    """Return the text of index.html and app.js."""
    page, script = ((PAGE / name).read_text(encoding="utf-8") for name in ("index.html", "app.js"))
    page = page.replace("{origin}", origin).replace("{where}", ON_SERVER if on_server else IN_BROWSER)
    return page, script.replace("{runtime}", runtime).replace("{server}", "yes" if on_server else "no")


def server_page() -> tuple[str, str]:
    """Return index.html and app.js of a page that asks `fastsam-rwkv serve` instead of running the model itself."""
    return _page_files("", LOCAL, on_server=True)


def _copy_runtime(folder: Path) -> None:
    """Copy the files of onnxruntime-web that the page loads into `folder`."""
    npm = shutil.which("npm")
    if npm is None:
        raise ExportError(
            "npm was not found, which downloads onnxruntime-web for offline use; install Node.js, or export without it",
            "npm was not found, which downloads onnxruntime-web; install Node.js, or omit --offline",
        )
    package = f"onnxruntime-web@{RUNTIME}"
    with tempfile.TemporaryDirectory() as work:
        command = [npm, "pack", "--silent", "--pack-destination", work, package]
        result = subprocess.run(command, capture_output=True, text=True, cwd=work)
        archives = list(Path(work).glob("*.tgz"))
        if result.returncode or not archives:
            reason = " ".join(result.stderr.split())[-300:]
            raise ExportError(f"npm could not download {package}: {reason}; try again, or export without offline files")
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archives[0]) as archive:
            for name in (*(f"dist/{file}" for file in RUNTIME_FILES), "LICENSE"):
                try:
                    content = archive.extractfile(f"package/{name}")
                except KeyError:
                    if name == "LICENSE":  # it is not in every release
                        continue
                    raise ExportError(f"{package} has no {name}; another release of fastsam-rwkv may know it") from None
                assert content is not None
                with whole_file(folder / Path(name).name) as stream:
                    shutil.copyfileobj(content, stream)


class _Handler(SimpleHTTPRequestHandler):
    extensions_map = {
        **SimpleHTTPRequestHandler.extensions_map,
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
        ".onnx": "application/octet-stream",
    }

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *args: Any) -> None:
        pass

    def list_directory(self, path: Any) -> None:
        self.send_error(404)


@contextmanager
def serving(folder: Path, port: int = 0) -> Iterator[ThreadingHTTPServer]:
    """Listen on 127.0.0.1 for requests for files in `folder`; the caller runs the server.

    Raises:
        ExportError: The port cannot be used.
    """
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, directory=str(folder)))
    except (OSError, OverflowError) as error:
        raise ExportError(f"cannot listen on port {port} of 127.0.0.1: {error}; choose another --port") from error
    with server:
        yield server


def cached_site(model: str | None, offline: bool) -> Path:
    """Return the folder of a site in the cache, which is exported if it is not there.

    Raises:
        ExportError, CheckpointError, OSError: As in `export_web`.
    """
    loaded = RWKVSAM.from_pretrained(model)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = f"{weights_sha256(loaded)[:16]}-{loaded.config.image_size}{'-offline' * offline}"
    folder = Path(base, "fastsam_rwkv", f"web-{__version__}", name)
    try:
        if json.loads((folder / "complete.json").read_text())["page"] == _page():
            Manifest.read(folder)
            return folder
    except (OSError, ValueError, KeyError):  # not there, of another page, or damaged: made again
        pass
    print("Exporting the page …", file=sys.stderr, flush=True)
    export_web(loaded, folder, offline=offline)
    with whole_file(folder / "complete.json") as stream:
        stream.write(json.dumps({"page": _page()}).encode())
    return folder


def _page() -> str:
    """Return a digest of all but the graphs."""
    parts = [(PAGE / name).read_bytes() for name in ("index.html", "app.js")] + [RUNTIME.encode(), PHOTO.read_bytes()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def demo(model: str | None, *, port: int = 0, offline: bool = False, open_browser: bool = True) -> None:
    """Export a site to the cache, serve it on 127.0.0.1 and open it in the browser, until interrupted.

    Raises:
        ExportError, CheckpointError, OSError: As in `export_web`, or the port cannot be used.
    """
    folder = cached_site(model, offline)
    with serving(folder, port) as server:
        address = f"http://127.0.0.1:{server.server_port}/"
        print(f"{address} (Ctrl-C ends it)", flush=True)
        if open_browser:
            webbrowser.open(address)
        server.serve_forever()
