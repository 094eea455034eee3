"""ADMM: weight pruning, then quantization or clustering of the survivors (Ye, Zhang, Zhang et al., "A Unified Framework
of DNN Weight Pruning and Weight Clustering/Quantization Using ADMM", arXiv 1811.01907).

Each constraint (few non-zeros; few values) is handed to an auxiliary Z whose nearest point is exact, and the network
trains with a quadratic pull towards it that a dual variable U sharpens. ADMM is stopped early: a projection makes the
constraint hold and retraining repairs the loss. First weights are pruned, layer by layer; then the survivors are drawn
to equally spaced levels without a zero, or to free centroids.

Algorithm
    prune:     S = {at most density * n non-zeros};  W <- top-k(W), m = its support;  retrain W under m
    quantize:  S = {m * levels of q {-M/2..-1, 1..M/2}} or {m * 2^bits centroids}
    both by ADMM:  Z = Proj_S(W), U = 0;  repeat K times, with the learning rate reset:
        W <- SGD on loss + rho/2 |W - Z + U|^2;   Z <- Proj_S(W + U);   U <- U + W - Z
    levels:    repeat: fix the closest fraction of each level's members on it; retrain the rest;  W <- nearest level
    clusters:  assignments fixed, members move together by the sum of their gradients

Symbols    W weights of the model;  Z, U AdmmHooks.z, .u;  m masks;  M = 2^budget.bits;  q Intervals.interval
           rho config.rho, quantize_rho;  K prune_iterations, quantize_iterations

Departures   Body and tables of the paper could not be read: the steps are those of its authors' released code.
  * LeNet-5 with ReLU after the convolutions is the network of the TensorFlow code, which trains it by Adam with dropout
    0.5; here it has the recipe of the Caffe code, whose network has no ReLU there, and no dropout.
  * Settings are the Caffe code's for LeNet-5, in epochs of the 55,000 images that are not held out (theirs: 60,000).
  * Momentum is Nesterov's and restarts with each ADMM iteration, as the learning rate does; that falls at a half and
    three quarters of an iteration (the code: once, at a quarter for pruning, at a third for quantization).
  * rho is constant, and one for all layers (the code: ten times as large where ip1 is quantized). Later code of the
    group has other rules, kept as options: rho_growth multiplies rho at every update (and divides U, which is scaled by
    it: the code leaves U alone), and several entries of rho are ADMMs in turn, each from Z = Proj(W), U = 0.
  * Pruning in steps (1810.07378) is one chain, not the best of three. A layer left alone has no penalty, as there.
  * q: the code scans within 10 % of max|w| / (M/2), zeros included. Here the error over the survivors is minimised
    over the whole range. It is fitted once, as in the code; refit = True fits it to W + U at every update.
  * live = True counts no weight of a unit that lost all its inputs or all its outputs: its place goes to the next
    largest that can change an output. Not in the papers: of a LeNet-5 hundreds of the weights did nothing.
  * batchnorm = "data" renews the statistics of batch norm at the end: the last weights are put on their levels after
    the training. Not in the paper; see core/fit/batchnorm.py.
  * Half-way between two levels the larger magnitude is taken (the code: the upper level).
  * Clusters start even in [min, max] and are then warm-started; an empty one stays. The released solver has kernels
    for clusters but does not call them: what is done here is what they compute.
  * Without the budget's bits, weights are pruned and stay float32. A layer with density 1 is quantized only.
  * What the given network has as 0 stays 0, as pruned before: levels have no zero, and would give it a value.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..core.artifact import CompressedModel
from ..core.budget import Budget
from ..core.errors import ConfigError
from ..core.fit.batchnorm import check_mode, check_renewal, renew
from ..core.fit.project import Clusters, Intervals, closest, keep_sparse, project_sparse
from ..core.fit.prune import MaskHooks, apply_masks, keep_count
from ..core.fit.size import Knob, without_renewal
from ..core.graph.build import assemble, own_copy, weight_layers
from ..core.graph.graph import trace
from ..core.graph.live import give_back
from ..core.graph.weights import layer_of
from ..core.method import check_call
from ..core.settings import check_idle, check_idle_without
from ..core.train.finetune import Hooks, Recipe, train
from ..core.train.run import NullRun, Run
from ..core.train.start import ready
from ..core.train.task import Task
from ..core.typed import check_types
from .hooks import AdmmHooks, HoldHooks, Projection, TieHooks, Weights

DATA = "train"
SIZE_KNOB = Knob("density", 1e-3, 1.0)
quick = without_renewal  # what compress_to_size looks for the size with
GRIDS = {"levels": Intervals, "clusters": Clusters}
WITHOUT = {"bits": ("grid", "quantize_rho", "quantize_iterations", "quantize", "refit", "fix_rounds", "fix_fraction",
                    "fix")}


@dataclass(frozen=True)
class Config:
    """grid: "levels" or "clusters"; steps: densities of successive prunings as multiples of the budget's, the last 1.

    prune, quantize         recipes of one ADMM iteration;  retrain: after each pruning
    rho, quantize_rho       penalties, one ADMM of that many iterations for each;  rho_growth, refit, live: see the
                            departures
    fix_rounds, fix_fraction, fix   levels: rounds, fraction fixed in each, recipe of each; clusters: fix is the recipe
                            of their one training, in which gradients are summed: its learning rate is smaller
    batchnorm               see the departures
    """

    grid: str = "levels"
    steps: tuple[float, ...] = (1.0,)
    rho: tuple[float, ...] = (7e-3,)
    quantize_rho: tuple[float, ...] = (7e-3,)
    rho_growth: float = 1.0
    prune_iterations: int = 20
    prune: Recipe = Recipe(epochs=8, lr=1e-3, schedule="step")
    retrain: Recipe = Recipe(epochs=40, lr=1e-2, schedule="step")
    quantize_iterations: int = 20
    quantize: Recipe = Recipe(epochs=6, lr=1e-3, schedule="step")
    refit: bool = False
    live: bool = False
    fix_rounds: int = 8
    fix_fraction: float = 0.3
    fix: Recipe = Recipe(epochs=5, lr=1e-3)
    batchnorm: str = "keep"

    def __post_init__(self):
        check_types(self)
        check_mode(self.batchnorm)
        if self.grid not in GRIDS:
            raise ConfigError(f"grid = {self.grid!r}: allowed are {', '.join(GRIDS)}")
        if not self.steps or self.steps[-1] != 1 or sorted(self.steps, reverse=True) != list(self.steps) or not (
                1 <= self.steps[0]):
            raise ConfigError(f"steps = {self.steps}: needed are falling multiples of the density that end with 1")
        penalties = (*self.rho, *self.quantize_rho, self.rho_growth)
        if not self.rho or not self.quantize_rho or not all(0 < rho < float("inf") for rho in penalties):
            raise ConfigError(f"rho = {self.rho}, quantize_rho = {self.quantize_rho}, rho_growth = {self.rho_growth}: "
                              "allowed are positive numbers")
        for name in ("prune_iterations", "quantize_iterations", "fix_rounds"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} = {getattr(self, name)}: allowed are 0 or more")
        if self.grid == "clusters" and self.fix.optimizer == "muon":
            raise ConfigError("fix.optimizer = 'muon': members of a cluster take equal steps, and Muon's differ; "
                              "allowed with grid = 'clusters' are sgd and adam")
        if not 0 < self.fix_fraction <= 1:
            raise ConfigError(f"fix_fraction = {self.fix_fraction}: allowed is (0, 1]")
        check_idle(self)

    def idle(self) -> dict[str, str]:
        found = {} if self.grid == "levels" else dict.fromkeys(
            ("refit", "fix_rounds", "fix_fraction"), "grid = 'clusters' refits always, and trains once after ADMM")
        if self.grid == "levels" and self.fix_rounds == 0:
            found |= dict.fromkeys(("fix_fraction", "fix"), "fix_rounds = 0 fixes nothing")
        return found


def compress(model: nn.Module, task: Task, budget: Budget, config: Config, generator: torch.Generator,
             *, run: Run | None = None) -> CompressedModel:
    """Budget: density and, unless weights are to stay float32, bits; each a number or {layer: number}."""
    check_call(__name__, model, task, budget, config, generator)
    run = NullRun() if run is None else run
    budget.require("admm", "density", optional=("bits",))
    check_idle_without(config, budget, WITHOUT)
    check_renewal(model, config.batchnorm, task)
    given, model = model, task.placed(own_copy(model))
    density = budget.per_layer("density", weight_layers(model))
    widths = None if budget.bits is None else budget.per_layer("bits", weight_layers(model))
    weights: Weights = {name: layer_of(model, name).weight for name in density}
    training = Training(model, ready(model, task, config), config, generator, run, {})
    masks = prune(weights, density, training)
    tensors = {}
    if widths is not None:
        grids = quantize(weights, masks, {name: int(bits) for name, bits in widths.items()}, training)
        (fix_levels if config.grid == "levels" else tie_clusters)(weights, masks, grids, training)
        tensors = {name: grids[name].store(weight, masks[name]) for name, weight in weights.items()}
    empty = [name for name, w in weights.items() if not bool((tensors[name].mask if tensors else w).any())]
    made = assemble(model, tensors, notes={"residuals": training.residuals, "empty_layers": empty})
    return renew(made, given, config.batchnorm, generator, task=task)


# --- ADMM ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """What every stage trains with; residuals {stage: {layer: |W - Z| / |W| after each W-step}}."""

    model: nn.Module
    task: Task
    config: Config
    generator: torch.Generator
    run: Run
    residuals: dict[str, dict[str, list[float]]]

    def train(self, recipe: Recipe, hooks: Hooks, stage: str) -> None:
        train(self.model, self.task, recipe, self.generator, hooks=hooks, run=self.run.stage(stage))

    def admm(self, weights: Weights, project: Projection, masks: Mapping[str, Tensor], rhos: tuple[float, ...],
             iterations: int, recipe: Recipe, stage: str) -> None:
        """W-, Z- and U-steps on `weights`, in place; weights outside `masks` stay 0."""
        for s, rho in enumerate(rhos, 1):
            hooks = AdmmHooks(weights, project, masks, rho)
            for k in range(1, iterations + 1):
                self.train(recipe, hooks, f"{stage} {s}.{k}")
                hooks.update(self.config.rho_growth)
            self.residuals[f"{stage}.{s}"] = hooks.residuals


def prune(weights: Weights, density: Mapping[str, float], training: Training) -> dict[str, Tensor]:
    """Prune and retrain in place, in config.steps steps; returns the masks of survivors."""
    config = training.config
    masks = {name: weight.detach() != 0 for name, weight in weights.items()}  # what is given as 0 stays so
    masks = {name: mask if bool(mask.any()) else torch.ones_like(mask) for name, mask in masks.items()}
    for s, factor in enumerate(config.steps, 1):
        shares = {name: min(factor * density[name], 1.0) for name in weights}
        counts = {name: min(keep_count(w.numel(), shares[name]), int(masks[name].sum())) for name, w in weights.items()}
        active = {name: w for name, w in weights.items() if counts[name] < int(masks[name].sum())}
        if not active:
            continue

        def few(name: str, values: Tensor, counts: Mapping[str, int] = counts) -> Tensor:
            return project_sparse(values, counts[name], masks[name])

        training.admm(active, few, masks, config.rho, config.prune_iterations, config.prune, f"prune {s}")
        masks.update((keep_live if config.live else keep_each)(active, counts, masks, training.model))
        apply_masks(training.model, masks)  # W <- top-k(W): of W itself, not of W + U
        training.train(config.retrain, MaskHooks(masks), f"retrain {s}")
    return masks


def keep_each(weights: Weights, counts: Mapping[str, int], masks: Mapping[str, Tensor], model: nn.Module
              ) -> dict[str, Tensor]:
    """{layer: the support of its `counts` largest weights inside its mask}."""
    return {name: keep_sparse(weight, counts[name], masks[name]) for name, weight in weights.items()}


def keep_live(weights: Weights, counts: Mapping[str, int], masks: dict[str, Tensor], model: nn.Module
              ) -> dict[str, Tensor]:
    """As `keep_each`, of weights that can change an output: those of units that lost all inputs or all outputs give
    their places to the next largest of their layer. A layer may end up with fewer than its count."""
    def grow(kept: Mapping[str, Tensor], free: Mapping[str, Tensor]) -> dict[str, Tensor]:
        places = {name: free[name] & masks[name] for name in weights}
        return {name: keep_sparse(weight, min(counts[name] - int(kept[name].sum()), int(places[name].sum())),
                                  places[name]) for name, weight in weights.items()}

    found = give_back(trace(model), masks | keep_each(weights, counts, masks, model), grow)
    return {name: found[name] for name in weights}


def quantize(weights: Weights, masks: Mapping[str, Tensor], bits: Mapping[str, int], training: Training
             ) -> dict[str, Intervals]:
    """ADMM towards levels or centroids, in place on `weights`; returns each layer's grid."""
    config = training.config
    grids = {name: GRIDS[config.grid](w.detach()[masks[name]].cpu(), bits[name]) for name, w in weights.items()}

    def on_grid(name: str, values: Tensor) -> Tensor:
        mask, survivors = masks[name], values[masks[name]].cpu()
        if config.refit or config.grid == "clusters":
            grids[name].refit(survivors)
        z = torch.zeros_like(values)
        z[mask] = grids[name].values(survivors).to(values.device)
        return z

    training.admm(weights, on_grid, masks, config.quantize_rho, config.quantize_iterations, config.quantize, "quantize")
    return grids


