"""Projections against exhaustive search: top-k, equal intervals without a zero, centroids, zero-pinned k-means."""

import itertools

import numpy as np
import pytest
import torch

from methods.core.artifact import Codebook, Levels
from methods.core.errors import ConfigError
from methods.core.fit.cluster import exact_cuts
from methods.core.fit.project import (
    ZERO,
    Clusters,
    Intervals,
    SortedValues,
    closest,
    fit_interval,
    keep_sparse,
    nearest,
    nearest_steps,
    project_sparse,
)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(n, seed):
    return torch.randn(n, generator=seeded(seed))


# --- few non-zeros ------------------------------------------------------------------------------------------


def test_top_k_of_the_specification():
    v = torch.tensor([0.9, -0.4, 0.3, -1.2])
    assert torch.equal(project_sparse(v, 2), torch.tensor([0.9, 0, 0, -1.2]))


@pytest.mark.parametrize("seed", range(4))
def test_top_k_is_the_nearest_point(seed):
    v = normal(7, seed).round(decimals=1)  # with ties
    for count in range(8):
        z = project_sparse(v, count)
        least = min(float((v.double()[list(out)] ** 2).sum()) for out in itertools.combinations(range(7), 7 - count))
        assert float(((z - v).double() ** 2).sum()) == pytest.approx(least, abs=1e-12)
        assert int((z != 0).sum()) <= count and torch.equal(project_sparse(z, count), z)
        assert torch.equal(project_sparse(-2 * v, count), -2 * z)


def test_top_k_stays_in_its_support_and_takes_zeros_there():
    v = torch.tensor([[5.0, 0.0, 1.0], [0.0, -7.0, 2.0]])
    support = torch.tensor([[False, True, True], [True, False, True]])
    assert torch.equal(project_sparse(v, 1, support), torch.tensor([[0.0, 0, 0], [0, 0, 2]]))
    assert keep_sparse(v, 3, support).tolist() == [[False, True, True], [False, False, True]]


# --- equal intervals without a zero -------------------------------------------------------------------------


def test_levels_of_the_specification():
    v = torch.tensor([0.9, -0.4, 0.3, -1.2, 0.74, 0.1])
    assert torch.equal(0.5 * nearest_steps(v, 0.5, 2), torch.tensor([1, -0.5, 0.5, -1, 0.5, 0.5]))
    assert nearest_steps(torch.tensor([0.75, -0.75, 0.0, 99.0, -99.0]), 0.5, 2).tolist() == [2, -2, 1, 2, -2]


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
def test_nearest_level_by_search(bits):
    top, q = 1 << bits - 1, 0.37
    levels = torch.tensor([n * q for n in range(-top, top + 1) if n], dtype=torch.float64)
    v = 1.3 * top * q * normal(500, bits)
    got = q * nearest_steps(v, q, top).double()
    assert torch.isin(got, levels).all() and len(levels) == 2**bits
    assert torch.allclose((v.double() - got).abs(), (v.double()[:, None] - levels).abs().amin(1), atol=1e-12)
    assert torch.equal(nearest_steps(got.float(), q, top).double() * q, got)
    assert torch.equal(nearest_steps(-v, q, top), -nearest_steps(v, q, top))


def error(v, q, top):
    """sum_i min_n (v_i - q n)^2, by trying every level."""
    levels = np.array([q * n for n in range(-top, top + 1) if n])
    return float((np.abs(v.astype(np.float64)[:, None] - levels).min(1) ** 2).sum())


