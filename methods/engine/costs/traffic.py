"""The least memory traffic of a network, in bits per input, and the roofline it implies.

Operations that read memory are conv, linear, average pool and add; batch norm, ReLU, max pool and flatten are
applied on the way out of the one before. Weights are fetched once per batch; an activation tensor is written once
(once for each quantizer that reads it: the integer kernels keep one form per quantizer) and read once by each
reader. What an add takes from the accumulators of the conv before it (`Graph.accumulator_edges`, where that edge has
no quantizer) never leaves them: the conv writes nothing, the add writes the sum. The input was written by somebody
else; the output of the network is written in float32.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from ...core.artifact import ActivationQuantizer
from ...core.errors import ConfigError
from ...core.graph.graph import EDGE_OPS, Graph
from ..widths import FLOAT_BITS
from .shapes import elements, origin

Ranges = Mapping[str, ActivationQuantizer]
MOVING = ("flatten", "identity")  # the same tensor under another name


@dataclass(frozen=True)
class Traffic:
    """Bits moved for one input: weights (already divided by the batch), activations read, activations written."""

    weights: float
    reads: int
    writes: int

    @property
    def total(self) -> float:
        return self.weights + self.reads + self.writes


def edge_width(ranges: Ranges, edge: str) -> int:
    """Bits of an activation at `edge`; 32 without a quantizer."""
    return ranges[edge].bits if edge in ranges else FLOAT_BITS


def in_accumulators(graph: Graph, ranges: Ranges) -> set[str]:
    """Edges of adds whose value stays in the accumulators of the conv or linear before them."""
    return {edge for edge in graph.accumulator_edges() if edge not in ranges}


def traffic_of(graph: Graph, sizes: Mapping[str, tuple[int, ...]], ranges: Ranges,
               weight_bits: Mapping[str, float], batch: int = 1) -> dict[str, Traffic]:
    """{operation that reads memory: Traffic}.

    sizes        {node: shape of its output}, from `shapes.sizes_of`
    weight_bits  {layer: bits of all its weights as stored}
    """
    if batch < 1:
        raise ConfigError(f"batch = {batch}: weights are reused over 1 or more inputs")
    forms: dict[tuple[str, ActivationQuantizer | None], int] = {(_tensor(graph, graph.output), None): FLOAT_BITS}
    reads: dict[str, int] = defaultdict(int)
    kept = in_accumulators(graph, ranges)
    for node in graph:
        for edge, source in zip(node.edges(), node.inputs, strict=False):
            if edge in kept:
                continue
            forms[_tensor(graph, source), ranges.get(edge)] = edge_width(ranges, edge)
            reads[node.name] += elements(sizes[source]) * edge_width(ranges, edge)
    writes: dict[str, int] = defaultdict(int)
    for (tensor, _), width in forms.items():
        writes[origin(graph, tensor)] += elements(sizes[tensor]) * width
    return {node.name: Traffic(weight_bits.get(node.name, 0) / batch, reads[node.name], writes[node.name])
            for node in graph if node.op in EDGE_OPS}


def output_width(graph: Graph, ranges: Ranges, name: str) -> int:
    """Bits at which the value `name` is stored: those of its widest reader; 32 if it leaves the network.

    What stays in accumulators is stored as the sum that it enters.
    """
    return max(_readers(graph, ranges, in_accumulators(graph, ranges), name), default=0)


def _readers(graph: Graph, ranges: Ranges, kept: set[str], name: str) -> list[int]:
    widths = [FLOAT_BITS] if name == graph.output else []
    for node in graph.consumers(name):
        edges = [edge for edge, source in zip(node.edges(), node.inputs, strict=False) if source == name]
        if not edges or any(edge in kept for edge in edges):
            widths += _readers(graph, ranges, kept, node.name)
        else:
            widths += [edge_width(ranges, edge) for edge in edges]
    return widths


def _tensor(graph: Graph, name: str) -> str:
    while graph.nodes[name].op in MOVING:
        name = graph.nodes[name].inputs[0]
    return name


@dataclass(frozen=True)
class Roofline:
    """intensity in MAC per byte; seconds = max(MACs / peak, bytes / bandwidth); bound: "compute" or "memory"."""

    intensity: float
    seconds: float
    bound: str


def roofline(macs: float, bits: float, peak: float, bandwidth: float) -> Roofline:
    """Williams et al. 2009. `peak` in MAC per second, `bandwidth` in bytes per second."""
    if min(bits, peak, bandwidth) <= 0:
        raise ConfigError(f"bits = {bits}, peak = {peak}, bandwidth = {bandwidth}: all must be more than 0")
    compute, memory = macs / peak, bits / 8 / bandwidth
    return Roofline(8 * macs / bits, max(compute, memory), "compute" if compute >= memory else "memory")
