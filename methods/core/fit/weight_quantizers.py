"""Quantizers of weights that a training passes through: values forward, a straight-through gradient backward.

    rtn      s {-Q..Q}, or with a zero point, fitted once                   round to the nearest
    qat      the same, fitted anew to the kept weights in every step        (Jacob et al. 2018)
    lsq      s round(clamp(w / s, -Q, Q)), s learned with its gradient times 1 / sqrt(numel Q)     (Esser et al. 2020)
    lsq+     s (clamp(round(w / s + z), 0, 2^b - 1) - z), z = round of a learned number          (Bhalgat et al. 2020)
    dorefa   2 / n round(n (tanh w / (2 max|tanh w|) + 1/2)) - 1, n = 2^b - 1                    (Zhou et al. 2016)
    bnn      sign w, sign 0 = 1; w is clipped to [-1, 1] after every step                        (Hubara et al. 2016)

A mask comes after the quantizer: what is pruned is 0, on a grid with a zero or without.

Departures  Weights alone: activations get fixed ranges afterwards. LSQ has Q = 2^(b-1) - 1 on both sides, so that codes
            can be mirrored when batch norm is folded; it starts at 2 mean|w| / sqrt(Q). The zero point of LSQ+ is a
            whole code, so that 0 stays 0. DoReFa's max|tanh w| has no gradient; 1 bit is its formula, without E|w|.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ..artifact import Affine, CompressedTensor, Levels
from ..errors import ConfigError
from .quantize import BESIDE, EPS, beside, find_scheme, fit_asymmetric, quantize, through


def straight(value: Tensor, through: Tensor) -> Tensor:
    """`value`, with the gradient of `through`."""
    return value.detach() + (through - through.detach())


class WeightQuantizer(nn.Module, ABC):
    """The weight of one layer [C_out, ...] through a quantizer of `bits` bits.

    scheme       the grid of rtn and qat (`SCHEMES`);  per_channel  one scale for each output channel, or one for all
    """

    widths = (2, 16)  # the bits that it can have
    has_zero = True  # whether 0 is on the grid
    trains = True  # whether it is made for a training
    settings = ("per_channel",)  # that have an effect

    def __init__(self, bits: int, scheme: str = "symmetric", per_channel: bool = True):
        super().__init__()
        self.bits, self.scheme, self.per_channel = bits, scheme, per_channel

    def start(self, weight: Tensor, mask: Tensor) -> None:
        """Fit to a weight under its mask, before any training."""

    @abstractmethod
    def forward(self, weight: Tensor, mask: Tensor) -> Tensor:
        """Values on the grid, not yet masked."""

    def after_step(self, weight: Tensor) -> None:
        """The optimizer has stepped: `weight`, and what is learned, are put back into their bounds, in place."""

    def freeze(self, weight: Tensor, mask: Tensor) -> None:
        """From now on the grid stays."""
        self.requires_grad_(False)

    @abstractmethod
    def encode(self, weight: Tensor, mask: Tensor) -> CompressedTensor:
        """The codes of what `forward` gives, masked."""


class _OnAffine(WeightQuantizer):
    """Codes are those of an Affine grid."""

    @abstractmethod
    def grid(self, weight: Tensor, mask: Tensor) -> Affine:
        """The grid of the codes."""

    def encode(self, weight, mask):
        return quantize(weight, self.grid(weight, mask), self.bits, mask)


class Aware(_OnAffine):
    """qat: the grid of the kept weights as they are now, until it is frozen."""

    widths, settings = (1, 16), ("per_channel", "scheme")
    fixed: Affine | None = None

    def grid(self, weight, mask):
        if self.fixed is not None:
            return self.fixed
        return find_scheme(self.scheme)(weight.detach() * mask, self.bits, self.per_channel)

    def forward(self, weight, mask):
        if self.fixed is not None:
            return through(weight, beside(weight, self.fixed, self.bits))
        return through(weight, BESIDE[self.scheme](weight.detach() * mask, self.bits, self.per_channel))

    def freeze(self, weight, mask):
        self.fixed = self.grid(weight, mask)


class Nearest(Aware):
    """rtn: the grid that fits the weights at the start."""

    trains = False

    def start(self, weight, mask):
        self.freeze(weight, mask)


class LearnedStep(_OnAffine):
    """lsq: scale [C_out] or [] is a parameter."""

    def start(self, weight, mask):
        top = (1 << self.bits - 1) - 1
        kept, size = _rows(weight.detach() * mask, self.per_channel), _rows(mask.float(), self.per_channel)
        scale = 2 * kept.abs().sum(1) / size.sum(1).clamp_min(1) / math.sqrt(top)
        self.scale = nn.Parameter(scale.clamp_min(EPS).reshape(-1 if self.per_channel else ()))

    def _learned(self, values: Tensor, weight: Tensor, top: int) -> Tensor:
        """`values` beside the weight, with their gradients times 1 / sqrt(numel top). (Section 2.2)"""
        factor = 1 / math.sqrt(weight.numel() / values.numel() * top)
        return _beside(straight(values, values * factor), weight)

    def forward(self, weight, mask):
        top = (1 << self.bits - 1) - 1
        scale = self._learned(self.scale, weight, top)
        steps = (weight / scale).clamp(-top, top)
        return straight(steps.round(), steps) * scale  # Eq. (3): d/ds = round(w / s) - w / s inside, -Q or Q outside

    @torch.no_grad()
    def after_step(self, weight):
        self.scale.clamp_(min=EPS)

    def grid(self, weight, mask):
        scale = self.scale.detach().float().cpu()
        return Affine(scale, torch.zeros_like(scale, dtype=torch.int32), signed=True)


class LearnedStepAndZero(LearnedStep):
    """lsq+: scale and zero point are parameters."""

    widths = (1, 16)

    def start(self, weight, mask):
        grid = fit_asymmetric(weight.detach() * mask, self.bits, self.per_channel)
        self.scale = nn.Parameter(grid.scale.to(weight.device))
        self.zero = nn.Parameter(grid.zero.to(weight))

    def forward(self, weight, mask):
        top = (1 << self.bits) - 1
        scale, zero = (self._learned(values, weight, top) for values in (self.scale, self.zero))
        zero = straight(zero.round(), zero)
        steps = (straight((weight / scale).round(), weight / scale) + zero).clamp(0, top)
        return (steps - zero) * scale

    @torch.no_grad()
    def after_step(self, weight):
        super().after_step(weight)
        self.zero.clamp_(0, (1 << self.bits) - 1)

    def grid(self, weight, mask):
        return Affine(self.scale.detach().float().cpu(), self.zero.detach().round().to(torch.int32).cpu(), signed=False)


class DoReFa(WeightQuantizer):
    """dorefa: 2^b levels over [-1, 1], none of them 0."""

    widths, has_zero, settings = (1, 8), False, ()

    def _steps(self, weight: Tensor) -> Tensor:
        bent = torch.tanh(weight)
        return ((1 << self.bits) - 1) * (bent / (2 * bent.detach().abs().max().clamp_min(EPS)) + 0.5)  # Eq. (9)

    def forward(self, weight, mask):
        steps, top = self._steps(weight), (1 << self.bits) - 1
        return (2 * straight(steps.round(), steps) - top) * torch.tensor(1 / top)

    def encode(self, weight, mask):
        top = (1 << self.bits) - 1
        codes = self._steps(weight.detach()).round().to(torch.int32).cpu()
        grid = Levels(torch.tensor(1 / top), torch.arange(-top, top + 1, 2, dtype=torch.int32))
        return CompressedTensor.of(codes, grid, self.bits, mask.cpu())


class Binary(WeightQuantizer):
    """bnn: -1 or 1."""

    widths, has_zero, settings = (1, 1), False, ()

    def start(self, weight, mask):
        self.after_step(weight)

    def forward(self, weight, mask):
        return straight(torch.where(weight >= 0, 1.0, -1.0), weight.clamp(-1, 1))

    @torch.no_grad()
    def after_step(self, weight):
        weight.clamp_(-1, 1)

    def encode(self, weight, mask):
        grid = Levels(torch.tensor(1.0), torch.tensor([-1, 1], dtype=torch.int32))
        return CompressedTensor.of((weight.detach() >= 0).to(torch.int32).cpu(), grid, 1, mask.cpu())


QUANTIZERS: dict[str, type[WeightQuantizer]] = {"rtn": Nearest, "qat": Aware, "lsq": LearnedStep,
                                                "lsq+": LearnedStepAndZero, "dorefa": DoReFa, "bnn": Binary}


def find_quantizer(name: str, bits: int | None = None) -> type[WeightQuantizer]:
    """The class of a quantizer; ConfigError where there is none of that name, or it cannot have so many bits."""
    if name not in QUANTIZERS:
        raise ConfigError(f"quantizer = {name!r}: allowed are {', '.join(QUANTIZERS)}")
    low, high = QUANTIZERS[name].widths
    if bits is not None and not low <= bits <= high:
        raise ConfigError(f"bits = {bits}: {name} takes {low if low == high else f'{low} to {high}'}")
    return QUANTIZERS[name]


def _rows(values: Tensor, per_channel: bool) -> Tensor:
    return values.reshape(values.shape[0] if per_channel else 1, -1)


def _beside(values: Tensor, weight: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (weight.ndim - 1)) if values.ndim else values
