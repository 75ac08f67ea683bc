"""Prompts: read from a file, and drawn step by step without any state."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from flowalign.core.randomness import generator, key

_Item = TypeVar("_Item")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt: its text, its record (GenEval's or any columns), an id that stays the same from run to run, and where it stands."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)
    uid: int
    where: str = ""


def number(records: Sequence[dict[str, Any]], where: str, places: Sequence[str] = ()) -> list[Prompt]:
    """Give records their ids: a hash of the text and of how often it came before; ``places`` says where each stands.

    Raises:
        ValueError: If there are none.
    """
    if not records:
        raise ValueError(f"{where}: no prompts there; needed at least one")
    seen: dict[str, int] = {}
    prompts = []
    for row, record in enumerate(records):
        text = record["prompt"]
        seen[text] = seen.get(text, 0) + 1
        prompts.append(
            Prompt(text=text, metadata=dict(record), uid=key("prompt", text, seen[text]), where=places[row] if places else where)
        )
    return prompts


def read_prompts(path: Path) -> list[Prompt]:
    """Read prompts from ``.txt`` (one a line) or ``.jsonl`` (``prompt`` and any other columns).

    Raises:
        FileNotFoundError: If the file is not there.
        ValueError: If a line is broken (its number is named), the file is empty, or its ending is another.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such prompt file")
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{path}: prompt files end in .txt (one prompt a line) or .jsonl (a record a line), not {path.suffix!r}")
    records, places = [], []
    # Split as bytes: str.splitlines would also break at separators that are legal inside a JSON string.
    for line_number, raw in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, line {line_number}: not UTF-8 (byte {raw[error.start]:#x} at position {error.start}); save it as UTF-8"
            ) from None
        if line.strip():
            places.append(f"{path}, line {line_number}")
            records.append(_line(line, places[-1]) if path.suffix == ".txt" else _record(line, places[-1]))
    return number(records, str(path), places)


def _line(line: str, where: str) -> dict[str, Any]:
    if line.lstrip().startswith("{") and line.rstrip().endswith("}"):
        with suppress(json.JSONDecodeError):
            json.loads(line)
            raise ValueError(f"{where}: a JSON object in a file of plain prompts; rename the file to .jsonl")
    return {"prompt": line.strip()}


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not a JSON object ({error.msg})") from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
        raise ValueError(f"{where}: needs an object with a non-empty string 'prompt', got {line.strip()[:80]}")
    return record


def draw(prompts: Sequence[Prompt], *, seed: int, step: int, num: int) -> list[Prompt]:
    """Return the prompts of a step: shuffled passes over the set without replacement, a pure function of seed and step.

    Args:
        prompts: The set.
        seed: Seed of the run.
        step: The step.
        num: Prompts of a step; a step takes each prompt at most once if the set is large enough.

    Examples:
        >>> few = [Prompt(text=t, uid=i) for i, t in enumerate("abcd")]
        >>> sorted(p.text for step in (0, 1) for p in draw(few, seed=0, step=step, num=2))
        ['a', 'b', 'c', 'd']
    """
    return _dealt(prompts, seed, "prompt order", range(step * num, (step + 1) * num))


def draw_by_tag(prompts: Mapping[str, Sequence[Prompt]], weights: Mapping[str, int], *, seed: int, step: int, num: int) -> list[Prompt]:
    """Return the prompts of a step, the tags in given proportions: of ``sum(weights)`` prompts in a row each tag gets its weight exactly.

    Args:
        prompts: The prompts of each tag; every tag passes over its own without replacement.
        weights: How often each tag comes; 0 for never.
        seed: Seed of the run.
        step: The step.
        num: Prompts of a step.

    Examples:
        >>> sets = {tag: [Prompt(text=f"{tag} {i}", uid=i) for i in range(5)] for tag in ("easy", "hard")}
        >>> drawn = [p.text.split()[0] for step in (0, 1) for p in draw_by_tag(sets, {"easy": 1, "hard": 3}, seed=0, step=step, num=4)]
        >>> drawn.count("easy"), drawn.count("hard")
        (2, 6)
    """
    deck = [tag for tag in sorted(weights) for _ in range(weights[tag])]
    chosen: list[Prompt] = []
    for position in range(step * num, (step + 1) * num):
        passes, place = divmod(position, len(deck))
        dealt = _dealt(deck, seed, "tag order", range(passes * len(deck), position + 1))
        tag = dealt[place]
        earlier = passes * weights[tag] + dealt[:place].count(tag)
        chosen += _dealt(prompts[tag], seed, f"prompt order of {tag}", range(earlier, earlier + 1))
    return chosen


def by_tag(prompts: Sequence[Prompt], weights: Mapping[str, int]) -> dict[str, list[Prompt]]:
    """Sort prompts by their record's "tag".

    Raises:
        ValueError: If a prompt has no tag, a tag has no weight, or a weight has no prompts.
    """
    sorted_prompts: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        if "tag" not in prompt.metadata:
            raise ValueError(f"prompts.tag_weights: prompt {prompt.text!r} has no 'tag' in its record; remove tag_weights or add tags")
        sorted_prompts.setdefault(prompt.metadata["tag"], []).append(prompt)
    for tag in sorted(sorted_prompts.keys() ^ weights.keys()):
        missing = "has prompts but no weight (0 leaves it out)" if tag in sorted_prompts else "is not a tag of these prompts"
        raise ValueError(f"prompts.tag_weights: {tag!r} {missing}; the tags are {', '.join(sorted(sorted_prompts))}")
    return sorted_prompts


def _dealt(items: Sequence[_Item], seed: int, purpose: str, positions: range) -> list[_Item]:
    """Return what lies at these positions of endless shuffled passes over the items."""
    dealt: list[_Item] = []
    order: list[int] = []
    for position in positions:
        epoch, place = divmod(position, len(items))
        if place == 0 or not order:
            order = torch.randperm(len(items), generator=generator(seed, purpose, epoch)).tolist()
        dealt.append(items[order[place]])
    return dealt
