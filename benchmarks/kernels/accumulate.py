"""Exact integer accumulators of a conv or linear layer, on hardware that only has floating-point convolutions.

Every partial sum of a filter lies within reach * max(S+, S-), where S+ and S- are the sums of its positive and
of its negative weights and reach bounds |activation|. Below 2^24 a float32 sum of integers is exact in any
order; below 2^53 a float64 sum is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.core.errors import GraphError

EXACT = {torch.float32: 1 << 24, torch.float64: 1 << 53}


def largest_partial_sum(integers: Tensor, reach: int) -> int:
    """reach * max over filters of max(S+, S-): a bound on every partial sum, for any data and any order."""
    flat = integers.reshape(integers.shape[0], -1).to(torch.int64)
    sides = torch.stack([flat.clamp_min(0).sum(1), (-flat).clamp_min(0).sum(1)])
    return reach * int(sides.max()) if flat.numel() else 0


def exact_dtype(integers: Tensor, reach: int) -> torch.dtype:
    """float32 where the bound proves it exact, else float64."""
    bound = largest_partial_sum(integers, reach)
    for dtype, limit in EXACT.items():
        if bound <= limit:
            return dtype
    raise GraphError(f"integer accumulators reach {bound}: more than 2^53, which no path here computes exactly")


def accumulate(layer: nn.Module, x: Tensor, integers: Tensor, dtype: torch.dtype) -> Tensor:
    """sum_k x_k w_k of integers held in float tensors; zero padding; exact if `dtype` is `exact_dtype`'s."""
    weight = integers.to(x.device, dtype)
    if isinstance(layer, nn.Linear):
        return F.linear(x.to(dtype), weight)
    if layer.padding_mode != "zeros":
        raise GraphError(f"padding_mode = {layer.padding_mode!r}: the integer kernels pad with zeros")
    return F.conv2d(x.to(dtype), weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)


def accumulate_int64(layer: nn.Module, x: Tensor, integers: Tensor) -> Tensor:
    """The same in int64 arithmetic: slow, and right by definition. The reference of the tests."""
    if isinstance(layer, nn.Linear):
        return x.to(torch.int64) @ integers.to(torch.int64).T
    return F.conv2d(x.to(torch.int64), integers.to(torch.int64), None, layer.stride, layer.padding, layer.dilation,
                    layer.groups)
