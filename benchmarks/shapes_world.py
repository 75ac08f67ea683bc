"""The shapes world, measured: speed of renderer and verifier on one core, and what the verifier says of images that are not clean renders.

python benchmarks/shapes_world.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from flowalign import shapes
from flowalign.shapes.verifier import verify
from flowalign.shapes.world import BACKGROUND, render

NUM, ROUNDS = 512, 7
NUM_PER_TAG = 2000
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def images_per_second(work: Callable[[], object]) -> float:
    """Best of several rounds: what disturbs a measurement only ever slows it down."""
    work()
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return NUM / min(seconds)


def speed() -> None:
    """Print images per second on one core."""
    torch.set_num_threads(1)
    records = shapes.prompts("train", seed=0)[:NUM]
    images = render(records, seed=0)
    print(f"renderer {images_per_second(lambda: render(records, seed=1)):>8.0f} images/s on one core")
    print(f"verifier {images_per_second(lambda: verify(images, records)):>8.0f} images/s on one core")


def disturbances() -> dict[str, Callable[[Tensor], Tensor]]:
    """Ways in which an image can fall short of a clean render."""
    generator = torch.Generator().manual_seed(0)
    pipe = shapes.pipeline()
    vae, scale = pipe.vae, pipe.vae.config.scaling_factor

    def noisy(images: Tensor, std: float) -> Tensor:
        return (images + std * torch.randn(images.shape, generator=generator)).clamp(0, 1)

    def faded(images: Tensor, share: float) -> Tensor:
        background = torch.as_tensor(BACKGROUND).expand(3)[:, None, None]
        return background + share * (images - background)

    @torch.no_grad()
    def half_finished(images: Tensor, sigma: float) -> Tensor:
        latents = vae.encode(images * 2 - 1).latent_dist.mode() * scale
        mixed = (1 - sigma) * latents + sigma * torch.randn(latents.shape, generator=generator)
        return (vae.decode(mixed / scale).sample / 2 + 0.5).clamp(0, 1)

    ways: dict[str, Callable[[Tensor], Tensor]] = {"clean": lambda images: images}
    ways |= {f"blur, std {std} px": lambda images, s=std: gaussian_blur(images, [7, 7], [s, s]) for std in (0.4, 0.6, 0.9, 1.2)}
    ways |= {f"noise, std {std}": lambda images, s=std: noisy(images, s) for std in (0.02, 0.05, 0.1)}
    ways |= {f"faded to {100 * share:.0f} %": lambda images, s=share: faded(images, s) for share in (0.9, 0.7, 0.5)}
    ways |= {f"latents at sigma {sigma}": lambda images, s=sigma: half_finished(images, s) for sigma in (0.0, 0.1, 0.25, 0.5)}
    return ways


def accuracy() -> None:
    """Print the share of images that pass, by tag."""
    torch.set_num_threads(2)
    everything = [*shapes.prompts("train", seed=0), *shapes.prompts("heldout", seed=0)]
    of_tag = {tag: [record for record in everything if record["tag"] == tag] for tag in TAGS}
    batches = {tag: [records[i % len(records)] for i in range(NUM_PER_TAG)] for tag, records in of_tag.items()}
    print(f"\nshare of {NUM_PER_TAG} renders of each tag that pass the strict check")
    print(f"{'':<24}" + "".join(f"{tag:>15}" for tag in TAGS))
    images = {tag: render(records, seed=number) for number, (tag, records) in enumerate(batches.items())}
    for name, disturb in disturbances().items():
        shares = []
        for tag, records in batches.items():
            disturbed = torch.cat([disturb(part) for part in images[tag].split(256)])
            shares.append(verify(disturbed, records).strict.double().mean().item())
        print(f"{name:<24}" + "".join(f"{share:>15.4f}" for share in shares))
    other = {tag: verify(images[tag], [records[-1], *records[:-1]]).strict.double().mean().item() for tag, records in batches.items()}
    print(f"{'of the previous prompt':<24}" + "".join(f"{share:>15.4f}" for share in other.values()))
    for name, picture in {"blank": torch.ones(NUM_PER_TAG, 3, 32, 32), "uniform noise": torch.rand(NUM_PER_TAG, 3, 32, 32)}.items():
        shares = [verify(picture, records).strict.double().mean().item() for records in batches.values()]
        print(f"{name:<24}" + "".join(f"{share:>15.4f}" for share in shares))


if __name__ == "__main__":
    speed()
    accuracy()
