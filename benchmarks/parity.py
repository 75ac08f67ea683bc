"""The parity table, families x checks, on tiny random components: ``python -m benchmarks.parity [CASE ...]``, under a minute on one core."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence

from flowalign.pipelines import parity
from tests.pipelines.families import CASES, build


def table(cases: Sequence[str]) -> tuple[str, bool]:
    """Build every case and run every check on it.

    Returns:
        The table in Markdown, and whether all checks passed.
    """
    lines = [f"| family | {' | '.join(parity.CHECKS)} |", "|---" * (len(parity.CHECKS) + 1) + "|"]
    passed = True
    for case in cases:
        found = list(parity.findings(build(case)))
        passed = passed and all(finding.passed for finding in found)
        lines.append(f"| {case} | {' | '.join(finding.found if finding.passed else f'FAILED: {finding.found}' for finding in found)} |")
    return "\n".join(lines), passed


def main() -> None:
    """Print the table; exit with 1 if a check failed."""
    logging.disable(logging.WARNING)  # tiny tokenizers truncate every prompt and say so
    warnings.simplefilter("ignore")
    text, passed = table(sys.argv[1:] or list(CASES))
    print(text)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
