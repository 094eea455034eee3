"""The knob c: by the bytes of the file, or by agreement with the float network. Both are monotone but for noise."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..core.artifact import CompressedModel
from ..core.errors import BudgetError, CompressError
from ..core.fit.rates import round_to_rate
from ..core.fit.size import enough, room
from ..core.train.run import Run

LEAST, AIM = 0.97, 0.99  # share of the bytes that is used
PASSES = 16
START = 0.05  # c where nothing is known
CLOSE, NEAR, RISE = 1.15, 0.8, 1.5  # of the search for an agreement: ends of a bracket, share of the points, power


@dataclass(frozen=True)
class Trial:
    """A compressed network at `c` and the bytes of its file."""

    c: float
    compressed: CompressedModel
    bytes: int


class Quantizes(Protocol):
    """What a search turns the knob of."""

    weights: Mapping[str, Tensor]
    coarsest: float
    finest: float

    def steps(self, c: float) -> Mapping[str, float]:
        """{layer: step}."""

    def least_bytes(self) -> int:
        """Bytes of the file in which every code is 0."""

    def trial(self, c: float) -> Trial:
        """The network at `c`."""


class Bracket:
    """Trials on both sides of `limit` bytes, and the c to look at next: log bytes is taken as linear in log c.

    above  the one of largest c that is too large;  below  the one of smallest c beyond it that is not
    best   the largest file that fits
    """

    def __init__(self, quantizer: Quantizes, slope: float, limit: int):
        self.quantizer, self.slope, self.limit = quantizer, slope, limit
        self.above: Trial | None = None
        self.below: Trial | None = None
        self.best: Trial | None = None
        self.misses = 0  # trials in a row on one side

    def add(self, trial: Trial) -> None:
        fits = trial.bytes <= self.limit
        if fits and (self.best is None or trial.bytes > self.best.bytes):
            self.best = trial
        if not fits and (self.above is None or trial.c > self.above.c):
            self.above = trial
            self.below = None if self.below is None or self.below.c <= trial.c else self.below
        elif fits and (self.above is None or trial.c > self.above.c):
            self.below = trial if self.below is None or trial.c < self.below.c else self.below
        self.misses = self.misses + 1 if self.above is None or self.below is None else 0

    def next(self) -> float:
        """c that should give AIM of the limit."""
        above, below, aim = self.above, self.below, AIM * self.limit
        if above is not None and below is not None:
            share = math.log(above.bytes / aim) / math.log(above.bytes / below.bytes)
            return above.c * (below.c / above.c) ** min(max(share, 0.1), 0.9)
        known = above if below is None else below
        factor = (aim / known.bytes) ** (1.5 ** (self.misses - 1) / self.slope)
        return min(max(known.c * min(max(factor, 1 / 8), 8), self.quantizer.finest), self.quantizer.coarsest)

    def done(self) -> bool:
        """Nothing better is to be found: enough bytes are used, the codes cannot be finer, or no c lies between."""
        if self.best is None:
            return False
        fits = (self.best,) if self.below is None else (self.best, self.below)  # the best may be as large and coarser
        finest = any(trial.c <= self.quantizer.finest for trial in fits)
        between = self.above is None or self.below is None or self.below.c > self.above.c * (1 + 1e-6)
        return self.best.bytes >= LEAST * self.limit or finest or not between


def search_size(quantizer: Quantizes, ratio: float, dense: int, run: Run) -> Trial:
    """The trial whose file takes 97 to 100 % of `ratio` of `dense` bytes; the finest one where that is smaller.

    BudgetError, before anything long, where the file without any code but 0 takes all of them.
    """
    least = quantizer.least_bytes()
    limit = room(ratio, dense, least)
    c, slope = guess(quantizer, AIM * limit - least)
    seen = Bracket(quantizer, slope, limit)
    for step in range(1, PASSES + 1):
        trial = quantizer.trial(c)
        run.report(step, PASSES, c=c, bytes=float(trial.bytes))
        seen.add(trial)
        if seen.done():
            break
        before, c = c, seen.next()
        if c == before:  # an end of the range
            break
    if seen.best is None:
        smallest = seen.above.bytes
        raise BudgetError(f"budget size_ratio = {ratio:g} allows {limit} bytes, but the smallest file of {step} "
                          f"passes takes {smallest}: {enough(smallest, dense)}")
    return seen.best


def guess(quantizer: Quantizes, aim: float) -> tuple[float, float]:
    """(c, slope of log bytes over log c there) at which the codes of plain rounding have an entropy of `aim` bytes."""
    weights, finest, coarsest = quantizer.weights, quantizer.finest, quantizer.coarsest

    def codes(c: float) -> float:
        steps = quantizer.steps(c)
        return sum(round_to_rate(w / steps[name], rounds=0)[1] for name, w in weights.items()) / 8

    low, high = math.log(finest), math.log(coarsest)
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if codes(math.exp(middle)) > aim else (low, middle)
    c = math.exp((low + high) / 2)
    slope = math.log(max(codes(1.1 * c), 1.0) / max(codes(c), 1.0)) / math.log(1.1)
    return c, min(slope, -0.3)


def search_agreement(quantizer: Quantizes, agreement: Callable[[Trial], float], points: float, run: Run) -> Trial:
    """The trial of largest c found whose agreement is 100 - `points` per cent or more.

    The part that changes is taken to grow as c^RISE from one trial to the next, inside the bracket that is known.
    """
    good: Trial | None = None
    bad, c = math.inf, min(max(START, quantizer.finest), quantizer.coarsest)
    for step in range(1, PASSES + 1):
        trial = quantizer.trial(c)
        changed = 100 - agreement(trial)
        run.report(step, PASSES, c=c, bytes=float(trial.bytes), changed=changed)
        if changed <= points:
            good = trial if good is None or c > good.c else good
        else:
            bad = min(bad, c)
        least = quantizer.finest if good is None else good.c
        near = good is trial and changed >= NEAR * points
        if near or bad <= CLOSE * least or (good is trial and c >= quantizer.coarsest) or bad <= quantizer.finest:
            break
        c = min(c * min(max((AIM * points / max(changed, 1e-9)) ** (1 / RISE), 1 / 4), 4), quantizer.coarsest)
        inside = min(max(c, least * CLOSE**0.5), bad / CLOSE**0.5) if bad < math.inf else c
        c = max(inside, quantizer.finest)
    if good is None:
        raise CompressError(f"all of {step} passes, down to c = {bad:.3g}, change the class of more than {points} per "
                            "cent of the inputs: allowed are more points")
    return good
