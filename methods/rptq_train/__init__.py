"""RPTQ, trained form: rate-aware training with the given network as teacher, for the file's own code lengths.

A method of this project, which joins known parts: entropy-constrained training (Wiedemann et al. 2018, arXiv
1812.07520), entropy-penalized reparameterization (Oktay et al., ICLR 2020), straight-through gradients (Bengio et al.
2013), dampened oscillations (Nagel et al., ICML 2022), distillation (Hinton et al. 2015), and the steps of
RPTQ (methods/rptq).

The quantizer of the post-training form stands inside the training. A weight gets the code that costs least in error and
bits together, and the price of a bit is steered until the file has the size that was asked for. The float weights
behind the codes go on learning, those at 0 too: what is pruned may come back.

Algorithm
    s_l as in RPTQ, for the folded weights; of channel o of the unfolded one:  s_o = s_l / |gamma_o / sigma_o|
    forward with  sign(w) code(|w| / s_o) s_o,  code(u) = number of thresholds that u reaches; backward straight to w
        threshold between k and k + 1:  k + 1/2 + lam / 2 (bits(k + 1) - bits(k)), made rising
        bits(k) = -log2 of the share of k in the layer, + 1 for the sign where k > 0
    every 8 steps:  w -= 8 lr damping (w - decoded w)
        bits and thresholds anew;  lam *= (entropy of all codes / wanted)^0.8, by a tenth at most
        wanted falls from the start's size to that of the budget in the first half of the training, then stays;
        after each epoch, from then on, dead codes go and it is corrected by what the file takes
    in the last tenth bits stay, and lam only rises, where the codes take more than is wanted
    loss = 0.1 hard + 0.9 T^2 KL(teacher, student), T = 2
    at the end: the codes that were trained, without as few as it takes to fit: the nearest to their threshold; batch
        norm folded, ranges

Symbols    code, thresholds, bits: Rated and core/fit/rates.py;  lam RateAware.lam, in units of s^2, from ln 2 / 6

Contexts   contexts = True prices "is it 0" by p, the product of the densities of the weight's row and column over that
           of the layer, at most 1/2: units that are little used become dear and die.

Dead units are removed (`shrink`), by contexts or not, before the file is weighed: their codes cost nothing, and others
may have the bytes. From the middle of the training their codes are looked for after each epoch, and stay 0: were they
only not counted, they would come back as soon as lam falls, and the bytes would be spent twice.

Departures from its specification, and choices that it leaves
  * A code is never dearer than the next larger one, so that every threshold is k + 1/2 at least: else zeros that became
    rare become rarer with every look, until a layer has none.
  * Scales of channels are rounded to 16 bits where `bias_bits` = 16. One scale a layer would be less, but s_o would
    then have to follow gamma and sigma, and sigma follows s_o: the two chase each other, and batch norm's statistics
    would be behind when the training ends.
  * c = none starts at `start` times the budget, near it; wanted falls geometrically. From fine steps (1.5, the
    specification's) lam has to rise far. Weights gather at the thresholds; where these move much, whole layers cross
    them together and change what is rare and dear, and the network hardly recovers.
  * The rate has to fit the network. A weight that crosses a threshold moves what is read by a whole s, however small
    its own step is: noise of the gradients is enlarged, the more the higher the rate. From the coarse steps ResNet-18
    ends better with 0.02 than with 0.01, ResNet-20 worse with 0.005 than with 0.002 (paper_configs/rptq_train.toml);
    without a teacher, whose gradients are less noisy, it is best with 0.001. The default is low, and a trial of another
    one pays.
  * Zeros may be held from some step on (`holding`), as methods with fixed masks have them. ResNet-20 ends worse so,
    at two rates (the same table): weights that come back are worth more than the noise that they make.
  * Prices stay in the last tenth, and codes are those of the training, even if the file could be a little larger:
    weights gather at the thresholds, and a little less lam moves many codes at once. For the same reason a file that is
    too large loses single codes, by their distance, and lam stays.
  * The specification wants a steered size of 99 to 100 % of the budget, and codes and positions within 2 % of the
    steering entropy. The steering aims at 98 % of the budget instead, ranges of activations counted: a file that is too
    large loses codes that were trained. In the last tenth lam only rises, so that a file may end a little lower: at
    96.8 %, and within 1.7 % of the entropy, in the test of it (tests/test_rptq_train.py). Where a training is too short
    to get there, codes go until 99 to 100 % are used.
  * Codes are at most twice the largest of the start. Counts are smoothed by 0.05, densities by half a weight.
"""

