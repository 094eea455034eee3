"""A few more weights of a compressed network pruned, where its file is a little too large (see size.py)."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..artifact import CompressedModel, CompressedTensor
from ..file.storage import file_bytes

ROUNDS = 4  # of `trimmed`: what it corrects may take a few bytes more

Change = Callable[[CompressedModel], CompressedModel]


def unchanged(compressed: CompressedModel) -> CompressedModel:
    """The same."""
    return compressed


def trimmed(compressed: CompressedModel, limit: int, most: float, finish: Change = unchanged,
            correct: Change = unchanged) -> tuple[CompressedModel, int, float]:
    """`compressed` without its least weights, as few of them as it takes to fit, its bytes, and their share.

    most     share of the kept weights; where that is too few, it is what goes
    finish   what is done to the result before it is written
    correct  what makes up for the weights that went (correction.py); should that take bytes, more of them go
    """
    goal = limit
    for _ in range(ROUNDS):
        found, size, share = _fewer(compressed, goal, most, finish)
        if size > goal:
            break
        found = correct(found)
        size = file_bytes(finish(found))
        if size <= limit:
            break
        goal -= size - limit
    return found, size, share


def _fewer(compressed: CompressedModel, limit: int, most: float, finish: Change) -> tuple[CompressedModel, int, float]:
    """Halving the step ends within 0.1 % of the kept weights."""
    low, high = 0.0, most  # shares of the kept weights: too few, enough
    found = without_smallest(compressed, high)
    size = file_bytes(finish(found))
    while size <= limit and high - low > 1e-3:
        middle = (low + high) / 2
        fewer = without_smallest(compressed, middle)
        bytes_left = file_bytes(finish(fewer))
        if bytes_left <= limit:
            high, found, size = middle, fewer, bytes_left
        else:
            low = middle
    return found, size, high


def without_smallest(compressed: CompressedModel, share: float) -> CompressedModel:
    """A share of the kept weights of all layers pruned: those that take least of their layers.

    Pruning w takes |w|^2 / |W|^2 of a layer that keeps W. Within a layer both signs lose the same sum, so that the mean
    of what it puts out stays; among equal weights, all of a level in a quantized layer, chance decides: the first ones
    would be those of a few channels. Against the root mean square of a layer, whatever its number of weights, small
    layers that keep many small weights would be emptied.
    """
    generator = torch.Generator().manual_seed(0)
    orders, costs = {}, []
    for name, tensor in compressed.weights.items():
        values = tensor.decode()[tensor.mask].double()
        orders[name] = least_first(values, generator)
        squares = values[orders[name]].square()
        costs.append((squares / squares.sum()).cummax(0).values if len(squares) else squares)
    if not costs:
        return compressed
    cost = torch.cat(costs)
    keep = torch.ones(len(cost), dtype=torch.bool)
    keep[cost.argsort(stable=True)[:int(share * len(cost))]] = False
    weights = dict(compressed.weights)
    for (name, order), kept in zip(orders.items(), keep.split([len(own) for own in costs]), strict=True):
        tensor, inside = weights[name], torch.empty_like(kept)
        inside[order] = kept
        mask = tensor.mask.clone()
        mask[tensor.mask] = inside
        weights[name] = CompressedTensor.of(tensor.codes, tensor.grid, tensor.bits, mask)
    return replace(compressed, weights=weights)


def least_first(values: Tensor, generator: torch.Generator) -> Tensor:
    """The order in which weights [n] go: the smallest of either sign, of both signs the one that has lost less.

    >>> least_first(torch.tensor([1.0, -3.0, 1.5, 4.0, -2.0]), torch.Generator().manual_seed(0)).tolist()
    [0, 4, 2, 1, 3]
    """
    lost = torch.empty(len(values), dtype=torch.float64)  # by its sign, once this weight is gone, too
    for sign in (values > 0, values <= 0):
        heights = values[sign].abs().double()
        shuffled = torch.randperm(len(heights), generator=generator)
        order = shuffled[heights[shuffled].argsort(stable=True)]
        sums = torch.empty_like(heights)
        sums[order] = heights[order].cumsum(0)
        lost[sign] = sums
    return lost.argsort(stable=True)
