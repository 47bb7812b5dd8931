"""Numbers in, choices out: the exact choice under limits, the nearest one, and the frontier."""

from flyweight.search.brute import brute, brute_frontier
from flyweight.search.knapsack import minimum, solve
from flyweight.search.pareto import Line, frontier
from flyweight.search.problem import Factor, Problem, Solution, cost_names, evaluate, excess, excesses

__all__ = [
    "Factor",
    "Line",
    "Problem",
    "Solution",
    "brute",
    "brute_frontier",
    "cost_names",
    "evaluate",
    "excess",
    "excesses",
    "frontier",
    "minimum",
    "solve",
]
