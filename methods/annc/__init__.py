"""ANNC: Automatic Neural Network Compression by Sparsity-Quantization Joint Learning (Yang, Gui, Zhu, Liu, CVPR 2020,
arXiv 1910.05897).

One number S limits the bits of all non-zero weights together; which weights stay and how many bits each layer gets
follow from it. Training alternates with two projections: the weights onto the budget, which is a knapsack of single
weights, and a copy of them onto codebooks of free values, whose widths are a multiple-choice knapsack over the layers.
A proximal pull towards the copy and a scaled dual variable (ADMM) make the two meet.

Algorithm     min loss(W)  subject to  W = V,  sum_l b(V_l) |W_l|_0 <= S
    V = W, Y = 0, b_l = start_bits
    every minibatch:   SGD step on the loss;  W <- (W + beta (V - Y)) / (1 + beta),  beta = lr rho
    after the first minibatch and after every epoch:
        W <- the weights of largest w^2 / b_l that cost S together, the others 0
        for each l, b:  D_lb = distortion of W_l + Y_l on 2^b values and 0 (zero-pinned k-means)
        b <- argmin sum_l D_lb  subject to  sum_l b_l |W_l|_0 <= S;   V_l = W_l + Y_l on its 2^b_l values and 0
        Y <- Y + W - V
    result: each W_l on a fresh codebook of 2^b_l values and 0

Symbols    S limit, in bits = budget.data_ratio x 32 x weights;  W model weights;  Y dual;  V - Y toward;  b bits
           |W_l|_0 kept;  prefix greedy keep_worthiest;  greedy on the hulls choose_options;  D SortedValues.fit

Departures   Equations and settings are those of the authors' code; of the paper only parts could be read.
  * Budget: theirs is S = bit_budget x sum_l ceil(nnz_budget n_l), at first with bit_budget rounded down. Here S is
    given and holds from the start; start_bits is what bit_budget says besides.
  * Theirs keeps one weight fewer than fit, spaces levels evenly where a layer has few distinct values, and moves an
    emptied cluster to 0. Here: all that fit, the distinct values, and an empty cluster stays where it is.
  * fill = True goes on after the first weight that does not fit; theirs stops. With equal b both are optimal.
  * live = True removes weights of units that lost all their inputs or all their outputs after each projection, and
    spends their bits where a weight can change an output, on the largest w^2 / (b_l + bits of its position): there w is
    the sum of the gradients of an epoch. Not in the paper; the limit holds, and counts codes alone, as before.
  * A budget that not one weight meets is refused; theirs fails there. Layers left without weights, which cuts most
    networks, are named in the notes; at_least = k keeps the k largest of each layer (not in the paper).
  * Recipe's weight decay (theirs acts on the scale of batch norm too), Nesterov momentum, warm-up in every step.
  * Inputs keep the scaling that the network was trained with; theirs has MNIST at mean 0 and deviation 1.
  * Training images: the 55,000 that are not held out (theirs: 60,000). Widths are chosen in `bits_epochs` epochs (in
    theirs, which counts epochs from 0, in one more).
  * The result is the last epoch's; theirs reports the epoch that was best on the test set.
  * mode "prune": weights stay float32 at 32 bits each. mode "quantize": all are kept, on 2^b values without a 0.
  * batchnorm = "data" renews the statistics of batch norm for the result, whose weights are not quite those of the last
    minibatch. Not in the paper; see core/fit/batchnorm.py.
  * Fine-tuning ends with the codebooks that were trained (theirs fits them once more after every epoch, the last one
    too): the statistics of batch norm are theirs, and weights have gathered where a little moves many.
  * Fine-tuning uses the quantized weights in both passes (theirs multiplies by the float ones backward).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..core.artifact import CompressedModel
from ..core.budget import Budget
from ..core.errors import BudgetError, ConfigError
from ..core.fit.batchnorm import check_mode, check_renewal, renew
from ..core.fit.project import SortedValues, nearest
from ..core.fit.rates import entropy_bits
from ..core.fit.size import Knob, without_renewal
from ..core.graph.build import assemble, own_copy
from ..core.graph.graph import trace
from ..core.graph.live import give_back
from ..core.graph.weights import weight_layers
from ..core.method import check_call
from ..core.settings import check_idle
from ..core.train.finetune import Hooks, Recipe, check_trained, train
from ..core.train.run import NullRun, Run
from ..core.train.start import ready
from ..core.train.task import Task
from ..core.typed import check_types
from .codebooks import finetune, store
from .knapsack import choose_options, keep_worthiest

DATA = "train"
SIZE_KNOB = Knob("data_ratio", 1e-4, 0.25)
quick = without_renewal  # what compress_to_size looks for the size with
MODES = ("joint", "prune", "quantize")
FLOAT_BITS = 32


@dataclass(frozen=True)
class Config:
    """The authors' settings for MNIST; rho, start_bits, at_least, fill, live and mode as in the docstring above.

    least_bits, most_bits  the widths a layer may get
    bits_epochs  epochs in which widths are chosen; then only codebooks are (0: start_bits throughout; None: always)
    stages       budgets of successive trainings, as multiples of the budget's; the last is 1
    finetune     recipe for the result with fixed zeros and widths, or None
    batchnorm    see the departures
    """

    mode: str = "joint"
    rho: float = 0.05
    recipe: Recipe = Recipe(epochs=120, lr=0.1, momentum=0.93, weight_decay=5e-4, schedule="cosine", warmup=1 / 12)
    start_bits: int = 3
    least_bits: int = 1
    most_bits: int = 8
    bits_epochs: int | None = None
    stages: tuple[float, ...] = (1.0,)
    fill: bool = False
    at_least: int = 0
    live: bool = False
    finetune: Recipe | None = None
    batchnorm: str = "keep"

    def __post_init__(self):
        check_types(self)
        check_mode(self.batchnorm)
        if self.mode not in MODES:
            raise ConfigError(f"mode = {self.mode!r}: allowed are {', '.join(MODES)}")
        widths = (self.least_bits, self.start_bits, self.most_bits)
        if not 1 <= widths[0] <= widths[1] <= widths[2] <= 16:
            raise ConfigError(f"least_bits, start_bits, most_bits = {widths}: allowed are 1 to 16 in rising order")
        if not 0 <= self.rho < math.inf or min(self.at_least, 0 if self.bits_epochs is None else self.bits_epochs) < 0:
            raise ConfigError(f"rho = {self.rho}, at_least = {self.at_least}, bits_epochs = {self.bits_epochs}: "
                              "allowed are numbers of 0 or more")
        if not self.stages or self.stages[-1] != 1 or sorted(self.stages, reverse=True) != list(self.stages) or not (
                1 <= self.stages[0]):
            raise ConfigError(f"stages = {self.stages}: needed are falling multiples of the budget that end with 1")
        if self.live and self.at_least:
            raise ConfigError(f"live = True with at_least = {self.at_least}: what changes nothing is given back, be it "
                              "reserved or not; allowed is one of the two")
        if self.mode == "prune" and self.finetune is not None:
            raise ConfigError("finetune trains codebooks: allowed is None with mode 'prune', which has none")
        if self.recipe.ema:
            raise ConfigError(f"recipe.ema = {self.recipe.ema}: an average of projected weights breaks the budget")
        check_idle(self)

    def idle(self) -> dict[str, str]:
        found = {"joint": (), "prune": ("rho", "start_bits", "least_bits", "most_bits", "bits_epochs"),
                 "quantize": ("fill", "at_least", "live")}[self.mode]
        idle = dict.fromkeys(found, f"mode = {self.mode!r}")
        if self.mode == "quantize" and self.bits_epochs != 0:
            idle["start_bits"] = "widths are chosen before anything is trained with them"
        if self.mode != "prune" and self.bits_epochs == 0:
            idle |= dict.fromkeys(("least_bits", "most_bits"), "bits_epochs = 0 chooses no widths")
        return idle


def compress(model: nn.Module, task: Task, budget: Budget, config: Config, generator: torch.Generator,
             *, run: Run | None = None) -> CompressedModel:
    """Budget: data_ratio, (bits of the kept codes) / (32 x number of conv and linear weights)."""
    check_call(__name__, model, task, budget, config, generator)
    run = NullRun() if run is None else run
    budget.require("annc", "data_ratio")
    check_renewal(model, config.batchnorm, task)
    given, model = model, own_copy(model)
    layers, traces = weight_layers(model), []
    limits = find_limits([layer.weight.numel() for layer in layers.values()], budget.data_ratio, config)
    task = ready(task.placed(model), task, config)
    for i, limit in enumerate(limits, 1):
        hooks = JointHooks(model, limit, config)
        train(model, task, config.recipe, generator, hooks=hooks, run=run.stage(f"joint {i}"))
        if config.recipe.epochs == 0:
            hooks.update(0)
        traces.append(hooks.trace)
    notes = {"limit": limits[-1], "trace": traces, "kept": dict(zip(layers, hooks.count_kept(), strict=True))}
    tensors, pinned = {}, config.mode == "joint"
    if config.mode != "prune":
        notes["bits"] = dict(zip(layers, hooks.bits, strict=True))
        if config.finetune is not None:
            finetune(model, task, notes["bits"], config.finetune, pinned, generator, run)
        tensors = {name: store(x.weight, notes["bits"][name], pinned) for name, x in layers.items()}
    empty = [name for name, x in layers.items() if not bool((tensors[name].mask if tensors else x.weight).any())]
    made = assemble(model, tensors, notes={**notes, "empty_layers": empty})
    return renew(made, given, config.batchnorm, generator, task=task)


def find_limits(sizes: list[int], ratio: float, config: Config) -> list[int]:
    """S of every stage: the most bits that are a share `ratio` of the dense ones. Refuses what no choice can meet."""
    if not sizes:
        raise BudgetError("budget data_ratio has nothing to act on: the network has no Conv2d and no Linear layer")
    dense = FLOAT_BITS * sum(sizes)
    shares = [min(factor * ratio, 1.0) for factor in config.stages]
    limits = [limit - (limit / dense > share) for share, limit in ((s, round(s * dense)) for s in shares)]
    if config.mode == "quantize":
        width, count = config.start_bits if config.bits_epochs == 0 else config.least_bits, sum(sizes)
    else:
        width = FLOAT_BITS if config.mode == "prune" else config.start_bits
        count = max(sum(min(config.at_least, n) for n in sizes), 1)
    if limits[-1] < width * count:
        raise BudgetError(f"budget data_ratio allows {limits[-1]} bits: annc needs {width * count} "
                          f"({count} weights of {width} bits)")
    return limits


class JointHooks(Hooks):
    """W, V, Y and b of the algorithm above; W is the weights of the model, V is held as `toward` = V - Y."""

    def __init__(self, model: nn.Module, limit: int, config: Config):
        self.named = {name: layer.weight for name, layer in weight_layers(model).items()}
        self.weights, self.limit, self.config = list(self.named.values()), limit, config
        self.bits = [FLOAT_BITS if config.mode == "prune" else config.start_bits] * len(self.weights)
        coupled = [] if config.mode == "prune" else self.weights
        self.toward = [w.detach().clone() for w in coupled]  # V = W, Y = 0
        self.dual = [torch.zeros_like(w) for w in coupled]
        self.started, self.gap, self.trace = False, 0.0, []
        self.graph = trace(model) if config.live else None

    @torch.no_grad()
    def after_step(self, model: nn.Module, lr: float) -> None:
        beta = lr * self.config.rho
        if self.toward and beta > 0:  # outside the momentum
            torch._foreach_lerp_(self.weights, self.toward, beta / (1 + beta))  # (W + beta (V - Y)) / (1 + beta)
        if not self.started:
            self.update(0)
            self.started = True

    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        self.update(epoch)
        self.trace.append({"bits": list(self.bits), "kept": self.count_kept(), "gap": self.gap})

    @torch.no_grad()
    def update(self, epoch: int) -> None:
        """Projection of W, quantized copy V with new widths, dual step."""
        check_trained(self.named, f"a step of epoch {epoch + 1}", self.config.recipe.lr)
        self.project()
        if not self.toward:
            return
        seen = [w + y for w, y in zip(self.weights, self.dual, strict=True)]  # dense: Y is not 0 where W is
        apart = 0.0
        for i, points in enumerate(self.quantize(seen, epoch)):
            values = torch.from_numpy(points.astype(np.float32)).to(seen[i].device)
            quantized = values[nearest(seen[i], points)]
            apart += float((self.weights[i] - quantized).double().square().sum())
            self.dual[i].copy_(seen[i] - quantized)  # Y <- Y + W - V
            self.toward[i].copy_(quantized - self.dual[i])
        size = sum(float(w.double().square().sum()) for w in self.weights)
        self.gap = math.sqrt(apart / size) if size > 0 else 0.0  # |W - V| / |W|

    @torch.no_grad()
    def project(self) -> None:
        """W onto sum_l b_l |W_l|_0 <= S: a knapsack of single weights."""
        if self.config.mode == "quantize":
            return
        fill, at_least = self.config.fill, self.config.at_least
        masks = keep_worthiest(self.weights, self.bits, self.limit, fill=fill, at_least=at_least)
        found = dict(zip(self.named, masks, strict=True))
        if self.graph is not None:
            found = give_back(self.graph, found, self.grow)
        for name, weight in self.named.items():
            weight.mul_(found[name])

    def grow(self, kept: Mapping[str, Tensor], free: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the bits that `kept` leaves buy among `free`, by w^2 per bit of the code and of the position."""
        counts = [int(mask.sum()) for mask in kept.values()]
        left = self.limit - sum(b * count for b, count in zip(self.bits, counts, strict=True))
        shares = [torch.tensor([max(k, 1), w.numel() - k]) for k, w in zip(counts, self.weights, strict=True)]
        prices = [b + entropy_bits(share) / int(share[0]) for b, share in zip(self.bits, shares, strict=True)]
        added = keep_worthiest([weight * free[name] for name, weight in self.named.items()], self.bits, left,
                               fill=self.config.fill, prices=prices)
        return {name: mask & free[name] for (name, mask) in zip(self.named, added, strict=True)}

    def quantize(self, seen: list[Tensor], epoch: int) -> list[np.ndarray]:
        """Codebooks, with the 0, of `seen` = W + Y; their widths `bits` by the knapsack over layers."""
        joint = self.config.mode == "joint"
        sorted_values = (SortedValues(x, joint) for x in seen)  # one layer at a time in memory
        if self.config.bits_epochs is not None and epoch >= self.config.bits_epochs:
            return [values.fit(1 << b)[0] for values, b in zip(sorted_values, self.bits, strict=True)]
        widths = range(self.config.least_bits, self.config.most_bits + 1)
        fits = [[values.fit(1 << b) for b in widths] for values in sorted_values]
        kept = [max(count, min(self.config.at_least, x.numel())) if joint else x.numel()
                for count, x in zip(self.count_kept(), seen, strict=True)]
        costs = [[b * count for b in widths] for count in kept]  # a layer without weights costs nothing
        losses = [[error for _, error in fit] if count else [0.0] * len(widths)
                  for fit, count in zip(fits, kept, strict=True)]
        options = choose_options(costs, losses, self.limit)
        self.bits = [widths[option] for option in options]
        return [fit[option][0] for fit, option in zip(fits, options, strict=True)]

    def count_kept(self) -> list[int]:
        return [int(torch.count_nonzero(w)) for w in self.weights]

    def state(self) -> dict:
        return {name: getattr(self, name) for name in ("toward", "dual", "bits", "started", "trace")}

    def restore(self, state: dict) -> None:
        self.bits, self.started, self.trace = list(state["bits"]), state["started"], list(state["trace"])
        for mine, saved in zip(self.toward + self.dual, state["toward"] + state["dual"], strict=True):
            mine.copy_(saved)
