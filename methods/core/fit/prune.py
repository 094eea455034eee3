"""Magnitude pruning: masks with an exact count, and the training hook that keeps them."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import BudgetError
from ..graph.weights import layer_of
from ..train.hooks import Hooks


def keep_count(n: int, density: float) -> int:
    """Kept weights of a tensor of `n`: density * n rounded up, so that floor((1 - density) n) go; at least 1."""
    return max(math.ceil(density * n * (1 - 1e-12)), 1)  # 0.07 * 100 is a little over 7: the factor restores 7


def keep_largest(scores: Tensor, count: int, second: Tensor | None = None) -> Tensor:
    """Bool mask of the `count` largest `scores` (any shape); of equal scores the largest of `second` (same shape), if
    given, then the lowest index is kept. NaN counts as infinite.

    Always an exact count: a threshold test alone keeps too many or too few where scores tie.
    """
    if not 0 <= count <= scores.numel():
        raise BudgetError(f"cannot keep {count} of {scores.numel()} weights")
    flat = scores.detach().reshape(-1)
    if count == flat.numel() or count == 0:
        return torch.full(scores.shape, count > 0, dtype=torch.bool, device=scores.device)
    flat = flat.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    least = _nth_largest(flat, count)
    mask, tied = flat > least, (flat == least).nonzero()[:, 0]
    left = count - int(mask.sum())
    mask[tied[:left] if second is None else tied[keep_largest(second.reshape(-1)[tied], left)]] = True
    return mask.reshape(scores.shape)


def _nth_largest(flat: Tensor, n: int) -> Tensor:
    """Selection takes a twentieth of the time of a stable sort."""
    if flat.device.type != "cpu":
        return flat.kthvalue(len(flat) - n + 1).values
    return torch.from_numpy(np.partition(flat.numpy(), len(flat) - n))[len(flat) - n]


def keep_local(weights: Mapping[str, Tensor], densities: Mapping[str, float]) -> dict[str, Tensor]:
    """One ranking of |w| per layer."""
    return {name: keep_largest(w.abs(), keep_count(w.numel(), densities[name])) for name, w in weights.items()}


def keep_global(weights: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """One ranking of |w| over all layers; the largest weight of each layer comes first, so that none is lost."""
    scores = [w.detach().abs().reshape(-1) for w in weights.values()]
    for score in scores:
        score[(score == score.max()).nonzero()[0]] = float("inf")
    flat = torch.cat(scores)
    kept = keep_largest(flat, max(keep_count(flat.numel(), density), len(scores)))
    parts = kept.split([len(score) for score in scores])
    return {name: part.reshape(w.shape) for (name, w), part in zip(weights.items(), parts, strict=True)}


def global_densities(weights: Mapping[str, Tensor], density: float) -> dict[str, float]:
    """{layer: the share of its weights} that `keep_global` keeps: a budget for methods that rank in each layer.

    >>> global_densities({"a": torch.tensor([3.0, 2.0, 0.1, 0.2]), "b": torch.tensor([1.0, 0.5])}, 0.5)
    {'a': 0.5, 'b': 0.5}
    """
    return {name: int(mask.sum()) / mask.numel() for name, mask in keep_global(weights, density).items()}


class MaskHooks(Hooks):
    """Keeps pruned weights at exactly 0: the mask is applied after every optimizer step.

    Masking the gradient alone is not enough: momentum and weight decay gathered earlier still move the weight.
    """

    def __init__(self, masks: Mapping[str, Tensor]):
        self.masks = masks

    @torch.no_grad()
    def after_step(self, model: nn.Module, lr: float) -> None:
        self.masks = {name: mask.to(layer_of(model, name).weight.device) for name, mask in self.masks.items()}
        apply_masks(model, self.masks)  # moved to the device once, not in every step


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """weight *= mask, in place, for every layer named in `masks`."""
    for name, mask in masks.items():
        weight = layer_of(model, name).weight
        weight.mul_(mask.to(weight.device))
