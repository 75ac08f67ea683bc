"""The world of coloured shapes: what can be drawn, and a vectorised renderer.

An image has 32 x 32 pixels and 4 x 4 cells of 8 pixels, one patch token of the shipped transformer each. An object fills at most its own
cell: a shape of fixed size, one colour, and a centre that is jittered by up to 0.7 pixels. The background is white.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

IMAGE_SIZE = 32
CELL_SIZE = 8
GRID = IMAGE_SIZE // CELL_SIZE
NUM_CELLS = GRID * GRID
MAX_OBJECTS = 4
JITTER = 0.7  # pixels; the largest shape (radius 3.1) stays inside its cell

SHAPES = ("circle", "square", "triangle", "cross", "ring", "bow", "bar", "moon")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
RELATIONS = ("left of", "right of", "above", "below")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

BACKGROUND = (1.0, 1.0, 1.0)
PALETTE = torch.tensor(
    [
        [0.90, 0.10, 0.10],  # red
        [1.00, 0.55, 0.00],  # orange
        [0.95, 0.90, 0.10],  # yellow
        [0.10, 0.65, 0.20],  # green
        [0.10, 0.25, 0.90],  # blue
        [0.55, 0.10, 0.70],  # purple
        [1.00, 0.55, 0.80],  # pink
        [0.05, 0.05, 0.05],  # black
    ]
)


def _signed_distance(x: Tensor, y: Tensor) -> Tensor:
    """Signed distance in pixels to each shape's edge (negative inside): ``[..., shape]`` for offsets from the centre, y down."""
    radius = torch.sqrt(x * x + y * y)
    bite = torch.sqrt((x - 1.9) ** 2 + y * y) - 2.5
    slope = 1 / math.sqrt(5.0)  # the triangle's sides fall 2 pixels for each pixel to the side
    upright = torch.maximum(x.abs() - 0.9, y.abs() - 3.1)
    lying = torch.maximum(y.abs() - 0.9, x.abs() - 3.1)
    return torch.stack(
        [
            radius - 3.0,
            torch.maximum(x.abs(), y.abs()) - 3.1,
            torch.maximum(y - 2.6, (2 * x.abs() - y - 3.1) * slope),
            torch.minimum(upright, lying),
            (radius - 2.4).abs() - 0.75,
            torch.maximum(x.abs() - 3.1, (y.abs() - x.abs() - 0.5) / math.sqrt(2.0)),
            torch.maximum(x.abs() - 3.1, y.abs() - 1.3),
            torch.maximum(radius - 3.1, -bite),
        ],
        dim=-1,
    )


def coverage(offset_x: Tensor, offset_y: Tensor) -> Tensor:
    """Return how much of each pixel of a cell every shape covers.

    Args:
        offset_x: Displacement of the centre from the middle of the cell, in pixels to the right, any shape ``[...]``.
        offset_y: The same, downwards.

    Returns:
        Coverage in [0, 1], ``[..., shape, 64]``, rows of the cell first (one-pixel linear edge: an anti-aliased drawing).
    """
    centre = torch.arange(CELL_SIZE, dtype=torch.float32) - (CELL_SIZE - 1) / 2
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    distance = _signed_distance(x.flatten() - offset_x[..., None], y.flatten() - offset_y[..., None])
    return (0.5 - distance).clamp(0, 1).movedim(-1, -2)


def cells_to_images(cells: Tensor) -> Tensor:
    """Assemble ``[batch, 16, 3, 64]`` cells into ``[batch, 3, 32, 32]`` images."""
    tiled = cells.view(-1, GRID, GRID, 3, CELL_SIZE, CELL_SIZE).permute(0, 3, 1, 4, 2, 5)
    return tiled.reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE)


def images_to_cells(images: Tensor) -> Tensor:
    """Cut ``[batch, 3, 32, 32]`` images into ``[batch, 16, 3, 64]`` cells, row by row."""
    tiled = images.reshape(-1, 3, GRID, CELL_SIZE, GRID, CELL_SIZE).permute(0, 2, 4, 1, 3, 5)
    return tiled.reshape(-1, NUM_CELLS, 3, CELL_SIZE * CELL_SIZE)