# --- after ADMM ---------------------------------------------------------------------------------------------


@torch.no_grad()
def fix_levels(weights: Weights, masks: Mapping[str, Tensor], grids: Mapping[str, Intervals], training: Training):
    """Fix the closest weights of every level on it and retrain the others, in rounds, in place."""
    free = {name: mask.clone() for name, mask in masks.items()}
    for r in range(1, training.config.fix_rounds + 1):
        for name, weight in weights.items():
            moving = weight[free[name]].cpu()
            levels = grids[name].values(moving)
            done = closest(moving, levels, training.config.fix_fraction)
            weight[free[name]] = torch.where(done, levels, moving).to(weight.device)
            free[name][free[name].clone()] = ~done.to(weight.device)
        if not any(bool(mask.any()) for mask in free.values()):
            break
        with torch.enable_grad():
            training.train(training.config.fix, HoldHooks(weights, free), f"fix {r}")


@torch.no_grad()
def tie_clusters(weights: Weights, masks: Mapping[str, Tensor], grids: Mapping[str, Clusters], training: Training):
    """Set survivors to their centroids and train these, in place."""
    with torch.enable_grad():
        training.train(training.config.fix, TieHooks(weights, masks, grids), "tie")
    for name, weight in weights.items():
        grids[name].centroids = np.unique(weight[masks[name]].double().cpu().numpy())
