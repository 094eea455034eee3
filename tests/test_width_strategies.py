"""Strategies on spaces small enough to enumerate, with errors that cost nothing."""

import itertools

import numpy as np
import pytest

from methods.width_search.strategies import STRATEGIES, Effort, Problem

LEVELS = (5, 5, 4)  # 100 points
PRICE = np.array([1.0, 2.0, 1.5])


def problem(seed, limit=8.0, levels=LEVELS):
    """Errors that fall with width at rates that differ, with a part that joins neighbours; a price for each level."""
    draw = np.random.default_rng(seed)
    gain, joint = draw.uniform(0.2, 2.0, len(levels)), draw.uniform(0, 0.3)
    price = np.resize(PRICE, len(levels))

    def error(point):
        x = np.array(point)
        return float((gain * np.exp(-0.7 * x)).sum() + joint * np.abs(np.diff(x)).sum() * 0.1)

    return Problem(levels, lambda point: float((price * np.array(point)).sum()) / limit, error)


def enumerated(one):
    points = itertools.product(*map(range, one.levels))
    return min(one.error(point) for point in points if one.share(point) <= 1)


def found(strategy, seed, effort, **space):
    one = problem(seed, **space)
    STRATEGIES[strategy](one, effort, np.random.default_rng(seed))
    return one


SEEDS = range(4)
EFFORT = Effort(evaluations=12, initial=5, population=6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_budget_is_never_exceeded(strategy):
    """Greedy passes through points above it; nothing else looks at one, and none is chosen."""
    for seed in SEEDS:
        one = found(strategy, seed, EFFORT)
        assert one.share(one.best()) <= 1
        assert strategy == "greedy" or all(one.share(point) <= 1 for point in one.seen)
        assert one.seen[one.best()] == min(error for point, error in one.seen.items() if one.share(point) <= 1)


@pytest.mark.parametrize("strategy", ["random", "evolutionary", "bayes"])
def test_no_more_evaluations_than_allowed_and_only_maximal_points(strategy):
    one = found(strategy, 0, EFFORT)
    assert 0 < len(one.seen) <= EFFORT.evaluations
    for point in one.seen:
        higher = [point[:d] + (point[d] + 1,) + point[d + 1:] for d in range(3) if point[d] + 1 < LEVELS[d]]
        assert all(one.share(other) > 1 for other in higher)


@pytest.mark.parametrize("strategy", ["evolutionary", "bayes", "random"])
def test_all_maximal_points_hold_the_optimum(strategy):
    """As many evaluations as there are points: the enumerated optimum."""
    for seed in (0, 1):
        one = found(strategy, seed, Effort(100, 5, 6))
        assert one.seen[one.best()] == pytest.approx(enumerated(one))


def test_greedy_finds_the_optimum_where_each_width_counts_alone():
    """Errors that are sums of convex falling parts, equal prices: the least loss first is the optimum."""
    draw = np.random.default_rng(3)
    for _ in range(10):
        gain = draw.uniform(0.2, 2.0, 3)
        one = Problem(LEVELS, lambda point: sum(point) / 6,
                      lambda point, gain=gain: float((gain * np.exp(-0.7 * np.array(point))).sum()))
        STRATEGIES["greedy"](one, EFFORT, np.random.default_rng(0))
        assert one.seen[one.best()] == pytest.approx(enumerated(one))


def mean_gap(strategy, levels, limit, effort):
    gaps = []
    for seed in range(6):
        one = found(strategy, seed, effort, levels=levels, limit=limit)
        gaps.append(one.seen[one.best()])
    return np.mean(gaps)


@pytest.mark.parametrize("strategy, evaluations", [("evolutionary", 40), ("bayes", 16)])
def test_better_than_random_at_equal_evaluations(strategy, evaluations):
    """Means over seeds on a larger space."""
    space = {"levels": (8,) * 6, "limit": 24.0}
    effort = Effort(evaluations, 8, 10)
    assert mean_gap(strategy, **space, effort=effort) < mean_gap("random", **space, effort=effort)


def test_evolution_comes_close_to_the_optimum_of_a_large_space():
    """Of 262,144 points 150 are looked at."""
    found_, least = [], []
    for seed in range(6):
        one = found("evolutionary", seed, Effort(150, 8, 10), levels=(8,) * 6, limit=24.0)
        draw = np.random.default_rng(seed)
        gain, joint = draw.uniform(0.2, 2.0, 6), draw.uniform(0, 0.3)
        x = np.indices((8,) * 6).reshape(6, -1).T
        fits = x @ np.resize(PRICE, 6) <= 24.0
        errors = np.exp(-0.7 * x) @ gain + 0.1 * joint * np.abs(np.diff(x, axis=1)).sum(1)
        least.append(errors[fits].min())
        found_.append(one.seen[one.best()])
    assert np.mean(least) <= np.mean(found_) <= 1.04 * np.mean(least)


def test_greedy_gives_back_what_is_left_over():
    """One large step too far leaves room for small ones."""
    price = (1.0, 10.0)
    one = Problem((4, 3), lambda point: float(np.dot(price, point)) / 14,
                  lambda point: (3 - point[0]) * 1.0 + (2 - point[1]) * 0.1)
    STRATEGIES["greedy"](one, EFFORT, np.random.default_rng(0))
    assert one.best() == (3, 1)
    again = Problem((4, 3), lambda point: float(np.dot(price, point)) / 14,
                    lambda point: (3 - point[0]) * 0.01 + (2 - point[1]) * 1.0)
    STRATEGIES["greedy"](again, EFFORT, np.random.default_rng(0))
    assert again.best() == (3, 1)  # down to (0, 2), above the limit still, then (0, 1), then up
    steep = Problem((4, 3), lambda point: float(np.dot(price, point)) / 4, again.error)
    STRATEGIES["greedy"](steep, EFFORT, np.random.default_rng(0))
    assert steep.best() == (3, 0) and (3, 0) not in list(steep.seen)[:9]  # not met on the way down to (0, 0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_where_everything_fits_the_largest_is_looked_at_first(strategy):
    one = Problem((3, 2), lambda point: 0.5, lambda point: float(-sum(point)))
    STRATEGIES[strategy](one, EFFORT, np.random.default_rng(0))
    assert list(one.seen) == [(2, 1)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_seed_looks_at_the_same_points(strategy):
    assert list(found(strategy, 2, EFFORT).seen.items()) == list(found(strategy, 2, EFFORT).seen.items())
