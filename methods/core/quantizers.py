"""The parts of a compressed model that hold no tensors: they are read, and described, without torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .errors import CompressError

if TYPE_CHECKING:
    from torch import Tensor

MAX_BITS = 16  # wider codes are not integers any kernel runs: such a tensor stays float, in `rest`
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8, "int64": 8, "int32": 4, "int16": 2, "int8": 1,
               "uint8": 1, "bool": 1}


@dataclass(frozen=True)
class ActivationQuantizer:
    """code = clamp(round_half_even(x / scale) + zero, low, high) at one edge of the graph (see `graph.py`)."""

    scale: float
    zero: int = 0
    bits: int = 8
    signed: bool = False

    def __post_init__(self):
        good = 0 < self.scale < float("inf") and 1 <= self.bits <= MAX_BITS
        if not good or not self.code_range[0] <= self.zero <= self.code_range[1]:
            raise CompressError(f"not an activation quantizer: {self}")

    @property
    def code_range(self) -> tuple[int, int]:
        return (-(1 << self.bits - 1), (1 << self.bits - 1) - 1) if self.signed else (0, (1 << self.bits) - 1)

    def encode(self, x: "Tensor") -> "Tensor":
        """Integer codes, held as float32, of real activations."""
        return (x / self.scale).round().add_(self.zero).clamp_(*self.code_range)

    def decode(self, codes: "Tensor") -> "Tensor":
        return (codes - self.zero) * self.scale


@dataclass(frozen=True)
class Window:
    """SPARQ's bit window on the 8-bit activation codes that one consumer reads (SPARQ, sections 2 and 3).

    bits      width of the window;  shifts  its allowed positions
    rounding  round half to even inside the window, else truncate
    paired    a zero in a channel pair gives its bits to the partner (vSPARQ)
    sparse24  pairs are the two kept weights of each 2:4 group (sparse tensor cores)
    """

    bits: int
    shifts: tuple[int, ...]
    rounding: bool = True
    paired: bool = True
    sparse24: bool = False


@dataclass(frozen=True)
class Topology:
    """What differs from the skeleton network.

    folded   {conv or linear: batch norm} whose batch norm was folded into weight and bias
    widths   {module: (out, in)} of layers that lost channels; a batch norm is (features, features)
    removed  residual blocks in whose place is the identity
    """

    folded: Mapping[str, str] = field(default_factory=dict)
    widths: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
