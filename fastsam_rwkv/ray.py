"""Masks of many images on a cluster, by Ray Data. Needs `pip install 'fastsam-rwkv[ray]'`.

import ray, fastsam_rwkv.ray
images = ray.data.read_binary_files("photos/", include_paths=True)
fastsam_rwkv.ray.segment(images, image="bytes", concurrency=8).write_parquet("masks/")
"""

from __future__ import annotations

import inspect
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from .errors import ArgumentError, listed, short_repr, shorten
from .predictor.streams import NAMES

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import ray
    from ray.data import ActorPoolStrategy, Dataset
except ImportError as error:
    raise ArgumentError(f"Ray Data cannot be imported ({error}); pip install 'fastsam-rwkv[ray]'") from error

_MASKS = {
    "masks": pa.list_(pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])),
    "scores": pa.list_(pa.float32()),
    "boxes": pa.list_(pa.list_(pa.int32())),
    "areas": pa.list_(pa.int64()),
}
_IMAGE = {"height": pa.int32(), "width": pa.int32(), "error": pa.string()}
PROMPTED = pa.schema({**_MASKS, "prompt_index": pa.list_(pa.int32()), **_IMAGE})
EVERYTHING = pa.schema(
    {**_MASKS, "stability_scores": pa.list_(pa.float32()), "points": pa.list_(pa.list_(pa.float64())), **_IMAGE}
)


@dataclass(frozen=True)
class _Settings:
    """Arguments of `segment` that the actors need."""

    image: str
    prompts: str | Mapping[str, str] | None
    model: str | None
    device: str
    dtype: str
    threads: int
    multimask_output: bool
    zoom: str
    everything: Mapping[str, Any]
    max_pixels: int | None

    @property
    def inputs(self) -> list[str]:
        """Columns that are read."""
        named = [self.prompts] if isinstance(self.prompts, str) else list((self.prompts or {}).values())
        return [self.image, *named]

    @property
    def added(self) -> pa.Schema:
        """Columns that are written."""
        return EVERYTHING if self.prompts is None else PROMPTED

    def check_columns(self, columns: Sequence[str]) -> None:
        """Raise an ArgumentError if a column is missing, or if a new one has the name of one that is kept."""
        if missing := [name for name in self.inputs if name not in columns]:
            raise ArgumentError(f"the dataset has no column {listed(missing)}; its columns are {listed(columns)}")
        if taken := [name for name in self.added.names if name in columns]:
            raise ArgumentError(
                f"the dataset has columns with the names of new ones: {listed(taken)}; "
                "rename them with Dataset.rename_columns"
            )


