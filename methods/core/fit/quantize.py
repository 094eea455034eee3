"""Uniform weight quantizers: fitting a grid, encoding to codes, and training through them."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..artifact import Affine, CompressedTensor
from ..errors import ConfigError
from ..graph.weights import layer_of, place_of
from ..train.hooks import Hooks

EPS = torch.finfo(torch.float32).eps  # least scale: an all-zero channel gets it instead of 0


def _extremes(weight: Tensor, per_channel: bool) -> tuple[Tensor, Tensor]:
    """Least and largest value, [C_out] or []."""
    flat = weight.detach().reshape(weight.shape[0], -1) if per_channel else weight.detach().reshape(1, -1)
    low, high = flat.amin(1), flat.amax(1)
    return (low, high) if per_channel else (low[0], high[0])


class Steps(NamedTuple):
    """A uniform grid beside a weight: scale and zero point float32 [C_out] or [] on its device, least and largest code.

    A step of training fits or uses it without a look at its values, for which a GPU would have to wait; `stored` has.
    """

    scale: Tensor
    zero: Tensor
    low: int
    high: int

    def stored(self, signed: bool) -> Affine:
        return Affine(self.scale.cpu(), self.zero.cpu().to(torch.int32), signed)


def _symmetric(weight: Tensor, bits: int, per_channel: bool) -> Steps:
    _check_symmetric(bits)
    low, high = _extremes(weight, per_channel)
    top = (1 << bits - 1) - 1
    scale = (torch.maximum(-low, high) / top).clamp_min(EPS).float()
    return Steps(scale, torch.zeros_like(scale), -top, top)


def fit_symmetric(weight: Tensor, bits: int, per_channel: bool = True) -> Affine:
    """Symmetric grid s * {-Q..Q}, Q = 2^(bits-1) - 1, s = max|w| / Q; 0 is always code 0."""
    return _symmetric(weight, bits, per_channel).stored(signed=True)


def _asymmetric(weight: Tensor, bits: int, per_channel: bool) -> Steps:
    low, high = _extremes(weight, per_channel)
    low, high, top = low.clamp_max(0), high.clamp_min(0), (1 << bits) - 1
    scale = ((high - low) / top).clamp_min(EPS).float()
    return Steps(scale, torch.round(-low / scale).clamp(0, top), 0, top)


def fit_asymmetric(weight: Tensor, bits: int, per_channel: bool = True) -> Affine:
    """Asymmetric grid over [min(w, 0), max(w, 0)] with codes 0..2^bits - 1.

    The zero point is a whole code, so that a pruned weight is representable: z = round(-low / s).
    """
    return _asymmetric(weight, bits, per_channel).stored(signed=False)


def _mse(weight: Tensor, bits: int, per_channel: bool) -> Steps:
    widest = _symmetric(weight, bits, per_channel)
    flat, top = weight.detach().float().reshape(weight.shape[0] if per_channel else 1, -1), widest.high
    start = widest.scale.reshape(-1, 1)
    best, least = start, torch.full_like(start, torch.inf)
    for share in SHARES:
        scale = share * start
        error = (torch.round(flat / scale).clamp(-top, top) * scale - flat).square().sum(1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return widest._replace(scale=best.reshape(widest.scale.shape).clamp_min(EPS))


def fit_mse(weight: Tensor, bits: int, per_channel: bool = True) -> Affine:
    """The symmetric grid with the least squared error among `SHARES` of the scale that clips nothing."""
    return _mse(weight, bits, per_channel).stored(signed=True)


SCHEMES = {"symmetric": fit_symmetric, "asymmetric": fit_asymmetric, "mse": fit_mse}
BESIDE: dict[str, Callable[[Tensor, int, bool], Steps]] = {  # the same, for training
    "symmetric": _symmetric, "asymmetric": _asymmetric, "mse": _mse}
SHARES = [i / 50 for i in range(50, 14, -1)]


def find_scheme(name: str, bits: Iterable[int] = ()):
    """The fit function of a scheme; ConfigError if there is none, or if one of `bits` is too narrow for it."""
    if name not in SCHEMES:
        raise ConfigError(f"scheme = {name!r}: allowed are {', '.join(SCHEMES)}")
    for width in bits if name != "asymmetric" else ():
        _check_symmetric(width)
    return SCHEMES[name]


def _check_symmetric(bits: int) -> None:
    if bits < 2:
        raise ConfigError(f"bits = {bits}: a symmetric grid around 0 needs at least 2")


def to_codes(weight: Tensor, grid: Affine, bits: int) -> Tensor:
    """int32 codes of the nearest grid points: clamp(round(w / s) + z). Symmetric grids never use -2^(bits-1)."""
    scale, zero = (_along(values.to(weight.device), weight) for values in (grid.scale, grid.zero))
    return (torch.round(weight.detach() / scale) + zero).clamp(*code_range(grid, bits)).to(torch.int32)


def _along(values: Tensor, weight: Tensor) -> Tensor:
    """[C_out] or [], shaped to broadcast over the weight."""
    return values.reshape(-1, *[1] * (weight.ndim - 1)) if values.ndim else values


def code_range(grid: Affine, bits: int) -> tuple[int, int]:
    low, high = grid.code_range(bits)
    return (low + 1 if grid.signed else low), high


def quantize(weight: Tensor, grid: Affine, bits: int, mask: Tensor | None = None) -> CompressedTensor:
    """`weight` on `grid`; where `mask` is False the code is the zero point, whatever the weight."""
    mask = None if mask is None else mask.cpu()
    return CompressedTensor.of(to_codes(weight.cpu(), grid, bits), grid, bits, mask)


def beside(weight: Tensor, grid: Affine, bits: int) -> Steps:
    """The grid on the weight's device."""
    return Steps(grid.scale.to(weight.device), grid.zero.to(weight.device).float(), *code_range(grid, bits))


