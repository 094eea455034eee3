"""The prune stage: when masks are chosen anew, and what trains between."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..core.fit.criteria import choose
from ..core.fit.schedules import density_at, find_schedule
from ..core.train.finetune import train
from ..core.train.hooks import Hooks
from ..core.train.recipe import Recipe
from ..core.train.run import Run
from ..core.train.task import Task
from .dressed import Dressed
from .scores import Scores, Units, look
from .settings import Prune


class Masks:
    """The masks of a stage, from scores and the density that the schedule says."""

    def __init__(self, dressed: Dressed, units: Units, scores: Scores, densities: Mapping[str, float], schedule: str,
                 scope: str, updates: int, floor: float = 0.0):
        self.dressed, self.units, self.scores = dressed, units, scores
        self.densities, self.schedule, self.scope, self.updates = densities, schedule, scope, updates
        self.floor = floor
        self.kept: dict[str, Tensor] = {}

    def update(self, t: int) -> None:
        """The t-th of `updates` choices; in rounds, what was pruned stays pruned."""
        goals = {name: density_at(self.schedule, d, t, self.updates) for name, d in self.densities.items()}
        scores = self.units.gather(self.scores.now())
        if find_schedule(self.schedule).rounds:
            scores = {name: s.masked_fill(~self.kept[name].to(s.device), -torch.inf) if name in self.kept else s
                      for name, s in scores.items()}
        self.kept = choose(scores, goals, self.scope, self.floor)
        self.dressed.set_masks(self.units.spread(self.kept))
        self.scores.clear()
        if t == self.updates:
            self.scores.stop()

    def shuffle(self, generator: torch.Generator) -> None:
        """As many units of each mask, drawn at random."""
        self.kept = {name: mask.flatten()[torch.randperm(mask.numel(), generator=generator).to(mask.device)
                                          ].reshape(mask.shape) for name, mask in self.kept.items()}
        self.dressed.set_masks(self.units.spread(self.kept))


class While(Hooks):
    """Masks chosen every `interval` steps of one training."""

    def __init__(self, masks: Masks, interval: int):
        self.masks, self.interval, self.step = masks, interval, 0

    def after_step(self, model: nn.Module, lr: float) -> None:
        self.step += 1
        t, left = divmod(self.step, self.interval)
        if left == 0 and t <= self.masks.updates:
            self.masks.update(t)

    def state(self) -> dict:
        return {"step": self.step}

    def restore(self, state: dict) -> None:
        self.step = state["step"]
        if self.step >= self.interval * self.masks.updates:
            self.masks.scores.stop()


class Rewind(Hooks):
    """Parameters and statistics as they were after `step` steps of the first training; masks and grids are not wound.

    0 is before it.
    """

    def __init__(self, model: nn.Module, step: int):
        self.step, self.seen = step, 0
        self.values = self._copy(model)

    @staticmethod
    def _copy(model: nn.Module) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in model.state_dict().items()
                if isinstance(value, Tensor) and not ("parametrizations." in name and (
                    name.endswith(".mask") or ".quantizer." in name))}

    def after_step(self, model: nn.Module, lr: float) -> None:
        self.seen += 1
        if self.seen == self.step:
            self.values = self._copy(model)

    def wind(self, model: nn.Module) -> None:
        model.load_state_dict(self.values, strict=False)

    def state(self) -> dict:
        return {"seen": self.seen, "values": self.values}

    def restore(self, state: dict) -> None:
        self.seen, self.values = state["seen"], state["values"]


def interval_of(recipe: Recipe, steps: int, updates: int, until: float) -> int:
    """Steps from one choice of masks to the next; ConfigError where the training has too few."""
    available = int(until * recipe.epochs * steps)
    if recipe.epochs > 0 and available < updates:
        raise ConfigError(f"updates = {updates}: the first {until:.0%} of prune.recipe are {available} steps; allowed "
                          "are fewer updates, more epochs or a later until")
    return max(available // updates, 1)


@dataclass(frozen=True, eq=False)
class Pruning:
    """One prune stage at work: `settings` on `model`, in place.

    anew  {name: value} of the undressed network with other initial weights, for the control
    """

    model: nn.Module
    task: Task
    masks: Masks
    settings: Prune
    generator: torch.Generator
    run: Run
    anew: Mapping[str, Tensor]

    def train(self, recipe: Recipe, name: str, *hooks: Hooks) -> None:
        train(self.model, self.task, recipe, self.generator, hooks=[self.masks.dressed, *hooks],
              run=self.run.stage(name))

    def update(self, t: int) -> None:
        """Masks between trainings."""
        if not self.masks.scores.ready():
            look(self.model, self.task, self.settings.score_batches, self.generator, self.masks.scores)
        self.masks.update(t)

    def once(self) -> None:
        if self.settings.before is not None:
            self.train(self.settings.before, "before pruning", self.masks.scores)
        self.update(1)
        if self.settings.recipe is not None:
            self.train(self.settings.recipe, "prune")

    def gradually(self) -> None:
        recipe = self.settings.recipe
        if recipe.epochs == 0:
            self.update(self.masks.updates)
            return
        interval = interval_of(recipe, len(self.task.train), self.masks.updates, self.settings.until)
        self.train(recipe, "prune", self.masks.scores, While(self.masks, interval))

    def in_rounds(self) -> None:
        for t in range(1, self.masks.updates + 1):
            self.update(t)
            self.train(self.settings.recipe, f"prune {t}", *([self.masks.scores] if t < self.masks.updates else []))

    def lottery(self) -> None:
        rewind = Rewind(self.model, self.settings.rewind)
        for t in range(1, self.masks.updates + 1):
            self.train(self.settings.recipe, f"prune {t}", self.masks.scores, *([rewind] if t == 1 else []))
            self.update(t)
            rewind.wind(self.model)
        CONTROLLED[self.settings.control](self)
        self.train(self.settings.recipe, "ticket")

    def reinitialise(self) -> None:
        """Other initial weights and statistics, under the same masks."""
        there = self.model.state_dict()
        for name, value in self.anew.items():
            if not isinstance(value, Tensor):  # a module's own extra state
                continue
            path, _, attribute = name.rpartition(".")
            master = ".".join([*([path] if path else []), "parametrizations", attribute, "original"])
            there[name if name in there else master].copy_(value)


RUNS: dict[str, Callable[[Pruning], None]] = {"one_shot": Pruning.once, "linear": Pruning.gradually,
                                              "agp": Pruning.gradually, "geometric": Pruning.in_rounds,
                                              "lottery": Pruning.lottery}


CONTROLLED: dict[str, Callable[[Pruning], None]] = {
    "none": lambda pruning: None, "reinitialised": Pruning.reinitialise,
    "shuffled": lambda pruning: pruning.masks.shuffle(pruning.generator)}


@torch.no_grad()
def started_anew(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy of `model` with the initial weights that its modules draw; frozen parameters stay as they are."""
    model = copy.deepcopy(model)
    drawn = copy.deepcopy(model).cpu()  # wherever the network lies, the seed says what is drawn
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for module in drawn.modules():
            for reset in ("reset_parameters", "_reset_parameters"):
                if hasattr(module, reset):
                    getattr(module, reset)()
    frozen = {name for name, value in model.named_parameters(remove_duplicate=False) if not value.requires_grad}
    model.load_state_dict({name: value for name, value in drawn.state_dict().items() if name not in frozen},
                          strict=False)
    return model
