"""What a method that trains does first: everything that cannot work is said in one line before anything long starts."""

import copy
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import nn

from ..errors import ConfigError
from .distill import Distillation
from .finetune import Objective, check_trainable
from .gradients import look
from .loaders import first_batch, fixed_order, try_call
from .loss import smoothed, try_loss
from .metric import evaluating, values_of
from .recipe import Recipe
from .task import Task


def recipes_of(config: Any) -> list[Recipe]:
    """The recipes in a config, also in its tuples and nested configs."""
    if isinstance(config, Recipe):
        return [config]
    parts = [getattr(config, field.name) for field in fields(config)] if is_dataclass(config) else config
    return [recipe for part in parts for recipe in recipes_of(part)] if isinstance(parts, (list, tuple)) else []


def ready(model: nn.Module, task: Task, config: Any) -> Task:
    """The task for a method that will train `model` by the recipes of `config`: with a teacher where one distils.

    One batch goes through the network and the losses. ConfigError in one line where a batch cannot be read, the network
    cannot take it, a loss cannot take what comes out, or a recipe cannot work with it. The network is not changed.

    >>> import torch
    >>> model = nn.Linear(3, 2)
    >>> task = Task.from_loader([(torch.zeros(4, 3), torch.zeros(4).long())], [])
    >>> ready(model, task, Recipe(epochs=1, lr=0.1)) is task
    True
    """
    recipes = recipes_of(config)
    if not recipes:
        return task
    check_trainable(task)
    recipes = [recipe for recipe in recipes if recipe.epochs > 0]
    if not recipes:
        return task
    batch = first_batch(task.train)
    if batch is None:
        raise ConfigError("there is nothing to train on: the training set holds no batch")
    task.placed(model)
    if task.teacher is None and any(recipe.distill is not None for recipe in recipes):
        task = replace(task, teacher=copy.deepcopy(model).eval().requires_grad_(False))
    inputs, targets = task.suited_to(model).placed_batch(batch)
    with evaluating(model), fixed_order(), look(model):
        for distill, smoothing in dict.fromkeys((recipe.distill, recipe.label_smoothing) for recipe in recipes):
            loss = smoothed(task.loss, smoothing)
            if distill is None:
                outputs = _try(model, loss, inputs, targets)
            else:
                lesson = Distillation(model, task, distill)
                with lesson.watching(model):
                    outputs = _try(model, lesson.objective(loss), inputs, targets)
        metric = task.metric_of(outputs, targets)
        if metric is not None:
            values_of(metric, outputs, targets)
    return task


def _try(model: nn.Module, loss: Objective, inputs: Any, targets: Any) -> Any:
    """The network's outputs on a batch, after a look at their loss."""
    outputs = try_call(model, inputs, "inputs of the training data")
    found = try_loss(loss, outputs, targets, inputs)
    if not found.requires_grad and any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("the loss has no gradient: needed is one computed from the outputs in torch")
    return outputs