def segment(
    dataset: Dataset,
    *,
    image: str = "image",
    prompts: str | Mapping[str, str] | None = None,
    model: str | os.PathLike[str] | None = None,
    device: str | None = None,
    dtype: str = "auto",
    multimask_output: bool = False,
    zoom: str | None = None,
    everything: Mapping[str, Any] | None = None,
    max_pixels: int | None = None,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    concurrency: int | tuple[int, int] | ActorPoolStrategy | None = None,
    batch_size: int = 16,
    map_options: Mapping[str, Any] | None = None,
) -> Dataset:
    """Return the dataset with the masks of its images. It is lazy: nothing runs before the result is used.

    The work is one `Dataset.map_batches` with actors that each load the model once. All columns are kept except the
    pixels or bytes of the images. A row whose image or prompts cannot be used gets its `error`, and nulls as masks.

    Args:
        dataset: One image per row, in the column `image`.
        image: Column of paths, bytes of files, uint8 arrays `[H, W, 3]` RGB, or structs with `bytes` and `path` as in
            Hugging Face datasets. Paths must be readable on every node. Of structs, `path` is kept.
        prompts: Column with the prompts of each image: a struct, or JSON of an object, with `point_coords`,
            `point_labels`, `box` and `mask_input` as for `Predictor.predict_image`; nulls in it count as absent. Or a
            mapping from these names to columns, such as `{"box": "boxes"}`. None segments everything.
        model: Hub id, folder or .safetensors file, readable on every node; by default the bundled model.
        device: Of the model, "cuda" by default if `num_gpus` is given, else "cpu".
        dtype: As in `RWKVSAM.from_pretrained`, or "auto".
        multimask_output, zoom: As in `Predictor.predict_image`, "auto" by default. Only with prompts.
        everything: Arguments of `AutomaticMaskGenerator` other than `model` and `output_mode`. Only without prompts.
        max_pixels: Largest image to read, in pixels; by default Pillow's limit.
        num_cpus: Cores that an actor reserves; by default one, and with `num_gpus` none. PyTorch has as many threads in
            it, at least one. Actors keep their cores, so leave some for Ray's readers and writers: on two cores,
            `concurrency=2, num_cpus=0.5` keeps both busy.
        num_gpus: GPUs of an actor. A part, such as 0.25, lets several actors read images for one GPU.
        concurrency: Number of actors, or the least and the most; by default one and as many as the cluster holds. A
            `ray.data.ActorPoolStrategy` says more.
        batch_size: Images of one call of an actor.
        map_options: Further arguments of `Dataset.map_batches`, such as `memory`, `max_restarts` or `resources`.

    Returns:
        The kept columns and, for each image with M masks:

        - `masks`: M structs of `size`, [H, W], and `counts`, COCO's compressed run lengths as pycocotools has them.
        - `scores`: `[M]` float32, predicted IoUs.
        - `boxes`: `[M, 4]` int32 (x, y, width, height) of the masks, in pixels of the upright image as in COCO.
        - `areas`: `[M]` int64, in pixels.
        - `prompt_index`: `[M]` int32, the number of the prompt that a mask answers; only with prompts.
        - `stability_scores`: `[M]` float32; only without prompts.
        - `points`: `[M, 2]` float64 (x, y), the click of each mask; only without prompts.
        - `height`, `width`: int32, of the upright image.
        - `error`: null, or the reason why there are no masks.

    Raises:
        ArgumentError: Arguments that do not go together, or unknown columns. If the columns are not known yet, the job
            raises it.
    """
    from .predictor.answers import Zoom
    from .predictor.automatic import AutomaticMaskGenerator

    if not isinstance(dataset, Dataset):
        raise ArgumentError(
            f"dataset must be a ray.data.Dataset, got {short_repr(dataset)}; "
            "ray.data.read_binary_files(folder, include_paths=True) reads a folder"
        )
    if isinstance(prompts, Mapping) and (not prompts or set(prompts) - set(NAMES)):
        raise ArgumentError(f"prompts must map some of {', '.join(NAMES)} to columns, got {short_repr(prompts)}")
    known = inspect.signature(AutomaticMaskGenerator).parameters.keys() - {"model", "output_mode"}
    if unknown := sorted(set(everything or {}) - known):
        raise ArgumentError(f"everything has no option {listed(unknown)}; it has {', '.join(sorted(known))}")
    if zoom is not None and zoom not in get_args(Zoom):
        raise ArgumentError(f"zoom must be {listed(get_args(Zoom))}, got {short_repr(zoom)}")
    if prompts is None and (multimask_output or zoom is not None):
        raise ArgumentError("multimask_output and zoom go with prompts; everything-mode has neither")
    if prompts is not None and everything is not None:
        raise ArgumentError("everything goes without prompts")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ArgumentError(f"batch_size must be a positive integer, got {short_repr(batch_size)}")
    if device is not None and device.startswith("cuda") and not num_gpus:
        raise ArgumentError(f"device={device!r} needs num_gpus, by which Ray gives a GPU to each actor")
    settings = _Settings(
        image,
        prompts,
        None if model is None else os.fspath(model),
        device or ("cuda" if num_gpus else "cpu"),
        dtype,
        max(1, int(num_cpus or 1)),
        multimask_output,
        zoom or "auto",
        dict(everything or {}),
        max_pixels,
    )
    columns = dataset.columns(fetch_if_missing=False)
    if columns is not None:
        settings.check_columns(columns)
    if isinstance(concurrency, ActorPoolStrategy):
        pool = concurrency
    else:
        least, most = concurrency if isinstance(concurrency, tuple) else (concurrency, concurrency)
        pool = ActorPoolStrategy(min_size=least, max_size=most)
    reserved = num_cpus or (0 if num_gpus else 1)
    if ray.is_initialized() and pool.min_size * reserved > (cores := ray.cluster_resources().get("CPU", 0)) - 1:
        warnings.warn(
            f"{pool.min_size} actors with num_cpus={reserved:g} leave less than one of the cluster's {cores:g} cores; "
            "Ray's readers and writers wait until there is one, maybe forever. Pass a smaller concurrency or num_cpus",
            stacklevel=2,
        )
    return dataset.map_batches(
        Segmenter,
        fn_constructor_args=(settings,),
        batch_format="pyarrow",
        batch_size=batch_size,
        compute=pool,
        num_cpus=num_cpus or (None if num_gpus else 1),
        num_gpus=num_gpus,
        **(map_options or {}),
    )


