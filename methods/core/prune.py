"""Magnitude pruning: masks with an exact count, and the training hook that keeps them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .errors import BudgetError
from .finetune import Hooks


def keep_count(n: int, density: float) -> int:
    """Kept weights of a tensor of `n`: n - floor((1 - density) n), at least 1."""
    pruned = int((1.0 - density) * n + 1e-9)  # 1 - 0.9 is a little under 0.1: the 1e-9 restores the intended floor
    return max(n - pruned, 1)


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """Bool mask of the `count` largest `scores` (any shape); of equal scores the lowest index is kept.

    Always an exact count: a threshold test keeps too many or too few where scores tie.
    """
    if not 0 <= count <= scores.numel():
        raise BudgetError(f"cannot keep {count} of {scores.numel()} weights")
    flat = scores.detach().reshape(-1)
    order = torch.sort(flat, descending=True, stable=True).indices
    mask = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    mask[order[:count]] = True
    return mask.reshape(scores.shape)


def keep_local(weights: Mapping[str, Tensor], densities: Mapping[str, float]) -> dict[str, Tensor]:
    """One ranking of |w| per layer."""
    return {name: keep_largest(w.abs(), keep_count(w.numel(), densities[name])) for name, w in weights.items()}


def keep_global(weights: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """One ranking of |w| over all layers; a layer that would lose every weight keeps its largest."""
    flat = torch.cat([w.detach().abs().reshape(-1) for w in weights.values()])
    kept = keep_largest(flat, keep_count(flat.numel(), density))
    masks, start = {}, 0
    for name, w in weights.items():
        mask = kept[start:start + w.numel()].reshape(w.shape)
        masks[name] = mask if bool(mask.any()) else keep_largest(w.abs(), 1)
        start += w.numel()
    return masks


class MaskHooks(Hooks):
    """Keeps pruned weights at exactly 0: the mask is applied after every optimizer step.

    Masking the gradient alone is not enough: momentum and weight decay gathered earlier still move the weight.
    """

    def __init__(self, masks: Mapping[str, Tensor]):
        self.masks = masks

    @torch.no_grad()
    def after_step(self, model: nn.Module, lr: float) -> None:
        apply_masks(model, self.masks)


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """weight *= mask, in place, for every layer named in `masks`."""
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        weight.mul_(mask.to(weight.device))
