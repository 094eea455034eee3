"""How wide the two numbers are that a layer multiplies: what every count of bit operations and energy asks.

Bit operations are MACs x b_w x b_a (Bayesian Bits, van Baalen et al. 2020), where of a layer

    b_w   is the operand width of its weights: the code's on an affine grid, that of the integers on levels, 8 or 16
          for the integer table of a codebook
    b_a   is the width of its input's codes; where SPARQ's window cuts them, the window's, because what multiplies is
          that narrow (a pair with a zero uses both its multipliers for the other member: the same bits per MAC);
          32 where the input has no quantizer
    both  are 32 where the layer runs in float: its weights are not codes, or the caller's policy says so
"""

from collections.abc import Collection

from ..core.artifact import CompressedModel
from .weights import operand_bits

FLOAT_BITS = 32


def operand_widths(compressed: CompressedModel, layer: str, in_float: Collection[str] = ()) -> tuple[int, int]:
    """(b_w, b_a) of a conv or linear layer; `in_float` are the layers that a policy runs in float."""
    if runs_in_float(compressed, layer, in_float):
        return FLOAT_BITS, FLOAT_BITS
    window, quantizer = compressed.windows.get(layer), compressed.activations.get(layer)
    if quantizer is None:
        return operand_bits(compressed.weights[layer]), FLOAT_BITS
    return operand_bits(compressed.weights[layer]), quantizer.bits if window is None else window.bits


def runs_in_float(compressed: CompressedModel, layer: str, in_float: Collection[str] = ()) -> bool:
    return layer in in_float or layer not in compressed.weights
