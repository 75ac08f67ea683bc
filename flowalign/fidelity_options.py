"""What the command line says of fidelity and diversity, turned into an extractor and real images; refused before anything is generated."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from flowalign.config import ConfigError
from flowalign.evaluate.extractors import RANDOM, Extractor, Folder, encoder, of_network, random_features
from flowalign.evaluate.quality import Comparison, Reference, compare_quality
from flowalign.evaluate.records import Evaluation
from flowalign.evaluate.suites import ShapesSuite, Suite

_LEAST_IMAGES, _LEAST_PROMPTS = 6, 3  # density and coverage look at 5 neighbours; a distance with an interval takes 3 prompts


@dataclass(frozen=True, kw_only=True)
class Ruler:
    """How an evaluation's fidelity and diversity are measured: ``reference`` is None where there are no real images."""

    extractor: Extractor
    reference: Reference | None

    def features(self, found: Evaluation) -> Tensor:
        """Return the features of an evaluation that holds its images."""
        assert found.images is not None
        return self.extractor.features(found.images)

    def compare(self, tuned: Evaluation, base: Tensor | None) -> Comparison:
        """Measure what an evaluation has made, beside the features of another's images in the same order."""
        return compare_quality(
            self.features(tuned),
            [record.id for record in tuned.records],
            other=base,
            reference=self.reference,
            extractor=self.extractor.name,
            resize=self.extractor.resize,
        )


def ruler(suite: Suite, *, folder: Path | None, extractor: str | None, image_size: tuple[int, int]) -> Ruler | None:
    """Build what measures fidelity and diversity.

    Args:
        suite: Its prompts are those of the model's images. The shapes suite brings real images of its own.
        folder: Real images; None for those of the suite, if it has any.
        extractor: "random", folder or hub id of an image encoder, or ``my_module.my_function``, which returns a network; None for "random".
        image_size: Height and width of the model's images.

    Returns:
        None where nothing was asked for and the suite has no real images.

    Raises:
        ConfigError: If there are too few images or prompts, or real images of another size than the extractor could compare.
        FileNotFoundError: If the folder or an encoder's weights are not there.
    """
    is_shapes = isinstance(suite, ShapesSuite)
    if folder is None and extractor is None and not is_shapes:
        return None
    if folder is not None:
        _check_numbers(suite, folder)
    chosen = extractor_of(extractor or RANDOM)
    if folder is not None:
        return Ruler(extractor=chosen, reference=_of_folder(folder, chosen, image_size))
    if isinstance(suite, ShapesSuite):
        real, control = (chosen.features(suite.reference(seed=seed)) for seed in (1, 2))
        return Ruler(
            extractor=chosen, reference=Reference(name="renders of the same prompts", features=real, is_paired=True, control=control)
        )
    return Ruler(extractor=chosen, reference=None)


def extractor_of(name: str) -> Extractor:
    """Build an extractor by what the command line says.

    Raises:
        ConfigError: If a module of the user's own has no such function, or it returns no network.
        FileNotFoundError: If an encoder's weights are not there.
    """
    if name == RANDOM:
        return random_features()
    parent, _, last = name.rpartition(".")
    if "/" in name or not parent or Path(name).expanduser().exists():
        return encoder(name)
    try:
        is_module = importlib.util.find_spec(parent) is not None
    except ModuleNotFoundError:
        is_module = False
    function = vars(importlib.import_module(parent)).get(last) if is_module else None
    if not callable(function):
        raise ConfigError(
            f"--extractor: got {name!r}, and there is no function {last!r} in a module {parent!r}; give random, folder or hub id of an image encoder, or "
            "my_module.my_function, which returns a network from images [batch, 3, h, w] in [0, 1] to features [batch, d]"
        )
    network = function()
    if not isinstance(network, nn.Module):
        raise ConfigError(f"--extractor: {name} returned {type(network).__name__}, needed a torch.nn.Module")
    return of_network(name, network)


def _check_numbers(suite: Suite, folder: Path) -> None:
    num_prompts = len(suite.prompts())
    num = num_prompts * suite.images_per_prompt
    for what, found, least, mend in (
        (f"{folder}: images", len(Folder.of(folder).paths), _LEAST_IMAGES, "add some"),
        ("the suite's images", num, _LEAST_IMAGES, "raise --num-prompts or --images-per-prompt"),
        ("the suite's prompts", num_prompts, _LEAST_PROMPTS, "raise --num-prompts"),
    ):
        if found < least:
            raise ConfigError(f"--reference-images: {what}: got {found}, needed at least {least} (hundreds, to say something); {mend}")


def _of_folder(folder: Path, extractor: Extractor, image_size: tuple[int, int]) -> Reference:
    found = Folder.of(folder)
    odd = [(size, path) for size, path in found.sizes().items() if size != image_size] if extractor.takes == "one size" else []
    if odd:
        (height, width), path = odd[0]
        raise ConfigError(
            f"--reference-images: {path} has {width} x {height} pixels, the model's images have {image_size[1]} x {image_size[0]}; the extractor "
            f"{extractor.name!r} resizes nothing, so bring the folder's images to that size, or choose one that does, such as --extractor "
            "facebook/dinov2-base"
        )
    return Reference(name=str(folder), features=extractor.features(found.images()))


def table_lines(rows: Sequence[Sequence[str]]) -> str:
    """Lay rows out in columns for a terminal, without columns that are empty."""
    kept = [column for column in range(len(rows[0])) if any(row[column] for row in rows[1:])]
    widths = {column: max(len(row[column]) for row in rows) for column in kept}
    return "\n".join("  ".join(row[column].ljust(widths[column]) for column in kept).rstrip() for row in rows)
