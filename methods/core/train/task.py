"""What a method is allowed to see: batches to train on, held-out batches to choose on, inputs to calibrate on.

No task holds a test set.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CompressError, ConfigError
from .layout import laid_out, lay_out, needs_contiguous
from .loaders import (
    Batch,
    Batches,
    First,
    InputBatches,
    LoaderBatches,
    Unlabelled,
    Unpack,
    describe,
    fixed_order,
    map_tensors,
    read_batch,
)
from .loss import Loss, try_loss
from .metric import TOP1, Metric, evaluate, top1

__all__ = ["Batch", "Batches", "First", "LoaderBatches", "Metric", "Task", "read_batch", "top1"]


@dataclass(frozen=True)
class Task:
    """Data, loss and measure for a method.

    train          batches to train on, or None where the method may only calibrate
    held_out       batches for choices (sensitivity, rates); never trained on
    loss           (outputs, targets) -> scalar, or (outputs, targets, inputs) -> scalar
    device         where batches and model live while training and scoring
    autocast       torch.bfloat16 to train under autocast, or None for float32
    channels_last  train 4-d tensors in channels_last memory, but for networks of `needs_contiguous`
    calibration    the training inputs for methods that may only calibrate: plain and in order from epoch(None), as in
                   training from epoch(generator) where they can be; None: `train`
    metric         what choices are judged by and training reports; top-1 where outputs and targets are a
                   classification; where it does not apply, or is None, choices take the loss on held-out batches
    teacher        the network that recipes with `distill` learn from; None: the one that is given to `compress`
    """

    train: Batches | None
    held_out: Batches
    loss: Callable[..., Tensor] = F.cross_entropy
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    autocast: torch.dtype | None = None
    channels_last: bool = False
    calibration: Batches | None = None
    metric: Metric | None = TOP1
    teacher: nn.Module | None = None

    def __post_init__(self):
        object.__setattr__(self, "device", torch.device(self.device))
        object.__setattr__(self, "loss", Loss.of(self.loss))
        if self.metric is not None and not isinstance(self.metric, Metric):
            raise ConfigError(f"metric = {self.metric!r}: needed is Metric(function, name, higher_is_better) or None")

    @classmethod
    def from_loader(cls, train: Iterable, held_out: Iterable, calibration: Iterable | None = None, *,
                    unpack: Unpack | None = None, steps: int | None = None, **fields) -> "Task":
        """A task from data loaders that yield (inputs, targets); `calibration` without augmentation.

        unpack  from what the loaders yield to (inputs, targets): lambda batch: (batch["image"], batch["label"])
        steps   batches of one pass over a loader without a length
        """
        plain = None if calibration is None else LoaderBatches(calibration, unpack, steps)
        return cls(LoaderBatches(train, unpack, steps), LoaderBatches(held_out, unpack, steps), calibration=plain,
                   **fields)

    @classmethod
    def from_inputs(cls, inputs: Iterable | Tensor, held_out: Iterable | Tensor | None = None, *,
                    unpack: Callable[[Any], Any] | None = None, steps: int | None = None, **fields) -> "Task":
        """A task without labels, for methods that calibrate: DATA = "calibration", or "none".

        inputs    a tensor or array [N, ...], or a loader of those [n, ...] or of tuples whose first part is one; what
                  else is in a tuple is not read
        held_out  other inputs, for choices that need no labels; None: the same
        unpack    from what the loaders yield to inputs: lambda batch: batch["image"]
        steps     batches of one pass over a loader without a length
        ConfigError where a batch has no tensor; methods that train or choose by labels refuse the task.

        >>> Task.from_inputs(torch.rand(40, 3, 8, 8)).calibration_inputs(30).shape
        torch.Size([30, 3, 8, 8])
        """
        plain, other = (InputBatches(given, unpack, steps)
                        for given in (inputs, inputs if held_out is None else held_out))
        return cls(None, other, calibration=plain, **fields)

    def seen_as(self, data: str) -> "Task | None":
        """What a method of a kind of data is to see; ConfigError for a kind that there is not.

        "train"        all of it
        "held_out"     inputs to calibrate on, and held-out batches with their targets, for choices
        "calibration"  inputs alone: held-out batches without targets
        "none"         nothing
        """
        views: dict[str, Callable[[], Task | None]] = {
            "train": lambda: self, "held_out": lambda: self._untrained(self.held_out),
            "calibration": lambda: self._untrained(Unlabelled(self.held_out)), "none": lambda: None}
        if data not in views:
            raise ConfigError(f"data = {data!r}: allowed are {', '.join(views)}")
        return views[data]()

    def _untrained(self, held_out: Batches) -> "Task":
        plain = self.train if self.calibration is None else self.calibration
        return replace(self, train=None, calibration=plain, held_out=held_out)

    def calibration_inputs(self, n: int) -> Tensor:
        """`n` training inputs without augmentation, in fixed order (fewer if the set is smaller)."""
        with fixed_order():
            return _first_inputs(self.calibration if self.calibration is not None else self.train, n, None)

    def training_inputs(self, n: int, generator: torch.Generator) -> Tensor:
        """`n` training inputs, shuffled and augmented by `generator` as in training (fewer if the set is smaller).

        What batch norm is estimated on. Plain where the task only has a loader that yields plain ones.
        """
        seed = int(torch.randint(2**62, (), generator=generator))
        with fixed_order(seed):
            source = self.train if self.train is not None else self.calibration
            return _first_inputs(source, n, torch.Generator().manual_seed(seed))

    def suited_to(self, model: nn.Module) -> "Task":
        """This task, without channels_last where gradients of `model` would be wrong in it."""
        return replace(self, channels_last=False) if self.channels_last and needs_contiguous(model) else self

    def placed(self, model: nn.Module) -> nn.Module:
        """`model` moved (in place) to the task's device and memory format."""
        return lay_out(model.to(self.device), self.suited_to(model).channels_last)

    def placed_batch(self, batch: Batch) -> Batch:
        inputs, targets = (map_tensors(lambda x: x.to(self.device, non_blocking=True), part) for part in batch)
        return map_tensors(functools.partial(laid_out, channels_last=self.channels_last), inputs), targets

    def precision(self) -> contextlib.AbstractContextManager:
        """The autocast context for forward passes while training."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    @property
    def precision_name(self) -> str:
        """Of the numbers that forward passes multiply while training: "float32", or autocast's."""
        return "float32" if self.autocast is None else str(self.autocast).removeprefix("torch.")

    def metric_of(self, outputs: Any, targets: Any) -> Metric | None:
        """The metric, if it applies to these."""
        return self.metric if self.metric is not None and self.metric.applies(outputs, targets) else None

    def score(self, model: nn.Module) -> float:
        """The metric on the held-out batches, in float32; top-1 in percent. CompressError where there is none."""
        with fixed_order():
            return evaluate(model, map(self.placed_batch, self.held_out.epoch(None)), self.metric_of)[1]

    def error(self, model: nn.Module) -> float:
        """What choices minimise: the top-1 error in [0, 1], another metric such that lower is better, or the loss."""
        with fixed_order():
            metric, score = evaluate(model, map(self.placed_batch, self.held_out.epoch(None)), self.metric_of,
                                     functools.partial(try_loss, self.loss))
        return score if metric is None else metric.error(score)


def _first_inputs(source: Batches | None, n: int, generator: torch.Generator | None) -> Tensor:
    """The first `n` inputs of an epoch."""
    if source is None:
        raise CompressError("this task holds no data to calibrate on")
    if n < 1:
        raise ConfigError(f"calibration inputs = {n}: at least 1 is needed")
    found, count = [], 0
    for inputs, _ in source.epoch(generator):
        if not isinstance(inputs, Tensor):
            raise ConfigError(f"calibration needs a network of one input tensor, not {describe(inputs)}")
        found.append(inputs[:n - count])
        count += len(found[-1])
        if count >= n:
            break
    if count == 0:
        raise CompressError("there is nothing to calibrate on: the data set is empty")
    return torch.cat(found)
