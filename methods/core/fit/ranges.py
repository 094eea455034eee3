"""Range calibration of activations: which part of what was seen a quantizer should cover.

Five rules, as in NVIDIA's pytorch-quantization and torch.ao: the extremes, their moving average, a percentile, and
the clipping point that loses least information (KL divergence, as in TensorRT) or has the least squared error. The
last three look at a histogram of |x|: what lies beyond the clipping point saturates.
"""

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError

BINS = 2048
START = 128  # the least bins that KL and MSE keep
PERCENTILE = 99.99
EXACT = 1 << 24  # whole numbers that float32 can count: histc counts in the type of what it looks at
MOMENTUM = 0.01  # of the moving average: torch.ao's default


class MinMax:
    """Running extremes: nothing seen is clipped; one outlier widens the range."""

    def __init__(self, bits: int):
        self.low, self.high = float("inf"), float("-inf")

    def update(self, x: Tensor) -> None:
        low, high = (float(end) for end in torch.aminmax(x))
        # Unlike Python's min, np.minimum keeps a NaN once seen, so that the caller can tell.
        self.low, self.high = float(np.minimum(self.low, low)), float(np.maximum(self.high, high))

    def range(self) -> tuple[float, float]:
        return self.low, self.high


class MovingAverage:
    """m <- m + 0.01 (m_batch - m) for both extremes, from those of the first batch; depends on the order."""

    def __init__(self, bits: int):
        self.ends: tuple[float, float] | None = None

    def update(self, x: Tensor) -> None:
        low, high = (float(end) for end in torch.aminmax(x))
        before = (low, high) if self.ends is None else self.ends
        self.ends = tuple(m + MOMENTUM * (new - m) for m, new in zip(before, (low, high), strict=True))

    def range(self) -> tuple[float, float]:
        return (float("inf"), float("-inf")) if self.ends is None else self.ends


class Histogram(MinMax):
    """Counts of |x| in 2048 bins over [0, reach], where reach doubles until everything seen fits."""

    def __init__(self, bits: int):
        super().__init__(bits)
        self.bits, self.reach, self.counts = bits, 0.0, np.zeros(BINS)

    def update(self, x: Tensor) -> None:
        super().update(x)
        size = x.detach().abs().reshape(-1).float()
        peak = float(size.max())
        if not np.isfinite(peak):
            return
        if self.reach == 0.0:
            self.reach = peak
        while peak > self.reach > 0.0:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2)])
            self.reach *= 2
        if self.reach > 0.0:
            for part in size.cpu().split(EXACT):
                self.counts += torch.histc(part, BINS, 0.0, self.reach).double().numpy()

    def levels(self) -> int:
        """Steps between 0 and the clipping point: one bit goes to the sign where there is one."""
        return (1 << self.bits) if self.low >= 0 else (1 << self.bits - 1)

    def range(self) -> tuple[float, float]:
        if self.reach == 0.0:
            return self.low, self.high
        clip = self.kept(self.counts, self.levels()) * self.reach / BINS
        return max(self.low, -clip), min(self.high, clip)

    def kept(self, counts: np.ndarray, levels: int) -> float:
        """How many bins from 0 the range covers."""
        raise ConfigError(f"{type(self).__name__} has no rule for a clipping point")


class Percentile(Histogram):
    """The least edge with 99.99 % of |x| below it."""

    def kept(self, counts, levels):
        share = np.cumsum(counts) / counts.sum()
        return int(np.searchsorted(share, PERCENTILE / 100)) + 1


class KullbackLeibler(Histogram):
    """The last i that minimises KL(P || Q): P is the first i bins with all that lies beyond in the last one, Q the
    first i bins without it, merged into `levels` groups and spread evenly over each group's non-empty bins."""

    def kept(self, counts, levels):
        counts = counts.copy()
        counts[0] = counts[1]  # a spike at 0 (after a ReLU) is exact at any scale
        losses = [divergence(counts, i, levels) for i in range(START, BINS + 1)]
        return BINS - int(np.argmin(losses[::-1]))


def divergence(counts: np.ndarray, i: int, levels: int) -> float:
    """KL(P || Q) in nats of keeping the first `i` bins; infinite where Q is 0 and P is not."""
    p = counts[:i].copy()
    if not p.any():
        return float("inf")
    filled = p > 0
    group = np.minimum(np.arange(i) * levels // i, levels - 1)
    mass = np.bincount(group, counts[:i], levels)
    spread = np.bincount(group, filled, levels)
    q = np.where(filled, mass[group] / np.maximum(spread[group], 1), 0.0)
    p[-1] += counts[i:].sum()
    if p[-1] > 0 and q[-1] == 0:
        return float("inf")
    p, q = p / p.sum(), q / q.sum()
    used = p > 0
    return float((p[used] * np.log(p[used] / q[used])).sum())


class SquaredError(Histogram):
    """The bin centre, as the largest code, with the least sum of count (x - Q(x))^2 over the bin centres."""

    def kept(self, counts, levels):
        centres = np.arange(BINS) + 0.5
        losses = []
        for clip in centres[START:]:
            scale = clip / (levels - 1)
            near = np.round(np.minimum(centres / scale, levels - 1)) * scale
            losses.append(float((counts * (centres - near) ** 2).sum()))
        return float(centres[START + int(np.argmin(losses))])


OBSERVERS = {"minmax": MinMax, "moving_average": MovingAverage, "percentile": Percentile, "kl": KullbackLeibler,
             "mse": SquaredError}


def find_observer(name: str) -> type:
    """The observer of a range method; ConfigError listing the names if there is none."""
    if name not in OBSERVERS:
        raise ConfigError(f"range method {name!r}: allowed are {', '.join(OBSERVERS)}")
    return OBSERVERS[name]
