"""The table of recipes in the documentation is what the code says."""

from pathlib import Path

import pytest

from flowalign.estimators import names
from flowalign.estimators.table import USES, page, row

PAGE = Path(__file__).parents[2] / "docs" / "estimators.md"


def test_the_committed_page_is_what_the_code_generates():
    assert PAGE.read_text() == page(), "write it anew: python -m flowalign.estimators.table > docs/estimators.md"


def test_every_recipe_has_a_row_and_says_when_to_use_it():
    assert sorted(USES) == names()
    for name in names():
        assert f"| `{name}` |" in page()


@pytest.mark.parametrize("name", names())
def test_every_recipe_names_its_source(name):
    cells = [cell.strip() for cell in row(name).replace("\\|", "").strip("|").split("|")]
    assert len(cells) == 6
    assert all(cells)
    assert "](https://" in cells[5] or name in ("adora", "bpo")  # no address of a paper is known
