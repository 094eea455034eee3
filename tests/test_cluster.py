"""1-D k-means against Fig. 3 of Deep Compression, exhaustive search and another exact solver."""

import itertools
from fractions import Fraction

import kmeans1d
import numpy as np
import pytest

from methods.core.errors import ConfigError
from methods.core.fit.cluster import assign, exact_cuts, kmeans

FIG3 = np.array([[2.09, -0.98, 1.48, 0.09], [0.05, -0.14, -1.08, 2.12], [-0.91, 1.92, 0, -1.03], [1.87, 0, 1.53, 1.49]])
INDEX = np.array([[3, 0, 2, 1], [1, 1, 0, 3], [0, 3, 1, 0], [3, 1, 2, 2]])
STARTS = ("linear", "density", "random")


def squared_error(values, centroids, labels):
    return float(((values.astype(np.float64) - centroids[labels]) ** 2).sum())


def best_partition(values, k):
    """Least within-cluster squared error over every assignment of the values to k clusters."""
    best = float("inf")
    for labels in itertools.product(range(k), repeat=len(values)):
        labels = np.array(labels)
        best = min(best, sum(((values[labels == j] - values[labels == j].mean()) ** 2).sum()
                             for j in set(labels.tolist())))
    return best


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_figure_3(dtype):
    found = kmeans(FIG3.astype(dtype), 4, "linear")
    assert np.allclose(found.centroids, [-1.0, 0.0, 1.5, 2.0], atol=1e-6)
    assert np.array_equal(found.labels.reshape(4, 4), INDEX)


def test_linear_start_is_even_between_the_extremes():
    found = kmeans(FIG3, 4, "linear", iterations=0)
    assert np.allclose(found.centroids, [-1.08, -0.08 / 6, 1.12 - 0.4 / 6, 2.12])
    assert found.centroids[0] == FIG3.min() and found.centroids[-1] == FIG3.max()


def test_density_start_takes_equal_steps_of_the_distribution():
    values = np.random.default_rng(0).permutation(np.arange(100.0) ** 2)
    found = kmeans(values, 5, "density", iterations=0)
    assert found.centroids.tolist() == [10.0**2, 30.0**2, 50.0**2, 70.0**2, 90.0**2]


def test_random_start_draws_different_values_with_the_given_generator():
    values = np.random.default_rng(0).normal(size=200)
    runs = [kmeans(values, 7, "random", rng=np.random.default_rng(seed), iterations=0) for seed in (1, 1, 2)]
    assert np.array_equal(runs[0].centroids, runs[1].centroids)
    assert not np.array_equal(runs[0].centroids, runs[2].centroids)
    assert np.isin(runs[0].centroids, values).all()
    most = kmeans(np.repeat(np.arange(20.0), 9), 19, "random", rng=np.random.default_rng(0), iterations=0)
    assert len(np.unique(most.centroids)) == 19
    with pytest.raises(ConfigError, match="random generator"):
        kmeans(values, 7, "random")


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("seed", range(4))
def test_error_falls_and_everyone_sits_on_the_nearest_centroid(init, seed):
    rng = np.random.default_rng(seed)
    values = rng.standard_t(2, size=3000).astype(np.float32)
    found = kmeans(values, 15, init, rng=rng)
    assert len(found.wcss) > 2 and (np.diff(found.wcss) <= 1e-9 * found.wcss[0]).all()
    distance = np.abs(values.astype(np.float64)[:, None] - found.centroids[None])
    mine = np.take_along_axis(distance, found.labels[:, None], 1)[:, 0]
    assert (mine <= distance.min(1) + 1e-12).all()
    assert found.wcss[-1] == pytest.approx(squared_error(values, found.centroids, found.labels), rel=1e-9)
    for j, centroid in enumerate(found.centroids):  # converged: every used centroid is the mean of its members
        members = values[found.labels == j].astype(np.float64)
        assert len(members) == 0 or centroid == pytest.approx(members.mean(), abs=1e-9)


def test_nearest_in_exact_arithmetic_beside_a_midpoint_that_float32_cannot_hold():
    below = np.float32(1.0)
    above = np.nextafter(below, np.float32(2))
    middle = (float(below) + float(above)) / 2
    values = np.array([below, above], np.float32)
    for shift in (-1e-12, 0.0, 1e-12):
        centroids = np.array([middle - 0.25 + shift, middle + 0.25 + shift])
        gaps = [[abs(Fraction(float(v)) - Fraction(float(c))) for c in centroids] for v in values]
        wanted = [1 if gap[1] <= gap[0] else 0 for gap in gaps]  # a tie goes up
        assert assign(values, centroids).tolist() == wanted == [0, 1]


def test_a_tie_goes_to_the_upper_centroid():
    assert assign(np.array([-1.0, 0.0, 1.0]), np.array([-1.0, 1.0])).tolist() == [0, 1, 1]


