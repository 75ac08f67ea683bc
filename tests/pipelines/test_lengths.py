"""A family's file states only what cannot be read off a recording: it stays short, and the documentation says how long it is."""

import re
from pathlib import Path

from flowalign.pipelines.choose import FAMILIES

ROOT = Path(__file__).parents[2]
MOST = 100


def lines(family):
    return len((ROOT / "pipelines" / f"{family}.py").read_text().splitlines())


def test_a_family_takes_at_most_a_hundred_lines():
    assert len(set(FAMILIES.values())) == 6
    assert {family: lines(family) for family in FAMILIES.values() if lines(family) > MOST} == {}


def test_the_documentation_tells_how_many():
    text = (ROOT / "docs" / "families.md").read_text()
    told = {name: int(number) for name, number in re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|$", text, re.MULTILINE)}
    assert told == {family: lines(family) for family in (*FAMILIES.values(), "auto")}
