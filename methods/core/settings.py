"""Settings that do nothing where others are as they are: refused when somebody sets them, and never counted as knobs.

A method's Config says which by `idle() -> {setting, or "recipe.setting": why}` and calls `check_idle(self)`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import ConfigError


def is_a(value: Any, kind: type) -> bool:
    """Whether `value` is of the class `kind`, by name: in a clone with the package installed there are two of each, of
    `methods` and of `jointcompress.methods`, and a method from elsewhere may bring the other."""
    return any(base.__name__ == kind.__name__ for base in type(value).__mro__)


def check_idle(config: Any) -> None:
    """ConfigError where `config` has another value than the default for a setting that does nothing in it."""
    _refuse(config, config.idle())


def check_idle_without(config: Any, budget: Any, settings: Mapping[str, Sequence[str]]) -> None:
    """As `check_idle`, of what does nothing with a budget: `settings` {field that it lacks: names of settings}."""
    for field, names in settings.items():
        if getattr(budget, field) is None:
            _refuse(config, dict.fromkeys(names, f"the budget has no {field!r}"))


def _refuse(config: Any, idle: Mapping[str, str]) -> None:
    """A recipe of 0 epochs passes: it says the same."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, why in idle.items():
        first, _, rest = name.partition(".")
        value, usual = getattr(config, first), [defaults[first]]
        if rest and value is not None:  # a recipe written out has the defaults of its class
            usual = [getattr(recipe, rest) for recipe in (type(value), *usual) if recipe is not None]
            value = getattr(value, rest)
        if value not in usual and getattr(value, "epochs", 1) != 0:
            raise ConfigError(f"{name} = {value!r} does nothing: {why}; leave it out")


def with_effect(config: Any) -> list[str]:
    """The fields of a dataclass, nested ones as "recipe.setting", without the idle ones.

    What every method has and leaves off, a field with the metadata {"knob": False} at None, is left out too.
    """
    idle = config.idle() if hasattr(config, "idle") else {}
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None and not field.metadata.get("knob", True):
            continue
        nested = with_effect(value) if dataclasses.is_dataclass(value) else []
        found += [f"{field.name}.{name}" for name in nested] if nested else [field.name]
    return [name for name in found if name not in idle and name.partition(".")[0] not in idle]
