"""ML backend for Label Studio: a smart keypoint or rectangle becomes a brush mask.

LABEL_STUDIO_URL=http://127.0.0.1:8080 LABEL_STUDIO_API_KEY=KEY \
    uvicorn --factory backend:create_app --app-dir examples/label_studio --port 9090
"""

from __future__ import annotations

import os
import secrets
import threading
from collections import OrderedDict
from typing import Annotated, Any, Literal
from xml.etree import ElementTree

import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from label_studio_files import Files
from pydantic import BaseModel

from fastsam_rwkv import RWKVSAM, Predictor
from fastsam_rwkv.checkpoint import weights_sha256
from fastsam_rwkv.errors import InputError

IMAGES_KEPT = 8  # with their embeddings, for the next click
RUN_BITS = 4, 8, 12, 16  # sizes of a run's length in the brush RLE


class Value(BaseModel):
    """Coordinates in percent of the image, and the label."""

    x: float
    y: float
    width: float = 0
    height: float = 0
    rotation: float = 0
    keypointlabels: list[str] = []
    rectanglelabels: list[str] = []


class Region(BaseModel):
    """Point or rectangle that the annotator drew with a smart tool."""

    type: Literal["keypointlabels", "rectanglelabels"]
    to_name: str
    original_width: int
    original_height: int
    image_rotation: float = 0
    is_positive: bool = True
    value: Value


class Context(BaseModel):
    """The regions of one interaction."""

    result: list[Region] = []


class Params(BaseModel):
    """Parameters of a request. Without a context, nobody clicked."""

    context: Context | None = None


class Asked(BaseModel):
    """Body of `/predict`."""

    tasks: list[dict[str, Any]]
    label_config: str
    params: Params = Params()


def create_app(model: RWKVSAM | None = None, files: Files | None = None) -> FastAPI:
    """Return the backend. By default the environment configures it, as README.md says."""
    if model is None:
        model = RWKVSAM.from_pretrained(os.environ.get("MODEL"), device=os.environ.get("DEVICE"))
    files = files or Files(os.environ["LABEL_STUDIO_URL"], os.environ["LABEL_STUDIO_API_KEY"])
    version = f"fastsam-rwkv-{model.config.variant}-{weights_sha256(model)[:8]}"
    predictors: OrderedDict[str, Predictor] = OrderedDict()
    lock = threading.Lock()
    app = FastAPI(title="fastsam-rwkv for Label Studio", dependencies=[Depends(_check_password)])

    @app.exception_handler(InputError)
    async def refuse(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 400)

    @app.get("/")
    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "UP", "model_class": "RWKVSAM"}

    @app.post("/setup")
    def setup() -> dict[str, str]:
        """Return the version. The address and the token in the body are not used: the operator gave them."""
        return {"model_version": version}

    @app.post("/webhook", status_code=201)
    def webhook() -> dict[str, str]:
        """Accept the events of training, which is not done here."""
        return {"status": "ok"}

    def predictor_of(url: str) -> Predictor:
        with lock:
            if url in predictors:
                predictors.move_to_end(url)
                return predictors[url]
        predictor = Predictor(model)
        predictor.set_image(files.fetch(url))
        with lock:
            predictors[url] = predictor
            while len(predictors) > IMAGES_KEPT:
                predictors.popitem(last=False)
        return predictor

    @app.post("/predict")
    def predict(asked: Asked) -> dict[str, Any]:
        regions = asked.params.context.result if asked.params.context else []
        if not regions:
            return {"results": []}
        first = regions[0]
        label = _label(first)
        from_name, key = _tags(asked.label_config, first.to_name, label)
        url = asked.tasks[0].get("data", {}).get(key) if asked.tasks else None
        if not isinstance(url, str):
            raise HTTPException(400, f"the task has no URL of an image in {key!r}")
        size = first.original_width, first.original_height
        prompt, predictor = _prompt(regions), predictor_of(url)
        with lock:
            masks, scores, _ = predictor.predict(**prompt, multimask_output=False, zoom="auto")
        mask, score = masks[0], float(scores[0])
        if mask.shape[::-1] != size:
            raise HTTPException(400, f"the image has {mask.shape[::-1]} pixels, and Label Studio says {size}")
        region = {
            "id": secrets.token_hex(5),
            "from_name": from_name,
            "to_name": first.to_name,
            "type": "brushlabels",
            "original_width": size[0],
            "original_height": size[1],
            "image_rotation": 0,
            "value": {"format": "rle", "rle": brush_rle(mask), "brushlabels": [label]},
            "score": score,
            "readonly": False,
        }
        return {"results": [{"result": [region], "score": score, "model_version": version}]}

    return app


