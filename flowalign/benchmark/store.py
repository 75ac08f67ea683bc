"""Where the cells of a benchmark lie, and what they found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flowalign.benchmark.cell import RESULT
from flowalign.benchmark.spec import BenchmarkConfig, Cell


def folder_of(config: BenchmarkConfig, cell: Cell) -> Path:
    """Return where a cell lies."""
    return config.output / cell.name


def read_result(config: BenchmarkConfig, cell: Cell) -> dict[str, Any] | None:
    """Read a finished cell; None where it has not finished."""
    path = folder_of(config, cell) / RESULT
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
