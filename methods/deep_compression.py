"""Deep Compression (Han, Mao, Dally, ICLR 2016, arXiv 1510.00149) with the pruning of Han et al. (NIPS 2015).

Small weights are removed and the survivors retrained, several times. The survivors of each layer are then
clustered by 1-D k-means, share one centroid per cluster, and the centroids are trained by the summed gradients
of their members. Positions and cluster indices are Huffman coded when the model is stored (`core/file/`).

Algorithm
    repeat R times:  M_l <- M_l AND |W_l| >= q_l std(W_l);  retrain W with W_l <- M_l * W_l after every step
    per layer:  C_l, I_l = k-means of the survivors, k = 2^b - 1, linear start; code 0 is reserved for 0
    train C_l, I_l fixed:  W_ij = C[I_ij],  dL/dC_k = sum_ij dL/dW_ij 1(I_ij = k)
    encode: gaps between survivors in index_bits with filler zeros, codes in b bits, Huffman over both

Symbols    M mask, C grid.values, I codes, b budget.bits, q_l notes["quality"], index_bits: `encode(index_bits=)`

Departures
  * Thresholds: no q_l is printed, so the threshold of a layer is the one that keeps the budget's density, in
    exact number; the q_l it amounts to (std over the dense weights) is reported in the notes.
  * Rounds: the number for the MNIST networks is not printed. Densities fall geometrically, d^(r/R) in round r.
  * Code 0 is reserved for the filler zero, as in the authors' released files; the paper does not say.
  * Clusters that stay empty (linear starts leave some) are dropped: they would only be stored.
  * Centroid training: recipe not printed. SGD without weight decay at a small learning rate. Biases and batch
    norm, which are not shared, train along.
  * Dropout: the rate of each Dropout follows D_r = D_o sqrt(density) with the density of the layer before it.
  * Training images: the 55,000 that are not held out; the paper has 60,000.
  * Neurons that lose all inputs or all outputs: the parent paper lets weight decay take their other weights, or removes
    these. Here they count and are stored like any other, and a pruned weight never comes back.
  * Conv and fully connected layers are retrained together (the paper freezes one while training the other for
    some networks).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .core.artifact import Codebook, CompressedModel, CompressedTensor
from .core.budget import Budget
from .core.errors import BudgetError, ConfigError
from .core.fit.cluster import INITS, check_cells, kmeans
from .core.fit.prune import MaskHooks, apply_masks, keep_count, keep_largest
from .core.fit.size import Knob
from .core.graph.build import assemble, own_copy
from .core.graph.weights import layer_of, place_of, weight_layers
from .core.method import check_call
from .core.settings import check_idle
from .core.train.finetune import Recipe, train
from .core.train.run import NullRun, Run
from .core.train.start import ready
from .core.train.task import Task
from .core.typed import check_types

DATA = "train"
SIZE_KNOB = Knob("density", 1e-3, 1.0)


@dataclass(frozen=True)
class Config:
    """rounds of pruning, each followed by `retrain`; k-means start `init`; `tune` trains the centroids."""

    rounds: int = 3
    retrain: Recipe = Recipe(epochs=8, lr=1e-2)
    init: str = "linear"
    tune: Recipe = Recipe(epochs=2, lr=1e-4, weight_decay=0.0)

    def __post_init__(self):
        check_types(self)
        if self.rounds < 1:
            raise ConfigError(f"rounds = {self.rounds}: at least 1 is needed")
        if self.init not in INITS:
            raise ConfigError(f"init = {self.init!r}: allowed are {', '.join(INITS)}")
        check_idle(self)

    def idle(self) -> dict[str, str]:
        return {"tune.weight_decay": "neither centroids nor biases and batch norm are decayed"}


def compress(model: nn.Module, task: Task, budget: Budget, config: Config, generator: torch.Generator,
             *, run: Run | None = None) -> CompressedModel:
    """Budget: density and bits (2..16), each a number or {layer: number}."""
    check_call(__name__, model, task, budget, config, generator)
    run = NullRun() if run is None else run
    budget.require("deep_compression", "density", "bits")
    model = own_copy(model)
    density, bits = (budget.per_layer(field, weight_layers(model)) for field in ("density", "bits"))
    layers = {name: layer_of(model, name) for name in density}
    bits = {name: int(b) for name, b in bits.items()}
    if min(bits.values()) < 2:
        raise BudgetError("deep_compression reserves one code for 0: bits must be 2 or more")
    if config.init == "exact":
        for name, layer in layers.items():
            check_cells(keep_count(layer.weight.numel(), density[name]), (1 << bits[name]) - 1)
    task = ready(model, task, config)
    spread = {name: float(layer.weight.detach().std()) for name, layer in layers.items()}

    masks, thresholds = prune(model, task, density, config, generator, run)
    rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
    shared = {name: share(layer.weight, masks[name], bits[name], config.init, rng) for name, layer in layers.items()}
    tuned = tune_centroids(model, task, shared, config.tune, generator, run)
    weights = {name: CompressedTensor.of(codes, Codebook(tuned[name]), bits[name])
               for name, (_, codes) in shared.items()}
    quality = {name: thresholds[name] / spread[name] for name in layers if spread[name] > 0}
    return assemble(model, weights, notes={"quality": quality})


def prune(model: nn.Module, task: Task, density: Mapping[str, float], config: Config, generator: torch.Generator,
          run: Run) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Prune and retrain `model` in place; returns masks and the last thresholds per layer. (Parent, section 3)"""
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    thresholds: dict[str, float] = {}
    masks: dict[str, Tensor] = {}
    for r in range(1, config.rounds + 1):
        for name in density:
            size = layer_of(model, name).weight.detach().abs()
            if name in masks:  # what is pruned stays pruned, even beside survivors that became 0
                size = size.masked_fill(~masks[name].to(size.device), -1.0)
            masks[name] = keep_largest(size, keep_count(size.numel(), density[name] ** (r / config.rounds)))
            thresholds[name] = float(size[masks[name]].min())
        apply_masks(model, masks)
        scale_dropout(model, masks, rates)
        train(model, task, config.retrain, generator, hooks=MaskHooks(masks), run=run.stage(f"prune {r}"))
    return masks, thresholds


