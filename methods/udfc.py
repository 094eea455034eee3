"""UDFC (Bai et al., "Unified Data-Free Compression: Pruning and Quantization without Fine-Tuning", ICCV 2023).

What a removed or quantized channel gave to the next layer is put together from the channels that remain, without
data and without fine-tuning. A removed channel becomes a linear combination of the kept ones, a quantized channel a
multiple of itself; both minimise the distance of filters and biases after batch norm. The coefficients have closed
forms and go into the next layer's weights, so the network only gets smaller.

Algorithm, for each pair conv l -> BN -> ReLU -> l+1
    S = the filters of largest norm, R = the others
    for j in R:  s_j = argmin |W_j - sum_i s_ij G_i|^2 + alpha1 (K_j - sum_i s_ij K_i)^2        Eq. (12), (20)
                 W'_i <- W'_i + sum_j s_ij W'_j  for every i in S                               Eq. (7)
    remove R from l, its BN, and the inputs of l+1
  then, for every layer:  W~ = Q_k(W)                                                           Eq. (3)
    and for each pair:  s_m = argmin |r_m - s r~_m|^2 + alpha2 (K_m - s K_m)^2                  Eq. (14)
                        gamma_m, beta_m <- s_m gamma_m, s_m beta_m   (the same as W'_m <- s_m W'_m, Eq. (9))

Symbols    S kept; s_j of Eq. (20), "s hat": columns of `coefficients`; s_m of Eq. (14), "s tilde": `factors`
           r_i = gamma_i / sigma_i W_i: Filters.r;  K_i = beta_i - gamma_i mu_i / sigma_i: Filters.k
           G_i = (gamma_i sigma_j) / (sigma_i gamma_j) W_i;  k budget.bits;  ratio = 1 - budget.channel_density

Departures
  * Eq. (12) and (20) are solved on the folded filters r: multiplied by (gamma_j / sigma_j)^2 the loss becomes
    |r_j - sum_i s_ij r_i|^2 + alpha1 (gamma_j / sigma_j)^2 (K_j - sum_i s_ij K_i)^2. form = "folded" uses alpha1 alone
    as the weight of the bias, and so does form = "paper" for a channel with gamma_j = 0. form = "raw" takes W for r, as
    Eq. (4) is printed.
  * Where the normal matrix of Eq. (20) is singular, its inverse is the pseudo-inverse: the least solution is taken.
  * The printed Eq. (21) has the same matrix above and below, which makes s = 1, and Eq. (5) the reverse direction of
    Eq. (9) and (14): the minimum of Eq. (14) is used. A channel without any weight or bias keeps s = 1.
  * Eq. (3) returns values in [-1, 1]; they are multiplied by max|W| again, since BN is not recomputed. It has no level
    0: an exact zero becomes the nearest odd step. per_channel = True (one maximum per filter) is not in the paper, nor
    are scheme = "asymmetric" and "symmetric".
  * s tilde goes into gamma and beta, which is Eq. (9) where W' is scaled after its own rounding: its grid stays.
  * The bound of Eq. (11) needs s >= 0, which Eq. (20) does not ensure: nonneg = True solves the same least squares
    under s >= 0. joint = True aims Eq. (12) at the quantized kept filters instead of the float ones. Neither is there.
  * The printed table is what one gets when batch norm is renewed after compression (an inference: there is no code, and
    the paper does not say so): the closed form alone stays far below it. batchnorm = "data" re-estimates on 12,000
    training inputs and meets it with form = "raw", scheme = "asymmetric" and per_channel = True, the nearest of the
    readings that were tried; "noise" and "closed" need no data. s tilde stays, which then matters little.
  * Norms and coefficients are those of the original weights, also where l has itself lost inputs (joint: the current).
  * Activations stay float: the paper prints activation bits and no activation quantizer.
  * Pruned are convolutions that a single conv or linear reads (conv1 of a basic block): the printed sizes agree.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .core.artifact import CompressedModel, CompressedTensor, Topology
from .core.budget import Budget
from .core.errors import BudgetError, ConfigError
from .core.fit.batchnorm import check_mode, idle_size, needed_data, renew
from .core.fit.grids import ODD, check_grid, on_grid
from .core.fit.merging import least_squares, least_squares_nonneg, merge_pairs
from .core.fit.size import Knob
from .core.graph.build import assemble, own_copy, weight_layers
from .core.graph.channels import (
    Filters,
    Pair,
    changed_widths,
    check_criterion,
    fit_scales,
    read_filters,
    require_pairs,
    scale_outputs,
)
from .core.method import check_call
from .core.settings import check_idle, check_idle_without
from .core.train.run import Run
from .core.train.task import Task
from .core.typed import check_types

DATA = "none"
SIZE_KNOB = Knob("channel_density", 0.02, 1.0)
FORMS = ("paper", "folded", "raw")
WITHOUT = {"bits": ("scheme", "per_channel", "alpha2"), "channel_density": ("criterion", "form", "nonneg", "alpha1")}


@dataclass(frozen=True)
class Config:
    """criterion: "l1", "l2" or "gm"; form, nonneg, joint, scheme, per_channel: see the departures.

    batchnorm, image_size: see core/fit/batchnorm.py.

    reconstruct = False prunes and quantizes without compensation (the paper's "Prune").
    """

    criterion: str = "l1"
    alpha1: float = 0.01
    alpha2: float = 0.008
    form: str = "paper"
    nonneg: bool = False
    joint: bool = False
    scheme: str = ODD
    per_channel: bool = False
    reconstruct: bool = True
    batchnorm: str = "keep"
    image_size: int | None = None

    @property
    def data(self) -> str:
        """What `compress` needs to see, in place of DATA."""
        return needed_data(self.batchnorm, DATA)

    def __post_init__(self):
        check_types(self)
        check_mode(self.batchnorm)
        check_criterion(self.criterion)
        if self.form not in FORMS:
            raise ConfigError(f"form = {self.form!r}: allowed are {', '.join(FORMS)}")
        check_grid(self.scheme)
        if self.joint and self.form == "raw":
            raise ConfigError("joint = True needs form = 'paper' or 'folded': it aims at filters with batch norm")
        for name in ("alpha1", "alpha2"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} = {getattr(self, name)!r}: allowed is a number of 0 or more")
        check_idle(self)

    def idle(self) -> dict[str, str]:
        found, without = idle_size(self.batchnorm), ("form", "nonneg", "alpha1", "alpha2")
        return found if self.reconstruct else found | dict.fromkeys(without, "reconstruct = False compensates nothing")


def compress(model: nn.Module, task: Task | None, budget: Budget, config: Config, generator: torch.Generator,
             *, run: Run | None = None) -> CompressedModel:
    """Budget: channel_density (of the prunable convolutions) and bits, each a number or {layer: number}, or one of
    the two: without bits the weights stay float32."""
    check_call(__name__, model, task, budget, config, generator)
    budget.require("udfc", optional=("channel_density", "bits"))
    if budget.channel_density is None and budget.bits is None:
        raise BudgetError("udfc needs the budget field 'channel_density' or 'bits'")
    check_idle_without(config, budget, WITHOUT)
    if config.joint and (budget.bits is None or not config.reconstruct):
        raise ConfigError("joint = True needs the budget field 'bits' and reconstruct = True")
    model = own_copy(model).cpu()
    small = copy.deepcopy(model)
    pairs = require_pairs(small, "udfc")
    bits = None if budget.bits is None else budget.every_layer("bits", weight_layers(small), "udfc")
    kept = {}
    if budget.channel_density is not None:
        names = [pair.first for pair in pairs]  # what the budget does not name keeps its channels
        densities = {**dict.fromkeys(names, 1.0), **budget.per_layer("channel_density", names)}
        kept = prune(small, pairs, densities, bits, config)
    weights = {} if bits is None else quantize(small, pairs, bits, config)
    widths = changed_widths(small, model)
    channels = {pair.first: len(small.get_submodule(pair.first).weight) for pair in pairs}
    compressed = assemble(small, weights, topology=Topology(widths=widths), notes={"channels": channels})
    return renew(compressed, model, config.batchnorm, generator, task=task, size=config.image_size,
                 kept={pair.norm: channels for pair, channels in kept.items() if pair.norm})


# --- pruning -----------------------------------------------------------------------------------------------


def prune(model: nn.Module, pairs: list[Pair], densities: Mapping[str, float], bits: Mapping[str, float] | None,
          config: Config) -> dict[Pair, Tensor]:
    """Remove channels of every pair, in place; what they gave is put together from the kept ones, Eq. (7)."""
    def combine(pair: Pair, weight: Tensor, filters: Filters, kept: Tensor, removed: Tensor) -> Tensor:
        basis, wanted = filters[kept], filters[removed]
        if config.form == "raw":  # Eq. (4) as printed
            flat = weight.double().flatten(1)
            basis, wanted = replace(basis, r=flat[kept]), replace(wanted, r=flat[removed])
        elif config.joint:
            basis, wanted = aim_at_quantized(model, pair, kept, removed, int(bits[pair.first]), config)
        return solve(basis, wanted, config)

    return merge_pairs(model, pairs, densities, config.criterion, combine if config.reconstruct else None)


def solve(kept: Filters, wanted: Filters, config: Config) -> Tensor:
    """s hat [n, p]: the minimum of Eq. (12) for each of the p wanted channels over the n kept ones."""
    alpha = torch.full_like(wanted.gain, config.alpha1)
    if config.form == "paper":
        alpha = torch.where(wanted.gain == 0, alpha, alpha * wanted.gain.square())
    return least_squares_nonneg(kept, wanted, alpha) if config.nonneg else least_squares(kept, wanted, alpha)


def aim_at_quantized(model: nn.Module, pair: Pair, kept: Tensor, removed: Tensor, bits: int, config: Config
                     ) -> tuple[Filters, Filters]:
    """The kept filters as `quantize` will leave them, factors included, and the wanted ones, of current weights."""
    layer, filters = model.get_submodule(pair.first), read_filters(model, pair)
    left = filters[kept]
    quantized = on_grid(layer.weight[kept], bits, config.scheme, config.per_channel).decode().double()
    have = Filters(left.gain[:, None] * quantized.reshape(len(kept), -1), left.k, left.gain)
    factors = fit_scales(left, have, config.alpha2)
    return Filters(factors[:, None] * have.r, factors * have.k, have.gain), filters[removed]


# --- quantization ------------------------------------------------------------------------------------------


def quantize(model: nn.Module, pairs: list[Pair], bits: Mapping[str, float], config: Config
             ) -> dict[str, CompressedTensor]:
    """Every conv and linear on the grid of Eq. (3); s tilde goes into the batch norms of `model`, in place.

    Without a batch norm it goes into the filter's scale and bias.
    """
    weights = {name: on_grid(layer.weight, int(bits[name]), config.scheme, config.per_channel)  # Eq. (3)
               for name, layer in weight_layers(model).items()}
    for pair in pairs if config.reconstruct else []:
        have = read_filters(model, pair, weights[pair.first].decode())
        factors = fit_scales(read_filters(model, pair), have, config.alpha2)  # Eq. (14), its minimum
        if pair.norm is not None:
            scale_outputs(model, pair, factors)  # Eq. (9)
            continue
        layer = model.get_submodule(pair.first)
        weights[pair.first] = on_grid(layer.weight, int(bits[pair.first]), config.scheme, config.per_channel,
                                      factors)
        if layer.bias is not None:
            layer.bias = nn.Parameter((layer.bias.detach().double() * factors).to(layer.bias.dtype))
    return weights
