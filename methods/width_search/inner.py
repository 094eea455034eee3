"""The inner method: what it gets to see, its share of the budget, and its result as one of the whole network."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .. import data_of, find_method
from ..core.artifact import CompressedModel
from ..core.budget import OTHERS, Budget
from ..core.fit.size import untrained
from ..core.train.run import NullRun, Run
from ..core.train.task import Task
from .settings import Inner
from .space import Point, Space


@dataclass(frozen=True, eq=False)
class Handing:
    """How networks of a space are handed on: `budget` is the outer one, `task` the outer one with its teacher."""

    space: Space
    inner: Inner
    task: Task
    budget: Budget

    def compress(self, network: nn.Module, point: Point, generator: torch.Generator, run: Run) -> CompressedModel:
        """`network`, which is at `point`, compressed."""
        return self._call(network, point, self.inner.config, generator, run)

    def cheaply(self, network: nn.Module, point: Point) -> CompressedModel:
        """The same without training; errors that the inner method has to make, it makes here."""
        config = getattr(find_method(self.inner.method), "quick", untrained)(self.inner.config)
        return self._call(network, point, config, torch.Generator().manual_seed(0), NullRun())

    def _call(self, network: nn.Module, point: Point, config: Any, generator: torch.Generator, run: Run
              ) -> CompressedModel:
        method = find_method(self.inner.method)
        task = self.task.seen_as(data_of(method, config))
        found = method.compress(network, task, self.budget_at(point), config, generator, run=run)
        widths = self.space.channels.widths(self.space.kept(point)) | dict(found.topology.widths)
        gone = tuple(f"{path}." for path in (*found.topology.folded.values(), *found.topology.removed))
        kept = {name: width for name, width in widths.items() if not f"{name}.".startswith(gone)}
        return replace(found, topology=replace(found.topology, widths=kept))

    def budget_at(self, point: Point) -> Budget:
        """The budget without the limits of the search, with the bits that it chose."""
        bits = self.budget.bits
        if self.space.bit_dims:
            bits = {OTHERS: None, **self.space.bits_at(point)}
        return replace(self.budget, mac_ratio=None, bop_ratio=None, size_ratio=None, bits=bits)
