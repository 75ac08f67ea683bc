"""What a denoiser is told besides latents and timestep: learnt from two recordings, kept per distinct prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Constant:
    """An argument that is the same for every prompt."""

    value: Any


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A tensor with one slice per sample, or several: under guidance both halves, one after the other."""

    axis: int
    copies: int


@dataclass(frozen=True, kw_only=True)
class RowList:
    """A list with one tensor per sample, or several."""

    copies: int
    kind: type


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """A list that says the same of every sample, such as the sizes of its picture."""

    item: Any
    copies: int
    kind: type


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A dict, list or tuple of further arguments."""

    kind: type
    children: Mapping[Any, Any]


Spec = Constant | Rows | RowList | Repeated | Branch
# One entry per Rows, RowList or Repeated: [prompts, copies, ...], one tuple of copies per prompt, or [prompts, 0], which only counts.
# Rows of prompts that give tensors of different shapes are kept as tuples too.
Leaf = Tensor | list[tuple[Tensor, ...]]


def learn(where: str, one: Any, two: Any) -> Spec:
    """Find out where the batch is in a recorded argument.

    Args:
        where: Name of the argument, for messages.
        one: Its value with one sample.
        two: Its value with two samples.

    Returns:
        Its specification.

    Raises:
        ValueError: If the value changes in more than one axis, or changes without being per sample.
    """
    if type(one) is not type(two):
        raise ValueError(f"{where}: is {type(one).__name__} for one sample and {type(two).__name__} for two")
    if isinstance(one, Tensor):
        return _learn_tensor(where, one, two)
    if isinstance(one, dict):
        if one.keys() != two.keys():
            raise ValueError(f"{where}: has keys {sorted(one)} for one sample and {sorted(two)} for two")
        return Branch(kind=dict, children={key: learn(f"{where}[{key!r}]", one[key], two[key]) for key in one})
    if isinstance(one, list | tuple):
        if len(one) == len(two):
            children = {i: learn(f"{where}[{i}]", a, b) for i, (a, b) in enumerate(zip(one, two, strict=True))}
            return Branch(kind=type(one), children=children)
        if len(two) == 2 * len(one) and all(isinstance(item, Tensor) for item in two):
            return RowList(copies=len(one), kind=type(one))
        if one and len(two) == 2 * len(one) and all(_same(one[0], item) for item in (*one, *two)):
            return Repeated(item=one[0], copies=len(one), kind=type(one))
        raise ValueError(f"{where}: has {len(one)} items for one sample and {len(two)} for two")
    if one != two:
        raise ValueError(f"{where}: is {one!r} for one sample and {two!r} for two")
    return Constant(value=one)


def _learn_tensor(where: str, one: Tensor, two: Tensor) -> Spec:
    if one.shape == two.shape:
        if not torch.equal(one, two):
            raise ValueError(f"{where}: changes with the batch but has no batch axis, shape {tuple(one.shape)}")
        return Constant(value=one)
    axes = [axis for axis, (a, b) in enumerate(zip(one.shape, two.shape, strict=False)) if a != b]
    if one.dim() != two.dim() or len(axes) != 1 or two.shape[axes[0]] != 2 * one.shape[axes[0]]:
        raise ValueError(
            f"{where}: shape {tuple(one.shape)} for one sample and {tuple(two.shape)} for two; exactly one axis may "
            "double (are prompts padded to a fixed length?)"
        )
    return Rows(axis=axes[0], copies=one.shape[axes[0]])


def split(where: str, spec: Spec, value: Any, num: int) -> Iterator[Leaf]:
    """Take a recorded argument apart, in the order of its specification.

    Raises:
        ValueError: If the value does not follow the specification.
    """
    match spec:
        case Constant(value=known):
            if not _same(known, value):
                raise ValueError(f"{where}: was taken for a constant but depends on the prompt")
        case Rows(axis=axis, copies=copies):
            moved = value.movedim(axis, 0)
            yield moved.reshape(copies, num, *moved.shape[1:]).transpose(0, 1)
        case RowList(copies=copies):
            yield [tuple(value[row + num * copy] for copy in range(copies)) for row in range(num)]
        case Repeated(item=item):
            if not all(_same(item, other) for other in value):
                raise ValueError(f"{where}: was taken for the same of every sample but depends on the prompt")
            yield torch.empty(num, 0)
        case Branch(children=children):
            for key, child in children.items():
                yield from split(f"{where}[{key!r}]", child, value[key], num)


def join(spec: Spec, leaves: Iterator[Leaf]) -> Any:
    """Put an argument together again; the inverse of ``split``."""
    match spec:
        case Constant(value=value):
            return value
        case Rows(axis=axis):
            return _stacked(next(leaves)).transpose(0, 1).flatten(0, 1).movedim(0, axis)
        case RowList(copies=copies, kind=kind):
            rows = next(leaves)
            return kind(row[copy] for copy in range(copies) for row in rows)
        case Repeated(item=item, copies=copies, kind=kind):
            return kind([item] * (copies * len(next(leaves))))
        case Branch(kind=kind, children=children):
            joined = {key: join(child, leaves) for key, child in children.items()}
            return joined if kind is dict else kind(joined.values())


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and torch.equal(one, two)
    if isinstance(one, list | tuple) and type(one) is type(two):
        return len(one) == len(two) and all(map(_same, one, two))
    return type(one) is type(two) and one == two


# Per denoiser call of a step: argument name to specification, latents and timestep left out.
Layout = tuple[Mapping[str, Spec], ...]


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """The conditioning of some samples. Opaque: it has a length, rows can be taken, and it can be moved.

    Attributes:
        layout: How the leaves make up the arguments of each denoiser call.
        leaves: One entry per leaf, holding each distinct prompt once.
        index: For each sample its row in the leaves, on the device of the leaves.
    """

    layout: Layout
    leaves: tuple[Leaf, ...]
    index: Tensor

    def __len__(self) -> int:
        """Count the samples."""
        return self.index.shape[0]

    def take(self, index: Tensor) -> Conditioning:
        """Select samples; an index may occur more than once."""
        return Conditioning(layout=self.layout, leaves=self.leaves, index=self.index[index.to(self.index.device)])

    def to(self, device: torch.device | str) -> Conditioning:
        """Move to a device."""
        return Conditioning(layout=self.layout, leaves=moved(self.leaves, device), index=self.index.to(device))

    def kinds(self) -> Tensor | None:
        """Number the samples, ``[batch]`` on the CPU, so that those of one number can share a pass; None where all can.

        A pipeline that does not pad its texts to one length gives the denoiser tensors of several shapes.
        """
        specs = [spec for call in self.layout for top in call.values() for spec in _flat(top)]
        uneven = [leaf for spec, leaf in zip(specs, self.leaves, strict=True) if isinstance(spec, Rows) and isinstance(leaf, list)]
        if not uneven:
            return None
        shapes = [tuple(part.shape for leaf in uneven for part in leaf[row]) for row in self.index.tolist()]
        numbers = {shape: number for number, shape in enumerate(dict.fromkeys(shapes))}
        return torch.tensor([numbers[shape] for shape in shapes]) if len(numbers) > 1 else None

    def arguments(self) -> list[dict[str, Any]]:
        """Build the arguments of each denoiser call, as the pipeline passes them; all samples are of one kind."""
        rows = (_rows(leaf, self.index) for leaf in self.leaves)
        return [{name: join(spec, rows) for name, spec in call.items()} for call in self.layout]

    def alone(self, call: int, copy: int, copies: int) -> Conditioning:
        """Keep what one denoiser call is told of one copy of the latents, as a conditioning of a single call of single copies.

        Args:
            call: Number of the call in a step.
            copy: Which copy of the latents.
            copies: How many copies the call takes.
        """
        start = sum(_num_leaves(spec) for specs in self.layout[:call] for spec in specs.values())
        layout = {name: _single(name, spec, copies) for name, spec in self.layout[call].items()}
        leaves = self.leaves[start : start + sum(map(_num_leaves, layout.values()))]
        return Conditioning(layout=(layout,), leaves=tuple(_one_copy(leaf, copy, copies) for leaf in leaves), index=self.index)

    def halves(self, name: str, call: int = 0) -> tuple[Tensor, ...]:
        """Give the copies of one tensor argument, ``[batch, ...]`` each.

        Without guidance there is one. Under guidance in one batch there are two, in the denoiser's order (in diffusers
        the negative prompt comes first).
        """
        position = 0
        for number, specs in enumerate(self.layout):
            for key, spec in specs.items():
                if (number, key) == (call, name):
                    return _stacked(_rows(self.leaves[position], self.index)).unbind(1)
                position += _num_leaves(spec)
        raise KeyError(f"the denoiser takes no argument {name!r}; it takes {sorted(self.layout[call])}")


def stack(layout: Layout, rows: Sequence[tuple[Leaf, ...]], index: Tensor) -> Conditioning:
    """Make one conditioning of prompts that were encoded one by one.

    Args:
        layout: Their layout.
        rows: The leaves of each distinct prompt.
        index: For each sample its position in ``rows``.
    """
    device = index.device
    leaves = tuple(_concatenated(parts) for parts in zip(*rows, strict=True))
    return Conditioning(layout=layout, leaves=moved(leaves, device), index=index)


def _concatenated(parts: Sequence[Leaf]) -> Leaf:
    """Put prompts into one leaf: one tensor, or a list where they differ in shape."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if len(tensors) == len(parts) and len({part.shape[1:] for part in tensors}) == 1:
        return torch.cat(tensors)
    return [tuple(row) for part in parts for row in part]


