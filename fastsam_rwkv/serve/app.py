"""The server's FastAPI application."""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from fastapi import Depends, FastAPI, File, Form, HTTPException, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import __version__
from ..errors import InputError, listed, shorten
from ..export import web
from ..modeling.rwkv_sam import RWKVSAM
from .cache import Cache
from .guard import RETRY, Guard
from .schemas import Embedded, ImagePrompt, Masks, Model, Prompt
from .service import Service
from .settings import Settings


def _takes(*names: str) -> list[Any]:
    """Return dependencies of a route that refuse a form with other fields."""

    async def check(request: Request) -> None:
        if unknown := [name for name in await request.form() if name not in names]:
            raise HTTPException(422, f"unknown fields: {listed(unknown)}; this path takes {listed(names)}")

    return [Depends(check)]


EVERYTHING = (
    "points_per_side", "pred_iou_thresh", "stability_score_thresh", "crop_n_layers", "min_mask_region_area"
)  # fmt: skip
Upload = Annotated[UploadFile, File(description="JPEG, PNG, WebP, TIFF or another format that the package reads")]


def create_app(
    model: RWKVSAM | str | os.PathLike[str] | None = None,
    settings: Settings | None = None,
    *,
    cache: Cache | None = None,
    **options: Any,
) -> FastAPI:
    """Return an ASGI application that segments images for many clients.

    Args:
        model: The model, or the source of one for `RWKVSAM.from_pretrained`; by default the bundled one.
        settings: Limits and options.
        cache: Keeps embeddings by id; by default in this process.
        options: Arguments of `RWKVSAM.from_pretrained`, such as `device` and `dtype`.

    Raises:
        CheckpointError, DeviceError, HubError: The model cannot be used.
    """
    if not isinstance(model, RWKVSAM):
        model = RWKVSAM.from_pretrained(model, **options)
    settings = settings or Settings()
    service = Service(model, settings, cache)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(title="fastsam-rwkv", version=__version__, lifespan=lifespan)
    app.state.service = service
    _add_routes(app, service)
    _add_page(app)
    for kind, respond in _RESPONSES.items():
        app.add_exception_handler(kind, respond)
    app.add_middleware(Guard, settings=settings, full=service.is_full)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    if settings.allowed_hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(settings.allowed_hosts), www_redirect=False)
    app.add_middleware(_Measured, service=service)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    errors: dict[int | str, dict[str, Any]] = {
        status: {"description": text}
        for status, text in {
            401: "wrong token", 408: "the body was too slow", 413: "too many bytes or pixels",
            422: "an image or a prompt that cannot be used", 503: "busy: come again after Retry-After",
        }.items()
    }  # fmt: skip
    missing: dict[int | str, dict[str, Any]] = {404: {"description": "no such embedding"}}

    @app.get("/healthz", tags=["server"])
    async def health() -> dict[str, str]:
        """Say that the server answers."""
        return {"status": "ok"}

    @app.get("/metrics", tags=["server"], response_class=Response)
    async def metrics() -> Response:
        """Return counters in Prometheus's text format."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/model", tags=["masks"])
    async def model() -> Model:
        """Describe the model that runs."""
        return service.model

    @app.post("/v1/embeddings", tags=["masks"], responses=errors, dependencies=_takes("image"))
    async def embed(request: Request, image: Upload) -> Embedded:
        """Embed an image, for any number of prompts. The least recently used embeddings are dropped."""
        return await service.run(request, "images", service.embed, image.file)

    @app.post(
        "/v1/embeddings/{id}/masks", tags=["masks"], responses={**errors, **missing}, response_model_exclude_none=True
    )
    async def masks(request: Request, id: str, prompt: Prompt) -> Masks:
        """Predict masks on an embedded image."""
        return await service.run(request, "prompts", service.masks, id, prompt)

    @app.post(
        "/v1/masks",
        tags=["masks"],
        responses=errors,
        response_model_exclude_none=True,
        dependencies=_takes("image", "prompts"),
    )
    async def masks_of_image(
        request: Request,
        image: Upload,
        prompts: Annotated[str, Form(description="JSON as for /v1/embeddings/{id}/masks, and zoom")],
    ) -> Masks:
        """Predict masks on an image that is not kept."""
        try:
            given = ImagePrompt.model_validate_json(prompts)
        except ValidationError as error:
            raise RequestValidationError([{**e, "loc": ("prompts", *e["loc"])} for e in error.errors()]) from error
        return await service.run(request, "images", service.masks_of_image, image.file, given)

    @app.post(
        "/v1/everything",
        tags=["masks"],
        responses=errors,
        response_class=StreamingResponse,
        dependencies=_takes("image", *EVERYTHING),
    )
    async def everything(
        request: Request,
        image: Upload,
        points_per_side: Annotated[int, Form()] = 32,
        pred_iou_thresh: Annotated[float | None, Form()] = None,
        stability_score_thresh: Annotated[float | None, Form()] = None,
        crop_n_layers: Annotated[int, Form()] = 0,
        min_mask_region_area: Annotated[int, Form()] = 0,
    ) -> StreamingResponse:
        """Return masks of everything as lines of JSON: the image's size, a record for each mask, and their number."""
        given = (points_per_side, pred_iou_thresh, stability_score_thresh, crop_n_layers, min_mask_region_area)
        options: dict[str, Any] = dict(zip(EVERYTHING, given, strict=True))
        size, records = await service.run(request, "search", service.everything, image.file, options)
        return StreamingResponse(_lines(size, records), media_type="application/x-ndjson")


