"""Limits turned into prices: every term then chooses for itself, and the sum of what they choose is a proven bound.

Whatever holds the limits costs no more than its goal when each quantity is paid for beyond its limit, so for any prices from
zero up the least priced total is a bound; the best prices are found by cutting planes. Source: Fisher 1981, "The Lagrangian
relaxation method for solving integer programming problems", section 2; Kelley 1960, "The cutting-plane method".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import scipy.optimize

from flyweight.search.problem import Floats
from flyweight.search.terms import Term, Terms

__all__ = ["Relaxed", "priced", "relax", "unpriced"]

ROUNDS, BISECTIONS = 60, 24
CLOSE = 1e-5  # of the bound: what better prices could still add
DEAREST = 1e6  # the highest price, where one is the price at which all terms' goals and costs weigh the same


@dataclass(frozen=True, eq=False)
class Relaxed:
    """`prices` of every quantity but the first (0 where nothing limits it), the `bound` that they prove on the first, and what
    the variables chose at the prices that were tried, the best ones first."""

    prices: Floats
    bound: float
    choices: tuple[tuple[int, ...], ...]


def relax(terms: Terms, ceilings: Floats) -> Relaxed:
    """The prices of (nearly) the highest bound. Every term must allow something."""
    if not terms.unary:
        return Relaxed(np.zeros(len(ceilings) - 1), float(terms.constant[0]), ())
    cells = _Cells(terms)
    limited = [q for q in range(1, len(ceilings)) if np.isfinite(ceilings[q])]
    prices = np.zeros(len(ceilings) - 1)
    units = cells.spread[0] / np.where(cells.spread[1:] > 0, cells.spread[1:], 1.0)
    cuts: list[Floats] = []  # goal, then how far each limited quantity is beyond its ceiling, in units of price
    tried: list[Relaxed] = []
    for _ in range(ROUNDS):
        totals, choices = cells.least(prices)
        beyond = np.array([(totals[q] - ceilings[q]) * units[q - 1] for q in limited])
        bound = float(totals[0] + sum(prices[q - 1] * (totals[q] - ceilings[q]) for q in limited))
        tried.append(Relaxed(prices, bound, (choices,)))
        cuts.append(np.array([totals[0], *beyond]))
        if not limited or cells.spread[0] <= 0:
            break
        hoped, new = _best_prices(cuts)
        if hoped - max(one.bound for one in tried) <= CLOSE * max(abs(hoped), 1e-300):
            break
        prices = np.zeros(len(ceilings) - 1)
        for q, price in zip(limited, new, strict=True):
            prices[q - 1] = price * units[q - 1]
    tried.sort(key=lambda one: one.bound, reverse=True)
    seen = [*_held(cells, tried[0].prices, ceilings), *(one.choices[0] for one in tried)]
    return replace(tried[0], choices=tuple(dict.fromkeys(seen)))


def _held(cells: _Cells, prices: Floats, ceilings: Floats) -> list[tuple[int, ...]]:
    """What is chosen at the prices times the least number, from about one to a hundred, that makes every ceiling hold."""
    if not prices.any():
        return []
    least, most = math.log(0.9), math.log(100.0)
    found: list[tuple[int, ...]] = []
    for _ in range(BISECTIONS):
        raised = most if not found else (least + most) / 2
        totals, choices = cells.least(prices * np.exp(raised))
        if np.all(totals[1:] <= ceilings[1:]):
            most, found = raised, [choices]
        elif not found:
            break
        else:
            least = raised
    return found


def _best_prices(cuts: list[Floats]) -> tuple[float, Floats]:
    """The highest bound that the totals seen so far leave open, and its prices."""
    seen = np.stack(cuts)
    scale = float(np.abs(seen[:, 0]).max()) or 1.0
    goal = np.zeros(seen.shape[1])
    goal[0] = -1.0
    rows = np.column_stack([np.ones(len(seen)), -seen[:, 1:] / scale])
    box = [(None, None), *[(0.0, DEAREST)] * (seen.shape[1] - 1)]
    found = scipy.optimize.linprog(goal, A_ub=rows, b_ub=seen[:, 0] / scale, bounds=box)
    if found.x is None:
        return -np.inf, np.zeros(seen.shape[1] - 1)
    return float(found.x[0]) * scale, found.x[1:]


def priced(terms: Terms, prices: Floats) -> Terms:
    """The terms with one more quantity at the end: the first plus the prices times the others."""
    weights = np.array([1.0, *prices])

    def more(values: Floats) -> Floats:
        return np.concatenate([values, np.tensordot(weights, values, 1)[None]])

    unary, tables = ([replace(term, values=more(term.values)) for term in part] for part in (terms.unary, terms.tables))
    return Terms((*terms.names, "priced"), more(terms.constant), tuple(unary), tuple(tables))


def unpriced(terms: Terms) -> Terms:
    """The terms without their last quantity."""
    unary, tables = ([replace(term, values=term.values[:-1]) for term in part] for part in (terms.unary, terms.tables))
    return Terms(terms.names[:-1], terms.constant[:-1], tuple(unary), tuple(tables))


class _Cells:
    """All allowed cells in one row, term after term, so a round is a few operations on arrays."""

    def __init__(self, terms: Terms) -> None:
        every = (*terms.unary, *terms.tables)
        self.constant = terms.constant
        self.values = np.concatenate([term.values[:, term.allowed] for term in every], axis=1)
        self.lengths = np.array([int(term.allowed.sum()) for term in every])
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]])
        self.options = [np.flatnonzero(term.allowed) for term in terms.unary]
        self.spread: Floats = sum((_range(term) for term in every), np.zeros(len(terms.constant)))

    def least(self, prices: Floats) -> tuple[Floats, tuple[int, ...]]:
        """The totals of the cells that are cheapest at `prices`, and the options that they are of the variables alone."""
        cost = np.array([1.0, *prices]) @ self.values
        cheapest = np.repeat(np.minimum.reduceat(cost, self.starts), self.lengths)
        hits = np.flatnonzero(cost == cheapest)
        first = hits[np.searchsorted(hits, self.starts)]
        totals: Floats = self.constant + self.values[:, first].sum(axis=1)
        places = (first - self.starts)[: len(self.options)]
        return totals, tuple(int(options[at]) for options, at in zip(self.options, places, strict=True))


def _range(term: Term) -> Floats:
    spread: Floats = np.ptp(term.values[:, term.allowed], axis=1)
    return spread
