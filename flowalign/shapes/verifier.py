"""A verifier without learned weights for images of the shapes world.

Every cell is compared with every shape at a grid of displacements. A cell is empty (hardly differs from the background), an object (one
shape in one colour of the palette explains it) or junk (something else). A prompt's clauses are then GenEval's: counts, colours, position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flowalign.shapes.world import (
    BACKGROUND,
    COLORS,
    GRID,
    IMAGE_SIZE,
    JITTER,
    NUM_CELLS,
    PALETTE,
    RELATIONS,
    SHAPES,
    coverage,
    images_to_cells,
    index_of,
)

EMPTY_ENERGY = 1.0  # squared difference from the background over a cell: below, nothing is there. The faintest full object has 8.
EXPLAINED = 0.85  # share of a cell's squared difference that one shape in one colour must explain
COLOR_DISTANCE = 0.2  # largest distance in RGB from a palette colour
CLAUSES = ("count of the first", "count of the second", "colour of the first", "colour of the second", "position", "nothing else")
_JUNK, _EMPTY = -2, -1
_MARGIN = 0.1  # GenEval's relation: offsets below 10 % of the summed sizes do not count
_OBJECT_SIZE = 6.0  # pixels; width and height of the box of every object


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the verifier says of a batch.

    Attributes:
        strict: True where every clause holds, ``[batch]`` bool.
        graded: Partial credit in [0, 1], ``[batch]`` float64; 1 exactly where strict.
        clauses: Which clauses hold, ``[batch, 6]`` bool, columns as in ``CLAUSES``.
        clauses_valid: Which clauses the prompt has, ``[batch, 6]`` bool.
    """

    strict: Tensor
    graded: Tensor
    clauses: Tensor
    clauses_valid: Tensor


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What stands in each cell.

    Shapes:
        shape: ``[batch, 16]``, an index into ``SHAPES``, -1 for an empty cell, -2 for junk.
        color: ``[batch, 16]``, an index into ``COLORS``.
        centre: ``[batch, 16, 2]``, pixels to the right and down.
    """

    shape: Tensor
    color: Tensor
    centre: Tensor


@cache
def _templates() -> tuple[Tensor, Tensor, Tensor]:
    """Unit-norm coverages ``[shape * displacement, 64]``, their norms, and the displacements ``[displacement, 2]``."""
    steps = torch.linspace(-JITTER, JITTER, 5)
    displacement = torch.cartesian_prod(steps, steps)
    alpha = coverage(displacement[:, 0], displacement[:, 1]).transpose(0, 1).flatten(0, 1)
    norm = alpha.norm(dim=1)
    return alpha / norm[:, None], norm, displacement


def perceive(images: Tensor) -> Scene:
    """Say what stands in each cell of each image.

    Args:
        images: ``[batch, 3, 32, 32]`` in [0, 1].

    Raises:
        ValueError: If the images have another shape or hold values that are not finite.
    """
    if images.ndim != 4 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"images: got shape {tuple(images.shape)}, needed (batch, 3, {IMAGE_SIZE}, {IMAGE_SIZE})")
    if not bool(torch.isfinite(images).all()):
        raise ValueError("images: got values that are not finite; the decoder or the sampler has diverged")
    unit, norm, displacement = _templates()
    background = torch.tensor(BACKGROUND)
    cells = images_to_cells(images.detach().to("cpu", torch.float32).clamp(0, 1))
    difference = cells - background[:, None]
    energy = difference.square().sum((2, 3))
    projection = difference @ unit.T  # [batch, 16, 3, template]
    explained, best = projection.square().sum(2).max(-1)
    # For one shape in one colour the best-fitting template's projections are the colour's difference times the template's norm.
    chosen = projection.gather(3, best[:, :, None, None].expand(-1, -1, 3, 1)).squeeze(3)
    rgb = background + chosen / norm[best][..., None]
    distance, color = torch.cdist(rgb.flatten(0, 1), PALETTE).view(*best.shape, len(COLORS)).min(-1)
    is_object = (explained >= EXPLAINED * energy) & (distance <= COLOR_DISTANCE)
    num_displacements = len(displacement)
    shape = torch.where(is_object, best // num_displacements, _JUNK)
    shape = torch.where(energy < EMPTY_ENERGY, _EMPTY, shape)
    cell = torch.arange(NUM_CELLS)
    middle = torch.stack([cell % GRID, cell // GRID], dim=1) * 8.0 + 3.5
    return Scene(shape=shape, color=color, centre=middle + displacement[best % num_displacements])


def _relation_holds(subject: Tensor, target: Tensor, relation: Tensor) -> Tensor:
    """GenEval's relation between box centres ``[..., 2]``; ``relation`` indexes ``RELATIONS``."""
    offset = subject - target
    revised = offset.sign() * (offset.abs() - _MARGIN * 2 * _OBJECT_SIZE).clamp(min=0)
    direction = revised / offset.norm(dim=-1, keepdim=True).clamp(min=1e-9)
    x, y = direction.unbind(-1)
    return torch.stack([x < -0.5, x > 0.5, y < -0.5, y > 0.5], dim=-1).gather(-1, relation[..., None]).squeeze(-1)


