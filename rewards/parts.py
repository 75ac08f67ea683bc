"""Which images of a call belong together: the one rule by which runs, suites, clients and servers cut and join them.

A reward that says ``scores_alone = True`` scores each image by itself: its images may come in any parts, and with others'. The score of any other may
depend on the other images of its prompt: those always come together, in one call that holds nobody else's images.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable


def scores_alone(reward: object) -> bool:
    """Tell whether a reward, a function or a suite scores each image by itself; what has no such attribute does not.

    Examples:
        >>> scores_alone(len)
        False
    """
    return bool(getattr(reward, "scores_alone", False))  # read once: a client may have to ask its server


def cut(keys: Iterable[Hashable], size: int) -> list[list[int]]:
    """Cut rows into parts of at most ``size`` rows; rows of equal keys stay together, in a part that is larger if they are more.

    Args:
        keys: One for each row: its prompt, or its number where any cut will do.
        size: Rows of a part.

    Returns:
        The rows of each part.

    Examples:
        >>> cut(range(5), 2), cut(["a", "b", "a", "a", "c"], 2)
        ([[0, 1], [2, 3], [4]], [[0, 2, 3], [1, 4]])
    """
    together: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        together.setdefault(key, []).append(row)
    parts: list[list[int]] = []
    for rows in together.values():
        if parts and len(parts[-1]) + len(rows) <= size:
            parts[-1] += rows
        else:
            parts.append(rows)
    return parts
