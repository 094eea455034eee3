"""Sensitivity of layers: the held-out error of a network of which one layer is pruned or rounded, at several levels.

Nothing is trained, and no test data is seen. `core/fit/layer_rates.py` chooses rates of layers by such curves.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.budget import FLOAT_BITS, OTHERS, Budget, PerLayer
from ..core.errors import ConfigError
from ..core.fit.criteria import ELEMENTS, choose, find_criterion
from ..core.fit.layer_rates import LEVELS, WIDTHS, Curves, equal_drop, equal_drop_bits, measure_curves
from ..core.fit.quantize import find_scheme
from ..core.fit.weight_quantizers import Nearest
from ..core.graph.build import own_copy
from ..core.graph.graph import trace
from ..core.graph.weights import weight_layers
from ..core.train.loaders import call, fixed_order
from ..core.train.run import Run
from ..core.train.task import Task
from .dressed import Dressed
from .plan import check_data, companions, make_plan
from .scores import Units, look, make_scores
from .settings import FLOAT16, Config, Prune, Quantize


@dataclass(frozen=True)
class Sensitivity:
    """What one layer alone costs.

    level    "density" (kept share of the weights or of the channels) or "bits" (32: float)
    measure  name of the metric, or "loss";  percent  errors are shares in [0, 1]
    curves   {layer, or layers that share channels: {level: held-out error}}, lower is better
    sizes    {the same: weights}
    """

    level: str
    measure: str
    percent: bool
    curves: Curves
    sizes: dict[str, int]

    def choose(self, budget: float) -> dict[str, float]:
        """Levels of equal drop: together at most `budget` as the mean over the weights. BudgetError out of reach."""
        rules: dict[str, Callable] = {"density": equal_drop, "bits": equal_drop_bits}
        return rules[self.level](self.curves, self.sizes, budget)


def pruning_curves(model: nn.Module, task: Task, generator: torch.Generator, levels: Sequence[float] = LEVELS, *,
                   criterion: str = "level", granularity: str = "weight", batches: int = 8,
                   layers: Collection[str] | None = None, run: Run | None = None) -> Sensitivity:
    """Each layer alone at kept shares in (0, 1], by any criterion of `core/fit/criteria.py`; `model` is not changed.

    batches  training batches that taylor and movement look at;  layers  only these (None: all)
    ConfigError for a criterion that needs what network or task do not have, or levels out of range.

    >>> net = nn.Sequential(nn.Linear(4, 3))
    >>> task = Task.from_loader([], [(torch.eye(4), torch.tensor([0, 1, 2, 0]))])
    >>> found = pruning_curves(net, task, torch.Generator(), [0.5])
    >>> list(found.curves), list(found.curves["0"]), found.measure
    (['0'], [1.0, 0.5], 'top1')
    """
    check_levels("density", levels)
    check_granularity(criterion, granularity)
    config = Config(prune=Prune(criterion, granularity), quantize=Quantize(FLOAT16), activations="float")
    model = own_copy(model)
    budget = Budget(**{"density" if granularity == "weight" else "channel_density": _whole(1.0, layers)})
    plan = make_plan(model, trace(model), budget, config)
    check_data(task, config)
    _check_task(task)
    dressed, units = Dressed(model, plan.layers, companions(model, plan)), Units(plan.layers, plan.groups)
    norms = {name: model.get_submodule(norm) for name, norm in plan.norms.items()}
    seen = make_scores(criterion, granularity, dressed, units.layers, norms, 0.0, generator)
    if not seen.ready():
        look(model, task, batches, generator, seen)
    scores = units.gather(seen.now())
    seen.stop()
    curves = density_curves(model, task, dressed, units, scores, levels, run=run)
    members = {name: [name] if plan.groups is None else list(plan.groups[name].members) for name in curves}
    sizes = {name: sum(dressed.master(layer).numel() for layer in layers) for name, layers in members.items()}
    return Sensitivity("density", *_measure(model, task), curves, sizes)


def quantization_curves(model: nn.Module, task: Task, widths: Sequence[int] = WIDTHS, *, scheme: str = "symmetric",
                        per_channel: bool = True, layers: Collection[str] | None = None, run: Run | None = None
                        ) -> Sensitivity:
    """Each layer (of `layers`; None: of all) alone rounded to the nearest at widths in 2..16; `model` is not changed.

    ConfigError for widths out of range, or a scheme that there is not.
    """
    check_levels("bits", widths)
    find_scheme(scheme, widths)
    _check_task(task)
    model = own_copy(model)
    dressed = Dressed(model, list(Budget(bits=_whole(8, layers)).per_layer("bits", weight_layers(model))))
    curves = width_curves(model, task, dressed, [int(b) for b in widths], scheme, per_channel, run=run)
    sizes = {name: dressed.master(name).numel() for name in curves}
    return Sensitivity("bits", *_measure(model, task), curves, sizes)


def density_curves(model: nn.Module, task: Task, dressed: Dressed, units: Units, scores: Mapping[str, Tensor],
                   levels: Sequence[float] = LEVELS, *, run: Run | None = None) -> Curves:
    """{unit: {density: held-out error}} of a dressed network; its masks are full afterwards."""
    task.placed(model)

    def alone(name: str, density: float) -> None:
        masks = choose({name: scores[name]}, {name: density}, "local")
        dressed.set_masks(units.spread(masks))

    return measure_curves(list(scores), alone, lambda: task.error(model), levels, run=run)


def width_curves(model: nn.Module, task: Task, dressed: Dressed, widths: Sequence[int], scheme: str = "symmetric",
                 per_channel: bool = True, *, run: Run | None = None) -> Curves:
    """{layer: {bits: held-out error}} of a dressed network without quantizers, under the masks that it wears."""
    task.placed(model)

    def alone(name: str, bits: int) -> None:
        if bits == FLOAT_BITS:
            dressed.coats[name].quantizer = None
        else:
            dressed.quantize({name: Nearest(bits, scheme, per_channel)})

    return measure_curves(list(dressed.coats), alone, lambda: task.error(model), widths, whole=FLOAT_BITS, run=run)


def check_granularity(criterion: str, granularity: str) -> None:
    """ConfigError unless the criterion ranks what is kept to some share."""
    if granularity == "block":
        raise ConfigError(f"granularity = 'block': a block is there or not; curves have {', '.join(ELEMENTS)}")
    find_criterion(criterion, granularity)


def check_levels(level: str, values: Sequence[float]) -> None:
    """ConfigError unless `values` are some densities, or some bits."""
    name, allowed, good = {"density": ("rate", "numbers in (0, 1], the kept shares", lambda d: 0 < d <= 1),
                           "bits": ("bits", "whole numbers in 2..16", lambda b: int(b) == b and 2 <= b <= 16)}[level]
    wrong = [value for value in values if not good(value)]
    if wrong or not values:
        raise ConfigError(f"{name} = {wrong[0] if wrong else 'nothing'}: allowed are {allowed}")


def _check_task(task: Task | None) -> None:
    if task is None:
        raise ConfigError("sensitivity is an error on held-out data: it needs a task, and there is none")


def _whole(value: float, layers: Collection[str] | None) -> PerLayer:
    """A budget that leaves all but `layers` alone."""
    return value if layers is None else {OTHERS: None, **dict.fromkeys(layers, value)}


def _measure(model: nn.Module, task: Task) -> tuple[str, bool]:
    """The name of what the task judges by, and whether it is a percentage."""
    with fixed_order(), torch.no_grad():
        inputs, targets = task.placed_batch(next(iter(task.held_out.epoch(None))))
        metric = task.metric_of(call(model, inputs), targets)
    return ("loss", False) if metric is None else (metric.name, metric.percent and metric.higher_is_better)
