"""Width search: channel numbers by search (AutoSlim: Towards One-Shot Architecture Search for Channel Numbers, Yu &
Huang 2019, arXiv 1903.11728), then distillation, then any other method.

A network's parts, made of the best channels of each layer, are judged on held-out data as they are; the best one that
keeps the budget is trained with the whole network as its teacher, and handed to an inner method, which quantizes it.

Algorithm
    rank the channels of each group of coupled layers;  a point = a width for each group (and bits for each layer)
    train all widths together: sandwich rule, in-place distillation           (optional: `slimmable`)
    search: points that keep the budget, counted beforehand;  error of a point = of the best channels of each group,
            weights as they are, batch norm re-estimated                      (`strategies`)
    train the best with distillation;  compress it by the inner method under the rest of the budget

Symbols    width k = the k best channels;  mac_ratio, bop_ratio, size_ratio: each limit at its budget field

Departures  AutoSlim trains one slimmable network, slims it greedily and trains what it found from the beginning. Here
            the slimmable training is optional, what was found goes on from its inherited weights, and three more
            strategies share the space. Channels are ranked once by a criterion, not by their place. Greedy slimming
            gives back what its last step left over. Number of widths, inputs of batch norm and recipes are our choice.
  * Strategies but greedy look only at points where nothing wider fits: less noise of the held-out data is fitted.
  * Activations are not rounded during the search; weights only where their bits are searched.
  * Bytes of a point are not measured but interpolated between files of the inner method, untrained, for the smallest
    and the largest network. A result that is too large narrows the limit, and the search goes on, `RUNS` times at most.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from ..core.artifact import CompressedModel
from ..core.budget import Budget
from ..core.errors import BudgetError, ConfigError
from ..core.fit.norms import reestimate_norms
from ..core.graph.build import NORMS, own_copy
from ..core.graph.graph import trace
from ..core.method import check_call
from ..core.train.finetune import check_trainable, train
from ..core.train.loaders import check_inputs, first_batch
from ..core.train.run import NullRun, Run
from ..core.train.start import ready
from ..core.train.task import First, Task
from .inner import Handing
from .settings import Config, Inner
from .setup import Sizes, check_budget, coded_layers, find_open, make_limits, rank
from .slimmable import check_classes, train_slimmable
from .space import Costs, Limit, Point, Space
from .strategies import STRATEGIES, Effort, Problem

__all__ = ["Config", "Inner", "compress"]

DATA = "train"
RUNS = 6  # of the search and what follows, where files come out too large


def compress(model: nn.Module, task: Task, budget: Budget, config: Config, generator: torch.Generator,
             *, run: Run | None = None) -> CompressedModel:
    """Budget: at least one of mac_ratio, bop_ratio and size_ratio, for the search; density, channel_density and bits as
    the inner method takes them (bits are none of its budget where they are searched). With inner.size_ratio, which
    is of the file, size_ratio counts what is handed on: its weights in float32, or in the budget's bits.

    >>> net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> batch = torch.eye(4), torch.tensor([0, 1, 1, 0])
    >>> small = compress(net, Task.from_loader([batch], [batch]), Budget(mac_ratio=0.5, bits=8),
    ...                  Config(evaluations=3, population=3, recipe=None), torch.Generator().manual_seed(0))
    >>> small.notes["width"]
    {'0': 16}
    """
    check_call(__name__, model, task, budget, config, generator)
    run = NullRun() if run is None else run
    check_budget(budget, config)
    model = own_copy(model).eval()
    graph, coded = trace(model), coded_layers(model, budget)
    channels, groups = find_open(model, graph, coded)
    task = prepared(model, task, config)
    first = task.calibration_inputs(1).cpu()
    check_inputs(model, first)
    order = rank(model, task, groups, config, generator)
    space = Space(graph, channels, groups, order, coded, config.bits, config.multiple, config.levels)
    costs = Costs(space, model, first, config.activation_bits)
    handing = Handing(space, config.inner, task, budget, costs.dense)
    sizes = rehearse(handing, costs, model, config)
    limits = make_limits(budget, costs, sizes)
    if config.slimmable is not None:
        train_slimmable(model, task, space, config.slimmable, generator, run.stage("slimmable"))
    judge = Judge(model, task, space, config, generator, run.stage("search"))
    seed = int(torch.randint(2**31, (), generator=generator))
    for attempt in range(RUNS):
        problem = search(judge, limits, config, seed)
        point = problem.best()
        small = sizes is None or sizes.keep(point, handing.cheaply(judge.network(point).cpu(), point))
        if small:
            found = finish(point, judge, handing, config, generator, run.stage(f"found {attempt}"))
            if sizes is None or sizes.keep(point, found):
                return replace(found, notes={**found.notes, **noted(problem, space, limits)})
        limits = make_limits(budget, costs, sizes)  # narrower than they were
    raise BudgetError(f"size_ratio = {budget.size_ratio:g}: {RUNS} results were larger, the last had "
                      f"{sizes.bytes(point):,.0f} bytes")


def prepared(model: nn.Module, task: Task, config: Config) -> Task:
    """The task with the given network as the teacher, what it lacks or cannot do being refused."""
    if config.criterion == "taylor":
        check_trainable(task)
    if first_batch(task.held_out) is None:
        raise ConfigError("there is nothing to judge networks on: the held-out set holds no batch")
    task = ready(model, task, config)
    if config.slimmable is not None:
        check_classes(model, task)
    model.cpu()
    return task


def rehearse(handing: Handing, costs: Costs, model: nn.Module, config: Config) -> Sizes | None:
    """The smallest network through losses, links and the inner method, so that these refuse it now; and the sizes of
    files, where they are limited."""
    space = handing.space
    smallest = space.network(model, space.smallest)
    ready(smallest, handing.task, config)
    made = handing.cheaply(smallest.cpu(), space.smallest)
    if handing.budget.size_ratio is None or handing.inner.size_ratio is not None:
        return None
    return Sizes(handing, costs, model, made)


class Judge:
    """The error of points: each network is judged once, also if a run is interrupted."""

    def __init__(self, model: nn.Module, task: Task, space: Space, config: Config, generator: torch.Generator,
                 run: Run):
        self.model, self.space, self.config, self.run = model, space, config, run
        self.task = replace(task, held_out=First(task.held_out, examples=config.held_out)) if config.held_out else task
        self.norms = any(isinstance(module, NORMS) for module in model.modules())
        self.inputs = task.training_inputs(config.bn_inputs, generator).to(task.device) if self.norms else None
        saved = run.load()
        self.errors: dict[Point, float] = {} if saved is None else {
            tuple(point): error for point, error in zip(saved["points"], saved["errors"], strict=True)}

    def network(self, point: Point) -> nn.Module:
        """What is judged at `point`, its bits aside; at the largest the network itself, if it was not trained for
        all widths."""
        network = self.task.placed(self.space.network(self.model, point))
        if self.norms and (point != self.space.largest or self.config.slimmable is not None):
            reestimate_norms(network, self.inputs)
        return network

    def __call__(self, point: Point) -> float:
        if point not in self.errors:
            network = self.network(point)
            self.space.round(network, point)
            error = self.task.error(network)
            self.errors[point] = error if error == error else float("inf")  # NaN
            self.run.save({"points": [list(p) for p in self.errors], "errors": list(self.errors.values())})
            self.run.report(len(self.errors), max(len(self.errors), self.config.evaluations), error=error)
        return self.errors[point]


def search(judge: Judge, limits: list[Limit], config: Config, seed: int) -> Problem:
    """A problem that the strategy has looked at."""
    problem = Problem(judge.space.levels, lambda point: max(limit.share(point) for limit in limits), judge)
    effort = Effort(config.evaluations, config.initial, config.population)
    STRATEGIES[config.strategy](problem, effort, np.random.default_rng(seed))
    return problem


def finish(point: Point, judge: Judge, handing: Handing, config: Config, generator: torch.Generator, run: Run
           ) -> CompressedModel:
    """The network at `point`, trained with its teacher, then compressed by the inner method."""
    network = judge.network(point)
    if config.recipe is not None:
        train(network, handing.task, config.recipe, generator, run=run.stage("train"))
    return handing.compress(network.cpu(), point, generator, run.stage("inner"))


def noted(problem: Problem, space: Space, limits: list[Limit]) -> dict[str, object]:
    """What was found, and the evaluations in their order with what they cost, for a reader and for plots."""
    best = problem.best()
    costs = {limit.name: [limit.ratio(point) for point in problem.seen] for limit in limits}
    return {**space.values(best), "error": problem.seen[best], "trace": {
        "points": [list(point) for point in problem.seen], "errors": list(problem.seen.values()), **costs,
        "fits": [problem.fits(point) for point in problem.seen]},
        "choices": {f"{dim.what} {dim.name}": list(dim.choices) for dim in space.dims}}
