"""Settings from TOML tables and the command line, into frozen dataclasses; unknown keys are refused."""

import dataclasses
import functools
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from methods.core.errors import ConfigError
from methods.core.settings import with_effect

from .rows import LARGEST, shortened

HUGE = 1e300  # below what a float64 holds

SPELLED = {float: "a number", int: "a whole number", str: "a text", bool: "true or false", tuple: "a list",
           Mapping: "a table", type(None): "\"none\""}


def build(kind: type, values: Mapping[str, Any], where: str = "", base: Any = None) -> Any:
    """An instance of the dataclass `kind` from plain values; nested dataclasses from nested tables.

    base    an instance that gives what `values` leaves out; a nested table leaves the rest of a default as it is
    Where the type of a field depends on other fields, `kind.kinds({field: value}) -> {field: type}` says it.
    Raises ConfigError naming the key, the value and what is allowed.
    """
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise ConfigError(f"unknown key {where}{unknown[0]!r}; allowed are: {', '.join(names)}")
    given = {field.name: field.default for field in dataclasses.fields(kind)} if base is None else vars(base)
    hints |= kind.kinds({**given, **values}) if hasattr(kind, "kinds") else {}
    found = {key: _convert(hints[key], value, f"{where}{key}", given[key]) for key, value in values.items()}
    if base is not None:
        return dataclasses.replace(base, **found)
    missing = [field.name for field in dataclasses.fields(kind) if field.name not in values
               and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING]
    if missing:
        raise ConfigError(f"{where.strip(' .:') or kind.__name__} lacks the keys {', '.join(missing)}")
    return kind(**found)


def _convert(hint: Any, value: Any, where: str, default: Any = None) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if (value is None or value == "none") and type(None) in options:
        return None
    for option in options:
        origin = typing.get_origin(option) or option
        if dataclasses.is_dataclass(origin) and isinstance(value, Mapping):
            return build(origin, value, f"{where}.", default if isinstance(default, origin) else None)
        if origin is tuple and isinstance(value, (list, tuple)):
            return _items(option, value, where)
        if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
            return {key: None if item == "none" and _takes_none(option) else item for key, item in value.items()}
        if origin is float and isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < HUGE:
            return float(value)
        if origin in (int, str, bool) and type(value) is origin and not _unwritable(value):
            return value
    wanted = " or ".join(SPELLED.get(typing.get_origin(option) or option, getattr(option, "__name__", str(option)))
                         for option in options)
    raise ConfigError(f"{where} = {shortened(value)}: needed is {wanted}")


def _takes_none(hint: Any) -> bool:
    """Whether the values of a mapping of this type may be None, which TOML spells "none"."""
    return type(None) in typing.get_args((typing.get_args(hint) or (None,))[-1])


def _unwritable(value: int | str | bool) -> bool:
    """A number that nothing counts, or a text with half a letter (a lone surrogate), which no file can hold."""
    if isinstance(value, str):
        return any("\ud800" <= letter <= "\udfff" for letter in value)
    return abs(value) >= LARGEST


def _items(hint: Any, values: list | tuple, where: str) -> tuple:
    """`values` as a tuple of the hint `tuple`, `tuple[X, ...]` or `tuple[X, Y]`."""
    kinds = typing.get_args(hint)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(values)
    if kinds and len(kinds) != len(values):
        raise ConfigError(f"{where} = {list(values)!r}: needed are {len(kinds)} values")
    return tuple(_convert(kind, value, f"{where}[{i}]") if kinds else value
                 for i, (kind, value) in enumerate(zip(kinds or values, values, strict=True)))


def plain(value: Any) -> Any:
    """A dataclass (or any nesting of plain values) as JSON values; JSON lacks nan and inf: they become text."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def same_settings(config: Any, known: Mapping[str, Any]) -> bool:
    """Whether `known`, a config as a row has it, is as `config` wherever that has an effect. What `known` does not have
    is younger than it.

    >>> from methods.core.train.recipe import Recipe
    >>> old = {"epochs": 3, "lr": 0.1, "momentum": 0.5}
    >>> same_settings(Recipe(3, 0.1, momentum=0.5), old), same_settings(Recipe(3, 0.1), old)
    (True, False)
    """
    for name in with_effect(config):
        value, then = plain(functools.reduce(getattr, name.split("."), config)), known
        for part in name.split("."):
            then = then.get(part, value) if isinstance(then, Mapping) else then
        if then != value:
            return False
    return True


def count_knobs(value: Any) -> int:
    """Settings a user can turn: fields of a dataclass, nested ones spelled out; a {layer: value} counts each.

    Fields that do nothing where the others are as they are count nothing.
    """
    if dataclasses.is_dataclass(value):
        return sum(count_knobs(functools.reduce(getattr, name.split("."), value)) for name in with_effect(value))
    return max(len(value), 1) if isinstance(value, Mapping) else 1


def read_toml(path: str | Path) -> dict[str, Any]:
    """A TOML file; ConfigError in one line if it is missing or malformed."""
    if Path(path).exists() and not Path(path).is_file():
        raise ConfigError(f"cannot read the configuration {path}: it is no plain file")
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(f"{path} is not valid TOML: it nests too deep") from None
    except ValueError as error:  # malformed, not UTF-8, or a number of thousands of digits
        raise ConfigError(f"{path} is not valid TOML: {str(error).split(';')[0]}") from None


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, table by table."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merge(out[key], value) if both else value
    return out


def from_assignments(pairs: list[str]) -> dict[str, Any]:
    """["retrain.epochs=3", "scope=global"] as nested tables; values are TOML, else numbers such as .5, else text."""
    out: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"{pair!r} is not KEY=VALUE")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = _number_or_text(text)
        except (ValueError, RecursionError):
            raise ConfigError(f"{key} = {shortened(text)}: no number has so many digits, no table is so deep") from None
        if _has(out, key.split(".")):
            raise ConfigError(f"{key} is given twice")
        for part in reversed(key.split(".")):
            value = {part: value}
        out = merge(out, value)
    return out


def _has(table: Any, parts: list[str]) -> bool:
    """Whether a nested table holds this key, or a value where the key needs a table."""
    for part in parts:
        if not isinstance(table, Mapping):
            return True
        if part not in table:
            return False
        table = table[part]
    return True


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
