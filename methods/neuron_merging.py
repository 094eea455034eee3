"""Neuron merging (Kim et al., "Neuron Merging: Compensating for Pruned Neurons", NeurIPS 2020).

A pruned filter is stood in for by the one kept filter that is most alike, in direction and in bias after batch norm.
The next layer's weights for the pruned channel are added, scaled, to those for its stand-in: W = Z Y with one entry
in each row of a pruned channel. No data and no fine-tuning are used; weights stay float32.

Algorithm, for each pair l -> BN -> ReLU -> l+1
    S = the filters of highest criterion;  Z_ii = 1 for i in S
    for j not in S, over all i in S:
        s = |w_j| / |w_i|;  scale_ij and bias_ij such that x_j ~ scale_ij x_i + bias_ij
        score_i = lambda cosdist(w_j, w_i) + (1 - lambda) minmax_i(|bias_ij| / scale_ij)
        i* = argmin score_i;  Z_ji* = scale_ji*, unless the cosine of the two is below the threshold t
    W'_i <- sum_j Z_ji W'_j;  remove the channels not in S
  without batch norm: w is the filter with its bias appended, i* = argmax cosine, Z_ji* = s

Symbols    lambda Config.lam, t Config.threshold, Z (transposed) `z`; gamma, beta, mu, sigma of `Norms`

Departures
  * mode = "official" is what the authors' code computes: with w_j = s w_i it takes
    scale = s (gamma_i / gamma_j)(v_j / v_i) and bias_ij with i and j exchanged, v the running variance.
    mode = "derived" follows from x_i = gamma_i (w_i x - mu_i) / sigma_i + beta_i, sigma_i = sqrt(v_i + eps):
    scale = s (gamma_j / gamma_i)(sigma_i / sigma_j), bias = gamma_j / sigma_j (s (mu_i - sigma_i beta_i / gamma_i) -
    mu_j) + beta_j; here the distance of biases is divided by |scale|, there by the signed scale.
  * A stand-in with an infinite scale or bias (a zero filter, gamma = 0) is never chosen; where there is no other, or
    all distances of biases are equal, the code divides by 0.
  * Filters are those of the original network, also where l has itself lost inputs, as in the authors' code; so are
    their criteria, which without batch norm see the bias too.
  * threshold and lam are those of the authors' scripts for VGG-16 and ResNet-56 (LeNet-300-100: threshold 0.45).
    threshold = 0 merges every channel, as there.
  * target = "conv" prunes convolutions that one layer reads, "linear" fully connected layers (LeNet-300-100). Kept
    counts are int(n (1 - ratio)) and round(n (1 - ratio)), as in the authors' code.
  * batchnorm other than "keep" renews batch norm afterwards, by differences on noise or with data: not in the paper.
  * Of equal criteria the lowest index is kept; numpy's order there is unspecified.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .core.artifact import CompressedModel, Topology
from .core.budget import Budget
from .core.errors import ConfigError
from .core.fit.batchnorm import check_mode, idle_size, needed_data, renew
from .core.fit.size import Knob
from .core.graph.build import assemble, own_copy
from .core.graph.channels import (
    Pair,
    changed_widths,
    check_criterion,
    count_channels,
    identity_on,
    keep_channels,
    merge_channels,
    require_pairs,
)
from .core.method import check_call
from .core.settings import check_idle
from .core.train.run import Run
from .core.train.task import Task
from .core.typed import check_types

DATA = "none"
SIZE_KNOB = Knob("channel_density", 0.02, 1.0)
TARGETS = {"conv": nn.Conv2d, "linear": nn.Linear}
ROUNDED = {"conv": math.floor, "linear": round}
MODES = ("official", "derived")


@dataclass(frozen=True)
class Config:
    """criterion: "l1", "l2" or "gm" (sum of distances to the other filters); merge = False only prunes.

    batchnorm, image_size: see core/fit/batchnorm.py.
    """

    criterion: str = "l1"
    mode: str = "official"
    threshold: float = 0.1
    lam: float = 0.85
    target: str = "conv"
    merge: bool = True
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
        for name, allowed in (("mode", MODES), ("target", tuple(TARGETS))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} = {getattr(self, name)!r}: allowed are {', '.join(allowed)}")
        if not math.isfinite(self.threshold):
            raise ConfigError(f"threshold = {self.threshold!r}: allowed is a number, that of a cosine")
        if not 0 <= self.lam <= 1:
            raise ConfigError(f"lam = {self.lam!r}: allowed is a number in [0, 1]")
        check_idle(self)

    def idle(self) -> dict[str, str]:
        found = idle_size(self.batchnorm)
        return found if self.merge else found | dict.fromkeys(("mode", "threshold", "lam"), "merge = False only prunes")


@dataclass(frozen=True)
class Norms:
    """Batch norm of a layer, float64 [N] each; sigma is the running variance itself in mode "official"."""

    gamma: Tensor
    beta: Tensor
    mu: Tensor
    sigma: Tensor

    def __getitem__(self, channels: Tensor) -> "Norms":
        return Norms(self.gamma[channels], self.beta[channels], self.mu[channels], self.sigma[channels])


def compress(model: nn.Module, task: Task | None, budget: Budget, config: Config, generator: torch.Generator,
             *, run: Run | None = None) -> CompressedModel:
    """Budget: channel_density, a number or {layer: number} for each prunable layer."""
    check_call(__name__, model, task, budget, config, generator)
    budget.require("neuron_merging", "channel_density")
    model = own_copy(model).cpu()
    small = copy.deepcopy(model)
    pairs = require_pairs(small, "neuron_merging", (TARGETS[config.target],))
    names = [pair.first for pair in pairs]  # what the budget does not name keeps its channels
    densities = {**dict.fromkeys(names, 1.0), **budget.per_layer("channel_density", names)}
    filters = {pair: read_weights(small, pair) for pair in pairs}
    channels, left = {}, {}
    for pair in pairs:
        n = len(filters[pair])
        channels[pair.first] = count_channels(pair.first, n, densities[pair.first], ROUNDED[config.target])
        kept = keep_channels(filters[pair], channels[pair.first], config.criterion)
        if len(kept) == n:
            continue
        z = identity_on(kept, n)
        if config.merge:
            removed = torch.tensor(sorted(set(range(n)) - set(kept.tolist())), dtype=torch.int64)
            norms = None if pair.norm is None else read_norms(small.get_submodule(pair.norm), config.mode)
            z[:, removed] = stand_ins(filters[pair], norms, kept, removed, config)
        merge_channels(small, pair, kept, z)
        if pair.norm is not None:
            left[pair.norm] = kept
    compressed = assemble(small, {}, topology=Topology(widths=changed_widths(small, model)),
                          notes={"channels": channels})
    return renew(compressed, model, config.batchnorm, generator, kept=left, task=task, size=config.image_size)


def read_weights(model: nn.Module, pair: Pair) -> Tensor:
    """Filters [N, D] float64; without a batch norm the bias is one more column."""
    layer = model.get_submodule(pair.first)
    flat = layer.weight.detach().double().reshape(layer.weight.shape[0], -1)
    if pair.norm is not None or layer.bias is None:
        return flat
    return torch.cat([flat, layer.bias.detach().double()[:, None]], 1)


def read_norms(norm: nn.Module, mode: str) -> Norms:
    variance = norm.running_var.double()
    sigma = variance if mode == "official" else (variance + norm.eps).sqrt()
    return Norms(norm.weight.detach().double(), norm.bias.detach().double(), norm.running_mean.double(), sigma)


def stand_ins(filters: Tensor, norms: Norms | None, kept: Tensor, removed: Tensor, config: Config) -> Tensor:
    """Columns of Z [n, p]: for each removed channel at most one entry, the scale of its stand-in."""
    lengths = filters.norm(dim=1)
    unit = filters / torch.where(lengths > 0, lengths, 1.0)[:, None]
    cosine = unit[removed] @ unit[kept].T  # [p, n], as all below
    ratio = lengths[removed][:, None] / lengths[kept]
    scale, score = ratio, 1 - cosine
    if norms is not None:
        scale, bias = match(norms[kept], norms[removed], ratio, config.mode)
        distance = bias.abs() / (scale if config.mode == "official" else scale.abs())
        score = config.lam * (1 - cosine) + (1 - config.lam) * min_max(distance)
    score = torch.where(score.isfinite() & scale.isfinite(), score, torch.inf)
    best = score.argmin(1, keepdim=True)
    merged = score.gather(1, best) < torch.inf
    if config.threshold != 0:
        merged &= cosine.gather(1, best) >= config.threshold
    entries = torch.where(merged, scale.gather(1, best), 0.0)
    return torch.zeros_like(score).scatter(1, best, entries).T


def match(kept: Norms, removed: Norms, ratio: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """scale and bias [p, n] with x_j ~ scale x_i + bias if w_j = ratio w_i; "official" exchanges i and j."""
    i = Norms(*(part[None] for part in vars(kept).values()))
    j = Norms(*(part[:, None] for part in vars(removed).values()))
    a, b = (i, j) if mode == "official" else (j, i)
    scale = ratio * (a.gamma / b.gamma) * (b.sigma / a.sigma)
    bias = (a.gamma / a.sigma) * (ratio * (b.mu - b.sigma * b.beta / b.gamma) - a.mu) + a.beta
    return scale, bias


def min_max(distance: Tensor) -> Tensor:
    """Each row shifted and scaled to [0, 1] over its finite entries; a row of equal entries becomes 0."""
    finite = distance.isfinite()
    low = torch.where(finite, distance, torch.inf).amin(1, keepdim=True)
    high = torch.where(finite, distance, -torch.inf).amax(1, keepdim=True)
    return torch.where(finite, (distance - low) / torch.where(high > low, high - low, 1.0), torch.inf)
