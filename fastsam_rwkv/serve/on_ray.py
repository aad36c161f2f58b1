"""The server as a Ray Serve application: `serve run fastsam_rwkv.serve.on_ray:build num_replicas=2`.

Replicas share embeddings: each puts its own into Ray's object store, and an actor keeps their references by id.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import ray
import torch
from ray import serve

from ..errors import ArgumentError, listed
from ..modeling.embedding import ImageEmbedding
from ..modeling.rwkv_sam import RWKVSAM
from .app import create_app
from .cache import Kept, bytes_of, new_id
from .settings import Settings

REPLICA = ("num_replicas", "num_gpus", "num_cpus", "max_ongoing_requests")
MODEL = ("model", "device", "dtype")
KEPT_HERE = 32  # embeddings in a replica's own memory
STORE = "fastsam-rwkv-embeddings"  # name of the actor


@ray.remote(num_cpus=0)
class _Store:
    """References to embeddings by id. Of more than `limit` bytes, the least recently used are dropped."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._kept: OrderedDict[str, tuple[list[Any], int]] = OrderedDict()

    def put(self, id: str, boxed: list[Any], size: int) -> None:
        """Keep a reference, boxed in a list so that Ray does not resolve it."""
        self._kept[id] = boxed, size
        self._bytes += size
        while self._bytes > self._limit and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1][1]

    def get(self, id: str) -> list[Any]:
        """Return the boxed reference, or an empty list."""
        if id not in self._kept:
            return []
        self._kept.move_to_end(id)
        return self._kept[id][0]

    def usage(self) -> tuple[int, int]:
        """Return the number of embeddings and their bytes."""
        return len(self._kept), self._bytes


class SharedCache:
    """Embeddings that all replicas see.

    Those of a replica that dies are gone. All are if the actor dies, which is then made again.

    Args:
        limit: Bytes of all embeddings together.
        model: Whose embeddings they are; it makes the position encoding, which is not stored.
    """

    def __init__(self, limit: int, model: RWKVSAM) -> None:
        self._limit, self._model = limit, model
        self._here: OrderedDict[str, Kept] = OrderedDict()  # so that prompts on one embedding have one tensor
        self._lock = threading.Lock()
        self._store = self._find()

    def put(self, embedding: ImageEmbedding, size: tuple[int, int]) -> str:
        id = new_id()
        maps = [_as_bytes(t) for t in (embedding.image_embed, embedding.high_res_feats)]
        boxed = [ray.put((maps, embedding.input_size, size))]
        self._ask("put", id, boxed, bytes_of(embedding))
        return id

    def get(self, id: str) -> Kept | None:
        boxed = self._ask("get", id)  # even if it is here, so that its use counts
        with self._lock:
            if boxed and id not in self._here:
                try:
                    self._here[id] = self._loaded(*ray.get(boxed[0]))
                except ray.exceptions.ObjectLostError:  # with its replica
                    return None
                while len(self._here) > KEPT_HERE:
                    self._here.popitem(last=False)
            if not boxed:
                self._here.pop(id, None)
            return self._here.get(id)

    def usage(self) -> tuple[int, int]:
        count, size = self._ask("usage")
        return count, size

    def _loaded(self, maps: list[np.ndarray], input_size: tuple[int, int], size: tuple[int, int]) -> Kept:
        model = self._model
        image_embed, high_res_feats = (
            torch.from_numpy(array.copy()).view(model.dtype).to(model.device) for array in maps
        )
        grid = model.prompt_encoder.grid(input_size[0] // 16, input_size[1] // 16)
        return ImageEmbedding(image_embed, grid, high_res_feats, input_size), size

    def _find(self) -> Any:
        store: Any = _Store  # Ray's decorator adds `options`
        return store.options(name=STORE, get_if_exists=True).remote(self._limit)

    def _ask(self, method: str, *args: Any) -> Any:
        try:
            return ray.get(getattr(self._store, method).remote(*args))
        except ray.exceptions.RayActorError:
            self._store = self._find()
            return ray.get(getattr(self._store, method).remote(*args))


def _as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as bytes, whose last dimension is longer; numpy has no bfloat16."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy()


def build(arguments: dict[str, Any]) -> serve.Application:
    """Return the application for `serve run` and `serve.run`.

    Args:
        arguments: `model`, `device` and `dtype` of `RWKVSAM.from_pretrained`; `num_replicas`, `num_gpus`, `num_cpus`
            (of each replica) and `max_ongoing_requests`; and fields of `Settings`. Values may be text, as the command
            line gives them. `device` is "cuda" by default if `num_gpus` is given, else "cpu"; `dtype` is "auto".

    Raises:
        ArgumentError: An argument is unknown, or no number where it must be one.
    """
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    known = [*REPLICA, *MODEL, *fields]
    if unknown := [name for name in arguments if name not in known]:
        raise ArgumentError(f"unknown arguments: {listed(unknown)}; known are {', '.join(known)}")
    given = {name: _parsed(name, value) for name, value in arguments.items()}
    settings = Settings(**{name: value for name, value in given.items() if name in fields})
    options = model_options(given)

    def app() -> Any:
        model = RWKVSAM.from_pretrained(given.get("model"), **options)
        return create_app(model, settings, cache=SharedCache(settings.cache_bytes, model))

    @serve.deployment(
        name="fastsam-rwkv",
        num_replicas=given.get("num_replicas", 1),
        max_ongoing_requests=given.get("max_ongoing_requests", settings.queue),
        ray_actor_options={"num_gpus": given.get("num_gpus", 0), "num_cpus": given.get("num_cpus", 1)},
    )
    @serve.ingress(app)
    class Server:
        """A replica."""

    return Server.bind()  # type: ignore[attr-defined]  # added by Ray's decorator


def model_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `RWKVSAM.from_pretrained` for a replica: on a GPU if it has one."""
    device = "cuda" if given.get("num_gpus") else "cpu"
    return {"device": given.get("device", device), "dtype": given.get("dtype", "auto")}


def _parsed(name: str, value: Any) -> Any:
    """Return a value of the command line as a number, a bool or a tuple, if its argument is one."""
    default = {field.name: field.default for field in dataclasses.fields(Settings)}.get(name)
    if not isinstance(value, str) or name in (*MODEL, "token"):
        return value
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise ArgumentError(f"{name} must be true or false, got {value!r}")
        return value.lower() == "true"
    if isinstance(default, tuple):
        return tuple(part for part in value.split(",") if part)
    try:
        return float(value) if "." in value or name == "timeout" else int(value)
    except ValueError:
        raise ArgumentError(f"{name} must be a number, got {value!r}") from None
