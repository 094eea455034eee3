"""CLIP-Q: Deep Network Compression Learning by In-Parallel Pruning-Quantization (Tung & Mori, CVPR 2018, pp. 7873-7882,
doi 10.1109/CVPR.2018.00821; extended in TPAMI).

A layer is pruned and quantized by one operator: small weights of either sign are clipped to 0, the rest of the axis is
partitioned into intervals, and every weight becomes the mean of its interval. Fine-tuning applies the operator anew in
every minibatch to full-precision weights that the gradient keeps updating, so that neither pruning nor membership is
final. Per layer, the share p to clip and the code width b are chosen beforehand by Bayesian optimization.

Algorithm
    per layer i:                                                                                      (search)
        theta_i = (p_i, b_i) = argmin  eps(theta) - lambda c_i(theta),   c_i = (m_i - s_i(theta)) / sum_j m_j
    per minibatch, per layer:                                                                   (fine-tuning)
        clip       c+, c-: the share p_i of the positive, of the negative weights lies in [c-, c+]; these become 0
        partition  [min W, c-) and (c+, max W] into 2^b_i - 1 intervals of equal width on each side
        quantize   W^ = mean of W over the interval of each weight
        forward and backward with W^;  W <- W - step(dL/dW^), for clipped weights too
    encode W^ of the last W

Symbols    W the shadow weight (`parametrizations.weight.original`), W^ levels[codes], theta_i Theta(p, bits), eps the
           held-out top-1 error in [0, 1] (`Task.error`), m_i 32 bits a weight, s_i `stored_bits`, lambda config.lam

Departures   The paper was not at hand: what it says is known from its abstract, Table 4, Figs 1 and 2, and summaries.
  * Split of the odd number of intervals: not known. "A" gives 2^(b-1) to the negative side; "B" shares them in
    proportion to the two ranges (nearly one common width); Fig. 2 agrees with both. A sign without survivors gets none.
    The outer ends min W and max W are our choice, and so is that a weight on an inner edge goes to the side of 0.
  * Counts: floor(p N) of each sign; where that is one short of floor(p N) of the layer, one more of the sign with the
    larger remainder, so that the number of zeros does not follow the signs, and a budget is kept. Weights equal to c+
    or c- are clipped with it; exact zeros count as clipped.
  * Bits: 2 or more, because a single interval leaves one sign without a level. Empty intervals store nothing.
  * eps: the paper takes images of the training set; here held-out ones, on which every method of this project chooses.
    No sharing of theta within blocks; first and last layer alike.
  * probe: whether the paper fine-tunes inside eps is not known. Without (probe = 0) every theta looks far worse than it
    is after fine-tuning, small layers most, which then stay dense; with it, eps is what a theta costs once the other
    weights have answered. lambda is then an exchange rate of errors that last. The search and one rate for all layers
    have not been compared at equal bytes; small layers still come out denser (ip3 of LeNet-300 at 50 %): what one can
    save (0.4 % of the bits) is less than the noise of an error that is counted on a thousand images.
  * s_i: a relative position of `index_bits` and a b-bit code per entry, fillers included, and 2^b values; no Huffman
    code. The paper stores a sparse code; the width of its positions is not known.
  * Not known: the order of layers, and whether those before are compressed in eps (here they are); lambda, bounds (p in
    0..0.98 by 0.01, b in 2..8), start (Sobol), kernel (Matern-5/2, on values cut at their median: see
    `core/fit/bayes.py`). Reported of the paper: a Gaussian process, expected improvement, 20 to 30 evaluations a layer.
    search = "random" and "uniform" are baselines.
  * Recipe: not known. SGD below the training rate, dropped twice; weight decay acts on W; biases and batch norm stay
    float and are trained. No gradient flows through the means.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .core.artifact import Codebook, CompressedModel, CompressedTensor
from .core.budget import Budget
from .core.errors import BudgetError, CompressError, ConfigError
from .core.file.coding import filler_count
from .core.fit.bayes import SEARCHES, minimize
from .core.fit.size import Knob, untrained
from .core.graph.build import assemble, own_copy
from .core.graph.weights import layer_of, place_of, weight_layers
from .core.method import check_call
from .core.settings import check_idle
from .core.train.finetune import Recipe, train
from .core.train.run import NullRun, Run
from .core.train.start import ready
from .core.train.task import First, Task
from .core.typed import check_types

DATA = "train"
SIZE_KNOB = Knob("density", 1e-3, 1.0)
P_GRID = tuple(i / 100 for i in range(99))  # searched shares of clipped weights
BITS_GRID = tuple(range(2, 9))  # searched code widths
SPLITS = ("A", "B")
SEARCHING = ("lam", "evaluations", "initial", "probe", "held_out_inputs", "index_bits")  # settings of a search


class Theta(NamedTuple):
    """What is decided per layer: the share of clipped weights and the width of a code."""

    p: float
    bits: int


@dataclass(frozen=True)
class Config:
    """search "bayes" or "random" chooses what the budget leaves open; "uniform" takes the budget's density and bits.

    lam              weight of the share of the network's bits that is saved, against the top-1 error in [0, 1], or
                     against what else the task is judged by (another metric, else the held-out loss) in its own unit
    evaluations      per layer, the first `initial` of them spread out
    probe            minibatches of fine-tuning within each evaluation, at the rate of `finetune`; 0: none
    held_out_inputs  how many, from the first, the search measures the error on
    index_bits       width of a relative position in the bits that the search counts
    split            "A" or "B": how the two signs share the intervals, see above
    """

    search: str = "bayes"
    lam: float = 0.5
    evaluations: int = 30
    initial: int = 5
    probe: int = 40
    held_out_inputs: int = 2000
    index_bits: int = 5
    split: str = "A"
    finetune: Recipe = Recipe(epochs=20, lr=2e-2, schedule="step")

    def __post_init__(self):
        check_types(self)
        for name, allowed in (("search", (*SEARCHES, "uniform")), ("split", SPLITS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} = {getattr(self, name)!r}: allowed are {', '.join(allowed)}")
        limits = {"lam": (0, 1e9), "evaluations": (1, 1000), "initial": (1, 1000), "probe": (0, 10**6),
                  "held_out_inputs": (1, 10**9), "index_bits": (1, 16)}
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} = {getattr(self, name)!r}: allowed is {low}..{high}")
        check_idle(self)

    def idle(self) -> dict[str, str]:
        found = {"bayes": (), "random": ("initial",), "uniform": SEARCHING}[self.search]
        return dict.fromkeys(found, f"search = {self.search!r}")


def quick(config: Config) -> Config:
    """Without training, and a search without probes: what `compress_to_size` looks for the size with."""
    found = untrained(config)
    return found if config.search == "uniform" else replace(found, probe=0)


def compress(model: nn.Module, task: Task, budget: Budget, config: Config, generator: torch.Generator,
             *, run: Run | None = None) -> CompressedModel:
    """Budget: density and bits (2..16), numbers or {layer: number}. search = "uniform" needs both; the other searches
    take at most one, and choose what is left out."""
    check_call(__name__, model, task, budget, config, generator)
    run = NullRun() if run is None else run
    model = own_copy(model)
    spaces = open_choices(model, budget, config.search)
    probing = config.search != "uniform" and config.probe > 0  # trains, whatever epochs there are afterwards
    task = ready(model, task, replace(config.finetune, epochs=max(config.finetune.epochs, int(probing))))
    if config.search == "uniform":
        theta, trace = {name: choices[0] for name, choices in spaces.items()}, {}
        for name, one in theta.items() if config.finetune.epochs > 0 else ():  # a refusal comes before the training
            encode(name, layer_of(model, name).weight, one, config.split)
    else:
        theta, trace = search_theta(copy.deepcopy(model), task, spaces, config, generator, run.stage("search"))
    fine_tune(model, task, theta, config, generator, run.stage("fine-tune"))
    weights = {name: encode(name, layer.weight, theta[name], config.split)
               for name, layer in weight_layers(model).items() if name in theta}
    return assemble(model, weights, notes={
        "theta": {name: t._asdict() for name, t in theta.items()}, "trace": trace,
        "empty_layers": [name for name, tensor in weights.items() if tensor.kept == 0]})


def open_choices(model: nn.Module, budget: Budget, search: str) -> dict[str, list[Theta]]:
    """{layer: the thetas that the budget leaves open}; one each for search = "uniform"."""
    fields = ("density", "bits")
    uniform = search == "uniform"
    budget.require("clip_q", *(fields if uniform else ()), optional=() if uniform else fields)
    if not uniform and budget.density is not None and budget.bits is not None:
        raise BudgetError(f"clip_q: density and bits leave search = {search!r} nothing to choose: give at most one")
    layers = weight_layers(model)
    density, bits = (budget.per_layer(field, layers) for field in fields)
    if budget.bits is not None and min(bits.values()) < 2:
        raise BudgetError("clip_q reserves one code for 0 and needs a level for each sign: bits must be 2 or more")
    return {name: [Theta(p, b) for p in (P_GRID if density[name] is None else (1 - density[name],))
                   for b in (BITS_GRID if bits[name] is None else (int(bits[name]),))] for name in density}


# --- the operator (Fig. 2) ----------------------------------------------------------


def partition(weight: Tensor, theta: Theta, split: str = "A") -> tuple[Tensor, Tensor]:
    """Codes int64 [like weight] and levels float32 [2^b] with W^ = levels[codes].

    Code 0 is the clipped interval, level 0.0. Codes 1, 2, ... are the positive intervals outwards from c+, codes
    2^b - 1, 2^b - 2, ... the negative ones outwards from c-. Empty intervals have level 0.
    """
    flat = weight.detach().reshape(-1)
    ordered = _sorted(flat)
    n, zero = len(flat), ordered.new_zeros(1)
    negative, upto = (int(torch.searchsorted(ordered, zero, right=right)) for right in (False, True))
    k_down, k_up = clip_counts(negative, n - upto, n, theta.p)
    low, high, least, most = ordered[[min(negative - k_down, n - 1), upto + k_up - 1, 0, -1]].tolist()
    low, high = low if k_down else 0.0, high if k_up else 0.0  # c-, c+
    n_down, n_up = split_intervals(theta.bits, max(low - least, 0.0), max(most - high, 0.0), split)
    steps = torch.zeros_like(flat)  # intervals outwards from the clipped one; of the two sides one is always 0
    if n_up:
        steps += ((flat - high) / ((most - high) / n_up)).ceil_().clamp_(0, n_up)
    if n_down:
        steps += ((flat - low) / ((low - least) / n_down)).floor_().clamp_(-n_down, 0)
    size = 1 << theta.bits
    codes = steps.long().bitwise_and_(size - 1)  # -1 is the last code
    sums = torch.bincount(codes, weights=flat.double(), minlength=size)
    levels = (sums / torch.bincount(codes, minlength=size).clamp_min(1)).float()  # means of full-precision weights
    levels[0] = 0.0
    return codes.reshape(weight.shape), levels


def _sorted(flat: Tensor) -> Tensor:
    """Ascending; on the CPU by NumPy, which is many times faster than torch.sort for float32."""
    return torch.from_numpy(np.sort(flat.numpy())) if flat.device.type == "cpu" else torch.sort(flat).values


def clip_counts(negative: int, positive: int, n: int, p: float) -> tuple[int, int]:
    """How many of `negative` and of `positive` weights are clipped; the n - negative - positive zeros are anyway."""
    down, up, both = (min(math.floor(p * count * (1 + 1e-12)), max(count - 1, 0))  # 0.29 * 100 is 29; p < 1
                      for count in (negative, positive, n))
    if down + up + (n - negative - positive) < both:  # by 1: the two remainders are less than 2
        return (down + 1, up) if p * negative - down > p * positive - up else (down, up + 1)
    return down, up


def split_intervals(bits: int, below: float, above: float, split: str) -> tuple[int, int]:
    """2^bits - 1 intervals as (negative, positive), for ranges of survivors of these lengths."""
    count = (1 << bits) - 1
    if not (below > 0 and above > 0 and math.isfinite(below + above)):  # a sign without survivors, or no number
        return (count, 0) if below > 0 else (0, count) if above > 0 else (0, 0)
    down = {"A": 1 << bits - 1, "B": min(max(round(count * below / (below + above)), 1), count - 1)}[split]
    return down, count - down


class ClipQuantize(nn.Module):
    """Parametrization W -> W^, anew from the shadow weight W in every forward pass; dL/dW = dL/dW^ at every entry."""

    def __init__(self, theta: Theta, split: str):
        super().__init__()
        self.theta, self.split = theta, split

    def forward(self, weight: Tensor) -> Tensor:
        codes, levels = partition(weight, self.theta, self.split)
        return levels[codes] + (weight - weight.detach())  # + 0: the value is W^ itself, the gradient passes through


def attach(model: nn.Module, theta: Mapping[str, Theta], split: str) -> None:
    """Let every layer of `theta` compute with W^."""
    for name, one in theta.items():
        parametrize.register_parametrization(*place_of(layer_of(model, name)), ClipQuantize(one, split))


def fine_tune(model: nn.Module, task: Task, theta: Mapping[str, Theta], config: Config, generator: torch.Generator,
              run: Run) -> None:
    """Train `model` in place through W^; afterwards its weights are the shadow weights W."""
    attach(model, theta, config.split)
    train(model, task, config.finetune, generator, run=run)
    for name in theta:
        parametrize.remove_parametrizations(*place_of(layer_of(model, name)), leave_parametrized=False)


def encode(name: str, weight: Tensor, theta: Theta, split: str) -> CompressedTensor:
    """W^ as codes; only levels in use are kept, in the order of their codes."""
    codes, levels = (part.cpu() for part in partition(weight, theta, split))
    if not bool(codes.any()) and bool((weight != 0).any()):
        raise CompressError(f"clipping {theta.p:g} of the weights of {name} leaves none: too many of them are equal")
    used = torch.cat([torch.zeros(1, dtype=torch.int64), codes[codes > 0].unique()])
    return CompressedTensor.of(torch.searchsorted(used, codes), Codebook(levels[used]), theta.bits)


# --- the search ---------------------------------------------------------------------------------------------


def search_theta(model: nn.Module, task: Task, spaces: Mapping[str, list[Theta]], config: Config,
                 generator: torch.Generator, run: Run) -> tuple[dict[str, Theta], dict[str, list[dict]]]:
    """({layer: theta}, {layer: its evaluations in order}), layer by layer; `model` ends up compressed."""
    task.placed(model)
    task = replace(task, held_out=First(task.held_out, examples=config.held_out_inputs))
    if config.probe:
        task = replace(task, train=First(task.train, n=config.probe))
    theta, trace, saved = {}, {}, run.load()
    if saved is not None:
        trace = saved["trace"]
        generator.set_state(saved["generator"])
    for name in spaces:
        attach(model, {name: spaces[name][0]}, config.split)
        if name not in trace:
            search_layer(model, task, name, spaces, config, generator, run, trace)
            run.save({"trace": trace, "generator": generator.get_state()})
        best = min(trace[name], key=lambda seen: seen["objective"])
        if best["objective"] == math.inf:
            raise CompressError(f"no choice for {name} has a finite error on the held-out data: look at the metric")
        theta[name] = Theta(best["p"], best["bits"])
        probe(model, task, name, theta[name], config)
    for name in theta:
        parametrize.remove_parametrizations(*place_of(layer_of(model, name)), leave_parametrized=True)
    return theta, trace


def search_layer(model: nn.Module, task: Task, name: str, spaces: Mapping[str, list[Theta]], config: Config,
                 generator: torch.Generator, run: Run, trace: dict[str, list[dict]]) -> None:
    """Put the evaluations of min eps(theta) - lambda c_i(theta) into trace[name]; `model` is left as it was."""
    layer, space = layer_of(model, name), spaces[name]
    start = copy.deepcopy(model.state_dict())
    total = sum(32 * layer_of(model, each).weight.numel() for each in spaces)  # sum_j m_j
    steps = sum(min(config.evaluations, len(each)) for each in spaces.values())
    trace[name] = []

    def evaluate(index: int) -> float:
        probe(model, task, name, space[index], config)
        with parametrize.cached():
            error = task.error(model)  # eps(theta)
        stored = stored_bits(layer.weight, space[index].bits, config.index_bits)  # s_i(theta)
        saved = (32 * layer.weight.numel() - stored) / total  # c_i(theta)
        objective = math.inf if math.isnan(error) else error - config.lam * saved
        trace[name].append({**space[index]._asdict(), "error": error, "saved": saved, "objective": objective})
        run.report(sum(map(len, trace.values())), steps, error=error, saved=saved)
        model.load_state_dict(start)
        return objective

    points = np.array([(theta.p, theta.bits / 8) for theta in space])
    seed = int(torch.randint(2**31, (), generator=generator))
    minimize(points, evaluate, config.evaluations, config.initial, seed, config.search)


def probe(model: nn.Module, task: Task, name: str, theta: Theta, config: Config) -> None:
    """Let layer `name` compute with theta, and fine-tune `model` in place for `config.probe` minibatches, always the
    same ones: what a theta costs shows only once the other weights have answered to it."""
    module, tensor = place_of(layer_of(model, name))
    module.parametrizations[tensor][0].theta = theta
    if config.probe:
        recipe = replace(config.finetune, epochs=1, schedule="constant", warmup=0.0, ema=0.0)
        train(model, task, recipe, torch.Generator().manual_seed(0))


def stored_bits(weight: Tensor, bits: int, index_bits: int) -> int:
    """s_i: bits of a relative index and a code per stored entry, fillers included, and 2^bits float32 values."""
    mask = (weight.detach() != 0).reshape(-1).cpu().numpy()
    return (int(mask.sum()) + filler_count(mask, index_bits)) * (bits + index_bits) + 32 * (1 << bits)
