"""Muon for convolutions: torch's optimizer, which takes matrices, on filters.

Muon (Jordan et al. 2024) steps along the nearest semi-orthogonal matrix to the momentum of the gradient, so that
every direction of a layer's output moves alike. A filter bank [out, in, h, w] is the matrix [out, in h w].
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

# Beside SGD at rate r with decay d on the other tensors, filters step at r / RATE with the decoupled decay DECAY d:
# torch's own 0.02 where SGD has 0.2. The step does not depend on the size of the gradient.
RATE, DECAY = 10.0, 100.0


class FilterMuon(torch.optim.Muon):
    """Muon on tensors of four dimensions, in place; state and learning rate as in `torch.optim.Muon`."""

    def __init__(self, filters: list[nn.Parameter], lr: float, weight_decay: float, momentum: float):
        self.filters = filters
        super().__init__([nn.Parameter(as_matrix(x.detach(), x)) for x in filters], lr=lr, momentum=momentum,
                         weight_decay=weight_decay)
        self.matrices = self.param_groups[0]["params"]
        for matrix, x in zip(self.matrices, filters, strict=True):
            assert matrix.data_ptr() == x.data_ptr(), "the matrix of a filter bank must share its memory"

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        for matrix, x in zip(self.matrices, self.filters, strict=True):
            matrix.grad = None if x.grad is None else as_matrix(x.grad, x)
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for x in self.filters:
            x.grad = None


def as_matrix(values: Tensor, filters: Tensor) -> Tensor:
    """`values` [out, in, h, w] as [out, in h w], columns in the order in which `filters` lie in memory."""
    if not filters.is_contiguous():
        values = values.permute(0, 2, 3, 1)
    return values.reshape(len(values), -1)


def with_muon(groups: list[dict], lr: float, momentum: float) -> list[torch.optim.Optimizer]:
    """FilterMuon for the tensors of four dimensions in `groups` ({"params", "weight_decay"}), SGD for the others."""
    found: list[torch.optim.Optimizer] = []
    others = [{**group, "params": [p for p in group["params"] if p.ndim != 4]} for group in groups]
    others = [group for group in others if group["params"]]
    if others:
        found.append(torch.optim.SGD(others, lr=lr, momentum=momentum, nesterov=momentum > 0))
    for group in groups:
        filters = [p for p in group["params"] if p.ndim == 4]
        if filters:
            found.append(FilterMuon(filters, lr / RATE, DECAY * group["weight_decay"], momentum))
    return found
