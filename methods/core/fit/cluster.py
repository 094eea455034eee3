"""One-dimensional k-means: Lloyd on sorted values, three starting points, and an exact solver.

Sorted once, a cluster is a run of neighbours: its sum and its squared error are differences of prefix sums, so
an iteration costs k binary searches however many values there are.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ..errors import ConfigError

INITS = ("linear", "density", "random", "exact")
EXACT_CELLS = 1 << 28  # entries of the exact solver's table of cuts (int32): 1 GiB


@dataclass(frozen=True)
class Clusters:
    """centroids float64 [K] ascending; labels int64 [n] into them; wcss after each iteration, start first."""

    centroids: np.ndarray
    labels: np.ndarray
    wcss: list[float]


def kmeans(values: np.ndarray, k: int, init: str = "linear", *, rng: np.random.Generator | None = None,
           start: np.ndarray | None = None, iterations: int = 300) -> Clusters:
    """argmin over centroids c and labels of sum_i (values_i - c_label(i))^2, by Lloyd's iteration.

    values      float [n], finite, n >= 1
    init        linear: k points even in [min, max]; density: k quantiles (i + 1/2)/k; random: k different
                values drawn with `rng` (Forgy); exact: the global optimum by dynamic programming
    start       own starting centroids instead of `init`
    Fewer distinct values than k: they are the centroids, without error. An empty cluster keeps its centroid.
    """
    if init not in INITS:
        raise ConfigError(f"init = {init!r}: allowed are {', '.join(INITS)}")
    values = np.ascontiguousarray(values).reshape(-1)
    if len(values) == 0 or k < 1 or not np.isfinite(values).all():
        raise ConfigError(f"k-means needs finite values and k >= 1 (got {len(values)} values, k = {k})")
    x = np.sort(values)
    sums = PrefixSums(x)
    distinct = x[np.concatenate([[True], x[1:] != x[:-1]])]
    if len(distinct) <= k:
        centroids, wcss = distinct.astype(np.float64), [0.0]
    elif start is None and init == "exact":
        cuts = exact_cuts(distinct, _counts(x, distinct), k)
        centroids = sums.means(np.searchsorted(x, distinct[cuts]), np.zeros(k))
        wcss = [sums.wcss(x, centroids)]
    else:
        first = np.asarray(start, np.float64) if start is not None else _start(x, distinct, k, init, rng)
        centroids, wcss = _lloyd(x, sums, np.sort(first), iterations)
    return Clusters(centroids, assign(values, centroids), wcss)


def assign(values: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """int64 index of the nearest of ascending `centroids`; a tie goes to the upper one."""
    if len(centroids) == 1:
        return np.zeros(len(values), np.int64)
    edges = torch.from_numpy(midpoints(centroids, values.dtype))
    return torch.bucketize(torch.from_numpy(values), edges, right=True).numpy()


def midpoints(centroids: np.ndarray, dtype) -> np.ndarray:
    """Boundaries in the values' type, rounded up: x >= boundary there exactly where x >= midpoint."""
    exact = (centroids[1:] + centroids[:-1]) / 2
    edges = exact.astype(dtype)
    return np.where(edges < exact, np.nextafter(edges, np.array(np.inf, dtype)), edges)


