"""`Budget.size_ratio` for every method: the knob that the method names is turned until the real file fits.

    compressed = compress_to_size(deep_compression, model, task, Budget(size_ratio=0.025, bits=4),
                                  deep_compression.Config(), torch.Generator().manual_seed(0))

The rule. The limit is size_ratio x 4 bytes x every float of the network, and the file, as `encode` writes it in mode
"best" after `finish`, is never larger.

1. The knob is solved for on a *cheap run* of the method: every recipe of its configuration at 0 epochs, or what its
   `quick(config)` says. A method that does not train is its own cheap run. What `finish` adds is measured once.
2. It is run in full at that value, once.
3. A file of 97 to 100 % of the limit is taken. One that is a little too large loses the weights that take least of
   their layers (trim.py) until it fits, and what they took along is corrected (correction.py): up to `TRIM` where batch
   norm is left, which makes it good, up to `TRIM_FOLDED` where only biases are. That is part of the rule for methods
   that train: another training costs more. `trimmed` in the notes is the share that went. Any other ratio of file to
   cheap file corrects the goal, and the search goes on from 1, up to `RUNS` times; of the files that fit the largest is
   taken.

A knob of whole numbers (bits) takes the largest that fits, however much it leaves. BudgetError, with the smallest size
that was seen, where no value fits. Every run draws from the same seed, so that equal arguments give equal bytes.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..artifact import ActivationQuantizer, CompressedModel
from ..budget import Budget
from ..errors import BudgetError, ConfigError
from ..file.storage import file_bytes
from ..graph.build import float_bytes
from ..graph.graph import Graph
from ..graph.wrapped import check_network
from ..method import check_budget, check_generator
from ..train.loaders import describe
from ..train.run import NullRun, Run
from ..train.task import Task
from .correction import correction_of, has_norms
from .trim import trimmed

USED = 0.97  # of the limit, at least
AIM, CLOSE = 0.995, 0.99  # of the limit, for the cheap run; of that, where the search for it ends
TRIM, TRIM_FOLDED, RUNS = 0.05, 0.01, 4  # see above

Finish = Callable[[CompressedModel], CompressedModel]
Spread = Callable[[float], Mapping[str, float]]


@dataclass(frozen=True)
class Knob:
    """What a method turns to change the size of its file.

    name      a budget field, or "config.FIELD"
    smallest, largest  its values for the smallest and the largest file, both positive; between them it is geometric
    whole     only whole numbers;  step  resolution, as a share of the logarithmic range
    """

    name: str
    smallest: float
    largest: float
    whole: bool = False
    step: float = 2e-4

    def at(self, share: float) -> float:
        """The value at a share in [0, 1] of the way to the largest file; the ends exactly."""
        ends = {0.0: self.smallest, 1.0: self.largest}
        return ends.get(share, self.smallest * (self.largest / self.smallest) ** share)

    def turned(self, budget: Budget, config: Any, value: float, spread: "Spread | None" = None) -> tuple[Budget, Any]:
        budget = replace(budget, size_ratio=None)
        if self.name == "density" and spread is not None:
            return replace(budget, density=spread(value)), config
        if self.name.startswith("config."):
            return budget, replace(config, **{self.name.removeprefix("config."): value})
        return replace(budget, **{self.name: value}), config


def knob_of(method: ModuleType, config: Any) -> Knob | None:
    """`config.size_knob` of a method whose settings choose what it turns, else its SIZE_KNOB, if it has one."""
    return config.size_knob if hasattr(config, "size_knob") else getattr(method, "SIZE_KNOB", None)


def room(ratio: float, dense: int, least: int) -> int:
    """Bytes that budget size_ratio = `ratio` allows to a network of `dense` bytes.

    BudgetError where the file without any code but 0, `least` bytes, leaves none of them to codes.
    """
    limit = int(ratio * dense)
    if least >= limit:
        raise BudgetError(f"budget size_ratio = {ratio:g} allows {limit} bytes, but the file of this network without "
                          f"any weight takes {least}: {enough(least + 1, dense)}")
    return limit


def enough(size: int, dense: int) -> str:
    """What a size_ratio has to be so that `size` bytes of `dense` are allowed, to three digits, rounded up.

    >>> enough(241, 8848), enough(300, 200)
    ('allowed are numbers of 0.0273 or more', 'no size_ratio allows as many')
    """
    if size > dense:
        return "no size_ratio allows as many"
    return f"allowed are numbers of {rounded_up(size / dense)} or more"


def rounded_up(share: float) -> str:
    """A number above 0 with three digits, rounded up: 0.0273 for 0.02724."""
    unit = 10.0 ** (math.floor(math.log10(share)) - 2)
    return f"{math.ceil(share / unit) * unit:.3g}"


def any_ranges(graph: Graph, bits: int) -> dict[str, ActivationQuantizer]:
    """Quantizers for the activations of a network that still wait for theirs: no two are alike, and scales are float32
    numbers, so that their bytes are those of real ones."""
    summed = graph.accumulator_edges()
    edges = [edge for edge in graph.edges() if edge not in summed]
    scales = torch.arange(2.0, 2.0 + len(edges)).sqrt().tolist()
    return {edge: ActivationQuantizer(scale, 37 * i % (1 << bits), bits)
            for i, (edge, scale) in enumerate(zip(edges, scales, strict=True))}


def untrained(config: Any) -> Any:
    """A configuration with every recipe, at any depth, at 0 epochs."""
    if hasattr(config, "epochs"):
        return replace(config, epochs=0)
    if not is_dataclass(config):
        return config
    return replace(config, **{field.name: untrained(getattr(config, field.name)) for field in fields(config)
                              if is_dataclass(getattr(config, field.name))})


def without_renewal(config: Any) -> Any:
    """`untrained`, and batch norm as it is: the `quick` of methods whose `batchnorm` setting renews it."""
    return replace(untrained(config), batchnorm="keep")


def compress_to_size(method: ModuleType, model: nn.Module, task: Task | None, budget: Budget, config: Any,
                     generator: torch.Generator, *, run: Run | None = None,
                     finish: Finish = lambda compressed: compressed, spread: Spread | None = None) -> CompressedModel:
    """`method.compress` under budget.size_ratio (and the other fields that it takes); see the rule above.

    finish  what the caller does to a result before writing it, such as ranges for its activations; what is returned is
            the result before that
    spread  from a density of all weights to those of the layers, such as `global_densities` of the network's; None: the
            same in each
    A method without a knob gets the budget as it is: it honours size_ratio itself, or refuses it. BudgetError where
    the settings of a method leave it none.

    >>> from ... import quantize_then_prune as method
    >>> network, batch = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4)), torch.rand(8, 64)
    >>> task = Task.from_loader([(batch, torch.arange(8) % 4)], [])
    >>> small = compress_to_size(method, network, task, Budget(size_ratio=0.12, bits=4), method.Config(),
    ...                          torch.Generator().manual_seed(0))
    >>> file_bytes(small) <= 0.12 * float_bytes(network), small.notes["size"]["knob"]
    (True, 'density')
    """
    if not hasattr(method, "compress"):
        raise ConfigError(f"method = {describe(method)}: compress_to_size takes the module of a method, such as "
                          "find_method('rptq')")
    check_network(model)
    check_budget(budget, "compress_to_size")
    check_generator(generator, "compress_to_size")
    run, knob = NullRun() if run is None else run, knob_of(method, config)
    if budget.size_ratio is not None and knob is None and hasattr(config, "size_knob"):
        name = method.__name__.rpartition(".")[2]
        raise BudgetError(f"size_ratio = {budget.size_ratio:g}: with these settings {name} has nothing to turn for it; "
                          "leave it out")
    if budget.size_ratio is None or knob is None:
        return method.compress(model, task, budget, config, generator, run=run)
    if getattr(budget, knob.name, None) is not None:
        raise BudgetError(f"size_ratio chooses {knob.name}: give one of the two")
    search = _Search(method, knob, model, task, budget, config, int(torch.randint(2**62, (), generator=generator)), run,
                     spread)
    limit, best, smallest = int(budget.size_ratio * float_bytes(model)), None, math.inf
    correction, seen, aim = 1.0, set(), limit if search.exact else AIM * limit
    first = search.solve(aim)
    if first is not None:
        search.finish(first, finish)
    for _ in range(RUNS):
        value = search.solve(aim / correction)
        if value is None or value in seen:
            break
        seen.add(value)
        found = search.whole_run(value)
        size = trained_size = file_bytes(finish(found))
        less = 0.0
        if limit < size <= (1 + search.most_trimmed(found)) * limit:
            found, size, less = search.trimmed(found, limit, finish)
        smallest = min(smallest, size)
        if size <= limit and (best is None or size > best[0]):
            best = size, found, value, less
        if USED * limit <= size <= limit or size <= limit and value == knob.largest:
            break
        correction = trained_size / search.cheap_bytes(value)
    if best is None:
        raise BudgetError(search.too_small(limit, smallest))
    size, found, value, less = best
    said = {"knob": knob.name, "value": value, "limit": limit, "bytes": size, "cheap_runs": len(search.sizes),
            "whole_runs": len(seen), "trimmed": less}
    return replace(found, notes={**found.notes, "size": said})


class _Search:
    """Cheap and whole runs of a method, each value of the knob once; cheap sizes survive an interruption."""

    def __init__(self, method: ModuleType, knob: Knob, model: nn.Module, task: Task | None, budget: Budget, config: Any,
                 seed: int, run: Run, spread: Spread | None = None):
        self.method, self.knob, self.model, self.task, self.run = method, knob, model, task, run
        self.budget, self.config, self.seed, self.spread = budget, config, seed, spread
        self.quick = getattr(method, "quick", untrained)(config)
        self.exact = self.quick == config
        self.log = run.stage("size")
        saved = self.log.load()
        self.sizes: dict[float, int] = {} if saved is None else saved["sizes"]
        self.kept: dict[float, CompressedModel] = {}
        self.added, self.share = 0, 1.0  # bytes that the caller's `finish` adds, or the share that it leaves

    def _call(self, config: Any, value: float, run: Run) -> CompressedModel:
        budget, config = self.knob.turned(self.budget, config, value, self.spread)
        return self.method.compress(self.model, self.task, budget, config, torch.Generator().manual_seed(self.seed),
                                    run=run)

    def cheap_run(self, value: float) -> CompressedModel:
        if value not in self.kept:
            self.kept = {value: self._call(self.quick, value, NullRun())}  # only the last: models are large
        return self.kept[value]

    def cheap_bytes(self, value: float) -> int:
        if value not in self.sizes:
            self.sizes[value] = file_bytes(self.cheap_run(value))
            self.log.save({"sizes": self.sizes})
        return int(self.share * self.sizes[value]) + self.added

    def finish(self, value: float, finish: Finish) -> None:
        """Look once at what `finish` does to the size: ranges are added, dead units go in proportion to the rest."""
        size, before = file_bytes(finish(self.cheap_run(value))), self.sizes[value]
        self.added, self.share = max(size - before, 0), min(size / before, 1.0)

    def whole_run(self, value: float) -> CompressedModel:
        if self.exact:
            return self.cheap_run(value)
        return self._call(self.config, value, self.run.stage(f"at {self.knob.name} {value:.6g}"))

    def too_small(self, limit: int, smallest: float) -> str:
        """Why no file of `limit` bytes was made; `smallest`: the bytes of the smallest whole run."""
        least = min(map(self.cheap_bytes, self.sizes))
        if least > limit or math.isinf(smallest):  # else whole runs said better
            smallest = min(smallest, least)
        needed = smallest / (1.0 if self.exact else AIM) / float_bytes(self.model)
        return (f"size_ratio = {self.budget.size_ratio:g} is {limit:,} bytes; the smallest file that {self.knob.name} "
                f"reaches is about {smallest:,} bytes: allowed are numbers of about {rounded_up(needed)} or more")

    def most_trimmed(self, found: CompressedModel) -> float:
        """The share of the limit by which a result of a whole run may be too large."""
        return 0.0 if self.exact else TRIM if has_norms(found, self.model) else TRIM_FOLDED

    def trimmed(self, found: CompressedModel, limit: int, finish: Finish) -> tuple[CompressedModel, int, float]:
        correct = correction_of(found, self.model, self.task, self.seed)
        return trimmed(found, limit, 2 * TRIM, finish, correct)

    def solve(self, goal: float) -> float | None:
        """The value with the largest cheap file of at most `goal` bytes; None if there is none."""
        knob = self.knob
        if knob.whole:
            step = 1 if knob.largest > knob.smallest else -1
            values = map(float, range(int(knob.largest), int(knob.smallest) - step, -step))
            return next((value for value in values if self.cheap_bytes(value) <= goal), None)
        if self.cheap_bytes(knob.largest) <= goal:
            return knob.largest
        low, high = self.least(), 1.0
        if self.cheap_bytes(knob.at(low)) > goal:
            return None
        while high - low > knob.step:  # false position between log sizes, kept off the ends
            a, b = (math.log(self.cheap_bytes(knob.at(share)) / goal) for share in (low, high))
            share = low + (high - low) * min(max(a / (a - b), 0.1), 0.9)
            size = self.cheap_bytes(knob.at(share))
            low, high = (share, high) if size <= goal else (low, share)
            if CLOSE * goal <= size <= goal:
                break
        return knob.at(low)

    def least(self) -> float:
        """The first share, in sixteenths, that this network admits: a layer may need a channel."""
        for part in range(16):
            try:
                self.cheap_bytes(self.knob.at(part / 16))
                return part / 16
            except BudgetError:
                continue
        return 1.0
