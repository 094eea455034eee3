"""The inner method: what it gets to see, its share of the budget, and its result as one of the whole network."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .. import data_of, find_method
from ..core.artifact import CompressedModel
from ..core.budget import OTHERS, Budget
from ..core.file.storage import file_bytes
from ..core.fit.size import any_ranges, compress_to_size, untrained
from ..core.graph.build import assemble, float_bytes
from ..core.train.run import NullRun, Run
from ..core.train.task import Task
from .settings import Inner
from .space import Point, Space

SLACK = 8  # bytes by which a compressed header may differ from another's


@dataclass(frozen=True, eq=False)
class Handing:
    """How networks of a space are handed on: `budget` is the outer one, `task` the outer one with its teacher, `whole`
    the float32 bytes of the network that is searched."""

    space: Space
    inner: Inner
    task: Task
    budget: Budget
    whole: int

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
        found = compress_to_size(method, network, task, self.budget_at(point, network), config, generator, run=run,
                                 finish=self.ranged)
        return self.of_the_whole(found, point)

    def of_the_whole(self, found: CompressedModel, point: Point) -> CompressedModel:
        """What was made of the network at `point` as one of the whole network, whose channels are removed."""
        widths = self.space.channels.widths(self.space.kept(point)) | dict(found.topology.widths)
        gone = tuple(f"{path}." for path in (*found.topology.folded.values(), *found.topology.removed))
        kept = {name: width for name, width in widths.items() if not f"{name}.".startswith(gone)}
        return replace(found, topology=replace(found.topology, widths=kept))

    def budget_at(self, point: Point, network: nn.Module) -> Budget:
        """The budget without the limits of the search, with the bits that it chose, and the size of the file."""
        bits, size = self.budget.bits, self.inner.size_ratio
        if self.space.bit_dims:
            bits = {OTHERS: None, **self.space.bits_at(point)}
        if size is not None:
            plain = assemble(network, {})
            more = file_bytes(self.of_the_whole(plain, point)) - file_bytes(plain) + SLACK  # the widths, in the header
            size = min(max(size * self.whole - more, 1.0) / float_bytes(network), 1.0)
        return replace(self.budget, mac_ratio=None, bop_ratio=None, size_ratio=size, bits=bits)

    def ranged(self, made: CompressedModel) -> CompressedModel:
        """A result with ranges of activations, of 8 bits, where the caller is still to choose them."""
        return made if made.activations else replace(made, activations=any_ranges(self.space.graph, 8))
