"""The space of a width search: how wide each group of coupled channels may be, how many bits a layer may have, and what
a point of it costs, counted without running anything.

A point is a level for each dimension, 0 the least. The k best channels of a group, in one fixed order, make its
width k: narrower networks are parts of wider ones.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from torch import Tensor, nn

from ..core.budget import FLOAT_BITS
from ..core.errors import BudgetError, ConfigError
from ..core.fit.quantize import fit_symmetric, quantize
from ..core.graph.build import float_bytes
from ..core.graph.coupled import Group
from ..core.graph.graph import Graph
from ..core.graph.narrow import Channels, narrowed
from ..core.graph.nodes import Node
from ..core.graph.operations import count_macs
from ..core.graph.weights import layer_of, weight_layers

Point = tuple[int, ...]


@dataclass(frozen=True)
class Dimension:
    """name: of a layer, or of layers that share channels;  what: "width" or "bits";  choices, rising."""

    name: str
    what: str
    choices: tuple[int, ...]


def width_choices(size: int, step: int, levels: int) -> tuple[int, ...]:
    """Multiples of `step` below `size`, and `size` itself; of more than `levels` an even selection with both ends.

    >>> width_choices(64, 8, 4), width_choices(20, 8, 8), width_choices(6, 8, 8)
    ((8, 24, 48, 64), (8, 16, 20), (6,))
    """
    found = [*range(step, size, step), size]
    chosen = np.linspace(0, len(found) - 1, min(levels, len(found))).round().astype(int)
    return tuple(found[i] for i in sorted({*chosen.tolist(), len(found) - 1}))


@dataclass(frozen=True)
class Count:
    """How many channels are kept at a point: `fixed` and, for each (dimension, table), the table at its level."""

    fixed: int
    parts: tuple[tuple[int, tuple[int, ...]], ...]

    def at(self, point: Point) -> int:
        return self.fixed + sum(table[point[d]] for d, table in self.parts)


class Space:
    """Widths of `groups` and, if there are any `bits`, of each layer of `coded` one of them.

    groups  {name: group}, best channels first in `order` {name: int [size]}
    fixed   {layer: bits} where they are not searched (32: float)
    """

    def __init__(self, graph: Graph, channels: Channels, groups: Mapping[str, Group], order: Mapping[str, Tensor],
                 coded: Mapping[str, int], bits: tuple[int, ...], multiple: int, levels: int):
        self.graph, self.channels, self.fixed = graph, channels, dict(coded)
        self.dims, self.bit_dims = [], {}
        self.dim_of, self.rank_of = np.full(channels.count, -1), np.zeros(channels.count, np.int64)
        for name, group in groups.items():
            narrowest = min(len(places) for places in group.members.values()) / group.size
            choices = width_choices(group.size, ceil(multiple / narrowest), levels)
            if len(choices) > 1:
                self._add_width(name, group, order[name], choices)
        for layer in coded if bits else ():
            self.bit_dims[layer] = len(self.dims)
            self.dims.append(Dimension(layer, "bits", tuple(sorted(bits))))
        if not any(dim.what == "width" for dim in self.dims):
            raise ConfigError(f"multiple = {multiple}: no layer of the search has another width than its own; they "
                              f"have {', '.join(str(group.size) for group in groups.values())} channels")
        self.levels = tuple(len(dim.choices) for dim in self.dims)

    def _add_width(self, name: str, group: Group, order: Tensor, choices: tuple[int, ...]) -> None:
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order))
        for layer, places in group.members.items():
            classes = self.channels.rows[layer]
            self.dim_of[classes], self.rank_of[classes] = len(self.dims), rank[places].numpy()
        self.dims.append(Dimension(name, "width", choices))

    @property
    def largest(self) -> Point:
        return tuple(count - 1 for count in self.levels)

    @property
    def smallest(self) -> Point:
        return (0,) * len(self.levels)

    def values(self, point: Point) -> dict[str, dict[str, int]]:
        """{"width": {group: channels}, "bits": {layer: bits}} of a point."""
        found: dict[str, dict[str, int]] = {"width": {}, "bits": {}}
        for dim, level in zip(self.dims, point, strict=True):
            found[dim.what][dim.name] = dim.choices[level]
        return found

    def bits_at(self, point: Point) -> dict[str, int]:
        """{layer: bits}, of the layers that are coded."""
        return self.fixed | {layer: self.dims[d].choices[point[d]] for layer, d in self.bit_dims.items()}

    def kept(self, point: Point) -> np.ndarray:
        """bool [classes]"""
        widths = np.array([dim.choices[level] for dim, level in zip(self.dims, point, strict=True)])
        return (self.dim_of < 0) | (self.rank_of < widths[np.maximum(self.dim_of, 0)])

    def network(self, model: nn.Module, point: Point) -> nn.Module:
        """The part of `model` (on the CPU, in eval mode) at `point`; at the largest a copy of it, bit for bit."""
        return narrowed(model, self.channels, self.kept(point))

    @torch.no_grad()
    def round(self, network: nn.Module, point: Point) -> None:
        """Round, in place, the weights of the layers whose bits are searched, to the nearest per channel."""
        for layer, d in self.bit_dims.items():
            weight, bits = layer_of(network, layer).weight, self.dims[d].choices[point[d]]
            weight.copy_(quantize(weight, fit_symmetric(weight, bits, True), bits).decode())

    def count(self, classes: np.ndarray | None, otherwise: int) -> Count:
        """Of channels of these classes; `otherwise` where they are not known."""
        if classes is None:
            return Count(otherwise, ())
        dims, ranks = self.dim_of[classes], self.rank_of[classes]
        tables = tuple((int(d), tuple(int((ranks[dims == d] < k).sum()) for k in self.dims[d].choices))
                       for d in np.unique(dims) if d >= 0)
        return Count(int((dims < 0).sum()), tables)


@dataclass(frozen=True)
class Layer:
    """kernel: weights of a pair of channels;  positions: multiply-accumulates of a weight."""

    name: str
    out: Count
    into: Count
    kernel: int
    positions: float

    def weights(self, point: Point) -> int:
        return self.out.at(point) * self.into.at(point) * self.kernel


class Costs:
    """Multiply-accumulates, bit operations and code bytes at points of a space, for one input."""

    def __init__(self, space: Space, model: nn.Module, x: Tensor, activation_bits: int):
        self.space, self.activation_bits = space, activation_bits
        runs: dict[str, int] = {}

        def see(node: Node, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            runs[node.name] = count_macs(node.module, inputs, output)

        with torch.no_grad():
            space.graph.run(x, see)
        self.layers = [self._layer(name, layer_of(model, name), runs.get(name, 0)) for name in weight_layers(model)]
        self.elsewhere = sum(runs.values()) - sum(runs.get(layer.name, 0) for layer in self.layers)
        self.whole, self.dense = self.macs(space.largest), float_bytes(model)

    def _layer(self, name: str, layer: nn.Module, macs: int) -> Layer:
        channels, weight = self.space.channels, layer.weight
        out, into = weight.shape[0], weight[0].numel()
        own = name in channels.rows
        columns = channels.columns.get(name) if own and name not in channels.grouped else None
        counts = (self.space.count(channels.rows.get(name), out), self.space.count(columns, weight.shape[1]))
        return Layer(name, *counts, into // weight.shape[1], macs / weight.numel())

    def macs(self, point: Point) -> float:
        return self.elsewhere + sum(layer.weights(point) * layer.positions for layer in self.layers)

    def mac_ratio(self, point: Point) -> float:
        """Of the network's own."""
        return self.macs(point) / self.whole

    def bop_ratio(self, point: Point) -> float:
        """Of the network's own at 32 x 32 bits."""
        bits, total = self.space.bits_at(point), self.elsewhere * FLOAT_BITS**2
        for layer in self.layers:
            width = bits.get(layer.name, FLOAT_BITS)
            inputs = self.activation_bits if width < FLOAT_BITS else FLOAT_BITS
            total += layer.weights(point) * layer.positions * width * inputs
        return total / (FLOAT_BITS**2 * self.whole)

    def code_bytes(self, point: Point) -> float:
        """Codes of a fixed length, with a float for each output channel."""
        bits = self.space.bits_at(point)
        return sum(layer.weights(point) * bits.get(layer.name, FLOAT_BITS) / 8 + 4 * layer.out.at(point)
                   for layer in self.layers)

    def code_ratio(self, point: Point) -> float:
        """Of the float32 values of the whole network."""
        return self.code_bytes(point) / self.dense


@dataclass(frozen=True)
class Limit:
    """ratio(point) <= most, of what the budget calls `name`; `unit` of its message."""

    name: str
    most: float
    ratio: Callable[[Point], float]

    def share(self, point: Point) -> float:
        return self.ratio(point) / self.most

    def check(self, smallest: Point) -> None:
        """BudgetError where the smallest point is above it."""
        least = self.ratio(smallest)
        if least > self.most:
            raise BudgetError(f"{self.name} = {self.most:g} is out of reach: the smallest network of the search takes "
                              f"{least:.4g}")
