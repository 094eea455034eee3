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
  * A block that goes is one with the identity as its shortcut and all its layers chosen; the identity takes its place,
    a clamp behind the sum goes, too. They go one by one, always the one without which the loss on the held-out data is
    least (of what is left, at fixed weights): the error has too many ties there. geometric has rounds of equally many.
  * rates, widths = "sensitivity" choose densities and bits of layers by the held-out error of each pruned or rounded
    alone (core/fit/layer_rates); the budget's bits are then their mean over the weights.
  * slim penalises |gamma| until the last masks are chosen: with one_shot in `before`.
  * The lottery rewinds to the network that is given, which is trained, or to step `rewind` of the first training from
    it; `fresh` starts from initial weights, as the paper does. Batch norms are rewound, too. `control` gives the
    paper's two controls for the last training.
  * Ranges of activations are fixed in the file: there are static ones (or "float", none), not dynamic ones.
  * float16 keeps the weights as 16-bit floats, which no integer kernel runs; it takes no bits.
"""

from dataclasses import replace

import torch
from torch import nn

from ..core.artifact import Affine, CompressedModel, Topology, tensor_name
from ..core.budget import Budget
from ..core.fit.calibrate import calibrate
from ..core.fit.criteria import score_weight
from ..core.fit.layer_rates import equal_drop, equal_drop_bits
from ..core.fit.weight_quantizers import find_quantizer
from ..core.graph.build import apply, assemble, own_copy
from ..core.graph.fold import fold_codes
from ..core.graph.graph import trace
from ..core.method import check_call
from ..core.train.finetune import train
from ..core.train.run import NullRun, Run
from ..core.train.start import ready
from ..core.train.task import Task
from .blocks import BlockPruning, Course, of_equal_shape
from .curves import Sensitivity, density_curves, pruning_curves, quantization_curves, width_curves
from .dressed import Dressed
from .plan import Plan, check_data, check_half, companions, make_plan, widths_of
from .pruning import RUNS, Masks, Pruning, started_anew
from .scores import Units, make_scores
from .settings import FLOAT16, SIZED, Config, Prune, Quantize

__all__ = ["Config", "Prune", "Quantize", "Sensitivity", "compress", "pruning_curves", "quantization_curves"]

DATA = "train"
SIZE_KNOB = SIZED["weight"]  # by default; Config.size_knob has it for other settings


def compress(model: nn.Module, task: Task | None, budget: Budget, config: Config, generator: torch.Generator,
             *, run: Run | None = None) -> CompressedModel:
    """Budget: bits (but for float16), density for weights or channel_density for channels, if they are pruned; how many
    blocks go is config.prune.blocks."""
    check_call(__name__, model, task, budget, config, generator)
    run = NullRun() if run is None else run
    pruned = "prune" in config.order
    fields = {"weight": ["density"], "channel": ["channel_density"], "block": []}[config.prune.granularity]
    budget.require("pipeline", *(fields if pruned else []),
                   *(["bits"] if config.quantize.quantizer != FLOAT16 else []))
    given, model = model, own_copy(model)
    plan = make_plan(model, trace(model), budget, config)
    check_data(task, config)
    task = ready(model, task, config)
    if plan.blocks and task is not None:
        plan = replace(plan, blocks=of_equal_shape(model, task, plan.blocks, config.prune.blocks))
    if config.prune.fresh:
        model = started_anew(model, generator)
    if config.prune.control == "reinitialised":
        other = generator.clone_state()  # the masks are to be those of the ticket
        plan = replace(plan, anew=started_anew(model, other).state_dict())
    dressed = Dressed(model, plan.layers, companions(model, plan))
    stages = {"prune": lambda: prune(model, task, dressed, plan, config.prune, generator, run),
              "quantize": lambda: quantize(model, task, dressed, plan, config.quantize, generator, run),
              "distil": lambda: train(model, task, config.distil, generator, hooks=dressed, run=run.stage("distil"))}
    outcome = {stage: stages[stage]() for stage in config.order}
    return finish(model, given, task, dressed, config, outcome.get("prune", ()))


def prune(model: nn.Module, task: Task | None, dressed: Dressed, plan: Plan, settings: Prune,
          generator: torch.Generator, run: Run) -> Course:
    """The prune stage, in place; the blocks that went."""
    if settings.granularity == "block":
        return BlockPruning(model, task, dressed, plan.blocks, settings, generator, run)()
    units = Units(plan.layers, plan.groups)
    norms = {name: model.get_submodule(norm) for name, norm in plan.norms.items()}
    scores = make_scores(settings.criterion, settings.granularity, dressed, units.layers, norms, settings.penalty,
                         generator)
    updates = 1 if settings.schedule == "one_shot" else settings.updates
    densities = plan.densities if settings.rates == "budget" else by_sensitivity(model, task, dressed, plan, run)
    masks = Masks(dressed, units, scores, densities, settings.schedule, settings.scope, updates, settings.floor)
    RUNS[settings.schedule](Pruning(model, task, masks, settings, generator, run, plan.anew))
    return ()


def by_sensitivity(model: nn.Module, task: Task, dressed: Dressed, plan: Plan, run: Run) -> dict[str, float]:
    """Densities of equal drop in the held-out error, each layer pruned alone by magnitude."""
    scores = {name: score_weight("level", dressed.master(name)) for name in plan.densities}
    curves = density_curves(model, task, dressed, Units(list(scores), None), scores, run=run.stage("sensitivity"))
    sizes = {name: dressed.master(name).numel() for name in curves}
    return equal_drop(curves, sizes, next(iter(plan.densities.values())))


def quantize(model: nn.Module, task: Task | None, dressed: Dressed, plan: Plan, settings: Quantize,
             generator: torch.Generator, run: Run) -> None:
    """The quantize stage, in place; float16 rounds at the end."""
    if plan.bits is None:
        return
    kind, bits = find_quantizer(settings.quantizer), {b: plan.bits[b] for b in plan.bits if b in dressed.coats}
    if settings.widths == "sensitivity" and bits:
        curves = width_curves(model, task, dressed, widths_of(settings.quantizer), settings.scheme,
                              settings.per_channel, run=run.stage("widths"))
        bits = equal_drop_bits(curves, {name: dressed.master(name).numel() for name in curves}, *set(bits.values()))
    dressed.quantize({name: kind(width, settings.scheme, settings.per_channel) for name, width in bits.items()})
    if settings.recipe is not None:
        train(model, task, settings.recipe, generator, hooks=dressed, run=run.stage("quantize"))
    dressed.freeze()


def finish(model: nn.Module, given: nn.Module, task: Task | None, dressed: Dressed, config: Config, gone: Course
           ) -> CompressedModel:
    """Codes, or 16-bit floats, under the masks; batch norm folded where it folds exactly; ranges."""
    model.eval()
    topology = Topology(removed=tuple(path for path, _ in gone))
    notes = {"removed": [list(step) for step in gone]} if gone else {}
    if config.quantize.quantizer == FLOAT16:
        masks = {name: coat.mask for name, coat in dressed.coats.items()}
        dressed.take_off()
        compressed = assemble(model, {}, topology=topology, notes=notes)
        compressed = replace(compressed, rest={**compressed.rest, **{
            tensor_name(name): _half(name, compressed.rest[tensor_name(name)], mask) for name, mask in masks.items()}})
    else:
        codes = dressed.encode()
        dressed.take_off()
        if all(isinstance(tensor.grid, Affine) for tensor in codes.values()):
            model, codes, folded = fold_codes(model, codes)
            topology = replace(topology, folded=folded.folded)
        compressed = assemble(model, codes, topology=topology, notes=notes)
    if config.activations == "float":
        return compressed
    ranges = calibrate(apply(compressed, given), task.calibration_inputs(config.calibration_inputs),
                       config.activation_bits, config.range_method)
    return replace(compressed, activations=ranges)


def _half(name: str, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    check_half(name, weight)
    return torch.where(mask.cpu(), weight, 0.0).half()
