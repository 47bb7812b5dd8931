"""The best choice under the limits, exactly; and the nearest one where the limits cannot be met.

Every candidate is judged by `evaluate`, never by the solver's own arithmetic: a candidate that passes a limit by less
than HiGHS can see is cut off and the program is solved again. Deterministic as long as the time limit is not reached.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from flyweight.errors import BudgetError, ResourceError, UsageError
from flyweight.search.descend import Score, start
from flyweight.search.mip import Answer, program, run
from flyweight.search.problem import (
    Factor,
    Floats,
    Problem,
    Solution,
    check_limits,
    cost_names,
    evaluate,
    excess_unit,
    excesses,
    slack,
)
from flyweight.search.relaxed import Relaxed, priced, relax, unpriced
from flyweight.search.terms import Terms, gather, grounded, magnitude, prune

__all__ = ["Found", "minimum", "optimum", "relative_gap", "solve"]

MOST_CUTS = 30  # near-ties at a limit that are cut off one by one before the limit itself is tightened
SURE = 1e-8  # of a limit: what is further beyond it in floating point is beyond it exactly
ROUNDING = 1e-12  # of the sum of all entries: what adding them in another order can change, with room


@dataclass(frozen=True)
class Found:
    """The best known choice (None: none holds the limits, or none was found in time) and a proven lower bound."""

    choices: tuple[int, ...] | None
    bound: float


def solve(
    problem: Problem,
    limits: Mapping[str, float],
    *,
    minimise: str = "error",
    error_limit: float | None = None,
    time_limit_s: float = 30.0,
    gap: float = 0.0,
) -> Solution:
    """The choice of least error (or of the cost `minimise`, then of least error) with every cost within its limit.

    If none exists: the nearest point, which passes its limits by the least largest share of them; the limits that need
    not be passed are held if possible, and then the error is least. `gap` > 0 stops at that relative distance from the
    proven bound. Raises BudgetError for an unknown cost name, UsageError if every combination is forbidden,
    ResourceError if no allowed combination is found in time.
    """
    bounds = check_limits(problem, limits, error_limit)
    if minimise != "error" and minimise not in cost_names(problem):
        raise BudgetError(f"no cost is called {minimise!r}", fix=f"known costs: {', '.join(cost_names(problem))}")
    deadline = time.monotonic() + time_limit_s
    found = optimum(problem, minimise, bounds, deadline=deadline, gap=gap)
    choices = found.choices
    if choices is None:
        choices, least_excess = _nearest(problem, bounds, found, deadline)
        # judged again: a first search that ran out of time may have missed a choice that holds every limit
        if not _holds(problem, choices, bounds):
            return _infeasible(problem, bounds, choices, least_excess)
    elif minimise != "error":
        within = {**bounds, minimise: _value(problem, minimise, choices)}
        choices = optimum(problem, "error", within, deadline=deadline, gap=gap, known=[choices]).choices or choices
    error, costs = evaluate(problem, choices)
    value = _value(problem, minimise, choices)
    bound = min(found.bound, value)
    return Solution(choices, error, costs, bound, relative_gap(value, bound), feasible=True)


def minimum(problem: Problem, cost: str, *, time_limit_s: float = 30.0) -> float:
    """The smallest reachable value of a cost (or of "error") with no limits. Raises as `solve` does."""
    solution = solve(problem, {}, minimise=cost, time_limit_s=time_limit_s)
    return solution.error if cost == "error" else solution.costs[cost]


def optimum(
    problem: Problem,
    goal: str,
    bounds: Mapping[str, float],
    *,
    deadline: float,
    gap: float = 0.0,
    known: Iterable[tuple[int, ...]] = (),
) -> Found:
    """The choice of least `goal` ("error" or a cost) within `bounds` ("error" may be among them), and its bound.

    `known` are choices worth starting from. `deadline` is a reading of `time.monotonic`. A bound of +inf: no choice
    holds the bounds, proven.
    """
    names = (goal, *(name for name in bounds if name != goal))
    terms = gather(problem, names)
    limits = np.array([bounds.get(name, np.inf) for name in names])
    ceilings, rounding = np.array([limit + slack(limit) for limit in limits]), ROUNDING * magnitude(terms)
    shrunk = prune(terms, ceilings + rounding)
    if shrunk is None:  # no choice that holds the bounds is ever pruned
        return Found(None, np.inf)
    relaxed = relax(shrunk, ceilings)
    best = start(terms, _least_within(limits), known, relaxed.choices)[0]
    best_known, worth = None, np.inf
    if _holds(problem, best, bounds):
        best_known, worth = best, _value(problem, goal, best)
    ceilings[0] = min(ceilings[0], worth)
    ceilings += rounding
    shrunk = _within_price(shrunk, relaxed, ceilings)
    if shrunk is None:
        return Found(best_known, worth)
    found = Found(best_known, relaxed.bound)
    if best_known is None or gap == 0 or relative_gap(worth, relaxed.bound) > gap:
        found = _exact(problem, goal, bounds, grounded(shrunk), ceilings, best_known, deadline=deadline, gap=gap)
        found = Found(found.choices, max(found.bound, relaxed.bound))
    if found.choices is None:
        return found
    choices = _tidy(problem, goal, bounds, found.choices)
    value = _value(problem, goal, choices)
    # a bound that differs only by rounding is the value itself: an optimum of 0 would else have a gap of 100 %
    return Found(choices, value if value - found.bound <= rounding[0] else found.bound)


def _within_price(terms: Terms, relaxed: Relaxed, ceilings: Floats) -> Terms | None:
    """The terms without what costs too much at the prices of the limits to be better than what is known."""
    more = priced(terms, relaxed.prices)
    weighed = [price * ceiling for price, ceiling in zip(relaxed.prices, ceilings[1:], strict=True) if price]
    most = ceilings[0] + math.fsum(weighed)
    kept = prune(more, np.append(ceilings, most + ROUNDING * magnitude(more)[-1]))
    return None if kept is None else unpriced(kept)


def _exact(
    problem: Problem,
    goal: str,
    bounds: Mapping[str, float],
    terms: Terms,
    ceilings: Floats,
    best: tuple[int, ...] | None,
    *,
    deadline: float,
    gap: float,
) -> Found:
    """The solver's turn: solve, judge exactly, cut off what fails, again."""
    floor = float(terms.constant[0])
    limit = np.inf if best is None else _value(problem, goal, best)
    if limit <= floor + ROUNDING * float(magnitude(terms)[0]):
        return Found(best, min(floor, limit))
    parts, rooms = program(terms), ceilings - terms.constant
    cuts: list[tuple[int, ...]] = []
    while time.monotonic() < deadline:
        # past the last cut the rows lose what HiGHS cannot see; the bound proven before stays the truth
        tight = rooms if len(cuts) < MOST_CUTS else rooms * (1 - 1e-6)
        answer = run(parts, tight, cuts, time_limit_s=deadline - time.monotonic(), gap=gap)
        if len(cuts) < MOST_CUTS:
            floor = max(floor, float(terms.constant[0]) + answer.bound)
        candidate = answer.choices
        if candidate is not None and not _holds(problem, candidate, bounds):
            if len(cuts) < 2 * MOST_CUTS:
                cuts.append(candidate)
                continue
            candidate = None
        if candidate is not None and _value(problem, goal, candidate) < limit:
            best, limit = candidate, _value(problem, goal, candidate)
        break
    return Found(best, min(floor, limit))


