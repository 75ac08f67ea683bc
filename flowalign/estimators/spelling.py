"""The same answer to every misspelt name: say what was got, and offer the nearest right one."""

import difflib
from collections.abc import Iterable


def unknown(what: str, got: object, choices: Iterable[str]) -> str:
    """Word the error for a name that is not among the known ones.

    Args:
        what: The thing that is named, for example ``"recipe"``.
        got: The name that was given.
        choices: The names that exist.

    Returns:
        One sentence with the nearest name, or with all names when none is near.

    Examples:
        >>> unknown("recipe", "gpro", ["grpo", "rloo"])
        "unknown recipe 'gpro': did you mean 'grpo'?"
        >>> unknown("rule", "xyz", ["add", "floor"])
        "unknown rule 'xyz': known are 'add', 'floor'"
    """
    names = sorted(choices)
    near = difflib.get_close_matches(str(got), names, n=1, cutoff=0.5)
    if near:
        return f"unknown {what} {got!r}: did you mean {near[0]!r}?"
    return f"unknown {what} {got!r}: known are {', '.join(map(repr, names)) or '(none)'}"
