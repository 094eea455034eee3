"""Batches as people's loaders give them: read, described, moved, cut and handed to a network."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError

Batch = tuple[Any, Any]  # (inputs, targets): tensors, or tuples, lists and dicts of tensors
Unpack = Callable[[Any], Batch]


class Batches(Protocol):
    """A data set in batches (inputs, targets), usually (float32 [N, ...], int64 [N])."""

    def __len__(self) -> int:
        """Batches per epoch."""

    def epoch(self, generator: torch.Generator | None) -> Iterator[Batch]:
        """One pass; shuffled and augmented with `generator`, or in fixed order and plain if it is None."""


class LoaderBatches:
    """A user's DataLoader (or any iterable of batches) as `Batches`; its own shuffling applies.

    unpack  from what the loader yields to (inputs, targets); None: it yields two such parts
    steps   batches of one pass over a loader that has no length
    ConfigError where a loader has no length and `steps` is not given, and for a batch that cannot be read.
    """

    def __init__(self, loader: Iterable, unpack: Unpack | None = None, steps: int | None = None):
        self.loader, self.unpack = loader, unpack
        try:
            self.steps = len(loader)
        except TypeError:  # an IterableDataset, a generator
            if steps is None or steps < 1:
                raise ConfigError(f"a {type(loader).__name__} without a length needs steps, the batches of one pass, "
                                  f"1 or more; steps = {steps}") from None
            self.steps = steps

    def __len__(self):
        return self.steps

    def epoch(self, generator):
        for _, batch in zip(range(self.steps), self.loader, strict=False):
            yield read_batch(batch, self.unpack)


class InputBatches(LoaderBatches):
    """A user's loader of inputs without labels as `Batches`: its targets are None, for none are read.

    loader  may be all inputs in one tensor or array
    unpack  from what the loader yields to inputs, or to (inputs, what is not read)
    """

    def __init__(self, loader: Iterable | Tensor | np.ndarray, unpack: Unpack | None = None, steps: int | None = None):
        super().__init__([loader] if isinstance(loader, (Tensor, np.ndarray)) else loader, unpack, steps)

    def epoch(self, generator):
        for _, batch in zip(range(self.steps), self.loader, strict=False):
            yield read_inputs(batch, self.unpack), None


def read_inputs(batch: Any, unpack: Callable[[Any], Any] | None = None) -> Any:
    """The inputs of a loader's batch: a tensor or an array, or the first part of a tuple or a list; as float32."""
    batch = _unpacked(batch, unpack)
    inputs = _tensors(batch[0] if isinstance(batch, (tuple, list)) and batch else batch)
    if not isinstance(inputs, Tensor):
        what = "a batch of inputs must be" if unpack is None else "unpack must return"
        raise ConfigError(f"{what} a tensor, or a tuple whose first part is one, not {describe(batch)}")
    return _float32(inputs)


def read_batch(batch: Any, unpack: Unpack | None = None) -> Batch:
    """(inputs, targets) of a loader's batch: arrays as tensors, floats as float32, integers of targets as int64."""
    batch = _unpacked(batch, unpack)
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    inputs, targets = (_tensors(part) for part in batch) if pair else (None, None)
    if not pair or _first_tensor(inputs) is None or _first_tensor(targets) is None:
        what = "unpack must return" if unpack is not None else "a batch must be"
        hint = "" if unpack is not None else "; unpack= takes a function that makes such a pair of it"
        raise ConfigError(f"{what} (inputs, targets), two tensors or nestings of them, not {describe(batch)}{hint}")
    if unpack is None and isinstance(inputs, list):
        inputs = tuple(inputs)  # a DataLoader's collation makes lists of tuples
    return map_tensors(_float32, inputs), map_tensors(_float32_int64, targets)


def _unpacked(batch: Any, unpack: Callable[[Any], Any] | None) -> Any:
    try:
        return batch if unpack is None else unpack(batch)
    except Exception as error:  # noqa: BLE001 - the user's function raises what it likes
        raise ConfigError(f"unpack cannot read {describe(batch)}: {first_line(error)}") from error


