"""A plugin is a file: ``type: awm`` is ``flowalign/algorithms/awm.py``, which holds a ``Config`` dataclass with ``build()``.

No decorator and no table: a file that defines a class ``Config`` is a plugin. Nothing is imported until it is used.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

KINDS = {
    "pipelines": "flowalign.pipelines",
    "rewards": "flowalign.rewards",
    "algorithms": "flowalign.algorithms",
    "estimators": "flowalign.estimators.recipes",
}


def _folder(kind: str) -> Path:
    # Found without importing the package, so that listing stays fast.
    here = Path(__file__).parent
    return here.joinpath(*KINDS[kind].split(".")[1:])


def available(kind: str) -> dict[str, str]:
    """List the plugins of a kind with the first line of their documentation, without importing them.

    Examples:
        >>> {"awm", "flow_grpo", "tempflow_grpo"} <= set(available("algorithms"))
        True
    """
    found = {}
    for path in sorted(_folder(kind).glob("*.py")):
        told = _told(path, path.stat().st_mtime_ns)
        if told is not None:
            found[path.stem] = told
    return found


@functools.cache
def _told(path: Path, modified_ns: int) -> str | None:
    """Return the first line of a plugin's documentation; None where a file is none. Read once: every configuration asks."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not any(isinstance(node, ast.ClassDef) and node.name == "Config" for node in tree.body):
        return None
    return (ast.get_docstring(tree) or "").partition("\n")[0]


def load(kind: str, name: str) -> Any:
    """Return the ``Config`` class of a plugin.

    Args:
        kind: One of ``KINDS``.
        name: A plugin's name, or with a dot a module of the user's own; of rewards also a function in one.

    Raises:
        ValueError: If there is no such plugin; the nearest name is offered.
    """
    if "." in name:
        return _own(kind, name)
    names = available(kind)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
        raise ValueError(f"unknown type {name!r} of {kind}: {hint}")
    return importlib.import_module(f"{KINDS[kind]}.{name}").Config


def of_function(function: Callable[..., Any], name: str | None = None) -> Any:
    """Return the configuration of a plain reward ``f(prompts, images, **columns)``, a function or anything callable, as if it were a plugin of that name.

    Examples:
        >>> of_function(lambda prompts, images: [len(prompt) for prompt in prompts], "mine.length").__module__
        'mine.length'
    """

    def build(config: Any) -> Any:
        from flowalign.rewards.plain import PlainReward

        return PlainReward(function)

    known = getattr(function, "func", function)  # what a functools.partial calls
    known = known if hasattr(known, "__qualname__") else type(known)
    namespace = {"build": build, "__doc__": function.__doc__, "__module__": name or f"{known.__module__}.{known.__qualname__}"}
    return dataclasses.make_dataclass("Config", [], frozen=True, kw_only=True, namespace=namespace)


def _own(kind: str, name: str) -> Any:
    """Find a plugin of the user's own: a module with a ``Config``, or (rewards) a function in a module."""
    if _is_module(name):
        module = importlib.import_module(name)
        if "Config" not in vars(module):
            raise ValueError(f"module {name!r} has no class Config (a frozen dataclass with build())")
        return module.Config
    parent, _, last = name.rpartition(".")
    if kind != "rewards" or not _is_module(parent):
        raise ValueError(f"no module {name!r}; a type with a dot is a module of your own, importable from here")
    module = importlib.import_module(parent)
    if not callable(vars(module).get(last)):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == parent]
        near = difflib.get_close_matches(last, functions, n=1, cutoff=0.4)
        hint = f"did you mean {parent}.{near[0]}?" if near else "a reward function is f(prompts, images, **columns)"
        raise ValueError(f"module {parent!r} has no function {last!r}: {hint}")
    return of_function(vars(module)[last], name)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def require(package: str, extra: str | None = None) -> Any:
    """Import an optional package.

    Raises:
        ImportError: With the command that installs it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        wanted = f"'flowalign-diffusion[{extra}]'" if extra else package
        raise ImportError(f"{package} is not installed; run: pip install {wanted}") from error
