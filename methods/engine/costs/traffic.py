"""The least memory traffic of a network, in bits per input, and the roofline it implies.

Operations that read memory are conv, linear, average pool and add, and what needs real values (it reads and writes
float32); batch norm, clamps, max pool and what else moves values are applied on the way out of the one before. Parts
of a concatenation are written where they belong; only where something is applied to the whole is it read once more.
Weights are fetched once per batch; an activation tensor is written once (once for each quantizer that reads it: the
integer kernels keep one form per quantizer) and read once by each reader. What an add takes from the accumulators of
the conv before it (`Graph.accumulator_edges`, where that edge has no quantizer) never leaves them: the conv writes
nothing, the add writes the sum. The input was written by somebody else; the output of the network is written in
float32.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from ...core.artifact import ActivationQuantizer
from ...core.errors import ConfigError
from ...core.graph.graph import Graph, Node
from ...core.graph.operations import REAL, SUMS
from ..widths import FLOAT_BITS
from .shapes import elements, origin

Ranges = Mapping[str, ActivationQuantizer]


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
    forms: set[tuple[str, ActivationQuantizer | None]] = set()
    reads: dict[str, int] = defaultdict(int)
    writes: dict[str, int] = defaultdict(int)
    kept = in_accumulators(graph, ranges)

    def store(name: str, quantizer: ActivationQuantizer | None) -> None:
        """The tensors that the value `name` lies in, written in one form."""
        width = FLOAT_BITS if quantizer is None else quantizer.bits
        for tensor in _tensors(graph, name):
            if (tensor, quantizer) in forms:
                continue
            forms.add((tensor, quantizer))
            writer = graph.nodes[origin(graph, tensor)]
            writes[writer.name] += elements(sizes[tensor]) * width
            for part in writer.inputs if writer.op == "cat" else ():
                reads[writer.name] += elements(sizes[part]) * width
                store(part, quantizer)

    store(graph.output, None)
    for node in graph:
        for edge, source in zip(node.edges() or node.inputs, node.inputs, strict=False) if _reads(node) else ():
            if edge not in kept:
                reads[node.name] += elements(sizes[source]) * (edge_width(ranges, edge) if node.edges() else FLOAT_BITS)
                store(source, ranges.get(edge) if node.edges() else None)
    return {node.name: Traffic(weight_bits.get(node.name, 0) / batch, reads[node.name], writes[node.name])
            for node in graph if _reads(node) or node.op == "cat" and reads[node.name] > 0}


def _reads(node: Node) -> bool:
    """Whether an operation reads memory of its own accord."""
    return node.kind.acts == SUMS or node.kind.acts == REAL and node.op not in ("input", "bn")


def output_width(graph: Graph, ranges: Ranges, name: str) -> int:
    """Bits at which the value `name` is stored: those of its widest reader; 32 if it leaves the network.

    What stays in accumulators is stored as the sum that it enters.
    """
    return max(_readers(graph, ranges, in_accumulators(graph, ranges), name), default=0)


def _readers(graph: Graph, ranges: Ranges, kept: set[str], name: str) -> list[int]:
    widths = [FLOAT_BITS] if name == graph.output else []
    for node in graph.consumers(name):
        edges = [edge for edge, source in zip(node.edges(), node.inputs, strict=False) if source == name]
        if not edges and _reads(node):
            widths.append(FLOAT_BITS)
        elif not edges or any(edge in kept for edge in edges):
            widths += _readers(graph, ranges, kept, node.name)
        else:
            widths += [edge_width(ranges, edge) for edge in edges]
    return widths


def _tensors(graph: Graph, name: str) -> list[str]:
    """The tensors that hold the value `name`: it may be one under another name, or several side by side."""
    node = graph.nodes[name]
    if not node.kind.aliases and node.op != "cat":
        return [name]
    return [tensor for part in dict.fromkeys(node.inputs) for tensor in _tensors(graph, part)]


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
