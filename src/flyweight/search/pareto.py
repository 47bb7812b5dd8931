"""The frontier: for a falling ceiling on one cost, the least error that fits, and nothing dominated."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flyweight.search.knapsack import optimum, relative_gap
from flyweight.search.problem import Problem, Solution, check_limits, evaluate, slack

__all__ = ["Line", "frontier"]


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
    The widest hole in the cost is split first, so that fewer points, when the time is short, still cover the range; a
    small frontier comes whole. `limits` hold at every point; () if they cannot be met.
    """
    bounds = check_limits(problem, {cost: math.inf, **(limits or {})}, None)
    sweep = _Sweep(problem, cost, time.monotonic() + time_limit_s)
    cheapest = optimum(problem, cost, bounds, deadline=sweep.deadline())
    if cheapest.choices is None:
        return ()
    least = evaluate(problem, cheapest.choices)[1][cost]
    low = sweep.point({**bounds, cost: least}, cheapest.choices)
    high = sweep.point(bounds, low.choices)
    between = _between(sweep, bounds, low, high, points - 2)
    return _undominated([low, high, *between], cost)


class Line:
    """The frontier of several problems together at `points` ceilings on one cost, from the least cost to that of the least
    error, each the same share above the one before. A point is solved when it is looked at: who bisects pays for a few.

    A point is (number of the problem, Solution). Costs rise along them and errors fall, neither strictly. `limits` are those of
    each problem; there are no points where none can meet its own. `time_limit_s` is that of a point.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        cost: str,
        *,
        points: int,
        limits: Sequence[Mapping[str, float]],
        time_limit_s: float = 10.0,
    ) -> None:
        self._cost, self._time_limit_s = cost, time_limit_s
        self._parts: list[tuple[int, Problem, Mapping[str, float], Solution]] = []  # with the cheapest of each
        tops: list[tuple[int, Solution]] = []
        for which, (problem, own) in enumerate(zip(problems, limits, strict=True)):
            if ends := frontier(problem, cost, points=2, limits=own, time_limit_s=2 * time_limit_s):
                self._parts.append((which, problem, check_limits(problem, {cost: math.inf, **own}, None), ends[0]))
                tops.append((which, ends[-1]))
        self._known: dict[int, tuple[int, Solution]] = {}
        self._low, self._high, self._count = 0.0, 0.0, 0
        if tops:
            top = min(tops, key=self._rank)
            self._low, self._high = min(part[-1].costs[cost] for part in self._parts), top[1].costs[cost]
            self._count = points if self._high > self._low + 2 * slack(self._high) else 1
            self._known[self._count - 1] = top

    def __len__(self) -> int:
        return self._count

    def at(self, i: int) -> tuple[int, Solution]:
        """Point i of len(self)."""
        if i not in self._known:
            share = i / (self._count - 1)
            even = self._low + (self._high - self._low) * share  # of costs that have no shares
            self._known[i] = self._solved(self._low * (self._high / self._low) ** share if self._low > 0 else even)
        return self._known[i]

    def _solved(self, ceiling: float) -> tuple[int, Solution]:
        found = []
        for which, problem, bounds, least in self._parts:
            if least.costs[self._cost] <= ceiling + slack(ceiling):
                sweep = _Sweep(problem, self._cost, time.monotonic() + self._time_limit_s)
                within = {**bounds, self._cost: min(ceiling, bounds.get(self._cost, math.inf))}
                found.append((which, sweep.point(within, least.choices)))
        return min(found, key=self._rank)

    def _rank(self, item: tuple[int, Solution]) -> tuple[float, float, int]:
        which, solution = item
        return solution.error, solution.costs[self._cost], which


@dataclass(frozen=True)
class _Sweep:
    problem: Problem
    cost: str
    end: float  # a reading of time.monotonic

    def left(self) -> float:
        return self.end - time.monotonic()

    def deadline(self) -> float:
        """One hard solve may take a third of what is left, so that others get their turn."""
        return time.monotonic() + max(self.left(), 0.0) / 3

    def point(self, bounds: Mapping[str, float], known: tuple[int, ...]) -> Solution:
        """The least error within `bounds`, and among those of that error the least cost. `known` holds the bounds."""
        least = optimum(self.problem, "error", bounds, deadline=self.deadline(), known=[known])
        choices = least.choices or known
        error = evaluate(self.problem, choices)[0]
        within = {**bounds, "error": error}
        cheapest = optimum(self.problem, self.cost, within, deadline=self.deadline(), known=[choices])
        choices = cheapest.choices or choices
        error, costs = evaluate(self.problem, choices)
        bound = min(least.bound, error)
        return Solution(choices, error, costs, bound, relative_gap(error, bound), feasible=True)


def _between(sweep: _Sweep, bounds: Mapping[str, float], low: Solution, high: Solution, wanted: int) -> list[Solution]:
    """Up to `wanted` points between the ends.

    A hole (floor, top, bare) says: `top` is a known point's cost, any ceiling up to `floor` gives a known point, and
    `bare` that nothing new was found in the lower half, so that the next ceiling is just below the top.
    """
    cost = sweep.cost
    found: list[Solution] = []
    step = 4 * slack(max(abs(low.costs[cost]), abs(high.costs[cost])))  # costs nearer than that are one cost
    holes = [(low.costs[cost], high.costs[cost], False)]
    while holes and len(found) < wanted and sweep.left() > 0:
        floor, top, bare = holes.pop(holes.index(max(holes, key=lambda hole: hole[1] - hole[0])))
        if top - floor <= 2 * step:
            continue
        ceiling = top - step if bare else (floor + top) / 2
        point = sweep.point({**bounds, cost: ceiling}, low.choices)
        reached = point.costs[cost]
        if reached <= floor + step:
            holes.append((ceiling, top, True))
        else:
            found.append(point)
            holes += [(floor, reached, False), (ceiling, top, False)]
    return found


def _undominated(found: list[Solution], cost: str) -> tuple[Solution, ...]:
    kept: list[Solution] = []
    for solution in sorted(found, key=lambda s: (s.costs[cost], s.error, s.choices)):
        if not kept or solution.error < kept[-1].error:
            kept.append(solution)
    return tuple(kept)