class PrefixSums:
    """Sums of x and x^2 over runs of the sorted values, in float64, centred so that squares do not cancel."""

    def __init__(self, x: np.ndarray):
        self.shift = float(x[len(x) // 2])
        centred = x.astype(np.float64) - self.shift
        self.one = np.concatenate([[0.0], np.cumsum(centred)])
        self.two = np.concatenate([[0.0], np.cumsum(centred * centred)])

    def means(self, starts: np.ndarray, fallback: np.ndarray) -> np.ndarray:
        """Mean of each run [starts_i, starts_{i+1}); `fallback` where it is empty."""
        ends = np.append(starts[1:], len(self.one) - 1)
        count = ends - starts
        total = self.one[ends] - self.one[starts]
        return np.where(count > 0, total / np.maximum(count, 1) + self.shift, fallback)

    def wcss(self, x: np.ndarray, centroids: np.ndarray) -> float:
        starts = run_starts(x, centroids)
        ends = np.append(starts[1:], len(x))
        c = centroids - self.shift
        one, two = self.one[ends] - self.one[starts], self.two[ends] - self.two[starts]
        return float(np.maximum(two - 2 * c * one + c * c * (ends - starts), 0.0).sum())


def run_starts(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """First index in sorted `x` of each centroid's members."""
    return np.concatenate([[0], np.searchsorted(x, midpoints(centroids, x.dtype), side="left")])


def _lloyd(x: np.ndarray, sums: PrefixSums, centroids: np.ndarray, iterations: int):
    wcss = [sums.wcss(x, centroids)]
    for _ in range(iterations):
        better = sums.means(run_starts(x, centroids), centroids)
        if np.array_equal(better, centroids):
            break
        centroids = better
        wcss.append(sums.wcss(x, centroids))
    return centroids, wcss


def _start(x: np.ndarray, distinct: np.ndarray, k: int, init: str, rng: np.random.Generator | None) -> np.ndarray:
    if init == "linear":
        return np.linspace(float(x[0]), float(x[-1]), k)
    if init == "density":
        return x[((np.arange(k) + 0.5) / k * len(x)).astype(np.int64)].astype(np.float64)
    if rng is None:
        raise ConfigError("init = 'random' needs a random generator")
    return rng.choice(distinct, k, replace=False).astype(np.float64)


def _counts(x: np.ndarray, distinct: np.ndarray) -> np.ndarray:
    return np.diff(np.append(np.searchsorted(x, distinct), len(x)))


def check_cells(n: int, k: int) -> None:
    """ConfigError where the exact k-means of n values in k clusters takes more memory than it may."""
    if n * k > EXACT_CELLS:
        raise ConfigError(f"init = 'exact' with {n} distinct values and k = {k} needs too much memory; "
                          f"allowed is up to {EXACT_CELLS // k} values: use init = 'linear'")


def exact_cuts(points: np.ndarray, weights: np.ndarray, k: int) -> np.ndarray:
    """Starts of the k runs of ascending `points` with the least weighted within-run squared error.

    Dynamic programming D_j(i) = min_m D_{j-1}(m) + cost(m, i), each row by divide and conquer (the best m is
    monotone in i), all intervals of one depth at once: O(k n log n).
    """
    n = len(points)
    check_cells(n, k)
    centred = points.astype(np.float64) - points[n // 2]
    w, one, two = (np.concatenate([[0.0], np.cumsum(weights * centred**p)]) for p in (0, 1, 2))

    def cost(m, i):  # squared error of the run [m, i)
        return (two[i] - two[m]) - (one[i] - one[m]) ** 2 / np.maximum(w[i] - w[m], 1.0)

    best = cost(np.zeros(n, np.int64), np.arange(1, n + 1))  # best[i-1]: the first i points in j runs
    cuts = np.zeros((k, n), np.int32)
    for j in range(1, k):
        best, cuts[j] = _dp_row(best, cost, j, n)
    starts, end = [], n
    for j in range(k - 1, -1, -1):
        starts.append(int(cuts[j, end - 1]))
        end = starts[-1]
    return np.array(starts[::-1])


def _dp_row(best: np.ndarray, cost, j: int, n: int):
    """One row of the recurrence: for i in j+1..n the best m in j..i-1, with best[m-1] for the first m points."""
    row, cut = np.zeros(n), np.zeros(n, np.int32)
    low, high = np.array([j + 1]), np.array([n])  # intervals of i still to solve
    m_low, m_high = np.array([j]), np.array([n - 1])
    while len(low):
        mid = (low + high) // 2
        last = np.minimum(m_high, mid - 1)
        sizes = last - m_low + 1
        first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        m = np.arange(sizes.sum()) - np.repeat(first - m_low, sizes)
        total = best[m - 1] + cost(m, np.repeat(mid, sizes))
        least = np.minimum.reduceat(total, first)
        hit = np.flatnonzero(total == np.repeat(least, sizes))
        chosen = m[hit[np.searchsorted(hit, first)]]
        row[mid - 1], cut[mid - 1] = least, chosen
        left, right = low < mid, mid < high
        low, high, m_low, m_high = (np.concatenate(pair) for pair in (
            (low[left], mid[right] + 1), (mid[left] - 1, high[right]),
            (m_low[left], chosen[right]), (chosen[left], m_high[right])))
    return row, cut
