"""The other side of a rising score: how far a tuned model has moved from real images and from its base's diversity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from flowalign.evaluate.fidelity import (
    RandomFeatures,
    features_of,
    kernel_distance,
    pixel_values,
    relative_diversity,
    within_prompt_distance,
    within_prompt_vendi,
)
from flowalign.evaluate.records import Evaluation
from flowalign.evaluate.scores import Interval
from flowalign.evaluate.statistics import bootstrap
from flowalign.evaluate.suites import ShapesSuite


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Fidelity and diversity of a base and a tuned model on the same prompts.

    Attributes:
        distance_base: Kernel distance of the base's images to real ones; lower is better.
        distance_tuned: The same for the tuned model.
        distance_control: The same for other real images: what 0 looks like with so few images.
        feature_diversity: Distance between images of one prompt in features, tuned relative to base; 1 is unchanged.
        pixel_diversity: The same in pixels.
        vendi: Effective number of different images of one prompt, tuned relative to base.
        pixels_base: Mean brightness, saturation and edge density of the base's images, as :class:`flowalign.evaluate.fidelity.PixelStatistics` has them.
        pixels_tuned: The same for the tuned model.
        pixels_reference: The same for real images.
    """

    distance_base: Interval
    distance_tuned: Interval
    distance_control: Interval
    feature_diversity: Interval
    pixel_diversity: Interval
    vendi: Interval
    pixels_base: Mapping[str, Interval]
    pixels_tuned: Mapping[str, Interval]
    pixels_reference: Mapping[str, Interval]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON wants it."""
        return asdict(self)

    def rows(self) -> list[list[str]]:
        """Return rows for a table with the columns ``COLUMNS``."""
        distances = (self.distance_base, self.distance_tuned, self.distance_control)
        rows = [["Kernel distance to real images, x 1000", *map(_thousandfold, distances), "lower is better"]]
        for name, interval in {
            "Diversity within a prompt, features": self.feature_diversity,
            "Diversity within a prompt, pixels": self.pixel_diversity,
            "Different images of a prompt (Vendi)": self.vendi,
        }.items():
            rows.append([name, "1", str(interval), "", "relative to base; 0 is collapse"])
        for name in self.pixels_base:
            values = [str(found[name]) for found in (self.pixels_base, self.pixels_tuned, self.pixels_reference)]
            rows.append([name.capitalize().replace("_", " "), *values, "near the real images"])
        return rows


def suite_drift(suite: ShapesSuite, base: Tensor, tuned: Evaluation) -> Drift:
    """Measure the drift of an evaluation from the base's images, against fresh real images of the suite's prompts."""
    assert tuned.images is not None
    ids = [record.id for record in tuned.records]
    return measure_drift(base, tuned.images, suite.reference(seed=1), suite.reference(seed=2), ids)


COLUMNS = ("Measure", "Base", "Tuned", "Real images", "How to read it")


def _thousandfold(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return f"{1000 * interval.mean:.2f} [no interval]"
    return f"{1000 * interval.mean:.2f} [{1000 * interval.low:.2f}, {1000 * interval.high:.2f}]"


def measure_drift(base: Tensor, tuned: Tensor, reference: Tensor, control: Tensor, prompt_id: Sequence[int], *, seed: int = 0) -> Drift:
    """Measure fidelity and diversity of two models against real images of the same prompts.

    Args:
        base: Images of the base, ``[image, 3, h, w]`` in [0, 1].
        tuned: Images of the tuned model, row i of the same prompt as row i of ``base``.
        reference: Real images of the same prompts, row by row.
        control: Other real images of the same prompts, row by row.
        prompt_id: The prompt of each row; at least 3 prompts, each with at least 2 images.
        seed: Seed of the feature network and of the bootstrap; distances are comparable for equal seeds only.

    Raises:
        ValueError: If there are too few prompts or images of a prompt, or sizes differ.
    """
    sizes = [len(images) for images in (base, tuned, reference, control)]
    if set(sizes) != {len(prompt_id)}:
        raise ValueError(f"needed as many base, tuned, reference and control images as prompt ids, got {sizes}, {len(prompt_id)}")
    network = RandomFeatures(seed=seed)
    of_base, of_tuned, of_reference, of_control = (features_of(images, network=network) for images in (base, tuned, reference, control))
    # Untrained features of any two images point nearly the same way; what they share says nothing about diversity.
    common = of_reference.mean(0)

    def relative(first: Tensor, second: Tensor) -> Interval:
        return relative_diversity(first, second, seed=seed)

    def pixels(images: Tensor) -> dict[str, Interval]:
        tags = ["all"] * len(prompt_id)
        return {name: bootstrap(values, prompt_id, tags, seed=seed).overall for name, values in pixel_values(images).items()}

    return Drift(
        distance_base=kernel_distance(of_base, of_reference, prompt_id),
        distance_tuned=kernel_distance(of_tuned, of_reference, prompt_id),
        distance_control=kernel_distance(of_control, of_reference, prompt_id),
        feature_diversity=relative(within_prompt_distance(of_base, prompt_id), within_prompt_distance(of_tuned, prompt_id)),
        pixel_diversity=relative(within_prompt_distance(base, prompt_id), within_prompt_distance(tuned, prompt_id)),
        vendi=relative(within_prompt_vendi(of_base - common, prompt_id), within_prompt_vendi(of_tuned - common, prompt_id)),
        pixels_base=pixels(base),
        pixels_tuned=pixels(tuned),
        pixels_reference=pixels(reference),
    )
