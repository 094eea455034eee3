"""What a network is judged by on held-out data: top-1, a user's own measure, or the loss."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CompressError, ConfigError
from .loaders import Batch, call, describe, size_of


def _always(outputs: Any, targets: Any) -> bool:
    return True


@dataclass(frozen=True)
class Metric:
    """A measure of outputs against targets, with its direction.

    function          (outputs, targets) -> values whose mean over all examples is the score (one for each example or
                      pixel), or one number for the batch, which is weighted by its size
    name              as reported
    higher_is_better  the direction
    percent           scores run from 0 to 100
    applies           whether the metric makes sense for (outputs, targets)

    >>> Metric(lambda outputs, targets: (outputs - targets).abs(), "mean absolute error", higher_is_better=False).name
    'mean absolute error'
    """

    function: Callable[[Any, Any], Tensor]
    name: str
    higher_is_better: bool
    percent: bool = False
    applies: Callable[[Any, Any], bool] = _always

    def error(self, score: float) -> float:
        """`score` such that lower is better; of a percentage that rises, the missing share, in [0, 1]."""
        if not self.higher_is_better:
            return score
        return 1 - score / 100 if self.percent else -score


def is_classification(outputs: Any, targets: Any) -> bool:
    """Outputs [N, classes, ...] and one class, a whole number, for each of [N, ...] (segmentation: each pixel)."""
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor) or outputs.ndim < 2:
        return False
    whole = not targets.is_floating_point() and not targets.is_complex() and targets.dtype != torch.bool
    return whole and outputs.shape[1] > 1 and targets.shape == outputs.shape[:1] + outputs.shape[2:]


def _right(outputs: Tensor, targets: Tensor) -> Tensor:
    """100 where the arg-max of `outputs` is the target, else 0; pixels of a negative class are left out."""
    right = 100.0 * (outputs.argmax(1) == targets)
    return right if targets.ndim == 1 else right[targets >= 0]


TOP1 = Metric(_right, "top1", True, percent=True, applies=is_classification)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], choose: Callable[[Any, Any], Metric | None],
             loss: Callable[[Any, Any, Any], Tensor] | None = None) -> tuple[Metric | None, float]:
    """(metric, its mean over `batches`) of `model` in eval mode; the first batch's outputs and targets choose it.

    Where `choose` finds None, the mean of `loss` (outputs, targets, inputs).
    """
    metric, total, count = None, 0.0, 0
    with evaluating(model):
        for i, (inputs, targets) in enumerate(batches):
            outputs = call(model, inputs)
            metric = choose(outputs, targets) if i == 0 else metric
            if metric is None and loss is None:
                raise CompressError(f"there is no metric for outputs {describe(outputs)} and targets "
                                    f"{describe(targets)}: give Task(metric=Metric(function, name, higher_is_better))")
            n = size_of(inputs)
            found = loss(outputs, targets, inputs) if metric is None else values_of(metric, outputs, targets)
            sums, n = (float(found) * n, n) if found.ndim == 0 else (float(found.double().sum()), found.numel())
            total, count = total + sums, count + n
    if count == 0:
        raise CompressError("there is nothing to score: the data set is empty")
    return metric, total / count


def values_of(metric: Metric, outputs: Any, targets: Any) -> Tensor:
    """The metric's values, as a tensor."""
    values = metric.function(outputs, targets)
    if not isinstance(values, (Tensor, int, float)):
        raise ConfigError(f"the metric {metric.name!r} returns {describe(values)}: needed is a tensor or a number")
    return torch.as_tensor(values).detach()


def top1(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Percent of targets that are the arg-max of the model's outputs, in eval mode (restored afterwards)."""
    return evaluate(model, batches, lambda outputs, targets: TOP1 if is_classification(outputs, targets) else None)[1]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in eval mode inside; every module's own mode restored outside."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