def _tensors(part: Any) -> Any:
    """`part` with arrays, and lists of numbers, as tensors."""
    if isinstance(part, Mapping):
        return {key: _tensors(value) for key, value in part.items()}
    if isinstance(part, (list, tuple)) and _numbers(part):
        return torch.from_numpy(np.array(part))
    if isinstance(part, (list, tuple)):
        return type(part)(map(_tensors, part)) if type(part) in (list, tuple) else part
    numeric = isinstance(part, (np.ndarray, np.generic)) and part.dtype.kind in "biuf"
    return torch.as_tensor(part) if numeric else part


def _numbers(part: Any) -> bool:
    """A number, or lists of numbers of one length."""
    if isinstance(part, (list, tuple)):
        lengths = {len(value) if isinstance(value, (list, tuple)) else None for value in part}
        return len(lengths) == 1 and all(map(_numbers, part))
    return isinstance(part, (int, float))


def _float32(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


def _float32_int64(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x if x.is_complex() or x.dtype == torch.bool else x.long()


class First:
    """The first `examples` of a data set, or its first `n` batches, plain; read once: no shuffling changes them."""

    def __init__(self, batches: Batches, *, examples: int = sys.maxsize, n: int = sys.maxsize):
        self.kept: list[Batch] = []
        with fixed_order():
            for batch in batches.epoch(None):
                size = size_of(batch[0])
                self.kept.append(batch if size <= examples else tuple(cut(part, examples) for part in batch))
                examples -= size
                if examples <= 0 or len(self.kept) >= n:
                    break

    def __len__(self):
        return len(self.kept)

    def epoch(self, generator):
        yield from self.kept


class Unlabelled:
    """A data set whose targets are withheld: None."""

    def __init__(self, batches: Batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def epoch(self, generator):
        return ((inputs, None) for inputs, _ in self.batches.epoch(generator))


def first_batch(batches: Batches) -> Batch | None:
    """The first batch of a plain pass; None if there is none."""
    with fixed_order():
        return next(iter(batches.epoch(None)), None)


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """`value`, a nesting of tuples, lists and dicts, with `function` of each tensor in its place."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    return type(value)(map_tensors(function, item) for item in value) if type(value) in (list, tuple) else value


def cut(value: Any, n: int) -> Any:
    """The first `n` examples of inputs or targets."""
    return map_tensors(lambda x: x[:n] if x.ndim else x, value)


def size_of(value: Any) -> int:
    """Examples in inputs or targets: the length of the first tensor in them."""
    found = _first_tensor(value)
    return len(found) if found is not None and found.ndim else 1


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)


def call(model: nn.Module, inputs: Any) -> Any:
    """The model on a batch: a tuple holds several arguments, a dict named ones, all else is one argument."""
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def try_call(model: nn.Module, inputs: Any, what: str) -> Any:
    """The model on a batch; ConfigError in one line where it cannot take the inputs, which `what` names."""
    try:
        return call(model, inputs)
    except Exception as error:  # noqa: BLE001 - a network raises what it likes
        raise ConfigError(f"{type(model).__name__} cannot take the {what}, {describe(inputs)}: "
                          f"{first_line(error)}") from error


@torch.no_grad()
def check_inputs(model: nn.Module, inputs: Any) -> None:
    """ConfigError where `model`, in eval mode, cannot take the first of the calibration inputs."""
    try_call(model, cut(inputs, 1), "calibration inputs")


def describe(value: Any) -> str:
    """What `value` is, in a few words of one line."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {', '.join(map(str, list(value)[:6]))}"
    if isinstance(value, (tuple, list)):
        shown = ", ".join(describe(part) for part in value[:3])
        return f"a {type(value).__name__} of {len(value)} ({shown}{', …' if len(value) > 3 else ''})"
    return f"a {type(value).__name__}"


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def fixed_order(seed: int = 0):
    """torch's global generator (CPU) seeded inside, restored outside: a user's DataLoader shuffles with it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
