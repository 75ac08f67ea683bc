"""GenEval's prompts: the 553 official ones, made again bit for bit, and others of the same kinds in any number, with objects kept unseen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from flowalign.core.randomness import generator
from flowalign.shapes.prompts import meaning

Metadata = dict[str, Any]
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
MAX_CLAUSES = 4  # official prompts have at most 2
OFFICIAL_SEED = 43
OFFICIAL_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"  # of the official metadata file
# COCO's classes in COCO's order, which is that of a detector's outputs; three have other names than in COCO.
CLASSES = tuple(
    """person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant|stop sign|parking meter|bench|bird|cat|dog|
horse|sheep|cow|elephant|bear|zebra|giraffe|backpack|umbrella|handbag|tie|suitcase|frisbee|skis|snowboard|sports ball|kite|baseball bat|
baseball glove|skateboard|surfboard|tennis racket|bottle|wine glass|cup|fork|knife|spoon|bowl|banana|apple|sandwich|orange|broccoli|carrot|
hot dog|pizza|donut|cake|chair|couch|potted plant|bed|dining table|toilet|tv|laptop|computer mouse|tv remote|computer keyboard|cell phone|
microwave|oven|toaster|sink|refrigerator|book|clock|vase|scissors|teddy bear|hair drier|toothbrush""".replace("\n", "").split("|")
)
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
NUM_UNSEEN = 20  # classes, as in Flow-GRPO's unseen-object split (which ones is ours)


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def single_object(thing: str) -> Metadata:
    """Ask for one object."""
    return {"tag": "single_object", "include": [{"class": thing, "count": 1}], "prompt": f"a photo of {_a(thing)}"}


def two_object(one: str, two: str) -> Metadata:
    """Ask for two objects."""
    include = [{"class": one, "count": 1}, {"class": two, "count": 1}]
    return {"tag": "two_object", "include": include, "prompt": f"a photo of {_a(one)} and {_a(two)}"}


def counting(thing: str, count: int) -> Metadata:
    """Ask for a number of objects; the plural is GenEval's own, "toothbrushs" included."""
    plural = thing + ("es" if thing.endswith("s") else "s")
    include, exclude = [{"class": thing, "count": count}], [{"class": thing, "count": count + 1}]
    return {"tag": "counting", "include": include, "exclude": exclude, "prompt": f"a photo of {_NUMBERS[count]} {plural}"}


def colors(thing: str, color: str) -> Metadata:
    """Ask for an object of a colour."""
    return {
        "tag": "colors",
        "include": [{"class": thing, "count": 1, "color": color}],
        "prompt": f"a photo of {_a(color)} {thing}",
    }


def position(subject: str, relation: str, target: str) -> Metadata:
    """Ask for an object beside another; the target's clause comes first."""
    include = [{"class": target, "count": 1}, {"class": subject, "count": 1, "position": [relation, 0]}]
    return {"tag": "position", "include": include, "prompt": f"a photo of {_a(subject)} {relation} {_a(target)}"}


def color_attr(one: str, color: str, two: str, other: str) -> Metadata:
    """Ask for two objects of two colours."""
    include = [{"class": one, "count": 1, "color": color}, {"class": two, "count": 1, "color": other}]
    return {"tag": "color_attr", "include": include, "prompt": f"a photo of {_a(color)} {one} and {_a(other)} {two}"}


