"""Nearest points of the sets that compressed weights live in: few non-zeros, equal intervals, a codebook with a 0."""

import numpy as np
import torch
from torch import Tensor

from ..artifact import Codebook, CompressedTensor, Levels
from ..errors import ConfigError
from .cluster import PrefixSums, assign, kmeans, midpoints, run_starts
from .prune import keep_count, keep_largest
from .quantize import EPS

ZERO = 1e-5  # magnitudes below it are 0 for the zero-pinned k-means


def keep_sparse(values: Tensor, count: int, support: Tensor | None = None) -> Tensor:
    """Bool mask of exactly `count` values, the largest in magnitude (inside the mask `support`, if there is one)."""
    size = values.detach().abs()
    return keep_largest(size if support is None else size.masked_fill(~support, -1.0), count)


def project_sparse(values: Tensor, count: int, support: Tensor | None = None) -> Tensor:
    """argmin_z |z - values|^2 such that z has at most `count` non-zeros (and none outside the mask `support`)."""
    return values.detach() * keep_sparse(values, count, support)


# --- equal intervals without a zero ------------------------------------------------------------------------


def nearest_steps(values: Tensor, interval: float, top: int) -> Tensor:
    """int64 n in {-top..-1, 1..top} with interval * n nearest to each value; of two the larger in magnitude, 0 up."""
    steps = torch.floor(values.detach().double().abs() / interval + 0.5).clamp(1, top).long()
    return torch.where(values >= 0, steps, -steps)


def fit_interval(values: np.ndarray, top: int) -> float:
    """argmin_q sum_i min_n (values_i - q n)^2 over n in {-top..-1, 1..top}: the interval of equally spaced levels.

    The error has many local minima: a grid over (0, 1.1 max|v| / top], then from the best points the alternation
    n = nearest level, q = <v, n> / <n, n>, which never raises it. Minima are q / top apart: so is the grid.
    """
    size = np.sort(np.abs(np.asarray(values, np.float64)).reshape(-1))
    if len(size) == 0 or size[-1] == 0:
        return EPS  # nothing to fit: any positive interval
    sums = np.concatenate([[0.0], np.cumsum(size)])
    coarse = size[-1] / top * 1.1 * np.geomspace(1e-3, 1.0, min(max(256, 16 * top), 4096))
    errors = np.array([_error(coarse_q, *_moments(size, sums, coarse_q, top)) for coarse_q in coarse])
    best = (float("inf"), 0.0)
    for q in coarse[np.argsort(errors, kind="stable")[:8]]:
        for _ in range(100):
            across, square = _moments(size, sums, q, top)
            better = across / square
            if abs(better - q) <= 1e-12 * q:
                break
            q = better
        best = min(best, (_error(q, *_moments(size, sums, q, top)), float(q)))
    return best[1]


def _moments(size: np.ndarray, sums: np.ndarray, q: float, top: int) -> tuple[float, float]:
    """<v, n> and <n, n> for the nearest levels n of sorted magnitudes with running `sums` (0 first)."""
    edges = np.concatenate([[0], np.searchsorted(size, (np.arange(1, top) + 0.5) * q), [len(size)]])
    steps = np.arange(1, top + 1)
    return float(steps @ (sums[edges[1:]] - sums[edges[:-1]])), float((steps**2) @ np.diff(edges))


def _error(q: float, across: float, square: float) -> float:
    """sum (v - q n)^2 - sum v^2."""
    return q * q * square - 2 * q * across


# --- the values of one layer's survivors ---------------------------------------------------------------------


class Intervals:
    """q {-M/2..-1, 1..M/2} for the survivors of one layer."""

    def __init__(self, survivors: Tensor, bits: int):
        self.bits, self.top = bits, 1 << bits - 1
        self.refit(survivors)

    def refit(self, survivors: Tensor) -> None:
        fitted = np.float32(fit_interval(survivors.numpy(), self.top))
        self.interval = float(max(fitted, np.finfo(np.float32).tiny))

    def codes(self, survivors: Tensor) -> Tensor:
        steps = nearest_steps(survivors, self.interval, self.top)
        return steps + self.top - (steps > 0).long()

    def grid(self) -> Levels:
        steps = torch.arange(-self.top, self.top + 1, dtype=torch.int32)
        return Levels(torch.tensor(self.interval), steps[steps != 0])

    def values(self, survivors: Tensor) -> Tensor:
        return self.grid().decode(self.codes(survivors))

    def store(self, weight: Tensor, mask: Tensor) -> CompressedTensor:
        """`weight` on the grid under `mask`."""
        mask = mask.cpu()
        codes = torch.zeros(weight.shape, dtype=torch.int64)
        codes[mask] = self.codes(weight.detach().cpu()[mask])
        return CompressedTensor.of(codes, self.grid(), self.bits, mask)


