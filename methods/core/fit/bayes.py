"""Minimizing an expensive function on a finite set of points: Bayesian optimization and random search.

The Gaussian process and the expected improvement are scikit-optimize's.
"""

import warnings
from collections.abc import Callable

import numpy as np
from scipy.stats import qmc
from sklearn.exceptions import ConvergenceWarning
from skopt.acquisition import gaussian_ei
from skopt.learning import GaussianProcessRegressor
from skopt.learning.gaussian_process.kernels import ConstantKernel, Matern

from ..errors import ConfigError

NOISE = 1e-6  # least variance of the noise, beside a signal of variance 1
Objective = Callable[[int], float]


def fit_process(points: np.ndarray, values: np.ndarray, seed: int) -> GaussianProcessRegressor:
    """A Gaussian process through `values` [n] at `points` [n, d]; its parameters maximize the marginal likelihood.

    k(x, x') = s^2 (1 + sqrt(5) r + 5 r^2 / 3) exp(-sqrt(5) r), r the distance with one length scale per dimension.
    """
    kernel = ConstantKernel(1.0, (1e-2, 1e2)) * Matern(np.full(points.shape[1], 0.5), (5e-2, 1e1), nu=2.5)
    process = GaussianProcessRegressor(kernel, alpha=NOISE, normalize_y=True, noise="gaussian",
                                       n_restarts_optimizer=2, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a length scale at its bound
        return process.fit(points, values)


def spread(points: np.ndarray, count: int, seed: int) -> list[int]:
    """`count` different points near those of a randomly shifted Sobol sequence over the bounding box of `points`."""
    low, high, shift = points.min(0), points.max(0), np.random.default_rng(seed).random(points.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a count that is no power of 2
        unit = (qmc.Sobol(points.shape[1], scramble=False).random(count) + shift) % 1
    wanted = low + (high - low) * unit
    free, chosen = np.ones(len(points), bool), []
    for target in wanted[:len(points)]:
        distance = np.where(free, ((points - target) ** 2).sum(1), np.inf)
        chosen.append(int(distance.argmin()))
        free[chosen[-1]] = False
    return chosen


def bayesian(points: np.ndarray, objective: Objective, evaluations: int, initial: int, seed: int
             ) -> list[tuple[int, float]]:
    """[(index into `points`, objective)] in the order of evaluation: first `initial` spread points, then each time
    the point of greatest expected improvement on the least value so far. No point is evaluated twice.

    The process sees values above their median as the median: a few very bad ones would set its scale, and hide the
    differences between good ones.
    """
    seen = [(i, objective(i)) for i in spread(points, min(initial, evaluations), seed)]
    while len(seen) < min(evaluations, len(points)):
        index, values = (np.array(part) for part in zip(*seen, strict=True))
        values = capped(values)
        gain = gaussian_ei(points, fit_process(points[index], values, seed), values.min(), xi=0.0)
        gain[index] = -np.inf
        best = int(gain.argmax())
        seen.append((best, objective(best)))
    return seen


def capped(values: np.ndarray) -> np.ndarray:
    """`values`, those above the median of the finite ones as that median; all alike where none is finite."""
    finite = values[np.isfinite(values)]
    most = np.median(finite) if len(finite) else 0.0
    return np.where(values < most, values, most)


def at_random(points: np.ndarray, objective: Objective, evaluations: int, initial: int, seed: int
              ) -> list[tuple[int, float]]:
    """As `bayesian`, for points drawn at random without return."""
    order = np.random.default_rng(seed).permutation(len(points))[:evaluations]
    return [(int(i), objective(int(i))) for i in order]


SEARCHES = {"bayes": bayesian, "random": at_random}


def minimize(points: np.ndarray, objective: Objective, evaluations: int, initial: int, seed: int,
             search: str = "bayes") -> tuple[int, list[tuple[int, float]]]:
    """(index of the best point that was evaluated, all evaluations in order).

    points     float [n, d], each dimension scaled to about [0, 1]
    objective  index of a point -> value to minimize; of equal values the earlier evaluation wins
    """
    if search not in SEARCHES:
        raise ConfigError(f"search = {search!r}: allowed are {', '.join(SEARCHES)}")
    if evaluations < 1 or initial < 1 or len(points) == 0:
        raise ConfigError(f"evaluations = {evaluations}, initial = {initial}, {len(points)} points: "
                          "at least 1 of each is needed")
    seen = SEARCHES[search](points, objective, evaluations, initial, seed)
    return min(seen, key=lambda pair: pair[1])[0], seen
