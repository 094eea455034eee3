"""Rounding to a given grid: to the nearest, by GPTQ, or by coordinate descent after it."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..artifact import ActivationQuantizer, CompressedTensor
from ..errors import CompressError, ConfigError
from ..graph.weights import weight_layers
from .descent import SWEEPS, descend
from .gptq import gptq
from .moments import Moments
from .quantize import code_range
from .sequential import quantize_in_order


def _nearest(weight: Tensor, moments: Moments, scale: Tensor, low: Tensor, high: Tensor, mask: Tensor | None,
             lam: float) -> Tensor:
    codes = torch.round(weight / scale[:, :, None]).clamp(low[:, :, None], high[:, :, None])
    return codes if mask is None else codes * mask


def _gptq(weight: Tensor, moments: Moments, scale: Tensor, low: Tensor, high: Tensor, mask: Tensor | None,
          lam: float) -> Tensor:
    return gptq(weight, moments.hessian(), scale, low, high, mask)


def _descent(weight: Tensor, moments: Moments, scale: Tensor, low: Tensor, high: Tensor, mask: Tensor | None,
             lam: float) -> Tensor:
    hessian = moments.hessian()
    codes = gptq(weight, hessian, scale, low, high, mask)
    return descend(codes, weight, hessian, scale, lam, low, high, mask, SWEEPS)


ROUNDINGS: dict[str, Callable[..., Tensor]] = {"nearest": _nearest, "gptq": _gptq, "descent": _descent}


def check_rounding(name: str) -> None:
    """ConfigError, listing the names, if there is no rounding `name`."""
    if name not in ROUNDINGS:
        raise ConfigError(f"rounding = {name!r}: allowed are {', '.join(ROUNDINGS)}")


def round_weight(rounding: str, weight: Tensor, moments: Moments | None, scale: Tensor, low: Tensor | int,
                 high: Tensor | int, mask: Tensor | None = None, lam: float = 0.0) -> Tensor:
    """int32 codes of `weight` [C_out, ...] on the grid `scale` times integers in [low, high].

    scale, low, high   a number, or one for each output channel [C_out]
    mask     bool like `weight`: False where the code has to be 0
    lam      price of a bit for "descent" (see `rates`); the other roundings count the error alone
    Without moments of the inputs every rounding is to the nearest.
    """
    check_rounding(rounding)
    if moments is None:
        shape = (-1, *[1] * (weight.ndim - 1))
        scale, low, high = (torch.as_tensor(value, dtype=torch.float32).expand(len(weight)).reshape(shape)
                            for value in (scale, low, high))
        codes = torch.round(weight / scale).clamp(low, high)
        return (codes if mask is None else codes * mask).to(torch.int32)
    channels = torch.ones(len(weight))
    ends = [moments.split(torch.as_tensor(value, dtype=torch.float32) * channels) for value in (scale, low, high)]
    kept = None if mask is None else moments.split(mask.float()).bool()
    codes = ROUNDINGS[rounding](moments.split(weight.float()), moments, *ends, kept, lam)
    return moments.join(codes).to(torch.int32).contiguous()


def round_again(model: nn.Module, weights: Mapping[str, CompressedTensor], rounding: str, inputs: Tensor,
                generator: torch.Generator, *, masks: Mapping[str, Tensor], bits: int = 8, range_method: str = "minmax"
                ) -> tuple[nn.Module, dict[str, CompressedTensor], dict[str, ActivationQuantizer]]:
    """`weights` (Affine) with the codes of another rounding on the same grids under the same masks, layer by layer.

    model    batch norm folded, with the float weights, those that are pruned included: what they gave to the output
             is then taken over by others. Layers without codes stay as they are.
    masks    of the weights that are kept; a kept weight whose nearest code is 0 may get another
    Returns a copy of `model` with decoded weights and corrected biases, the tensors, and ranges of `bits` bits.
    """
    lost = sorted(set(weights) - set(weight_layers(model)))
    if lost:
        raise CompressError(f"the network has no layer {lost[0]!r} to round")

    def fit(name: str, weight: Tensor, moments: Moments | None) -> CompressedTensor | None:
        if name not in weights:
            return None
        tensor = weights[name]
        low, high = (end - tensor.grid.zero for end in code_range(tensor.grid, tensor.bits))
        integers = round_weight(rounding, weight, moments, tensor.grid.scale, low, high, masks[name])
        zero = tensor.grid.zero.reshape(-1, *[1] * (weight.ndim - 1)) if tensor.grid.zero.ndim else tensor.grid.zero
        return CompressedTensor.of(integers + zero, tensor.grid, tensor.bits, masks[name])

    return quantize_in_order(model, inputs, fit, generator, bits=bits, range_method=range_method,
                             second=rounding != "nearest")
