"""The frontier: for a falling ceiling on one cost, the least error that fits, and nothing dominated."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

from flyweight.search.knapsack import optimum, relative_gap
from flyweight.search.problem import Problem, Solution, check_limits, evaluate, slack

__all__ = ["frontier"]


def frontier(
    problem: Problem,
    cost: str,
    *,
    points: int = 25,
    limits: Mapping[str, float] | None = None,
    time_limit_s: float = 60.0,
) -> tuple[Solution, ...]:
    """At most `points` non-dominated choices by rising cost; the least cost and the least error are always among them.

    Each has the least error at its own cost; its `bound` is about that error (if the time ran out, its gap says so).
    The ceilings are even steps between the ends; a step that would find the same choice again is spent elsewhere.
    `limits` hold at every point; () if they cannot be met.
    """
    bounds = check_limits(problem, {cost: math.inf, **(limits or {})}, None)
    sweep = _Sweep(problem, cost, time.monotonic() + time_limit_s, 2 * max(points, 2))
    cheapest = optimum(problem, cost, bounds, deadline=sweep.deadline(0))
    if cheapest.choices is None:
        return ()
    least = evaluate(problem, cheapest.choices)[1][cost]
    low = sweep.point({**bounds, cost: least}, cheapest.choices, 1)
    found = [low, sweep.point(bounds, low.choices, 2)]
    for number in range(2, points):
        last, bottom = found[-1].costs[cost], low.costs[cost]
        # below the last point's own cost, or the same point would come back
        ceiling = min(last - (last - bottom) / (points - number + 1), last - 4 * slack(last))
        if ceiling <= bottom + slack(bottom):
            break
        found.append(sweep.point({**bounds, cost: ceiling}, low.choices, 2 * number))
    return _undominated(found, cost)


@dataclass(frozen=True)
class _Sweep:
    problem: Problem
    cost: str
    end: float  # a reading of time.monotonic
    solves: int

    def deadline(self, solved: int) -> float:
        """What is left of the time is shared evenly by the solves that are left."""
        now = time.monotonic()
        return now + max(self.end - now, 0.0) / max(self.solves - solved, 1)

    def point(self, bounds: Mapping[str, float], known: tuple[int, ...], solved: int) -> Solution:
        """The least error within `bounds`, and among those of that error the least cost. `known` holds the bounds."""
        least = optimum(self.problem, "error", bounds, deadline=self.deadline(solved), known=[known])
        choices = least.choices or known
        error = evaluate(self.problem, choices)[0]
        within = {**bounds, "error": error}
        cheapest = optimum(self.problem, self.cost, within, deadline=self.deadline(solved + 1), known=[choices])
        choices = cheapest.choices or choices
        error, costs = evaluate(self.problem, choices)
        bound = min(least.bound, error)
        return Solution(choices, error, costs, bound, relative_gap(error, bound), feasible=True)


def _undominated(found: list[Solution], cost: str) -> tuple[Solution, ...]:
    kept: list[Solution] = []
    for solution in sorted(found, key=lambda s: (s.costs[cost], s.error, s.choices)):
        if not kept or solution.error < kept[-1].error:
            kept.append(solution)
    return tuple(kept)
