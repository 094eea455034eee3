"""What a weight, a channel or a block is worth: the scores that pruning ranks, and the masks that follow from them.

    level     |w|                                     of one weight (Han et al. 2015)
    l1, l2    ||W_i||_1, ||W_i||_2                    of an output channel (Li et al. 2017)
    fpgm      sum_j ||W_i - W_j||_2                   least near the geometric median (He et al. 2019)
    slim      |gamma_i|                               of the batch norm behind (Liu et al. 2017)
    taylor    sum over batches of (g w)^2 / batches   summed over a channel (Molchanov et al. 2019)
    movement  S <- S - lr g w                         grows where w moves away from 0 (Sanh et al. 2020)
    loss      L without it                            of a residual block, on held-out data (pipeline/blocks.py)
    random    uniform                                 the control

g is the gradient at the weight that the network really uses. What scores least goes first.

Departures  Layers that share their channels (residual additions, depthwise convolutions) share one score, the mean over
            those that are scored; l1, l2 and fpgm of layers of different size are averaged as they are. A ranking over
            all layers leaves each layer, or set of such layers, its best, and a share of the density (`floor`): scores
            that differ more between layers than within them (gamma of slim after a short training) would empty one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from ..graph.channels import distance_sum, norm_l1, norm_l2
from .prune import keep_count, keep_largest

ELEMENTS = ("weight", "channel")  # what masks hide
GRANULARITIES = (*ELEMENTS, "block")
SCOPES = ("local", "global")


@dataclass(frozen=True)
class Criterion:
    """What it can rank, and what it sees: "weights", "norms" (batch norms), "gradients" (batches), "losses" (on
    held-out batches) or "nothing"."""

    granularities: tuple[str, ...]
    sees: str


CRITERIA = {
    "level": Criterion(("weight",), "weights"), "l1": Criterion(("channel",), "weights"),
    "l2": Criterion(("channel",), "weights"), "fpgm": Criterion(("channel",), "weights"),
    "slim": Criterion(("channel",), "norms"), "taylor": Criterion(ELEMENTS, "gradients"),
    "movement": Criterion(ELEMENTS, "gradients"), "loss": Criterion(("block",), "losses"),
    "random": Criterion(GRANULARITIES, "nothing"),
}


def find_criterion(name: str, granularity: str) -> Criterion:
    """The criterion; ConfigError where there is none of that name, or it has no sense at that granularity.

    >>> find_criterion("taylor", "channel").sees
    'gradients'
    """
    for what, value, allowed in (("criterion", name, CRITERIA), ("granularity", granularity, GRANULARITIES)):
        if value not in allowed:
            raise ConfigError(f"{what} = {value!r}: allowed are {', '.join(allowed)}")
    if granularity not in CRITERIA[name].granularities:
        fitting = ", ".join(other for other, one in CRITERIA.items() if granularity in one.granularities)
        raise ConfigError(f"criterion = {name!r} ranks no single {granularity}: allowed are {fitting}")
    return CRITERIA[name]


def score_weight(criterion: str, weight: Tensor) -> Tensor:
    """Scores of one that sees the weights alone: like `weight` [O, ...] for level, else [O]; float64."""
    weight = weight.detach().double()
    rules = {"level": lambda: weight.abs(), "l1": lambda: norm_l1(weight.flatten(1)),
             "l2": lambda: norm_l2(weight.flatten(1)), "fpgm": lambda: distance_sum(weight.flatten(1))}
    return rules[criterion]()


def per_channel(scores: Tensor) -> Tensor:
    """[O]: scores of single weights [O, ...] summed over each output channel."""
    return scores.flatten(1).sum(1)


def choose(scores: Mapping[str, Tensor], densities: Mapping[str, float], scope: str, floor: float = 0.0
           ) -> dict[str, Tensor]:
    """{name: bool mask of what is kept}, in exact number; of equal scores the first is kept.

    scope  "local": each density of its own scores; "global": one ranking of all, of the density that all share, after
           the best of each: floor x density of its scores, and one at least
    """
    if scope == "local":
        return {name: keep_largest(s, keep_count(s.numel(), densities[name])) for name, s in scores.items()}
    check_scope(scope, densities)
    flat, density = [s.detach().double().reshape(-1).clone() for s in scores.values()], next(iter(densities.values()))
    firsts = [keep_count(len(one), floor * density) for one in flat]
    for one, first in zip(flat, firsts, strict=True):
        one[keep_largest(one, first)] = torch.inf
    count = max(keep_count(sum(map(len, flat)), density), sum(firsts))
    kept = keep_largest(torch.cat(flat), count).split([len(one) for one in flat])
    return {name: part.reshape(s.shape) for (name, s), part in zip(scores.items(), kept, strict=True)}


def check_scope(scope: str, densities: Mapping[str, float]) -> None:
    """ConfigError for a scope that there is not, and for a global one with more than one density."""
    if scope not in SCOPES:
        raise ConfigError(f"scope = {scope!r}: allowed are {', '.join(SCOPES)}")
    if scope == "global" and len(set(densities.values())) > 1:
        raise ConfigError(f"scope = 'global' takes one density, not {sorted(set(densities.values()))}")
