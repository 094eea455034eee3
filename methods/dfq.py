"""DFQ (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019).

One grid per tensor wastes its levels where channels differ in range, and rounding shifts the mean of every output.
Scaling a channel down and its consumer up by the same factor changes nothing after a ReLU, so ranges are made equal
first; then the expected shift, known from batch norm, is subtracted from the biases. No data and no training.

Algorithm
    fold batch norm; the output of layer l is taken as N(beta, gamma^2) per channel
    for every pair (1, 2), until nothing moves:  s_i = sqrt(r1_i r2_i) / r2_i, r the range max|w| of channel i
        W1_i, b1_i, beta_i, gamma_i divided by s_i;  W2_:i multiplied by s_i
    absorb high biases:  c = max(0, beta - 3 |gamma|);  b1 <- b1 - c;  b2 <- b2 + sum_kernel W2 c
    quantize each W;  eps = Q(W) - W summed over the kernel;  b <- b - eps E[x]
    E[x] after a ReLU = |gamma| phi(beta / |gamma|) + beta Phi(beta / |gamma|)
    activation ranges: least and largest over channels of beta -+ 6 |gamma|, least 0 after a ReLU

Symbols    beta, |gamma| (after folding: mean and deviation of an output): Normal.mean, Normal.std
           r1, r2: row and column maxima of `peaks`; eps `errors`; n of "n standard deviations" Config.sigmas

Departures
  * Pairs are those of core/channels.py: without groups, so depthwise layers keep their ranges.
  * What is no batch norm's output is estimated: a sum adds means and variances, a layer without batch norm adds those
    of its inputs weighted with W and W^2, both as if inputs were independent; pools pass their input's moments on.
    The network's input counts as N(0, 1) per channel, that is, as standardised. Sigmoids, products and the like are
    sampled; behind what is not known (attention, layer norm) inputs stay float, and biases are not corrected.
  * The paper replaces ReLU6 by ReLU. Here the network keeps its clamps, is not equalized across them (`clamped` in the
    notes), and takes their moments as those of a ReLU; their upper end limits the range.
  * Ranges of a channel that is 0 on either side stay as they are (s = 1), and s stays in [1e-8, 1e8].
  * Equalization stops when the mean change of max|w| between two channels is below `tolerance`, or after `rounds`.
  * At a border padded with zeros the absorbed bias is a little too large; a layer without a bias neither takes one
    over nor is corrected.
  * batchnorm = "noise", "closed" or "data" is not in the paper: the outputs of layers that had a batch norm are moved
    and scaled to the means and variances that they had before quantization. A grid per tensor then has a scale per
    channel.
  * Arithmetic is float64 until the weights are quantized. activation_bits = none leaves the ranges to the harness.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .core.artifact import ActivationQuantizer, CompressedModel, CompressedTensor, Topology
from .core.budget import Budget
from .core.errors import ConfigError
from .core.fit.batchnorm import check_mode, idle_size, needed_data, renew
from .core.fit.calibrate import quantizer_of
from .core.fit.normals import Distributions, Normal, read_normal, respond
from .core.fit.quantize import find_scheme, quantize
from .core.fit.size import Knob
from .core.graph.build import apply, assemble, own_copy, weight_layers
from .core.graph.channels import Pair, find_pairs
from .core.graph.fold import fold_batchnorm, fold_codes
from .core.graph.graph import Graph, trace
from .core.method import check_call
from .core.settings import check_idle
from .core.train.run import Run
from .core.train.task import Task
from .core.typed import check_types

DATA = "none"
SIZE_KNOB = Knob("bits", 2, 8, whole=True)


@dataclass(frozen=True)
class Config:
    """equalize, absorb, correct: the three steps; scheme: "asymmetric" or "symmetric" weights, one grid per tensor.

    activation_bits with ranges of `sigmas` deviations; tolerance and rounds of the equalization.
    batchnorm, image_size: see core/fit/batchnorm.py.
    """

    equalize: bool = True
    absorb: bool = True
    correct: bool = True
    scheme: str = "asymmetric"
    per_channel: bool = False
    activation_bits: int | None = 8
    sigmas: float = 6.0
    tolerance: float = 2e-7
    rounds: int = 200
    batchnorm: str = "keep"
    image_size: int | None = None

    @property
    def data(self) -> str:
        """What `compress` needs to see, in place of DATA."""
        return needed_data(self.batchnorm, DATA)

    def __post_init__(self):
        check_types(self)
        check_mode(self.batchnorm)
        if not 0 < self.sigmas < math.inf:
            raise ConfigError(f"sigmas = {self.sigmas!r}: allowed is a number above 0")
        find_scheme(self.scheme)
        if not 0 <= self.tolerance < math.inf:
            raise ConfigError(f"tolerance = {self.tolerance!r}: allowed is a number of 0 or more")
        if self.activation_bits is not None and self.activation_bits not in range(1, 17):
            raise ConfigError(f"activation_bits = {self.activation_bits}: allowed is 1..16 or none")
        if self.rounds < 1:
            raise ConfigError(f"rounds = {self.rounds}: at least 1 is needed")
        check_idle(self)

    def idle(self) -> dict[str, str]:
        found = idle_size(self.batchnorm)
        if not self.equalize:
            found |= dict.fromkeys(("rounds", "tolerance"), "equalize = False")
        if self.activation_bits is None:
            found["sigmas"] = "activations stay float"
        return found


def compress(model: nn.Module, task: Task | None, budget: Budget, config: Config, generator: torch.Generator,
             *, run: Run | None = None) -> CompressedModel:
    """Budget: bits, a number or {layer: number}."""
    check_call(__name__, model, task, budget, config, generator)
    budget.require("dfq", "bits")
    model = own_copy(model)
    bits = {name: int(b) for name, b in budget.every_layer("bits", weight_layers(model), "dfq").items()}
    fit = find_scheme(config.scheme, bits.values())
    folded, topology = fold_batchnorm(model)
    found = find_pairs(folded, (nn.Conv2d, nn.Linear))
    pairs = [pair for pair in found if not pair.clamps]  # what a clamp cuts off does not grow with the channel
    outputs = {layer: read_normal(model.get_submodule(norm)) for layer, norm in topology.folded.items()}
    folded.double()
    rounds = equalize(folded, pairs, outputs, config) if config.equalize else 0
    if config.absorb:
        absorb_biases(folded, pairs, outputs)
    exact = {name: layer.weight.detach().clone() for name, layer in weight_layers(folded).items()}
    folded.float()
    weights = {name: quantize(layer.weight, fit(layer.weight, bits[name], config.per_channel), bits[name])
               for name, layer in weight_layers(folded).items()}
    given = copy.deepcopy(folded)
    graph = trace(folded)
    activations = Distributions(graph, outputs, exact)
    seen = activations.seen
    if config.correct:
        errors = {name: tensor.decode().double() - exact[name] for name, tensor in weights.items()}
        correct_biases(graph, activations.placed(), errors)
    ranges = {} if config.activation_bits is None else activation_ranges(graph, seen, config)
    if config.batchnorm != "keep":
        folded, weights = renewed(folded, given, weights, topology, outputs, config, task, generator)
    return assemble(folded, weights, topology=topology, activations=ranges, notes={
        "rounds": rounds, "clamped": [pair.first for pair in found if pair.clamps],
        "unknown": [edge for node in graph for edge, source in zip(node.edges(), node.inputs, strict=False)
                    if seen[source] is None]})


def renewed(folded: nn.Module, given: nn.Module, weights: Mapping[str, CompressedTensor], topology: Topology,
            outputs: Mapping[str, Normal], config: Config, task: Task | None, generator: torch.Generator
            ) -> tuple[nn.Module, dict[str, CompressedTensor]]:
    """`folded` and `weights` with the renewal of batch norm folded into biases and scales; `given` is unquantized.

    For that, every folded batch norm is there again for a moment, as one that changes nothing.
    """
    student, given = (unfolded(model, topology, outputs) for model in (folded, given))
    compressed = renew(assemble(student, weights), given, config.batchnorm, generator, task=task,
                       size=config.image_size)
    return fold_codes(apply(compressed, given), weights)[:2]


def unfolded(model: nn.Module, topology: Topology, outputs: Mapping[str, Normal]) -> nn.Module:
    """A copy of `model` with a batch norm of mean = beta, var + eps = gamma^2 behind every layer that had one."""
    model = copy.deepcopy(model)
    for layer, name in topology.folded.items():
        kind = nn.BatchNorm2d if isinstance(model.get_submodule(layer), nn.Conv2d) else nn.BatchNorm1d
        norm, normal = kind(len(outputs[layer].mean)), outputs[layer]
        state = {"running_mean": normal.mean, "running_var": normal.std.square(), "bias": normal.mean,
                 "weight": (normal.std.square() + norm.eps).sqrt()}
        norm.load_state_dict(state, strict=False)
        model.set_submodule(name, norm)
    return model.eval()


# --- cross-layer equalization and bias absorption (sections 4.1) ----------------------------------------------


@torch.no_grad()
def equalize(model: nn.Module, pairs: list[Pair], outputs: dict[str, Normal], config: Config) -> int:
    """Make the ranges of every pair's channels equal, in place; returns the rounds that took.

    The rounds run on the largest |w| between each two channels, which scale as the weights do.
    """
    sources = {pair.second: len(model.get_submodule(pair.first).weight) for pair in pairs}
    peaks = {name: layer.weight.abs().reshape(len(layer.weight), sources.get(name, layer.weight.shape[1]), -1).amax(2)
             for name, layer in weight_layers(model).items()}  # [C_out, C_in]
    total = {pair: torch.ones(sources[pair.second], dtype=torch.float64) for pair in pairs}
    rounds, moved = 0, math.inf
    while rounds < config.rounds and moved >= config.tolerance:
        before = {name: peak.clone() for name, peak in peaks.items()}
        for pair in pairs:
            r1, r2 = peaks[pair.first].amax(1), peaks[pair.second].amax(0)
            live = (r1 > 0) & (r2 > 0)
            s = torch.where(live, (r1 * r2).sqrt() / torch.where(live, r2, 1.0), 1.0).clamp(1e-8, 1e8)
            peaks[pair.first] /= s[:, None]
            peaks[pair.second] *= s
            total[pair] *= s
        rounds += 1
        moved = sum(float((peaks[name] - before[name]).abs().mean()) for name in peaks) / len(peaks)
    for pair, s in total.items():
        divide(model, pair, s)
        if pair.first in outputs:
            outputs[pair.first] = Normal(outputs[pair.first].mean / s, outputs[pair.first].std / s)
    return rounds


@torch.no_grad()
def divide(model: nn.Module, pair: Pair, s: Tensor) -> None:
    """W1, b1 divided and W2 multiplied by s per channel, in place; after a flatten a channel has several columns."""
    first, second = model.get_submodule(pair.first), model.get_submodule(pair.second)
    first.weight.div_(s.reshape(-1, *[1] * (first.weight.ndim - 1)))
    if first.bias is not None:
        first.bias.div_(s)
    second.weight.view(len(second.weight), len(s), -1).mul_(s[:, None])


@torch.no_grad()
def absorb_biases(model: nn.Module, pairs: list[Pair], outputs: dict[str, Normal]) -> None:
    """Move what a ReLU hardly ever cuts off from the bias of the first layer to that of the second, in place."""
    for pair in pairs:
        first, second = model.get_submodule(pair.first), model.get_submodule(pair.second)
        if not pair.rectified or pair.first not in outputs or second.bias is None:
            continue
        normal = outputs[pair.first]
        c = (normal.mean - 3 * normal.std).clamp_min(0)
        first.bias.sub_(c)
        second.bias.add_(second.weight.reshape(len(second.weight), len(c), -1).sum(2) @ c)
        outputs[pair.first] = Normal(normal.mean - c, normal.std)


# --- expectations, bias correction and ranges ---------------------------------------------------------------


@torch.no_grad()
def correct_biases(graph: Graph, seen: Mapping[str, Normal | None], errors: Mapping[str, Tensor]) -> None:
    """b <- b - eps E[x] for every layer with a bias that reads channels, in place."""
    for node in graph.layers():
        if node.name in errors and node.module.bias is not None:
            source = seen[node.inputs[0]]
            if source is None:
                continue
            shift = respond(node, errors[node.name], source.moments()[0])
            node.module.bias.copy_(node.module.bias.double() - shift)


def activation_ranges(graph: Graph, seen: Mapping[str, Normal | None], config: Config
                      ) -> dict[str, ActivationQuantizer]:
    """{edge: quantizer} of beta -+ sigmas |gamma|, but for the edges that an add takes from accumulators, and those
    of which nothing is known: they stay float."""
    skipped = graph.accumulator_edges()
    return {edge: quantizer_of(*seen[source].range(config.sigmas), config.activation_bits)  # type: ignore[call-arg]
            for node in graph for edge, source in zip(node.edges(), node.inputs, strict=False)
            if edge not in skipped and seen[source] is not None}
