"""Batch norm on the statistics of given inputs, with the same bytes for any number of threads.

torch splits the float32 sums of its own batch norm between threads. Here a sum is that of one image, then over images,
in float64: the order of additions does not depend on who computes them.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..errors import CompressError
from ..graph.build import NORMS

BLOCK = 1 << 19  # values in float64 at a time: they stay in the cache


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of x [N, C, ...], float64 [C]."""
    means, squares, size = [], [], x[0, 0].numel()
    for part in x.detach().split(max(BLOCK // x[0].numel(), 1)):  # images: the sums of each are its own
        values = part.double().reshape(*part.shape[:2], -1).contiguous()
        means.append(values.sum(2) / size)
        squares.append((values - means[-1][:, :, None]).square_().sum(2))
    means = torch.cat(means)  # [N, C]
    mean = means.sum(0) / len(x)  # type: ignore[attr-defined]
    apart = torch.cat(squares).sum(0) + size * (means - mean).square().sum(0)
    return mean, apart / (size * len(x))


@torch.no_grad()
def normalized(norm: nn.Module, x: Tensor) -> Tensor:
    """What `norm` returns for x [N, C, ...] in training mode; its running statistics move as they do there.

    momentum None (a cumulative mean) as in torch. CompressError with less than two values per channel.
    """
    count = x.numel() // x.shape[1]
    if count < 2:
        raise CompressError("batch norm takes the statistics of 2 values or more per channel: allowed are more inputs")
    mean, var = batch_statistics(x)
    if norm.running_mean is not None:
        norm.num_batches_tracked += 1
        share = 1 / int(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        for running, seen in ((norm.running_mean, mean), (norm.running_var, var * (count / (count - 1)))):
            running.copy_((1 - share) * running.double() + share * seen)
    gain = (var + norm.eps).rsqrt()
    gain = gain * norm.weight.double() if norm.affine else gain
    shift = -mean * gain + (norm.bias.double() if norm.affine else 0.0)
    shape = (1, -1, *[1] * (x.ndim - 2))
    return (x * gain.to(x.dtype).reshape(shape)).add_(shift.to(x.dtype).reshape(shape))


@contextlib.contextmanager
def following(model: nn.Module) -> Iterator[None]:
    """Inside, each batch norm of `model`, in eval mode, normalizes with a batch's statistics and follows them."""
    hooks = [module.register_forward_hook(lambda norm, inputs, output: normalized(norm, inputs[0]))
             for module in model.modules() if isinstance(module, NORMS)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def reestimate_norms(model: nn.Module, inputs: Tensor, batch: int = 256) -> nn.Module:
    """`model` with the running statistics of its batch norms replaced, in place, by the means of those of batches.

    Batches are of nearly equal size, at most `batch`. CompressError without batch norm, or with less than two inputs.
    """
    norms = [module for module in model.modules() if isinstance(module, NORMS)]
    if not norms:
        raise CompressError("needed is batch norm, and the network has none left")
    if len(inputs) < 2:
        raise CompressError("batch norm takes the statistics of 2 inputs or more")
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative mean
    model.eval()
    with following(model):
        for part in inputs.tensor_split(math.ceil(len(inputs) / batch)):
            model(part)
    for norm, before in zip(norms, momentum, strict=True):
        norm.momentum = before
    return model
