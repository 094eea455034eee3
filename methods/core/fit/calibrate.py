"""Ranges of activations from a few inputs: one 8-bit (or narrower) quantizer per edge of the graph."""

import math

import torch
from torch import Tensor, nn

from ..artifact import MAX_BITS, ActivationQuantizer
from ..errors import CompressError, ConfigError
from ..graph.graph import Graph, Node, trace
from ..graph.wrapped import copy_inside
from .ranges import find_observer

BATCH = 128


def quantizer_of(low: float, high: float, bits: int) -> ActivationQuantizer:
    """Unsigned codes 0..2^bits - 1 over [min(low, 0), max(high, 0)]; 0 is a whole code, the padding of a conv."""
    low, high, top = min(low, 0.0), max(high, 0.0), (1 << bits) - 1
    scale = float(torch.tensor((high - low) / top, dtype=torch.float32).clamp_min(torch.finfo(torch.float32).eps))
    return ActivationQuantizer(scale, int(min(max(round(-low / scale), 0), top)), bits, signed=False)


class EdgeRanges:
    """What is seen at every edge of `graph` but those where an add takes the accumulators of the conv before it."""

    def __init__(self, graph: Graph, bits: int, method: str):
        skipped, observer = graph.accumulator_edges(), find_observer(method)
        self.bits = bits
        self.observers = {edge: observer(bits) for edge in graph.edges() if edge not in skipped}

    def see(self, node: Node, values: tuple[Tensor, ...], output: Tensor) -> None:
        """The `see` of `Graph.run`."""
        for edge, value in zip(node.edges(), values, strict=False):
            if edge in self.observers:
                self.observers[edge].update(value.float())

    def quantizers(self) -> dict[str, ActivationQuantizer]:
        """{edge: quantizer}; CompressError where an activation was not finite."""
        ranges = {edge: observer.range() for edge, observer in self.observers.items()}
        broken = [edge for edge, (low, high) in ranges.items() if not (math.isfinite(low) and math.isfinite(high))]
        if broken:
            raise CompressError(f"the activations at {broken[0]!r} are not finite: look at the calibration inputs")
        return {edge: quantizer_of(low, high, self.bits) for edge, (low, high) in ranges.items()}


@torch.no_grad()
def calibrate(model: nn.Module, inputs: Tensor, bits: int = 8,
              method: str = "minmax") -> dict[str, ActivationQuantizer]:
    """{edge: quantizer} from the float activations of a copy of `model` on `inputs` [n, ...] in eval mode.

    For every edge but those where an add takes the accumulators of the conv before it.
    """
    check_calibration(bits, len(inputs), method)
    model = copy_inside(model).eval()
    graph = trace(model)
    ranges = EdgeRanges(graph, bits, method)
    device = next((parameter.device for parameter in model.parameters()), inputs.device)
    for start in range(0, len(inputs), BATCH):
        graph.run(inputs[start:start + BATCH].to(device), ranges.see)
    return ranges.quantizers()


def check_calibration(bits: int, inputs: int, method: str = "minmax") -> None:
    """ConfigError for a width of activations, a number of calibration inputs, or a range method that is not allowed."""
    find_observer(method)
    if not 1 <= bits <= MAX_BITS:
        raise ConfigError(f"activation bits = {bits}: allowed is 1..{MAX_BITS}")
    if inputs < 1:
        raise ConfigError(f"calibration inputs = {inputs}: at least 1 is needed")
