"""A user's loss, whatever it takes, as one function of (outputs, targets, inputs)."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError
from .loaders import describe, first_line
from .metric import is_classification

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
CALLS = {"not at all": lambda function, outputs, targets, inputs: function(outputs, targets),
         "by position": lambda function, outputs, targets, inputs: function(outputs, targets, inputs),
         "by name": lambda function, outputs, targets, inputs: function(outputs, targets, inputs=inputs)}


@dataclass(frozen=True)
class Loss:
    """`function` with its signature known: `how` it takes the inputs, "not at all", "by position" or "by name"."""

    function: Callable[..., Tensor]
    how: str

    @classmethod
    def of(cls, function: Callable[..., Tensor]) -> "Loss":
        """`inputs` are handed over by name where a parameter is called so, by position where three are required.

        ConfigError for what takes fewer than two or requires more than three arguments.
        """
        if isinstance(function, Loss):
            return function
        if not callable(function):
            raise ConfigError(f"loss = {function!r}: needed is a function of (outputs, targets) or of (outputs, "
                              "targets, inputs)")
        try:
            parameters = inspect.signature(function.forward if isinstance(function, nn.Module) else function).parameters
        except (TypeError, ValueError):  # built in: no signature to read
            return cls(function, "not at all")
        positional = [p for p in parameters.values() if p.kind in POSITIONAL]
        required = [p for p in positional if p.default is inspect.Parameter.empty]
        enough = len(positional) >= 2 or any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters.values())
        if "inputs" in [p.name for p in parameters.values() if p not in positional[:2]] and len(required) <= 3:
            return cls(function, "by name")
        if not enough or len(required) > 3:
            raise ConfigError(f"the loss takes ({', '.join(parameters)}): needed is a function of (outputs, targets) "
                              "or of (outputs, targets, inputs)")
        return cls(function, "by position" if len(required) == 3 else "not at all")

    def __call__(self, outputs: Any, targets: Any, inputs: Any = None) -> Tensor:
        """The loss of a batch, a tensor []."""
        loss = CALLS[self.how](self.function, outputs, targets, inputs)
        if not isinstance(loss, Tensor) or loss.ndim:
            raise ConfigError(f"the loss of a batch is {describe(loss)}: needed is one number, a tensor without "
                              "dimensions (its mean)")
        return loss


def smoothed(loss: Loss, smoothing: float) -> Callable[[Any, Any, Any], Tensor]:
    """`loss` mixed with the mean negative log-likelihood over classes (Szegedy et al. 2016)."""
    if smoothing == 0.0:
        return loss

    def mixed(outputs: Any, targets: Any, inputs: Any = None) -> Tensor:
        if not is_classification(outputs, targets):
            raise ConfigError(f"label_smoothing = {smoothing:g} needs outputs [N, classes] and whole numbers as "
                              f"targets, not {describe(outputs)} and {describe(targets)}: allowed is 0")
        return (1 - smoothing) * loss(outputs, targets, inputs) - smoothing * outputs.log_softmax(1).mean()

    return mixed


def try_loss(loss: Callable[[Any, Any, Any], Tensor], outputs: Any, targets: Any, inputs: Any) -> Tensor:
    """The loss of a batch; ConfigError in one line where it fails."""
    try:
        return loss(outputs, targets, inputs)
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 - the user's function raises what it likes
        if targets is None:
            raise ConfigError("the loss needs targets, and this task has none: Task.from_loader takes batches (inputs, "
                              "targets)") from error
        raise ConfigError(f"the loss cannot take outputs {describe(outputs)} and targets {describe(targets)}: "
                          f"{first_line(error)}") from error
