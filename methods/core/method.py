"""What a method is: any module, or object, with these three."""

from typing import Any, Protocol

import torch
from torch import nn

from .artifact import CompressedModel
from .budget import Budget
from .train.run import Run
from .train.task import Task


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
