"""Quantize, then prune: the plain combination in the other order.

Uniform post-training quantization first, then magnitude pruning among the integer codes. At 8 bits this equals
prune-then-quantize; at 4 bits the ranking is coarser: codes that rounding already sent to 0 take its first places.
With retraining it is quantization-aware training of float master weights under the mask.

Algorithm
    s_l, z_l from W_l;  q_l = clamp(round(W_l / s_l) + z_l);  batch norm folded into s_l and the bias
    saliency = |s_l (q_l - z_l)|, ties broken by |W_l|, then by position
    the least salient weights, in exact number, get the code z_l  (not 0: the code 0 means -s_l z_l)
    quantization-aware training with s_l, z_l kept, mask after the quantizer    (optional)
    calibrate activations

Symbols    rho = 1 - budget.density;  s, z, q = grid.scale, grid.zero, codes

Departures  There is no single paper. The ranking is per layer. Grids are those of the dense weights throughout.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .core.artifact import CompressedModel, CompressedTensor
from .core.budget import Budget
from .core.fit.calibrate import calibrate, check_calibration
from .core.fit.prune import keep_count, keep_largest
from .core.fit.quantize import FakeQuantize, QuantizationAware, find_scheme, quantize
from .core.fit.size import Knob
from .core.graph.build import apply, assemble, own_copy
from .core.graph.fold import fold_batchnorm, fold_codes
from .core.graph.weights import layer_of, weight_layers
from .core.method import check_call
from .core.train.finetune import Recipe, train
from .core.train.run import NullRun, Run
from .core.train.start import ready
from .core.train.task import Task
from .core.typed import check_types

DATA = "train"  # at most; Config.data
SIZE_KNOB = Knob("density", 1e-3, 1.0)


@dataclass(frozen=True)
class Config:
    """scheme: "symmetric" or "asymmetric"; aware: recipe of quantization-aware training, or None to skip it."""

    scheme: str = "symmetric"
    per_channel: bool = True
    aware: Recipe | None = None
    activation_bits: int = 8
    calibration_inputs: int = 1024
    range_method: str = "minmax"

    def __post_init__(self):
        check_types(self)
        check_calibration(self.activation_bits, self.calibration_inputs, self.range_method)

    @property
    def data(self) -> str:
        """What these settings need to see."""
        return "calibration" if self.aware is None else "train"


def compress(model: nn.Module, task: Task, budget: Budget, config: Config, generator: torch.Generator,
             *, run: Run | None = None) -> CompressedModel:
    """Budget: density and bits, each a number or {layer: number}."""
    check_call(__name__, model, task, budget, config, generator)
    run = NullRun() if run is None else run
    budget.require("quantize_then_prune", "density", "bits")
    model = own_copy(model)
    fit = find_scheme(config.scheme)
    density = budget.per_layer("density", weight_layers(model))
    bits = {name: int(b) for name, b in budget.per_layer("bits", weight_layers(model)).items()}
    layers = {name: layer_of(model, name) for name in bits}
    grids = {name: fit(layer.weight, bits[name], config.per_channel) for name, layer in layers.items()}
    dense = {name: quantize(layer.weight, grids[name], bits[name]) for name, layer in layers.items()}
    float_folded, _ = fold_batchnorm(model)
    _, seen, _ = fold_codes(model, dense)  # saliency is that of the folded network: it is what runs
    masks = {name: keep_salient(tensor, layer_of(float_folded, name).weight,
                                keep_count(tensor.codes.numel(), density[name])) for name, tensor in seen.items()}
    task = ready(model, task, config)
    if config.aware is not None:
        quantizers = {name: FakeQuantize(bits[name], masks[name], config.scheme, grids[name]) for name in layers}
        with QuantizationAware(model, quantizers) as hooks:
            train(model, task, config.aware, generator, hooks=hooks, run=run.stage("aware"))
    codes = {name: quantize(layer.weight, grids[name], bits[name], masks[name])
             for name, layer in weight_layers(model).items() if name in bits}
    folded, weights, topology = fold_codes(model, codes)
    compressed = assemble(folded, weights, topology=topology)
    ranges = calibrate(apply(compressed, model), task.calibration_inputs(config.calibration_inputs),
                       config.activation_bits, config.range_method)
    return replace(compressed, activations=ranges)


def keep_salient(quantized: CompressedTensor, weight: Tensor, count: int) -> Tensor:
    """Bool mask of the `count` weights with the largest |s (q - z)|; ties by |weight|, then by lowest index."""
    return keep_largest(quantized.decode().abs(), count, weight.abs())
