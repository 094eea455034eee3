"""Exact integer accumulators of a conv or linear layer, on hardware that only has floating-point convolutions.

With inputs in [low, high], low <= 0 <= high, every partial sum of a filter lies in
[low S+ - high S-, high S+ - low S-], where S+ is the sum of its positive weights and S- that of the magnitudes of its
negative ones. Up to 2^24 a float32 sum of integers is exact in any order; up to 2^53 a float64 sum is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import GraphError

EXACT = {torch.float32: 1 << 24, torch.float64: 1 << 53}


def largest_partial_sum(integers: Tensor, low: int, high: int) -> int:
    """The largest |partial sum| over filters, subsets of their weights and inputs in [low, high]; it is attained."""
    flat = integers.reshape(integers.shape[0], -1).to(torch.int64)
    up, down = flat.clamp_min(0).sum(1), (-flat).clamp_min(0).sum(1)
    sides = torch.stack([high * up - low * down, high * down - low * up])
    return int(sides.max()) if flat.numel() else 0


def exact_dtype(integers: Tensor, low: int, high: int) -> torch.dtype:
    """float32 where the bound for inputs in [low, high] proves it exact, else float64."""
    bound = largest_partial_sum(integers, low, high)
    for dtype, limit in EXACT.items():
        if bound <= limit:
            return dtype
    raise GraphError(f"integer accumulators reach {bound}: more than 2^53, which no path here computes exactly")


def accumulate(layer: nn.Module, x: Tensor, integers: Tensor, dtype: torch.dtype) -> Tensor:
    """sum_k x_k w_k of integers held in float tensors; exact if `dtype` is `exact_dtype`'s."""
    weight = integers.to(x.device, dtype)
    if isinstance(layer, nn.Linear):
        return F.linear(x.to(dtype), weight)
    x, padding = padded(layer, x.to(dtype))
    return F.conv2d(x, weight, None, layer.stride, padding, layer.dilation, layer.groups)


def padded(layer: nn.Conv2d, x: Tensor) -> tuple[Tensor, int | tuple[int, ...] | str]:
    """(input, padding that is left to do): padding with values of the input itself is done here."""
    if layer.padding_mode == "zeros":
        return x, layer.padding
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0


def accumulate_int64(layer: nn.Module, x: Tensor, integers: Tensor) -> Tensor:
    """The same in int64 arithmetic: slow, and right by definition. The reference of the tests."""
    if isinstance(layer, nn.Linear):
        return x.to(torch.int64) @ integers.to(torch.int64).T
    x, padding = padded(layer, x.double())
    return F.conv2d(x.to(torch.int64), integers.to(torch.int64), None, layer.stride, padding, layer.dilation,
                    layer.groups)