import copy
import math
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..core.artifact import Affine, CompressedModel, CompressedTensor
from ..core.budget import Budget
from ..core.errors import BudgetError, CompressWarning, ConfigError
from ..core.file.storage import file_bytes
from ..core.fit.calibrate import calibrate, check_calibration
from ..core.fit.sixteen_bit import rounded
from ..core.fit.size import any_ranges
from ..core.graph.build import apply, assemble, own_copy, weight_layers
from ..core.graph.fold import fold_batchnorm, norm_ratio, norms_after, scale_channels
from ..core.graph.graph import trace
from ..core.graph.shrink import shrink
from ..core.method import check_call
from ..core.settings import check_idle
from ..core.train.finetune import train
from ..core.train.recipe import Distill, Recipe
from ..core.train.run import NullRun, Run
from ..core.train.start import ready
from ..core.train.task import Task
from ..core.typed import check_types
from ..rptq import width, with_half_biases
from .rated import RateAware
from .start import begin

DATA = "train"
LEAST, AIM, TRIES = 0.99, 0.98, 24


@dataclass(frozen=True)
class Config:
    """recipe: of the training, with its teacher; c: of the steps, or none for a start at `start` times the budget.

    falling       share of the training in which the wanted size falls from the start's to the budget's
    settling      share of the training, its last part, in which prices stay
    holding       share of the training, its last part, in which zeros stay, and no more come
    damping       how fast weights go back to the value of their code, in units of the learning rate
    contexts      price zeros by the use of their row and column, so that units die
    sensitivity_inputs, calibration_inputs   for the steps, for ranges
    """

    recipe: Recipe = Recipe(epochs=6, lr=0.005, weight_decay=0.0, distill=Distill(temperature=2.0, alpha=0.1))
    c: float | None = None
    start: float = 1.1
    falling: float = 0.5
    settling: float = 0.1
    holding: float = 0.0
    damping: float = 0.0
    contexts: bool = False
    activation_bits: int = 8
    range_method: str = "minmax"
    bias_bits: int = 16
    sensitivity_inputs: int = 96
    calibration_inputs: int = 1024

    def __post_init__(self):
        check_types(self)
        check_calibration(self.activation_bits, min(self.calibration_inputs, self.sensitivity_inputs),
                          self.range_method)
        for name in ("c", "start"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} = {value}: allowed is a number above 0")
        if not 0 <= self.damping < math.inf:
            raise ConfigError(f"damping = {self.damping}: allowed is a number of 0 or more")
        if not (0 <= self.falling and 0 <= self.settling and self.falling + self.settling <= 1):
            raise ConfigError(f"falling = {self.falling}, settling = {self.settling}: allowed are shares of the "
                              "training that together are at most 1")
        if not 0 <= self.holding <= 1:
            raise ConfigError(f"holding = {self.holding}: allowed is a share of the training, 0 to 1")
        if self.bias_bits not in (16, 32):
            raise ConfigError(f"bias_bits = {self.bias_bits}: allowed are 16, 32")
        if self.recipe.ema > 0:
            raise ConfigError(f"recipe.ema = {self.recipe.ema:g}: allowed is 0: an average of the biases would undo "
                              "what dead codes left in them")
        check_idle(self)

    def idle(self) -> dict[str, str]:
        return {} if self.c is None else {"start": "it looks for c, which is given"}


def compress(model: nn.Module, task: Task, budget: Budget, config: Config, generator: torch.Generator,
             *, run: Run | None = None) -> CompressedModel:
    """Budget: size_ratio, of the whole file to the float32 parameters and statistics.

    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> batches = [(torch.rand(20, 1, 8, 8), torch.arange(20) % 4) for _ in range(8)]
    >>> config = Config(recipe=Recipe(epochs=4, lr=0.05, distill=Distill()))
    >>> small = compress(network, Task.from_loader(batches, batches), Budget(size_ratio=0.12), config,
    ...                  torch.Generator().manual_seed(0))
    >>> file_bytes(small) <= 0.12 * 4 * 2212
    True
    """
    check_call(__name__, model, task, budget, config, generator)
    run = NullRun() if run is None else run
    budget.require("rptq_train", "size_ratio")
    model = own_copy(model).cpu()
    trace(model)
    budget.per_layer("size_ratio", weight_layers(model))  # refuses a network without layers
    task = ready(own_copy(model), task, config)
    start, c, limit, least = begin(model, task, budget, config, generator)
    student, skeleton = own_copy(model), model
    task.placed(student)
    total = config.recipe.epochs * len(task.train) if task.train is not None else 0
    settling = round((1 - config.settling) * total) if total else math.inf
    holding = round((1 - config.holding) * total) if total and config.holding > 0 else math.inf

    def weigh(hooks: RateAware) -> int:
        return Ending(hooks.bare(), skeleton, hooks, config, c).expected()

    hooks = RateAware(student, start.steps(c), 8 * (limit - least), round(config.falling * total), config.contexts,
                      settling=settling, holding=holding, damping=config.damping, weigh=weigh, limit=AIM * limit)
    with hooks:
        train(student, task, config.recipe, generator, hooks=hooks, run=run.stage("rate"))
        hooks.refresh(steer=False)
    ending = Ending(student.cpu(), skeleton, hooks, config, c)
    made = ending.with_ranges(task.calibration_inputs(config.calibration_inputs).cpu()).fitted(limit)
    empty = [name for name, tensor in made.weights.items() if not bool(tensor.codes.any())]
    if empty:
        warnings.warn(f"no code is left in {', '.join(empty)}, in a file of {file_bytes(made):,} of {limit:,} bytes: a "
                      "longer training, a lower rate or a larger file may keep some", CompressWarning, stacklevel=2)
    return made


