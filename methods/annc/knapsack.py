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
                   at_least: int = 0, prices: Sequence[float] | None = None) -> list[Tensor]:
    """Bool masks: argmax of the kept sum of w^2 such that the kept weights, `costs[l]` each in tensor l, cost <= limit.

    All weights of all tensors in one order of descending w^2 / cost (ties: first comes first); the longest prefix that
    fits is kept. Exact where all costs are equal; else the optimum is better by less than the first weight left out.
    fill      goes on after that one and keeps every later weight that still fits
    at_least  the largest weights of each tensor come before all others
    prices    of a weight of each tensor, in place of the costs in the order, not in the limit
    """
    prices = costs if prices is None else prices
    reserved = sum(min(at_least, w.numel()) * cost for w, cost in zip(weights, costs, strict=True))
    if reserved > limit:
        raise BudgetError(f"{at_least} weights of every layer cost {reserved}: the limit is {limit}")
    scores = [_scores(w, math.sqrt(min(prices) / price), at_least) for w, price in zip(weights, prices, strict=True)]
    bins = [score.view(np.int32) >> 16 for score in scores]  # bits of a float ascend with it
    bar, spent = _crossing(bins, costs, limit)
    masks = [one > bar for one in bins]
    places = [np.flatnonzero(one <= bar if fill else one == bar) for one in bins]  # only these need an order
    order = _descending(np.concatenate([score[at] for score, at in zip(scores, places, strict=True)]))
    each = np.repeat(np.asarray(costs, np.int64), [len(at) for at in places])[order]
    running = spent + np.cumsum(each)
    count = int(np.searchsorted(running, limit, side="right"))
    taken = np.zeros(len(order), bool)
    taken[order[:count]] = True
    if fill:
        taken[order[_later(each, count, limit - (int(running[count - 1]) if count else spent))]] = True
    for mask, at, part in zip(masks, places, np.split(taken, np.cumsum([len(at) for at in places])[:-1]), strict=True):
        mask[at] = part
    return [torch.from_numpy(mask).reshape(w.shape).to(w.device) for mask, w in zip(masks, weights, strict=True)]


def _crossing(bins: Sequence[np.ndarray], costs: Sequence[int], limit: int) -> tuple[int, int]:
    """The bin in which the running cost, from the highest bin down, passes the limit, and the cost before it.

    Bin -1 where all fit.
    """
    each = sum(cost * np.bincount(one, minlength=1 << 15) for one, cost in zip(bins, costs, strict=True))
    running = np.append(np.cumsum(each[::-1])[::-1], 0)
    bar = int((running > limit).sum()) - 1
    return bar, int(running[bar + 1])


def _scores(weight: Tensor, factor: float, at_least: int) -> np.ndarray:
    """|w| sqrt(least price / price): the order of w^2 / price, without squares that underflow; float32 [n]."""
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