def check_record(record: Mapping[str, Any]) -> None:
    """Refuse a record that cannot be verified.

    Raises:
        ValueError: If it is not GenEval metadata of the shapes world; says what is wrong with it.

    Examples:
        >>> check_record({"include": [{"class": "moon"}]})
        Traceback (most recent call last):
        ValueError: include[0]: got {'class': 'moon'}, needed a 'class' and a 'count' of at least 1
    """
    clauses = record.get("include")
    if not isinstance(clauses, Sequence) or isinstance(clauses, str):
        raise ValueError("it has no GenEval metadata ('include', a list of clauses); use prompts of the shapes world")
    for position, clause in enumerate(clauses):
        count = clause.get("count") if isinstance(clause, Mapping) else None
        if not isinstance(count, int) or count < 1 or not isinstance(clause.get("class"), str):
            raise ValueError(f"include[{position}]: got {clause!r}, needed a 'class' and a 'count' of at least 1")
        place = clause.get("position", ["", 0])
        if not isinstance(place, Sequence) or isinstance(place, str) or len(place) != 2:
            raise ValueError(
                f"include[{position}].position: got {place!r}, needed a relation and a clause's number, such as ['left of', 0]"
            )
    _tabulate([record])


def _tabulate(metadata: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes, counts and colours ``[batch, 2]`` and relation ``[batch]``; -1 where the prompt does not say."""
    shape, count, color, relation = [], [], [], []
    for record in metadata:
        clauses = record["include"]
        if not 1 <= len(clauses) <= 2:
            raise ValueError(f"metadata: got {len(clauses)} include clauses, the shapes world has prompts of 1 or 2")
        padding = 2 - len(clauses)
        shape.append([index_of(c["class"], SHAPES, "class") for c in clauses] + [-1] * padding)
        count.append([int(c["count"]) for c in clauses] + [0] * padding)
        named = [index_of(c["color"], COLORS, "color") if "color" in c else -1 for c in clauses]
        color.append(named + [-1] * padding)
        positions = [index_of(c["position"][0], RELATIONS, "relation") for c in clauses if "position" in c]
        relation.append(positions[0] if positions else -1)
    return tuple(torch.tensor(column, dtype=torch.long) for column in (shape, count, color, relation))  # type: ignore[return-value]


def verify(images: Tensor, metadata: Sequence[Mapping[str, Any]]) -> Verdict:
    """Check images against their prompts.

    Strict: exact counts, every named colour, the relation, and nothing else in the image (no other object, no junk, no faint ghost).
    Graded: the mean over the prompt's clauses of ``min(n, c) / max(n, c)`` for a count c of which n were found, the same with the rightly
    coloured ones for a colour, 0 or 1 for a position; times ``1 - excess / (c + 2)`` (not below 0) for cells filled beyond what was asked.

    Args:
        images: ``[batch, 3, 32, 32]`` in [0, 1].
        metadata: One GenEval record for each image.

    Returns:
        The verdict; graded is 1 exactly where strict is True.

    Raises:
        ValueError: If sizes differ, an image is not finite, or the metadata speaks of another world.

    References:
        Ghosh et al., "GenEval", 2023, https://arxiv.org/abs/2310.11513, and its released code (relations, counts).
        Deviations: counts are exact for every tag (GenEval lets single_object have more), nothing unasked may be there, and graded
        terms are ratios that cannot be negative and give a wrong relation 0.

    Examples:
        >>> from flowalign.shapes.world import render
        >>> record = {"tag": "counting", "include": [{"class": "moon", "count": 3}]}
        >>> verify(render([record], seed=0), [record]).strict
        tensor([True])
    """
    if len(images) != len(metadata):
        raise ValueError(f"metadata: got {len(metadata)} records for {len(images)} images, needed one each")
    scene = perceive(images)
    shape, count, color, relation = _tabulate(metadata)
    matches = (scene.shape[:, None, :] == shape[:, :, None]) & (shape >= 0)[:, :, None]  # [batch, 2, 16]
    found = matches.sum(-1)
    colored = (matches & (scene.color[:, None, :] == color[:, :, None])).sum(-1)
    present = shape >= 0
    named = color >= 0
    positioned = relation >= 0

    first = matches.float().argmax(-1)
    centre = scene.centre.gather(1, first[..., None].expand(-1, -1, 2))  # [batch, 2, xy]: target first, subject second
    related = _relation_holds(centre[:, 1], centre[:, 0], relation.clamp(min=0)) & (found == 1).all(1)

    filled = (scene.shape != _EMPTY).sum(-1)
    wanted = count.sum(-1)
    unasked = filled - found.sum(-1)
    exact = found == count
    clauses = torch.cat([exact, exact & (colored == count), related[:, None], (unasked == 0)[:, None]], dim=1)
    valid = torch.cat([present, named, positioned[:, None], torch.ones_like(positioned)[:, None]], dim=1)

    def ratio(n: Tensor) -> Tensor:
        return torch.minimum(n, count).double() / torch.maximum(torch.maximum(found, count), torch.ones_like(count))

    terms = torch.cat([ratio(found), ratio(colored), related[:, None].double()], dim=1)
    mask = valid[:, :5].double()
    clean = (1 - (filled - wanted).clamp(min=0) / (wanted + 2)).clamp(min=0)
    # A missing object replaced by a wrong one is unasked too, though the image holds no more than was asked for.
    clean = torch.minimum(clean, (1 - unasked / (wanted + 2)).clamp(min=0))
    graded = (terms * mask).sum(1) / mask.sum(1) * clean
    return Verdict(strict=(clauses | ~valid).all(1), graded=graded, clauses=clauses, clauses_valid=valid)
