"""What chance does to a number: standard errors, paired intervals, and verdicts that know them."""

import base64
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.stats import binom, norm
from scipy.stats import t as student
from torch import Tensor

Z95 = 1.959964  # standard normal: 95 % lie within


def standard_error(top1: float, n: int) -> float:
    """Of an accuracy in percent over `n` examples drawn at random (binomial)."""
    share = min(max(top1 / 100, 0.0), 1.0)
    return 100 * math.sqrt(share * (1 - share) / max(n, 1))


def at_chance(top1: float, labels: Tensor) -> bool:
    """Whether an accuracy in percent on these labels (int64 [n]) could be that of always guessing the commonest class.

    One-sided binomial test at 2.5 %.
    """
    guess = float(labels.bincount().max()) / len(labels)
    return bool(binom.sf(round(top1 * len(labels) / 100) - 1, len(labels), guess) > 0.025)


@dataclass(frozen=True)
class Paired:
    """Change of accuracy in points between two networks on the same examples, and its 95 % interval.

    lost, gained  examples that only the first, only the second has right
    """

    change: float
    low: float
    high: float
    lost: int
    gained: int

    @property
    def verdict(self) -> str:
        return "better" if self.low > 0 else "worse" if self.high < 0 else "cannot tell"


def paired(before: Tensor, after: Tensor) -> Paired:
    """`before`, `after`: bool [n], whether each example is right.

    The interval is Agresti and Min's (2005) for matched pairs: half a pair is added to each of the four cells, which
    keeps it honest where few examples changed.
    """
    n = len(before)
    lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
    b, c, m = lost + 0.5, gained + 0.5, n + 2
    middle = (c - b) / m
    spread = Z95 * math.sqrt((b + c) / m - middle**2) / math.sqrt(m)
    return Paired(100 * (gained - lost) / n, 100 * (middle - spread), 100 * (middle + spread), lost, gained)


@dataclass(frozen=True)
class Change:
    """Change of accuracy in points between two networks on the same examples, or the mean of several such pairs.

    middle, within   of its interval: where it lies, and the standard error over examples
    between, seeds   the standard error over pairs, 0 of one, and their number
    """

    change: float
    middle: float
    within: float
    between: float
    seeds: int

    def half(self, alpha: float) -> float:
        """Of the interval that misses with probability alpha: both errors in squares, the one between seeds by
        Student's t, since k seeds say little of their own spread."""
        t = float(student.isf(alpha / 2, self.seeds - 1)) if self.seeds > 1 else 0.0
        return math.hypot(float(norm.isf(alpha / 2)) * self.within, t * self.between)

    def interval(self, alpha: float = 0.05) -> tuple[float, float]:
        half = self.half(alpha)
        return self.middle - half, self.middle + half

    @property
    def p(self) -> float:
        """The alpha whose interval ends at no change."""
        least = 1e-12
        if self.half(least) <= abs(self.middle):
            return least
        return float(brentq(lambda alpha: self.half(alpha) - abs(self.middle), least, 1.0))


def changed(before: Tensor, after: Tensor) -> Change:
    """`before`, `after`: bool [k, n], whether each example is right in each of k pairs (seeds).

    Within: of the mean over seeds of every example's difference, so that what changes from seed to seed averages out;
    half an example better and half a one worse are added, and one without a change, which for one seed is Agresti and
    Min's interval (`paired`). With several seeds the noise of training is in both errors: the interval errs on the wide
    side.
    """
    k, n = before.shape
    apart = after.double() - before.double()
    mean, m = apart.mean(0), n + 2
    middle = float(mean.sum()) / m
    within = math.sqrt(((float(mean.square().sum()) + 1) / m - middle**2) / m)
    _, spread = mean_and_deviation((100 * apart.mean(1)).tolist())
    return Change(100 * float(mean.mean()), 100 * middle, 100 * within, spread / math.sqrt(k), k)


def holm(ps: Sequence[float], alpha: float = 0.05) -> list[bool]:
    """Which of several tests tell something, if all of them together are to be wrong with probability alpha at most,
    however they hang together (Holm 1979): the smallest p is held against alpha / n, the next against alpha / (n - 1)
    ..., up to the first that is too large."""
    told, order = [False] * len(ps), sorted(range(len(ps)), key=lambda i: ps[i])
    for rank, i in enumerate(order):
        if ps[i] > alpha / (len(ps) - rank):
            break
        told[i] = True
    return told


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (over n - 1)."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0


def over_seeds(found: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """(change, low, high) of the mean over seeds, given those of each: errors within and between them add in squares,
    the one between them by Student's t, since k seeds say little of their own spread. Within is that of one seed, which
    is too wide: what changes from seed to seed is in it, too (`changed` has the answers, and knows)."""
    k = len(found)
    if k == 1:
        return found[0]
    change, spread = mean_and_deviation([change for change, _, _ in found])
    within = math.fsum(((high - low) / 2) ** 2 for _, low, high in found) / k
    half = math.hypot(math.sqrt(within), t_of(k) * spread / math.sqrt(k))
    return change, change - half, change + half


def t_of(seeds: int) -> float:
    """95 % of Student's t lie within, where a deviation was taken from so many seeds; 0 for one, which has none."""
    return float(student.ppf(0.975, seeds - 1)) if seeds > 1 else 0.0


def pack(right: Tensor) -> str:
    """A bool [n] as text for a row."""
    return base64.b85encode(zlib.compress(np.packbits(right.cpu().numpy()).tobytes(), 9)).decode()


def unpack(text: str, n: int) -> Tensor:
    """The inverse of `pack`, for the length it had."""
    packed = np.frombuffer(zlib.decompress(base64.b85decode(text)), np.uint8)
    return torch.from_numpy(np.unpackbits(packed, count=n).astype(bool))
