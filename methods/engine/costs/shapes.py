"""The sizes that every hardware model starts from, taken from one run of the traced graph."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import CompressError, ConfigError
from ...core.graph.graph import Graph, Node, trace
from ...core.graph.wrapped import copy_inside
from ...core.train.loaders import first_line
from ..outputs import tensors_in

Pair = tuple[int, int]


@dataclass(frozen=True)
class LayerShape:
    """One conv or linear layer for one input. A linear layer is a 1 x 1 convolution of a 1 x 1 image.

    stride, padding  (vertical, horizontal); padding is that of the top and left
    in_elements      of the input, without the padding
    """

    name: str
    kind: str
    out_h: int
    out_w: int
    in_channels: int
    out_channels: int
    kernel_h: int = 1
    kernel_w: int = 1
    groups: int = 1
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    in_elements: int = 0
    out_elements: int = 0

    @property
    def positions(self) -> int:
        """H_out W_out: how often every filter is applied."""
        return self.out_h * self.out_w

    @property
    def reduction(self) -> int:
        """(C_in / groups) K_h K_w: multiply-accumulates of one output element."""
        return self.in_channels // self.groups * self.kernel_h * self.kernel_w

    @property
    def weights(self) -> int:
        return self.out_channels * self.reduction

    @property
    def macs(self) -> int:
        return self.positions * self.weights


@dataclass(frozen=True)
class Traced:
    """A network with its graph, {node: shape of its output for one input, without the batch}, and its layers."""

    model: nn.Module
    graph: Graph
    sizes: dict[str, tuple[int, ...]]
    shapes: dict[str, LayerShape]

    @classmethod
    def of(cls, model: nn.Module, input_shape: tuple[int, ...], graph: Graph | None = None) -> "Traced":
        """A copy of `model`, traced now; the model itself, as it is, where its graph is given."""
        if graph is None:
            model = copy_inside(model).eval()
            graph = trace(model)
        sizes = _sizes(model, graph, input_shape)
        return cls(model, graph, sizes, layer_shapes(graph, sizes))

    @property
    def macs(self) -> dict[str, int]:
        """{layer: multiply-accumulates} of one input."""
        return {name: shape.macs for name, shape in self.shapes.items()}


def sizes_of(model: nn.Module, input_shape: tuple[int, ...]) -> tuple[Graph, dict[str, tuple[int, ...]]]:
    """The graph of a copy of `model`, and {node: shape of its output} for one input of `input_shape`, without the
    batch."""
    traced = Traced.of(model, input_shape)
    return traced.graph, traced.sizes


@torch.no_grad()
def _sizes(model: nn.Module, graph: Graph, input_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Of zeros in float32; in int64, where the network takes only those (tokens)."""
    if not input_shape:
        raise ConfigError("shape = (): costs need that of one input, without the batch, such as (3, 32, 32)")
    device = next((parameter.device for parameter in model.parameters()), None)
    failed: list[tuple[int, Exception]] = []  # (how many operations were seen, why no more)
    for dtype in (torch.float32, torch.int64):
        sizes = {next(iter(graph.nodes)): tuple(input_shape)}
        error = _fill(sizes, graph, torch.zeros(1, *input_shape, dtype=dtype, device=device))
        if error is None:
            return sizes
        failed.append((len(sizes), error))
    error = max(failed, key=lambda pair: pair[0])[1]
    raise ConfigError(f"shape = {tuple(input_shape)}: {type(model).__name__} cannot take one input of that shape: "
                      f"{first_line(error)}") from error


def _fill(sizes: dict[str, tuple[int, ...]], graph: Graph, x: Tensor) -> Exception | None:
    """The sizes of all that the network makes of `x`, or of what comes before the error."""
    try:
        graph.run(x, lambda node, inputs, output: sizes.update({node.name: _size(output)}))
    except CompressError:
        raise
    except Exception as error:  # noqa: BLE001 - a network raises what it likes
        return error
    return None


def _size(output: Any) -> tuple[int, ...]:
    """Without the batch; (elements,) of several tensors."""
    if isinstance(output, Tensor):
        return tuple(output.shape[1:])
    return (sum(elements(tuple(tensor.shape[1:])) for tensor in tensors_in(output)),)


def layer_shapes(graph: Graph, sizes: dict[str, tuple[int, ...]]) -> dict[str, LayerShape]:
    """{layer: LayerShape} of every conv and linear, in execution order."""
    shapes = {}
    for node in graph.layers():
        into, out = sizes[node.inputs[0]], sizes[node.name]
        make = _conv if node.op == "conv" else _linear
        shapes[node.name] = make(node.name, node.module, into, out)
    return shapes


def shapes_of(model: nn.Module, input_shape: tuple[int, ...]) -> dict[str, LayerShape]:
    """{layer: LayerShape} for one input of `input_shape` [C, H, W]."""
    return layer_shapes(*sizes_of(model, input_shape))


def elements(size: tuple[int, ...]) -> int:
    return int(torch.Size(size).numel())


def origin(graph: Graph, name: str) -> str:
    """The operation that wrote the value `name`, or the value it was made from on the way out: a conv, linear, average
    pool or add, one that joins tensors or needs real values, or the input."""
    while writes_on_the_way(graph.nodes[name]):
        name = graph.nodes[name].inputs[0]
    return name


def writes_on_the_way(node: Node) -> bool:
    """Whether hardware does this when the operation before it writes: batch norm, clamps, what moves values."""
    return (node.on_codes or node.op == "bn") and len(node.inputs) == 1


def leading_padding(layer: nn.Conv2d) -> Pair:
    """Padding at the top and left of a convolution."""
    if layer.padding == "valid":
        return 0, 0
    if layer.padding == "same":
        above, left = (step * (width - 1) // 2 for step, width in zip(layer.dilation, layer.kernel_size, strict=True))
        return above, left
    return layer.padding


def _conv(name: str, layer: nn.Conv2d, into: tuple[int, ...], out: tuple[int, ...]) -> LayerShape:
    return LayerShape(name, "conv", out[-2], out[-1], layer.in_channels, layer.out_channels, *layer.kernel_size,  # type: ignore[call-arg]
                      layer.groups, layer.stride, leading_padding(layer), elements(into), elements(out))


def _linear(name: str, layer: nn.Linear, into: tuple[int, ...], out: tuple[int, ...]) -> LayerShape:
    positions = elements(out) // layer.out_features
    return LayerShape(name, "linear", positions, 1, layer.in_features, layer.out_features,
                      in_elements=elements(into), out_elements=elements(out))