class Segmenter:
    """Actor of `segment`, with one model. Ray makes it."""

    def __init__(self, settings: _Settings) -> None:
        from .predictor.automatic import AutomaticMaskGenerator
        from .predictor.torch_predictor import Predictor

        prepare_process(settings.threads, settings.max_pixels)
        self._settings = settings
        self._predictor = Predictor.from_pretrained(settings.model, device=settings.device, dtype=settings.dtype)
        self._options: dict[str, Any] = {"multimask_output": settings.multimask_output, "zoom": settings.zoom}
        self._predictor.predict_images([], [], **self._options)  # raises for options that do not fit the model
        if settings.prompts is None:
            self._generator = AutomaticMaskGenerator(self._predictor, **settings.everything, output_mode="coco_rle")

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the table with the masks of its images. Reading, model and run lengths overlap."""
        from .predictor.background import in_background

        settings = self._settings
        settings.check_columns(table.column_names)
        images = (_image(value.as_py()) for value in table[settings.image])
        found: Iterable[Any]
        row_of: Callable[[Any], dict[str, Any]]
        if settings.prompts is None:
            found, row_of = self._generator.stream(images), _row_of_everything
        else:
            given = _prompts(table, settings.prompts)
            found, row_of = self._predictor.predict_images(images, given, **self._options, errors="return"), _row
        rows = list(in_background(lambda item: _error(item) if isinstance(item, Exception) else row_of(item), found))
        table = _without_pixels(table, settings.image)
        for field in settings.added:
            table = table.append_column(field, pa.array([row.get(field.name) for row in rows], field.type))
        return table


def prepare_process(threads: int, max_pixels: int | None) -> None:
    """Give this process, which is an actor's own, its share of the cores and its limit of pixels."""
    import torch

    from .predictor.image_io import set_most_pixels

    torch.set_num_threads(threads)
    if max_pixels is not None:
        set_most_pixels(max_pixels)


def _image(value: Any) -> Any:
    """Return what `load_image` takes of a value of the image column."""
    if isinstance(value, Mapping):  # Hugging Face's struct
        return value.get("path") if value.get("bytes") is None else value["bytes"]
    return value


def _prompts(table: pa.Table, source: str | Mapping[str, str]) -> Iterator[Any]:
    """Yield the prompts of each row. Values that hold none come as they are, and the predictor names them."""
    if isinstance(source, str):
        for value in table[source]:
            yield _without_nulls(_parsed(value.as_py()))
    else:
        for values in zip(*(table[column] for column in source.values()), strict=True):
            yield _without_nulls({name: value.as_py() for name, value in zip(source, values, strict=True)})


def _parsed(value: Any) -> Any:
    if not isinstance(value, (str, bytes)):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _without_nulls(value: Any) -> Any:
    """Drop the fields that other rows of an Arrow struct have."""
    return {name: v for name, v in value.items() if v is not None} if isinstance(value, Mapping) else value


def one_line(error: Exception) -> str:
    """Return the message of an image's error, without the image's number in a batch."""
    return " ".join(shorten(error.__cause__ or error).split())