def scale_dropout(model: nn.Module, masks: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
    """D_r = D_o sqrt(C_ir / C_io), with the density of the weight layer before each Dropout. (Parent, Eq. 2)"""
    density, layers = 1.0, weight_layers(model)
    for name, module in model.named_modules():
        if name in layers:
            density = float(masks[name].float().mean()) if name in masks else 1.0
        elif name in rates:
            module.p = rates[name] * math.sqrt(density)


def share(weight: Tensor, mask: Tensor, bits: int, init: str, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Codebook float32 [1 + used], whose entry 0 is the reserved 0, and int32 codes of `weight`. (Section 3)"""
    survivors = weight.detach()[mask].cpu().numpy()
    clusters = kmeans(survivors, (1 << bits) - 1, init, rng=rng)
    used, labels = np.unique(clusters.labels, return_inverse=True)
    codes = torch.zeros(weight.shape, dtype=torch.int32)
    codes[mask.cpu()] = torch.from_numpy(labels + 1).to(torch.int32)
    return torch.from_numpy(np.concatenate([[0.0], clusters.centroids[used]]).astype(np.float32)), codes


class SharedWeight(nn.Module):
    """Parametrization W = C[I]: the gradient is summed over each cluster. (Eq. 2, 3)

    By `index_select`: on a GPU the backward pass of C[I] adds the members of a cluster one after the other.
    """

    def __init__(self, codes: Tensor):
        super().__init__()
        self.register_buffer("codes", codes)

    def forward(self, centroids: Tensor) -> Tensor:
        codebook = torch.cat([centroids.new_zeros(1), centroids])
        return codebook.index_select(0, self.codes.long().reshape(-1)).reshape(self.codes.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Centroids [k] from a weight that already is C[I]."""
        centroids = weight.new_zeros(int(self.codes.max()) + 1)
        centroids[self.codes.long().reshape(-1)] = weight.reshape(-1)
        return centroids[1:]


def tune_centroids(model: nn.Module, task: Task, shared: Mapping[str, tuple[Tensor, Tensor]], recipe: Recipe,
                   generator: torch.Generator, run: Run) -> dict[str, Tensor]:
    """Codebooks {layer: float32 [1 + k]} after training; biases and batch norm of `model` are trained too."""
    for name, (codebook, codes) in shared.items():
        layer = layer_of(model, name)
        with torch.no_grad():
            layer.weight.copy_(codebook[codes.long()])
        parametrize.register_parametrization(*place_of(layer), SharedWeight(codes.to(layer.weight.device)))
    train(model, task, recipe, generator, run=run.stage("tune centroids"))
    tuned = {}
    for name in shared:
        module, attribute = place_of(layer_of(model, name))
        centroids = module.parametrizations[attribute].original.detach().cpu()
        tuned[name] = torch.cat([torch.zeros(1), centroids]).contiguous()
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
    return tuned
