"""A network that wears its masks and quantizers: the state that stages hand on to one another.

Every weight is a parametrization, mask * quantizer(w), of a float master w; biases and batch norms of channels that
are pruned are masked too. No stage can undo another: what is masked is 0 in every forward pass, a grid stays on, and
masters keep their values, so that a mask which is chosen anew can give a weight back.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core.artifact import CompressedTensor
from ..core.fit.weight_quantizers import WeightQuantizer
from ..core.graph.weights import layer_of, place_of
from ..core.train.hooks import Hooks


class Coat(nn.Module):
    """w -> mask * quantizer(w); `mask` is bool like w.

    gradient  dL / d(what is used), summed over backward passes while `watched`; pruned weights have one, too
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))
        self.quantizer: WeightQuantizer | None = None
        self.watched, self.gradient = False, None

    def forward(self, weight: Tensor) -> Tensor:
        used = (weight if self.quantizer is None else self.quantizer(weight, self.mask)) * self.mask
        if self.watched and torch.is_grad_enabled():
            (used if used.requires_grad else used.requires_grad_()).register_hook(self._gather)  # of frozen ones, too
        return used

    def _gather(self, gradient: Tensor) -> None:
        self.gradient = gradient.detach() if self.gradient is None else self.gradient + gradient.detach()


class Dressed(Hooks):
    """Coats for the weights of `layers` of `model`, put on in place, and for what `companions` names beside them.

    companions  {layer: ((module, attribute), ...)}: vectors [C_out] that are masked with the layer's channels
    A hook of every training: quantizers put weights back into their bounds after a step.
    """

    def __init__(self, model: nn.Module, layers: list[str],
                 companions: Mapping[str, tuple[tuple[nn.Module, str], ...]] | None = None):
        self.places = {name: place_of(layer_of(model, name)) for name in layers}
        self.companions = {} if companions is None else companions
        self.coats = {name: self._put_on(*place) for name, place in self.places.items()}
        for place in self._beside():
            self._put_on(*place)

    @staticmethod
    def _put_on(module: nn.Module, attribute: str) -> Coat:
        coat = Coat(getattr(module, attribute))
        parametrize.register_parametrization(module, attribute, coat)
        return coat

    def _beside(self) -> list[tuple[nn.Module, str]]:
        return [place for places in self.companions.values() for place in places]

    def master(self, name: str) -> nn.Parameter:
        """The float weight of a layer."""
        module, attribute = self.places[name]
        return module.parametrizations[attribute].original

    @torch.no_grad()
    def used(self, name: str) -> Tensor:
        """What the network computes with."""
        return self.coats[name](self.master(name))

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Masks like the weights, or bool [C_out] for whole channels with what is beside them."""
        for name, mask in masks.items():
            weight = self.master(name)
            shape = (-1, *[1] * (weight.ndim - mask.ndim)) if mask.ndim == 1 else mask.shape
            self.coats[name].mask.copy_(mask.reshape(shape).expand(weight.shape))
            for module, attribute in self.companions.get(name, ()):
                module.parametrizations[attribute][0].mask.copy_(mask)

    def forget(self, block: str) -> None:
        """A block of the network, with all its layers, is no more."""
        gone = [name for name in self.coats if f"{name}.".startswith(f"{block}.")]
        for name in gone:
            del self.coats[name], self.places[name]
        self.companions = {name: beside for name, beside in self.companions.items() if name not in gone}

    def quantize(self, quantizers: Mapping[str, WeightQuantizer]) -> None:
        """Put quantizers on, fitted to the kept weights."""
        for name, quantizer in quantizers.items():
            coat, weight = self.coats[name], self.master(name)
            quantizer.start(weight.data, coat.mask)
            coat.quantizer = quantizer.to(weight.device)

    def freeze(self) -> None:
        """Grids stay as they are from now on."""
        for name, coat in self.coats.items():
            coat.quantizer.freeze(self.master(name), coat.mask)

    def after_step(self, model: nn.Module, lr: float) -> None:
        for name, coat in self.coats.items():
            if coat.quantizer is not None:
                coat.quantizer.after_step(self.master(name).data)

    def encode(self) -> dict[str, CompressedTensor]:
        return {name: coat.quantizer.encode(self.master(name), coat.mask) for name, coat in self.coats.items()}

    @torch.no_grad()
    def take_off(self) -> None:
        """The network has plain parameters again: what it used."""
        for module, attribute in (*self.places.values(), *self._beside()):
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
