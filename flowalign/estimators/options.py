"""Options of stages and recipes: checked against their annotations when something is built, and written out for people to read."""

import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from flowalign.estimators.spelling import unknown


def fit(kind: Any, value: Any, where: str) -> Any:
    """Check a value against an annotation, so that a mistake is found when a chain is built and not after a rollout.

    Args:
        kind: ``int``, ``float``, ``bool``, ``str``, a ``Literal``, a sequence or tuple of these, or a union of them. ``Annotated`` names further
            values, such as infinity.
        value: What was given; lists stand for tuples and whole numbers for floats, as YAML writes them.
        where: Name of the option, for the message.

    Returns:
        The value, tuples for lists and floats for whole numbers where floats are wanted.

    Raises:
        ValueError: If the value does not fit; says what is needed.

    Examples:
        >>> fit(float | None, 1, "eps")
        1.0
        >>> fit(typing.Literal["add", "floor"], "ad", "rule")
        Traceback (most recent call last):
        ValueError: rule: unknown value 'ad': did you mean 'add'?
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _fit_any(arguments, value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(f"{where}: {unknown('value', value, map(str, arguments))}")
        return value
    if origin in (tuple, Sequence):
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise ValueError(f"{where}: got {value!r}, needed a list")
        return tuple(fit(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is typing.Annotated:
        return value if value in arguments[1:] else fit(arguments[0], value, where)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f"{where}: got {value}, needed a finite number")
        return float(value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{where}: got {value!r}, needed {_word(kind)}")


def at_least(name: str, value: float | int, least: float | int) -> None:
    """Refuse an option below its least value.

    Raises:
        ValueError: If it is.
    """
    if value < least:
        raise ValueError(f"{name}: got {value:g}, needed at least {least:g}")


def inside(name: str, value: float | int, low: float, high: float) -> None:
    """Refuse an option outside its range, ends included.

    Raises:
        ValueError: If it is.
    """
    if not low <= value <= high:
        raise ValueError(f"{name}: got {value:g}, needed a number in [{low:g}, {high:g}]")


def positive(name: str, value: float | int) -> None:
    """Refuse an option that is not above 0.

    Raises:
        ValueError: If it is not.
    """
    if not value > 0:
        raise ValueError(f"{name}: got {value:g}, needed a positive number")


def _fit_any(kinds: Sequence[Any], value: Any, where: str) -> Any:
    """Take the first kind that fits; if none does, the message of the one that came closest in form."""
    problems = []
    for kind in kinds:
        if kind is type(None):
            if value is None:
                return None
            continue
        try:
            return fit(kind, value, where)
        except ValueError as problem:
            problems.append(problem)
    raise problems[-1 if isinstance(value, list | tuple) else 0]


def _word(kind: Any) -> str:
    return {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a word"}.get(kind.__name__, kind.__name__)


def title(name: str, options: Mapping[str, Any]) -> str:
    """Write a stage with every option that is set, as ``explain`` prints it.

    Examples:
        >>> title("scale_by_std", {"over": "group", "eps": 1e-4, "weights": None})
        'scale_by_std(over=group, eps=0.0001)'
    """
    shown = ", ".join(f"{key}={_written(value)}" for key, value in options.items() if value is not None)
    return f"{name}({shown})" if shown else name


def _written(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_written, value))}]"
    return str(value)
