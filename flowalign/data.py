"""Prompts: read from a file, and drawn step by step without any state."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flowalign.core.randomness import generator, key


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt: its text, its record (GenEval's or any columns), and an id that stays the same from run to run."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)
    uid: int


def number(records: Sequence[dict[str, Any]], where: str) -> list[Prompt]:
    """Give records their ids: a hash of the text and of how often it came before.

    Raises:
        ValueError: If there are none.
    """
    if not records:
        raise ValueError(f"{where}: no prompts there; needed at least one")
    seen: dict[str, int] = {}
    prompts = []
    for record in records:
        text = record["prompt"]
        seen[text] = seen.get(text, 0) + 1
        prompts.append(Prompt(text=text, metadata=dict(record), uid=key("prompt", text, seen[text])))
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
    records = []
    for line_number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if line.strip():
            records.append({"prompt": line.strip()} if path.suffix == ".txt" else _record(line, f"{path}, line {line_number}"))
    return number(records, str(path))


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
    first = step * num
    drawn: list[Prompt] = []
    for position in range(first, first + num):
        epoch, place = divmod(position, len(prompts))
        if place == 0 or not drawn:
            order = torch.randperm(len(prompts), generator=generator(seed, "prompt order", epoch)).tolist()
        drawn.append(prompts[order[place]])
    return drawn
