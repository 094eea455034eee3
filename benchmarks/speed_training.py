"""CPU time of one training step of each method that trains beside a plain one, and of their projections.

The same network, batch and precision in every step; random weights and pictures, which decide nothing here. What a
method does once an epoch or more rarely (projections, knapsacks, codebooks) is not in its step: it is timed apart.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from rich.table import Table
from torch import Tensor, nn

from methods.admm.hooks import AdmmHooks
from methods.annc import Config as AnncConfig
from methods.annc import JointHooks
from methods.annc.knapsack import keep_worthiest
from methods.bayesian_bits import Config as BitsConfig
from methods.bayesian_bits import Phase
from methods.bayesian_bits.network import GatedNetwork, survey
from methods.clip_q import Theta, attach
from methods.core.fit.project import project_sparse
from methods.core.fit.prune import MaskHooks, apply_masks, keep_count, keep_local
from methods.core.fit.quantize import FakeQuantize, QuantizationAware
from methods.core.fit.weight_quantizers import LearnedStep
from methods.core.graph.build import weight_layers
from methods.core.train.distill import Distillation
from methods.core.train.finetune import Hooks, Recipe, training_step
from methods.core.train.recipe import Distill
from methods.core.train.task import Task
from methods.pipeline.dressed import Dressed
from methods.rptq import Config as RptqConfig
from methods.rptq import Quantizer
from methods.rptq_train.rated import RateAware

from .networks import build
from .speed import CLASSES, Timing, check_positive, in_turn, input_of

PLAIN = "plain step"
DENSITY, BITS, DATA_RATIO = 0.1, 4, 0.0125  # of every method; the time of a step hardly depends on them
RPTQ_C = 0.08
RECIPE = Recipe(epochs=1, lr=1e-3)

Prepared = tuple[nn.Module, Hooks]


@dataclass(frozen=True)
class TrainingReport:
    """Steps, the plain one first; projections {what: CPU seconds}."""

    steps: list[Timing]
    projections: dict[str, float]
    weights: int
    batch: int


def measure_training(network: str, batch: int, rounds: int, threads: int) -> TrainingReport:
    """Of a network of the harness in bfloat16 autocast and channels_last; sets this process's number of threads."""
    check_positive({"train-batch": batch, "rounds": rounds, "threads": threads})
    torch.set_num_threads(threads)
    channels, size = input_of(network)
    model = build(network, CLASSES, channels)
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(batch, channels, size, size, generator=generator), torch.arange(batch) % CLASSES
    task = Task(None, [], autocast=torch.bfloat16, channels_last=True)
    steps = {name: stepper(*prepare(task.placed(copy.deepcopy(model)), data[0]), task, data)
             for name, prepare in METHODS.items()}
    given = task.placed(copy.deepcopy(model))
    steps["distilled step"] = stepper(given, Hooks(), replace(task, teacher=model), data, Distill())
    weights = sum(layer.weight.numel() for layer in weight_layers(model).values())
    return TrainingReport(in_turn(steps, rounds), time_projections(model), weights, batch)


def stepper(model: nn.Module, hooks: Hooks, task: Task, data: tuple[Tensor, Tensor],
            distill: Distill | None = None) -> Callable[[], None]:
    """One training step on `data`, as the loop of every method does it; `distill` adds the task's teacher."""
    model.train()
    optimizers = hooks.optimizers(model, RECIPE)
    objective = task.loss if distill is None else Distillation(model, task, distill).objective(task.loss)

    def step() -> None:
        with torch.enable_grad():
            training_step(model, task, data, objective, RECIPE.lr, optimizers, hooks)
    return step


# --- the methods' steps ------------------------------------------------------------------------------------


def plain(model: nn.Module, inputs: Tensor) -> Prepared:
    return model, Hooks()


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    return keep_local({name: layer.weight for name, layer in weight_layers(model).items()},
                      dict.fromkeys(weight_layers(model), DENSITY))


def masked(model: nn.Module, inputs: Tensor) -> Prepared:
    masks = masks_of(model)
    apply_masks(model, masks)
    return model, MaskHooks(masks)


def quantized(model: nn.Module, inputs: Tensor) -> Prepared:
    hooks = QuantizationAware(model, {name: FakeQuantize(BITS, mask) for name, mask in masks_of(model).items()})
    return model, hooks.__enter__()