VALUES = {
    "normal": lambda n, s: normal(n, s).numpy(),
    "two humps": lambda n, s: (normal(n, s).sign() * (1 + 0.3 * normal(n, s + 9))).numpy(),
    "long tail": lambda n, s: (normal(n, s) ** 5).numpy(),
    "positive": lambda n, s: normal(n, s).abs().numpy() + 0.2,
}


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("top", [1, 2, 4, 16])
def test_interval_is_the_best_of_a_fine_grid(kind, top):
    for seed, n in ((0, 40), (1, 400)):
        v = VALUES[kind](n, seed)
        high = float(np.abs(v).max()) / top
        grid = np.concatenate([np.linspace(0.002, 1.1, 500), np.geomspace(1e-4, 1, 100)])
        least = min(error(v, q * high, top) for q in grid)
        q = fit_interval(v, top)
        assert error(v, q, top) <= 1.01 * least
        assert fit_interval(8 * v, top) == pytest.approx(8 * q, rel=1e-9)
        assert fit_interval(-v[::-1], top) == pytest.approx(q, rel=1e-9)
        steps = nearest_steps(torch.from_numpy(v.copy()), q, top).double().numpy()
        assert q == pytest.approx(float(v @ steps / (steps @ steps)), rel=1e-5)  # a fixed point of the alternation


@pytest.mark.parametrize("top", [32, 64, 128])
def test_interval_of_many_levels(top):
    """Their error has its minima close together: a coarse search is up to 5 % off."""
    uniform, humps = 2 * torch.rand(700, generator=seeded(3)).numpy() - 1, VALUES["two humps"](700, 1)
    for v in (uniform, humps, VALUES["normal"](700, 0)):
        grid = np.linspace(0.1, 1.1, 400) * float(np.abs(v).max()) / top
        assert error(v, fit_interval(v, top), top) <= 1.01 * min(error(v, q, top) for q in grid)


def test_intervals_of_the_least_floats():
    least = torch.tensor([[1e-45, -1e-45, 0.0]])
    grid = Intervals(least[0], 3)
    assert grid.store(least, least != 9).kept == 3 and grid.interval > 0


def test_interval_of_values_on_levels_and_of_nothing():
    v = 0.25 * np.array([1, -1, 2, 3, -4, 4, 1, 2])
    assert fit_interval(v, 4) == pytest.approx(0.25)
    assert fit_interval(np.array([0.5, -0.5]), 1) == pytest.approx(0.5)
    assert fit_interval(np.zeros(5), 2) > 0 and fit_interval(np.zeros(0), 2) > 0


# --- grids of one layer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Intervals, Clusters])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grid_of_survivors(kind, bits):
    weight = normal(120, bits).reshape(6, 20)
    mask = weight.abs() > 0.7
    grid = kind(weight[mask], bits)
    stored = grid.store(weight, mask)
    decoded = stored.decode()
    assert torch.equal(stored.mask, mask) and stored.bits == bits
    assert torch.equal(decoded[mask], grid.values(weight[mask])) and len(decoded[mask].unique()) <= 2**bits
    assert not stored.grid.has_zero() and isinstance(stored.grid, Levels if kind is Intervals else Codebook)
    values = stored.grid.decode(torch.arange(2**bits, dtype=torch.int32).reshape(1, -1)).double()
    assert torch.allclose((weight[mask].double() - decoded[mask].double()).abs(),
                          (weight[mask].double()[:, None] - values).abs().amin(1), atol=1e-6)
    before = grid.values(weight[mask])
    grid.refit(weight[mask])
    assert torch.allclose(grid.values(weight[mask]), before)
    if kind is Intervals:
        grid.refit(2 * weight[mask])
        assert torch.allclose(grid.values(2 * weight[mask]), 2 * before, rtol=1e-4)


def test_clusters_start_from_their_last_centroids_and_regain_lost_ones():
    grid = Clusters(torch.tensor([1.0, 1.0, 2.0]), 2)
    assert grid.centroids.tolist() == [1.0, 2.0]
    survivors = normal(300, 3)
    grid.refit(survivors)
    assert len(grid.centroids) == 4
    for centroid, code in zip(grid.centroids, range(4), strict=True):
        assert centroid == pytest.approx(float(survivors[grid.codes(survivors) == code].double().mean()), abs=1e-6)
    lower = np.sort(survivors.numpy().astype(np.float64))
    cuts = exact_cuts(lower, np.ones(300), 4)
    least = sum(float(((run - run.mean()) ** 2).sum()) for run in np.split(lower, cuts[1:]))
    assert float((survivors.double() - grid.values(survivors).double()).square().sum()) >= least * (1 - 1e-6)


