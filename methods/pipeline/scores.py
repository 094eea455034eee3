"""What the criteria see while a network trains, and for what masks are chosen: weights, or groups of channels."""

from itertools import islice

import torch
from torch import Tensor, nn

from ..core.fit.criteria import CRITERIA, per_channel, score_weight
from ..core.graph.coupled import Group
from ..core.train.hooks import Hooks
from ..core.train.loaders import call, fixed_order
from ..core.train.metric import evaluating
from ..core.train.task import Task
from .dressed import Dressed


class Units:
    """What is kept or pruned as one: with groups, sets of channels, otherwise single weights of each layer.

    groups  {name: Group} whose layers share masks, or None
    """

    def __init__(self, layers: list[str], groups: dict[str, Group] | None):
        self.groups = groups
        self.layers = layers if groups is None else [name for group in groups.values() for name in group.members]

    def gather(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scores of units: a group's are the mean of those of its channels."""
        if self.groups is None:
            return scores
        found = {}
        for name, group in self.groups.items():
            total, count = torch.zeros(2, group.size, dtype=torch.float64)
            for layer, places in group.members.items():
                total.index_add_(0, places, scores[layer].double().cpu())
                count.index_add_(0, places, torch.ones(len(places), dtype=torch.float64))
            found[name] = total / count
        return found

    def spread(self, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        """Masks of layers, from those of (some) units: [C_out] for channels."""
        if self.groups is None:
            return masks
        return {layer: mask[places] for name, mask in masks.items()
                for layer, places in self.groups[name].members.items()}


class Scores(Hooks):
    """Scores of criteria that see weights or nothing; `now` is {layer: like its weight, or [C_out]}."""

    def __init__(self, criterion: str, granularity: str, dressed: Dressed, layers: list[str],
                 generator: torch.Generator):
        self.criterion, self.channels = criterion, granularity == "channel"
        self.dressed, self.layers = dressed, layers
        self.drawn = {name: self._draw(name, generator) for name in layers} if criterion == "random" else {}

    def _draw(self, name: str, generator: torch.Generator) -> Tensor:
        shape = self.dressed.master(name).shape
        return torch.rand(shape[:1] if self.channels else shape, generator=generator)

    def now(self) -> dict[str, Tensor]:
        if self.drawn:
            return self.drawn
        return {name: score_weight(self.criterion, self.dressed.master(name)) for name in self.layers}

    def ready(self) -> bool:
        """Whether there is something to rank by."""
        return True

    def clear(self) -> None:
        """Masks were chosen: begin anew."""

    def stop(self) -> None:
        """The last masks were chosen."""


class Norms(Scores):
    """slim: |gamma|, which a penalty lam sum |gamma| makes small in training. norms {layer: batch norm}"""

    def __init__(self, dressed: Dressed, layers: list[str], norms: dict[str, nn.Module], penalty: float):
        self.layers, self.norms, self.penalty = layers, norms, penalty

    def loss(self, model: nn.Module, loss: Tensor) -> Tensor:
        return loss + self.penalty * sum(norm.weight.abs().sum() for norm in self.norms.values())

    def now(self) -> dict[str, Tensor]:
        return {name: norm.parametrizations["weight"].original.detach().abs() for name, norm in self.norms.items()}

    def stop(self) -> None:
        self.penalty = 0.0


class Gradients(Scores):
    """taylor and movement: sums over the batches since the last masks (taylor), or since the beginning (movement)."""

    def __init__(self, criterion: str, granularity: str, dressed: Dressed, layers: list[str]):
        self.criterion, self.channels, self.dressed, self.layers = criterion, granularity == "channel", dressed, layers
        self.sums: dict[str, Tensor] = {}
        self.batches = 0
        self._watch(True)

    def _watch(self, on: bool) -> None:
        for name in self.layers:
            self.dressed.coats[name].watched = on

    @torch.no_grad()
    def after_backward(self, model: nn.Module, lr: float) -> None:
        for name in self.layers:
            coat = self.dressed.coats[name]
            gradient, coat.gradient = coat.gradient, None
            if gradient is None:
                continue
            if self.criterion == "taylor":
                seen = (gradient * self.dressed.used(name)).square()
            else:
                seen = -gradient * self.dressed.master(name)
            seen = per_channel(seen) if self.channels else seen
            self.sums[name] = self.sums[name].to(seen.device) + seen if name in self.sums else seen
        self.batches += 1

    def now(self) -> dict[str, Tensor]:
        zeros = {name: torch.zeros_like(self.dressed.master(name)) for name in self.layers}
        zeros = {name: per_channel(zero) if self.channels else zero for name, zero in zeros.items()}
        return {name: self.sums.get(name, zeros[name]) / max(self.batches, 1) for name in self.layers}

    def ready(self) -> bool:
        return self.batches > 0

    def clear(self) -> None:
        if self.criterion == "taylor":
            self.sums, self.batches = {}, 0

    def stop(self) -> None:
        self._watch(False)

    def state(self) -> dict:
        return {"sums": dict(self.sums), "batches": self.batches}

    def restore(self, state: dict) -> None:
        self.sums, self.batches = dict(state["sums"]), state["batches"]


def make_scores(criterion: str, granularity: str, dressed: Dressed, layers: list[str], norms: dict[str, nn.Module],
                penalty: float, generator: torch.Generator) -> Scores:
    """What the criterion sees."""
    if CRITERIA[criterion].sees == "norms":
        return Norms(dressed, layers, {name: norms[name] for name in layers}, penalty)
    if CRITERIA[criterion].sees == "gradients":
        return Gradients(criterion, granularity, dressed, layers)
    return Scores(criterion, granularity, dressed, layers, generator)


def look(model: nn.Module, task: Task, batches: int, generator: torch.Generator, scores: Scores) -> None:
    """Gradients of `batches` training batches at the weights as they are, in eval mode, for the scores."""
    seed = int(torch.randint(2**62, (), generator=generator))
    task = task.suited_to(model)
    task.placed(model)
    with evaluating(model), fixed_order(seed), torch.enable_grad():
        for batch in islice(task.train.epoch(torch.Generator().manual_seed(seed)), batches):
            inputs, targets = task.placed_batch(batch)
            task.loss(call(model, inputs), targets, inputs).backward()
            scores.after_backward(model, 0.0)
            model.zero_grad(set_to_none=True)