def _check_password(given: Annotated[HTTPBasicCredentials | None, Depends(HTTPBasic(auto_error=False))]) -> None:
    """Ask for the user and password of the environment, if it has them."""
    user, password = os.environ.get("BASIC_AUTH_USER", ""), os.environ.get("BASIC_AUTH_PASS", "")
    if not (user or password):
        return
    found = f"{given.username}:{given.password}" if given else ""
    if not secrets.compare_digest(found.encode(), f"{user}:{password}".encode()):
        raise HTTPException(401, "wrong user or password", {"WWW-Authenticate": "Basic"})


def _label(region: Region) -> str:
    labels = getattr(region.value, region.type)
    if not labels:
        raise HTTPException(400, f"the region has no {region.type}")
    return labels[0]


def _tags(label_config: str, to_name: str, label: str) -> tuple[str, str]:
    """Return the name of the brush with a label, and the key of the image's URL in a task."""
    try:
        tags = list(ElementTree.fromstring(label_config).iter())
    except ElementTree.ParseError as error:
        raise HTTPException(400, f"label_config is not XML: {error}") from error
    images = [tag for tag in tags if tag.tag.lower() == "image" and tag.get("name") == to_name]
    for brush in tags:
        named = brush.tag.lower() == "brushlabels" and brush.get("toName") == to_name
        if named and images and label in [child.get("value") for child in brush.iter("Label")]:
            return brush.get("name", ""), images[0].get("value", "").removeprefix("$")
    raise HTTPException(
        400, f"label_config needs an Image {to_name!r}, and BrushLabels for it with the Label {label!r}"
    )


def _prompt(regions: list[Region]) -> dict[str, Any]:
    """Return the arguments of `Predictor.predict`: all keypoints, and the last rectangle."""
    prompt: dict[str, Any] = {"point_coords": [], "point_labels": []}
    for region in regions:
        if region.image_rotation or region.value.rotation:
            raise HTTPException(400, "rotated images and rotated rectangles are not supported")
        per_cent = np.array([region.original_width, region.original_height]) / 100
        start = np.array([region.value.x, region.value.y]) * per_cent
        if region.type == "keypointlabels":
            prompt["point_coords"].append(start)
            prompt["point_labels"].append(int(region.is_positive))
        else:
            size = np.array([region.value.width, region.value.height]) * per_cent
            prompt["box"] = np.concatenate([start, start + size])
    return prompt if prompt["point_coords"] else {"box": prompt["box"]}


def brush_rle(mask: np.ndarray) -> list[int]:
    """Return a mask `[H, W]` as Label Studio's brush RLE.

    It is a stream of bits: the number of values (32), their size minus 1 (5), four sizes of lengths minus 1 (4 each),
    and the runs. A run is a 1, the index of its size (2), its length minus 1, and its value (8). The values are RGBA,
    so each pixel is four of them.
    """
    pixels = mask.ravel()
    ends = np.append(np.flatnonzero(pixels[1:] != pixels[:-1]) + 1, pixels.size)
    bits = [f"{4 * pixels.size:032b}{7:05b}", *(f"{size - 1:04b}" for size in RUN_BITS)]
    for length, end in zip(np.diff(ends, prepend=0), ends, strict=True):
        value, left = int(pixels[end - 1]) * 255, 4 * int(length)
        while left:
            run = min(left, 1 << RUN_BITS[-1])
            index = next(i for i, size in enumerate(RUN_BITS) if run <= 1 << size)
            bits.append(f"1{index:02b}{run - 1:0{RUN_BITS[index]}b}{value:08b}")
            left -= run
    stream = "".join(bits)
    padded = stream + "0" * (-len(stream) % 8)
    return list(int(padded, 2).to_bytes(len(padded) // 8, "big"))