@pytest.mark.parametrize("fraction", [0.2, 0.3, 1.0])
def test_closest_of_every_level(fraction):
    values = normal(203, 5)
    levels = 0.5 * nearest_steps(values, 0.5, 2).float()
    done = closest(values, levels, fraction)
    for level in (-1.0, -0.5, 0.5, 1.0):
        members = levels == level
        far = (values - level).abs()
        assert int(done[members].sum()) == -(-int(members.sum()) * round(10 * fraction) // 10)  # rounded up
        if fraction < 1:
            assert float(far[members & done].max()) <= float(far[members & ~done].min())
    few = closest(torch.tensor([0.5, 0.5, 0.5, 0.6, 1.0]), torch.tensor([0.5, 0.5, 0.5, 0.5, 1.0]), 0.25)
    assert few.tolist() == [True, True, True, False, True]  # on the level already
    assert closest(torch.zeros(0), torch.zeros(0), 0.3).shape == (0,)


# --- zero-pinned k-means ------------------------------------------------------------------------------------


def distortion(values, points):
    """sum of squared distances to the nearest point, but magnitudes below ZERO go to 0."""
    v = values.double().numpy()
    far = np.abs(v[:, None] - np.asarray(points, np.float64)).min(1)
    return float((np.where((np.abs(v) < ZERO) & np.isin(0.0, points), np.abs(v), far) ** 2).sum())


def best_pinned(values, k):
    """The optimum with 0 and at most k free levels: runs of the sorted values, one of which is 0's."""
    x = np.sort(values.double().numpy())
    least, n = float("inf"), len(x)
    for cuts in itertools.combinations_with_replacement(range(n + 1), k):
        edges = [0, *cuts, n]
        runs = [x[a:b] for a, b in itertools.pairwise(edges)]
        for pinned in range(k + 1):
            least = min(least, sum(float((run**2).sum()) if i == pinned else float(((run - run.mean()) ** 2).sum())
                                   for i, run in enumerate(runs) if len(run)))
    return least


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("k", [1, 2, 3])
def test_pinned_k_means_is_never_better_than_the_optimum(seed, k):
    values = normal(9, seed) * (3 if seed % 2 else 1) + (1.0 if seed % 3 == 0 else 0.0)
    points, loss = SortedValues(values).fit(k, tolerance=0.0)
    assert 0.0 in points and len(points) <= k + 1 and np.all(np.diff(points) > 0)
    assert loss == pytest.approx(distortion(values, points), rel=1e-9, abs=1e-12)
    least = best_pinned(values, k)
    assert least - 1e-9 <= loss <= max(10 * least, 0.8 * float(values.double().square().sum()))


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("bits", [1, 3, 5])
def test_lloyd_by_the_definition(pinned, bits):
    values = torch.cat([normal(400, bits), torch.zeros(50), torch.full((9,), 5e-6)])
    k = 1 << bits
    v = values.double().numpy()
    used = v[np.abs(v) >= ZERO] if pinned else v
    levels = np.sort(np.concatenate([[0.0] if pinned else [], np.linspace(used.min(), used.max(), k)]))
    last = float("inf")
    for iteration in range(8):
        got, loss = SortedValues(values, pinned).fit(k, iterations=iteration, tolerance=0.0)
        assert np.allclose(got, levels, atol=1e-6) and loss <= last + 1e-9
        assert loss == pytest.approx(distortion(values, got), rel=1e-6)
        label, last = np.abs(used[:, None] - levels).argmin(1), loss
        for j in range(len(levels)):
            if (label == j).any() and not (pinned and levels[j] == 0):
                levels[j] = used[label == j].mean()


def test_the_error_falls_by_less_than_the_tolerance_at_the_end():
    values = SortedValues(normal(5000, 1))
    trail = [values.fit(16, iterations=i, tolerance=0.0)[1] for i in range(60)]
    stop = next(i for i in range(1, 60) if (trail[i - 1] - trail[i]) / trail[i] < 1e-3)
    assert values.fit(16)[1] == trail[stop]


def test_few_distinct_values_are_levels():
    values = torch.tensor([0.1, 0.5, 0.6, 0.0, 0.5, 3e-6])
    points, loss = SortedValues(values).fit(4)
    assert np.allclose(points, [0.0, 0.1, 0.5, 0.6]) and loss == pytest.approx(9e-12)
    points, loss = SortedValues(values, pinned=False).fit(8)
    assert len(points) == 5 and loss == 0.0
    assert SortedValues(torch.zeros(7)).fit(2)[0].tolist() == [0.0]
    small = torch.cat([torch.full((100,), 9e-6), torch.tensor([2e-5, 3e-5, 4e-5, 5e-5])])  # what is dropped counts
    points, loss = SortedValues(small).fit(2)
    assert loss == pytest.approx(distortion(small, points), rel=1e-6) and loss > 100 * 9e-6**2
    with pytest.raises(ConfigError, match="at least 1 level"):
        SortedValues(values).fit(0)


def test_empty_clusters_stay():
    values = torch.cat([1 + 0.01 * normal(50, 0), -1 + 0.01 * normal(50, 1)])
    points, _ = SortedValues(values).fit(8)
    assert len(points) == 9  # the middle ones have no members, and none of them is 0
    assert int((points == 0).sum()) == 1


def test_a_start_that_holds_0_loses_no_side():
    values = torch.tensor([-1.0, -0.2, 0.2, 0.3, 1.7, 1.9, 2.0])  # linspace(-1, 2, 4) is -1, 0, 1, 2
    points, loss = SortedValues(values).fit(4)
    assert int((points == 0).sum()) == 1 and loss == pytest.approx(distortion(values, points))


def test_warm_start():
    values = normal(600, 2)
    points, loss = SortedValues(values).fit(8, tolerance=0.0)
    again, same = SortedValues(values).fit(8, start=points[points != 0], iterations=5)
    assert np.allclose(again, points) and same == pytest.approx(loss)
    moved, better = SortedValues(1.1 * values).fit(8, start=points[points != 0], iterations=5)
    assert better <= distortion(1.1 * values, points)


def test_more_levels_fit_better():
    values = SortedValues(normal(4000, 4))
    losses = [values.fit(1 << b)[1] for b in range(1, 9)]
    assert all(a > b for a, b in itertools.pairwise(losses))


@pytest.mark.parametrize("pinned", [True, False])
def test_nearest_point(pinned):
    values = torch.cat([normal(300, 7), torch.tensor([0.0, 9e-6, -9e-6, 1.1e-5, -1.1e-5])]).reshape(5, 61)
    points = SortedValues(values, pinned).fit(8)[0]
    index = nearest(values, points)
    got = torch.from_numpy(points)[index]
    assert index.shape == values.shape
    loss = float((values.double() - got).square().sum())
    assert loss == pytest.approx(distortion(values.reshape(-1), points), rel=1e-6)
    assert torch.equal(nearest(got.float(), points), index)
    if pinned:
        tiny = values.abs() < ZERO
        assert int(tiny.sum()) == 3 and bool((got[tiny] == 0).all())
        close = np.array([-2e-5, -1.2e-5, 0.0, 1.2e-5])
        edge = torch.tensor([9.9e-6, -9.9e-6, 1e-5, -1e-5, 5e-6, -1.7e-5])
        assert nearest(edge, close).tolist() == [2, 2, 3, 1, 2, 0]
    assert torch.equal(nearest(torch.randn(3), np.array([0.0])), torch.zeros(3, dtype=torch.int64))
