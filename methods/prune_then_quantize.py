"""Prune, then quantize: the plain combination every joint method has to beat.

Magnitude pruning (Han et al., NIPS 2015), optional retraining under the mask, then uniform post-training
quantization of the survivors (Jacob et al., CVPR 2018), optionally with quantization-aware training. Activation
ranges are calibrated on the pruned, quantized network: ranges taken before pruning are wrong after it.

Algorithm
    M_l = the largest |W_l|, per layer or over all layers;  W_l <- M_l * W_l
    retrain with M_l applied after every step                                   (optional)
    quantization-aware training, mask after the quantizer                       (optional)
    s_l from the survivors;  q_l = clamp(round(W_l / s_l) + z_l);  q_l = z_l wherever M_l is 0
    fold batch norm into s_l and the bias;  round again, layer by layer  (optional);  calibrate activations

Symbols    rho = 1 - budget.density;  s, z, q = grid.scale, grid.zero, codes;  M = mask

Departures  There is no single paper. Every conv and linear layer is pruned, the first and last too: a budget
            that spares them is {layer: density}. Batch norm is folded after quantization, into the scale of each
            channel: the codes are those that folding first would give, and training keeps its batch norm.
            rounding = "gptq" or "descent" (core/fit) chooses the codes on the same grids by the output error of each
            layer, and corrects the biases; without any training, what the pruned weights gave to a layer is handed
            on to the others.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from .core.artifact import CompressedModel
from .core.budget import Budget
from .core.errors import BudgetError, ConfigError
from .core.fit.calibrate import calibrate, check_calibration
from .core.fit.layer_rates import WIDTHS
from .core.fit.prune import MaskHooks, apply_masks, keep_global, keep_local
from .core.fit.quantize import FakeQuantize, QuantizationAware, find_scheme, quantize
from .core.fit.rounding import check_rounding, round_again
from .core.fit.size import Knob
from .core.graph.build import apply, assemble, own_copy, weight_layers
from .core.graph.fold import fold_codes
from .core.graph.graph import trace
from .core.graph.weights import layer_of
from .core.method import check_call
from .core.train.finetune import Recipe, train
from .core.train.run import NullRun, Run
from .core.train.start import ready
from .core.train.task import Task
from .core.typed import check_types
from .pipeline.curves import pruning_curves, quantization_curves

DATA = "train"  # at most; Config.data
SIZE_KNOB = Knob("density", 1e-3, 1.0)


@dataclass(frozen=True)
class Config:
    """scope: rank |w| per layer ("local") or over the network ("global"); scheme: "symmetric", "mse" or "asymmetric".

    rounding is "nearest", "gptq" or "descent".
    rates, widths: "budget", or "sensitivity": densities and 2 to 8 bits of equal drop in the held-out error when that
    layer alone is pruned or rounded (core/fit/layer_rates.py); their mean over the weights is the budget's.
    retrain (before quantization) and aware (quantization-aware) are recipes, or None to skip the stage.
    """

    scope: str = "local"
    scheme: str = "symmetric"
    rounding: str = "nearest"
    rates: str = "budget"
    widths: str = "budget"
    per_channel: bool = True
    retrain: Recipe | None = None
    aware: Recipe | None = None
    activation_bits: int = 8
    calibration_inputs: int = 1024
    range_method: str = "minmax"

    def __post_init__(self):
        check_types(self)
        check_rounding(self.rounding)
        for name in ("rates", "widths"):
            if getattr(self, name) not in ("budget", "sensitivity"):
                raise ConfigError(f"{name} = {getattr(self, name)!r}: allowed are budget, sensitivity")
        if self.rates == "sensitivity" and self.scope != "local":
            raise ConfigError("rates = 'sensitivity' are densities in each layer: allowed is scope = 'local'")
        check_calibration(self.activation_bits, self.calibration_inputs, self.range_method)

    @property
    def data(self) -> str:
        """What these settings need to see."""
        if self.retrain is not None or self.aware is not None:
            return "train"
        return "held_out" if "sensitivity" in (self.rates, self.widths) else "calibration"


def compress(model: nn.Module, task: Task, budget: Budget, config: Config, generator: torch.Generator,
             *, run: Run | None = None) -> CompressedModel:
    """Budget: density and bits, each a number or {layer: number} (global scope takes one density)."""
    check_call(__name__, model, task, budget, config, generator)
    run = NullRun() if run is None else run
    budget.require("prune_then_quantize", "density", "bits")
    model = own_copy(model)
    trace(model)  # a network that cannot be folded is refused before any training
    bits = {name: int(b) for name, b in budget.per_layer("bits", weight_layers(model)).items()}
    fit = find_scheme(config.scheme, bits.values())
    masks, density = choose_masks(model, bits, budget, config.scope), budget.per_layer("density", weight_layers(model))
    mean = {name: _single(name, values) for name, values, rule in (("density", density, config.rates),
                                                                   ("bits", bits, config.widths))
            if rule == "sensitivity"}
    if mean.get("bits", min(WIDTHS)) < min(WIDTHS):
        raise BudgetError(f"budget bits = {mean['bits']:g} with widths = 'sensitivity': allowed is {min(WIDTHS)} or "
                          "more")
    task = ready(model, task, config)
    if "density" in mean:
        felt = pruning_curves(model, task, generator, layers=list(bits), run=run.stage("rates"))
        masks = keep_local({name: layer_of(model, name).weight for name in bits}, felt.choose(mean["density"]))
    given = {name: layer_of(model, name).weight.detach().clone() for name in masks}
    apply_masks(model, masks)
    if config.retrain is not None:
        train(model, task, config.retrain, generator, hooks=MaskHooks(masks), run=run.stage("retrain"))
    if "bits" in mean:
        felt = quantization_curves(model, task, scheme=config.scheme, per_channel=config.per_channel,
                                   layers=list(bits), run=run.stage("widths"))
        bits = {name: int(width) for name, width in felt.choose(mean["bits"]).items()}

    if config.aware is not None:
        quantizers = {name: FakeQuantize(bits[name], mask, config.scheme, per_channel=config.per_channel)
                      for name, mask in masks.items()}
        with QuantizationAware(model, quantizers) as hooks:
            train(model, task, config.aware, generator, hooks=hooks, run=run.stage("aware"))
    trained = {name: layer_of(model, name).weight for name in bits}
    codes = {name: quantize(weight, fit(weight, bits[name], config.per_channel), bits[name], masks[name])
             for name, weight in trained.items()}
    if config.rounding != "nearest" and config.retrain is None and config.aware is None:
        with torch.no_grad():  # what was pruned, for the others to take over
            for name, weight in trained.items():
                weight.copy_(given[name])
    folded, weights, topology = fold_codes(model, codes)
    if config.rounding != "nearest":
        inputs = task.calibration_inputs(config.calibration_inputs).cpu()
        masks = {name: mask.cpu() for name, mask in masks.items()}
        folded, weights, ranges = round_again(folded, weights, config.rounding, inputs, generator, masks=masks,
                                              bits=config.activation_bits, range_method=config.range_method)
        return assemble(folded, weights, topology=topology, activations=ranges)
    compressed = assemble(folded, weights, topology=topology)
    ranges = calibrate(apply(compressed, model), task.calibration_inputs(config.calibration_inputs),
                       config.activation_bits, config.range_method)
    return replace(compressed, activations=ranges)


def choose_masks(model: nn.Module, chosen: Iterable[str], budget: Budget, scope: str) -> dict[str, torch.Tensor]:
    """{layer: mask of kept weights} of the chosen layers for the budget's density."""
    weights = {name: layer_of(model, name).weight for name in chosen}
    if scope == "local":
        return keep_local(weights, budget.per_layer("density", weight_layers(model)))
    if scope == "global":
        found = set(budget.per_layer("density", weight_layers(model)).values())
        if len(found) != 1:
            raise ConfigError(f"scope = 'global' takes one density, not {budget.density!r}")
        return keep_global(weights, found.pop())
    raise ConfigError(f"scope = {scope!r}: allowed are 'local', 'global'")


def _single(name: str, values: Mapping[str, float]) -> float:
    """The number that all layers share, of which sensitivity makes one for each."""
    if len(set(values.values())) > 1:
        raise ConfigError(f"sensitivity takes one budget {name}, not {sorted(set(values.values()))}")
    return next(iter(values.values()))
