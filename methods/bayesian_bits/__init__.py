"""Bayesian Bits (van Baalen, Louizos, Nagel, Amjad, Wang, Blankevoort, Welling, NeurIPS 2020, arXiv 2005.07093).

Every weight and activation tensor is quantized to 2 bits, and residuals behind learned gates refine it to 4, 8, 16 and
32 bits; a gate per output channel in front of the weights prunes. The gates are stochastic (hard concrete) while the
loss is trained together with their expected cost in bit operations. Then they are fixed to 0 or 1, which leaves one
power of two of bits per tensor, and weights and ranges may be trained a little longer.

Algorithm
    per tensor:  x_q = z2 (x2 + z4 (e4 + z8 (e8 + z16 (e16 + z32 e32)))),  x clipped to [alpha, beta]
    W <- W g / sigma_r in front of the quantizer: batch norm is folded, its batch statistics are those of the float W
    phase 1, per step:  z = clamp(1.2 sigmoid((logit u + phi) / tau) - 0.1, 0, 1),  u ~ U(0, 1), one per gate
        L = cross entropy + mu sum_k kappa_k E[2 q2 + 4 q2 q4 + 8 q2 q4 q8 + ...],  q = P(z > 0)
        step the weights (Adam or SGD), phi (Adam), beta (Adam)
    z <- 1 if P(z = 0) < 0.34 else 0:  2, 4, 8, 16 or 32 bits per tensor, channels kept or pruned
    phase 2:  x_b = z2 s_b round(x / s_b), batch norm folded into weights and biases; train weights, biases, beta

Symbols    z e s in core/gated.py; phi phi (bits), phi2 (channels); beta beta; alpha -beta or 0 (`signed`); mu mu;
           sigma_r running deviation; kappa Point.kappa: MACs of the layer, or of an activation's readers, / the largest

Departures (the paper could not be opened; what is not listed follows the authors' code)
  * Start: the trained network that is given. The MNIST and CIFAR-10 rows of the paper train from scratch, which scratch
    = True does, from what the layers' reset_parameters draws.
  * autocast = True trains in the task's reduced precision, the code in float32: bfloat16 has 8 significant bits and
    moves values of an 8-bit grid by up to 0.63 of a step.
  * Training images: 55,000 of MNIST and 45,000 of CIFAR-10, those that are not held out.
  * dead_gates: a bit gate whose phi falls to -2 is closed for good, with all above it. It is in the code, not in the
    paper. `init` = -6 takes a width out of the search that way.
  * Ranges start at max(x) of `range_inputs` inputs of the float network with running statistics; the code takes its
    two images through sampled gates. A tensor without positive values starts at max|x|; beta stays at 1e-6 or more.
  * residual: quantizers on what no layer reads, the branches of additions. The code has them, at 1 per gate in the
    loss; its README says not. Without, such edges get calibrated 8-bit ranges when the model is stored.
  * The input is float in training and counts 8 bits; it is stored with a calibrated 8-bit range. Tensors that stay at
    32 bits: weights are stored as float, an activation with 16 bits where a layer with codes reads it, else as float.
  * What an average pool returns is stored exactly, as codes of b + log2(n) bits (16 at most); the code counts b.
  * A signed activation is stored with the code -2^(b-1), which the symmetric grid of the training does not have.
  * hold: the learning rate of the weights is constant for this share of the epochs, then falls linearly to 0, epoch by
    epoch; gates and ranges keep theirs. hold = 1 is the recipe's schedule, for all three; that of the ImageNet runs,
    drops after a third and two thirds, is not among them.
  * fast keeps running statistics and spares the second convolution. It is not the paper's; frozen weights imply it.
  * size_ratio is not the paper's, which compares bit operations: the mu of weights follows the bytes of the file
    (steering.py), that of activations, which take none, stays; dead units are removed, and a file that ends too large
    loses its least weights (core/fit/trim.py). activation_mu = 0 leaves activations at the width of `init`.
  * Pruning at fixed `bits` b costs (2 b - 2) kappa q2, as if all gates up to b were open. Convolutions with groups
    and the last layer are not pruned. The baseline of iterative sensitivity is a method of its own.
"""