def _nearest(
    problem: Problem, bounds: Mapping[str, float], found: Found, deadline: float
) -> tuple[tuple[int, ...], float]:
    """The choice of least largest relative excess, then as few limits passed, and as little error, as that allows.

    Also a proven lower bound on that excess.
    """
    if not bounds:
        _raise_nothing_allowed(proven=found.bound == np.inf)
    choices, bound = _least_excess(problem, bounds, deadline)
    worst = _worst(problem, choices, bounds)
    stretched = {name: limit + worst * excess_unit(limit) for name, limit in bounds.items()}
    needed = {name: stretched[name] for name in _binding(problem, choices, bounds)}
    for relaxed in ({**bounds, **needed}, stretched):
        better = optimum(problem, "error", relaxed, deadline=deadline, known=[choices])
        if better.choices is not None:
            return better.choices, bound
    return choices, bound


def _infeasible(
    problem: Problem, bounds: Mapping[str, float], choices: tuple[int, ...], least_excess: float
) -> Solution:
    error, costs = evaluate(problem, choices)
    worst = _worst(problem, choices, bounds)
    binding = ", ".join(_binding(problem, choices, bounds))
    bound = min(least_excess, worst)
    return Solution(
        choices, error, costs, bound, relative_gap(worst, bound), feasible=False, binding=binding, excess=worst
    )


def _binding(problem: Problem, choices: tuple[int, ...], bounds: Mapping[str, float]) -> list[str]:
    """The limits that are passed by the largest share, up to the precision to which the solver balances them."""
    over = excesses(problem, choices, bounds)
    worst = max(over.values())
    return sorted(name for name, value in over.items() if value > 0 and value >= worst * (1 - 1e-6))


