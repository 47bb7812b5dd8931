"""The exhaustive reference: every combination, tried. For tests and for menus of a few thousand combinations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from flyweight.errors import FlyweightError, UsageError
from flyweight.search.problem import Problem, Solution, check_limits, evaluate, excesses

__all__ = ["brute", "brute_frontier"]

MOST_COMBINATIONS = 2_000_000


def brute(
    problem: Problem, limits: Mapping[str, float], minimise: str = "error", error_limit: float | None = None
) -> Solution:
    """The best combination inside the limits, or the one of least largest relative excess (ties: least error).

    Raises UsageError if all combinations are forbidden, FlyweightError if there are more than two million.
    """
    bounds = check_limits(problem, limits, error_limit)
    best: tuple[tuple[float, ...], tuple[int, ...]] | None = None
    for choices, error, costs in _allowed(problem):
        worst = max(excesses(problem, choices, bounds).values(), default=0.0)
        goal = error if minimise == "error" or worst > 0 else costs[minimise]
        rank = ((worst, goal, error), choices)
        best = rank if best is None or rank < best else best
    if best is None:
        raise UsageError("every combination of options is forbidden")
    (worst, goal, _), choices = best
    error, costs = evaluate(problem, choices)
    over = excesses(problem, choices, bounds)
    binding = ", ".join(sorted(name for name, value in over.items() if value == worst)) if worst > 0 else ""
    return Solution(choices, error, costs, worst if worst > 0 else goal, 0.0, worst == 0, binding, worst)


def brute_frontier(problem: Problem, cost: str) -> list[tuple[float, float]]:
    """The true Pareto set as (cost, error) pairs, by rising cost and strictly falling error."""
    points = sorted((costs[cost], error) for _, error, costs in _allowed(problem))
    frontier: list[tuple[float, float]] = []
    for point in points:
        if not frontier or point[1] < frontier[-1][1]:
            frontier.append(point)
    return frontier


def _allowed(problem: Problem) -> Iterator[tuple[tuple[int, ...], float, dict[str, float]]]:
    if np.prod([float(size) for size in problem.sizes]) > MOST_COMBINATIONS:
        raise FlyweightError(f"more than {MOST_COMBINATIONS} combinations are not tried one by one")
    for choices in itertools.product(*(range(size) for size in problem.sizes)):
        error, costs = evaluate(problem, choices)
        if error < np.inf:
            yield choices, error, costs
