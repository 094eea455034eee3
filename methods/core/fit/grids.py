"""Weights on a uniform grid that is named in a configuration: "odd" (no zero), "symmetric" or "asymmetric"."""

from torch import Tensor

from ..artifact import CompressedTensor
from ..errors import ConfigError
from ..graph.fold import scale_channels
from .odd_levels import quantize_odd
from .quantize import SCHEMES, find_scheme, quantize

ODD = "odd"  # Eq. (3) of UDFC and the high-bit layers of DF-MPC


def check_grid(scheme: str) -> None:
    """ConfigError for a grid that there is not."""
    if scheme not in (ODD, *SCHEMES):
        raise ConfigError(f"scheme = {scheme!r}: allowed are {', '.join((ODD, *SCHEMES))}")


def on_grid(weight: Tensor, bits: int, scheme: str, per_channel: bool, factors: Tensor | None = None
            ) -> CompressedTensor:
    """`weight` [C_out, ...] rounded to the grid; then its channels are multiplied by `factors` [C_out], if given."""
    if scheme == ODD:
        return quantize_odd(weight, bits, factors, per_channel=per_channel)
    coded = quantize(weight, find_scheme(scheme, [bits])(weight, bits, per_channel), bits)
    return coded if factors is None else scale_channels(coded, factors)