def _stacked(leaf: Leaf) -> Tensor:
    """Return ``[samples, copies, ...]`` of samples of one kind."""
    return leaf if isinstance(leaf, Tensor) else torch.stack([torch.stack(row) for row in leaf])


def num_bytes(leaves: tuple[Leaf, ...]) -> int:
    """Count the memory of leaves."""
    return sum(leaf.nbytes if isinstance(leaf, Tensor) else sum(t.nbytes for row in leaf for t in row) for leaf in leaves)


def moved(leaves: tuple[Leaf, ...], device: torch.device | str) -> tuple[Leaf, ...]:
    """Move leaves to a device."""
    return tuple(leaf.to(device) if isinstance(leaf, Tensor) else [tuple(t.to(device) for t in row) for row in leaf] for leaf in leaves)


def _single(name: str, spec: Spec, copies: int) -> Spec:
    """Say where the batch is in an argument once it is told of one copy of the latents alone."""
    if isinstance(spec, Constant):
        return spec
    if isinstance(spec, Branch):
        return replace(spec, children={key: _single(name, child, copies) for key, child in spec.children.items()})
    if spec.copies % copies:
        raise ValueError(f"{name}: holds {spec.copies} slices a sample for {copies} copies of the latents; needed as many for each")
    return replace(spec, copies=spec.copies // copies)


def _one_copy(leaf: Leaf, copy: int, copies: int) -> Leaf:
    if isinstance(leaf, Tensor):
        return leaf.chunk(copies, 1)[copy] if leaf.shape[1] else leaf  # of width 0 it only counts
    return [row[copy * len(row) // copies : (copy + 1) * len(row) // copies] for row in leaf]


def _rows(leaf: Leaf, index: Tensor) -> Leaf:
    if isinstance(leaf, Tensor):
        return leaf[index]
    return [leaf[row] for row in index.tolist()]


def _flat(spec: Spec) -> Iterator[Spec]:
    """Name the specifications that have a leaf, in their order."""
    if isinstance(spec, Branch):
        for child in spec.children.values():
            yield from _flat(child)
    elif not isinstance(spec, Constant):
        yield spec


def _num_leaves(spec: Spec) -> int:
    return sum(1 for _ in _flat(spec))
