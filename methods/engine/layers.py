"""What running a network costs: multiply-accumulates and bit operations, per layer and in total.

The widths of the operands are those of `widths`; the pruned and the accumulator-counting forms of the literature, on
the same widths, are in `costs/bops`.
"""

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from ..core.artifact import CompressedModel
from ..core.graph.build import apply
from .costs.shapes import Traced, shapes_of
from .widths import FLOAT_BITS, operand_widths


@dataclass(frozen=True)
class LayerCost:
    """One conv or linear layer, for one input.

    macs             C_out H_out W_out (C_in / groups) K_h K_w; linear: in x out
    density          kept fraction of the weights
    weight_bits      of a stored code; 32 where the weight is not stored as codes
    operand_bits     of what a multiplier takes for it, and
    activation_bits  of what it takes of the input (see `widths`)
    """

    macs: int
    weights: int
    density: float
    weight_bits: int
    operand_bits: int
    activation_bits: int

    @property
    def bops(self) -> int:
        """MACs x operand bits x activation bits (Bayesian Bits; no accumulator term)."""
        return self.macs * self.operand_bits * self.activation_bits

    @property
    def sparse_bops(self) -> float:
        """BOPs of hardware that skips every pruned weight: BOPs x density. Dense kernels do not."""
        return self.bops * self.density

    @property
    def bops_float_activations(self) -> int:
        return self.macs * self.operand_bits * FLOAT_BITS


def layer_macs(model: nn.Module, shape: tuple[int, ...]) -> dict[str, int]:
    """{layer: multiply-accumulates} of every conv and linear for one input of `shape` [C, H, W]."""
    return {name: layer.macs for name, layer in shapes_of(model, shape).items()}


def layer_costs(compressed: CompressedModel, skeleton: nn.Module, shape: tuple[int, ...],
                in_float: Collection[str] = (), traced: Traced | None = None) -> dict[str, LayerCost]:
    """{layer: LayerCost} of a compressed model, from what is stored (never from what was asked for).

    in_float  layers that a policy runs in float: they multiply 32 x 32 bits
    traced    the compressed network, if somebody has traced it already
    """
    traced = Traced.of(apply(compressed, skeleton), shape) if traced is None else traced
    model = traced.model
    costs = {}
    for name, macs in traced.macs.items():
        tensor, weight = compressed.weights.get(name), model.get_submodule(name).weight
        density = tensor.density if tensor is not None else float((weight != 0).float().mean())
        stored = FLOAT_BITS if tensor is None else tensor.bits
        costs[name] = LayerCost(macs, weight.numel(), density, stored, *operand_widths(compressed, name, in_float))
    return costs


def totals(costs: dict[str, LayerCost], dense_weights: int) -> dict[str, float]:
    """Sums over layers, the mean bits of the kept weights, and their fraction of the `dense_weights` conv and
    linear weights that the uncompressed network has (removed channels are pruned weights too)."""
    layers = costs.values()
    weights = sum(layer.weights for layer in layers)
    kept = sum(layer.weights * layer.density for layer in layers)
    return {
        "macs": sum(layer.macs for layer in layers),
        "bops": sum(layer.bops for layer in layers),
        "sparse_bops": sum(layer.sparse_bops for layer in layers),
        "bops_float_activations": sum(layer.bops_float_activations for layer in layers),
        "weights": weights,
        "kept_weights": round(kept),
        "density": kept / dense_weights,
        "mean_bits": sum(layer.weights * layer.density * layer.weight_bits for layer in layers) / max(kept, 1),
    }
