"""What a pipeline prunes and quantizes, and how far: what can be told, or refused, before anything starts."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..core.budget import Budget
from ..core.errors import BudgetError, CompressError, ConfigError
from ..core.fit.criteria import CRITERIA, check_scope
from ..core.fit.layer_rates import WIDTHS
from ..core.fit.quantize import find_scheme
from ..core.fit.weight_quantizers import find_quantizer
from ..core.graph.coupled import Group, find_groups
from ..core.graph.graph import Graph
from ..core.graph.weights import weight_layers
from ..core.train.finetune import check_trainable
from ..core.train.task import Task
from .blocks import removable
from .pruning import interval_of
from .settings import FLOAT16, Config

HALF = torch.finfo(torch.float16).max


@dataclass(frozen=True, eq=False)
class Plan:
    """bits {layer: width}, None for float16;  densities {layer or group: kept share} of what is pruned.

    blocks  that can go, where blocks do
    anew    the state of the network with other initial weights, where a control asks for one
    """

    layers: list[str]
    bits: Mapping[str, int] | None
    densities: Mapping[str, float]
    groups: dict[str, Group] | None
    norms: Mapping[str, str]
    blocks: list[str] = field(default_factory=list)
    anew: Mapping[str, Tensor] = field(default_factory=dict)


def make_plan(model: nn.Module, graph: Graph, budget: Budget, config: Config) -> Plan:
    """What is pruned and quantized, and how far; an error in one line where settings and network do not fit."""
    layers, bits, prune = weight_layers(model), None, config.prune
    chosen = list(layers)
    if budget.bits is not None:
        bits = {name: int(b) for name, b in budget.per_layer("bits", layers).items()}
        for width in sorted(set(bits.values())):
            kind = find_quantizer(config.quantize.quantizer, width)
            find_scheme(config.quantize.scheme, [width] if "scheme" in kind.settings else ())
        chosen = list(bits)
        if config.quantize.widths == "sensitivity":
            check_sensitivity(bits, config.quantize.quantizer)
    elif config.quantize.quantizer == FLOAT16:
        for name, layer in layers.items():
            check_half(name, layer.weight)
    if "prune" not in config.order:
        return Plan(chosen, bits, {}, None, {})
    if prune.granularity == "block":
        return Plan(chosen, bits, {}, None, {}, removable(model, chosen, config))
    if prune.granularity == "weight":
        densities = budget.per_layer("density", layers)
        chosen = [name for name in chosen if name in densities]
        check_scope(prune.scope, densities)
        if prune.rates == "sensitivity" and len(set(densities.values())) > 1:
            raise ConfigError(f"rates = 'sensitivity' takes one density, not {sorted(set(densities.values()))}")
        return Plan(chosen, bits, densities, None, {})
    groups, densities = channel_groups(graph, budget.per_layer("channel_density", layers), chosen)
    check_scope(prune.scope, densities)
    norms = {name: graph.norm_after(name) for group in groups.values() for name in group.members}
    norms = {name: norm for name, norm in norms.items() if norm is not None and graph.nodes[norm].module.affine}
    bare = [name for group in groups.values() for name in group.members if name not in norms]
    if CRITERIA[prune.criterion].sees == "norms" and bare:
        raise ConfigError(f"criterion = 'slim' ranks by batch norm, and no affine one follows {bare[0]}: allowed are "
                          "l1, l2, fpgm, taylor, movement, random, or to leave the layer alone")
    return Plan(chosen, bits, densities, groups, norms)


def check_sensitivity(bits: Mapping[str, int], quantizer: str) -> None:
    """An error where widths = "sensitivity" could choose none."""
    asked, narrowest = sorted(set(bits.values())), min(widths_of(quantizer))
    if len(asked) != 1:
        raise ConfigError(f"widths = 'sensitivity' takes one number of bits, not {asked}")
    if asked[0] < narrowest:
        raise BudgetError(f"budget bits = {asked[0]} with widths = 'sensitivity': allowed is {narrowest} or more")


def widths_of(quantizer: str) -> list[int]:
    """The widths that widths = "sensitivity" measures."""
    low, high = find_quantizer(quantizer).widths
    return [b for b in WIDTHS if low <= b <= high]


def check_half(name: str, weight: Tensor) -> None:
    """CompressError for a weight of the layer `name` that is no 16-bit float."""
    largest = float(weight.detach().abs().max())
    if largest > HALF:
        raise CompressError(f"a weight of {name} is {largest:g}: float16 ends at {HALF:g}")


def channel_groups(graph: Graph, densities: Mapping[str, float], chosen: list[str]
                   ) -> tuple[dict[str, Group], dict[str, float]]:
    """{name: group} of the groups whose layers are all chosen, and their densities."""
    groups, found = {}, {}
    for group in find_groups(graph):
        if not all(name in densities and name in chosen for name in group.members):
            continue
        name, rates = ", ".join(group.members), {densities[layer] for layer in group.members}
        if len(rates) > 1:
            raise BudgetError(f"{name} share their channels: channel_density {sorted(rates)} has to be one number")
        groups[name], found[name] = group, rates.pop()
    if not groups:
        raise CompressError("the network has no layer of which channels could go: they are its outputs, are read by "
                            "an operation that needs them all, or are left alone")
    return groups, found


def companions(model: nn.Module, plan: Plan) -> dict[str, tuple[tuple[nn.Module, str], ...]]:
    """Biases and batch norms of the layers that lose channels."""
    layers = [name for group in ({} if plan.groups is None else plan.groups).values() for name in group.members]
    found = {}
    for name in layers:
        modules = [(model.get_submodule(name), ("bias",))]
        if name in plan.norms:
            modules.append((model.get_submodule(plan.norms[name]), ("weight", "bias")))
        found[name] = tuple((module, key) for module, keys in modules for key in keys
                            if getattr(module, key) is not None)
    return found


def check_data(task: Task | None, config: Config) -> None:
    """ConfigError in one line where the settings need data that is not there, or more steps than it gives."""
    if config.data not in ("train", "held_out"):
        return
    prune, pruned = config.prune, "prune" in config.order
    if pruned and CRITERIA[prune.criterion].sees == "gradients" and (task is None or task.train is None):
        raise ConfigError(f"criterion = {prune.criterion!r} needs training batches, and this task holds none: without "
                          "there are level, l1, l2, fpgm, slim, random")
    if task is None:
        raise ConfigError("these settings train or look at errors: they need a task, and there is none")
    if config.data == "held_out":
        return
    check_trainable(task)
    steps = len(task.train)
    if pruned and prune.schedule in ("linear", "agp"):
        interval_of(prune.recipe, steps, prune.updates, prune.until)
    if pruned and prune.schedule == "lottery" and 0 < prune.recipe.epochs * steps < prune.rewind:
        raise ConfigError(f"rewind = {prune.rewind}: prune.recipe has {prune.recipe.epochs * steps} steps")
