"""A plugin is a file: ``type: awm`` is ``flowalign/algorithms/awm.py``, which holds a ``Config`` dataclass with ``build()``.

No decorator and no table: a file that defines a class ``Config`` is a plugin. Nothing is imported until it is used.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
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
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.ClassDef) and node.name == "Config" for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def load(kind: str, name: str) -> Any:
    """Return the ``Config`` class of a plugin.

    Args:
        kind: One of ``KINDS``.
        name: A plugin's name, or with a dot a module of the user's own.

    Raises:
        ValueError: If there is no such plugin; the nearest name is offered.
    """
    if "." in name:
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise ValueError(f"no module {name!r}; a type with a dot is a module of your own, importable from here")
        module = importlib.import_module(name)
        if "Config" not in vars(module):
            raise ValueError(f"module {name!r} has no class Config (a frozen dataclass with build())")
        return module.Config
    names = available(kind)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
        raise ValueError(f"unknown type {name!r} of {kind}: {hint}")
    return importlib.import_module(f"{KINDS[kind]}.{name}").Config


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