import copy
import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..core.artifact import CompressedModel
from ..core.budget import Budget
from ..core.errors import ConfigError
from ..core.fit.calibrate import calibrate, check_calibration
from ..core.fit.correction import correction_of
from ..core.fit.size import room
from ..core.graph.build import apply, float_bytes, own_copy
from ..core.graph.shrink import shrink
from ..core.method import check_call
from ..core.settings import check_idle
from ..core.train.finetune import Hooks, Recipe, check_trainable, train
from ..core.train.run import NullRun, Run
from ..core.train.start import ready
from ..core.train.task import First, Task
from ..core.typed import check_types
from .costs import gate_costs, regulariser, relative_bops
from .gated import WIDTHS
from .network import LEAST_RANGE, GatedNetwork, fix_gates, survey
from .steering import Steering
from .stored import INPUT_BITS, describe, fitted, store_activations, store_weights, weigh

DATA = "train"
LEARN = ("all", "gates_ranges", "gates")
FIXED_BITS = (2, *WIDTHS)


@dataclass(frozen=True)
class FixedRecipe(Recipe):
    """Of phase 2: as the authors', without weight decay where none is given."""

    weight_decay: float = 0.0


@dataclass(frozen=True)
class Config:
    """mu: price of bit operations; recipe: of the weights in phase 1; gate_lr, range_lr: Adam's for phi and beta.

    mu          under a size_ratio that of weights only begins there, and is turned
    activation_mu  the mu of activations; None: mu
    hold        share of the epochs before the weights' rate falls (see Departures)
    init        phi of the gates of 4, 8, 16 and 32 bits at the start; channels start at 6
    prune       gates on output channels; False: quantization only
    bits        (weights, activations) fixed, of 2, 4, 8, 16, 32, instead of learned: (8, 8) and (4, 8) prune only
    learn       "all"; or post-training, "gates_ranges" or "gates", on the first `subset` batches (0: all)
    stochastic  draw the gates; False: their value at u = 1/2
    fixed       recipe of phase 2, or None; fixed_range_lr: Adam's for beta there
    scratch     forget the trained weights and start from the layers' own initialization
    autocast    train in the precision that the task trains in (see Departures); False: in float32
    """

    mu: float = 0.01
    activation_mu: float | None = None
    recipe: Recipe = Recipe(epochs=100, lr=1e-3, optimizer="adam", weight_decay=0.0, schedule="constant")
    gate_lr: float = 1e-3
    range_lr: float = 1e-3
    hold: float = 2 / 3
    init: tuple[float, float, float, float] = (6.0, 6.0, 6.0, 6.0)
    prune: bool = True
    bits: tuple[int, int] | None = None
    learn: str = "all"
    subset: int = 0
    stochastic: bool = True
    dead_gates: bool = True
    residual: bool = False
    fast: bool = False
    scratch: bool = False
    autocast: bool = False
    fixed: FixedRecipe | Recipe | None = None
    fixed_range_lr: float = 1e-4
    range_inputs: int = 2
    calibration_inputs: int = 1024

    def __post_init__(self):
        check_types(self)
        check_calibration(INPUT_BITS, min(self.calibration_inputs, self.range_inputs))
        for name in ("gate_lr", "range_lr", "fixed_range_lr"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} = {getattr(self, name)}: allowed is above 0")
        if not all(0 <= mu < math.inf for mu in (self.mu, self.price_of_activations)) or self.subset < 0:
            raise ConfigError(f"mu = {self.mu}, activation_mu = {self.activation_mu}, subset = {self.subset}: allowed "
                              "are numbers of 0 or more")
        if not 0 <= self.hold <= 1 or (self.hold < 1 and (self.recipe.schedule != "constant" or self.recipe.warmup)):
            raise ConfigError(f"hold = {self.hold} with schedule {self.recipe.schedule!r}: allowed is 0..1 with "
                              "'constant' and no warmup, or 1")
        if self.bits is not None and not set(self.bits) <= set(FIXED_BITS):
            raise ConfigError(f"bits = {list(self.bits)}: allowed are {', '.join(map(str, FIXED_BITS))}")
        if len(self.init) != len(WIDTHS) or not all(map(math.isfinite, self.init)):
            raise ConfigError(f"init = {list(self.init)}: allowed are {len(WIDTHS)} finite numbers")
        if self.recipe.ema > 0:
            raise ConfigError(f"recipe.ema = {self.recipe.ema:g}: allowed is 0: an average of gates opens those that "
                              "closed (fixed.ema, of phase 2, is free)")
        if self.learn not in LEARN:
            raise ConfigError(f"learn = {self.learn!r}: allowed are {', '.join(LEARN)}")
        if self.learn != "all" and self.fixed is not None:
            raise ConfigError(f"learn = {self.learn!r} leaves the weights as they are: it has no phase 2 (fixed)")
        if self.learn == "gates" and self.bits is not None and not self.prune:
            raise ConfigError("there is nothing to learn: bits are fixed, prune is off and learn = 'gates'")
        if self.scratch and self.learn != "all":
            raise ConfigError(f"scratch = True with learn = {self.learn!r}: weights that start anew have to be trained")
        check_idle(self)

    @property
    def price_of_activations(self) -> float:
        return self.mu if self.activation_mu is None else self.activation_mu

    def idle(self) -> dict[str, str]:
        found = {} if self.fixed is not None else {"fixed_range_lr": "there is no phase 2 (fixed)"}
        if self.learn != "all":
            found |= dict.fromkeys(("hold", "fast"), f"learn = {self.learn!r} leaves weights and statistics alone")
        if self.learn == "gates":
            found["range_lr"] = "learn = 'gates' leaves the ranges alone"
        if self.bits is not None:
            idle = ("init", "dead_gates", "activation_mu")
            found |= dict.fromkeys(idle, "bits are fixed: there are no bit gates")
            found |= {} if self.prune else dict.fromkeys(("mu", "gate_lr", "stochastic"), "there are no gates")
        return found


