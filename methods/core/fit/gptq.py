"""GPTQ with a given grid (Frantar, Ashkboos, Hoefler, Alistarh, ICLR 2023, after Optimal Brain Compression).

The weights of an output channel are rounded one after the other; the error of each is handed on to those that are
still to come, so that the output error E H E^T grows least:

    order the inputs by falling H_ii;   H + damping mean(H_ii) I = V V^T,  V upper triangular
    for k = 0, 1, ...:  q_k = round((w_k + sum_{j<k} e_j V_jk / V_kk) / s),   e_j = w_j - s q_j

This is GPTQ's update read column by column: |e V|^2 is the error, and e_0..e_k alone enter its k-th term, which the
rounding makes as small as it can. With U = V^-1, which is the inverse Cholesky factor of the paper, w_i - e_k
U_ki / U_kk for i > k sums up to the same numbers; V needs no inverse.
"""

import torch
from torch import Tensor

from ..errors import CompressError

DAMPING, BLOCK = 0.01, 128


def gptq(weight: Tensor, hessian: Tensor, scale: Tensor | float, low: Tensor | float = -torch.inf,
         high: Tensor | float = torch.inf, mask: Tensor | None = None, damping: float = DAMPING) -> Tensor:
    """float32 codes of `weight` [..., R, K] on the grid `scale` times integers in [low, high].

    hessian    [..., K, K], symmetric, not negative, one for the R output channels of each group
    scale, low, high   a number, or one for each channel [..., R]; low <= 0 <= high
    mask       bool like `weight`: where it is False the code is 0, and what that loses is handed on like any error
    damping    share of the mean H_ii that is added to the diagonal; an input that is always 0 gets the code 0

    >>> gptq(torch.tensor([[0.6, 0.6]]), torch.tensor([[1.0, 0.9], [0.9, 1.0]]), 1.0, damping=0.0)
    tensor([[1., 0.]])
    """
    shape, (rows, k) = weight.shape, weight.shape[-2:]
    weight, hessian = weight.float().reshape(-1, rows, k), hessian.reshape(-1, k, k)  # [G, R, K], [G, K, K]
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    kept = (diagonal > 0)[:, None].expand_as(weight)
    kept = kept if mask is None else kept & mask.reshape(weight.shape)
    factor = upper_factor(_ordered(_ordered(hessian, order, 1), order, 2), damping)
    factor = factor / factor.diagonal(dim1=1, dim2=2)[:, None]  # V_jk / V_kk
    target, kept = (_ordered(part.mT, order, 1).contiguous() for part in (weight, kept))  # [G, K, R]
    scale, low, high = (spread(value, target) for value in (scale, low, high))
    codes, errors = torch.zeros_like(target), torch.zeros_like(target)
    for start in range(0, k, BLOCK):
        end = min(start + BLOCK, k)
        shifted = target[:, start:end] + factor[:, :start, start:end].mT @ errors[:, :start]
        for i in range(start, end):
            inside = factor[:, start:i, i, None].mT @ errors[:, start:i]
            wanted = (shifted[:, i - start] + inside[:, 0]) / scale
            codes[:, i] = wanted.round_().clamp_(low, high) * kept[:, i]
            errors[:, i] = target[:, i] - codes[:, i] * scale
    found = torch.empty_like(codes).scatter_(1, order[:, :, None].expand_as(codes), codes)
    return found.mT.reshape(shape)


def spread(value: Tensor | float, target: Tensor) -> Tensor:
    """A number, or one for each output channel, as float32 [G, R] for a `target` [G, K, R]."""
    value = torch.as_tensor(value, dtype=torch.float32)
    groups, _, rows = target.shape
    return (value.reshape(groups, rows) if value.ndim else value.expand(groups, rows)).contiguous()


def _ordered(values: Tensor, order: Tensor, dim: int) -> Tensor:
    """[G, ...] with dimension `dim` in the `order` [G, K] of each group."""
    shape = [len(order), *[1] * (values.ndim - 1)]
    shape[dim] = order.shape[1]
    return values.take_along_dim(order.reshape(shape), dim)


def upper_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular V [G, K, K] with V V^T = H + damping mean(H_ii) I; an input that is always 0 gets H_ii = 1.

    Where that is not positive definite in float32, ten times the damping is taken, and so on. CompressError where no
    damping helps: H holds NaN or infinite values, or some that float32 cannot hold with what is added.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    while True:
        damped = hessian + torch.diag_embed(torch.where(diagonal > 0, damping * mean, 1.0))
        if not bool(damped.isfinite().all()):
            raise CompressError("the inputs of a layer are not finite, or too large to be squared: look at the "
                                "calibration inputs")
        lower, failed = torch.linalg.cholesky_ex(damped.flip(1, 2))  # reversed, so that its factor is upper
        if not bool(failed.any()):
            return lower.flip(1, 2)
        damping = max(10 * damping, 1e-6)
