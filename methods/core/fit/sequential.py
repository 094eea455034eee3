"""A network quantized layer by layer, each on the inputs that the layers before it give once they are quantized.

One pass: the graph runs operation by operation on all inputs at once, and a layer's weights are replaced just
before it runs. What its outputs lose on average by that goes back into its bias (Nagel et al., ICCV 2019):

    bias += (W - W') m,   m = E[x]
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..artifact import ActivationQuantizer, CompressedTensor
from ..graph.graph import Graph, trace
from ..graph.nodes import Node
from ..graph.weights import Layer, weight_layers
from .calibrate import EdgeRanges, check_calibration
from .moments import Moments

BATCH = 64
Fit = Callable[[str, Tensor, Moments | None], CompressedTensor | None]


@torch.no_grad()
def quantize_in_order(model: nn.Module, inputs: Tensor, fit: Fit, generator: torch.Generator, *, bits: int = 8,
                      range_method: str = "minmax", correct: bool = True, second: bool = True
                      ) -> tuple[nn.Module, dict[str, CompressedTensor], dict[str, ActivationQuantizer]]:
    """(a copy of `model` with decoded weights and corrected biases, {layer: what `fit` made of it}, ranges).

    model    on the CPU, batch norm folded; run in eval mode on all of `inputs` [n, ...], which stay in memory
    fit      (layer, its float weight, moments of its inputs) -> codes, or None for a layer that stays as it is. There
             are no moments of what is no conv or linear of the graph; such layers come first.
    correct  move the mean of the error into the bias, where the layer has one
    second   take second moments, which only some fits need
    bits, range_method  of the activations, seen in the same pass
    """
    check_calibration(bits, len(inputs), range_method)
    model = copy.deepcopy(model).eval()
    graph, layers = trace(model), weight_layers(model)
    seen = {node.name for node in graph.layers()}
    weights = {name: _replace(name, layer, None, fit, False) for name, layer in layers.items() if name not in seen}
    ranges, flow = EdgeRanges(graph, bits, range_method), Flow(graph, list(inputs.split(BATCH)))
    for node in graph:
        if node.op == "input":
            continue
        if node.name in seen:
            moments = Moments(layers[node.name], generator, second=second)
            for (x,) in flow.inputs(node):
                moments.update(x)
            weights[node.name] = _replace(node.name, layers[node.name], moments, fit, correct)
        flow.run(node, ranges)
    return model, {name: weights[name] for name in layers if weights[name] is not None}, ranges.quantizers()


class Flow:
    """The values of a graph for all batches at once, operation by operation."""

    def __init__(self, graph: Graph, batches: list[Tensor]):
        first = next(iter(graph.nodes))
        self.graph, self.values = graph, {first: batches}
        self.shapes = [{first: x.shape} for x in batches]

    def inputs(self, node: Node) -> list[tuple]:
        """What a node reads, for each batch."""
        return list(zip(*(self.values[name] for name in node.inputs), strict=True))

    def run(self, node: Node, ranges: EdgeRanges) -> None:
        """Compute a node for each batch, look at it, and drop what nobody reads any more."""
        self.values[node.name] = []
        for inputs, shapes in zip(self.inputs(node), self.shapes, strict=True):
            output = node.at(shapes).run(*inputs)
            if self.graph.needs_shape(node.name):
                shapes[node.name] = output.shape
            ranges.see(node, inputs, output)
            self.values[node.name].append(output)
        for name in dict.fromkeys(node.inputs):
            if self.graph.consumers(name)[-1] is node and name != self.graph.output:
                self.values.pop(name, None)


def _replace(name: str, layer: Layer, moments: Moments | None, fit: Fit, correct: bool
             ) -> CompressedTensor | None:
    """What `fit` makes of the weight of a layer, which has it from now on; None if it leaves the layer alone."""
    before = layer.weight.detach().clone()
    tensor = fit(name, before, moments)
    if tensor is None:
        return None
    layer.weight.copy_(tensor.decode())
    if correct and moments is not None and layer.bias is not None:
        layer.bias += moments.shift(before - layer.weight)
    return tensor
