"""What a search is made of: groups of channels in their order, and limits; all that can be refused first."""

import copy

import torch
from torch import Tensor, nn

from ..core.artifact import CompressedModel
from ..core.budget import FLOAT_BITS, Budget
from ..core.errors import BudgetError, CompressError
from ..core.file.storage import file_bytes
from ..core.graph.coupled import Group, find_groups
from ..core.graph.graph import Graph
from ..core.graph.narrow import Channels
from ..core.graph.weights import weight_layers
from ..core.train.task import Task
from ..pipeline.dressed import Dressed
from ..pipeline.scores import Units, look, make_scores
from .inner import Handing
from .settings import OWN, Config
from .space import Costs, Limit, Point

LIMITS = ("mac_ratio", "bop_ratio", "size_ratio")
HANDED_ON = ("density", "channel_density", "bits")


def check_budget(budget: Budget, config: Config) -> None:
    """BudgetError for fields that have no place, or none of the limits."""
    budget.require(OWN, optional=(*LIMITS, *HANDED_ON))
    if all(getattr(budget, name) is None for name in LIMITS):
        raise BudgetError(f"{OWN} needs the budget field {' or '.join(map(repr, LIMITS))}")
    if config.bits and budget.bits is not None:
        raise BudgetError(f"config.bits = {list(config.bits)} are searched: leave out the budget field 'bits'")
    if budget.bop_ratio is not None and budget.bits is None and not config.bits:
        raise BudgetError("bop_ratio counts the bits of weights: give the budget field 'bits', or config.bits, to "
                          "search them")


def coded_layers(model: nn.Module, budget: Budget) -> dict[str, int]:
    """{layer: bits of the budget, 32 where it says none} of the layers that it does not leave alone."""
    layers = weight_layers(model)
    if budget.bits is not None:
        return {name: int(b) for name, b in budget.per_layer("bits", layers).items()}
    field = "density" if budget.density is not None else "channel_density"
    return dict.fromkeys(budget.per_layer(field, layers), FLOAT_BITS)


def find_open(model: nn.Module, graph: Graph, coded: dict[str, int]) -> tuple[Channels, dict[str, Group]]:
    """The channels of a network, and its groups that may be narrowed; CompressError where there are none."""
    channels = Channels(graph)
    groups = {", ".join(group.members): group for group in find_groups(graph)}
    alone = [name for name in weight_layers(model) if name not in coded]
    found = open_groups(channels, groups, set(alone))
    if groups and not found:
        raise BudgetError(f"every width of the network is one of {', '.join(alone)}, or read there: {OWN} needs "
                          "another one, it cannot leave all of these alone")
    if not found:
        raise CompressError(f"{graph.why_opaque()}the network has no layer of which channels could go: they are its "
                            "outputs, or are read by an operation that needs them all")
    return channels, found


def open_groups(channels: Channels, groups: dict[str, Group], alone: set[str]) -> dict[str, Group]:
    """The groups of which no layer in `alone` has channels, or reads any."""
    taken = {int(one) for name in alone for part in (channels.rows, channels.columns) for one in part.get(name, ())}
    return {name: group for name, group in groups.items()
            if not any(taken & set(channels.rows[layer].tolist()) for layer in group.members)}


def rank(model: nn.Module, task: Task, groups: dict[str, Group], config: Config, generator: torch.Generator
         ) -> dict[str, Tensor]:
    """{group: its sets of channels, best first}; equal ones in their order."""
    model = copy.deepcopy(model)
    dressed = Dressed(model, [name for group in groups.values() for name in group.members])
    units = Units(list(dressed.coats), groups)
    seen = make_scores(config.criterion, "channel", dressed, units.layers, {}, 0.0, generator)
    if not seen.ready():
        look(model, task, config.score_batches, generator, seen)
    scores = units.gather(seen.now())
    return {name: score.argsort(descending=True, stable=True) for name, score in scores.items()}


class Sizes:
    """Bytes of files, between those of the smallest network (`made` of it) and the largest, without training.

    correction  by which results were larger than that
    """

    def __init__(self, handing: Handing, costs: Costs, model: nn.Module, made: CompressedModel):
        space, self.handing = handing.space, handing
        self.costs, self.correction = costs, 1.0
        self.most = handing.budget.size_ratio * costs.dense
        least, most = map(self.stored, (made, handing.cheaply(space.network(model, space.largest), space.largest)))
        few, many = (costs.code_bytes(point) for point in (space.smallest, space.largest))
        self.slope = (most - least) / (many - few)
        self.start = least - self.slope * few

    def stored(self, made: CompressedModel) -> int:
        """Bytes of the file of a result, with ranges."""
        return file_bytes(self.handing.ranged(made))

    def bytes(self, point: Point) -> float:
        return self.correction * (self.start + self.slope * self.costs.code_bytes(point))

    def ratio(self, point: Point) -> float:
        return self.bytes(point) / self.costs.dense

    def keep(self, point: Point, made: CompressedModel) -> bool:
        """Whether what was made of `point` keeps the limit; if not, what was too large is expected from now on."""
        size = self.stored(made)
        if size > self.most:
            self.correction *= size / self.bytes(point)
        return size <= self.most


def make_limits(budget: Budget, costs: Costs, sizes: Sizes | None) -> list[Limit]:
    """Those of the budget; BudgetError where the smallest network is above one."""
    ratios = {"mac_ratio": costs.mac_ratio, "bop_ratio": costs.bop_ratio,
              "size_ratio": costs.code_ratio if sizes is None else sizes.ratio}
    limits = [Limit(name, getattr(budget, name), ratio) for name, ratio in ratios.items()
              if getattr(budget, name) is not None]
    for limit in limits:
        limit.check(costs.space.smallest)
    return limits
