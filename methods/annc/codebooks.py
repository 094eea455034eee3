"""Weights on codebooks of free values: how the result is stored, and its fine-tuning with fixed zeros and widths."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core.artifact import Codebook, CompressedTensor
from ..core.fit.project import SortedValues, boundaries, nearest
from ..core.graph.weights import Layer, layer_of, place_of
from ..core.train.finetune import Hooks, Recipe, train
from ..core.train.run import Run
from ..core.train.task import Task

REFRESHES, WARM_ITERATIONS = 20, 5  # fine-tuning: codebook refreshes an epoch, k-means iterations in each


def store(weight: Tensor, bits: int, pinned: bool) -> CompressedTensor:
    """`weight` on a fresh codebook of up to 2^bits values, and 0 if `pinned`: the mask says where that is."""
    weight = weight.detach().cpu().contiguous()
    points = SortedValues(weight, pinned).fit(1 << bits)[0].astype(np.float32)
    values = torch.from_numpy(points[points != 0] if pinned else points)
    if len(values) == 0:
        values = torch.ones(1)  # never used: every weight is pruned
    index = nearest(weight, points)
    if not pinned:
        return CompressedTensor.of(index, Codebook(values), bits)
    zero = int(np.flatnonzero(points == 0)[0])
    return CompressedTensor.of(index - (index > zero).long(), Codebook(values), bits, index != zero)


class OnCodebook(nn.Module):
    """Parametrization w -> mask * nearest of `points`, straight-through."""

    def __init__(self, weight: Tensor, bits: int, pinned: bool):
        super().__init__()
        self.pinned, self.k = pinned, 1 << bits
        self.register_buffer("mask", weight.detach() != 0 if pinned else torch.ones_like(weight, dtype=torch.bool))
        self.register_buffer("points", weight.detach().new_zeros(self.k + pinned, dtype=torch.float64))
        self.register_buffer("edges", weight.detach().new_zeros(self.k + pinned - 1))
        self.refresh(weight, None)

    def forward(self, weight: Tensor) -> Tensor:
        near = self.points.float()[torch.bucketize(weight.detach().contiguous(), self.edges, right=True)]
        return (near + (weight - weight.detach())) * self.mask

    @torch.no_grad()
    def refresh(self, weight: Tensor, iterations: int | None) -> None:
        """Fit `points` to `weight`: anew, or by `iterations` from where they are."""
        free = self.points[self.points != 0] if self.pinned else self.points
        warm = {} if iterations is None else {"start": free.cpu().numpy(), "iterations": iterations, "tolerance": 0.0}
        found = SortedValues(weight * self.mask, self.pinned).fit(self.k, **warm)[0]
        found = np.concatenate([found, np.repeat(found[-1:], len(self.points) - len(found))])
        self.points.copy_(torch.from_numpy(found))
        self.edges.copy_(boundaries(found))


class Refresh(Hooks):
    """Warm-started k-means of every layer 20 times an epoch of `steps`, and a longer one between two epochs."""

    def __init__(self, layers: list[Layer], steps: int, epochs: int):
        self.layers, self.epochs, self.every, self.step = layers, epochs, max(steps // REFRESHES, 1), 0

    def after_step(self, model: nn.Module, lr: float) -> None:
        self.step += 1
        if self.step % self.every == 0:
            self.refresh(WARM_ITERATIONS)

    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        self.step = 0
        if epoch + 1 < self.epochs:
            self.refresh(100)

    def refresh(self, iterations: int) -> None:
        for layer in self.layers:
            module, attribute = place_of(layer)
            on_codebook = module.parametrizations[attribute]
            on_codebook[0].refresh(on_codebook.original, iterations)


def finetune(model: nn.Module, task: Task, bits: Mapping[str, int], recipe: Recipe, pinned: bool,
             generator: torch.Generator, run: Run) -> None:
    """Train through the codebooks with zeros and widths fixed; leaves the quantized weights in `model`."""
    layers = [layer_of(model, name) for name in bits]
    for layer, width in zip(layers, bits.values(), strict=True):
        parametrize.register_parametrization(*place_of(layer), OnCodebook(layer.weight, width, pinned))
    train(model, task, recipe, generator, hooks=Refresh(layers, len(task.train), recipe.epochs),
          run=run.stage("finetune"))
    for layer in layers:
        parametrize.remove_parametrizations(*place_of(layer), leave_parametrized=True)
