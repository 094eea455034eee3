"""What a method is allowed to see: batches to train on, held-out batches to choose on, inputs to calibrate on.

No task holds a test set.
"""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CompressError, ConfigError

Batch = tuple[Tensor, Tensor]


class Batches(Protocol):
    """A data set in batches (inputs [N, ...] float32, targets [N])."""

    def __len__(self) -> int:
        """Batches per epoch."""

    def epoch(self, generator: torch.Generator | None) -> Iterator[Batch]:
        """One pass; shuffled and augmented with `generator`, or in fixed order and plain if it is None."""


class LoaderBatches:
    """A user's DataLoader (or any sized iterable of batches) as `Batches`; its own shuffling applies."""

    def __init__(self, loader: Iterable[Batch]):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def epoch(self, generator):
        yield from self.loader


class First:
    """The first `examples` of a data set, or its first `n` batches, plain; read once: no shuffling changes them."""

    def __init__(self, batches: Batches, *, examples: int = sys.maxsize, n: int = sys.maxsize):
        self.kept: list[Batch] = []
        with _fixed_order():
            for inputs, targets in batches.epoch(None):
                self.kept.append((inputs[:examples], targets[:examples]))
                examples -= len(targets)
                if examples <= 0 or len(self.kept) >= n:
                    break

    def __len__(self):
        return len(self.kept)

    def epoch(self, generator):
        yield from self.kept


@dataclass(frozen=True)
class Task:
    """Data and loss for a method.

    train          batches to train on, or None where the method may only calibrate
    held_out       batches for choices (sensitivity, rates); never trained on
    loss           (outputs, targets) -> scalar
    device         where batches and model live while training and scoring
    autocast       torch.bfloat16 to train under autocast, or None for float32
    channels_last  train 4-d tensors in channels_last memory
    calibration    the training inputs for methods that may only calibrate: plain and in order from epoch(None), as in
                   training from epoch(generator) where they can be; None: `train`
    """

    train: Batches | None
    held_out: Batches
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    autocast: torch.dtype | None = None
    channels_last: bool = False
    calibration: Batches | None = None

    def __post_init__(self):
        object.__setattr__(self, "device", torch.device(self.device))

    @classmethod
    def from_loader(cls, train: Iterable[Batch], held_out: Iterable[Batch],
                    calibration: Iterable[Batch] | None = None, **fields) -> "Task":
        """A task from data loaders that yield (inputs, targets); `calibration` without augmentation."""
        plain = None if calibration is None else LoaderBatches(calibration)
        return cls(LoaderBatches(train), LoaderBatches(held_out), calibration=plain, **fields)

    def calibration_inputs(self, n: int) -> Tensor:
        """`n` training inputs without augmentation, in fixed order (fewer if the set is smaller)."""
        with _fixed_order():
            return _first_inputs(self.calibration if self.calibration is not None else self.train, n, None)

    def training_inputs(self, n: int, generator: torch.Generator) -> Tensor:
        """`n` training inputs, shuffled and augmented by `generator` as in training (fewer if the set is smaller).

        What batch norm is estimated on. Plain where the task only has a loader that yields plain ones.
        """
        seed = int(torch.randint(2**62, (), generator=generator))
        with _fixed_order(seed):
            source = self.train if self.train is not None else self.calibration
            return _first_inputs(source, n, torch.Generator().manual_seed(seed))

    def placed(self, model: nn.Module) -> nn.Module:
        """`model` moved (in place) to the task's device and memory format."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return model.to(self.device, memory_format=layout)

    def placed_batch(self, batch: Batch) -> Batch:
        inputs, targets = (part.to(self.device, non_blocking=True) for part in batch)
        if self.channels_last and inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return inputs, targets

    def precision(self) -> contextlib.AbstractContextManager:
        """The autocast context for forward passes while training."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def score(self, model: nn.Module) -> float:
        """Top-1 on the held-out batches, in percent, in float32."""
        with _fixed_order():
            return top1(model, (self.placed_batch(batch) for batch in self.held_out.epoch(None)))


def _first_inputs(source: Batches | None, n: int, generator: torch.Generator | None) -> Tensor:
    """The first `n` inputs of an epoch."""
    if source is None:
        raise CompressError("this task holds no data to calibrate on")
    if n < 1:
        raise ConfigError(f"calibration inputs = {n}: at least 1 is needed")
    found, count = [], 0
    for inputs, _ in source.epoch(generator):
        found.append(inputs[:n - count])
        count += len(found[-1])
        if count >= n:
            break
    if count == 0:
        raise CompressError("there is nothing to calibrate on: the data set is empty")
    return torch.cat(found)


@contextlib.contextmanager
def _fixed_order(seed: int = 0):
    """torch's global generator (CPU) seeded inside, restored outside: a user's DataLoader shuffles with it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@torch.no_grad()
def top1(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Percent of targets that are the arg-max of the model's outputs, in eval mode (restored afterwards)."""
    was_training, right, seen = model.training, 0, 0
    model.eval()
    for inputs, targets in batches:
        right += int((model(inputs).argmax(1) == targets).sum())
        seen += len(targets)
    model.train(was_training)
    if seen == 0:
        raise CompressError("there is nothing to score: the data set is empty")
    return 100.0 * right / seen
