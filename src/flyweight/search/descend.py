"""A good choice, quickly: coordinate descent, one variable at a time. Never proof, always a start.

The exact solver prunes with what is found here, and it is the answer of last resort when the time is over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from flyweight.search.problem import Floats
from flyweight.search.terms import Term, Terms, magnitude

__all__ = ["Score", "start"]

Score = Callable[[Floats], Floats]  # totals [quantities, candidates] -> what to minimise [candidates]

NEAREST = 2
# One forbidden cell must outweigh any sum of errors and costs, and be far from overflow when counted.
FORBIDDEN = 1e100
# A decade apart, around the price at which all options' errors and all options' costs weigh the same.
WEIGHTS = (0.0, *(10.0**k for k in range(-5, 5)))


def start(
    terms: Terms, score: Score, known: Iterable[tuple[int, ...]] = (), near: Sequence[tuple[int, ...]] = ()
) -> tuple[tuple[int, ...], bool]:
    """The best by `score` of the known choices and of descents, and whether it is allowed. Descents start from the choices
    `near` the best; where tables couple variables, those may be far from it, and a range of prices is gone through as well.

    Deterministic: variables in order, first option at a tie.
    """
    graph = _Graph(terms)
    keep = tuple(int(np.argmax(term.allowed)) for term in terms.unary)
    candidates = [*known, graph.descend(keep, score), *(graph.descend(one, score) for one in near[:NEAREST])]
    current, scale = keep, np.maximum(magnitude(terms), np.finfo(float).tiny)
    for weight in WEIGHTS if terms.tables or not near else ():
        current = graph.descend(current, _priced(weight, scale))
        candidates.append(graph.descend(current, score))
    ranks = [graph.rank(graph.total(choices)[:, None], score)[0] for choices in candidates]
    best = candidates[int(np.argmin(ranks))]
    return best, graph.total(best)[-1] == 0


def _priced(weight: float, scale: Floats) -> Score:
    """The first quantity plus `weight` times each other one, each in units of its own range."""

    def score(totals: Floats) -> Floats:
        units = totals / scale[:, None]
        summed: Floats = units[0] + weight * units[1:].sum(axis=0)
        return summed

    return score


class _Graph:
    """The terms with one more quantity at the end, the number of forbidden cells, and who touches whom."""

    def __init__(self, terms: Terms) -> None:
        self.constant = np.append(terms.constant, 0.0)
        self.tables = [(term.variables, _counted(term)) for term in (*terms.unary, *terms.tables)]
        self.touching: list[list[int]] = [[] for _ in terms.unary]
        for number, (variables, _) in enumerate(self.tables):
            for variable in variables:
                self.touching[variable].append(number)

    def total(self, choices: Sequence[int]) -> Floats:
        total = self.constant.copy()
        for variables, table in self.tables:
            cell: tuple[Any, ...] = (slice(None), *(choices[v] for v in variables))
            total = total + table[cell]
        return total

    def column(self, choices: Sequence[int], variable: int) -> Floats:
        """What the tables that touch `variable` add for each of its options, the others as chosen."""
        column: Floats = np.zeros(())
        for number in self.touching[variable]:
            variables, table = self.tables[number]
            line = (slice(None), *(slice(None) if v == variable else choices[v] for v in variables))
            column = column + table[line]
        return column

    def rank(self, totals: Floats, score: Score) -> Floats:
        ranked: Floats = np.where(totals[-1] > 0, FORBIDDEN * totals[-1], score(totals[:-1]))
        return ranked

    def descend(self, choices: tuple[int, ...], score: Score, sweeps: int = 30) -> tuple[int, ...]:
        current, total = list(choices), self.total(choices)
        for _ in range(sweeps):
            before = tuple(current)
            for variable in range(len(current)):
                column = self.column(current, variable)
                candidates = (total - column[:, current[variable]])[:, None] + column
                ranks = self.rank(candidates, score)
                best = int(np.argmin(ranks))
                if ranks[best] < ranks[current[variable]]:
                    current[variable], total = best, candidates[:, best]
            if tuple(current) == before:
                break
        return tuple(current)


def _counted(term: Term) -> Floats:
    return np.concatenate([np.where(term.allowed, term.values, 0.0), 1.0 * ~term.allowed[None]])
