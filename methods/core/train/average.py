"""An exponential moving average of what is trained."""

import torch
from torch import Tensor, nn


class Average:
    """Exponential moving average of the floating-point state, kept only if the decay is not 0."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.values = {k: v.detach().clone() for k, v in self._floats(model).items()} if decay else {}

    @staticmethod
    def _floats(model: nn.Module) -> dict[str, Tensor]:
        return {name: value for name, value in model.state_dict().items()
                if isinstance(value, Tensor) and value.is_floating_point()}

    def load(self, values: dict[str, Tensor]) -> None:
        self.values = {name: value.to(self.values[name].device, copy=True) for name, value in values.items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, value in self._floats(model).items() if self.decay else ():
            self.values[name].lerp_(value, 1 - self.decay)

    @torch.no_grad()
    def write(self, model: nn.Module) -> None:
        for name, value in self._floats(model).items() if self.decay else ():
            value.copy_(self.values[name])
