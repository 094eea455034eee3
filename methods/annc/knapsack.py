"""Two knapsacks: which single weights to keep, and which of several options each layer takes.

Both are greedy in the order of the linear relaxation, and both count costs in whole numbers: a float32 running sum
is inexact above 2^24.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..core.errors import BudgetError
from ..core.fit.prune import keep_largest


def keep_worthiest(weights: Sequence[Tensor], costs: Sequence[int], limit: int, *, fill: bool = False,
                   at_least: int = 0) -> list[Tensor]:
    """Bool masks: argmax of the kept sum of w^2 such that the kept weights, `costs[l]` each in tensor l, cost <= limit.

    All weights of all tensors in one order of descending w^2 / cost (ties: first comes first); the longest prefix that
    fits is kept. Exact where all costs are equal; else the optimum is better by less than the first weight left out.
    fill      goes on after that one and keeps every later weight that still fits
    at_least  the largest weights of each tensor come before all others
    """
    reserved = sum(min(at_least, w.numel()) * cost for w, cost in zip(weights, costs, strict=True))
    if reserved > limit:
        raise BudgetError(f"{at_least} weights of every layer cost {reserved}: the limit is {limit}")
    scores = np.concatenate([_scores(w, math.sqrt(min(costs) / cost), at_least)
                             for w, cost in zip(weights, costs, strict=True)])
    order = _descending(scores)
    each = np.repeat(np.asarray(costs, np.int64), [w.numel() for w in weights])[order]
    spent = np.cumsum(each)
    count = int(np.searchsorted(spent, limit, side="right"))
    mask = np.zeros(len(scores), bool)
    mask[order[:count]] = True
    if fill:
        mask[order[_later(each, count, limit - int(spent[count - 1]) if count else limit)]] = True
    parts = torch.from_numpy(mask).split([w.numel() for w in weights])
    return [part.reshape(w.shape).to(w.device) for part, w in zip(parts, weights, strict=True)]


def _scores(weight: Tensor, factor: float, at_least: int) -> np.ndarray:
    """|w| sqrt(least cost / cost): the order of w^2 / cost, without squares that underflow; float32 [n]."""
    scores = weight.detach().abs().float().mul(factor)
    if at_least:
        scores[keep_largest(scores, min(at_least, scores.numel()))] = float("inf")
    return scores.reshape(-1).cpu().numpy()


def _descending(scores: np.ndarray) -> np.ndarray:
    """Stable descending order of non-negative float32 scores: their bits, which ascend with them, above the index."""
    keys = np.int64(np.iinfo(np.int32).max) - scores.view(np.int32)
    keys <<= 32
    keys |= np.arange(len(scores))
    keys.sort()
    return keys & 0xFFFFFFFF


def _later(each: np.ndarray, count: int, left: int) -> list[int]:
    """Places after `count` that a greedy pass still takes with `left` to spend (less than the largest cost)."""
    taken, place = [], count
    while place < len(each):
        fitting = np.flatnonzero(each[place:] <= left)
        if len(fitting) == 0:
            break
        taken.append(place + int(fitting[0]))
        left -= int(each[taken[-1]])
        place = taken[-1] + 1
    return taken


def choose_options(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], limit: int) -> list[int]:
    """argmin sum_l losses[l][o_l] such that sum_l costs[l][o_l] <= limit: one option o_l for each group l.

    Multiple-choice knapsack: from the cheapest option everywhere, steps along the groups' hulls in descending order of
    gain per cost. A step that does not fit ends its group (the next would cost more); the others go on.
    BudgetError if not even the cheapest options fit.
    """
    hulls = [_hull(c, d) for c, d in zip(costs, losses, strict=True)]
    spent = sum(costs[group][hull[0]] for group, hull in enumerate(hulls))
    if spent > limit:
        raise BudgetError(f"the cheapest options cost {spent}: the limit is {limit}")
    steps = [(_slope(costs[group], losses[group], a, b), group, b)
             for group, hull in enumerate(hulls) for a, b in zip(hull[:-1], hull[1:], strict=True)]
    chosen = [hull[0] for hull in hulls]
    for _, group, option in sorted(steps, key=lambda step: -step[0]):
        more = costs[group][option] - costs[group][chosen[group]]
        if spent + more <= limit:
            chosen[group], spent = option, spent + more
    return chosen


def _hull(costs: Sequence[int], losses: Sequence[float]) -> list[int]:
    """Options of strictly rising cost whose gain per cost strictly falls: the cheapest first, the best last."""
    hull: list[int] = []
    for option in sorted(range(len(costs)), key=lambda o: (costs[o], losses[o])):
        if hull and losses[option] >= losses[hull[-1]]:
            continue  # costs as much or more and gains nothing
        while len(hull) > 1 and (_slope(costs, losses, hull[-1], option)
                                 >= _slope(costs, losses, hull[-2], hull[-1])):
            hull.pop()
        hull.append(option)
    return hull


def _slope(costs: Sequence[int], losses: Sequence[float], a: int, b: int) -> float:
    """Loss saved per cost in the step from option a to option b."""
    return (losses[a] - losses[b]) / (costs[b] - costs[a])
