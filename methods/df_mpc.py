"""DF-MPC (Chen et al., "Data-Free Quantization via Mixed-Precision Compensation without Fine-Tuning",
Pattern Recognition 143, 2023, 109780).

In every pair of layers one is quantized to very few bits and its consumer to more, and the consumer makes up for the
error of the first: each of its input channels is multiplied by a coefficient. The coefficients minimise, channel by
channel, the distance of filters and biases after batch norm between the full-precision layer and the low-bit one, in
closed form. Neither data nor fine-tuning are used; activations stay float.

Algorithm, for each pair (l, l+1) of pairs that do not overlap
    l, 2 bits:  W^ = alpha sign(W) 1[|W| > D],  D = 0.7 mean|W|,  alpha = mean of |W| where |W| > D
    l+1, and all other layers:  W~ = Q_k(W), uniform with k bits
    c_j = (r^_j . r_j + lambda1 y^_j y_j) / (r^_j . r^_j + lambda1 y^_j^2 + lambda2),  at least 0
    W~_:j <- c_j W~_:j for every channel j of l, stored as gamma_j, beta_j <- c_j gamma_j, c_j beta_j

Symbols    r_j = gamma_j / sigma_j w_j: Filters.r;  y_j = beta_j - gamma_j mu_j / sigma_j: Filters.k; hats: quantized l
           c `factors`; lambda1, lambda2 Config.lambda1, lambda2; 2 Config.low_bits; k budget.bits

Departures
  * alpha and max|W|, which the paper drops because batch norm absorbs them, are kept, and batch norm is left as it is:
    how the paper re-calibrates mu^ and sigma^ is not published. Then y^ = y. batchnorm = "data", or without any "noise"
    or "closed", renews it after c is fitted; for ResNet-56 none of them reaches what is printed.
  * Pairs are taken greedily in forward order; a 1 x 1 convolution is never the low-bit layer. This gives the paper's
    choice: conv1 of a basic block, the 3 x 3 convolution of a bottleneck, every other layer of a plain network.
  * A channel for which the denominator of c is 0 (a dead filter) keeps c = 1.
  * low_bits above 2 uses Q_k with that k for the low-bit layers, as the paper's 3/6 and 6/6 rows do.
  * compensate = False is the paper's "original": the same grids, c = 1.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .core.artifact import Affine, CompressedModel, CompressedTensor
from .core.budget import Budget
from .core.errors import BudgetError, CompressError, ConfigError
from .core.fit.batchnorm import check_mode, idle_size, needed_data, renew
from .core.fit.odd_levels import quantize_odd
from .core.fit.size import Knob
from .core.graph.build import assemble, own_copy, weight_layers
from .core.graph.channels import Pair, fit_scales, read_filters, require_pairs, scale_outputs
from .core.method import check_call
from .core.settings import check_idle
from .core.train.run import Run
from .core.train.task import Task
from .core.typed import check_types

DATA = "none"
SIZE_KNOB = Knob("bits", 2, 8, whole=True)
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Config:
    """low_bits of the first layer of each pair, 2 meaning ternary; lambda1 and lambda2 of the closed form.

    batchnorm, image_size: see core/fit/batchnorm.py.
    """

    low_bits: int = 2
    lambda1: float = 0.5
    lambda2: float = 0.0
    compensate: bool = True
    batchnorm: str = "keep"
    image_size: int | None = None

    @property
    def size_knob(self) -> Knob:
        return Knob("bits", max(SIZE_KNOB.smallest, self.low_bits), max(SIZE_KNOB.largest, self.low_bits), whole=True)

    @property
    def data(self) -> str:
        """What `compress` needs to see, in place of DATA."""
        return needed_data(self.batchnorm, DATA)

    def __post_init__(self):
        check_types(self)
        check_mode(self.batchnorm)
        if not 2 <= self.low_bits <= 16:
            raise ConfigError(f"low_bits = {self.low_bits}: allowed is 2..16")
        for name in ("lambda1", "lambda2"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} = {getattr(self, name)!r}: allowed is a number of 0 or more")
        check_idle(self)

    def idle(self) -> dict[str, str]:
        found = idle_size(self.batchnorm)
        return found if self.compensate else found | dict.fromkeys(("lambda1", "lambda2"), "compensate = False")


def compress(model: nn.Module, task: Task | None, budget: Budget, config: Config, generator: torch.Generator,
             *, run: Run | None = None) -> CompressedModel:
    """Budget: bits of the high-bit layers, a number or {layer: number}; the low-bit ones take Config.low_bits."""
    check_call(__name__, model, task, budget, config, generator)
    budget.require("df_mpc", "bits")
    given = own_copy(model).cpu()
    model = copy.deepcopy(given)
    layers = weight_layers(model)
    bits = {name: int(b) for name, b in budget.every_layer("bits", layers, "df_mpc").items()}
    pairs = choose_pairs(model, require_pairs(model, "df_mpc"))
    for pair in pairs:
        if config.low_bits > bits[pair.first]:
            raise BudgetError(f"budget bits = {bits[pair.first]} of {pair.first}: allowed is low_bits = "
                              f"{config.low_bits} or more")
    low = {pair.first: config.low_bits for pair in pairs}
    weights = {name: quantize(layer.weight, low[name], None) if name in low else quantize_odd(layer.weight, bits[name])
               for name, layer in layers.items()}
    if config.compensate:
        compensate(model, pairs, weights, config)
    compressed = assemble(model, weights, notes={"low": list(low)})
    return renew(compressed, given, config.batchnorm, generator, task=task, size=config.image_size)


def choose_pairs(model: nn.Module, pairs: list[Pair]) -> list[Pair]:
    """Pairs that share no layer, in forward order, without those that start with a 1 x 1 convolution."""
    chosen: list[Pair] = []
    for pair in pairs:
        taken = {name for other in chosen for name in (other.first, other.second)}
        if model.get_submodule(pair.first).kernel_size != (1, 1) and not taken & {pair.first, pair.second}:
            chosen.append(pair)
    if not chosen:
        raise CompressError(f"df_mpc finds no low-bit layer in {type(model).__name__}: 1 x 1 convolutions stay high")
    return chosen


def quantize(weight: Tensor, bits: int, factors: Tensor | None) -> CompressedTensor:
    """A low-bit layer; `factors` [C_out] multiply its channels."""
    return ternary(weight, factors) if bits == 2 else quantize_odd(weight, bits, factors)


def ternary(weight: Tensor, factors: Tensor | None) -> CompressedTensor:
    """alpha sign(W) 1[|W| > D], with a scale per channel if there are factors."""
    weight = weight.detach().double()
    size = weight.abs()
    large = size > 0.7 * size.mean()
    alpha = size[large].mean().clamp_min(EPS) if bool(large.any()) else torch.ones((), dtype=torch.float64)
    scale = (alpha if factors is None else alpha * factors).float()
    mask = large & (scale > 0).reshape(-1, *[1] * (weight.ndim - 1)) if factors is not None else large
    scale = torch.where(scale > 0, scale, 1.0)
    grid = Affine(scale, torch.zeros_like(scale, dtype=torch.int32))
    return CompressedTensor.of(weight.sign().to(torch.int32), grid, 2, mask)


def compensate(model: nn.Module, pairs: list[Pair], weights: dict[str, CompressedTensor], config: Config) -> None:
    """c of every pair into the batch norms of `model`, or, where there is none, into scales of `weights` and biases."""
    for pair in pairs:
        have = read_filters(model, pair, weights[pair.first].decode())
        factors = fit_scales(read_filters(model, pair), have, config.lambda1, config.lambda2)
        if pair.norm is not None:
            scale_outputs(model, pair, factors)
            continue
        layer = model.get_submodule(pair.first)
        weights[pair.first] = quantize(layer.weight, config.low_bits, factors)
        if layer.bias is not None:
            layer.bias = nn.Parameter((layer.bias.detach().double() * factors).to(layer.bias.dtype))