def official(*, seed: int = OFFICIAL_SEED, draws: int = 100) -> list[Metadata]:
    """Make GenEval's prompts: 553 with the official seed and number of draws, in the official order.

    Another seed gives further prompts of the very same distribution, duplicates removed.

    References:
        Ghosh et al., "GenEval", 2023, https://arxiv.org/abs/2310.11513; the order of random draws is that of the authors' script (MIT),
        the code is not.
    """
    rng = np.random.default_rng(seed)
    num = len(CLASSES)
    found = [single_object(CLASSES[i]) for i in rng.choice(num, size=num, replace=False)]
    for _ in range(draws):
        found.append(two_object(*(CLASSES[i] for i in rng.choice(num, size=2, replace=False))))
    for _ in range(draws):
        found.append(counting(CLASSES[rng.choice(num)], int(rng.integers(2, 4, endpoint=True))))
    for _ in range(draws):
        # Class 0 is "person", which never has a colour: the other classes are drawn and counted from 1.
        found.append(colors(CLASSES[rng.choice(num - 1) + 1], COLORS[rng.choice(len(COLORS))]))
    for _ in range(draws):
        subject, target = (CLASSES[i] for i in rng.choice(num, size=2, replace=False))
        found.append(position(subject, RELATIONS[rng.choice(len(RELATIONS))], target))
    for _ in range(draws):
        one, two = (CLASSES[i + 1] for i in rng.choice(num - 1, size=2, replace=False))
        color, other = (COLORS[i] for i in rng.choice(len(COLORS), size=2, replace=False))
        found.append(color_attr(one, color, two, other))
    return list({json.dumps(record): record for record in found}.values())


def unseen_classes() -> tuple[str, ...]:
    """Return the classes that no training prompt names: chosen by a hash, so that no library's random numbers can change them."""
    ordered = sorted(CLASSES[1:], key=lambda name: hashlib.blake2b(f"unseen {name}".encode()).digest())
    chosen = set(ordered[:NUM_UNSEEN])
    return tuple(name for name in CLASSES if name in chosen)


def generate(
    split: Literal["train", "unseen", "all"] = "train",
    *,
    seed: int = 0,
    num: int = 1000,
    weights: Mapping[str, int] | None = None,
    max_count: int = 4,
) -> list[Metadata]:
    """Make distinct prompts of GenEval's kinds.

    Args:
        split: "train" names the 60 seen classes and leaves out every meaning of the official prompts; "unseen" names the 20 others
            alone; "all" names all 80, and leaves out the official meanings too.
        seed: Another seed gives other prompts; the same seed gives the same.
        num: How many in all. Tags that have no more give their share to the others.
        weights: Share of each tag, whole numbers; None for equal shares.
        max_count: Highest number in "counting" prompts, 2 to 12 (official: 4).

    Returns:
        Metadata in GenEval's schema, the tags mixed in their proportions.

    Raises:
        ValueError: If an option is out of range, or there are fewer such prompts than asked for.
    """
    if split not in ("train", "unseen", "all"):
        raise ValueError(f"split: got {split!r}, needed 'train', 'unseen' or 'all'")
    if not 2 <= max_count < len(_NUMBERS):
        raise ValueError(f"max_count: got {max_count}, needed 2 to {len(_NUMBERS) - 1}")
    shares = {tag: 1 for tag in TAGS} if weights is None else dict(weights)
    unknown = next((tag for tag in shares if tag not in TAGS), None)
    if unknown is not None or not any(shares.values()) or min(shares.values()) < 0:
        raise ValueError(f"weights: got {shares}, needed whole numbers of at least 0, one positive, for tags among {', '.join(TAGS)}")
    unseen = set(unseen_classes())
    classes = [name for name in CLASSES if split == "all" or (name in unseen) == (split == "unseen")]
    taken = set() if split == "unseen" else {meaning(record) for record in official()}
    streams = {tag: _distinct(tag, classes, max_count, taken, seed) for tag, share in shares.items() if share}
    found: list[Metadata] = []
    while len(found) < num and streams:
        for tag in list(streams):
            for _ in range(shares[tag]):
                record = next(streams[tag], None)
                if record is None:
                    del streams[tag]
                    break
                found.append(record)
    if len(found) < num or num < 1:
        raise ValueError(f"num: got {num}, needed 1 to {len(found)} ({split!r} prompts of these tags there are)")
    return found[:num]


