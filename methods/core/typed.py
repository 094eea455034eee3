"""Settings of a wrong type, refused in one line instead of where they are used."""

import dataclasses
import functools
import itertools
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from .errors import ConfigError
from .settings import is_a

PLAIN: dict[Any, tuple[str, Callable[[Any], bool]]] = {  # {annotation: (its words, what fits)}
    Any: ("anything", lambda value: True),
    bool: ("True or False", lambda value: isinstance(value, (bool, np.bool_))),
    int: ("a whole number", lambda value: isinstance(value, Integral) and not isinstance(value, bool)),
    float: ("a number", lambda value: isinstance(value, Real) and not isinstance(value, bool)),
    str: ("a text", lambda value: isinstance(value, str)),
    type(None): ("None", lambda value: value is None),
}


def check_types(config: Any, prefix: str = "") -> None:
    """ConfigError where a field of a dataclass, or of one in it, has a value of another type than it is annotated with.

    Numbers may be numpy's, a float may be whole, a tuple any sequence.

    >>> from .train.recipe import Recipe
    >>> Recipe(epochs="2", lr=1)
    Traceback (most recent call last):
        ...
    methods.core.errors.ConfigError: epochs = '2': allowed is a whole number
    """
    kinds = annotations(type(config))
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), kinds.get(field.name, Any)
        if not fits(value, kind):
            shown = (repr(value) or type(value).__name__).splitlines()[0]
            raise ConfigError(f"{prefix}{field.name} = {shown}: allowed is {words(kind)}")
        if dataclasses.is_dataclass(value):
            check_types(value, f"{prefix}{field.name}.")


@functools.cache
def annotations(kind: type) -> dict[str, Any]:
    """{field: type}; none where a name in them is only known to type checkers, in a method from elsewhere."""
    try:
        return typing.get_type_hints(kind)
    except NameError:
        return {}


def fits(value: Any, kind: Any) -> bool:
    """Whether `value` is of the annotated type `kind`; of kinds that no setting here has, anything is."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind in PLAIN:
        return PLAIN[kind][1](value)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if origin is tuple:
        kinds = itertools.repeat(parts[0]) if parts[1:] == (...,) else parts
        return isinstance(value, Sequence) and not isinstance(value, str) and all(map(fits, value, kinds))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    return is_a(value, kind) if dataclasses.is_dataclass(kind) else True


def words(kind: Any) -> str:
    """What `kind` allows."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind in PLAIN:
        return PLAIN[kind][0]
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(words, parts))
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if origin is tuple:
        return f"a tuple of {', '.join(words(part) for part in parts if part is not ...)}"
    return f"a {getattr(origin or kind, '__name__', kind)}"
