"""Removing channels: which ones may go, which ones stay, and how the rest takes over what the others did.

A channel can only be removed where its layer has one consumer that can be rewritten, so everything here is about
pairs of layers: first -> [batch norm] -> [ReLU, pools, flatten] -> second.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import BudgetError, CompressError, ConfigError
from .build import NORMS, weight_layers
from .fold import norm_ratio
from .graph import Graph, Node, trace


@dataclass(frozen=True)
class Pair:
    """Two layers, the second of which alone reads the first, channel by channel.

    norm       batch norm right after `first`, or None;  rectified  a ReLU (or a clamp that starts at 0) lies between
    clamps     the other clamps between: what they cut off does not grow with the channel
    """

    first: str
    norm: str | None
    second: str
    rectified: bool
    clamps: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Filters:
    """Filters of a layer with the batch norm behind it folded in, float64: y = r * x + k for each channel.

    r     [N, D], D = C K K: gain * weight;  k  [N]: beta + gain * (bias - mean)
    gain  [N]: gamma / sqrt(var + eps); 1 where there is no batch norm
    """

    r: Tensor
    k: Tensor
    gain: Tensor

    def __getitem__(self, channels: Tensor) -> "Filters":
        return Filters(self.r[channels], self.k[channels], self.gain[channels])


# --- which pairs there are ---------------------------------------------------------------------------------


def find_pairs(model: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Conv2d,)) -> list[Pair]:
    """Every pair of `model` whose first layer is one of `kinds`, in execution order; runs no layer.

    Left out: a layer whose output is read twice, added, or returned (residual sums share their channels);
    grouped convolutions (their filters see different inputs); batch norms without parameters or statistics.
    """
    graph = trace(model)
    found = (_pair_from(graph, node.name) for node in graph.layers() if isinstance(node.module, kinds))
    return [pair for pair in found if pair is not None]


def require_pairs(model: nn.Module, method: str, kinds: tuple[type[nn.Module], ...] = (nn.Conv2d,)) -> list[Pair]:
    """`find_pairs`, or CompressError if there is none."""
    pairs = find_pairs(model, kinds)
    if not pairs:
        raise CompressError(f"{trace(model).why_opaque()}{method} finds no prunable pair in {type(model).__name__}: "
                            f"it needs a {' or '.join(kind.__name__ for kind in kinds)} without groups that only one "
                            "conv or linear reads, with nothing but batch norm, ReLU, pools and flatten between")
    return pairs


def _pair_from(graph: Graph, first: str) -> Pair | None:
    layer, norm, seen, name = graph.nodes[first].module, None, [], first
    while True:
        readers = graph.consumers(name)
        if name == graph.output or len(readers) != 1:
            return None
        node = readers[0]
        if node.op == "bn" and name == first and node.module.affine and node.module.running_var is not None:
            norm = node.name
        elif node.kind.apart and _keeps_channels(node) or node.op == "clamp" and node.bounds[0] == 0:
            seen.append(node)
        else:
            break
        name = node.name
    flattened = any(each.op == "flatten" or _is_mean(each) for each in seen)
    if node.op not in ("conv", "linear") or not _connected(layer, node.module, flattened):
        return None
    rectified = any(each.bounds is not None and each.bounds[0] == 0 for each in seen)
    return Pair(first, norm, node.name, rectified, tuple(each.name for each in seen if each.op == "clamp"))


def _keeps_channels(node: Node) -> bool:
    """Whether dimension 1 are the channels still: not after a mean over them."""
    return not _is_mean(node) or node.run(torch.empty(2, 3, 4, 5, device="meta")).shape in ((2, 3, 1, 1), (2, 3))


def _is_mean(node: Node) -> bool:
    return node.op == "avgpool" and node.module is None


def _connected(first: nn.Module, second: nn.Module, flattened: bool) -> bool:
    """Whether the inputs of `second` are the channels of `first`, or H x W copies of each after a flatten."""
    if getattr(first, "groups", 1) != 1 or getattr(second, "groups", 1) != 1:
        return False
    copies, left = divmod(second.weight.shape[1], first.weight.shape[0])
    if isinstance(first, nn.Conv2d) and isinstance(second, nn.Linear):
        return flattened and left == 0
    return left == 0 and copies == 1


def read_filters(model: nn.Module, pair: Pair, weight: Tensor | None = None) -> Filters:
    """The folded filters of `pair.first`; `weight` stands in for its weight (say, the quantized one)."""
    layer = model.get_submodule(pair.first)
    flat = (layer.weight if weight is None else weight).detach().double().reshape(layer.weight.shape[0], -1)
    bias = torch.zeros(len(flat), dtype=torch.float64) if layer.bias is None else layer.bias.detach().double()
    if pair.norm is None:
        return Filters(flat, bias, torch.ones_like(bias))
    norm = model.get_submodule(pair.norm)
    gain = norm_ratio(norm)
    return Filters(gain[:, None] * flat, norm.bias.detach().double() + gain * (bias - norm.running_mean.double()), gain)


# --- which channels stay -----------------------------------------------------------------------------------


def norm_l1(filters: Tensor) -> Tensor:
    return filters.abs().sum(1)


def norm_l2(filters: Tensor) -> Tensor:
    return filters.square().sum(1).sqrt()


def distance_sum(filters: Tensor) -> Tensor:
    """Sum of Euclidean distances to all other filters: small near the geometric median."""
    return torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist").sum(1)


CRITERIA = {"l1": norm_l1, "l2": norm_l2, "gm": distance_sum}


def check_criterion(criterion: str) -> None:
    if criterion not in CRITERIA:
        raise ConfigError(f"criterion = {criterion!r}: allowed are {', '.join(CRITERIA)}")


def count_channels(layer: str, n: int, density: float, rounded: Callable[[float], int] = math.floor) -> int:
    """Kept channels of `n`: floor(n * density), as in int(n * (1 - ratio)); BudgetError if none is left."""
    kept = rounded(round(n * density, 9))  # 50 * (1 - 0.7) is a little above 15, 10 * (1 - 0.9) a little under 1
    if kept < 1:
        raise BudgetError(f"budget channel_density = {density:g} leaves no channel of {layer} (it has {n}); "
                          f"allowed is {math.ceil(1e4 / n) / 1e4:.4g} or more")
    return kept


def keep_channels(weight: Tensor, count: int, criterion: str) -> Tensor:
    """Indices, ascending, of the `count` filters [N, ...] of the highest criterion; of equal ones the first."""
    check_criterion(criterion)
    scores = CRITERIA[criterion](weight.detach().double().reshape(weight.shape[0], -1))
    return torch.sort(scores, descending=True, stable=True).indices[:count].sort().values


# --- editing a copied network ------------------------------------------------------------------------------


def identity_on(kept: Tensor, n: int) -> Tensor:
    """Z [len(kept), n] float64 of plain pruning: 1 from each kept channel to itself, else 0."""
    z = torch.zeros(len(kept), n, dtype=torch.float64)
    z[torch.arange(len(kept)), kept] = 1.0
    return z


@torch.no_grad()
def scale_inputs(layer: nn.Module, z: Tensor) -> None:
    """W'[:, a] <- sum_n z[a, n] W'[:, n] in place, over input channels; after a flatten n owns H W columns."""
    weight = layer.weight
    columns = weight.double().reshape(weight.shape[0], z.shape[1], -1)
    mixed = torch.einsum("an,mnk->mak", z, columns).to(weight.dtype)
    layer.weight = nn.Parameter(mixed.reshape(weight.shape[0], -1, *weight.shape[2:]).contiguous())


@torch.no_grad()
def merge_channels(model: nn.Module, pair: Pair, kept: Tensor, z: Tensor) -> None:
    """Keep the channels `kept` of `pair.first` and its batch norm, in place; `second` reads them through `z`."""
    first, second = model.get_submodule(pair.first), model.get_submodule(pair.second)
    scale_inputs(second, z)
    _keep(first, kept, "weight", "bias")
    if pair.norm is not None:
        _keep(model.get_submodule(pair.norm), kept, "weight", "bias", "running_mean", "running_var")
    for layer in (first, second):
        out, into = layer.weight.shape[:2]
        names = ("out_channels", "in_channels") if isinstance(layer, nn.Conv2d) else ("out_features", "in_features")
        setattr(layer, names[0], out)
        setattr(layer, names[1], into)


def _keep(module: nn.Module, kept: Tensor, *names: str) -> None:
    for name in names:
        value = getattr(module, name)
        if isinstance(value, nn.Parameter):
            setattr(module, name, nn.Parameter(value[kept]))
        elif value is not None:
            setattr(module, name, value[kept])
    if isinstance(module, NORMS):
        module.num_features = len(kept)


@torch.no_grad()
def scale_outputs(model: nn.Module, pair: Pair, factors: Tensor) -> None:
    """gamma, beta <- factors * gamma, beta of the pair's batch norm, in place.

    With factors >= 0 this equals scaling the inputs of `pair.second`, because ReLU and pools commute with them.
    """
    norm = model.get_submodule(pair.norm)
    norm.weight.copy_(norm.weight.double() * factors)
    norm.bias.copy_(norm.bias.double() * factors)


def fit_scales(wanted: Filters, have: Filters, weight: float, ridge: float = 0.0) -> Tensor:
    """[N] c >= 0 that minimises |wanted.r - c have.r|^2 + weight (wanted.k - c have.k)^2 + ridge c^2 per channel.

    1 where the sum of squares below is 0 (a dead channel).
    """
    upper = (have.r * wanted.r).sum(1) + weight * have.k * wanted.k
    lower = have.r.square().sum(1) + weight * have.k.square() + ridge
    return torch.where(lower > 0, upper / torch.where(lower > 0, lower, 1.0), 1.0).clamp_min(0)


def changed_widths(model: nn.Module, skeleton: nn.Module) -> dict[str, tuple[int, int]]:
    """`Topology.widths`: {module: (out, in)} of the layers, (features, features) of the batch norms that differ."""
    before: Mapping[str, nn.Module] = dict(skeleton.named_modules())
    widths = {name: tuple(layer.weight.shape[:2]) for name, layer in weight_layers(model).items()
              if layer.weight.shape != before[name].weight.shape}
    norms = {name: (norm.num_features, norm.num_features) for name, norm in model.named_modules()
             if isinstance(norm, NORMS) and norm.num_features != before[name].num_features}
    return {**widths, **norms}