@pytest.mark.parametrize("seed", range(12))
def test_exact_is_the_best_of_all_partitions(seed):
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(4, 8)), int(rng.integers(2, 4))
    values = rng.integers(-6, 7, n).astype(np.float64) if seed % 2 else rng.normal(size=n)
    if len(np.unique(values)) <= k:
        values = np.arange(n) ** 1.5
    found = kmeans(values, k, "exact")
    assert squared_error(values, found.centroids, found.labels) == pytest.approx(best_partition(values, k), abs=1e-9)
    assert found.wcss == pytest.approx([best_partition(values, k)], abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_exact_equals_kmeans1d(seed):
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(30, 400)), int(rng.integers(2, 20))
    values = rng.laplace(size=n)
    if seed % 2:
        values = np.round(values, 1)  # many duplicates
    found, other = kmeans(values, k, "exact"), kmeans1d.cluster(values, k)
    reference = squared_error(values, np.array(other.centroids), np.array(other.clusters))
    assert squared_error(values, found.centroids, found.labels) == pytest.approx(reference, rel=1e-9, abs=1e-12)
    for init in STARTS:
        lloyd = kmeans(values, k, init, rng=rng)
        assert squared_error(values, lloyd.centroids, lloyd.labels) >= reference * (1 - 1e-9)


def test_exact_weighs_duplicates():
    points, weights = np.array([0.0, 1.0, 3.0]), np.array([1, 100, 1])
    assert exact_cuts(points, weights, 2).tolist() == [0, 2]
    assert exact_cuts(points, np.array([1, 1, 100]), 2).tolist() == [0, 2]
    assert exact_cuts(points, np.array([100, 1, 1]), 2).tolist() == [0, 2]
    assert exact_cuts(np.array([0.0, 1.0, 1.9]), np.array([1, 1, 100]), 2).tolist() == [0, 2]
    assert exact_cuts(np.array([0.0, 1.0, 1.9]), np.array([100, 1, 1]), 2).tolist() == [0, 1]


@pytest.mark.parametrize("init", [*STARTS, "exact"])
@pytest.mark.parametrize("values", [[3.5], [2.0] * 9, [1.0, -1.0, 1.0], [0.0, 1e-30, -1e-30, 1.0]],
                         ids=["single", "constant", "two values", "tiny differences"])
def test_fewer_distinct_values_than_clusters_is_lossless(values, init):
    values = np.array(values, np.float32)
    found = kmeans(values, 4, init, rng=np.random.default_rng(0))
    assert np.array_equal(found.centroids[found.labels].astype(np.float32), values)
    assert len(found.centroids) == len(np.unique(values)) and found.wcss == [0.0]


@pytest.mark.parametrize("init", [*STARTS, "exact"])
def test_one_cluster_is_the_mean(init):
    values = np.random.default_rng(0).normal(5, 1, 500)
    found = kmeans(values, 1, init, rng=np.random.default_rng(0))
    assert found.centroids == pytest.approx([values.mean()]) and not found.labels.any()


def test_an_empty_cluster_keeps_its_centroid():
    values = np.array([0.0, 0.1, 9.9, 10.0, 10.1])
    found = kmeans(values, 3, start=np.array([0.0, 5.0, 10.0]))
    assert found.centroids == pytest.approx([0.05, 5.0, 10.0]) and found.labels.tolist() == [0, 0, 2, 2, 2]


def test_far_from_zero_nothing_cancels():
    values = 1e6 + np.random.default_rng(0).normal(size=1000)
    near, far = kmeans(values - 1e6, 8, "linear"), kmeans(values, 8, "linear")
    assert np.allclose(far.centroids - 1e6, near.centroids, atol=1e-6)


@pytest.mark.parametrize("values", [[1.0, float("nan")], [float("inf"), 0.0], []])
def test_values_that_cannot_be_clustered_are_refused(values):
    with pytest.raises(ConfigError, match="finite"):
        kmeans(np.array(values), 2)


def test_arguments_outside_what_is_allowed_are_refused():
    with pytest.raises(ConfigError, match="linear, density, random, exact"):
        kmeans(np.arange(4.0), 2, "kmeans++")
    with pytest.raises(ConfigError, match="k = 0"):
        kmeans(np.arange(4.0), 0)
    with pytest.raises(ConfigError, match="memory"):
        exact_cuts(np.arange(1 << 20, dtype=np.float64), np.ones(1 << 20), 1 << 9)


def test_a_million_values_and_256_clusters():
    values = np.random.default_rng(0).normal(0, 0.02, 1_000_000).astype(np.float32)
    found = kmeans(values, 256, "linear", iterations=50)
    assert len(found.centroids) == 256 and (np.diff(found.centroids) > 0).all()
    assert found.wcss[-1] < 1e-3 * values.astype(np.float64).var() * len(values)
    some = np.random.default_rng(1).integers(0, len(values), 500)
    distance = np.abs(values[some].astype(np.float64)[:, None] - found.centroids)
    assert np.array_equal(distance.argmin(1), found.labels[some])
