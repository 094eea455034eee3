"""What a method is: any module, or object, with these three; and the check of what it is called with."""

import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .artifact import CompressedModel
from .budget import Budget
from .errors import BudgetError, CompressError, ConfigError
from .graph.positions import check_positions
from .graph.wrapped import check_network
from .settings import is_a
from .train.loaders import describe
from .train.run import Run
from .train.task import Task
from .typed import check_types

MAKERS = {"calibration": "Task.from_inputs(inputs)"}  # of a task, by the data that a method sees; else from_loader


class Method(Protocol):
    """A method; a module satisfies it. Optional: SIZE_KNOB, or Config.size_knob, and `quick` (see
    core/fit/size.py).

    DATA    "train", "held_out" (labelled, for choices; no training batches), "calibration" (inputs alone) or "none"
            (task is None): see `Task.seen_as`
    Config  a frozen dataclass of every knob that is not a budget
    """

    DATA: str
    Config: Any

    @staticmethod
    def compress(model: nn.Module, task: Task | None, budget: Budget, config: Any, generator: torch.Generator, *,
                 run: Run | None = None) -> CompressedModel:
        """`model` is not modified, `generator` is the only randomness, a field of `budget` that cannot be honoured is
        refused (`budget.require`), and nothing is printed or written."""


def check_call(module: str, model: Any, task: Any, budget: Any, config: Any, generator: Any) -> None:
    """What `compress` in the method `module` (its `__name__`) is called with, before any of it is used.

    ConfigError, or BudgetError for the budget, in one line for an argument or a setting of another type, and for no
    task where the settings need one (`DATA`, or `config.data`).

    >>> from .. import dfq
    >>> check_call(dfq.__name__, nn.Linear(2, 2), None, {"bits": 8}, None, None)
    Traceback (most recent call last):
        ...
    methods.core.errors.BudgetError: budget = a dict of bits: dfq takes a Budget, such as Budget(bits=8)
    """
    method, name = sys.modules[module], module.rpartition(".")[2]
    check_network(model)
    check_budget(budget, name)
    if not isinstance(config, method.Config):
        raise ConfigError(f"config = {describe(config)}: {name} takes its own Config, such as {name}.Config()")
    if is_dataclass(config):
        check_types(config)
    check_generator(generator, name)
    data = getattr(config, "data", method.DATA)
    maker = MAKERS.get(data, "Task.from_loader(train, held_out)")
    if task is None and data != "none":
        raise ConfigError(f"task = None: with these settings {name} needs a task, such as {maker}")
    if task is not None and not is_a(task, Task):
        raise ConfigError(f"task = {describe(task)}: {name} takes a Task, such as {maker}")
    if task is not None:
        check_positions(model, _inputs(task))


def _inputs(task: Task) -> Iterator[Tensor]:
    """Two inputs, where they are tensors."""
    try:
        yield task.calibration_inputs(2)
    except (CompressError, ConfigError):
        return


def check_budget(budget: Any, name: str) -> None:
    """BudgetError for another type; `name` is of what takes it."""
    if not is_a(budget, Budget):
        raise BudgetError(f"budget = {describe(budget)}: {name} takes a Budget, such as Budget(bits=8)")


def check_generator(generator: Any, name: str) -> None:
    """ConfigError for another type, an int among them; `name` is of what takes it."""
    if not isinstance(generator, torch.Generator):
        raise ConfigError(f"generator = {describe(generator)}: {name} takes a torch.Generator, such as "
                          "torch.Generator().manual_seed(0)")
