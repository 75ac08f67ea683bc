"""Prompts of GenEval's six kinds about the shapes world, split into training and held-out meanings.

The metadata has GenEval's own schema (Ghosh et al., "GenEval", 2023, https://arxiv.org/abs/2310.11513): ``tag``, ``include``, ``exclude``
and ``prompt``. The split is by meaning: "a circle and a ring" is "a ring and a circle", and "a circle left of a ring" is "a ring right of
a circle". A meaning is held out or it is not, in every wording, for pretraining as for everything after it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from itertools import combinations, permutations
from typing import Any, Literal

import torch

from flowalign.shapes.world import COLORS, RELATIONS, SHAPES, TAGS

Metadata = dict[str, Any]

# Share of the meanings of each tag that is held out; a third where there are few, a quarter where there are many.
HELD_OUT_SHARE = {
    "single_object": 1 / 4,
    "two_object": 1 / 3,
    "counting": 1 / 3,
    "colors": 1 / 3,
    "position": 1 / 4,
    "color_attr": 1 / 4,
}
_NUMBERS = {2: "two", 3: "three", 4: "four"}
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")  # GenEval's own rule


def _single(shape: str) -> Metadata:
    include = [{"class": shape, "count": 1}]
    return {"tag": "single_object", "include": include, "prompt": f"a photo of {_article(shape)}"}


def _two(first: str, second: str) -> Metadata:
    include = [{"class": first, "count": 1}, {"class": second, "count": 1}]
    return {"tag": "two_object", "include": include, "prompt": f"a photo of {_article(first)} and {_article(second)}"}


def _counting(shape: str, count: int) -> Metadata:
    return {
        "tag": "counting",
        "include": [{"class": shape, "count": count}],
        "exclude": [{"class": shape, "count": count + 1}],
        "prompt": f"a photo of {_NUMBERS[count]} {_plural(shape)}",
    }


def _colored(color: str, shape: str) -> Metadata:
    include = [{"class": shape, "count": 1, "color": color}]
    return {"tag": "colors", "include": include, "prompt": f"a photo of {_article(f'{color} {shape}')}"}


def _position(subject: str, relation: str, target: str) -> Metadata:
    include: list[dict[str, Any]] = [{"class": target, "count": 1}]
    include.append({"class": subject, "count": 1, "position": [relation, 0]})
    return {"tag": "position", "include": include, "prompt": f"a photo of {_article(subject)} {relation} {_article(target)}"}


def _color_attr(color: str, shape: str, other_color: str, other_shape: str) -> Metadata:
    include = [{"class": shape, "count": 1, "color": color}, {"class": other_shape, "count": 1, "color": other_color}]
    words = f"{_article(f'{color} {shape}')} and {_article(f'{other_color} {other_shape}')}"
    return {"tag": "color_attr", "include": include, "prompt": f"a photo of {words}"}


def meaning(metadata: Mapping[str, Any]) -> str:
    """Return a key that is equal for two prompts exactly when they ask for the same thing.

    Examples:
        >>> meaning(_position("circle", "left of", "ring")) == meaning(_position("ring", "right of", "circle"))
        True
        >>> meaning(_two("circle", "ring")) == meaning(_two("ring", "circle"))
        True
        >>> meaning(_position("circle", "left of", "ring")) == meaning(_position("ring", "left of", "circle"))
        False
    """
    clauses = metadata["include"]
    if metadata["tag"] == "position":
        target, subject = clauses[0]["class"], clauses[1]["class"]
        relation = clauses[1]["position"][0]
        if relation in ("right of", "below"):
            subject, relation, target = target, _OPPOSITE[relation], subject
        return f"position: {subject} {relation} {target}"
    parts = sorted(f"{clause['count']} {clause.get('color', 'any')} {clause['class']}" for clause in clauses)
    return f"{metadata['tag']}: {' + '.join(parts)}"


@cache
def _all_prompts() -> tuple[Metadata, ...]:
    prompts = [_single(shape) for shape in SHAPES]
    prompts += [_two(a, b) for a, b in permutations(SHAPES, 2)]
    prompts += [_counting(shape, count) for shape in SHAPES for count in _NUMBERS]
    prompts += [_colored(color, shape) for color in COLORS for shape in SHAPES]
    prompts += [_position(a, relation, b) for a, b in permutations(SHAPES, 2) for relation in RELATIONS]
    prompts += [_color_attr(c, a, d, b) for a, b in combinations(SHAPES, 2) for c, d in permutations(COLORS, 2)]
    prompts += [_color_attr(d, b, c, a) for a, b in combinations(SHAPES, 2) for c, d in permutations(COLORS, 2)]
    return tuple(prompts)


@cache
def held_out_meanings() -> frozenset[str]:
    """Return the meanings that no training prompt has, in pretraining and in alignment alike."""
    by_tag: dict[str, set[str]] = {tag: set() for tag in TAGS}
    for prompt in _all_prompts():
        by_tag[prompt["tag"]].add(meaning(prompt))
    held_out: set[str] = set()
    for tag, meanings in by_tag.items():
        # A hash, not a generator: the split can never depend on a library's random numbers.
        ordered = sorted(meanings, key=lambda text: hashlib.blake2b(f"held out {text}".encode()).digest())
        held_out.update(ordered[: round(len(ordered) * HELD_OUT_SHARE[tag])])
    return frozenset(held_out)


def all_prompts(split: Literal["train", "heldout"]) -> tuple[Metadata, ...]:
    """Return every prompt of a split, in a fixed order.

    Raises:
        ValueError: If the split is neither "train" nor "heldout".
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split: got {split!r}, needed 'train' or 'heldout'")
    held_out = held_out_meanings()
    return tuple(prompt for prompt in _all_prompts() if (meaning(prompt) in held_out) == (split == "heldout"))


def prompts(split: Literal["train", "heldout"] = "train", seed: int = 0, num: int | None = None) -> list[Metadata]:
    """Draw distinct prompts, the six tags in equal shares as far as each has prompts.

    Args:
        split: Training meanings or held-out meanings; no meaning is in both.
        seed: The same seed gives the same prompts in the same order.
        num: How many; None for all. Tags with few prompts give what they have and the others fill up.

    Returns:
        Metadata of ``num`` distinct prompts, tags interleaved.

    Raises:
        ValueError: If the split is unknown, or more prompts are asked for than there are.

    Examples:
        >>> [record["tag"] for record in prompts("heldout", seed=0, num=3)]
        ['single_object', 'two_object', 'counting']
    """
    available = all_prompts(split)
    num = len(available) if num is None else num
    if not 0 < num <= len(available):
        raise ValueError(f"num: got {num}, needed 1 to {len(available)} (the {split!r} prompts there are)")
    generator = torch.Generator().manual_seed(seed)
    queues = []
    for tag in TAGS:
        of_tag = [prompt for prompt in available if prompt["tag"] == tag]
        queues.append([of_tag[i] for i in torch.randperm(len(of_tag), generator=generator).tolist()])
    rounds = max(len(queue) for queue in queues)
    interleaved = [queue[i] for i in range(rounds) for queue in queues if i < len(queue)]
    return [dict(record) for record in interleaved[:num]]
