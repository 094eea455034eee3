"""RPTQ, rate-aware post-training quantization: a method of this project, which joins known parts.

Entropy-coded scalar quantization (Gish & Pierce, IEEE Trans. Information Theory 1968), rate-distortion optimized
quantization of networks (DeepCABAC, Wiedemann et al. 2020), GPTQ (Frantar et al. 2022, after Optimal Brain Compression,
Frantar & Alistarh 2022), coordinate descent (QuantEase, Behdin et al. 2023), bias correction (Nagel et al. 2019).

A file is entropy coded, and under an entropy coder the best quantizer is a uniform grid without a width limit, whose
step says how much the output suffers. So a layer has one step, set by what the outputs feel of it and by what the file
may take. Zeros come by themselves: it prunes and quantizes at once. It needs no labels and no training: a network, some
inputs, a size.

Algorithm
    fold batch norm into weights and biases
    F_l = mean over inputs of || d(r . logits) / d W_l ||^2,  E[r r^T] = I
    s_l = c / 100 sqrt(n_l / F_l)                     one step a layer of n_l weights; c is the only knob
    for each layer, its inputs taken from the network quantized so far:
        H = E[x x^T], m = E[x];  C = GPTQ(W, H, s)
        3 sweeps of coordinate descent on the error, plus lam mean(H_ii) s^2 bits(C)    (optional)
        bias += (W - s C) m
    c by the size of the file (Budget.size_ratio), or by the agreement with the float network

Symbols    F_l in core/fit/sensitivity.py; H, m in moments.py; GPTQ in gptq.py; descent in descent.py; bits, lam in
           rates.py; the loop over the layers in sequential.py.  s_l Quantizer.steps;  c Trial.c

Departures from its specification, and choices that it leaves
  * The specification descends after GPTQ, with the price lam of a bit. At equal bytes that came out worse than GPTQ
    with larger steps (paper_configs/rptq.toml has both), so that rounding = "gptq" is the default.
  * r are random signs, not normal: F of a linear network is then exact.
  * A block of layers is one layer. At most 64 kernel windows of an input enter H, drawn for each batch; where a channel
    has more than 8,192 weights, H is kept in diagonal blocks.
  * Descent may also leave a code as it was, so that no step raises the objective; bits are those of the codes at the
    start of a sweep.
  * Biases are stored in 16 bits where they are finite there (`bias_bits`).
  * What is no Conv2d and no Linear of the graph (other convolutions, embeddings, what torch.fx cannot look into) has no
    H and no m: its codes are the nearest.
  * A layer that the outputs do not depend on gets codes of 0, as one at the coarsest step does. Codes have at most 16
    bits, so that there is a finest c.
  * The search for a size starts where plain rounding has that entropy, and ends at 97 to 100 % of the budget. A network
    whose finest file is smaller gets that.
  * Without a budget: the largest c found at which at most `points` per cent of `check_inputs` held-out inputs change
    their class. That counts every change, to the better too; their labels are not read. Activations are float there:
    with few `activation_bits` more change.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..core.artifact import MAX_BITS, ActivationQuantizer, Affine, CompressedModel, CompressedTensor
from ..core.budget import Budget
from ..core.errors import ConfigError
from ..core.file.storage import to_bytes
from ..core.fit.calibrate import check_calibration
from ..core.fit.moments import Moments
from ..core.fit.rates import LAM
from ..core.fit.rounding import check_rounding, round_weight
from ..core.fit.sensitivity import sensitivities
from ..core.fit.sequential import quantize_in_order
from ..core.fit.size import any_ranges
from ..core.graph.build import apply, assemble, float_bytes, own_copy, weight_layers
from ..core.graph.fold import fold_batchnorm
from ..core.graph.graph import trace
from ..core.method import check_call
from ..core.settings import check_idle
from ..core.train.loaders import try_call
from ..core.train.run import NullRun, Run
from ..core.train.task import Task
from ..core.typed import check_types
from .search import Trial, search_agreement, search_size

DATA = "calibration"
TOP = (1 << MAX_BITS - 1) - 1  # largest code


@dataclass(frozen=True)
class Config:
    """points: per cent of inputs that may change class, where there is no budget.

    rounding   "gptq", "descent" (after it, on error and rate together), or "nearest"
    lam        price of a bit in units of s^2, for "descent"
    correct    move the mean of the error into the biases
    sensitivity_inputs, calibration_inputs, check_inputs   for F; for H, m and ranges; held-out ones for the agreement
    """

    points: float = 1.0
    rounding: str = "gptq"
    lam: float = LAM
    correct: bool = True
    activation_bits: int = 8
    range_method: str = "minmax"
    bias_bits: int = 16
    sensitivity_inputs: int = 96
    calibration_inputs: int = 512
    check_inputs: int = 1024

    def __post_init__(self):
        check_types(self)
        least = min(self.sensitivity_inputs, self.calibration_inputs, self.check_inputs)
        check_calibration(self.activation_bits, least, self.range_method)
        check_rounding(self.rounding)
        if not 0 < self.points < 100:
            raise ConfigError(f"points = {self.points}: allowed is between 0 and 100")
        if not 0 <= self.lam < float("inf"):
            raise ConfigError(f"lam = {self.lam}: allowed is 0 or more")
        if self.bias_bits not in (16, 32):
            raise ConfigError(f"bias_bits = {self.bias_bits}: allowed are 16, 32")
        check_idle(self)

    def idle(self) -> dict[str, str]:
        return {} if self.rounding == "descent" else {"lam": f"rounding = {self.rounding!r} has no price"}


def compress(model: nn.Module, task: Task, budget: Budget, config: Config, generator: torch.Generator,
             *, run: Run | None = None) -> CompressedModel:
    """Budget: optionally size_ratio, of the whole file to the float32 parameters and statistics.

    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> task = Task.from_inputs(torch.rand(40, 1, 8, 8))
    >>> small = compress(network, task, Budget(size_ratio=0.15), Config(), torch.Generator().manual_seed(0))
    >>> 0.97 < len(to_bytes(small)[0]) / (0.15 * 4 * 2212) <= 1
    True
    """
    check_call(__name__, model, task, budget, config, generator)
    run = NullRun() if run is None else run
    budget.require("rptq", optional=("size_ratio",))
    model = own_copy(model)
    trace(model)
    budget.per_layer("bits", weight_layers(model))  # refuses a network without layers
    inputs = task.calibration_inputs(max(config.calibration_inputs, config.sensitivity_inputs)).cpu().contiguous()
    quantizer = Quantizer(model, inputs, config, generator)
    if budget.size_ratio is None:
        found = search_agreement(quantizer, quantizer.agreement_on(held_out_inputs(task, config.check_inputs)),
                                 config.points, run)
    else:
        found = search_size(quantizer, budget.size_ratio, float_bytes(model), run)
    return found.compressed


def held_out_inputs(task: Task, n: int) -> Tensor:
    return replace(task, calibration=task.held_out).calibration_inputs(n).cpu().contiguous()


class Quantizer:
    """The network folded, its sensitivities, and what a pass at a given c makes of it."""

    def __init__(self, model: nn.Module, inputs: Tensor, config: Config, generator: torch.Generator):
        self.config, self.skeleton = config, model
        self.folded, self.topology = fold_batchnorm(model)
        self.seed = int(torch.randint(2**62, (), generator=generator))  # every pass looks at the same windows
        self.inputs = inputs[:config.calibration_inputs]
        felt = sensitivities(self.folded, inputs[:config.sensitivity_inputs], generator)
        self.weights = {name: layer.weight.detach() for name, layer in weight_layers(self.folded).items()}
        self.peaks = {name: max(float(w.abs().max()), torch.finfo(torch.float32).tiny * TOP)
                      for name, w in self.weights.items()}
        self.units = {name: (w.numel() / felt[name])**0.5 / 100 if felt[name] > 0 else float("inf")
                      for name, w in self.weights.items()}  # steps at c = 1
        finite = [self.peaks[name] / unit for name, unit in self.units.items()
                  if unit < float("inf") and bool(self.weights[name].any())]  # a layer of zeros has no finest codes
        self.coarsest, self.finest = (4 * max(finite), min(finite) / TOP) if finite else (1.0, 1.0)

    def steps(self, c: float) -> dict[str, float]:
        """{layer: s_l}, between what leaves no code but 0 and what the widest codes allow."""
        return {name: min(max(c * unit, 1.1 * self.peaks[name] / TOP), 4 * self.peaks[name])
                for name, unit in self.units.items()}

    def trial(self, c: float) -> Trial:
        """The network at `c` and the bytes of its file."""
        config, steps = self.config, self.steps(c)

        def fit(name: str, weight: Tensor, moments: Moments | None) -> CompressedTensor:
            scale = torch.tensor(steps[name])
            if steps[name] >= 4 * self.peaks[name]:  # GPTQ hands errors on, which add up to codes
                codes = torch.zeros(weight.shape, dtype=torch.int32)
            else:
                codes = round_weight(config.rounding, weight, moments, scale, -TOP, TOP, lam=config.lam)
            return CompressedTensor.of(codes, Affine(scale, torch.zeros_like(scale, dtype=torch.int32)), width(codes))

        module, weights, ranges = quantize_in_order(
            self.folded, self.inputs, fit,
            torch.Generator().manual_seed(self.seed), bits=config.activation_bits,
            range_method=config.range_method, correct=config.correct, second=config.rounding != "nearest")
        made = self.stored(module, weights, ranges, notes={"c": c, "steps": steps})
        return Trial(c, made, len(to_bytes(made)[0]))

    def least_bytes(self) -> int:
        """Bytes of the file in which every code is 0."""
        grid = Affine(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32))
        weights = {name: CompressedTensor.of(torch.zeros(w.shape, dtype=torch.int32), grid, 2)
                   for name, w in self.weights.items()}
        ranges = any_ranges(trace(self.folded), self.config.activation_bits)
        return len(to_bytes(self.stored(self.folded, weights, ranges))[0])

    def stored(self, module: nn.Module, weights: dict[str, CompressedTensor], ranges: dict[str, ActivationQuantizer],
               **fields) -> CompressedModel:
        made = assemble(module, weights, topology=self.topology, activations=ranges, **fields)
        return with_half_biases(made) if self.config.bias_bits == 16 else made

    @torch.no_grad()
    def agreement_on(self, inputs: Tensor) -> Callable[[Trial], float]:
        """Trial -> per cent of `inputs`, or of places in them, that it puts into the class of the float network.

        ConfigError where outputs are no classes [N, C] or [N, C, ...].
        """
        batches = inputs.split(64)
        shape = tuple(try_call(self.folded, batches[0][:1], "held-out inputs").shape)
        if len(shape) < 2 or shape[1] < 2:
            raise ConfigError(f"without a budget, inputs are counted that change their class, and outputs of shape "
                              f"{list(shape)} have none: allowed is a budget size_ratio")
        wanted = torch.cat([self.folded(x).argmax(1) for x in batches])

        @torch.no_grad()
        def agreement(trial: Trial) -> float:
            network = apply(trial.compressed, self.skeleton)
            found = torch.cat([network(x).argmax(1) for x in batches])
            return 100 * float((found == wanted).float().mean())

        return agreement


def width(codes: Tensor) -> int:
    """Bits of the signed codes that hold `codes`, 2 at least."""
    return max(int(codes.abs().max()).bit_length() + 1, 2)


def with_half_biases(made: CompressedModel) -> CompressedModel:
    """Biases of the layers with codes as float16, but for those that are not finite there."""
    halves = {name: made.rest[name].half() for name in (f"{layer}.bias" for layer in made.weights) if name in made.rest}
    finite = {name: half for name, half in halves.items() if bool(half.isfinite().all())}
    return replace(made, rest={**made.rest, **finite})
