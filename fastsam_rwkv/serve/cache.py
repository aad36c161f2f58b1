"""Embeddings by id, bounded in bytes."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from typing import Protocol

from ..modeling.embedding import ImageEmbedding

Kept = tuple[ImageEmbedding, tuple[int, int]]  # and the size (H, W) of its image


class Cache(Protocol):
    """Embeddings by id, for threads."""

    def put(self, embedding: ImageEmbedding, size: tuple[int, int]) -> str:
        """Keep an embedding and the size `(H, W)` of its image, and return its id."""

    def get(self, id: str) -> Kept | None:
        """Return an embedding and the size of its image, or None if it is not there any more."""

    def usage(self) -> tuple[int, int]:
        """Return the number of embeddings and their bytes."""


def new_id() -> str:
    """Return an id that nobody can guess: whoever has it may use the embedding."""
    return secrets.token_urlsafe(16)


def bytes_of(embedding: ImageEmbedding) -> int:
    """Return the bytes of an embedding without its position encoding, which embeddings share."""
    return embedding.image_embed.nbytes + embedding.high_res_feats.nbytes


class LocalCache:
    """Embeddings in this process. Of more than `limit` bytes, the least recently used are dropped."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, embedding: ImageEmbedding, size: tuple[int, int]) -> str:
        id = new_id()
        with self._lock:
            self._kept[id] = embedding, size
            self._bytes += bytes_of(embedding)
            while self._bytes > self._limit and len(self._kept) > 1:
                _, (oldest, _) = self._kept.popitem(last=False)
                self._bytes -= bytes_of(oldest)
        return id

    def get(self, id: str) -> Kept | None:
        with self._lock:
            if id in self._kept:
                self._kept.move_to_end(id)
            return self._kept.get(id)

    def usage(self) -> tuple[int, int]:
        with self._lock:
            return len(self._kept), self._bytes