def _distinct(tag: str, classes: Sequence[str], max_count: int, taken: set[str], seed: int) -> Iterator[Metadata]:
    """Give every prompt of a tag once, in shuffled order, but for the meanings that are taken."""
    colored = [name for name in classes if name != "person"]
    pairs = len(colored if tag == "color_attr" else classes)
    palettes = len(COLORS) * (len(COLORS) - 1)
    sizes = {
        "single_object": len(classes),
        "two_object": pairs * (pairs - 1),
        "counting": len(classes) * (max_count - 1),
        "colors": len(colored) * len(COLORS),
        "position": pairs * (pairs - 1) * len(RELATIONS),
        "color_attr": pairs * (pairs - 1) * palettes,
    }
    for number in torch.randperm(sizes[tag], generator=generator(seed, "geneval prompts", tag)).tolist():
        record = _numbered(tag, number, classes, colored, max_count)
        if meaning(record) not in taken:
            yield record


def _numbered(tag: str, number: int, classes: Sequence[str], colored: Sequence[str], max_count: int) -> Metadata:
    """Return the prompt of a tag that has this number: every number gives another one."""

    def two(items: Sequence[str], index: int) -> tuple[str, str]:
        first, second = divmod(index, len(items) - 1)
        return items[first], items[second + (second >= first)]

    if tag == "single_object":
        return single_object(classes[number])
    if tag == "two_object":
        return two_object(*two(classes, number))
    if tag == "counting":
        thing, count = divmod(number, max_count - 1)
        return counting(classes[thing], count + 2)
    if tag == "colors":
        thing, color = divmod(number, len(COLORS))
        return colors(colored[thing], COLORS[color])
    if tag == "position":
        pair, relation = divmod(number, len(RELATIONS))
        subject, target = two(classes, pair)
        return position(subject, RELATIONS[relation], target)
    pair, palette = divmod(number, len(COLORS) * (len(COLORS) - 1))
    (one, other), (tint, shade) = two(colored, pair), two(COLORS, palette)
    return color_attr(one, tint, other, shade)


def check_record(record: Mapping[str, Any]) -> None:
    """Refuse a record that cannot be judged.

    Raises:
        ValueError: Says which clause, what was got and what is needed.
    """
    include = record.get("include")
    if not isinstance(include, list) or not include or record.get("tag") not in TAGS:
        raise ValueError(
            f"needs GenEval metadata, a 'tag' ({', '.join(TAGS)}) and a non-empty list 'include'; got tag {record.get('tag')!r}, include {include!r}"
        )
    if len(include) > MAX_CLAUSES:
        raise ValueError(f"include: got {len(include)} clauses, needed at most {MAX_CLAUSES}")
    for part in ("include", "exclude"):
        clauses = record.get(part, [])
        if not isinstance(clauses, list):
            raise ValueError(f"{part}: got {clauses!r}, needed a list of clauses (leave it out where there are none)")
        for number, clause in enumerate(clauses):
            _check_clause(f"{part}[{number}]", number, clause)


def _check_clause(where: str, number: int, clause: Any) -> None:
    if not isinstance(clause, Mapping) or clause.get("class") not in CLASSES:
        raise ValueError(
            f"{where}: class {clause.get('class') if isinstance(clause, Mapping) else clause!r} is not one of the 80 of GenEval"
        )
    if not isinstance(clause.get("count"), int) or clause["count"] < 1:
        raise ValueError(f"{where}: count {clause.get('count')!r}, needed a whole number of at least 1")
    if "color" in clause and clause["color"] not in COLORS:
        raise ValueError(f"{where}: color {clause['color']!r}, needed one of {', '.join(COLORS)}")
    place = clause.get("position")
    if place is not None and not _is_place(place, number):
        raise ValueError(f"{where}: position {place!r}, needed [relation, number of an earlier clause], relations {', '.join(RELATIONS)}")


def _is_place(place: Any, number: int) -> bool:
    if not isinstance(place, list | tuple) or len(place) != 2:
        return False
    return place[0] in RELATIONS and isinstance(place[1], int) and 0 <= place[1] < number
