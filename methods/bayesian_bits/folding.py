"""Batch norm folded into the layer before it while both train: the weight that is quantized, the moments of a batch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def linear_map(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias) if isinstance(layer, nn.Linear) else layer._conv_forward(x, weight, bias)


class Moments(torch.autograd.Function):
    """Biased variance and mean of each channel of x [N, C, ...].

    As `torch.var_mean`, which is several times slower where channels come last in memory: here rows of them are summed.
    """

    @staticmethod
    def forward(ctx, x):
        rows = x.movedim(1, -1).reshape(-1, x.shape[1])
        mean = rows.mean(0)
        ctx.save_for_backward(x, mean)
        return (rows - mean).square_().mean(0), mean

    @staticmethod
    @once_differentiable
    def backward(ctx, to_var, to_mean):
        x, mean = ctx.saved_tensors
        n, shape = x.numel() // len(mean), (1, -1, *[1] * (x.ndim - 2))
        slope = 2 * to_var / n
        return torch.addcmul((to_mean / n - slope * mean).reshape(shape), x, slope.reshape(shape))


def folded_weight(layer: nn.Module, norm: nn.Module | None) -> Tensor:
    """W g / sigma_r where a batch norm follows."""
    if norm is None:
        return layer.weight
    sigma = (norm.running_var + norm.eps).sqrt()
    ratio = norm.weight / sigma if norm.affine else 1 / sigma
    return layer.weight * ratio.reshape(-1, *[1] * (layer.weight.ndim - 1))


@torch.no_grad()
def update_statistics(norm: nn.Module, mean: Tensor, var: Tensor, n: int) -> None:
    """The moving averages of batch norm; `var` is the biased one of n values."""
    momentum = 0.1 if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean), momentum)
    norm.running_var.lerp_((var * (n / max(n - 1, 1))).to(norm.running_var), momentum)
