"""The compressed model: integer codes on a grid, under a mask.

The weights are *defined* as `decode(codes)`: whatever is stored, scored or run in integer arithmetic
starts from the same integers, so a pruned weight cannot come back and a code cannot leave its grid.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import CompressError, ConfigError
from .quantizers import DTYPE_BYTES, MAX_BITS, ActivationQuantizer, Topology, Window
from .settings import is_a

DTYPES = {name: getattr(torch, name) for name in DTYPE_BYTES}  # of what stays as it is, in `rest`
PACKED = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # of a MultiheadAttention


def _along_channels(values: Tensor, ndim: int) -> Tensor:
    """A per-channel vector [C] shaped to broadcast over [C, ...]; a scalar [] unchanged."""
    return values.reshape(-1, *[1] * (ndim - 1)) if values.ndim else values


@dataclass(frozen=True, eq=False)
class Affine:
    """value = scale * (code - zero): a uniform grid (PTQ, SPARQ, Bayesian Bits).

    scale   float32 [] or [C_out], positive
    zero    int32, same shape: the code that means exactly 0
    signed  codes are in [-2^(b-1), 2^(b-1) - 1] if signed, else in [0, 2^b - 1]
    """

    scale: Tensor
    zero: Tensor
    signed: bool = True

    def __post_init__(self):
        if self.scale.shape != self.zero.shape or self.scale.ndim > 1:
            raise CompressError(f"Affine scale {list(self.scale.shape)} and zero {list(self.zero.shape)} must be "
                                "two scalars or two vectors of one length")
        if self.scale.dtype != torch.float32 or self.zero.dtype != torch.int32:
            raise CompressError(f"Affine takes a float32 scale and an int32 zero, not {self.scale.dtype}, "
                                f"{self.zero.dtype}")
        if not bool(((self.scale > 0) & self.scale.isfinite()).all()):
            raise CompressError("Affine scale must be positive and finite")

    def code_range(self, bits: int) -> tuple[int, int]:
        return (-(1 << bits - 1), (1 << bits - 1) - 1) if self.signed else (0, (1 << bits) - 1)

    def integers(self, codes: Tensor) -> Tensor:
        """int32 integers n with value = scale * n."""
        return codes - _along_channels(self.zero, codes.ndim)

    def decode(self, codes: Tensor) -> Tensor:
        return _along_channels(self.scale, codes.ndim) * self.integers(codes).to(torch.float32)

    def zero_codes(self, like: Tensor) -> Tensor:
        return _along_channels(self.zero, like.ndim).expand(like.shape)

    def has_zero(self) -> bool:
        return True


@dataclass(frozen=True, eq=False)
class Levels:
    """value = scale * levels[code]: integer levels that need not contain 0 (ADMM, UDFC).

    scale   float32 [] or [C_out], positive
    levels  int32 [K], distinct
    """

    scale: Tensor
    levels: Tensor

    def __post_init__(self):
        if self.scale.ndim > 1 or self.scale.dtype != torch.float32:
            raise CompressError("Levels takes a float32 scale, a scalar or one value per output channel")
        if self.levels.ndim != 1 or self.levels.dtype != torch.int32 or len(self.levels) == 0:
            raise CompressError("Levels takes a non-empty int32 vector of levels")
        if len(self.levels.unique()) != len(self.levels):
            raise CompressError("the levels of a grid must be distinct")
        if not bool(((self.scale > 0) & self.scale.isfinite()).all()):
            raise CompressError("Levels scale must be positive and finite")

    def code_range(self, bits: int) -> tuple[int, int]:
        return 0, min(len(self.levels), 1 << bits) - 1

    def integers(self, codes: Tensor) -> Tensor:
        """int32 integers n with value = scale * n."""
        return self.levels[codes.long()]

    def decode(self, codes: Tensor) -> Tensor:
        return _along_channels(self.scale, codes.ndim) * self.integers(codes).to(torch.float32)

    def zero_codes(self, like: Tensor) -> Tensor:
        return torch.full_like(like, _index_of_zero(self.levels) if self.has_zero() else 0)

    def has_zero(self) -> bool:
        return bool((self.levels == 0).any())


@dataclass(frozen=True, eq=False)
class Codebook:
    """value = values[code]: shared weights (Deep Compression, CLIP-Q, ANNC, ADMM clusters).

    values  float32 [K], finite
    """

    values: Tensor

    def __post_init__(self):
        if self.values.ndim != 1 or self.values.dtype != torch.float32 or len(self.values) == 0:
            raise CompressError("Codebook takes a non-empty float32 vector")
        if not bool(self.values.isfinite().all()):
            raise CompressError("Codebook values must be finite")

    def code_range(self, bits: int) -> tuple[int, int]:
        return 0, min(len(self.values), 1 << bits) - 1

    def decode(self, codes: Tensor) -> Tensor:
        return self.values[codes.long()]

    def zero_codes(self, like: Tensor) -> Tensor:
        return torch.full_like(like, _index_of_zero(self.values) if self.has_zero() else 0)

    def has_zero(self) -> bool:
        return bool((self.values == 0).any())


Grid = Affine | Levels | Codebook


def _index_of_zero(values: Tensor) -> int:
    return int((values == 0).nonzero()[0])


@dataclass(frozen=True, eq=False)
class CompressedTensor:
    """One weight tensor. Build it with `CompressedTensor.of`, which derives mask and canonical codes.

    mask   bool  [C_out, ...], True = kept; equal to decode() != 0
    codes  int32 [C_out, ...]; at pruned positions the grid's zero code (0 where the grid has none)
    grid   Affine, Levels or Codebook
    bits   width of a code, 1..16
    """

    mask: Tensor
    codes: Tensor
    grid: Grid
    bits: int

    @classmethod
    def of(cls, codes: Tensor, grid: Grid, bits: int, mask: Tensor | None = None) -> "CompressedTensor":
        """From codes (any integer dtype) and, where the grid has no zero, the mask of kept weights.

        A kept code whose value is exactly 0 is a pruned weight: the mask is cleared there.
        """
        if codes.is_floating_point() or (mask is not None and (mask.dtype != torch.bool or mask.shape != codes.shape)):
            raise CompressError("a compressed tensor is made of integer codes and a bool mask of their shape")
        codes = codes.to(torch.int32)
        kept = torch.ones_like(codes, dtype=torch.bool) if mask is None else mask.clone()
        grid_zero = grid.zero_codes(codes)
        codes = torch.where(kept, codes, grid_zero)
        cls._check_range(codes, grid, bits)
        kept = kept & (grid.decode(codes) != 0)
        return cls(kept, torch.where(kept, codes, grid_zero), grid, bits)

    def __post_init__(self):
        if self.mask.shape != self.codes.shape or self.mask.dtype != torch.bool or self.codes.dtype != torch.int32:
            raise CompressError("a compressed tensor takes a bool mask and int32 codes of one shape")
        if self.codes.ndim < 2:
            raise CompressError(f"a compressed tensor needs two or more dimensions, not {list(self.codes.shape)}")
        self._check_range(self.codes, self.grid, self.bits)
        scale = getattr(self.grid, "scale", None)
        if scale is not None and scale.ndim and len(scale) != self.codes.shape[0]:
            raise CompressError(f"a per-channel scale needs {self.codes.shape[0]} values, got {len(scale)}")
        if not torch.equal(self.mask, self.decode() != 0):
            raise CompressError("the mask must be true exactly where the decoded weight is not 0")
        if bool(((self.codes != self.grid.zero_codes(self.codes)) & ~self.mask).any()):
            raise CompressError("a pruned weight must have the zero code of its grid")

    @staticmethod
    def _check_range(codes: Tensor, grid: Grid, bits: int) -> None:
        if not 1 <= bits <= MAX_BITS:
            raise CompressError(f"bits = {bits}: allowed is 1..{MAX_BITS}")
        low, high = grid.code_range(bits)
        if codes.numel() and not (low <= int(codes.min()) and int(codes.max()) <= high):
            raise CompressError(f"codes {int(codes.min())}..{int(codes.max())} leave the grid's range {low}..{high}")

    def decode(self) -> Tensor:
        """float32 weights, exactly 0 where pruned."""
        return torch.where(self.mask, self.grid.decode(self.codes), torch.zeros(()))

    @property
    def kept(self) -> int:
        return int(self.mask.sum())

    @property
    def density(self) -> float:
        return self.kept / max(self.mask.numel(), 1)


def tensor_name(layer: str) -> str:
    """The state-dict name of the weight that is called `layer` (see `core/graph/weights.py`)."""
    return layer if layer.rpartition(".")[2] in PACKED else f"{layer}.weight".removeprefix(".")


@dataclass(frozen=True, eq=False)
class CompressedModel:
    """What a method returns and a file holds.

    weights      {layer: CompressedTensor} of the `weight` of layers, and of packed projections (`tensor_name`)
    rest         {state-dict name: Tensor}: all that stays float (biases, batch norm, excluded layers)
    activations  {edge: ActivationQuantizer}; empty where the method leaves activations float
    windows      {edge: Window}
    topology     what differs from the skeleton
    ranges_by    "method" or "harness": who chose `activations`
    notes        facts for a reader (traces, thresholds); JSON values; not stored in the file
    """

    weights: Mapping[str, CompressedTensor]
    rest: Mapping[str, Tensor]
    activations: Mapping[str, ActivationQuantizer] = field(default_factory=dict)
    windows: Mapping[str, Window] = field(default_factory=dict)
    topology: Topology = field(default_factory=Topology)
    ranges_by: str = "method"
    notes: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self):
        twice = [layer for layer in self.weights if tensor_name(layer) in self.rest]
        if twice:
            raise CompressError(f"the weights of {', '.join(twice)} are stored twice: as codes and as float")
        if self.ranges_by not in ("method", "harness"):
            raise CompressError(f"ranges_by = {self.ranges_by!r}: allowed is 'method', 'harness'")
        lost = sorted(set(self.windows) - set(self.activations))
        if lost:
            raise CompressError(f"windows without an activation quantizer at the edges {lost}")

    def state_dict(self) -> dict[str, Tensor]:
        """Every parameter and buffer that evaluation needs, decoded to float."""
        return {**{tensor_name(layer): t.decode() for layer, t in self.weights.items()}, **self.rest}


def check_compressed(given: object, call: str) -> None:
    """ConfigError where `given` is no compressed model, the first argument of `call`."""
    if not is_a(given, CompressedModel):
        raise ConfigError(f"{call} was given a {type(given).__name__} first: it takes a CompressedModel, as compress "
                          "returns it and decode(path) reads it")
