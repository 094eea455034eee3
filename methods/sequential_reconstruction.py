"""Sequential reconstruction on distilled images: pruning and quantization without data, of no paper's own.

UDFC's setting (Bai et al., ICCV 2023: channels removed, few bits, no data, no training), other means. Images are
distilled from batch norm (as in ZeroQ, Cai et al. 2020, and DeepInversion, Yin et al. 2020). On them the given network
and the compressed one run side by side, and layer by layer the compressed one is refitted to what the given one
computes from its own inputs, so that a layer makes good what the layers before it did.

Algorithm
    x: distilled images;  S: the filters of largest norm;  V0: UDFC's merged weights, or the given ones
    for every layer in order of execution, x_t, x_s its inputs in the given and in the compressed network
        o_t = W[S] x_t,  and behind a residual block also + (shortcut_t - shortcut_s) sqrt(v_t) / gamma            (1)
        V = argmin |o_t - V x_s|^2 + lam |V - V0|^2,  both centred,  lam = ridge * mean diag(x_s x_s^T)              (2)
        W~ = Q_k(V);  its batch norm: mu' = mu + (m_s - m_t) sqrt(v / v_t),  v' = v v_s / v_t                        (3)
    classifier:  W~ = Q_k(W),  b += E W x_t - E W~ x_s                                                              (4)
  every batch norm of both runs with the batch's statistics (m, v_t; m_s, v_s)

Symbols    Q_k the grid of UDFC's Eq. (3), scheme = "odd"; k budget.bits; |S| / N budget.channel_density
           gamma, mu, v of the given batch norm, eps in v

Choices
  * ridge = none tries RIDGES and takes that of the least block error: relative squared error at the residual sums and
    the output, on the quarter of the distilled images that these trials do not fit. No image of a data set is seen.
  * A channel with |gamma| < 1e-3 takes no part of the shortcut's error. Behind a sum of two convolutions the one that
    integer engines accumulate onto takes it over.
  * Grouped convolutions, those padded with something else than zeros, and layers inside of what torch.fx cannot look
    into are quantized and not refitted.
  * Layers with a bias and no batch norm behind keep the mean of their outputs by (4).
"""

import copy
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .core.artifact import CompressedModel, CompressedTensor, Topology
from .core.budget import Budget
from .core.errors import BudgetError, CompressError, ConfigError
from .core.fit.batchnorm import moved, with_statistics
from .core.fit.grids import ODD, check_grid, on_grid
from .core.fit.images import distill_images, input_shape
from .core.fit.merging import least_squares, merge_pairs
from .core.fit.norms import batch_statistics
from .core.fit.quantize import find_scheme
from .core.fit.size import Knob
from .core.graph.build import assemble, own_copy, tensors_of, weight_layers
from .core.graph.channels import Filters, Pair, changed_widths, check_criterion, require_pairs
from .core.graph.graph import Graph, Node, trace
from .core.method import check_call
from .core.settings import check_idle_without
from .core.train.run import NullRun, Run
from .core.train.task import Task
from .core.typed import check_types

DATA = "none"
SIZE_KNOB = Knob("channel_density", 0.02, 1.0)
RIDGES = (0.1, 0.3, 1.0)
LEAST_GAIN = 1e-3  # |gamma| of a channel that takes over its share of the shortcut's error
LAST: dict[bytes, Tensor] = {}  # images of the last network: the rows of a table share them
CHUNK = 25  # images whose windows are unfolded at a time
WITHOUT = {"bits": ("scheme", "per_channel"), "channel_density": ("criterion", "alpha1")}


