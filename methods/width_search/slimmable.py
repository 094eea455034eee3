"""One network that works at all widths: the sandwich rule with in-place distillation (Yu & Huang, ICCV 2019).

Each step trains the largest width on the targets, then the smallest and two random ones on what the largest says:
the gradients of all four are summed. The soft labels are constants, and batch norm takes each width's own statistics.
"""

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..core.errors import ConfigError
from ..core.train.distill import soft_loss
from ..core.train.finetune import train
from ..core.train.hooks import Hooks
from ..core.train.layout import laid_out
from ..core.train.loaders import call, cut, describe, first_batch
from ..core.train.metric import evaluating
from ..core.train.recipe import Recipe
from ..core.train.run import Run
from ..core.train.task import Task
from .space import Point, Space

RANDOM_WIDTHS = 2


class Sandwich(Hooks):
    """The narrower widths of a step, after the backward pass of the largest; `handle` watches the network."""

    def __init__(self, model: nn.Module, task: Task, space: Space):
        self.task, self.space, self.form = task, space, copy.deepcopy(model)
        self.seen: tuple[Tensor, Tensor] | None = None
        self.handle = model.register_forward_hook(self._keep)

    def _keep(self, model: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.seen = inputs[0], output.detach().float()

    def points(self) -> list[Point]:
        """The smallest, and random ones; drawn from torch's global generator, which a training seeds."""
        drawn = [tuple(int(torch.randint(count, ())) for count in self.space.levels) for _ in range(RANDOM_WIDTHS)]
        return [self.space.smallest, *drawn]

    def after_backward(self, model: nn.Module, lr: float) -> None:
        x, wanted = self.seen
        self.seen = None
        for point in self.points():
            with self.task.precision():
                outputs = self.at_width(model, point, x)
            soft_loss(outputs.float(), wanted, 1.0).backward()

    def at_width(self, model: nn.Module, point: Point, x: Tensor) -> Tensor:
        """Outputs of the part of `model` at `point` in training mode; gradients flow to the parameters of `model`."""
        network = self.space.network(self.form, point)
        task = self.task.suited_to(network)
        parts = self.space.channels.cut(dict(model.named_parameters()), self.space.kept(point))
        parts = {name: laid_out(part, task.channels_last) for name, part in parts.items()}
        return functional_call(task.placed(network).train(), parts, (laid_out(x, task.channels_last),))


def train_slimmable(model: nn.Module, task: Task, space: Space, recipe: Recipe, generator: torch.Generator, run: Run
                    ) -> None:
    """Train `model` in place at all widths of `space`; its bits are not part of that."""
    sandwich = Sandwich(model, task.suited_to(model), space)
    try:
        train(model, task, recipe, generator, hooks=sandwich, run=run)
    finally:
        sandwich.handle.remove()
    model.cpu()


def check_classes(model: nn.Module, task: Task) -> None:
    """ConfigError where in-place distillation has no class probabilities to teach."""
    batch = first_batch(task.train)
    with evaluating(model), torch.no_grad():
        outputs = call(model, cut(task.placed_batch(batch)[0], 2))
    if not isinstance(outputs, Tensor) or outputs.ndim < 2 or outputs.shape[1] < 2:
        raise ConfigError(f"slimmable teaches the narrower widths by class probabilities: needed are outputs "
                          f"[N, classes, ...], not {describe(outputs)}")
