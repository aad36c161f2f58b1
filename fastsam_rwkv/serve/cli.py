"""Arguments of `fastsam-rwkv serve`."""

from __future__ import annotations

import argparse
import ipaddress
import os
from typing import Any

from ..errors import ArgumentError, short_repr
from ..outputs import add_model_options
from .settings import Settings

TOKEN = "FASTSAM_RWKV_TOKEN"  # environment variable
NEEDS = "serving needs FastAPI and uvicorn: pip install 'fastsam-rwkv[serve]'"


def add_command(commands: Any) -> None:
    """Add `serve` to the subparsers of `fastsam-rwkv`."""
    default = Settings()
    command = commands.add_parser(
        "serve",
        help="masks over HTTP, and the page",
        description="Answers HTTP requests with masks, and shows a page to try it. /docs describes the interface. Any "
        f"address but this machine's own needs a token, from --token or {TOKEN}, or --no-token.",
    )
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    command.add_argument("--port", type=int, default=8000, help="default 8000; 0 for a free one")
    command.add_argument("--token", help=f"secret that clients send as 'Authorization: Bearer'; default: ${TOKEN}")
    command.add_argument("--no-token", action="store_true", help="let everyone who reaches the address use it")
    command.add_argument(
        "--cors", metavar="ORIGIN", action="append", default=[], help="origin whose pages may call the server"
    )
    for name, value, unit, about in (
        ("max-upload", default.max_upload_bytes >> 20, "MB", "of a request with an image"),
        ("max-pixels", default.max_pixels, "N", "of an image"),
        ("max-prompts", default.max_prompts, "N", "in one request"),
        ("queue", default.queue, "N", "requests that wait or run; more are refused"),
        ("cache", default.cache_bytes >> 20, "MB", "of embeddings that are kept"),
        ("workers", default.workers, "N", "threads that decode images and make masks"),
    ):
        command.add_argument(f"--{name}", type=int, default=value, metavar=unit, help=f"{about} (default {value})")
    command.add_argument(
        "--timeout", type=float, default=default.timeout, metavar="SECONDS", help="for a body, and for an answer"
    )
    command.add_argument("--no-batching", action="store_true", help="one image and one request at a time")
    add_model_options(command)
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Serve until interrupted or terminated; requests that run are finished.

    Raises:
        ArgumentError: Wrong arguments, a port that cannot be used, or FastAPI is missing.
        InputError: The model cannot be used.
    """
    token = args.token if args.token is not None else os.environ.get(TOKEN)
    local = _is_local(args.host)
    if not local and token is None and not args.no_token:
        raise ArgumentError(
            f"--host {args.host} lets other machines use this server: pass --token TOKEN, or --no-token to allow all"
        )
    if not 0 <= args.port <= 65535:
        raise ArgumentError(f"--port must be 0 to 65535, got {args.port}")
    settings = Settings(
        token=token,
        cors_origins=tuple(args.cors),
        allowed_hosts=("localhost", "127.0.0.1", args.host) if local and ":" not in args.host else (),
        max_upload_bytes=args.max_upload << 20,
        max_pixels=args.max_pixels,
        max_prompts=args.max_prompts,
        queue=args.queue,
        timeout=args.timeout,
        cache_bytes=args.cache << 20,
        workers=args.workers,
        batching=not args.no_batching,
    )
    try:
        import uvicorn

        from .app import create_app
    except ImportError as error:
        raise ArgumentError(f"{NEEDS} ({error})") from error
    app = create_app(args.model, settings, device=args.device, dtype=args.dtype)
    patience = int(args.timeout) + 1  # seconds for requests that run, once it is told to stop
    config = uvicorn.Config(
        app,
        args.host,
        args.port,
        log_level="info",
        timeout_keep_alive=60,  # between clicks
        timeout_graceful_shutdown=patience,
    )
    try:
        listening = config.bind_socket()
    except SystemExit as error:  # uvicorn has said why
        raise ArgumentError(f"cannot listen on port {args.port} of {short_repr(args.host)}") from error
    uvicorn.Server(config).run([listening])


def _is_local(host: str) -> bool:
    """Return True for an address that only this machine reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
