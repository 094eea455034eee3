"""Rows that differ in nothing but the seed, as one: means, and the sample deviation of any number."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from methods import find_method
from methods.core.errors import ConfigError

from ..chance import mean_and_deviation
from ..chance import over_seeds as mean_change
from ..settings import build, same_settings

Row = Mapping[str, Any]


def over_seeds(rows: Sequence[Row]) -> list[Row]:
    """`rows` with the seeds of one name, network, baseline, data and settings in one row: the means of all numbers, and
    `seeds`."""
    groups: list[list[Row]] = []
    for row in rows:
        same = next((group for group in groups if _alike(group[0], row)), None)
        if same is None:
            groups.append([row])
        else:
            same.append(row)
    return [group[0] if len(group) == 1 else {**_mean(group), "seeds": group} for group in groups]


def _alike(one: Row, other: Row) -> bool:
    """Whether two rows differ in nothing but the seed, as far as it has an effect."""
    keys = "name", "task", "network", "method", "data"
    return (all(one.get(key) == other.get(key) for key in keys)
            and one.get("densities", "uniform") == other.get("densities", "uniform")
            and one["checkpoint"]["digest"] == other["checkpoint"]["digest"] and _budget(one) == _budget(other)
            and (one.get("config") == other.get("config") or _as(one, other) or _as(other, one)))


def _budget(row: Row) -> dict[str, Any]:
    return {name: value for name, value in row.get("budget", {}).items() if value is not None}


def _as(one: Row, other: Row) -> bool:
    """Whether the settings of `other` are those of `one` wherever they have an effect: settings that are younger than a
    row are as it had them. False where the method of today would not take those of `one`."""
    try:
        return same_settings(build(find_method(one["method"]).Config, one.get("config", {})), other.get("config", {}))
    except ConfigError:
        return False


def _mean(values: Sequence[Any]) -> Any:
    first = values[0]
    if all(isinstance(value, Mapping) for value in values):
        return {key: _mean([value[key] for value in values]) for key in first if all(key in value for value in values)}
    if isinstance(first, bool) or not all(isinstance(value, (int, float)) for value in values):
        return first
    return first if all(value == first for value in values) else math.fsum(values) / len(values)


def paired_interval(row: Row) -> tuple[float, float] | None:
    """The 95 % interval of the change against the baseline in integer arithmetic, over the seeds of a row if there are
    several; None for the oldest rows, which were not paired."""
    rows = row.get("seeds", [row])
    if any("against_baseline" not in one for one in rows):
        return None
    found = [one["against_baseline"]["integer"] for one in rows]
    return mean_change([(one["change"], one["low"], one["high"]) for one in found])[1:]


def spread_of(row: Row, look: Callable[[Row], float | None]) -> tuple[float, int]:
    """(sample deviation of a number over the seeds of a row, their number); `look` finds it in a row."""
    known = [value for value in map(look, row.get("seeds", [row])) if value is not None]
    return (mean_and_deviation(known)[1], len(known)) if known else (0.0, 1)


def seeds_of(row: Row) -> str:
    """"3 seeds" of a mean over three rows, "" of one row.

    >>> seeds_of({"seeds": [{}, {}, {}]}), seeds_of({})
    ('3 seeds', '')
    """
    return f"{len(row['seeds'])} seeds" if "seeds" in row else ""
