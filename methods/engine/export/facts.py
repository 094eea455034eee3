"""What is known of a node beside its name: shapes, and how it calls torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

BATCH = 2  # of the probes


@dataclass(frozen=True)
class Facts:
    """Shapes of a node's inputs and of its output, without the batch; `run` computes it on BATCH inputs at once.

    zero  what stands for the real number 0
    """

    inputs: tuple[tuple[int, ...], ...]
    output: tuple[int, ...]
    run: Callable[..., Any]
    zero: float = 0.0

    def call(self) -> tuple[str, tuple, dict[str, Any]]:
        """The name of the function of torch that a node of one input calls, the arguments after it, keywords."""
        probe = torch.zeros(BATCH, *self.inputs[0])
        with _Calls() as calls:
            self.run(probe)
        function, args, kwargs = calls.seen[0]
        return function.__name__, args[1:], kwargs

    def called(self, *names: str) -> dict[str, Any]:
        """The arguments of the call by name, as far as they are given."""
        _, args, kwargs = self.call()
        return dict(zip(names, args, strict=False)) | {key: kwargs[key] for key in names if key in kwargs}


class _Calls(TorchFunctionMode):
    """`seen`: (function, arguments, keywords) of every call of torch, from outside to inside."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[Callable, tuple, dict]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def pair(value: int | tuple[int, ...]) -> list[int]:
    """The two sides of a window."""
    return [value, value] if isinstance(value, int) else list(value)


def int64(values: list[int]) -> np.ndarray:
    return np.asarray(values, np.int64)


def shown(*shapes: tuple[int, ...]) -> str:
    return " and ".join(str(list(shape)) for shape in shapes)