class Ending:
    """From trained weights to a file that fits; `student` has the float weights behind the codes."""

    def __init__(self, student: nn.Module, skeleton: nn.Module, hooks: RateAware, config: Config, c: float):
        self.skeleton, self.hooks, self.config, self.ranges = skeleton, hooks, config, {}
        self.quantizers = {name: copy.deepcopy(one).cpu() for name, one in hooks.quantizers.items()}
        self.notes = {"c": c, "lam": hooks.lam, "entropy_bits": hooks.entropy, "steps": dict(hooks.units)}
        self.weights = {name: layer.weight.detach() for name, layer in weight_layers(student).items()}
        self.ratios = {layer: norm_ratio(student.get_submodule(norm)) for layer, norm in norms_after(student).items()}
        self.folded, self.topology = fold_batchnorm(student)

    def with_ranges(self, inputs: Tensor) -> "Ending":
        """The same, with activation ranges of the trained codes on `inputs`."""
        made = self.store(self.codes())
        self.ranges = calibrate(apply(made, self.skeleton), inputs, self.config.activation_bits,
                                self.config.range_method)
        return self

    def codes(self, less: float = 0.0) -> dict[str, Tensor]:
        """The trained codes, without the share `less` of those that are not 0: the nearest to their threshold."""
        found = {name: self.quantizers[name].codes(weight) for name, weight in self.weights.items()}
        if less > 0:
            above = {name: self.quantizers[name].above(self.weights[name]) for name in found}
            kept = torch.cat([above[name][codes != 0] for name, codes in found.items()])
            count = math.ceil(less * len(kept))
            edge = kept.kthvalue(count).values if count > 0 else -math.inf
            found = {name: torch.where(above[name] > edge, codes, 0) for name, codes in found.items()}
        return found

    def store(self, found: dict[str, Tensor]) -> CompressedModel:
        weights = {}
        for name, codes in found.items():
            step = self.quantizers[name].step.flatten()
            step = step if name in self.ratios else step[0]
            grid = Affine(step, torch.zeros_like(step, dtype=torch.int32))
            weights[name] = CompressedTensor.of(codes.to(torch.int32), grid, width(codes))
            if name in self.ratios:
                folded = scale_channels(weights[name], self.ratios[name])
                weights[name] = rounded(folded) if self.config.bias_bits == 16 else folded
        made = assemble(self.folded, weights, topology=self.topology, activations=self.ranges, notes=self.notes)
        made = shrink(made, self.skeleton)
        return with_half_biases(made) if self.config.bias_bits == 16 else made

    def at(self, less: float) -> tuple[CompressedModel, int]:
        made = self.store(self.codes(less))
        return made, file_bytes(made)

    def expected(self) -> int:
        """Bytes of the file of the trained codes with ranges, before these are known."""
        ranges = any_ranges(trace(self.folded), self.config.activation_bits)
        return file_bytes(replace(self.store(self.codes()), activations=ranges))

    def fitted(self, limit: int) -> CompressedModel:
        """The file of the trained codes; where `limit` is too small for it, without as few of them as it takes."""
        made, size = self.at(0.0)
        if size <= limit:
            return made
        low, high, best, less = 0.0, 1.0, None, size / limit - 1
        for _ in range(TRIES):
            less = min(max(less, 1e-4), 1.0)
            made, size = self.at(less)
            low, high, best = (low, less, made) if size <= limit else (less, high, best)
            if LEAST * limit <= size <= limit or high - low < 1e-4:
                break
            less = 2 * less if best is None else (low + high) / 2
        if best is None:
            raise BudgetError(f"no file of at most {limit} bytes came out of the training, the smallest took {size}: "
                              "allowed are more epochs or larger files")
        return best
