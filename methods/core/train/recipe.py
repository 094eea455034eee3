"""How to train: schedules, optimizers, and the recipe that names them."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import ConfigError
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


@dataclass(frozen=True)
class Recipe:
    """How to train. Weight decay acts on tensors of two or more dimensions (not on biases or batch norm).

    optimizer "muon" is Muon for convolutions and SGD for the rest (core/train/muon.py); lr is SGD's.
    lr is the peak of the schedule; warmup is the fraction of all steps that rises to it; ema is the decay of
    an exponential moving average of parameters and statistics that replaces them at the end (0 = off).
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

    def __post_init__(self):
        for name, allowed in (("schedule", SCHEDULES), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} = {getattr(self, name)!r}: allowed are {', '.join(allowed)}")
        if self.epochs < 0 or not self.lr > 0 or not 0 <= self.warmup < 1 or not 0 <= self.ema < 1:
            raise ConfigError(f"not a recipe: {self} (epochs >= 0, lr > 0, warmup and ema in [0, 1))")
        if not self.weight_decay >= 0 or not 0 <= self.momentum < 1 or not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"not a recipe: {self} (weight_decay >= 0, momentum and label_smoothing in [0, 1))")


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: with decay (two or more dimensions) and without."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ConfigError("no parameter of the network requires a gradient: there is nothing to train")
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