def compress(model: nn.Module, task: Task, budget: Budget, config: Config, generator: torch.Generator,
             *, run: Run | None = None) -> CompressedModel:
    """Budget: none, and Config.mu decides how small the result gets; or size_ratio, and weights only begin with it."""
    check_call(__name__, model, task, budget, config, generator)
    run = NullRun() if run is None else run
    budget.require("bayesian_bits", optional=("size_ratio",))
    if budget.size_ratio is not None and config.mu == 0:
        raise ConfigError("mu = 0 with budget size_ratio, which turns it: allowed is above 0")
    skeleton = own_copy(model).cpu()
    model = restarted(skeleton, generator) if config.scratch else copy.deepcopy(skeleton)
    model = task.placed(model).eval()
    if config.scratch and task.teacher is None:  # the network that is given, not the restarted one
        task = replace(task, teacher=task.placed(copy.deepcopy(skeleton)).eval().requires_grad_(False))
    task = ready(model, task, config)
    task = task if config.autocast else replace(task, autocast=None)
    inputs = task.calibration_inputs(config.range_inputs).to(task.device)
    points, wiring = survey(model, inputs, prune=config.prune, residual=config.residual, bits=config.bits)
    small = config.subset > 0 and task.train is not None
    seen = replace(task, train=First(task.train, n=config.subset)) if small else task
    check_trainable(seen)

    network = GatedNetwork(model, points, wiring, config.init, stochastic=config.stochastic,
                           dead_gates=config.dead_gates, frozen_norms=config.fast or config.learn != "all")
    steering = None
    if budget.size_ratio is not None:
        limit = room(budget.size_ratio, float_bytes(skeleton), weigh(network, skeleton, weights=False))
        steering = Steering(config.mu, limit, config.recipe.epochs * len(seen.train), network,
                            lambda now: weigh(now, skeleton))
    first = Phase(config, second=False, steering=steering)
    train(network, seen, config.recipe, generator, hooks=first, run=run.stage("gates"))
    fixed, topology = fix_gates(network)
    if config.fixed is not None:
        train(fixed, seen, config.fixed, generator, hooks=Phase(config, second=True), run=run.stage("fixed gates"))

    compressed = store_weights(fixed.cpu(), topology)
    others = calibrate(apply(compressed, skeleton), task.calibration_inputs(config.calibration_inputs), INPUT_BITS)
    compressed = replace(compressed, activations=store_activations(fixed, list(compressed.weights), others),
                         notes=describe(fixed, compressed, first.bops))
    if steering is None:
        return compressed
    small = shrink(compressed, skeleton)
    seed = int(torch.randint(2**62, (), generator=generator))
    return fitted(small, steering, correction_of(small, skeleton, task, seed))