def _least_excess(problem: Problem, bounds: Mapping[str, float], deadline: float) -> tuple[tuple[int, ...], float]:
    """The choice of least largest relative excess, and a proven lower bound on it.

    Each round asks how far below the best known excess one can go, so its numbers are in units of that excess.
    """
    names = tuple(bounds)
    terms = gather(problem, names)
    limits = np.array([bounds[name] for name in names])
    unit = np.array([excess_unit(limit) for limit in limits])
    first, allowed = start(terms, lambda totals: ((totals - limits[:, None]) / unit[:, None]).max(axis=0))
    best = first if allowed else None
    noise = ROUNDING * magnitude(terms)
    # with nothing known, an excess that no combination reaches
    worst = _worst(problem, best, bounds) if best else float(((magnitude(terms) + unit) / unit).max())
    if best is not None and not terms.unary:  # no site, one choice; HiGHS refuses a program without columns
        return best, worst
    floor = 0.0
    while time.monotonic() < deadline and worst > 0:
        ceilings = limits + worst * unit + noise
        shrunk = prune(terms, ceilings)
        answer = Answer(None, np.inf)
        if shrunk is not None:
            low = grounded(shrunk)
            left = deadline - time.monotonic()
            rooms = ceilings - low.constant
            answer = run(program(low), rooms, (), stretch=worst * unit, time_limit_s=left, gap=0.0)
        floor = max(floor, worst * min(1.0, 1.0 + answer.bound))
        if answer.choices is None:
            break
        reached = _worst(problem, answer.choices, bounds)
        if best is not None and reached >= worst * (1 - 1e-9):
            break
        best, worst = answer.choices, reached
    if best is None:
        _raise_nothing_allowed(proven=time.monotonic() < deadline)
    return best, floor


def _raise_nothing_allowed(*, proven: bool) -> NoReturn:
    if proven:
        raise UsageError("every combination of options is forbidden", fix="allow more options at some site")
    raise ResourceError("no allowed combination was found in time", fix="raise the time limit")


def _least_within(limits: Floats) -> Score:
    """The first quantity where all limits hold, else something larger that grows with the largest excess."""
    unit = np.array([excess_unit(limit) if np.isfinite(limit) else 1.0 for limit in limits])
    bar = np.array([limit + slack(limit) for limit in limits])

    def score(totals: Floats) -> Floats:
        over = ((totals - bar[:, None]) / unit[:, None]).max(axis=0)
        ranked: Floats = np.where(over <= 0, totals[0], 1e60 * (1.0 + over))
        return ranked

    return score


def _tidy(problem: Problem, goal: str, bounds: Mapping[str, float], choices: tuple[int, ...]) -> tuple[int, ...]:
    """The same goal or better with smaller option numbers wherever one change allows it: ties fall towards keep."""
    value = _value(problem, goal, choices)
    touching: list[list[Factor]] = [[] for _ in choices]
    for factor in problem.factors:
        for variable in factor.variables:
            touching[variable].append(factor)

    def rooms_left() -> dict[str, float]:
        """By how much each bounded quantity and the goal may rise, and a little more."""
        left = {name: limit + SURE * abs(limit) - _value(problem, name, choices) for name, limit in bounds.items()}
        return left | {goal: min(left.get(goal, np.inf), SURE * abs(value))}

    rooms = rooms_left()
    for variable, option in enumerate(choices):
        hopeful = np.ones(problem.sizes[variable], dtype=bool)  # most options need no exact sum to be told
        for name, room in rooms.items():
            lost = _lost(touching[variable], name, choices, variable)
            hopeful &= lost - lost[option] <= room
        for smaller in np.flatnonzero(hopeful[:option]).tolist():
            moved = (*choices[:variable], smaller, *choices[variable + 1 :])
            if _value(problem, goal, moved) <= value and _holds(problem, moved, bounds):
                choices, value = moved, _value(problem, goal, moved)
                rooms = rooms_left()
                break
    return choices


def _lost(factors: Sequence[Factor], name: str, choices: tuple[int, ...], variable: int) -> Floats:
    """What the factors that touch a variable add to a cost or the error for each of its options, the others as chosen."""
    total: Floats = np.zeros(())
    for factor in factors:
        table = factor.error if name == "error" else factor.costs.get(name, np.zeros_like(factor.error))
        total = total + table[tuple(slice(None) if v == variable else choices[v] for v in factor.variables)]
    return total


def _holds(problem: Problem, choices: tuple[int, ...], bounds: Mapping[str, float]) -> bool:
    return evaluate(problem, choices)[0] < np.inf and _worst(problem, choices, bounds) == 0


def _worst(problem: Problem, choices: tuple[int, ...], bounds: Mapping[str, float]) -> float:
    return max(excesses(problem, choices, bounds).values(), default=0.0)


def _value(problem: Problem, name: str, choices: tuple[int, ...]) -> float:
    error, costs = evaluate(problem, choices)
    return error if name == "error" else costs[name]


def relative_gap(value: float, bound: float) -> float:
    """By what share of itself `value` is above its proven lower bound."""
    return 0.0 if value <= bound else (value - bound) / max(abs(value), sys.float_info.min)
