"""The common estimator core: from a table of rewards to advantages, for reinforcement learning and distillation alike.

>>> import torch
>>> from flowalign.estimators import RewardBatch, estimate
>>> batch = RewardBatch(
...     rewards=torch.tensor([[1.0], [0.0], [0.0], [0.0]]), group_id=torch.zeros(4, dtype=torch.int64), sample_uid=torch.arange(4)
... )
>>> estimate("rloo", batch).advantage.flatten()
tensor([ 1.0000, -0.3333, -0.3333, -0.3333])
"""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flowalign.estimators import recipes
from flowalign.estimators.batch import AdvantageBatch as AdvantageBatch
from flowalign.estimators.batch import RewardBatch as RewardBatch
from flowalign.estimators.batch import Tree as Tree
from flowalign.estimators.chain import Estimator as Estimator
from flowalign.estimators.chain import chain
from flowalign.estimators.options import fit
from flowalign.estimators.signals import Stage
from flowalign.estimators.spelling import unknown
from flowalign.estimators.stages import STAGES


@functools.cache
def _names() -> tuple[str, ...]:
    return tuple(sorted(module.name for module in pkgutil.iter_modules(recipes.__path__)))


def names() -> list[str]:
    """List every recipe."""
    return list(_names())


def config(name: str) -> Any:
    """Return the ``Config`` class of a recipe.

    Raises:
        ValueError: If there is no such recipe; the nearest name is offered.
    """
    if name not in _names():
        raise ValueError(unknown("recipe", name, names()))
    return importlib.import_module(f"{recipes.__name__}.{name}").Config


def _call(what: str, make: Callable[[], Any], options: Mapping[str, Any], known: Sequence[str]) -> Any:
    """Make something, with its name before whatever is wrong with its options."""
    wrong = next((key for key in options if key not in known), None)
    if wrong is not None:
        raise ValueError(f"{what}: {unknown('option', wrong, known)}")
    try:
        return make()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: {error}") from error


def recipe(name: str, **options: Any) -> Estimator:
    """Build a named estimator.

    Args:
        name: One of ``names()``.
        options: Fields of the recipe's ``Config``.

    Returns:
        The estimator.

    Raises:
        ValueError: If the recipe or an option is unknown, and the nearest name is offered; or an option does not fit.

    Examples:
        >>> recipe("gpro")
        Traceback (most recent call last):
        ValueError: unknown recipe 'gpro': did you mean 'grpo'?
    """
    made = config(name)
    kinds = typing.get_type_hints(made)

    def make() -> Estimator:
        built: Estimator = made(**{key: fit(kinds[key], value, key) for key, value in options.items()}).build()
        return built

    estimator: Estimator = _call(f"recipe {name!r}", make, options, [field.name for field in dataclasses.fields(made)])
    return estimator


def from_config(spec: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]], **defaults: Any) -> Estimator:
    """Build an estimator from a configuration.

    Args:
        spec: A recipe's name, ``{"type": name, ...options}``, or a list of stages: names, or ``{"stage": name, ...options}``.
        defaults: Options that a recipe gets where the configuration does not name them.

    Raises:
        ValueError: If something is unknown or the stages do not fit together.
    """
    if isinstance(spec, str):
        return recipe(spec, **defaults)
    if isinstance(spec, Mapping):
        given = {**defaults, **spec}
        if "type" not in given:
            raise ValueError("advantage: needs a 'type', for example {type: grpo, eps: 1e-4}")
        return recipe(str(given.pop("type")), **given)
    if not isinstance(spec, Sequence):
        raise ValueError(f"advantage: got {spec!r}, needed a recipe's name, a mapping with a 'type', or a list of stages")
    stages: list[Stage] = []
    for position, entry in enumerate(spec):
        if not isinstance(entry, str) and not (isinstance(entry, Mapping) and "stage" in entry):
            raise ValueError(
                f"advantage[{position}]: got {entry!r}, needed a stage's name, or a mapping such as {{stage: center, over: group}}"
            )
        given = {"stage": entry} if isinstance(entry, str) else dict(entry)
        name = str(given.pop("stage"))
        if name not in STAGES:
            raise ValueError(f"advantage[{position}]: {unknown('stage', name, STAGES)}")
        make = STAGES[name]
        known = list(inspect.signature(make).parameters)
        stages.append(_call(f"advantage[{position}] ({name})", functools.partial(make, **given), given, known))
    return chain(*stages)


def estimate(name: str, batch: RewardBatch, **options: Any) -> AdvantageBatch:
    """Turn one batch of rewards into advantages, without keeping state."""
    estimator = recipe(name, **options)
    return estimator.update(batch, estimator.init())[0]


def explain(name: str, **options: Any) -> str:
    """Write a recipe's chain of stages, one a line.

    Examples:
        >>> print(explain("dr_grpo"))
        1. combine_rewards
        2. center(over=group)
        3. broadcast_steps
    """
    return "\n".join(f"{i}. {stage.name}" for i, stage in enumerate(recipe(name, **options).stages, 1))