def learned_steps(model: nn.Module, inputs: Tensor) -> Prepared:
    dressed = Dressed(model, list(weight_layers(model)))
    dressed.set_masks(masks_of(model))
    dressed.quantize({name: LearnedStep(BITS) for name in dressed.coats})
    return model, dressed


def rate_aware(model: nn.Module, inputs: Tensor) -> Prepared:
    few = RptqConfig(sensitivity_inputs=4, calibration_inputs=4)
    start = Quantizer(copy.deepcopy(model).eval(), inputs.contiguous(), few, torch.Generator().manual_seed(0))
    return model, RateAware(model, start.steps(RPTQ_C), goal=1.0, falling=0, contexts=False).__enter__()


def clip_q(model: nn.Module, inputs: Tensor) -> Prepared:
    attach(model, {name: Theta(1 - DENSITY, BITS) for name in weight_layers(model)}, "A")
    return model, Hooks()


def admm(model: nn.Module, inputs: Tensor) -> Prepared:
    weights = {name: layer.weight for name, layer in weight_layers(model).items()}
    everywhere = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    return model, AdmmHooks(weights, _sparse, everywhere, rho=1e-3)


def annc(model: nn.Module, inputs: Tensor) -> Prepared:
    hooks = JointHooks(model, _limit(model), AnncConfig(start_bits=BITS))
    hooks.started = True  # the update after the first step of a training is one of the projections
    return model, hooks


def bayesian_bits(model: nn.Module, inputs: Tensor, **changes) -> Prepared:
    config = BitsConfig(recipe=RECIPE, hold=1.0, **changes)
    points, wiring = survey(model.eval(), inputs[:config.range_inputs])
    return GatedNetwork(model, points, wiring, config.init, frozen_norms=config.fast), Phase(config, second=False)


METHODS: dict[str, Callable[[nn.Module, Tensor], Prepared]] = {
    PLAIN: plain, "masks": masked, "QAT under masks": quantized, "LSQ under masks": learned_steps, "CLIP-Q": clip_q,
    "RPTQ, trained": rate_aware, "ADMM": admm, "ANNC": annc, "Bayesian Bits": bayesian_bits,
    "Bayesian Bits, fast": lambda model, inputs: bayesian_bits(model, inputs, fast=True)}


def training_table(report: TrainingReport) -> Table:
    """Medians of the rounds; a ratio is taken within its round."""
    table = Table(title=f"CPU time of a training step, batch {report.batch}, bfloat16, {len(report.steps[0].seconds)} "
                        "rounds in turn")
    for header in ("method", "s per step", "images/s", "x plain step", "in all rounds"):
        table.add_column(header, justify="left" if header == "method" else "right", no_wrap=True)
    for timing in report.steps:
        slower = [1 / ratio for ratio in timing.ratios]
        seconds = statistics.median(timing.seconds)
        table.add_row(timing.name, f"{seconds:.2f}", f"{report.batch / seconds:.0f}",
                      f"{statistics.median(slower):.2f}", f"{min(slower):.2f} to {max(slower):.2f}")
    return table


# --- projections -------------------------------------------------------------------------------------------


def time_projections(model: nn.Module) -> dict[str, float]:
    """CPU seconds, once each."""
    weights = [layer.weight.detach() for layer in weight_layers(model).values()]
    hooks, config = JointHooks(copy.deepcopy(model), _limit(model), AnncConfig(start_bits=BITS)), AnncConfig()
    hooks.project()
    widths = config.most_bits - config.least_bits + 1
    jobs = {"ADMM: the largest weights of every layer": lambda: [_sparse("", w) for w in weights],
            "ANNC: knapsack of single weights": lambda: keep_worthiest(weights, [BITS] * len(weights), _limit(model)),
            f"ANNC: knapsack of bits, with {widths} k-means a layer": lambda: hooks.quantize(weights, 0)}
    found = {}
    for name, job in jobs.items():
        start = time.process_time()
        job()
        found[name] = time.process_time() - start
    return found


def _sparse(name: str, values: Tensor) -> Tensor:
    return project_sparse(values, keep_count(values.numel(), DENSITY))


def _limit(model: nn.Module) -> int:
    return int(DATA_RATIO * 32 * sum(layer.weight.numel() for layer in weight_layers(model).values()))
