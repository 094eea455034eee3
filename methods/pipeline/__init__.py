"""Pipeline: pruning, quantization and distillation as stages in any order, each from a catalogue of parts.

What the catalogues of NNI and Distiller offer one by one (core/fit: `criteria`, `schedules`, `weight_quantizers`), put
together: a criterion at a granularity prunes on a schedule, a quantizer rounds, a teacher is listened to. Masks and
grids, once there, stay through later stages: a network that is quantized first is pruned and distilled on its grid.

Algorithm
    every weight becomes  mask * quantizer(w), both empty at first; then for each stage in `order`
    prune     for updates t = 1..T:  scores of weights or channels;  mask = the best of density d_t;  train
    quantize  fit the quantizer to what is kept;  train through it;  freeze its grid
    distil    train, listening to the given network, under whatever is there already
    codes of the masters under the masks;  fold batch norm into the scales;  calibrate activations

Symbols    d = budget.density (weights) or channel_density;  t, T = updates of the masks;  M = masks, W = masters

Departures  There is no single paper; those of the parts are named in `core/fit`. Here:
  * Masks rank the float masters, also when they are on a grid. taylor and movement sum what comes along in training;
    where nothing was trained since the last masks they look at `score_batches` batches at fixed weights. A movement
    score is the plain sum (no Adam), and masks are chosen at the updates alone.
  * A pruned channel loses its bias and its batch norm's, so that it is 0; `shrink` cuts it out. Channels of the
    network's outputs stay. Layers that share channels share one mask.
  * rates = "sensitivity" chooses densities of layers by the held-out error of each pruned alone (core/fit/layer_rates).
  * slim penalises |gamma| until the last masks are chosen: with one_shot in `before`.
  * The lottery rewinds to the network that is given, which is trained, or to step `rewind` of the first training from
    it; `fresh` starts from initial weights, as the paper does. Batch norms are rewound, too.
  * Ranges of activations are fixed in the file: there are static ones (or "float", none), not dynamic ones.
  * float16 keeps the weights as 16-bit floats, which no integer kernel runs; it takes no bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..core.artifact import Affine, CompressedModel, tensor_name
from ..core.budget import Budget
from ..core.errors import BudgetError, CompressError, ConfigError
from ..core.fit.calibrate import calibrate
from ..core.fit.criteria import CRITERIA, check_scope, choose, score_weight
from ..core.fit.layer_rates import equal_drop, measure_curves
from ..core.fit.quantize import find_scheme
from ..core.fit.size import Knob
from ..core.fit.weight_quantizers import find_quantizer
from ..core.graph.build import apply, assemble, own_copy
from ..core.graph.coupled import Group, find_groups
from ..core.graph.fold import fold_codes
from ..core.graph.graph import Graph, trace
from ..core.graph.weights import weight_layers
from ..core.train.finetune import check_trainable, train
from ..core.train.run import NullRun, Run
from ..core.train.start import ready
from ..core.train.task import Task
from .dressed import Dressed
from .pruning import RUNS, Masks, Pruning, interval_of, started_anew
from .scores import Units, make_scores
from .settings import FLOAT16, Config, Prune, Quantize

__all__ = ["Config", "Prune", "Quantize", "compress"]

DATA = "train"
SIZE_KNOB = Knob("density", 1e-3, 1.0)
HALF = torch.finfo(torch.float16).max


@dataclass(frozen=True, eq=False)
class Plan:
    """bits {layer: width}, None for float16;  densities {layer or group: kept share} of what is pruned."""

    layers: list[str]
    bits: Mapping[str, int] | None
    densities: Mapping[str, float]
    groups: dict[str, Group] | None
    norms: Mapping[str, str]


def compress(model: nn.Module, task: Task | None, budget: Budget, config: Config, generator: torch.Generator,
             *, run: Run | None = None) -> CompressedModel:
    """Budget: bits (but for float16), density for weights or channel_density for channels, if they are pruned."""
    run = NullRun() if run is None else run
    pruned = "prune" in config.order
    field = "density" if config.prune.granularity == "weight" else "channel_density"
    budget.require("pipeline", *([field] if pruned else []),
                   *(["bits"] if config.quantize.quantizer != FLOAT16 else []))
    model = own_copy(model)
    plan = make_plan(model, trace(model), budget, config)
    check_data(task, config)
    task = ready(model, task, config)
    if config.prune.fresh:
        model = started_anew(model, generator)
    dressed = Dressed(model, plan.layers, _companions(model, plan))
    stages = {"prune": lambda: prune(model, task, dressed, plan, config.prune, generator, run),
              "quantize": lambda: quantize(model, task, dressed, plan, config.quantize, generator, run),
              "distil": lambda: train(model, task, config.distil, generator, hooks=dressed, run=run.stage("distil"))}
    for stage in config.order:
        stages[stage]()
    return finish(model, task, dressed, config)


def prune(model: nn.Module, task: Task | None, dressed: Dressed, plan: Plan, settings: Prune,
          generator: torch.Generator, run: Run) -> None:
    """The prune stage, in place."""
    units = Units(plan.layers, plan.groups)
    norms = {name: model.get_submodule(norm) for name, norm in plan.norms.items()}
    scores = make_scores(settings.criterion, settings.granularity, dressed, units.layers, norms, settings.penalty,
                         generator)
    updates = 1 if settings.schedule == "one_shot" else settings.updates
    densities = plan.densities if settings.rates == "budget" else by_sensitivity(model, task, dressed, plan)
    masks = Masks(dressed, units, scores, densities, settings.schedule, settings.scope, updates)
    RUNS[settings.schedule](Pruning(model, task, masks, settings, generator, run))


def by_sensitivity(model: nn.Module, task: Task, dressed: Dressed, plan: Plan) -> dict[str, float]:
    """Densities of equal drop in the held-out error, each layer pruned alone by magnitude."""
    task.placed(model)

    def alone(name: str, density: float) -> None:
        size = score_weight("level", dressed.master(name))
        dressed.set_masks(choose({name: size}, {name: density}, "local"))

    curves = measure_curves(list(plan.densities), alone, lambda: task.error(model))
    sizes = {name: dressed.master(name).numel() for name in curves}
    return equal_drop(curves, sizes, next(iter(plan.densities.values())))


def quantize(model: nn.Module, task: Task | None, dressed: Dressed, plan: Plan, settings: Quantize,
             generator: torch.Generator, run: Run) -> None:
    """The quantize stage, in place; float16 rounds at the end."""
    if plan.bits is None:
        return
    kind = find_quantizer(settings.quantizer)
    dressed.quantize({name: kind(width, settings.scheme, settings.per_channel) for name, width in plan.bits.items()})
    if settings.recipe is not None:
        train(model, task, settings.recipe, generator, hooks=dressed, run=run.stage("quantize"))
    dressed.freeze()


def finish(model: nn.Module, task: Task | None, dressed: Dressed, config: Config) -> CompressedModel:
    """Codes, or 16-bit floats, under the masks; batch norm folded where it folds exactly; ranges."""
    model.eval()
    if config.quantize.quantizer == FLOAT16:
        masks = {name: coat.mask for name, coat in dressed.coats.items()}
        dressed.take_off()
        compressed = assemble(model, {})
        compressed = replace(compressed, rest={**compressed.rest, **{
            tensor_name(name): _half(name, compressed.rest[tensor_name(name)], mask) for name, mask in masks.items()}})
    else:
        codes = dressed.encode()
        dressed.take_off()
        if all(isinstance(tensor.grid, Affine) for tensor in codes.values()):
            folded, codes, topology = fold_codes(model, codes)
            compressed = assemble(folded, codes, topology=topology)
        else:
            compressed = assemble(model, codes)
    if config.activations == "float":
        return compressed
    ranges = calibrate(apply(compressed, model), task.calibration_inputs(config.calibration_inputs),
                       config.activation_bits, config.range_method)
    return replace(compressed, activations=ranges)


def _half(name: str, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if float(weight.abs().max()) > HALF:
        raise CompressError(f"a weight of {name} is {float(weight.abs().max()):g}: float16 ends at {HALF:g}")
    return torch.where(mask.cpu(), weight, 0.0).half()


# --- what can be told before anything starts ----------------------------------------------------------------


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
    if "prune" not in config.order:
        return Plan(chosen, bits, {}, None, {})
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


def _companions(model: nn.Module, plan: Plan) -> dict[str, tuple[tuple[nn.Module, str], ...]]:
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
    if config.data != "train":
        return
    prune, pruned = config.prune, "prune" in config.order
    if pruned and CRITERIA[prune.criterion].sees == "gradients" and (task is None or task.train is None):
        raise ConfigError(f"criterion = {prune.criterion!r} needs training batches, and this task holds none: without "
                          "there are level, l1, l2, fpgm, slim, random")
    if task is None:
        raise ConfigError("these settings train or look at errors: they need a task, and there is none")
    check_trainable(task)
    steps = len(task.train)
    if pruned and prune.schedule in ("linear", "agp"):
        interval_of(prune.recipe, steps, prune.updates, prune.until)
    if pruned and prune.schedule == "lottery" and 0 < prune.recipe.epochs * steps < prune.rewind:
        raise ConfigError(f"rewind = {prune.rewind}: prune.recipe has {prune.recipe.epochs * steps} steps")
