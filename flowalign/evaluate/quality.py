"""Fidelity and diversity of an evaluation's images: one table of measures that no reward contains, each with what guards its reading."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any

from torch import Tensor

from flowalign.evaluate.distances import frechet_interval, two_sample_distance
from flowalign.evaluate.fidelity import kernel_distance, relative_diversity, within_prompt_distance, within_prompt_vendi
from flowalign.evaluate.neighbourhoods import manifold_intervals
from flowalign.evaluate.scores import Interval
from flowalign.evaluate.statistics import bootstrap

COLUMNS = ("Measure", "Other", "Model", "Real images", "How to read it")
_READ = {
    "kernel_distance": ("Kernel distance (KID) x 1000", "to real images; lower is better, 0 is no difference"),
    "frechet_distance": ("Frechet distance", "to real images; lower is better, but few images raise it"),
    "precision": ("Precision", "share of the images that lie among real ones"),
    "recall": ("Recall", "share of the real images that lie among these"),
    "density": ("Density", "how closely real images surround these; about 1 for real ones"),
    "coverage": ("Coverage", "share of the real images with one of these beside them"),
    "diversity": ("Diversity within a prompt", "mean distance of two images of a prompt, in features"),
    "vendi": ("Different images of a prompt (Vendi)", "effective number, from 1 to the images of a prompt"),
}
_ENOUGH = 10_000  # images from which a Frechet distance's bias is small beside usual differences
_FEW_PROMPTS = 10


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Real images by their features.

    Attributes:
        name: Where they come from.
        features: ``[reference, d]``.
        is_paired: Whether row i shows the prompt of the model's row i.
        control: Other real images, row by row of the same prompts: what a perfect model would measure with as many images.

    Shapes:
        control: ``[image, d]``.
    """

    name: str
    features: Tensor = field(repr=False)
    is_paired: bool = False
    control: Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Measures of one set of images; None where one cannot be computed, with the reason under its name in ``missing``."""

    num_images: int
    kernel_distance: Interval | None = None
    frechet_distance: Interval | None = None
    precision: Interval | None = None
    recall: Interval | None = None
    density: Interval | None = None
    coverage: Interval | None = None
    diversity: Interval | None = None
    vendi: Interval | None = None
    missing: Mapping[str, str] = field(default_factory=dict)


def measure_quality(features: Tensor, prompt_id: Sequence[int], reference: Reference | None) -> Quality:
    """Measure a set of images.

    Precision and recall are taken with 3 neighbours, density and coverage with 5, as published.

    Args:
        features: ``[image, d]``.
        prompt_id: The prompt of each row.
        reference: Real images; None for diversity alone.

    Raises:
        ValueError: If shapes do not fit.
    """
    if len(prompt_id) != len(features):
        raise ValueError(f"prompt_id: got {len(prompt_id)} for {len(features)} images, needed one each")
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}

    def put(names: Sequence[str], measure: Callable[[], Sequence[Any]]) -> None:
        try:
            found.update(zip(names, measure(), strict=True))
        except ValueError as error:
            missing.update(dict.fromkeys(names, str(error)))

    if reference is not None:
        real, distance = reference.features, kernel_distance if reference.is_paired else two_sample_distance
        if real.ndim != 2 or real.shape[1] != features.shape[1] or (reference.is_paired and len(real) != len(features)):
            raise ValueError(f"reference: got features {tuple(real.shape)} beside {tuple(features.shape)}")
        put(["kernel_distance"], lambda: [distance(features, real, prompt_id)])
        put(["frechet_distance"], lambda: [frechet_interval(features, real, prompt_id, is_paired=reference.is_paired)])
        for names, neighbours in ((("precision", "recall"), 3), (("density", "coverage"), 5)):
            kept = partial(manifold_intervals, features, real, prompt_id, neighbours=neighbours, is_paired=reference.is_paired)
            put(names, lambda n=names, found=kept: itemgetter(*n)(found()))
    put(["diversity"], lambda: [_over_prompts(within_prompt_distance(features, prompt_id))])
    # What all images share in features says nothing of diversity.
    common = features.mean(0) if reference is None else reference.features.mean(0)
    put(["vendi"], lambda: [_over_prompts(within_prompt_vendi(features - common, prompt_id))])
    return Quality(num_images=len(features), missing=missing, **found)


def _over_prompts(values: Tensor) -> Interval:
    return bootstrap(values, range(len(values)), ["all"] * len(values)).overall


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Fidelity and diversity of a model, beside another and beside real images.

    Attributes:
        extractor: Name of the feature extractor with its weights.
        resize: How images were brought to its size.
        reference: Where real images come from, and how many there are; None where there are none.
        model: The model.
        other: What it is compared with.
        real: Other real images of the same prompts.
        relative: Diversity of the model relative to the other, 1 is unchanged and 0 is collapse.
        cautions: What a reader must know of these numbers.
    """

    extractor: str
    resize: str
    reference: str | None
    model: Quality
    other: Quality | None
    real: Quality | None
    relative: Mapping[str, Interval]
    cautions: Sequence[str]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON wants it."""
        return asdict(self)

    def rows(self) -> list[list[str]]:
        """Return rows for a table with the columns ``COLUMNS``; columns of what is not there stay empty."""
        rows = []
        for name, (title, reading) in _READ.items():
            cells = ["" if found is None else _cell(found, name) for found in (self.other, self.model, self.real)]
            if any(cells):
                rows.append([title, *cells, reading])
        for name, interval in self.relative.items():
            rows.append([f"{_READ[name][0]}, relative", "1", str(interval), "", "to the other model; 1 is unchanged, 0 is collapse"])
        return rows

    def notes(self) -> list[str]:
        """Return what stands under the table: extractor, reference, cautions and what could not be measured."""
        head = f"Features: {self.extractor}, resize: {self.resize}; reference: {self.reference or 'none'}."
        left_out = [f"Not measured: {', '.join(names)} ({why})." for why, names in _by_reason(self.model.missing).items()]
        return [head, *self.cautions, *left_out]


def compare_quality(
    model: Tensor, prompt_id: Sequence[int], *, other: Tensor | None, reference: Reference | None, extractor: str, resize: str
) -> Comparison:
    """Measure a model's images, and those of what it is compared with.

    Args:
        model: Features ``[image, d]`` of the model's images.
        prompt_id: The prompt of each row.
        other: Features of another model's images of the same prompts, row by row.
        reference: Real images.
        extractor: What made the features.
        resize: How images were brought to its size.

    Raises:
        ValueError: If shapes do not fit.
    """
    if other is not None and other.shape != model.shape:
        raise ValueError(f"other: got features {tuple(other.shape)}, needed those of the model, {tuple(model.shape)}")
    control = None if reference is None else reference.control
    relative: dict[str, Interval] = {}
    if other is not None:
        common = (other if reference is None else reference.features).mean(0)
        for name, diversity in (("diversity", within_prompt_distance), ("vendi", within_prompt_vendi)):
            sets = (other, model) if name == "diversity" else (other - common, model - common)
            try:
                relative[name] = relative_diversity(*(diversity(rows, prompt_id) for rows in sets))
            except ValueError:
                continue  # the table says why where it stands
    found = measure_quality(model, prompt_id, reference)
    return Comparison(
        extractor=extractor,
        resize=resize,
        reference=None if reference is None else f"{reference.name}, {len(reference.features)} images",
        model=found,
        other=None if other is None else measure_quality(other, prompt_id, reference),
        real=None if control is None else measure_quality(control, prompt_id, reference),
        relative=relative,
        cautions=_cautions(found, len(set(prompt_id)), reference),
    )


def _cautions(found: Quality, num_prompts: int, reference: Reference | None) -> list[str]:
    said = ["Values belong to the extractor, its resize and the numbers of images: compare none across these."]
    if reference is not None:
        num, real = found.num_images, len(reference.features)
        if found.frechet_distance is not None and min(num, real) < _ENOUGH:
            said.append(
                f"Frechet distance: of {num} and {real} images it is biased upwards, by more than many differences that one looks for; the kernel distance is not."
            )
        said.append(
            "Intervals cover other prompts of these kinds, other noise and other real images (jackknife over prompts and real images); not the bias of few images."
        )
        if real != num:
            said.append(
                f"Precision, recall, density and coverage depend on the numbers of images, here {num} and {real}: compare like with like."
            )
    if num_prompts < _FEW_PROMPTS:
        said.append(f"Intervals are over {num_prompts} prompts: of fewer than {_FEW_PROMPTS} they are too narrow.")
    return said


def _by_reason(missing: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, why in missing.items():
        found.setdefault(why, []).append(_READ[name][0])
    return found


def _cell(found: Quality, name: str) -> str:
    value: Interval | None = vars(found)[name]
    if value is None:
        return ""
    if name != "kernel_distance" or value.low is None or value.high is None:
        return str(value)
    return f"{1000 * value.mean:.2f} [{1000 * value.low:.2f}, {1000 * value.high:.2f}]"
