"""How to train: schedules, optimizers, and the recipe that names them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import ConfigError
from ..typed import check_types
from .muon import with_muon


def _one_cycle(progress: float, warmup: float) -> float:
    """Linear up to 1 over `warmup`, then linear down to 0 (Smith 2018, without the final annihilation)."""
    return progress / warmup if progress < warmup else (1 - progress) / (1 - warmup)


def _cosine(progress: float, warmup: float) -> float:
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def _step(progress: float, warmup: float) -> float:
    if progress < warmup:
        return progress / warmup
    return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda progress, warmup: min(1.0, progress / warmup) if warmup else 1.0,
    "one_cycle": _one_cycle,
    "cosine": _cosine,
    "step": _step,
}
OPTIMIZERS: dict[str, Callable[[list[dict], "Recipe"], list[torch.optim.Optimizer]]] = {
    "sgd": lambda groups, r: [torch.optim.SGD(groups, lr=r.lr, momentum=r.momentum, nesterov=r.momentum > 0)],
    "adam": lambda groups, r: [torch.optim.Adam(groups, lr=r.lr)],
    "muon": lambda groups, r: with_muon(groups, r.lr, r.momentum),
}
LINKS = ("mse", "kl", "fitnet", "fsp", "dynamic", "adaptive1d")


@dataclass(frozen=True)
class Link:
    """A feature loss between a layer of the student and one of the teacher (see `distill.py` for the kinds).

    student, teacher  module names, () the same as the student's; two of each for "fsp"; several teachers for "dynamic"
    distance          of "dynamic" and "adaptive1d": "mse" or "kl"
    """

    student: str | tuple[str, ...]
    teacher: str | tuple[str, ...] = ()
    kind: str = "mse"
    weight: float = 1.0
    distance: str = "mse"

    def __post_init__(self):
        check_types(self)
        for name, allowed in (("kind", LINKS), ("distance", ("mse", "kl"))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"link {name} = {getattr(self, name)!r}: allowed are {', '.join(allowed)}")
        (pupils, teachers), wanted = self.names(), 2 if self.kind == "fsp" else 1
        fits = len(pupils) == wanted and (len(teachers) == wanted or self.kind == "dynamic")
        if not fits or not 0 < self.weight < math.inf:
            raise ConfigError(f"not a link: {self} (weight above 0; {self.kind} takes {wanted} layers of each network"
                              f"{', of the teacher any number' if self.kind == 'dynamic' else ''})")

    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Layers of the student and of the teacher."""
        pupils, teachers = ((part,) if isinstance(part, str) else tuple(part) for part in (self.student, self.teacher))
        return pupils, teachers if teachers else pupils


@dataclass(frozen=True)
class Distill:
    """How a training listens to a teacher: alpha hard loss + (1 - alpha) soft loss + sum of links (`distill.py`).

    temperature, alpha  T, and the weight of the task's own loss; alpha = 1 leaves the links alone, and without links
                        the plain loss: the teacher is not asked
    soft                "kl": T^2 KL of softened class probabilities; "mse": of outputs, for networks without classes
    links               feature losses between layers
    """

    temperature: float = 4.0
    alpha: float = 0.1
    soft: str = "kl"
    links: tuple[Link, ...] = ()

    def __post_init__(self):
        check_types(self)
        if not 0 < self.temperature < math.inf or not 0 <= self.alpha <= 1:
            raise ConfigError(f"temperature = {self.temperature}, alpha = {self.alpha}: allowed are a number above 0 "
                              "and one in [0, 1]")
        if self.soft not in ("kl", "mse"):
            raise ConfigError(f"soft = {self.soft!r}: allowed are kl, mse")
        object.__setattr__(self, "links", tuple(self.links))

    @property
    def listens(self) -> bool:
        """Whether the teacher is in the loss at all."""
        return self.alpha < 1 or bool(self.links)


@dataclass(frozen=True)
class Recipe:
    """How to train. Weight decay acts on tensors of two or more dimensions (not on biases or batch norm).

    optimizer "muon" is Muon for convolutions and SGD for the rest (core/train/muon.py); lr is SGD's.
    lr is the peak of the schedule; warmup is the fraction of all steps that rises to it; ema is the decay of
    an exponential moving average of parameters and statistics that replaces them at the end (0 = off).
    distill: learn from a teacher too, which is the network that `compress` is given unless the task names another.
    """

    epochs: int
    lr: float
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    warmup: float = 0.0
    label_smoothing: float = 0.0
    ema: float = 0.0
    distill: Distill | None = field(default=None, metadata={"knob": False})  # any method's: none of its own knobs

    def __post_init__(self):
        check_types(self)
        for name, allowed in (("schedule", SCHEDULES), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} = {getattr(self, name)!r}: allowed are {', '.join(allowed)}")
        share = "a number in [0, 1)"
        for name, fits, allowed in (("epochs", self.epochs >= 0, "0 or more"), ("lr", self.lr > 0, "above 0"),
                                    ("weight_decay", self.weight_decay >= 0, "0 or more"),
                                    *((name, 0 <= getattr(self, name) < 1, share)
                                      for name in ("warmup", "ema", "momentum", "label_smoothing"))):
            if not fits:
                raise ConfigError(f"{name} = {getattr(self, name)}: allowed is {allowed}")


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: with decay (two or more dimensions) and without."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ConfigError("no parameter of the network requires a gradient: there is nothing to train")
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
