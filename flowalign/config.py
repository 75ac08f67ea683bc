"""Configuration: strict YAML into frozen dataclasses and back, with errors that name the place and the nearest right word.

Overrides (``--train.learning_rate 1e-4``) are applied to the mapping before it is decoded, not by a second parser over the result:
fields whose class is only known from ``type`` then follow the very same rules, and a mistyped override gets the same answer as a mistyped key.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flowalign import plugins


class ConfigError(ValueError):
    """A configuration that cannot be meant; says where, what was got and what is needed."""


@dataclass(frozen=True)
class Plugin:
    """Marks a field whose class is chosen by its ``type``: ``Annotated[Any, Plugin("rewards")]``."""

    kind: str


class _UniqueKeys(yaml.SafeLoader):  # type: ignore[misc, unused-ignore]
    """YAML in which a key that is given twice is an error: the first would be lost silently."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ConfigError(f"line {node.start_mark.line + 1}: key {twice!r} is given twice")
    loader.flatten_mapping(node)
    result: dict[Any, Any] = loader.construct_mapping(node, deep=True)
    return result


# YAML 1.1 reads 1e-4 as a string; people mean the number.
_UniqueKeys.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_UniqueKeys)  # a SafeLoader: it builds no objects


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        FileNotFoundError: If the file is not there.
        ConfigError: If it is not a YAML mapping, or a key is given twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such configuration file")
    try:
        data = _parse(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: needs a mapping of keys, got {type(data).__name__}")
    return data


def _unknown(where: str, key: object, known: Sequence[str]) -> ConfigError:
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    return ConfigError(f"{where + '.' if where else ''}{key}: unknown key; {hint}")


def decode(kind: Any, data: Any, where: str = "") -> Any:
    """Turn plain YAML data into a value of a type.

    Args:
        kind: A dataclass or any annotation it may hold.
        data: What YAML gave.
        where: Dotted path for messages.

    Returns:
        The value.

    Raises:
        ConfigError: Where the data does not fit.
    """
    if typing.get_origin(kind) is typing.Annotated:
        inner, *marks = typing.get_args(kind)
        mark = next((mark for mark in marks if isinstance(mark, Plugin)), None)
        if mark is None:
            return decode(inner, data, where)
        if data is None and type(None) in typing.get_args(inner):
            return None
        return _decode_plugin(mark.kind, data, where)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, data, where)
    return _decode_plain(kind, data, where)


def _decode_plugin(kind: str, data: Any, where: str) -> Any:
    if isinstance(data, str):
        data = {"type": data}
    if not isinstance(data, Mapping) or "type" not in data:
        raise ConfigError(f"{where}: needs a mapping with a 'type', got {data!r}")
    try:
        chosen = plugins.load(kind, str(data["type"]))
    except ValueError as error:
        raise ConfigError(f"{where}.type: {error}") from None
    return _decode_dataclass(chosen, {key: value for key, value in data.items() if key != "type"}, where)


def _decode_dataclass(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or 'configuration'}: needs a mapping of keys, got {data!r}")
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in data:
        if key not in fields:
            raise _unknown(where, key, list(fields))
    values = {}
    for name, field in fields.items():
        place = f"{where}.{name}" if where else name
        if name in data:
            values[name] = decode(hints[name], data[name], place)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{place}: missing, and has no default")
    try:
        return kind(**values)
    except ConfigError:
        raise
    except ValueError as error:
        text = str(error)
        raise ConfigError(text if where and text.startswith(where) else f"{where + ': ' if where else ''}{text}") from error