def _error(error: Exception) -> dict[str, Any]:
    return {"error": one_line(error)}


def _row(prediction: Any) -> dict[str, Any]:
    """Return the new columns of an image with prompts."""
    from .predictor.rle import as_rle, coco_box_of, runs_of

    masks, scores = prediction.masks, prediction.scores
    H, W = masks.shape[-2:]
    per_prompt = scores.shape[-1]
    runs = [runs_of(mask, (0, 0), (H, W)) for mask in masks.reshape(-1, H, W)]
    return {
        "masks": [as_rle(one, (H, W), compressed=True) for one in runs],
        "scores": scores.ravel(),
        "boxes": [coco_box_of(one, H) for one in runs],
        "areas": [int(one[1::2].sum()) for one in runs],
        "prompt_index": [i // per_prompt for i in range(len(runs))],
        "height": H,
        "width": W,
    }


def _row_of_everything(item: Any) -> dict[str, Any]:
    """Return the new columns of an image in everything-mode."""
    from .predictor.rle import coco_box_of_record

    image, records = item
    return {
        "masks": [record["segmentation"] for record in records],
        "scores": [record["predicted_iou"] for record in records],
        "boxes": [coco_box_of_record(record) for record in records],
        "areas": [record["area"] for record in records],
        "stability_scores": [record["stability_score"] for record in records],
        "points": [record["point_coords"][0] for record in records],
        "height": image.shape[0],
        "width": image.shape[1],
    }


def _without_pixels(table: pa.Table, name: str) -> pa.Table:
    """Remove the image column unless it holds paths. Of structs, keep the field `path`."""
    index = table.schema.get_field_index(name)
    column = table.column(index)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return table
    table = table.remove_column(index)
    if pa.types.is_struct(column.type) and column.type.get_field_index("path") >= 0:
        table = table.add_column(index, name, pc.struct_field(column, "path"))
    return table


def remaining(dataset: Dataset, written: str | os.PathLike[str], key: str, *, filesystem: Any = None) -> Dataset:
    """Return the rows of a dataset that are not in a folder of Parquet files yet, by a column that names them.

    Rows with an `error` count as written. A file that a killed job left without its end does not count: it is renamed
    to `<name>.partial`, which readers of Parquet skip. Therefore no other job may write to the folder meanwhile.

    Args:
        dataset: With the column `key`, whose values are unique.
        written: Folder of an earlier `write_parquet`, or one that does not exist yet. It is searched with subfolders.
        key: Column of both, such as "path".
        filesystem: `pyarrow.fs.FileSystem` of the folder; by default the one of its URI or the local one.

    Raises:
        ArgumentError: `written` is a file, or a file in it has no column `key`.
    """
    from pyarrow import fs, parquet

    folder = os.path.expanduser(os.fspath(written))
    if filesystem is None:
        filesystem, folder = fs.FileSystem.from_uri(folder if "://" in folder else os.path.abspath(folder))
    if filesystem.get_file_info(folder).type == fs.FileType.File:
        raise ArgumentError(f"{short_repr(folder)} is a file; give the folder that write_parquet wrote")
    found = []
    for info in filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True, recursive=True)):
        if info.type != fs.FileType.File or not info.path.endswith(".parquet"):
            continue
        try:
            with parquet.ParquetFile(info.path, filesystem=filesystem) as file:
                if key not in file.schema_arrow.names:
                    raise ArgumentError(f"{short_repr(info.path)} has no column {key!r}; name the one that it shares")
                found.append(file.read([key])[key])
        except pa.ArrowInvalid:  # no footer
            filesystem.move(info.path, f"{info.path}.partial")
    if not found:
        return dataset
    keys = pa.concat_arrays([chunk.cast(found[0].type) for column in found for chunk in column.chunks])
    reference = ray.put(keys)  # once per node, not once per task

    def left(table: pa.Table) -> pa.Table:
        known: Any = ray.get(reference)
        return table.filter(pc.invert(pc.is_in(table[key], value_set=known.cast(table[key].type))))

    return dataset.map_batches(left, batch_format="pyarrow")