def through(weight: Tensor, steps: Steps) -> Tensor:
    """decode(encode(w)) with a straight-through gradient, 1 inside the range of the grid and 0 outside."""
    with torch.no_grad():
        scale, zero = (_along(values, weight) for values in (steps.scale, steps.zero))
        rounded = torch.round(weight / scale) + zero
        codes = rounded.clamp(steps.low, steps.high)
        near = (codes - zero) * scale
    passed = (weight - weight.detach()) * (rounded == codes)  # value 0: what a forward pass sees is `near` itself
    return near + passed


class FakeQuantize(nn.Module):
    """Parametrization w -> mask * decode(encode(w)) with a straight-through gradient inside the range.

    The mask comes after the quantizer, and the grid is refitted to the masked weight in every forward pass
    unless one is given: a pruned outlier must not keep the range wide.
    """

    def __init__(self, bits: int, mask: Tensor, scheme: str = "symmetric", grid: Affine | None = None,
                 per_channel: bool = True):
        super().__init__()
        find_scheme(scheme)
        self.bits, self.fit, self.grid, self.per_channel = bits, BESIDE[scheme], grid, per_channel
        self.steps: Steps | None = None  # of a given grid
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        if self.grid is None:
            return through(weight, self.fit(weight * self.mask, self.bits, self.per_channel)) * self.mask
        if self.steps is None or self.steps.scale.device != weight.device:
            self.steps = beside(weight, self.grid, self.bits)
        return through(weight, self.steps) * self.mask


class QuantizationAware(Hooks):
    """Trains a model whose listed layers pass through `FakeQuantize`; use as a context around `train`.

    Inside the context the layers' weights are parametrized; on leaving it they are plain parameters again that
    hold the float master weights, masked.
    """

    def __init__(self, model: nn.Module, quantizers: dict[str, FakeQuantize]):
        self.model, self.quantizers = model, quantizers

    def __enter__(self):
        for name, quantizer in self.quantizers.items():
            layer = layer_of(self.model, name)
            parametrize.register_parametrization(*place_of(layer), quantizer.to(layer.weight.device))
        return self

    def __exit__(self, *error):
        for name, quantizer in self.quantizers.items():
            layer = layer_of(self.model, name)
            module, attribute = place_of(layer)
            master = module.parametrizations[attribute].original.detach() * quantizer.mask
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
            layer.weight = nn.Parameter(master)
