"""A few more weights of a compressed network pruned, where its file is a little too large (see size.py)."""

from dataclasses import replace

import torch
from torch import Tensor

from ..artifact import CompressedModel, CompressedTensor


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
