"""Where a method reaches into the training loop, one hook or several in order."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .recipe import OPTIMIZERS, Recipe, decay_groups


class Hooks:
    """Where a method reaches into the loop. Each does nothing unless overridden.

    >>> class Clamp(Hooks):
    ...     def after_step(self, model, lr):
    ...         with torch.no_grad():
    ...             model.weight.clamp_(-1, 1)
    """

    def optimizers(self, model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
        """The optimizers of the network; the schedule scales the learning rate of every group."""
        return OPTIMIZERS[recipe.optimizer](decay_groups(model, recipe.weight_decay), recipe)

    def own_optimizers(self, model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
        """Optimizers of parameters that the hook itself holds, beside those of the network."""
        return []

    def loss(self, model: nn.Module, loss: Tensor) -> Tensor:
        """The loss to differentiate, given the task's."""
        return loss

    def after_backward(self, model: nn.Module, lr: float) -> None:
        """Gradients are there; the optimizer has not stepped."""

    def after_step(self, model: nn.Module, lr: float) -> None:
        """The optimizer has stepped."""

    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        """An epoch (counted from 0) is over."""

    def state(self) -> dict:
        """What must survive an interruption."""
        return {}

    def restore(self, state: dict) -> None:
        """Take back what `state` returned."""


class HookList(Hooks):
    """Several hooks as one, called in order; a loss passes from one to the next.

    At most one may choose the network's optimizers: ConfigError where several do.
    """

    def __init__(self, hooks: Sequence[Hooks]):
        self.hooks = list(hooks)
        strangers = [hook for hook in self.hooks if not isinstance(hook, Hooks)]
        if strangers:
            raise ConfigError(f"hooks holds a {type(strangers[0]).__name__}: needed are Hooks")

    def optimizers(self, model, recipe):
        choosing = [hook for hook in self.hooks if type(hook).optimizers is not Hooks.optimizers]
        if len(choosing) > 1:
            names = ", ".join(type(hook).__name__ for hook in choosing)
            raise ConfigError(f"{names} each choose the optimizers of the network: allowed is one of them")
        return (choosing[0] if choosing else Hooks()).optimizers(model, recipe)

    def own_optimizers(self, model, recipe):
        return [optimizer for hook in self.hooks for optimizer in hook.own_optimizers(model, recipe)]

    def loss(self, model, loss):
        for hook in self.hooks:
            loss = hook.loss(model, loss)
        return loss

    def after_backward(self, model, lr):
        for hook in self.hooks:
            hook.after_backward(model, lr)

    def after_step(self, model, lr):
        for hook in self.hooks:
            hook.after_step(model, lr)

    def after_epoch(self, model, epoch):
        for hook in self.hooks:
            hook.after_epoch(model, epoch)

    def state(self):
        return [hook.state() for hook in self.hooks]

    def restore(self, state):
        for hook, saved in zip(self.hooks, state, strict=True):
            hook.restore(saved)


def as_hooks(hooks: Hooks | Sequence[Hooks] | None, *more: Hooks) -> HookList:
    """None, one hook or several, and `more`, as a list of hooks."""
    given = [] if hooks is None else [hooks] if isinstance(hooks, Hooks) else hooks
    return HookList([*given, *more])