class Clusters(Intervals):
    """2^bits free centroids for the survivors of one layer (as many as there are values, if those are fewer)."""

    def refit(self, survivors: Tensor) -> None:
        before = getattr(self, "centroids", np.zeros(0))
        start = before if len(before) == 1 << self.bits else None
        self.centroids = kmeans(survivors.numpy(), 1 << self.bits, start=start).centroids

    def codes(self, survivors: Tensor) -> Tensor:
        return torch.from_numpy(assign(survivors.numpy(), self.centroids))

    def grid(self) -> Codebook:
        return Codebook(torch.from_numpy(self.centroids.astype(np.float32)))


def closest(values: Tensor, levels: Tensor, fraction: float) -> Tensor:
    """Bool mask of the `fraction` (rounded up) of each level's members that are closest to it, and of all upon it."""
    distance = (values.double() - levels.double()).abs().numpy()
    _, group, sizes = np.unique(levels.numpy(), return_inverse=True, return_counts=True)
    order = np.lexsort((distance, group))
    place = np.arange(len(group)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # of each member in its level
    allowed = np.array([keep_count(int(size), fraction) for size in sizes], np.int64)
    done = distance == 0
    done[order[place < np.repeat(allowed, sizes)]] = True
    return torch.from_numpy(done)


# --- shared values, 0 among them ---------------------------------------------------------------------------


class SortedValues:
    """Values of one tensor, sorted once for k-means of any size.

    pinned  0 is one more level, free and fixed: it attracts values, and magnitudes below ZERO are 0 from the start
    """

    def __init__(self, values: Tensor, pinned: bool = True):
        flat = values.detach().reshape(-1).cpu().numpy()
        self.pinned = pinned
        self.x = np.sort(flat[np.abs(flat) >= ZERO] if pinned else flat)
        self.dropped = float(np.square(flat[np.abs(flat) < ZERO].astype(np.float64)).sum()) if pinned else 0.0
        self.sums = PrefixSums(self.x) if len(self.x) else None
        self.distinct = self.x[np.concatenate([[True], self.x[1:] != self.x[:-1]])] if len(self.x) else self.x

    def fit(self, k: int, *, start: np.ndarray | None = None, iterations: int = 100, tolerance: float = 1e-3
            ) -> tuple[np.ndarray, float]:
        """Levels (float64, ascending, at most k beside the pinned 0) and sum_i min_c (v_i - c)^2, by Lloyd's iteration.

        It starts at k points even in [min, max] (or at `start`, without the 0) and ends when the error falls by less
        than `tolerance` of itself. At most k distinct values: they are the levels. An empty level stays where it is.
        """
        zero = [0.0] if self.pinned else []
        if k < 1:
            raise ConfigError(f"k = {k}: a codebook needs at least 1 level")
        if len(self.distinct) <= k:
            return np.unique(np.concatenate([zero, self.distinct.astype(np.float64)])), self.dropped
        free = np.linspace(float(self.x[0]), float(self.x[-1]), k) if start is None else np.asarray(start, np.float64)
        levels = np.sort(np.concatenate([zero, free]))
        fixed = np.searchsorted(levels, 0.0) if self.pinned else None
        error = self.sums.wcss(self.x, levels)
        for _ in range(iterations):
            levels = self._means(levels, fixed)
            before, error = error, self.sums.wcss(self.x, levels)
            if before - error <= tolerance * error:
                break
        return np.unique(levels), error + self.dropped

    def _means(self, levels: np.ndarray, fixed: int | None) -> np.ndarray:
        """Each level replaced by the mean of its members, but for the pinned 0."""
        better = self.sums.means(run_starts(self.x, levels), levels)
        if fixed is not None:
            better[fixed] = 0.0
        return better


def boundaries(points: np.ndarray) -> Tensor:
    """float32 [len(points) - 1] between ascending `points`: at a boundary the upper point begins.

    They lie half-way, but with 0 among the points all magnitudes below ZERO belong to it.
    """
    edges = midpoints(np.asarray(points, np.float64), np.float32)
    zero = np.flatnonzero(points == 0)
    if len(zero):
        edges[:zero[0]] = np.minimum(edges[:zero[0]], np.nextafter(np.float32(-ZERO), np.float32(0)))
        edges[zero[-1]:] = np.maximum(edges[zero[-1]:], np.float32(ZERO))
    return torch.from_numpy(edges)


def nearest(values: Tensor, points: np.ndarray) -> Tensor:
    """int64 index of the nearest of ascending `points`; a tie goes up."""
    return torch.bucketize(values.detach().contiguous(), boundaries(points).to(values.device), right=True)
