"""Linear combinations of a run's checkpoints, and an evolutionary search for good ones; torch only."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.core.paths import widest
from flowalign.core.randomness import generator

Coefficients = tuple[float, ...]
"""One number for each checkpoint, oldest first; they sum to 1 and may be negative."""

_DECAYS = (0.5, 0.8)  # of the averages among the first candidates
_OLDER = 6  # older checkpoints among the first candidates, at most
_REACH = 0.25  # children lie up to this far beyond their parents, in units of the parents' distance
_STEPS = (0.01, 0.3)  # range of the sizes of mutations, drawn evenly in the logarithm


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A combination and what it scored; higher is better."""

    coefficients: Coefficients
    score: float


def combine(tables: Sequence[Mapping[str, Tensor]], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """Add up tables of tensors, each times its coefficient; in float64, in the dtype of the first table at the end.

    A checkpoint whose coefficient is 1 while the others' are 0 comes back to the last bit. LoRA is combined factor by factor, so that rank and file stay
    as they are: the product of two sums is not the sum of the products, and a search scores what the factors really make.

    Args:
        tables: The same names and shapes in each.
        coefficients: One for each table.

    Raises:
        ValueError: If numbers, names or shapes do not fit, or a coefficient is not finite.

    Examples:
        >>> combine([{"a": torch.tensor([1.0])}, {"a": torch.tensor([3.0])}], (-0.5, 1.5))
        {'a': tensor([4.])}
    """
    if len(tables) != len(coefficients) or not tables:
        raise ValueError(f"combine: got {len(tables)} tables and {len(coefficients)} coefficients, needed one each and at least one")
    if not all(math.isfinite(value) for value in coefficients):
        raise ValueError(f"coefficients: got one that is not finite: {list(coefficients)}")
    first = tables[0]
    for place, table in enumerate(tables):
        shapes = {name: tensor.shape for name, tensor in table.items()}
        if shapes != {name: tensor.shape for name, tensor in first.items()}:
            odd = sorted(set(table) ^ set(first)) or [name for name in first if first[name].shape != table[name].shape]
            raise ValueError(f"combine: table {place} does not have the tensors of the first one, for example {odd[0]}")
    used = [(value, table) for value, table in zip(coefficients, tables, strict=True) if value != 0]
    return {
        name: sum((value * widest(table[name]) for value, table in used), torch.zeros_like(widest(tensor))).to(tensor.device, tensor.dtype)
        for name, tensor in first.items()
    }


def starts(num: int) -> Iterator[Coefficients]:
    """Yield what a search begins with: the newest checkpoint, averages of several lengths, then older checkpoints, at most 6.

    Examples:
        >>> list(starts(2))[:2]
        [(0.0, 1.0), (0.5, 0.5)]
    """
    if num < 1:
        raise ValueError(f"num: got {num}, needed at least one checkpoint")
    seen = set()

    def alone(place: int) -> Coefficients:
        return tuple(float(place == other) for other in range(num))

    averages = [tuple([1 / num] * num)]
    for decay in _DECAYS:
        weights = [decay ** (num - 1 - place) for place in range(num)]
        averages.append(tuple(weight / sum(weights) for weight in weights))
    # Evenly spread, from the second newest down.
    older = [num - 2 - place * (num - 1) // min(_OLDER, num - 1) for place in range(min(_OLDER, num - 1))]
    for candidate in [alone(num - 1), *averages, *map(alone, older)]:
        if candidate not in seen:
            seen.add(candidate)
            yield candidate


def search(score: Callable[[Coefficients], float], num: int, *, budget: int, population: int = 8, seed: int = 0) -> Iterator[Candidate]:
    """Search for the combination that scores highest; yields every candidate in the order of its evaluation.

    Evolution: of the best ``population`` candidates so far two are drawn, better ones more often; the child lies on the line through them, up to a quarter
    beyond either, and gets a normal step of random size. Every sum of coefficients is 1, as that of the checkpoints that they combine. The same seed and
    scores give the same candidates, so that a search that was interrupted is resumed by answering what is known from memory.

    Args:
        score: Higher is better; a value that is not finite ranks last.
        num: Number of checkpoints.
        budget: Number of evaluations.
        population: How many candidates have children.
        seed: Seed of the draws.

    Raises:
        ValueError: If a number is not positive.

    References:
        Liu et al., "Linear Combination of Saved Checkpoints Makes Consistency and Diffusion Models Better", 2024,
        https://arxiv.org/abs/2404.02241. The idea, with negative coefficients; its search was never released, so sizes and operators are our own.
    """
    if min(num, budget, population) < 1:
        raise ValueError(f"search: got {num} checkpoints, budget {budget} and population {population}, needed at least 1 of each")
    first = list(starts(num))
    ranked: list[Candidate] = []
    for number in range(budget):
        if number < len(first):
            coefficients = first[number]
        elif num == 1:
            return
        else:
            coefficients = _child(ranked[:population], generator(seed, "combinations", number))
        found = Candidate(coefficients=coefficients, score=score(coefficients))
        ranked.append(found)
        # Sorting is stable: of equal scores the earlier, simpler candidate stays ahead.
        ranked.sort(key=lambda entry: -entry.score if math.isfinite(entry.score) else math.inf)
        yield found


def _child(parents: Sequence[Candidate], draw: torch.Generator) -> Coefficients:
    """Cross two parents and mutate."""
    numbers = torch.rand(4, generator=draw, dtype=torch.float64).tolist()
    one, other = (parents[int(len(parents) * number**2)].coefficients for number in numbers[:2])
    share = (1 + 2 * _REACH) * numbers[2] - _REACH
    size = _STEPS[0] * (_STEPS[1] / _STEPS[0]) ** numbers[3]
    noise = torch.randn(len(one), generator=draw, dtype=torch.float64)
    step = (size * (noise - noise.mean())).tolist()
    child = [a + share * (b - a) + change for a, b, change in zip(one, other, step, strict=True)]
    return (*child[:-1], 1 - math.fsum(child[:-1]))
