"""`AutomaticMaskGenerator`: masks of everything in an image, from a grid of clicks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, overload

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError, short_repr
from ..modeling.rwkv_sam import RWKVSAM
from ..triton_kernels.operator import why_no_kernels
from .background import in_background
from .boxes import keep_apart, near_edge
from .frame import ImageFrame
from .image_io import ImageLike, load_image, resize_image
from .resizing import MaskResizer
from .rle import as_rle, box_of, mask_of, runs_of, scipy_ndimage, without_small_regions
from .streams import UNUSABLE, check_errors, of_image, raised
from .torch_predictor import Predictor

OutputMode = Literal["binary_mask", "uncompressed_rle", "coco_rle"]
RankBy = Literal["predicted_iou", "stability_score"]

EDGE = 20  # pixels: masks of a crop that come closer to its edge are cut off, as in SAM
UNSURE = 0.02  # stability scores at low resolution that are this close to the threshold are computed in full
BYTES_PER_VALUE = 24  # of the decoder's temporary maps, per value of the image embedding of one prompt


@dataclass
class _Candidates:
    """Masks of one crop or of the image: low-resolution logits on the device, the rest on the CPU.

    Attributes:
        low: M times `[h, w]` logits, each with memory of its own, so that dropped ones free it.
        scores: `[M]`, predicted IoUs.
        stability: `[M]`.
        points: `[M, 2]` (x, y), the click in the image frame.
        boxes: `[M, 4]` (x1, y1, x2, y2) in the image frame, exclusive.
        resizers: `[M]`, of the crop of each; they hold its frame.
    """

    low: list[Tensor]
    scores: np.ndarray
    stability: np.ndarray
    points: np.ndarray
    boxes: np.ndarray
    resizers: list[MaskResizer]

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, rows: np.ndarray) -> _Candidates:
        scores, stability, points, boxes = (a[rows] for a in (self.scores, self.stability, self.points, self.boxes))
        return _Candidates(
            [self.low[i] for i in rows], scores, stability, points, boxes, [self.resizers[i] for i in rows]
        )

    @classmethod
    def joined(cls, parts: Sequence[_Candidates]) -> _Candidates:
        """Return the candidates of all parts, in order."""
        scores, stability, points, boxes = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("scores", "stability", "points", "boxes")
        )
        low, resizers = [t for part in parts for t in part.low], [r for part in parts for r in part.resizers]
        return cls(low, scores, stability, points, boxes, resizers)


_Searched = tuple[np.ndarray, _Candidates]


class AutomaticMaskGenerator:
    """Masks of everything in an image, with the parameters and records of segment-anything's generator.

    A grid of clicks is decoded in batches. A click gives three masks, or one if the model has one. Scores, stability,
    boxes and duplicates are decided at low resolution; only the survivors are brought to the size of the image. Threads
    may share a generator.

    Args:
        model: The model, or a `Predictor` of it.
        points_per_side: Clicks per side of the grid; None if `point_grids` is given.
        points_per_batch: Most clicks that are decoded together. Fewer are if `memory` would not suffice.
        pred_iou_thresh: Masks with a predicted IoU of at most this are dropped. By default the model's own threshold,
            `model.config.pred_iou_thresh`. SAM's is 0.88.
        stability_score_thresh: Masks with a stability score below this are dropped. By default
            `model.config.stability_score_thresh`. SAM's is 0.95.
        stability_score_offset: The stability score is the IoU of the masks at logits +offset and -offset.
        box_nms_thresh: Of two masks of a crop whose boxes have a larger IoU, the worse one is dropped.
        crop_n_layers: Layers of crops that are searched, too; layer i has 4^(i + 1) crops.
        crop_nms_thresh: As `box_nms_thresh` between crops; masks of smaller crops come first.
        crop_overlap_ratio: Overlap of the crops of the first layer, as a part of the image's shorter side.
        crop_n_points_downscale_factor: The grid of layer i has points_per_side / factor^i clicks per side.
        point_grids: Grids of clicks `[P, 2]` (x, y) in 0..1 instead, one for the image and one per layer.
        min_mask_region_area: Holes and separate regions of fewer pixels are removed (needs scipy).
        output_mode: Segmentation as bool `[H, W]`, as run lengths, or as COCO's string of them.
        rank_by: What duplicates are ranked by. "stability_score" ignores predicted IoUs altogether, for models whose
            quality head is untrained.
        memory: Bytes that the decoder's temporary maps may take.

    Raises:
        ArgumentError: A value is out of range, or both or neither of `points_per_side` and `point_grids` are given.

    Source: parameters and records of segment-anything's `SamAutomaticMaskGenerator`.
    """

    def __init__(
        self,
        model: RWKVSAM | Predictor,
        points_per_side: int | None = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float | None = None,
        stability_score_thresh: float | None = None,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        point_grids: Sequence[np.ndarray] | None = None,
        min_mask_region_area: int = 0,
        output_mode: OutputMode = "binary_mask",
        *,
        rank_by: RankBy = "predicted_iou",
        memory: int = 256 << 20,
    ) -> None:
        if (points_per_side is None) == (point_grids is None):
            raise ArgumentError("give exactly one of points_per_side and point_grids")
        for name, value, choices in (
            ("output_mode", output_mode, get_args(OutputMode)),
            ("rank_by", rank_by, get_args(RankBy)),
        ):
            if value not in choices:
                raise ArgumentError(f"{name} must be one of {', '.join(choices)}, got {short_repr(value)}")
        for name, number, least in (
            ("points_per_batch", points_per_batch, 1),
            ("memory", memory, 1),
            ("crop_n_layers", crop_n_layers, 0),
            ("min_mask_region_area", min_mask_region_area, 0),
        ):
            if number < least:
                raise ArgumentError(f"{name} must be at least {least}, got {short_repr(number)}")
        if min_mask_region_area > 0:
            scipy_ndimage()  # raises now rather than after the work
        self.predictor = model if isinstance(model, Predictor) else Predictor(model)
        layers = range(crop_n_layers + 1)
        if point_grids is None:
            assert points_per_side is not None
            self.point_grids = [_grid(int(points_per_side / crop_n_points_downscale_factor**i)) for i in layers]
        else:
            self.point_grids = [np.asarray(grid, np.float64).reshape(-1, 2) for grid in point_grids]
        if len(self.point_grids) < len(layers) or any(len(grid) == 0 for grid in self.point_grids):
            raise ArgumentError(f"{len(layers)} grids with at least one point are needed, one for each layer of crops")
        self.points_per_batch = points_per_batch
        config = self.predictor.model.config
        self.pred_iou_thresh = config.pred_iou_thresh if pred_iou_thresh is None else pred_iou_thresh
        self.stability_score_thresh = (
            config.stability_score_thresh if stability_score_thresh is None else stability_score_thresh
        )
        self.stability_score_offset = stability_score_offset
        self.box_nms_thresh, self.crop_nms_thresh = box_nms_thresh, crop_nms_thresh
        self.crop_n_layers, self.crop_overlap_ratio = crop_n_layers, crop_overlap_ratio
        self.min_mask_region_area, self.output_mode = min_mask_region_area, output_mode
        self.rank_by, self.memory = rank_by, memory

    def generate(self, image: ImageLike) -> list[dict[str, Any]]:
        """Return a record for each mask, the best first.

        Args:
            image: uint8 array `[H, W, 3]` RGB, PIL image, path, or bytes of a file.

        Returns:
            Dicts with SAM's keys: `segmentation` (see `output_mode`), `area` in pixels, `bbox` and `crop_box` (x, y,
            width, height), `predicted_iou`, `stability_score`, and `point_coords`, a list of the click (x, y).
            As in SAM, the width of a box is the difference of its last and first column.

        Raises:
            ImageError, TypeError, FileNotFoundError: An image that cannot be used.
        """
        return list(self.records(image))

    def records(self, image: ImageLike) -> Iterator[dict[str, Any]]:
        """Search an image now, and return an iterator over the records of `generate`, which are made one by one.

        Raises:
            ImageError, TypeError, FileNotFoundError: An image that cannot be used.
        """
        array = load_image(image)
        return self._records(self._search(array), (array.shape[0], array.shape[1]))

    @overload
    def generate_images(
        self, images: Iterable[ImageLike], *, errors: Literal["raise"] = "raise"
    ) -> Iterator[list[dict[str, Any]]]: ...

    @overload
    def generate_images(
        self, images: Iterable[ImageLike], *, errors: Literal["return"]
    ) -> Iterator[list[dict[str, Any]] | Exception]: ...

    def generate_images(
        self, images: Iterable[ImageLike], *, errors: Literal["raise", "return"] = "raise"
    ) -> Iterator[list[dict[str, Any]]] | Iterator[list[dict[str, Any]] | Exception]:
        """Yield the records of each image, in order. Images may come one by one from an iterator.

        Images are read, and masks are brought to their size, in background threads while the model works on others.

        Args:
            images: Images of any sizes, each as in `generate`.
            errors: "raise" raises the error of the first image that cannot be used, after the records of all images
                before it. "return" yields the error as a value and goes on.

        Raises:
            ImageError, TypeError, FileNotFoundError: An image that cannot be used. The message begins with
                `images[i]`.
        """
        check_errors(errors)
        found = (item if isinstance(item, Exception) else item[1] for item in self.stream(images))
        return raised(found) if errors == "raise" else found

    def stream(self, images: Iterable[ImageLike]) -> Iterator[tuple[np.ndarray, list[dict[str, Any]]] | Exception]:
        """Yield each image as an array `[H, W, 3]` and its records, or the error of an image that cannot be used."""

        def finished(item: _Searched | Exception) -> tuple[np.ndarray, list[dict[str, Any]]] | Exception:
            if isinstance(item, Exception):
                return item
            image, candidates = item
            return image, list(self._records(candidates, (image.shape[0], image.shape[1])))

        read = in_background(_read, enumerate(images), prefetch=True)
        searched = (item if isinstance(item, Exception) else (item, self._search(item)) for item in read)
        return in_background(self.predictor.in_callers_stream(finished), searched)

    def before_batch(self) -> None:
        """Do nothing, before each batch of clicks. A subclass may raise an exception to end a search."""

    @torch.inference_mode()
    def _search(self, image: np.ndarray) -> _Candidates:
        """Return the masks that survive, the best first. Runs the model."""
        size = (image.shape[0], image.shape[1])
        found = [self._of_crop(image, frame, self.point_grids[layer]) for layer, frame in self._crops(size)]
        candidates = _Candidates.joined(found)
        if len(found) > 1:
            areas = np.array([math.prod(resizer.frame.original_size) for resizer in candidates.resizers], np.float64)
            candidates = candidates[keep_apart(candidates.boxes, 1 / areas, self.crop_nms_thresh)]
        return candidates[np.argsort(-self._ranks(candidates), kind="stable")]

    @torch.inference_mode()
    def _records(self, candidates: _Candidates, size: tuple[int, int]) -> Iterator[dict[str, Any]]:
        """Bring masks to the size of the image."""
        for i, runs, box in self._finished(candidates, size):
            yield self._record(candidates, i, runs, box, size)

    def _ranks(self, candidates: _Candidates) -> np.ndarray:
        return candidates.scores if self.rank_by == "predicted_iou" else candidates.stability

    def _crops(self, size: tuple[int, int]) -> Iterator[tuple[int, ImageFrame]]:
        """Yield the layer and the frame of each crop, the whole image first."""
        H, W = size
        image_size = self.predictor.image_size
        yield 0, ImageFrame.of(size, image_size)
        for layer in range(1, self.crop_n_layers + 1):
            number = 2**layer
            overlap = int(self.crop_overlap_ratio * min(H, W) * (2 / number))
            height, width = (math.ceil((overlap * (number - 1) + side) / number) for side in (H, W))
            for column in range(number):
                for row in range(number):
                    x, y = (width - overlap) * column, (height - overlap) * row
                    yield layer, ImageFrame.of((min(height, H - y), min(width, W - x)), image_size, (x, y))

    def _of_crop(self, image: np.ndarray, frame: ImageFrame, grid: np.ndarray) -> _Candidates:
        """Search one crop, and drop duplicates in it."""
        predictor = self.predictor
        model = predictor.model
        H, W = frame.original_size
        pixels, _ = resize_image(image[frame.pixels], predictor.image_size)
        embedding = predictor.embed(pixels, frame)
        points = grid * [W, H] + frame.offset
        resizer = MaskResizer(frame, predictor.device)
        values = embedding.image_embed.numel()
        batch = max(1, min(self.points_per_batch, self.memory // (BYTES_PER_VALUE * values)))
        parts: list[_Candidates] = []
        first = 0
        while first < len(points):
            self.before_batch()
            chunk = points[first : first + batch]
            coords = torch.from_numpy(frame.points_to_input(chunk)[:, None]).to(predictor.device, torch.float32)
            labels = torch.ones(len(chunk), 1, dtype=torch.long, device=predictor.device)
            try:
                low, iou = model.decode_where(embedding, coords, labels, self._promising, predictor.has_multimask)
            except torch.OutOfMemoryError:
                if len(chunk) == 1:
                    raise
                batch = -(-len(chunk) // 2)
                continue
            parts.append(self._good(low.float(), iou.float(), chunk, resizer))
            first += len(chunk)
        candidates = _Candidates.joined(parts)
        cut_off = near_edge(candidates.boxes, frame, (image.shape[0], image.shape[1]), EDGE)
        candidates = candidates[np.flatnonzero(~cut_off)]
        return candidates[keep_apart(candidates.boxes, self._ranks(candidates), self.box_nms_thresh)]

    def _promising(self, iou: Tensor) -> Tensor:
        return self._above(iou).any(1)

    def _above(self, iou: Tensor) -> Tensor:
        unused = self.rank_by == "stability_score" or self.pred_iou_thresh <= 0  # 0 takes all, as in SAM
        return iou.float() > (-math.inf if unused else self.pred_iou_thresh)

    def _good(self, low: Tensor, iou: Tensor, points: np.ndarray, resizer: MaskResizer) -> _Candidates:
        """Return the masks of a batch of clicks that pass the thresholds. `low` lacks the clicks without any."""
        kept = self._promising(iou).nonzero()[:, 0]
        above = self._above(iou[kept])
        rows, _ = above.nonzero(as_tuple=True)
        low, scores = low[above], iou[kept][above]
        clicks = points[kept[rows].cpu().numpy()]
        stability, unsure = resizer.stability(low, self.stability_score_offset, self.stability_score_thresh, UNSURE)
        for i in unsure.nonzero()[:, 0].tolist():
            stability[i] = resizer.exact_stability(low[i], self.stability_score_offset)
        index, boxes = [], []
        for i in (stability >= self.stability_score_thresh).nonzero()[:, 0].tolist():
            box = resizer.box(low[i])
            if box is not None:
                index.append(i)
                boxes.append(box)
        at = torch.tensor(index, dtype=torch.long, device=low.device)
        return _Candidates(
            [low[i].clone() for i in index],
            scores[at].cpu().numpy(),
            stability[at].cpu().numpy(),
            clicks[index],
            np.array(boxes, np.int64).reshape(-1, 4) + np.tile(resizer.frame.offset, 2),
            [resizer] * len(index),
        )

    def _finished(self, candidates: _Candidates, size: tuple[int, int]) -> Iterator[tuple[int, np.ndarray, list[int]]]:
        """Bring masks to the size of the image. Yield the candidate, its run lengths and its box, last pixels included.

        If small regions were removed, duplicates are dropped again, and masks that did not change come first.
        """
        found: list[tuple[int, np.ndarray]] = []
        boxes: list[list[int]] = []
        changed: list[bool] = []
        for i, (runs, was_changed) in enumerate(self._runs(candidates, size)):
            box = box_of(runs, size[0])
            if box is not None:
                boxes.append(box)
                found.append((i, runs))
                changed.append(was_changed)
        order: Iterable[int] = range(len(found))
        if any(changed):
            threshold = max(self.box_nms_thresh, self.crop_nms_thresh)
            order = sorted(keep_apart(np.array(boxes) + [0, 0, 1, 1], -np.array(changed, np.float64), threshold))
        for n in order:
            yield *found[n], boxes[n]

    def _without_maps(self) -> bool:
        """True if `mask_edges` is to find the run lengths: on a GPU, unless small regions are to be removed."""
        return self.predictor.device.type == "cuda" and not self.min_mask_region_area and not why_no_kernels()

    def _runs(self, candidates: _Candidates, size: tuple[int, int]) -> Iterator[tuple[np.ndarray, bool]]:
        """Yield the run lengths of each mask, and whether small regions were removed."""
        pairs = list(zip(candidates.resizers, candidates.low, strict=True))
        if self._without_maps():
            for resizer, group in itertools.groupby(pairs, lambda pair: pair[0]):
                yield from ((runs, False) for runs in resizer.runs([low for _, low in group], size))
            return
        for resizer, low in pairs:
            whole, (top, left) = resizer.mask(low)
            window = whole
            if self.min_mask_region_area > 0:
                window = without_small_regions(whole, self.min_mask_region_area)
            corner = top + resizer.frame.offset[1], left + resizer.frame.offset[0]
            yield runs_of(window, corner, size), not np.array_equal(window, whole)

    def _record(
        self, candidates: _Candidates, i: int, runs: np.ndarray, box: list[int], size: tuple[int, int]
    ) -> dict[str, Any]:
        frame = candidates.resizers[i].frame
        if self.output_mode == "binary_mask":
            segmentation: Any = mask_of(runs, size)
        else:
            segmentation = as_rle(runs, size, compressed=self.output_mode == "coco_rle")
        return {
            "segmentation": segmentation,
            "area": int(runs[1::2].sum()),
            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
            "predicted_iou": float(candidates.scores[i]),
            "point_coords": [candidates.points[i].tolist()],
            "stability_score": float(candidates.stability[i]),
            "crop_box": [*frame.offset, *frame.original_size[::-1]],
        }


SamAutomaticMaskGenerator = AutomaticMaskGenerator


def _read(numbered: tuple[int, ImageLike]) -> np.ndarray | Exception:
    number, image = numbered
    try:
        return load_image(image)
    except UNUSABLE as error:
        return of_image(number, error)


def _grid(side: int) -> np.ndarray:
    """Return a grid of side x side points `[P, 2]` (x, y) in 0..1, row by row, at the centers of equal cells."""
    places = (np.arange(side) + 0.5) / side
    return np.stack(np.meshgrid(places, places), axis=-1).reshape(-1, 2)
