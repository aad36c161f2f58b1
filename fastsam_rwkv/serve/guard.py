"""Refusal of requests before their body is read, and bounds on the body. ASGI, without FastAPI."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .settings import Settings

OPEN = {"/", "/app.js", "/example.jpg", "/healthz"}  # paths that need no token
RETRY = {"Retry-After": "1"}  # seconds


def refused(status: int, reason: str) -> HTTPException:
    """Return the exception that answers a request with a status and a reason. 503 asks to come again."""
    return HTTPException(status, reason, RETRY if status == 503 else None)


class Guard:
    """Middleware that checks the token, the queue and the size of the body.

    Args:
        app: The application.
        settings: Limits and the token.
        full: Returns True if no request may be taken.
    """

    def __init__(self, app: ASGIApp, settings: Settings, full: Callable[[], bool]) -> None:
        self._app, self._settings, self._full = app, settings, full

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        is_form = request.headers.get("content-type", "").lower().startswith("multipart/")
        most = self._settings.max_upload_bytes if is_form else self._settings.max_json_bytes
        problem = self._problem(request, most)
        if problem is not None:
            headers = {**(problem.headers or {}), "Connection": "close"}  # the body is not read
            await JSONResponse({"detail": problem.detail}, problem.status_code, headers)(scope, receive, send)
            return
        await self._app(scope, self._bounded(receive, most), send)

    def _problem(self, request: Request, most: int) -> HTTPException | None:
        """Return the answer to a request that is refused by its headers."""
        path, token = request.url.path, self._settings.token
        if token is not None and path not in OPEN and request.method != "OPTIONS":
            given = request.headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                reason = "this server needs the header 'Authorization: Bearer TOKEN' with its token"
                return HTTPException(401, reason, {"WWW-Authenticate": "Bearer"})
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > most:
            return refused(413, _too_long(most))
        if path.startswith("/v1/") and request.method == "POST" and self._full():
            return refused(503, "too many requests wait; come again")
        return None

    def _bounded(self, receive: Receive, most: int) -> Receive:
        """Return a `receive` that raises for a body that is too long or too slow."""
        end, length, more = time.monotonic() + self._settings.timeout, 0, True

        async def bounded() -> Message:
            nonlocal length, more
            if not more:
                return await receive()  # waits until the client is gone
            try:
                message = await asyncio.wait_for(receive(), max(0.001, end - time.monotonic()))
            except asyncio.TimeoutError:
                more = False
                raise refused(408, f"the body did not arrive within {self._settings.timeout:g} seconds") from None
            length += len(message.get("body", b""))
            more = message.get("more_body", False)
            if length > most:
                more = False
                raise refused(413, _too_long(most))
            return message

        return bounded


def _too_long(most: int) -> str:
    return f"the body is longer than {most} bytes"
