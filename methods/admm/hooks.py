"""What happens in the steps of each training: the pull towards Z, weights that are held, members that move together."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ..core.fit.project import Clusters
from ..core.fit.prune import MaskHooks
from ..core.train.finetune import Hooks

Weights = dict[str, nn.Parameter]
Projection = Callable[[str, Tensor], Tensor]  # (layer, values) -> nearest point of the layer's set


class AdmmHooks(MaskHooks):
    """The pull of one W-step, and the Z- and U-step after it. Weights outside the masks stay 0."""

    def __init__(self, weights: Weights, project: Projection, masks: Mapping[str, Tensor], rho: float):
        super().__init__(masks)
        self.weights, self.project, self.rho = weights, project, rho
        self.z = {name: project(name, weight.detach()) for name, weight in weights.items()}
        self.u = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self.residuals: dict[str, list[float]] = {name: [] for name in weights}
        self._aim()

    def _aim(self) -> None:
        self.toward = {name: self.z[name] - self.u[name] for name in self.weights}

    @torch.no_grad()
    def after_backward(self, model: nn.Module, lr: float) -> None:
        """Gradient of rho/2 |W - Z + U|^2. (1810.07378, Eq. 4)"""
        for name, weight in self.weights.items():
            if weight.grad is not None:
                weight.grad.add_(weight, alpha=self.rho).sub_(self.toward[name], alpha=self.rho)

    @torch.no_grad()
    def update(self, growth: float) -> None:
        """Z <- Proj(W + U);  U <- U + W - Z;  then rho grows and U, which is scaled by it, shrinks."""
        for name, weight in self.weights.items():
            moved = weight + self.u[name]
            self.z[name] = self.project(name, moved)  # 1810.07378, Eq. (5)
            self.u[name] = (moved - self.z[name]) / growth
            apart, size = (float(x.double().norm()) for x in (weight - self.z[name], weight))
            self.residuals[name].append(apart / size if size > 0 else 0.0)
        self.rho *= growth
        self._aim()

    def state(self) -> dict:
        return {"z": self.z, "u": self.u, "rho": self.rho}

    def restore(self, state: dict) -> None:
        self.rho = state["rho"]
        for name, weight in self.weights.items():
            self.z[name], self.u[name] = (state[key][name].to(weight.device) for key in ("z", "u"))
        self._aim()


class HoldHooks(Hooks):
    """Weights outside the masks `free` keep their value: momentum and weight decay would move them."""

    def __init__(self, weights: Weights, free: Mapping[str, Tensor]):
        self.weights = list(weights.values())
        self.free = [free[name].to(w.dtype) for name, w in weights.items()]
        self.held = [w.detach() * (1 - mask) for w, mask in zip(self.weights, self.free, strict=True)]

    @torch.no_grad()
    def after_step(self, model: nn.Module, lr: float) -> None:
        torch._foreach_mul_(self.weights, self.free)
        torch._foreach_add_(self.weights, self.held)


class TieHooks(MaskHooks):
    """Members of a cluster move together, by the sum of their gradients."""

    @torch.no_grad()
    def __init__(self, weights: Weights, masks: Mapping[str, Tensor], grids: Mapping[str, Clusters]):
        stored = {name: grids[name].store(weight, masks[name]) for name, weight in weights.items()}
        super().__init__({name: tensor.mask for name, tensor in stored.items()})
        self.weights, self.codes, self.first = weights, {}, {}
        for name, weight in weights.items():
            weight.copy_(stored[name].decode())
            codes = torch.where(stored[name].mask, stored[name].codes, -1).numpy()
            _, first, codes = np.unique(codes, return_index=True, return_inverse=True)
            self.first[name] = torch.from_numpy(first).to(weight.device)  # a member of each cluster
            self.codes[name] = torch.from_numpy(codes.reshape(weight.shape)).to(weight.device)

    @torch.no_grad()
    def after_backward(self, model: nn.Module, lr: float) -> None:
        for name, weight in self.weights.items():
            if weight.grad is not None:
                grad, codes = weight.grad * self.masks[name].to(weight.device), self.codes[name]
                sums = grad.new_zeros(len(self.first[name])).index_add_(0, codes.reshape(-1), grad.reshape(-1))
                weight.grad.copy_(sums[codes])

    @torch.no_grad()
    def after_step(self, model: nn.Module, lr: float) -> None:
        for name, weight in self.weights.items():  # rounding may differ between places of a tensor
            weight.copy_(weight.reshape(-1)[self.first[name]][self.codes[name]])
        super().after_step(model, lr)
