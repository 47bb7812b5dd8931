"""Prices for limits: the bound that they prove is the linear program's, and never above the optimum."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize

from flyweight.search import Factor, Problem, brute, minimum, solve
from flyweight.search.relaxed import priced, relax, unpriced
from flyweight.search.terms import gather

from .menus import random_menu

NAMES = ("error", "latency", "size")


def limited(problem: Problem, shares: tuple[float, float]) -> dict[str, float]:
    limits = {}
    for cost, share in zip(NAMES[1:], shares, strict=True):
        low, keep = minimum(problem, cost), problem.base[cost]
        limits[cost] = low + share * max(keep - low, 0.1 * abs(low))
    return limits


@pytest.mark.parametrize("seed", range(24))
def test_no_choice_is_below_the_bound(seed: int):
    problem = random_menu(seed, variables=1 + seed % 7, options=3, ties=seed % 3 == 0)
    limits = limited(problem, (0.3 + 0.1 * (seed % 4), 0.6))
    best = brute(problem, limits)
    terms = gather(problem, NAMES)
    found = relax(terms, np.array([np.inf, *limits.values()]))
    assert (found.prices >= 0).all()
    if best.feasible:
        assert found.bound <= best.error + 1e-9 * max(1.0, abs(best.error))


def independent(seed: int, sites: int = 30, options: int = 6) -> Problem:
    draw = np.random.default_rng(seed)
    factors = [
        Factor((site,), np.sort(draw.random(options)) ** 2, {n: -np.sort(draw.random(options)) for n in NAMES[1:]})
        for site in range(sites)
    ]
    return Problem((options,) * sites, tuple(factors), {"latency": 40.0, "size": 50.0})


@pytest.mark.parametrize("seed", range(6))
def test_the_bound_is_that_of_the_linear_program(seed: int):
    problem = independent(seed)
    limits = limited(problem, (0.4, 0.5))
    sites, options = len(problem.sizes), problem.sizes[0]
    rows = np.kron(np.eye(sites), np.ones(options))
    costs = np.array([np.concatenate([f.costs[n] for f in problem.factors]) for n in NAMES[1:]])
    rooms = [limits[n] - problem.base[n] for n in NAMES[1:]]
    goal = np.concatenate([f.error for f in problem.factors])
    program = scipy.optimize.linprog(goal, A_ub=costs, b_ub=rooms, A_eq=rows, b_eq=np.ones(sites), bounds=(0, None))
    found = relax(gather(problem, NAMES), np.array([np.inf, *limits.values()]))
    # the cutting planes stop within 1e-5 of the bound
    assert found.bound == pytest.approx(program.fun, rel=3e-5)
    assert found.bound <= program.fun * (1 + 1e-9)


def test_a_gap_is_proven_without_the_exact_solver_and_holds():
    for seed in range(4):
        problem = independent(seed, sites=200)
        limits = limited(problem, (0.4, 0.5))
        near, exact = solve(problem, limits, gap=0.02), solve(problem, limits)
        assert near.feasible
        assert near.gap <= 0.02
        assert exact.error <= near.error <= exact.error / (1 - 0.02)


def test_where_nothing_limits_the_bound_is_the_least():
    problem = independent(0)
    found = relax(gather(problem, NAMES), np.array([np.inf, np.inf, np.inf]))
    assert found.bound == pytest.approx(math.fsum(float(f.error.min()) for f in problem.factors))
    assert not found.prices.any()


def test_nothing_to_choose_is_its_own_bound():
    problem = Problem((), (), {"latency": 2.0, "size": 3.0})
    found = relax(gather(problem, ("latency", "size")), np.array([np.inf, 4.0]))
    assert (found.bound, found.choices) == (2.0, ())


def test_prices_add_a_quantity_that_can_be_taken_off_again():
    terms = gather(random_menu(3, variables=4, options=3), NAMES)
    prices = np.array([0.5, 2.0])
    more = priced(terms, prices)
    for old, new in zip((*terms.unary, *terms.tables), (*more.unary, *more.tables), strict=True):
        total = old.values[0] + 0.5 * old.values[1] + 2.0 * old.values[2]
        np.testing.assert_allclose(new.values[-1], total)
    back = unpriced(more)
    assert back.names == terms.names
    assert all(np.array_equal(a.values, b.values) for a, b in zip(back.unary, terms.unary, strict=True))