@dataclass(frozen=True)
class Config:
    """criterion: "l1", "l2" or "gm"; scheme, per_channel: of the weights' grids; images, steps: of the distillation.

    ridge       of (2), none for the best of RIDGES;  alpha1  of UDFC's Eq. (12), for V0
    image_size  side of an image, none for the first usual one that the network runs on
    """

    criterion: str = "l2"
    scheme: str = ODD
    per_channel: bool = False
    images: int = 100
    steps: int = 150
    ridge: float | None = None
    alpha1: float = 0.01
    image_size: int | None = None

    def __post_init__(self):
        check_types(self)
        check_criterion(self.criterion)
        check_grid(self.scheme)
        for name, least in (("images", 8), ("steps", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} = {getattr(self, name)}: allowed is {least} or more")
        for name in ("ridge", "alpha1"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} = {value!r}: allowed is a number above 0")


def compress(model: nn.Module, task: Task | None, budget: Budget, config: Config, generator: torch.Generator,
             *, run: Run | None = None) -> CompressedModel:
    """Budget: channel_density (of the prunable convolutions) and bits, each a number or {layer: number}, or one of
    the two: without bits the weights stay float32."""
    check_call(__name__, model, task, budget, config, generator)
    run = NullRun() if run is None else run
    budget.require("sequential_reconstruction", optional=("channel_density", "bits"))
    if budget.channel_density is None and budget.bits is None:
        raise BudgetError("sequential_reconstruction needs the budget field 'channel_density' or 'bits'")
    check_idle_without(config, budget, WITHOUT)
    given = own_copy(model).cpu().eval().requires_grad_(False)
    bits = {}
    if budget.bits is not None:
        bits = budget.every_layer("bits", weight_layers(given), "sequential_reconstruction")
        bits = {name: int(b) for name, b in bits.items()}
    if config.scheme != ODD:
        find_scheme(config.scheme, bits.values())
    small, kept = copy.deepcopy(given), {}
    if budget.channel_density is not None:
        pairs = require_pairs(small, "sequential_reconstruction")
        names = [pair.first for pair in pairs]  # what the budget does not name keeps its channels
        densities = {**dict.fromkeys(names, 1.0), **budget.per_layer("channel_density", names)}
        kept = merge_pairs(small, pairs, densities, config.criterion, combination(config.alpha1))
    check_outputs(given, config)
    images = images_for(given, config, generator, run.stage("images"))
    rows = {name: chosen for pair, chosen in kept.items() for name in (pair.first, pair.norm)}
    ridge, tried = config.ridge, {}
    if ridge is None:
        trials = {value: Walk(given, small, rows, bits, config, value, images) for value in RIDGES}
        tried = {value: trial.over(len(images) * 3 // 4) for value, trial in trials.items()}
        ridge = min(tried, key=tried.get)
    walk = Walk(given, small, rows, bits, config, ridge, images)
    walk.over(len(images))
    return assemble(walk.student, walk.weights, topology=Topology(widths=changed_widths(walk.student, given)),
                    notes={"ridge": ridge, "block_error": {str(value): error for value, error in tried.items()},
                           "channels": {pair.first: len(channels) for pair, channels in kept.items()}})


@torch.no_grad()
def check_outputs(model: nn.Module, config: Config) -> None:
    """CompressError, before anything long, where the network puts out something else than one tensor."""
    outputs = model(torch.zeros(1, *input_shape(model, config.image_size)))
    if not isinstance(outputs, Tensor):
        raise CompressError(f"the network puts out a {type(outputs).__name__}: needed is one tensor")


def images_for(model: nn.Module, config: Config, generator: torch.Generator, run: Run) -> Tensor:
    """The distilled images; those of the last call again where network, settings and seed are the same."""
    shape, seed = input_shape(model, config.image_size), int(torch.randint(2**62, (), generator=generator))
    computed = [(node.name, node.op, node.inputs, repr(node.module)) for node in trace(model)]
    said = config.images, config.steps, shape, seed, type(model).__module__, type(model).__qualname__, computed
    key = hashlib.sha256(repr(said).encode())
    for name, value in tensors_of(model).items():
        key.update(name.encode() + value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    if key.digest() not in LAST:
        made = distill_images(model, config.images, config.steps, shape, torch.Generator().manual_seed(seed), run=run)
        LAST.clear()
        LAST[key.digest()] = made
    return LAST[key.digest()]


class Walk:
    """The given network and its student, side by side on the same images, layer by layer.

    rows   {layer or batch norm: the output channels of the given one that the student kept}, where some are gone
    bits   {layer: bits}, empty to leave weights float
    After `over`: `student` (a copy of `small`, refitted, its batch norms renewed) and `weights`, its codes.
    """

    def __init__(self, given: nn.Module, small: nn.Module, rows: Mapping[str, Tensor], bits: Mapping[str, int],
                 config: Config, ridge: float, images: Tensor):
        self.student, self.rows, self.bits, self.config, self.ridge = copy.deepcopy(small), rows, bits, config, ridge
        self.weights: dict[str, CompressedTensor] = {}
        self.graph, self.own = trace(given), trace(self.student)
        self.takers = {layer: edge for edge, layer in self.graph.accumulator_edges().items()}
        self.values = {node.name: (images, images) for node in self.graph if node.op == "input"}  # of both networks
        self.count = len(images)

    @torch.no_grad()
    def over(self, fitted: int) -> float:
        """Refit every layer on the first `fitted` images; returns the block error on the others, or on all."""
        order, errors = in_order(self.graph, self.takers), []
        judged = slice(fitted, None) if fitted < self.count else slice(None)
        last = {name: node.name for node in order for name in node.inputs}
        shapes = [dict.fromkeys(self.values, pair[0].shape) for pair in self.values.values() for _ in pair]  # of both
        self.code_the_rest()
        for node in order:
            theirs, ours = ([self.values[name][i] for name in node.inputs] for i in (0, 1))
            if node.op in ("conv", "linear"):
                self.values[node.name] = self.refit(node, theirs[0], ours[0], fitted)
            elif node.op == "bn":
                self.values[node.name] = self.renew(node, theirs[0], ours[0])
            else:
                self.values[node.name] = (node.at(shapes[0]).run(*theirs),
                                          self.own.nodes[node.name].at(shapes[1]).run(*ours))
            for known, value in zip(shapes, self.values[node.name], strict=True):
                if self.graph.needs_shape(node.name):
                    known[node.name] = value.shape
            if node.op == "add" or node.name == self.graph.output:
                errors.append(relative_error(*(part[judged] for part in self.values[node.name])))
            for name in dict.fromkeys(node.inputs):
                if last[name] == node.name:
                    del self.values[name]
        return sum(errors) / len(errors)

    def code_the_rest(self) -> None:
        """Layers that are no nodes of the graph (inside of barriers) are quantized as they are."""
        walked = {node.name for node in self.graph.layers()}
        for name, layer in weight_layers(self.student).items():
            if name in self.bits and name not in walked:
                coded = on_grid(layer.weight, self.bits[name], self.config.scheme, self.config.per_channel)
                self.weights[name] = coded
                layer.weight.copy_(coded.decode())

    def refit(self, node: Node, theirs: Tensor, ours: Tensor, fitted: int) -> tuple[Tensor, Tensor]:
        """(1), (2), (4): a new weight for a layer of the student; returns the outputs of both networks."""
        layer, output = self.own.nodes[node.name].module, node.run(theirs)
        wanted = output[:, self.rows[node.name]] if node.name in self.rows else output
        if node.name in self.takers:
            wanted = wanted + self.missing(node, wanted)
        if refittable(layer) and node.name != self.graph.output:
            layer.weight.copy_(ridge_regression(layer, ours[:fitted], wanted[:fitted], self.ridge))
        if node.name in self.bits:
            coded = on_grid(layer.weight, self.bits[node.name], self.config.scheme, self.config.per_channel)
            self.weights[node.name] = coded
            layer.weight.copy_(coded.decode())
        result = layer(ours)
        if layer.bias is not None and self.graph.norm_after(node.name) is None:
            shift = by_channel(layer, wanted).mean(1) - by_channel(layer, result).mean(1)
            layer.bias.add_(shift)
            result = layer(ours)
        return output, result

    def missing(self, node: Node, wanted: Tensor) -> Tensor:
        """What the other summand of a residual sum lacks, in units of this layer's output."""
        add, index = self.takers[node.name].rsplit(":", 1)
        other = self.graph.nodes[add].inputs[1 - int(index)]
        if other not in self.values:  # it reads the size of this one, and comes later
            return torch.zeros_like(wanted)
        theirs, ours = self.values[other]
        name = self.graph.norm_after(node.name)
        if name is None:
            return theirs - ours
        norm = self.graph.nodes[name].module
        deviation = (batch_statistics(wanted)[1] + norm.eps).sqrt().float()
        gamma = norm.weight if norm.affine else torch.ones_like(deviation)
        gain = torch.where(gamma.abs() < LEAST_GAIN, 0.0, deviation / gamma)
        return (theirs - ours) * gain.reshape(-1, *[1] * (wanted.ndim - 2))

    def renew(self, node: Node, theirs: Tensor, ours: Tensor) -> tuple[Tensor, Tensor]:
        """(3): both norms with the batch's statistics; the student's remembers what the given one's become."""
        norm, own = node.module, self.own.nodes[node.name].module
        chosen, given, seen = self.rows.get(node.name, slice(None)), batch_statistics(theirs), batch_statistics(ours)
        mean, variance = moved(norm, chosen, seen, (given[0][chosen], given[1][chosen]))
        own.running_mean.copy_(mean)
        own.running_var.copy_(variance)
        return with_statistics(norm, theirs, given), with_statistics(own, ours, seen)


def in_order(graph: Graph, takers: Mapping[str, str]) -> list[Node]:
    """The nodes after the input so that of a sum's operands the layer that takes over the others' error comes last."""
    last = {edge: layer for layer, edge in takers.items()}
    order, seen, stack = [], {node.name for node in graph if node.op == "input"}, [graph.output]
    while stack:
        node = graph.nodes[stack[-1]]
        inputs = sorted(zip(node.inputs, node.edges() or node.inputs, strict=True), key=lambda pair: pair[1] in last)
        waiting = [name for name in (*(name for name, _ in inputs), *node.shaped_by) if name not in seen]
        if waiting:
            stack.append(waiting[0])
            continue
        stack.pop()
        if node.name not in seen:
            seen.add(node.name)
            order.append(node)
    return order


def combination(alpha: float) -> Callable[[Pair, Tensor, Filters, Tensor, Tensor], Tensor]:
    """UDFC's Eq. (20) with the weight `alpha` of the bias, on filters with batch norm folded in."""
    def combine(pair: Pair, weight: Tensor, filters: Filters, kept: Tensor, removed: Tensor) -> Tensor:
        wanted = filters[removed]
        return least_squares(filters[kept], wanted, torch.full_like(wanted.gain, alpha))
    return combine


def refittable(layer: nn.Module) -> bool:
    """Whether `windows_of` knows what the outputs of a layer are made from."""
    if isinstance(layer, nn.Linear):
        return True
    return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def ridge_regression(layer: nn.Module, x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """The weight of `layer` that maps inputs x to outputs y, centred, at least cost of moving from the present one.

        V = (C_yx + lam V0) (C_xx + lam)^-1,   lam = ridge * mean diag C_xx
    """
    start = layer.weight.double().flatten(1)
    size, outs = start.shape[1], len(start)
    square, cross = start.new_zeros(size, size), start.new_zeros(outs, size)
    sums, count = start.new_zeros(size + outs), 0
    for a, b in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        windows, targets = windows_of(layer, a), by_channel(layer, b)  # [D, n], [M, n]
        square += (windows @ windows.T).double()
        cross += (targets @ windows.T).double()
        sums += torch.cat([windows, targets]).sum(1, dtype=torch.float64)
        count += windows.shape[1]
    mean_x, mean_y = (sums / count).split([size, outs])
    square = square / count - torch.outer(mean_x, mean_x)
    cross = cross / count - torch.outer(mean_y, mean_x)
    lam = ridge * float(square.diagonal().mean())
    if lam <= 0:  # inputs that never vary
        return layer.weight
    square.diagonal().add_(lam)
    root, failed = torch.linalg.cholesky_ex(square)
    if failed:
        raise CompressError(f"ridge = {ridge:g} is too small for {count} values of {size} inputs: allowed are larger "
                            "ones")
    return torch.cholesky_solve((cross + lam * start).T, root).T.reshape(layer.weight.shape)


def windows_of(layer: nn.Module, x: Tensor) -> Tensor:
    """[C k k, n]: what each of the n outputs of a channel is made from."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1]).T
    return F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(0, 1).flatten(1)


def by_channel(layer: nn.Module, y: Tensor) -> Tensor:
    """[M, n]: the n outputs of each channel."""
    return y.reshape(-1, y.shape[-1]).T if isinstance(layer, nn.Linear) else y.transpose(0, 1).flatten(1)


def relative_error(wanted: Tensor, got: Tensor) -> float:
    spread = (wanted - wanted.mean()).square().mean()
    return float((wanted - got).square().mean() / spread.clamp_min(torch.finfo(spread.dtype).tiny))
