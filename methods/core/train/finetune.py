"""The one training loop: methods and the harness's own pre-training use it.

Everything random in an epoch (order, augmentation, dropout) follows from a seed drawn from the generator at
its start, and the state is saved at its end: an interrupted run resumes to the bytes of an uninterrupted one.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ConfigError, TrainingDiverged
from .muon import with_muon
from .run import NullRun, Run
from .task import Batch, Task

CHECK_EVERY = 10  # steps between looks at the loss: each look waits for the device


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

    optimizer "muon" is Muon for convolutions and SGD for the rest (core/muon.py); lr is SGD's.
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


class Hooks:
    """Where a method reaches into the loop. Each does nothing unless overridden."""

    def optimizers(self, model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
        """The optimizers; the schedule scales the learning rate of every group."""
        return OPTIMIZERS[recipe.optimizer](decay_groups(model, recipe.weight_decay), recipe)

    def loss(self, model: nn.Module, loss: Tensor) -> Tensor:
        """The loss to differentiate, given the task's."""
        return loss

    def after_backward(self, model: nn.Module, lr: float) -> None:
        """Gradients are there; the optimizer has not stepped."""

    def after_step(self, model: nn.Module, lr: float) -> None:
        """The optimizer has stepped."""

    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        """An epoch (counted from 0) is over."""

    def state(self) -> dict:
        """What must survive an interruption."""
        return {}

    def restore(self, state: dict) -> None:
        """Take back what `state` returned."""


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: with decay (two or more dimensions) and without."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ConfigError("no parameter of the network requires a gradient: there is nothing to train")
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def check_trainable(task: Task) -> None:
    """ConfigError where there is nothing to train on."""
    if task.train is None:
        raise ConfigError("this task holds no training batches; a method with DATA = 'calibration' cannot train")
    if len(task.train) == 0:
        raise ConfigError("there is nothing to train on: the training set holds no batch")


def train(model: nn.Module, task: Task, recipe: Recipe, generator: torch.Generator, *,
          hooks: Hooks | None = None, run: Run | None = None) -> list[dict[str, float]]:
    """Train `model` in place; returns one {"loss", "train_top1"} per epoch and leaves the model in eval mode.

    Raises TrainingDiverged with the step where the loss stops being finite, or the epoch after which a weight is not.
    """
    hooks = Hooks() if hooks is None else hooks
    run = NullRun() if run is None else run
    check_trainable(task)
    task.placed(model)
    optimizers = hooks.optimizers(model, recipe)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    average = _Average(model, recipe.ema)
    history: list[dict[str, float]] = []
    saved = run.load()
    if saved is not None:
        history = saved["history"]
        model.load_state_dict(saved["model"])
        average.load(saved["average"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        hooks.restore(saved["hooks"])
        generator.set_state(saved["generator"])
    for epoch in range(len(history), recipe.epochs):
        history.append(_epoch(model, task, recipe, generator, epoch, optimizers, peaks, hooks, average, run))
        check_trained(model.state_dict(), f"epoch {epoch + 1} of {recipe.epochs}", recipe.lr)
        hooks.after_epoch(model, epoch)
        run.save({"history": history, "model": model.state_dict(), "average": average.values, "hooks": hooks.state(),
                  "optimizers": [o.state_dict() for o in optimizers], "generator": generator.get_state()})
    average.write(model)
    model.eval()
    return history


def _epoch(model, task, recipe, generator, epoch, optimizers, peaks, hooks, average, run) -> dict[str, float]:
    model.train()
    steps, total = len(task.train), len(task.train) * recipe.epochs
    sums = torch.zeros(3, device=task.device)  # loss, right, seen
    with _seeded(generator, task.device) as batch_generator:
        for i, batch in enumerate(task.train.epoch(batch_generator)):
            step = epoch * steps + i
            # The factor is taken in the middle of the step, so that neither end of the schedule is exactly 0.
            factor = SCHEDULES[recipe.schedule]((step + 0.5) / total, recipe.warmup)
            for optimizer, base in zip(optimizers, peaks, strict=True):
                for group, peak in zip(optimizer.param_groups, base, strict=True):
                    group["lr"] = peak * factor
            outputs, targets, loss, full = training_step(model, task, batch, recipe, factor, optimizers, hooks)
            average.update(model)
            with torch.no_grad():
                right = (outputs.argmax(1) == targets).sum()
                sums += torch.stack([loss.detach() * len(targets), right, torch.full_like(right, len(targets))])
            if step % CHECK_EVERY == 0 or i == steps - 1:
                _report(run, full, sums, step, total, recipe)
    loss_sum, right, seen = sums.tolist()
    return {"loss": loss_sum / seen, "train_top1": 100.0 * right / seen}


def training_step(model: nn.Module, task: Task, batch: Batch, recipe: Recipe, factor: float,
                  optimizers: list[torch.optim.Optimizer], hooks: Hooks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward, backward and update on one batch at `factor` times the peak learning rate, whose groups have it.

    Returns outputs [N, classes], targets [N], the loss, and the loss with what the hooks add.
    """
    inputs, targets = task.placed_batch(batch)
    with task.precision():
        outputs = model(inputs)
    loss = _smoothed(task, outputs.float(), targets, recipe.label_smoothing)
    full = hooks.loss(model, loss)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    full.backward()
    hooks.after_backward(model, recipe.lr * factor)
    for optimizer in optimizers:
        optimizer.step()
    hooks.after_step(model, recipe.lr * factor)
    return outputs, targets, loss, full


def check_trained(state: Mapping[str, Tensor], when: str, lr: float) -> None:
    """TrainingDiverged if `state` is not finite, which a last step may leave behind whose loss still was."""
    for name, values in state.items():
        if not bool(values.isfinite().all()):
            raise TrainingDiverged(f"{name} holds infinite or NaN values after {when}: lower lr ({lr:g})")


def _report(run: Run, full: Tensor, sums: Tensor, step: int, total: int, recipe: Recipe) -> None:
    if not bool(full.detach().isfinite()):
        raise TrainingDiverged(f"the loss is {full.item()} at step {step} of {total} (seen within the last "
                               f"{CHECK_EVERY} steps): lower lr ({recipe.lr:g}) or raise warmup ({recipe.warmup:g})")
    loss_sum, right, seen = sums.tolist()
    run.report(step + 1, total, loss=loss_sum / seen, train_top1=100.0 * right / seen)


def _smoothed(task: Task, outputs: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """The task's loss mixed with the mean negative log-likelihood over classes (Szegedy et al. 2016)."""
    loss = task.loss(outputs, targets)
    if smoothing == 0.0:
        return loss
    return (1 - smoothing) * loss - smoothing * outputs.log_softmax(1).mean()


@contextlib.contextmanager
def _seeded(generator: torch.Generator, device: torch.device):
    """Global random state seeded from `generator` inside, restored outside; yields a generator for batches."""
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)


class _Average:
    """Exponential moving average of the floating-point state, kept only if the decay is not 0."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.values = {k: v.detach().clone() for k, v in self._floats(model).items()} if decay else {}

    @staticmethod
    def _floats(model: nn.Module) -> dict[str, Tensor]:
        return {name: value for name, value in model.state_dict().items() if value.is_floating_point()}

    def load(self, values: dict[str, Tensor]) -> None:
        self.values = {name: value.to(self.values[name].device, copy=True) for name, value in values.items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, value in self._floats(model).items() if self.decay else ():
            self.values[name].lerp_(value, 1 - self.decay)

    @torch.no_grad()
    def write(self, model: nn.Module) -> None:
        for name, value in self._floats(model).items() if self.decay else ():
            value.copy_(self.values[name])