def _decode_plain(kind: Any, data: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return data
    if origin in (typing.Union, types.UnionType):
        return _decode_union(arguments, data, where)
    if origin is typing.Literal:
        if data in arguments and any(type(data) is type(choice) for choice in arguments):
            return data
        near = difflib.get_close_matches(str(data), [str(choice) for choice in arguments], n=1)
        raise ConfigError(
            f"{where}: got {data!r}, needed one of {', '.join(map(str, arguments))}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    if origin in (tuple, list):
        if not isinstance(data, list | tuple):
            raise ConfigError(f"{where}: needs a list, got {data!r}")
        if origin is tuple and arguments[-1:] != (...,) and len(arguments) != len(data):
            raise ConfigError(f"{where}: needs {len(arguments)} values, got {len(data)}")
        inner = arguments[0] if origin is list or arguments[-1:] == (...,) else None
        return origin(decode(inner or arguments[i], item, f"{where}[{i}]") for i, item in enumerate(data))
    if dict in (origin, kind) or origin is Mapping:
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where}: needs a mapping, got {data!r}")
        return dict(data)
    return _decode_leaf(kind, data, where)


def _decode_union(arguments: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in arguments:
        return None
    errors = []
    for option in arguments:
        if option is type(None):
            continue
        try:
            return decode(option, data, where)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]


def _decode_leaf(kind: Any, data: Any, where: str) -> Any:
    if kind is float and isinstance(data, int | float) and not isinstance(data, bool):
        return float(data)
    if kind is int and isinstance(data, int) and not isinstance(data, bool):
        return data
    if kind is bool and isinstance(data, bool):
        return data
    if kind is str and isinstance(data, str):
        return data
    if kind is Path and isinstance(data, str):
        return Path(data)
    raise ConfigError(f"{where}: needs {kind.__name__}, got {data!r} ({type(data).__name__})")


def encode(config: Any, kind: Any = None) -> Any:
    """Turn a configuration into plain data that ``decode`` takes back, plugin types included."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        hints = typing.get_type_hints(type(config), include_extras=True)
        values = {field.name: encode(getattr(config, field.name), hints[field.name]) for field in dataclasses.fields(config)}
        plugin = _plugin_of(kind)
        return {"type": _plugin_name(plugin, config), **values} if plugin else values
    if isinstance(config, list | tuple):
        inner = next((argument for argument in typing.get_args(kind) if argument is not ...), None)
        return [encode(item, inner) for item in config]
    if isinstance(config, Mapping):
        return {key: encode(value) for key, value in config.items()}
    return str(config) if isinstance(config, Path) else config


def _plugin_of(kind: Any) -> Plugin | None:
    if typing.get_origin(kind) is typing.Annotated:
        return next((mark for mark in typing.get_args(kind)[1:] if isinstance(mark, Plugin)), None)
    return None


def _plugin_name(plugin: Plugin, config: Any) -> str:
    module = type(config).__module__
    package = plugins.KINDS[plugin.kind]
    return module.removeprefix(f"{package}.") if module.startswith(f"{package}.") else module


def override(data: dict[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """Apply ``--a.b value`` arguments to a mapping; values are YAML.

    Raises:
        ConfigError: If the arguments are not pairs, or lead through something that is no mapping.

    Examples:
        >>> override({"train": {"groups": 8}}, ["--train.groups", "4", "--seed=1"])
        {'train': {'groups': 4}, 'seed': 1}
    """
    result = {**data}
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if len(words) % 2:
        raise ConfigError(f"override {words[-1]!r}: needs a value, for example --train.learning_rate 1e-4")
    for flag, text in zip(words[::2], words[1::2], strict=True):
        if not flag.startswith("--"):
            raise ConfigError(f"got {flag!r}, needed an override such as --train.learning_rate 1e-4")
        *path, last = flag[2:].replace("-", "_").split(".")
        at: Any = result
        for key in path:
            at = _descend(at, key, flag)
        try:
            value = _parse(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{flag}: {text!r} is not valid YAML: {' '.join(str(error).split())}") from error
        if isinstance(at, list):
            at[_index(at, last, flag)] = value
        else:
            at[last] = value
    return result


def _descend(at: Any, key: str, flag: str) -> Any:
    if isinstance(at, list):
        index = _index(at, key, flag)
        at[index] = {"type": at[index]} if isinstance(at[index], str) else dict(at[index])
        return at[index]
    inner = at.get(key, {})
    if isinstance(inner, str):
        inner = {"type": inner}  # `algorithm: awm` is short for `algorithm: {type: awm}`
    if not isinstance(inner, dict | list):
        raise ConfigError(f"{flag}: {key!r} is {inner!r}, which has no fields of its own")
    at[key] = dict(inner) if isinstance(inner, dict) else list(inner)
    return at[key]


def _index(at: list[Any], key: str, flag: str) -> int:
    if not key.isdigit() or int(key) >= len(at):
        raise ConfigError(f"{flag}: {key!r} is not one of the list's positions 0 to {len(at) - 1}")
    return int(key)


def differences(one: Any, two: Any, where: str = "") -> list[str]:
    """List where two encoded configurations differ, as ``path: a -> b``.

    Examples:
        >>> differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
        ['b.c: 2 -> 3']
    """
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        found = []
        for key in sorted({*one, *two}):
            place = f"{where}.{key}" if where else str(key)
            found += differences(one.get(key, "(absent)"), two.get(key, "(absent)"), place)
        return found
    return [] if one == two else [f"{where}: {one!r} -> {two!r}"]
