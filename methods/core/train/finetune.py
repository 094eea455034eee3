"""The one training loop: methods and the harness's own pre-training use it.

Everything random in an epoch (order, augmentation, dropout) follows from a seed drawn from the generator at
its start, and the state is saved at its end: an interrupted run resumes to the bytes of an uninterrupted one.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, TrainingDiverged
from .average import Average
from .distill import Distillation
from .gradients import gradients
from .hooks import Hooks, as_hooks
from .loaders import Batch, call, map_tensors, size_of
from .loss import smoothed
from .metric import Metric, values_of
from .recipe import SCHEDULES, Recipe, decay_groups
from .run import NullRun, Run
from .single import watching_norms
from .task import Task

__all__ = ["SCHEDULES", "Hooks", "Recipe", "check_trainable", "check_trained", "decay_groups", "train", "training_step"]
CHECK_EVERY = 10  # steps between looks at the loss: each look waits for the device

Objective = Callable[[Any, Any, Any], Tensor]  # (outputs, targets, inputs) -> scalar


def check_trainable(task: Task) -> None:
    """ConfigError where there is nothing to train on."""
    if task.train is None:
        raise ConfigError("this task holds no training batches, and training needs them: "
                          "Task.from_loader(train, held_out)")
    if len(task.train) == 0:
        raise ConfigError("there is nothing to train on: the training set holds no batch")


def train(model: nn.Module, task: Task, recipe: Recipe, generator: torch.Generator, *,
          hooks: Hooks | Sequence[Hooks] | None = None, run: Run | None = None) -> list[dict[str, float]]:
    """Train `model` in place; returns one {"loss", "train_top1"} per epoch and leaves the model in eval mode.

    >>> model = nn.Linear(3, 2)
    >>> task = Task.from_loader([(torch.eye(3), torch.tensor([0, 1, 1]))], [])
    >>> [sorted(epoch) for epoch in train(model, task, Recipe(epochs=1, lr=0.1), torch.Generator())]
    [['loss', 'train_top1']]

    hooks  one or several, called in order
    "train_top1" is there for a classification; another metric of the task stands under "train_" and its name.
    Raises TrainingDiverged with the step where the loss stops being finite, or the epoch after which a weight is not.
    """
    check_trainable(task)
    task = task.suited_to(model)
    task.placed(model)
    objective = smoothed(task.loss, recipe.label_smoothing)
    if recipe.distill is None or not recipe.distill.listens or recipe.epochs == 0:
        with gradients(), watching_norms(model, task.train):
            return _train(model, task, recipe, generator, as_hooks(hooks), objective, run)
    lesson = Distillation(model, task, recipe.distill)
    with gradients(), watching_norms(model, task.train), lesson.watching(model):
        return _train(model, task, recipe, generator, as_hooks(hooks, lesson), lesson.objective(objective), run)


def _train(model, task, recipe, generator, hooks, objective, run) -> list[dict[str, float]]:
    run = NullRun() if run is None else run
    optimizers = hooks.optimizers(model, recipe) + hooks.own_optimizers(model, recipe) if recipe.epochs > 0 else []
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    average = Average(model, recipe.ema)
    history: list[dict[str, float]] = []
    saved = run.load()
    if saved is not None:
        history = saved["history"]
        model.load_state_dict(saved["model"], strict=False)  # a module's own extra state is not saved
        average.load(saved["average"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        hooks.restore(saved["hooks"])
        generator.set_state(saved["generator"])
    for epoch in range(len(history), recipe.epochs):
        history.append(_epoch(model, task, recipe, generator, epoch, optimizers, peaks, hooks, average, objective, run))
        check_trained(model.state_dict(), f"epoch {epoch + 1} of {recipe.epochs}", recipe.lr)
        hooks.after_epoch(model, epoch)
        tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        run.save({"history": history, "model": tensors, "average": average.values, "hooks": hooks.state(),
                  "optimizers": [o.state_dict() for o in optimizers], "generator": generator.get_state()})
    average.write(model)
    model.eval()
    return history


def _epoch(model, task, recipe, generator, epoch, optimizers, peaks, hooks, average, objective, run):
    model.train()
    steps, total = len(task.train), len(task.train) * recipe.epochs
    seen, step = Seen(task), epoch * steps - 1
    with _seeded(generator, task.device) as batch_generator:
        for step, batch in enumerate(islice(task.train.epoch(batch_generator), steps), epoch * steps):
            # The factor is taken in the middle of the step, so that neither end of the schedule is exactly 0.
            factor = SCHEDULES[recipe.schedule]((step + 0.5) / total, recipe.warmup)
            for optimizer, base in zip(optimizers, peaks, strict=True):
                for group, peak in zip(optimizer.param_groups, base, strict=True):
                    group["lr"] = peak * factor
            outputs, batch, loss, full = training_step(model, task, batch, objective, recipe.lr * factor, optimizers,
                                                       hooks)
            average.update(model)
            seen.add(outputs, batch, loss)
            if step % CHECK_EVERY == 0 or step == (epoch + 1) * steps - 1:
                _check_loss(full, step, total, recipe)
                run.report(step + 1, total, **seen.means())
    if step + 1 < (epoch + 1) * steps:
        raise ConfigError(f"the training data gave {step + 1 - epoch * steps} batches in an epoch, of {steps} that "
                          "were announced: they must start anew in every pass, and have as many as their length says")
    return seen.means()


def training_step(model: nn.Module, task: Task, batch: Batch, objective: Objective, lr: float,
                  optimizers: list[torch.optim.Optimizer], hooks: Hooks) -> tuple[Any, Batch, Tensor, Tensor]:
    """Forward, backward and update on one batch; the optimizers' groups have their learning rates, `lr` the hooks'.

    Returns the outputs in float32, the batch where it was placed, the loss, and the loss with what the hooks add.
    """
    inputs, targets = task.placed_batch(batch)
    with task.precision():
        outputs = call(model, inputs)
    outputs = map_tensors(lambda x: x.float() if x.is_floating_point() else x, outputs)
    loss = objective(outputs, targets, inputs)
    full = hooks.loss(model, loss)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    full.backward()
    hooks.after_backward(model, lr)
    for optimizer in optimizers:
        optimizer.step()
    hooks.after_step(model, lr)
    return outputs, (inputs, targets), loss, full


class Seen:
    """Means of the loss, and of the task's metric if there is one, over the examples of an epoch so far."""

    def __init__(self, task: Task):
        self.task = task
        self.sums = torch.zeros(4, device=task.device)  # of loss and examples, metric and its values
        self.metric: Metric | None = None

    @torch.no_grad()
    def add(self, outputs: Any, batch: Batch, loss: Tensor) -> None:
        inputs, targets = batch
        n, found, count = size_of(inputs), loss.new_zeros(()), 0
        self.metric = self.task.metric_of(outputs, targets)
        if self.metric is not None:
            values = values_of(self.metric, outputs, targets)
            found, count = (values * n, n) if values.ndim == 0 else (values.sum(), values.numel())
        self.sums += torch.stack([loss.detach() * n, torch.full_like(loss, n), found.to(loss),
                                  torch.full_like(loss, count)])

    def means(self) -> dict[str, float]:
        """{"loss": mean, "train_NAME": mean of the metric}; waits for the device."""
        loss, n, found, count = self.sums.tolist()
        metric = {} if self.metric is None else {f"train_{self.metric.name}": found / max(count, 1)}
        return {"loss": loss / max(n, 1), **metric}


def check_trained(state: Mapping[str, Tensor], when: str, lr: float) -> None:
    """TrainingDiverged if `state` is not finite, which a last step may leave behind whose loss still was."""
    for name, values in state.items():
        if isinstance(values, Tensor) and not bool(values.isfinite().all()):
            raise TrainingDiverged(f"{name} holds infinite or NaN values after {when}: lower lr ({lr:g})")


def _check_loss(full: Tensor, step: int, total: int, recipe: Recipe) -> None:
    if not bool(full.detach().isfinite()):
        raise TrainingDiverged(f"the loss is {full.item()} at step {step} of {total} (seen within the last "
                               f"{CHECK_EVERY} steps): lower lr ({recipe.lr:g}) or raise warmup ({recipe.warmup:g}), "
                               "if the inputs are finite")


@contextlib.contextmanager
def _seeded(generator: torch.Generator, device: torch.device):
    """Global random state seeded from `generator` inside, restored outside; yields a generator for batches."""
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)
