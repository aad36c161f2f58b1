"""One model in many threads, and many predictions: `python -m tests.endurance` compares bits and memory.

`--threads` times `--predictions` predictions of the bundled model must equal serial ones bit for bit. Then `--repeats`
predictions in one thread must leave the resident size within 2 % of that after a tenth of them.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fastsam_rwkv import Predictor, load_image

COFFEE = Path(__file__).parents[1] / "examples" / "coffee.jpg"


def prompts(count: int, size: tuple[int, int]) -> list[dict[str, object]]:
    """Return clicks and boxes in an image of `size` (H, W), the same every time."""
    generator = np.random.default_rng(0)
    H, W = size
    made: list[dict[str, object]] = []
    for n in range(count):
        x, y = generator.uniform(1, W / 2), generator.uniform(1, H / 2)
        box = [x, y, x + generator.uniform(9, W / 2), y + generator.uniform(9, H / 2)]
        made.append({"box": box} if n % 2 else {"point_coords": [[x, y]], "multimask_output": bool(n % 4)})
    return made


def same_in_threads(predictor: Predictor, image: np.ndarray, threads: int, predictions: int) -> int:
    """Return how many of threads x predictions results differ from serial ones. All share the predictor."""
    given = prompts(predictions, image.shape[:2])
    serial = [predictor.predict_image(image, **prompt) for prompt in given]  # type: ignore[arg-type]

    def differs(n: int) -> bool:
        found, want = predictor.predict_image(image, **given[n]), serial[n]  # type: ignore[arg-type]
        return not all(np.array_equal(a, b) for a, b in zip(found, want, strict=True))

    rows = np.random.default_rng(1).permutation(np.tile(np.arange(predictions), threads)).tolist()
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(differs, rows))


def resident() -> int:
    """Return the resident size of this process in bytes (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--predictions", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=2000)
    args = parser.parse_args()
    predictor, image = Predictor(), load_image(COFFEE)
    started = time.perf_counter()
    different = same_in_threads(predictor, image, args.threads, args.predictions)
    total = args.threads * args.predictions
    print(f"{different} of {total} predictions in {args.threads} threads differ, {time.perf_counter() - started:.0f} s")
    predictor.set_image(image)
    sizes = []
    for n, prompt in enumerate(prompts(args.repeats, image.shape[:2])):
        predictor.predict(**prompt)  # type: ignore[arg-type]
        if n % max(1, args.repeats // 10) == 0:
            sizes.append(resident())
    growth = sizes[-1] / sizes[1] - 1
    print(f"resident MiB: {', '.join(f'{size / 2**20:.0f}' for size in sizes)}; growth {growth:.1%}")
    if different or growth > 0.02:
        sys.exit(1)


if __name__ == "__main__":
    main()
