"""Images per second of two Ray actors with one core each, beside the plain loop in one process.

    python -m benchmarks.speed.ray_throughput [--images 1000] [--repeats 2] [--out FILE.json]

The images are generated JPEGs of 160 x 120, each with one box, for the bundled model. In each repeat the candidates
take turns on another part of the images: `predict_images` with PyTorch's default threads, with one thread, and
`fastsam_rwkv.ray.segment`. Ray's time includes the start of its actors, which load PyTorch and the model. A second row
has the time from its first result to the last, for the images after the first. The rows of Ray are compared with
those of both loops. Ray's processes get the niceness of this one; Ray's default is 15.
"""

from __future__ import annotations

import io
import os
import time
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image

from benchmarks.speed.timing import cpu_parser, ratio, report
from fastsam_rwkv import RWKVSAM, Predictor
from fastsam_rwkv.predictor.rle import mask_of, runs_of
from fastsam_rwkv.ray import segment

BATCH = 8


def generated(number: int) -> dict[str, Any]:
    """Return a JPEG of a bright ellipse on noise, and a box around it."""
    generator = np.random.default_rng(number)
    y, x = np.mgrid[:120, :160]
    cx, cy, rx, ry = generator.uniform((50, 40, 15, 12), (110, 80, 40, 30))
    array = generator.integers(0, 90, (120, 160, 3), np.uint8)
    array[((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1] += 130
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "JPEG")
    return {"number": number, "image": stream.getvalue(), "box": [cx - rx, cy - ry, cx + rx, cy + ry]}


def in_a_loop(predictor: Predictor, rows: list[dict[str, Any]], threads: int) -> tuple[float, dict[int, np.ndarray]]:
    """Return the seconds of the plain loop, and the run lengths of each image's mask."""
    torch.set_num_threads(threads)
    start, found = time.perf_counter(), {}
    results = predictor.predict_images([row["image"] for row in rows], [{"box": row["box"]} for row in rows])
    for row, prediction in zip(rows, results, strict=True):
        mask = prediction.masks[0]
        found[row["number"]] = runs_of(mask, (0, 0), mask.shape)
    return time.perf_counter() - start, found


def with_ray(rows: list[dict[str, Any]]) -> tuple[float, float, dict[int, dict[str, Any]]]:
    """Return the seconds of the job, those per image after the first result, and the rows."""
    start = time.perf_counter()
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows) // BATCH)
    dataset.context.enable_progress_bars = False
    done = segment(dataset, prompts={"box": "box"}, concurrency=2, num_cpus=0.5, batch_size=BATCH)
    found: dict[int, dict[str, Any]] = {}
    first = early = 0.0
    for batch in done.iter_batches(batch_size=None, batch_format="pyarrow"):
        found |= {row["number"]: row for row in batch.to_pylist()}
        if not first:
            first, early = time.perf_counter(), len(found)
    end = time.perf_counter()
    return end - start, (end - first) / (len(rows) - early), found


def agreement(rows: dict[int, dict[str, Any]], loop: dict[int, np.ndarray]) -> float:
    """Return the share of images whose mask is the same in both; fail if one is missing."""
    from pycocotools import mask as coco

    assert rows.keys() == loop.keys() and all(row["error"] is None for row in rows.values())
    same = [np.array_equal(coco.decode(rows[i]["masks"][0]), mask_of(runs, (120, 160))) for i, runs in loop.items()]
    return sum(same) / len(same)


def main(arguments: list[str] | None = None) -> None:
    parser = cpu_parser(__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.set_defaults(repeats=2)
    options = parser.parse_args(arguments)
    per_round = options.images // options.repeats
    threads = torch.get_num_threads()
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # spelled as Ray reads it
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
    predictor = Predictor(RWKVSAM.from_pretrained(dtype="auto"))
    options.image_size = predictor.image_size
    in_a_loop(predictor, [generated(i) for i in range(3)], threads)  # does not count
    all_threads, one_thread = f"loop, {threads} threads", "loop, 1 thread"
    whole, steady = "Ray, 2 actors, with their start", "Ray, 2 actors, after the first result"
    seconds: dict[str, list[float]] = {name: [] for name in (all_threads, one_thread, whole, steady)}
    same = []
    for turn in range(options.repeats):
        rows = [generated(1000 + turn * per_round + i) for i in range(per_round)]
        seconds[all_threads].append(in_a_loop(predictor, rows, threads)[0] / per_round)
        taken, loop = in_a_loop(predictor, rows, 1)
        seconds[one_thread].append(taken / per_round)
        taken, later, found = with_ray(rows)
        seconds[whole].append(taken / per_round)
        seconds[steady].append(later)
        same.append(agreement(found, loop))
    torch.set_num_threads(threads)
    ray.shutdown()
    compared = [ratio(seconds, loop, name, 1.6) for loop in (all_threads, one_thread) for name in (whole, steady)]
    more = {"images": per_round * options.repeats, "unit": "seconds per image", "ray": ray.__version__}
    report(options, seconds, compared, dtype=str(predictor.model.dtype), same_masks=min(same), **more)


if __name__ == "__main__":
    main()
