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
from ..graph.build import weight_layers
from ..graph.graph import trace
from .calibrate import EdgeRanges, check_calibration
from .moments import Moments

BATCH = 64
Fit = Callable[[str, Tensor, Moments], CompressedTensor]  # (layer, its float weight, moments of its inputs)


@torch.no_grad()
def quantize_in_order(model: nn.Module, inputs: Tensor, fit: Fit, generator: torch.Generator, *, bits: int = 8,
                      range_method: str = "minmax", correct: bool = True, second: bool = True
                      ) -> tuple[nn.Module, dict[str, CompressedTensor], dict[str, ActivationQuantizer]]:
    """(a copy of `model` with decoded weights and corrected biases, {layer: what `fit` made of it}, ranges).

    model    on the CPU, batch norm folded; run in eval mode on all of `inputs` [n, ...], which stay in memory
    correct  move the mean of the error into the bias, where the layer has one
    second   take second moments, which only some fits need
    bits, range_method  of the activations, seen in the same pass
    """
    check_calibration(bits, len(inputs), range_method)
    model = copy.deepcopy(model).eval()
    graph, layers = trace(model), weight_layers(model)
    ranges = EdgeRanges(graph, bits, range_method)
    values: dict[str, list[Tensor]] = {next(iter(graph.nodes)): list(inputs.split(BATCH))}
    last_use = {name: node.name for node in graph for name in node.inputs}
    shapes: list[dict[str, torch.Size]] = [{name: x.shape for name in values} for x in values[next(iter(values))]]
    weights = {}
    for node in graph:
        if node.op == "input":
            continue
        batches = list(zip(*(values[name] for name in node.inputs), strict=True))
        if node.op in ("conv", "linear"):
            moments = Moments(layers[node.name], generator, second=second)
            for (x,) in batches:
                moments.update(x)
            weights[node.name] = _replace(node.name, layers[node.name], moments, fit, correct)
        values[node.name] = [node.at(known).run(*batch) for known, batch in zip(shapes, batches, strict=True)]
        if graph.needs_shape(node.name):
            for known, output in zip(shapes, values[node.name], strict=True):
                known[node.name] = output.shape
        for batch, output in zip(batches, values[node.name], strict=True):
            ranges.see(node, batch, output)
        del batches
        for name in dict.fromkeys(node.inputs):
            if last_use[name] == node.name:
                values.pop(name, None)
    return model, {name: weights[name] for name in layers if name in weights}, ranges.quantizers()


def _replace(name: str, layer: nn.Module, moments: Moments, fit: Fit, correct: bool) -> CompressedTensor:
    """What `fit` makes of the weight of a layer, which has it from now on."""
    before = layer.weight.detach().clone()
    tensor = fit(name, before, moments)
    layer.weight.copy_(tensor.decode())
    if correct and layer.bias is not None:
        layer.bias += moments.shift(before - layer.weight)
    return tensor
