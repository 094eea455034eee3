"""Bit operations in the two forms of the literature, on the operand widths b_w and b_a of `widths`.

Bayesian Bits (van Baalen et al. 2020), HAQ:   MACs x b_w x b_a x p_out x p_in
UNIQ / HCM (Baskin et al. 2021):               MACs x (b_w b_a + b_w + b_a + log2((C_in / groups) K_h K_w))
  with pruning (Hawks et al. 2021):            MACs x (p b_w b_a + b_w + b_a + log2(...)),  p = kept weights

p_out is the share of a layer's filters that keep a weight; p_in that of the layer which alone feeds it, and 1
where the input is read by others too or is a residual sum (a channel of a sum is 0 only if every branch prunes
it). In a ResNet that leaves p_in to the second convolution of a block, as in the official code. A layer with
groups has p_in = 1. The input of the network counts 8 bits, except where its reader runs in float.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ...core.errors import ConfigError
from ...core.graph.channels import find_pairs
from ...core.graph.graph import Graph
from ..widths import FLOAT_BITS
from .shapes import LayerShape, origin

INPUT_BITS = 8


@dataclass(frozen=True)
class Operands:
    """Widths of a layer's operands, and the shares of its filters and of its weights that are kept."""

    weight_bits: int
    activation_bits: int
    kept_filters: float = 1.0
    density: float = 1.0
    in_float: bool = False


def kept_filters(mask: Tensor) -> float:
    """Share of output channels with at least one kept weight; mask bool [C_out, ...]."""
    return float(mask.flatten(1).any(1).double().mean())


def feeders(model: nn.Module) -> dict[str, str]:
    """{layer: the conv or linear whose output that layer alone reads, channel by channel}."""
    return {pair.second: pair.first for pair in find_pairs(model, (nn.Conv2d, nn.Linear))}


def activation_width(graph: Graph, layer: str, operands: Operands) -> int:
    """b_a, or 8 where the layer reads the input of the network, and not in float."""
    first = graph.nodes[origin(graph, graph.nodes[layer].inputs[0])].op == "input"
    return INPUT_BITS if first and not operands.in_float else operands.activation_bits


def bayesian_bits(graph: Graph, shapes: Mapping[str, LayerShape], operands: Mapping[str, Operands],
                  feeding: Mapping[str, str]) -> dict[str, float]:
    """{layer: BOPs} with the p_out and p_in of Bayesian Bits; `feeding` is what `feeders` returns."""
    bops = {}
    for name, shape in shapes.items():
        mine = operands[name]
        p_in = operands[feeding[name]].kept_filters if name in feeding else 1.0
        width = activation_width(graph, name, mine)
        bops[name] = shape.macs * mine.weight_bits * width * mine.kept_filters * p_in
    return bops


def relative(bops: Mapping[str, float], dense: Mapping[str, LayerShape]) -> float:
    """Percent of the BOPs of the unpruned network `dense` at 32 x 32 bits."""
    return 100 * sum(bops.values()) / (FLOAT_BITS**2 * sum(shape.macs for shape in dense.values()))


def uniq(shape: LayerShape, weight_bits: int, activation_bits: int, density: float = 1.0) -> float:
    """BOPs of one layer with the accumulator's width counted; `density` discounts only the product."""
    if not 0 <= density <= 1:
        raise ConfigError(f"density = {density}: allowed is 0 to 1")
    product = density * weight_bits * activation_bits
    return shape.macs * (product + weight_bits + activation_bits + math.log2(shape.reduction))
