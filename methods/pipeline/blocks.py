"""The prune stage of whole residual blocks: which ones can go, which go, and what trains between."""

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import CompressError, ConfigError
from ..core.graph.residual import find_blocks
from ..core.graph.weights import weight_layers
from ..core.train.finetune import train
from ..core.train.loaders import call, cut, first_batch, fixed_order
from ..core.train.metric import evaluating
from ..core.train.recipe import Recipe
from ..core.train.run import Run
from ..core.train.start import recipes_of
from ..core.train.task import Task
from .dressed import Dressed
from .settings import Config, Prune

Step = tuple[str, float | None]  # (block, held-out loss without it and those before it)
Course = tuple[Step, ...]


def removable(model: nn.Module, layers: Collection[str], config: Config) -> list[str]:
    """The residual blocks that can go: of chosen `layers` alone, and without a layer that a recipe links to a teacher.

    CompressError where there is none, ConfigError where more are to go.
    """
    linked = [name for recipe in recipes_of(config) if recipe.distill is not None for link in recipe.distill.links
              for name in link.names()[0]]
    kept = [*linked, *(name for name in weight_layers(model) if name not in layers)]
    blocks = [path for path in find_blocks(model) if not any(_within(name, path) for name in kept)]
    _check_count(blocks, config.prune.blocks)
    return blocks


def of_equal_shape(model: nn.Module, task: Task, blocks: list[str], count: int) -> list[str]:
    """Those of `blocks` that are given one tensor alone and return one of its shape; errors as of `removable`.

    All of them where the task has no held-out batch to see it on.
    """
    batch = first_batch(task.held_out)
    if batch is None:
        return blocks
    fits: dict[str, bool] = {}

    def see(path: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(output, Tensor)
        fits[path] = fits.get(path, True) and alone and args[0].shape == output.shape

    hooks = [model.get_submodule(path).register_forward_hook(partial(see, path), with_kwargs=True) for path in blocks]
    task = task.suited_to(model)
    task.placed(model)
    with torch.no_grad(), evaluating(model), fixed_order():
        call(model, cut(task.placed_batch(batch)[0], 2))
    for hook in hooks:
        hook.remove()
    found = [path for path in blocks if fits.get(path, False)]
    _check_count(found, count)
    return found


def _check_count(blocks: list[str], count: int) -> None:
    if not blocks:
        raise CompressError("the network has no residual block that could go: one with the identity as its shortcut, "
                            "whose layers are not left alone and not linked to a teacher")
    if count > len(blocks):
        raise ConfigError(f"blocks = {count}: at most {len(blocks)} blocks can go, {', '.join(blocks)}")


def _within(name: str, path: str) -> bool:
    return f"{name}.".startswith(f"{path}.")


class BlockPruning:
    """One prune stage at work: `settings.blocks` of `blocks` leave `model`, in place."""

    def __init__(self, model: nn.Module, task: Task | None, dressed: Dressed, blocks: list[str], settings: Prune,
                 generator: torch.Generator, run: Run):
        self.model, self.task, self.dressed, self.settings = model, task, dressed, settings
        self.generator, self.run, self.left = generator, run, blocks
        self.course: Course = ()
        if settings.criterion == "random":
            self.left = [blocks[i] for i in torch.randperm(len(blocks), generator=generator)]
        self.choose: Callable[[], Step] = {"loss": self.least, "random": lambda: (self.left[0], None)}[
            settings.criterion]

    def __call__(self) -> Course:
        settings = self.settings
        if settings.before is not None:
            self.train(settings.before, "before pruning")
        if settings.schedule == "one_shot":
            self.remove(settings.blocks)
            if settings.recipe is not None:
                self.train(settings.recipe, "prune")
            return self.course
        for t in range(1, settings.updates + 1):  # equally many in every round
            self.remove(-(-settings.blocks * t // settings.updates))
            self.train(settings.recipe, f"prune {t}")
        return self.course

    def train(self, recipe: Recipe, name: str) -> None:
        train(self.model, self.task, recipe, self.generator, hooks=self.dressed, run=self.run.stage(name))

    def remove(self, count: int) -> None:
        """Blocks go until `count` have gone; `run` knows each choice."""
        log = self.run.stage("blocks")
        saved = log.load()
        known: Course = () if saved is None else tuple(map(tuple, saved["course"]))
        while len(self.course) < count:
            new = len(self.course) >= len(known)
            path, loss = self.choose() if new else known[len(self.course)]
            self.model.set_submodule(path, nn.Identity())
            self.dressed.forget(path)
            self.left = [other for other in self.left if other != path]
            self.course = (*self.course, (path, loss))
            if new:
                log.save({"course": [list(step) for step in self.course]})

    def least(self) -> Step:
        """The block without which the held-out loss is least; of equal ones the first."""
        task, found = replace(self.task, metric=None), []
        task.placed(self.model)
        for path in self.left:
            block = self.model.get_submodule(path)
            self.model.set_submodule(path, nn.Identity())
            loss = task.error(self.model)
            self.model.set_submodule(path, block)
            found.append((path, math.inf if math.isnan(loss) else loss))
        return min(found, key=lambda step: step[1])
