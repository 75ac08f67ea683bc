"""Images per second of the shapes world's renderer and verifier on one core.

python benchmarks/shapes_speed.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from flowalign import shapes
from flowalign.shapes.verifier import verify
from flowalign.shapes.world import render

NUM, ROUNDS = 512, 7


def images_per_second(work: Callable[[], object]) -> float:
    """Best of several rounds: what disturbs a measurement only ever slows it down."""
    work()
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return NUM / min(seconds)


def main() -> None:
    """Measure both."""
    torch.set_num_threads(1)
    records = shapes.prompts("train", seed=0)
    records = [records[i % len(records)] for i in range(NUM)]
    images = render(records, seed=0)
    print(f"renderer {images_per_second(lambda: render(records, seed=1)):>8.0f} images/s")
    print(f"verifier {images_per_second(lambda: verify(images, records)):>8.0f} images/s")


if __name__ == "__main__":
    main()
