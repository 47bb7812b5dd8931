"""What a choice costs and errs: a factor graph of small tables, and the exact sum over it.

A `Problem` has one variable per site (its options are numbered, 0 is "keep") and factors: tables over a few variables
that hold an error and any number of named costs. What depends on one site is a unary factor; what depends on two
neighbouring widths and a number format is a factor over three variables. Nothing here knows what the numbers mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flyweight.errors import BudgetError, FlyweightError

__all__ = [
    "Factor",
    "Floats",
    "Problem",
    "Solution",
    "check_limits",
    "cost_names",
    "evaluate",
    "excess",
    "excess_unit",
    "excesses",
    "slack",
]

Floats = NDArray[np.float64]

# A limit counts as held up to this share of itself. Table entries are doubles and the sum over them is rounded once
# (fsum), so an honest tie such as 0.1 + 0.2 <= 0.3 is off by about 1e-16; 1e-9 forgives that and the arithmetic that
# made the limit (share x reference), and is far below anything a clock or a file size can show.
RELATIVE_TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class Factor:
    """A table over a few variables.

    `error[a, b, c]` is what that combination adds to the error; +inf forbids the combination. `costs` maps a cost's
    name to a finite table of the same shape; a missing name adds nothing.
    """

    variables: tuple[int, ...]
    error: Floats
    costs: Mapping[str, Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        error = _table(self.error)
        costs = {name: _table(table) for name, table in self.costs.items()}
        where = f"factor over variables {tuple(self.variables)}"
        if error.ndim != len(self.variables) or len(set(self.variables)) != error.ndim:
            raise FlyweightError(f"a table of {error.ndim} axes needs as many different variables", where=where)
        if np.isnan(error).any() or (error == -np.inf).any():
            raise FlyweightError("an error must be a number or +inf (forbidden)", where=where)
        if "error" in costs:
            raise FlyweightError('"error" is not a cost name: it has its own table', where=where)
        for name, table in costs.items():
            if table.shape != error.shape or not np.isfinite(table).all():
                raise FlyweightError(f"cost {name!r} must be finite and of shape {error.shape}", where=where)
        object.__setattr__(self, "variables", tuple(int(v) for v in self.variables))
        object.__setattr__(self, "error", error)
        object.__setattr__(self, "costs", costs)


@dataclass(frozen=True, eq=False)
class Problem:
    """Options per variable, the factors, and the constant part of every cost."""

    sizes: tuple[int, ...]
    factors: tuple[Factor, ...]
    base: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.sizes):
            raise FlyweightError("every variable needs at least one option")
        for factor in self.factors:
            known = all(0 <= v < len(self.sizes) for v in factor.variables)
            if not known or factor.error.shape != tuple(self.sizes[v] for v in factor.variables):
                raise FlyweightError(
                    f"a factor over variables {factor.variables} has shape {factor.error.shape}",
                    why=f"the variables have {tuple(self.sizes)} options",
                )
        if "error" in self.base or not all(math.isfinite(value) for value in self.base.values()):
            raise FlyweightError('the base of every cost must be finite, and "error" is not a cost name')
        object.__setattr__(self, "sizes", tuple(int(size) for size in self.sizes))
        object.__setattr__(self, "factors", tuple(self.factors))


@dataclass(frozen=True)
class Solution:
    """One choice per variable with its exact error and costs, and how far it is proven best.

    Feasible: `bound` is a proven lower bound on what was minimised and `gap` the relative distance to it.
    Infeasible: the nearest point; `excess` is its largest relative excess over a limit, `binding` names the limits that
    reach it, and `bound` and `gap` are about `excess`. A bound of 0 then means that the time ran out: it is
    not proven that the limits cannot be met.
    """

    choices: tuple[int, ...]
    error: float
    costs: Mapping[str, float]
    bound: float
    gap: float
    feasible: bool
    binding: str = ""
    excess: float = 0.0


def evaluate(problem: Problem, choices: Sequence[int]) -> tuple[float, dict[str, float]]:
    """The exact error and costs of `choices`: every sum is rounded once, so the order of factors does not matter."""
    if len(choices) != len(problem.sizes) or any(not 0 <= c < s for c, s in zip(choices, problem.sizes, strict=True)):
        raise FlyweightError(f"choices {tuple(choices)} do not fit {problem.sizes} options")
    errors: list[float] = []
    costs = {name: [problem.base.get(name, 0.0)] for name in cost_names(problem)}
    for factor in problem.factors:
        cell = tuple(choices[v] for v in factor.variables)
        errors.append(float(factor.error[cell]))
        for name, table in factor.costs.items():
            costs[name].append(float(table[cell]))
    return math.fsum(errors), {name: math.fsum(parts) for name, parts in costs.items()}


def cost_names(problem: Problem) -> tuple[str, ...]:
    """Every cost that the base or a factor knows, sorted."""
    return tuple(sorted({*problem.base, *(name for factor in problem.factors for name in factor.costs)}))


def slack(limit: float) -> float:
    """By how much a value may pass `limit` and still count as holding it."""
    return RELATIVE_TOLERANCE * abs(limit)


def excess(value: float, limit: float) -> float:
    """By what share of `limit` the value passes it; 0 if it holds. A limit of zero is passed by the value itself."""
    return 0.0 if value <= limit + slack(limit) else (value - limit) / excess_unit(limit)


def excess_unit(limit: float) -> float:
    """What an excess over `limit` is counted in: the limit, or 1 where it is zero (or below 1e-30)."""
    return abs(limit) if abs(limit) > 1e-30 else 1.0


def excesses(problem: Problem, choices: Sequence[int], limits: Mapping[str, float]) -> dict[str, float]:
    """The relative excess over each limit; the name "error" limits the error."""
    error, costs = evaluate(problem, choices)
    return {name: excess(error if name == "error" else costs[name], limit) for name, limit in limits.items()}


def check_limits(problem: Problem, limits: Mapping[str, float], error_limit: float | None) -> dict[str, float]:
    """The limits that can bind, with "error" among them. Raises BudgetError for an unknown name or a limit of NaN."""
    known = cost_names(problem)
    merged = {**limits} if error_limit is None else {**limits, "error": error_limit}
    for name, limit in merged.items():
        if name not in known and not (name == "error" and error_limit is not None):
            raise BudgetError(f"no cost is called {name!r}", fix=f"known costs: {', '.join(known) or 'none'}")
        if math.isnan(limit) or limit == -math.inf:
            raise BudgetError(f"the limit {name} <= {limit} is not a number that can be reached")
    return {name: float(limit) for name, limit in merged.items() if limit != math.inf}


def _table(values: Floats) -> Floats:
    table = np.array(values, dtype=np.float64)
    table.setflags(write=False)
    return table
