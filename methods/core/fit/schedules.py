"""How the density falls to its goal: d_t at the t-th of T updates of the masks, d the goal.

    one_shot     d                                        T = 1
    linear       1 - (1 - d) t / T
    agp          1 - (1 - d) (1 - (1 - t / T)^3)          Zhu and Gupta 2017: s_f + (s_i - s_f) (1 - t / T)^3, s_i = 0
    geometric    d^(t / T)                                each update removes the same share of what is left
    lottery      as geometric; between updates the kept weights go back to what they were (Frankle and Carbin 2019)

The updates of linear and agp happen within one training; geometric and lottery train anew in every round.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """density (d, t / T) -> d_t;  rounds: every update has a training of its own, and what is pruned stays pruned."""

    density: Callable[[float, float], float]
    rounds: bool


SCHEDULES = {
    "one_shot": Schedule(lambda d, share: d, False),
    "linear": Schedule(lambda d, share: 1 - (1 - d) * share, False),
    "agp": Schedule(lambda d, share: 1 - (1 - d) * (1 - (1 - share) ** 3), False),
    "geometric": Schedule(lambda d, share: d**share, True),
    "lottery": Schedule(lambda d, share: d**share, True),
}


def find_schedule(name: str) -> Schedule:
    """The schedule; ConfigError, listing the names, if there is none."""
    if name not in SCHEDULES:
        raise ConfigError(f"schedule = {name!r}: allowed are {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


def density_at(schedule: str, density: float, t: int, updates: int) -> float:
    """d_t for t = 1..updates; exactly the goal at the last.

    >>> [round(1 - density_at("agp", 0.5, t, 4), 4) for t in (1, 2, 3, 4)]
    [0.2891, 0.4375, 0.4922, 0.5]
    """
    if not 1 <= t <= updates:
        raise ConfigError(f"update {t} of {updates}: allowed is 1..{updates}")
    return density if t == updates else find_schedule(schedule).density(density, t / updates)
