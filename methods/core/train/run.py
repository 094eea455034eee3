"""The side channel of a long computation: progress out, and state that survives an interruption."""

from typing import Any, Protocol


class Run(Protocol):
    """What a caller may hand to `compress` and `train`; it never changes a result."""

    def report(self, step: int, total: int, **metrics: float) -> None:
        """Say that `step` of `total` is done."""

    def save(self, state: dict[str, Any]) -> None:
        """Keep `state` (tensors and plain values) so that `load` of an equal run returns it."""

    def load(self) -> dict[str, Any] | None:
        """The last state saved under this run, or None."""

    def stage(self, name: str) -> "Run":
        """A run of its own for one part of the computation; equal names resume from equal states."""


class NullRun:
    """Reports to nobody and remembers nothing."""

    def report(self, step, total, **metrics):
        pass

    def save(self, state):
        pass

    def load(self):
        return None

    def stage(self, name):
        return self
