"""What chance does to a number: standard errors, paired intervals, and verdicts that know them."""

import base64
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import binom
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


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (over n - 1)."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0


def over_seeds(found: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """(change, low, high) of the mean over seeds, given those of each: errors within and between them add in squares,
    the one between them by Student's t, since k seeds say little of their own spread. Test inputs are the same for all:
    more seeds do not make the error within smaller."""
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
