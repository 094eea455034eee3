"""Uniform weight quantizers: fitting a grid, encoding to codes, and training through them."""

from collections.abc import Iterable

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


def fit_symmetric(weight: Tensor, bits: int, per_channel: bool = True) -> Affine:
    """Symmetric grid s * {-Q..Q}, Q = 2^(bits-1) - 1, s = max|w| / Q; 0 is always code 0."""
    _check_symmetric(bits)
    low, high = _extremes(weight, per_channel)
    scale = (torch.maximum(-low, high) / ((1 << bits - 1) - 1)).clamp_min(EPS).float().cpu()
    return Affine(scale, torch.zeros_like(scale, dtype=torch.int32), signed=True)


def fit_asymmetric(weight: Tensor, bits: int, per_channel: bool = True) -> Affine:
    """Asymmetric grid over [min(w, 0), max(w, 0)] with codes 0..2^bits - 1.

    The zero point is a whole code, so that a pruned weight is representable: z = round(-low / s).
    """
    low, high = _extremes(weight, per_channel)
    low, high, top = low.clamp_max(0), high.clamp_min(0), (1 << bits) - 1
    scale = ((high - low) / top).clamp_min(EPS).float().cpu()
    zero = torch.round(-low.cpu() / scale).clamp(0, top).to(torch.int32)
    return Affine(scale, zero, signed=False)


def fit_mse(weight: Tensor, bits: int, per_channel: bool = True) -> Affine:
    """The symmetric grid with the least squared error among `SHARES` of the scale that clips nothing."""
    widest = fit_symmetric(weight, bits, per_channel)
    flat = weight.detach().float().cpu().reshape(weight.shape[0] if per_channel else 1, -1)
    top, start = (1 << bits - 1) - 1, widest.scale.reshape(-1, 1)
    best, least = start, torch.full_like(start, torch.inf)
    for share in SHARES:
        scale = share * start
        error = (torch.round(flat / scale).clamp(-top, top) * scale - flat).square().sum(1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return Affine(best.reshape(widest.scale.shape).clamp_min(EPS), widest.zero, signed=True)


SCHEMES = {"symmetric": fit_symmetric, "asymmetric": fit_asymmetric, "mse": fit_mse}
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
    scale, zero = _beside(weight, grid)
    return (torch.round(weight.detach() / scale) + zero).clamp(*code_range(grid, bits)).to(torch.int32)


def _beside(weight: Tensor, grid: Affine) -> tuple[Tensor, Tensor]:
    """Scale and zero point on the weight's device, shaped to broadcast over it."""
    shape = (-1, *[1] * (weight.ndim - 1)) if grid.scale.ndim else ()
    return grid.scale.to(weight.device).reshape(shape), grid.zero.to(weight.device).reshape(shape)


def code_range(grid: Affine, bits: int) -> tuple[int, int]:
    low, high = grid.code_range(bits)
    return (low + 1 if grid.signed else low), high


def quantize(weight: Tensor, grid: Affine, bits: int, mask: Tensor | None = None) -> CompressedTensor:
    """`weight` on `grid`; where `mask` is False the code is the zero point, whatever the weight."""
    mask = None if mask is None else mask.cpu()
    return CompressedTensor.of(to_codes(weight.cpu(), grid, bits), grid, bits, mask)


def through_grid(weight: Tensor, grid: Affine, bits: int) -> Tensor:
    """decode(encode(w)) with a straight-through gradient, 1 inside the range of the grid and 0 outside."""
    with torch.no_grad():
        scale, zero = _beside(weight, grid)
        steps = torch.round(weight / scale) + zero
        codes = steps.clamp(*code_range(grid, bits))
        near = (codes - zero) * scale
    passed = (weight - weight.detach()) * (steps == codes)  # value 0: what a forward pass sees is `near` itself
    return near + passed


class FakeQuantize(nn.Module):
    """Parametrization w -> mask * decode(encode(w)) with a straight-through gradient inside the range.

    The mask comes after the quantizer, and the grid is refitted to the masked weight in every forward pass
    unless one is given: a pruned outlier must not keep the range wide.
    """

    def __init__(self, bits: int, mask: Tensor, scheme: str = "symmetric", grid: Affine | None = None,
                 per_channel: bool = True):
        super().__init__()
        self.bits, self.fit, self.grid, self.per_channel = bits, find_scheme(scheme), grid, per_channel
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        grid = self.fit(weight * self.mask, self.bits, self.per_channel) if self.grid is None else self.grid
        return through_grid(weight, grid, self.bits) * self.mask


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
