"""Throughput of what scores on a CPU, and what it costs to send an image to a reward server.

    python -m benchmarks.rewards --threads 1

Wall and CPU time, best and median of several rounds: on a machine that others use the best is nearer to what the code costs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as transform

from flowalign import shapes
from flowalign.env import hardware
from flowalign.evaluate import monitors
from flowalign.rewards import jpeg_size, ocr, pixels, wire
from flowalign.rewards.shapes import Config as Verifier

ENCODING_LIMIT_MS = 1.0  # of CPU time for an image of 512 pixels; above it the command fails
_ROUNDS = 7


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds an image."""

    wall_best: float
    wall_median: float
    cpu_best: float


def timed(work: Callable[[], object], images: int) -> Timing:
    """Time some rounds of work on so many images, after one that warms up."""
    work()
    wall, cpu = [], []
    for _ in range(_ROUNDS):
        began = time.perf_counter(), time.process_time()
        work()
        wall.append(1000 * (time.perf_counter() - began[0]) / images)
        cpu.append(1000 * (time.process_time() - began[1]) / images)
    return Timing(wall_best=min(wall), wall_median=statistics.median(wall), cpu_best=min(cpu))


def words(num: int, size: int) -> tuple[Tensor, list[str]]:
    """Render a word into each of ``num`` images, ``[num, 3, size, size]``."""
    texts = ["FLOW", "ALIGN", "REWARD", "SCORE", "PAPER", "RIVER", "STONE", "CLOUD"]
    chosen = [texts[i % len(texts)] for i in range(num)]
    made = []
    for text in chosen:
        picture = Image.new("RGB", (size, size), "white")
        ImageDraw.Draw(picture).text((size // 16, size // 3), text, fill="black", font=ImageFont.load_default(size=size // 6))
        made.append(transform.pil_to_tensor(picture).float() / 255)
    return torch.stack(made), chosen


def encoding(num: int, size: int) -> Callable[[], tuple[bytes, memoryview]]:
    """Return what a client does for a request before it is sent: round to bytes, and write what stands before them."""
    images = torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(0))

    def work() -> tuple[bytes, memoryview]:
        request = wire.Request(
            request_id="0" * 32,
            images=pixels.to_bytes_checked(images),
            prompts=["a"] * num,
            metadata=[{}] * num,
            rewards=(),
            deadline_s=60.0,
        )
        return wire.parts(request)

    return work


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, Timing] = {}
    records = shapes.prompts("train", seed=0, num=512)
    renders, texts = shapes.render(records, 0), [record["prompt"] for record in records]
    verifier = Verifier().build()
    found["shapes verifier, 32 px"] = timed(lambda: verifier(renders, texts, records), len(records))
    photos = torch.rand(16, 3, 512, 512, generator=torch.Generator().manual_seed(0))
    size = jpeg_size.Config().build()
    found["jpeg_size, 512 px of noise"] = timed(lambda: size(photos, ["a"] * 16, [{}] * 16), 16)
    found["monitors of a step, 512 px"] = timed(lambda: monitors.features(photos), 16)
    sending = timed(encoding(16, 512), 16)
    found["server: encoding a request, 512 px"] = sending
    body = b"".join(encoding(16, 512)())
    found["server: decoding a request, 512 px"] = timed(lambda: wire.decode(body, wire.Limits()), 16)
    try:
        reader = ocr.Config().build()
    except ImportError as error:
        print(f"ocr: not measured ({error})")
    else:
        for side in (128, 512):
            images, shown = words(8, side)
            prompts = [f'a sign that says "{text}"' for text in shown]
            score = reader(images, prompts, [{} for _ in shown])
            mean = float(torch.as_tensor(next(iter(score.values.values())) if not isinstance(score, Tensor) else score).mean())
            found[f"ocr (RapidOCR), {side} px, mean score {mean:.2f}"] = timed(
                lambda i=images, p=prompts: reader(i, p, [{} for _ in p]), len(shown)
            )
    print(f"{options.threads} torch threads; {hardware()}")
    print(f"{'':<44}{'wall, best':>12}{'wall, median':>14}{'CPU, best':>12}{'images/s':>10}")
    for name, timing in found.items():
        print(
            f"{name:<44}{timing.wall_best:>9.3f} ms{timing.wall_median:>11.3f} ms{timing.cpu_best:>9.3f} ms{1000 / timing.wall_best:>10.0f}"
        )
    if sending.cpu_best > ENCODING_LIMIT_MS:
        raise SystemExit(f"encoding takes {sending.cpu_best:.2f} ms of CPU time for an image, more than {ENCODING_LIMIT_MS:g}")


if __name__ == "__main__":
    main()