def _lines(size: tuple[int, int], records: Iterator[dict[str, Any]]) -> Iterator[bytes]:
    """Yield lines of JSON. A client that gets the last one has all."""
    count = 0
    yield json.dumps({"height": size[0], "width": size[1]}).encode() + b"\n"
    for record in records:
        count += 1
        yield json.dumps(record).encode() + b"\n"
    yield json.dumps({"masks": count}).encode() + b"\n"


def _add_page(app: FastAPI) -> None:
    """Add the page of `export web`, whose model runs here instead of in the browser."""
    page, script = web.server_page()

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers=web.HEADERS)

    @app.get("/app.js", include_in_schema=False)
    async def app_js() -> Response:
        return Response(script, media_type="text/javascript", headers=web.HEADERS)

    @app.get(f"/{web.EXAMPLE}", include_in_schema=False)
    async def example() -> FileResponse:
        return FileResponse(Path(web.PHOTO), media_type="image/jpeg", headers=web.HEADERS)


async def _input_error(request: Request, error: Exception) -> JSONResponse:
    return _problem(422, str(error))


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """Say where a request does not fit, without the values: they may be long, or no JSON."""
    assert isinstance(error, RequestValidationError)
    found = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5]]
    return _problem(422, "; ".join(found))


async def _no_memory(request: Request, error: Exception) -> JSONResponse:
    return _problem(503, "not enough memory for this request; come again, or send a smaller one", RETRY)


def _problem(status: int, text: str, headers: dict[str, str] | None = None) -> JSONResponse:
    text = shorten(text).encode(errors="backslashreplace").decode()  # JSON may hold half a surrogate pair
    return JSONResponse({"detail": text}, status, headers)


_RESPONSES: dict[type[Exception], Callable[[Request, Exception], Awaitable[JSONResponse]]] = {
    InputError: _input_error,
    RequestValidationError: _invalid,
    MemoryError: _no_memory,
    torch.OutOfMemoryError: _no_memory,
}


class _Measured:
    """Middleware that counts and times requests by the path of their route."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._metrics = app, service.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 499  # of a client that leaves before the answer

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:  # of any type: counted, and raised again
            status = 500
            raise
        finally:
            path = getattr(scope.get("route"), "path", "other")  # not of the request: anyone can invent paths
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - start)
