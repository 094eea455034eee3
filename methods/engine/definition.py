"""What the integer network of a compressed model is, derived a second time: for the int64 reference alone.

Of the network's wiring: which batch norms belong to the layer before them, which adds take accumulators, what runs in
float. Of its numbers: the integers, gains and shifts of every layer, in numpy. Nothing here comes from
`IntegerNetwork`, so that a mistake in one shows beside the other; the graph, and the table of operations, are shared.
"""

import math
from dataclasses import dataclass

import numpy as np
from torch import nn

from ..core.artifact import ActivationQuantizer, Affine, CompressedModel, CompressedTensor, Levels, Window
from ..core.graph.build import apply
from ..core.graph.graph import Node, trace
from ..core.graph.operations import REAL, SUMS


@dataclass(frozen=True)
class Layer:
    """acc * gain + shift, acc the sums of integers [C_out, ...] with codes - zero; gain and shift float64 [C_out]."""

    integers: np.ndarray
    gain: np.ndarray
    shift: np.ndarray
    source: ActivationQuantizer
    window: Window | None


class Definition:
    """norms {batch norm: its layer}, layers {name: Layer}, pending {edge of an add: layer}, in_float {node names}."""

    def __init__(self, compressed: CompressedModel, skeleton: nn.Module, float_policy: tuple[str, ...] = ()):
        self.graph = trace(apply(compressed, skeleton))
        self.nodes, self.ranges = self.graph.nodes, compressed.activations
        self.readers: dict[str, set[str]] = {name: set() for name in self.nodes}
        for node in self.graph:
            for name in node.inputs:
                self.readers[name].add(node.name)
        layers = [node for node in self.graph if node.op in ("conv", "linear")]
        after = {node.name: self._norm_of(node) for node in layers}
        self.norms = {norm: layer for layer, norm in after.items() if norm}
        self.layers = {node.name: self._layer(node, after[node.name], compressed) for node in layers
                       if node.name in compressed.weights and node.name in self.ranges
                       and node.name not in float_policy}
        self.pending: dict[str, str] = {}
        for node in self.graph:
            if node.op == "add":
                self.pending |= self._accumulators(node)
        self.in_float = {node.name for node in self.graph if self._is_float(node)}

    def norm_of(self, layer: str) -> str | None:
        return next((norm for norm, owner in self.norms.items() if owner == layer), None)

    def _norm_of(self, node: Node) -> str:
        """The batch norm that is the only reader of a layer."""
        readers = [self.nodes[name] for name in self.readers[node.name]]
        return readers[0].name if len(readers) == 1 and readers[0].op == "bn" and node.name != self.graph.output else ""

    def _accumulators(self, add: Node) -> dict[str, str]:
        """{edge: layer} of the first input that is a layer's and nobody else's, if it has no codes and all others do.

        Between the two may stand the layer's batch norm and what changes nothing.
        """
        edges = add.edges()
        for edge, name in zip(edges, add.inputs, strict=True):
            passed = [name]
            while self.nodes[passed[-1]].op in ("bn", "identity"):
                passed.append(self.nodes[passed[-1]].inputs[0])
            layer, norms = passed[-1], [name for name in passed if self.nodes[name].op == "bn"]
            if self.nodes[layer].op in ("conv", "linear") and all(len(self.readers[name]) == 1 for name in passed) \
                    and all(self.norms.get(norm) == layer for norm in norms):
                free = layer in self.layers and edge not in self.ranges
                return {edge: layer} if free and all(o in self.ranges for o in edges if o != edge) else {}
        return {}

    def _is_float(self, node: Node) -> bool:
        if node.op in ("conv", "linear"):
            return node.name not in self.layers
        if node.kind.acts == SUMS:
            return any(edge not in self.ranges and edge not in self.pending for edge in node.edges())
        return node.kind.acts == REAL and node.op != "input" and node.name not in self.norms

    def _layer(self, node: Node, norm_name: str, compressed: CompressedModel) -> Layer:
        integers, scale = integers_of(compressed.weights[node.name])
        module, source = node.module, self.ranges[node.name]
        shift = np.zeros(len(integers)) if module.bias is None else _float64(module.bias)
        ratio = np.ones(len(integers))
        if norm_name:
            norm = self.nodes[norm_name].module
            ratio = 1 / np.sqrt(_float64(norm.running_var) + norm.eps)
            ratio = ratio * _float64(norm.weight) if norm.affine else ratio
            shift = (shift - _float64(norm.running_mean)) * ratio + (_float64(norm.bias) if norm.affine else 0)
        return Layer(integers, scale * ratio * source.scale, shift, source, compressed.windows.get(node.name))


def integers_of(tensor: CompressedTensor) -> tuple[np.ndarray, np.ndarray]:
    """int64 [C_out, ...] and the float64 [C_out] value of one: codes less the code of 0, levels, or a table's entries.

    The table of a codebook has 8 bits, or 16 where with 127 for the largest entry in use two of them would be one, or
    one would be 0. Of 8 bits the largest is 127 to 64, whichever has the least squared error over the weights among
    those that keep entries apart, too; of 16 it is 32,767, and an entry below half a step is a step.
    """
    codes, mask, channels = tensor.codes.numpy().astype(np.int64), tensor.mask.numpy(), tensor.codes.shape[0]
    grid = tensor.grid
    if isinstance(grid, Affine):
        zero = np.broadcast_to(grid.zero.numpy(), (channels,)).reshape(-1, *[1] * (codes.ndim - 1))
        return np.where(mask, codes - zero, 0), np.broadcast_to(_float64(grid.scale), (channels,))
    if isinstance(grid, Levels):
        return np.where(mask, grid.levels.numpy().astype(np.int64)[codes], 0), np.broadcast_to(
            _float64(grid.scale), (channels,))
    used, counts = np.unique(codes[mask], return_counts=True)
    if len(used) == 0:
        return np.zeros_like(codes), np.ones(channels)
    table, scale = _table(dict(zip(used.tolist(), _float64(grid.values)[used].tolist(), strict=True)), counts.tolist())
    whole = np.zeros(len(grid.values), np.int64)
    whole[list(table)] = list(table.values())
    return np.where(mask, whole[codes], 0), np.full(channels, scale)


def _table(values: dict[int, float], counts: list[int]) -> tuple[dict[int, int], float]:
    """{code: integer} and the value of one, of a codebook's entries in use and how many weights have each."""
    peak = max(map(abs, values.values()))

    def entries(top: int) -> dict[int, int]:
        return {code: int(np.rint(value / (peak / top))) for code, value in values.items()}

    def apart(top: int) -> bool:
        table = entries(top)
        return 0 not in table.values() and len(set(table.values())) == len(set(values.values()))

    def error(top: int) -> float:
        table = entries(top)
        off = [table[code] * (peak / top) - value for code, value in values.items()]
        return math.fsum(x * x * count for x, count in zip(off, counts, strict=True))

    if apart(127):
        top = min(filter(apart, range(127, 63, -1)), key=error)
        return entries(top), peak / top
    return {code: entry or (1 if values[code] > 0 else -1) for code, entry in entries(32767).items()}, peak / 32767


def _float64(tensor) -> np.ndarray:
    return tensor.detach().numpy().astype(np.float64)