def draw(image: Tensor, cell: Tensor, shape: Tensor, color: Tensor, offset: Tensor, num_images: int) -> Tensor:
    """Draw objects, given as flat tables, onto white images.

    Args:
        image: Which image each object belongs to, ``[object]``.
        cell: Its cell, 0 to 15; at most one object in a cell of an image.
        shape: Index into ``SHAPES``.
        color: Index into ``COLORS``.
        offset: Displacement of its centre in pixels (right, down), ``[object, 2]``.
        num_images: Size of the batch.

    Returns:
        Images ``[num_images, 3, 32, 32]`` in [0, 1], float32.
    """
    background = torch.tensor(BACKGROUND)
    cells = background[:, None].expand(num_images, NUM_CELLS, 3, CELL_SIZE * CELL_SIZE).clone()
    centre = torch.arange(CELL_SIZE, dtype=torch.float32) - (CELL_SIZE - 1) / 2
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    distance = torch.empty(len(shape), CELL_SIZE * CELL_SIZE)
    # One shape at a time: computing all eight distances for every object would cost eight times as much.
    every = torch.arange(len(SHAPES))
    for index in every.tolist():
        rows = (shape == index).nonzero().squeeze(1)
        shifted_x, shifted_y = x.flatten() - offset[rows, :1], y.flatten() - offset[rows, 1:]
        distance[rows] = _signed_distance(shifted_x, shifted_y)[..., index]
    alpha = (0.5 - distance).clamp(0, 1)[:, None, :]
    cells[image, cell] = background[:, None] + alpha * (PALETTE[color][:, :, None] - background[:, None])
    return cells_to_images(cells)


def _cells_for(relation: str | None, count: int, generator: torch.Generator) -> list[int]:
    """Choose distinct cells; for a relation the first object stands in it to the second, clearly (not on a diagonal)."""
    if relation is None:
        return torch.randperm(NUM_CELLS, generator=generator)[:count].tolist()
    pairs = _RELATED_CELLS[relation]
    return list(pairs[int(torch.randint(len(pairs), (), generator=generator))])


def _related_cells() -> dict[str, list[tuple[int, int]]]:
    found: dict[str, list[tuple[int, int]]] = {relation: [] for relation in RELATIONS}
    for a in range(NUM_CELLS):
        for b in range(NUM_CELLS):
            down, right = b // GRID - a // GRID, b % GRID - a % GRID
            if abs(right) > abs(down):
                found["left of" if right > 0 else "right of"].append((a, b))
            elif abs(down) > abs(right):
                found["above" if down > 0 else "below"].append((a, b))
    return found


_RELATED_CELLS = _related_cells()


def render(metadata: Sequence[Mapping[str, Any]], seed: int) -> Tensor:
    """Draw one image for each prompt that satisfies it, free choices (cells, unnamed colours, jitter) at random.

    Args:
        metadata: GenEval metadata with classes from ``SHAPES`` and colours from ``COLORS``.
        seed: The same seed and metadata give the same images.

    Returns:
        Images ``[batch, 3, 32, 32]`` in [0, 1], float32.

    Raises:
        ValueError: If a class, colour or relation is not of this world, or more than 4 objects are asked for.

    Examples:
        >>> images = render([{"tag": "colors", "include": [{"class": "ring", "count": 1, "color": "red"}]}], seed=0)
        >>> tuple(images.shape)
        (1, 3, 32, 32)
    """
    generator = torch.Generator().manual_seed(seed)
    image, cell, shape, color = [], [], [], []
    for row, record in enumerate(metadata):
        wanted = objects(record)
        relation = next((r for _, _, r in wanted if r is not None), None)
        cells = _cells_for(relation, len(wanted), generator)
        if relation is not None:
            cells = cells[::-1]  # the pair is (subject, target) and the metadata lists the target first
        free = torch.randint(len(COLORS), (len(wanted),), generator=generator).tolist()
        for place, pick, (kind, fixed, _) in zip(cells, free, wanted, strict=True):
            image.append(row)
            cell.append(place)
            shape.append(kind)
            color.append(pick if fixed is None else fixed)
    offset = (torch.rand(len(image), 2, generator=generator) * 2 - 1) * JITTER
    return draw(
        torch.tensor(image, dtype=torch.long),
        torch.tensor(cell, dtype=torch.long),
        torch.tensor(shape, dtype=torch.long),
        torch.tensor(color, dtype=torch.long),
        offset,
        len(metadata),
    )


def index_of(name: str, names: Sequence[str], what: str) -> int:
    """Return the position of a name, or raise with the names there are."""
    try:
        return names.index(name)
    except ValueError:
        raise ValueError(f"metadata: {what} {name!r} is not in the shapes world (known: {', '.join(names)})") from None


def objects(record: Mapping[str, Any]) -> list[tuple[int, int | None, str | None]]:
    """List the objects that a prompt asks for as (shape index, colour index or None, relation to the first object or None)."""
    found = []
    for clause in record["include"]:
        shape = index_of(clause["class"], SHAPES, "class")
        color = index_of(clause["color"], COLORS, "color") if "color" in clause else None
        relation = clause["position"][0] if "position" in clause else None
        if relation is not None:
            index_of(relation, RELATIONS, "relation")
        found += [(shape, color, relation)] * int(clause["count"])
    if not 1 <= len(found) <= MAX_OBJECTS:
        raise ValueError(f"metadata: {len(found)} objects asked for, the shapes world holds 1 to {MAX_OBJECTS}")
    return found
