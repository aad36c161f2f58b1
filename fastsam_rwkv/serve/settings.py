"""Limits and options of the server. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from ..errors import ArgumentError, short_repr


@dataclass(frozen=True)
class Settings:
    """Limits and options of the server.

    Attributes:
        token: Secret that clients send as `Authorization: Bearer TOKEN`, or None. `/healthz` and the page need none.
        cors_origins: Origins whose pages may call the server, such as "https://example.org".
        allowed_hosts: Values of the header Host that are answered; empty for any. It stops DNS rebinding.
        max_upload_bytes: Of a request with an image.
        max_json_bytes: Of a request without an image.
        max_pixels: Of an image, compared with its header.
        max_prompts: Prompts in one request.
        max_points: Points in one request.
        max_points_per_side: Grid of everything-mode.
        queue: Most requests that wait or run.
        timeout: Seconds for the body to arrive, and again for the answer.
        cache_bytes: Embeddings that are kept; the least recently used are dropped.
        workers: Threads that decode images and make masks.
        batching: Run waiting encodings of one size, and waiting prompts on one embedding, in one batch.
        images_at_once: Encodings in a batch. By default 8 on a GPU and 1 elsewhere.

    Raises:
        ArgumentError: A limit is not a positive number.
    """

    token: str | None = None
    cors_origins: Sequence[str] = ()
    allowed_hosts: Sequence[str] = ()
    max_upload_bytes: int = 32 << 20
    max_json_bytes: int = 4 << 20
    max_pixels: int = 50_000_000
    max_prompts: int = 256
    max_points: int = 4096
    max_points_per_side: int = 64
    queue: int = 64
    timeout: float = 60.0
    cache_bytes: int = 1 << 30
    workers: int = 8
    batching: bool = True
    images_at_once: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            numeric = str(field.type).startswith(("int", "float"))
            if numeric and value is not None and not (isinstance(value, (int, float)) and value > 0):
                raise ArgumentError(f"{field.name} must be a positive number, got {short_repr(value)}")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and self.token.strip()):
            raise ArgumentError("token must be printable ASCII and not empty")
