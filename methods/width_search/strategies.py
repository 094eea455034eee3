"""How a space of points is searched for the least error under a limit.

    random        points drawn at random
    greedy        from the largest point, each time one level lower where the error is least, until the limit is kept;
                  then one higher, where it is least, as long as the limit allows (Yu & Huang 2019)
    evolutionary  a child of the best of some, crossed and mutated, replaces the oldest (Real et al. 2019)
    bayes         the point of greatest expected improvement of a Gaussian process, among drawn ones (core/fit/bayes)

All but greedy, which passes through, look only at points that keep the limit and are maximal: one level more anywhere
would break it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ..core.fit.bayes import bayesian
from .space import Point

TRIES = 50  # for a point that was not looked at yet
SAMPLE = 4  # of the population, among which the best is a parent
CROSSED = 0.5  # share of children with two parents
POOL = 500  # points among which Bayesian optimization chooses


@dataclass
class Problem:
    """levels: number of them in each dimension;  share(point): of the limit, above 1 breaks it;  error: to minimise.

    seen  {point: error} in the order of evaluation
    """

    levels: Point
    share: Callable[[Point], float]
    error: Callable[[Point], float]
    seen: dict[Point, float] = field(default_factory=dict)

    def fits(self, point: Point) -> bool:
        return self.share(point) <= 1

    def look(self, point: Point) -> float:
        if point not in self.seen:
            self.seen[point] = self.error(point)
        return self.seen[point]

    def best(self) -> Point:
        """Of those seen that keep the limit; of equal ones the cheapest, then the first."""
        return min((point for point in self.seen if self.fits(point)),
                   key=lambda point: (self.seen[point], self.share(point)))

    def moved(self, point: Point, by: int) -> list[Point]:
        """The points one level lower (-1) or higher (1) in one dimension."""
        return [point[:d] + (level + by,) + point[d + 1:] for d, level in enumerate(point)
                if 0 <= level + by < self.levels[d]]

    def draw(self, rng: np.random.Generator) -> Point:
        """A maximal point, from one drawn uniformly."""
        return self.repaired(tuple(int(level) for level in rng.integers(0, self.levels)), rng)

    def repaired(self, point: Point, rng: np.random.Generator) -> Point:
        """Lowered at random until it keeps the limit, then raised at random as far as that allows."""
        while not self.fits(point):
            lower = self.moved(point, -1)
            point = lower[rng.integers(len(lower))]
        open_dims = list(range(len(point)))
        while open_dims:  # what does not fit now will not when others are wider
            d = open_dims[rng.integers(len(open_dims))]
            higher = point[:d] + (point[d] + 1,) + point[d + 1:]
            if point[d] + 1 < self.levels[d] and self.fits(higher):
                point = higher
            else:
                open_dims.remove(d)
        return point

    def fresh(self, make: Callable[[], Point]) -> Point | None:
        """What `make` makes that was not seen yet; None after many tries."""
        return next((point for point in (make() for _ in range(TRIES)) if point not in self.seen), None)


@dataclass(frozen=True)
class Effort:
    """evaluations in all, the first `initial` of bayes spread out; population of the evolution."""

    evaluations: int
    initial: int
    population: int


def random_search(problem: Problem, effort: Effort, rng: np.random.Generator) -> None:
    while len(problem.seen) < effort.evaluations:
        point = problem.fresh(lambda: problem.draw(rng))
        if point is None:
            return
        problem.look(point)


def greedy(problem: Problem, effort: Effort, rng: np.random.Generator) -> None:
    point = tuple(count - 1 for count in problem.levels)
    problem.look(point)
    while not problem.fits(point):
        point = min(problem.moved(point, -1), key=lambda other: (problem.look(other), problem.share(other)))
    while higher := [other for other in problem.moved(point, 1) if problem.fits(other)]:
        point = min(higher, key=problem.look)


def evolutionary(problem: Problem, effort: Effort, rng: np.random.Generator) -> None:
    random_search(problem, Effort(min(effort.population, effort.evaluations), 0, 0), rng)
    alive = list(problem.seen)

    def parent() -> Point:
        chosen = rng.choice(len(alive), min(SAMPLE, len(alive)), replace=False)
        return min((alive[i] for i in chosen), key=problem.look)

    def child() -> Point:
        one = parent()
        other = parent() if rng.random() < CROSSED else one
        mixed = [a if rng.random() < 0.5 else b for a, b in zip(one, other, strict=True)]
        place = int(rng.integers(len(mixed)))
        mixed[place] = int(rng.integers(problem.levels[place]))
        return problem.repaired(tuple(mixed), rng)

    while len(problem.seen) < effort.evaluations:
        point = problem.fresh(child)
        point = problem.fresh(lambda: problem.draw(rng)) if point is None else point
        if point is None:
            return
        problem.look(point)
        alive = [*alive[1:], point] if len(alive) >= effort.population else [*alive, point]


def bayes(problem: Problem, effort: Effort, rng: np.random.Generator) -> None:
    pool = sorted({problem.draw(rng) for _ in range(POOL)})
    points = np.array(pool, dtype=float) / np.maximum(np.array(problem.levels) - 1, 1)
    bayesian(points, lambda i: problem.look(pool[i]), effort.evaluations, effort.initial, int(rng.integers(2**31)))


STRATEGIES: dict[str, Callable[[Problem, Effort, np.random.Generator], None]] = {
    "random": random_search, "greedy": greedy, "evolutionary": evolutionary, "bayes": bayes}
