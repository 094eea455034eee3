"""What a method that trains does first: everything that cannot work is said in one line before anything long starts."""

import dataclasses
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from .finetune import check_trainable
from .loaders import call, describe, first_batch, first_line, fixed_order
from .loss import smoothed, try_loss
from .metric import evaluating, values_of
from .recipe import Recipe
from .task import Task


def recipes_of(config: Any) -> list[Recipe]:
    """The recipes among a config's fields."""
    found = [getattr(config, field.name) for field in dataclasses.fields(config)]
    return [recipe for recipe in found if isinstance(recipe, Recipe)]


def ready(model: nn.Module, task: Task, config: Any) -> Task:
    """The task for a method that will train `model` by the recipes of `config`.

    One batch goes through the network and the loss. ConfigError in one line where a batch cannot be read, the network
    cannot take it, the loss cannot take what comes out, or a recipe cannot work with it. Nothing is changed.

    >>> model = nn.Linear(3, 2)
    >>> task = Task.from_loader([(torch.zeros(4, 3), torch.zeros(4).long())], [])
    >>> ready(model, task, Recipe(epochs=1, lr=0.1)) is task
    True
    """
    recipes = [config] if isinstance(config, Recipe) else recipes_of(config)
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
    inputs, targets = task.placed_batch(batch)
    with evaluating(model), fixed_order(), torch.enable_grad():
        outputs = _outputs(model, inputs)
        for smoothing in dict.fromkeys(recipe.label_smoothing for recipe in recipes):
            loss = try_loss(smoothed(task.loss, smoothing), outputs, targets, inputs)
            if not loss.requires_grad and any(p.requires_grad for p in model.parameters()):
                raise ConfigError("the loss has no gradient: needed is one computed from the outputs in torch")
        metric = task.metric_of(outputs, targets)
        if metric is not None:
            values_of(metric, outputs, targets)
    return task


def _outputs(model: nn.Module, inputs: Any) -> Any:
    try:
        return call(model, inputs)
    except Exception as error:  # noqa: BLE001 - a network raises what it likes
        raise ConfigError(f"{type(model).__name__} cannot take the inputs of the training data, {describe(inputs)}: "
                          f"{first_line(error)}") from error