def restarted(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy of `model` with every layer as its class initializes it."""
    model = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        for name, module in model.named_modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            elif next(module.parameters(recurse=False), None) is not None:
                raise ConfigError(f"scratch = True: {name or 'the network'} ({type(module).__name__}) has parameters "
                                  "and no reset_parameters()")
    return model


# --- training ----------------------------------------------------------------------------------------------


class Phase(Hooks):
    """The three optimizers and the regulariser; in the second phase, gates are fixed and cost nothing."""

    def __init__(self, config: Config, second: bool, steering: Steering | None = None):
        self.config, self.second, self.steering, self.costs = config, second, steering, torch.empty(0)
        self.weights: list[torch.optim.Optimizer] = []
        self.of_weights = torch.empty(0, dtype=torch.bool)  # [Q] which points are weights
        self.epoch, self.bops = 0, []  # relative BOPs after each epoch, for the notes

    def optimizers(self, model, recipe):
        config, found, self.costs = self.config, [], gate_costs(model)
        self.of_weights = torch.tensor([p.weight for p in model.points], device=self.costs.device)
        if config.learn == "all":
            self.weights = super().optimizers(model.network, recipe)
        else:
            model.network.requires_grad_(False)
        if config.learn != "gates":
            found.append(torch.optim.Adam([model.beta], lr=config.fixed_range_lr if self.second else config.range_lr))
        if not self.second:
            found.append(torch.optim.Adam([model.phi, model.phi2], lr=config.gate_lr))
        return [*self.weights, *found]

    def loss(self, model, loss):
        if self.second:
            return loss
        of_weights = self.config.mu if self.steering is None else self.steering.mu
        mu = torch.where(self.of_weights, of_weights, self.config.price_of_activations)
        return loss + regulariser(model, mu[:, None] * self.costs)

    def after_backward(self, model, lr):
        if self.steering is not None and self.steering.settled:
            model.phi.grad = model.phi2.grad = None
        epochs, hold = self.config.recipe.epochs, self.config.hold
        held = int(hold * epochs)
        if not self.second and hold < 1 and self.epoch >= held:
            for group in itertools.chain(*(optimizer.param_groups for optimizer in self.weights)):
                group["lr"] *= (epochs - self.epoch) / (epochs - held)

    @torch.no_grad()
    def after_step(self, model, lr):
        model.beta.clamp_(min=LEAST_RANGE)
        if self.steering is not None:
            self.steering.step(model)

    def after_epoch(self, model, epoch):
        self.epoch = epoch + 1
        self.bops.append(relative_bops(model))
        if self.steering is not None:
            self.steering.correct(model)

    def state(self):
        steering = None if self.steering is None else self.steering.state()
        return {"epoch": self.epoch, "bops": self.bops, "steering": steering}

    def restore(self, state):
        self.epoch, self.bops = state["epoch"], list(state["bops"])
        if self.steering is not None:
            self.steering.restore(state["steering"])
