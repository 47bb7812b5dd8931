"""The solver equals trying every combination, on menus small enough for that."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyweight.errors import BudgetError, FlyweightError, UsageError
from flyweight.search import Factor, Problem, brute, evaluate, excesses, minimum, solve

from .menus import random_menu

# A limit counts as held up to 1e-9 of itself, on both sides of every comparison here; 4e-9 leaves room for both and for
# the lexicographic second pass. Values are O(1) in their own units, so the tolerance is relative.
CLOSE = 4e-9

menus = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**6),
        "variables": st.integers(1, 6),
        "second": st.sampled_from([1e-5, 1.0]),
        "ties": st.booleans(),
        "holes": st.booleans(),
    }
)
quick = settings(max_examples=40, deadline=None, derandomize=True)


def menu_or_none(knobs):
    problem = random_menu(**knobs)
    try:
        brute(problem, {})
    except UsageError:
        return None
    return problem


def limit_at(problem, cost, share):
    """A limit between the smallest reachable value (share 0) and what keep costs; below the smallest if share < 0."""
    low = minimum(problem, cost)
    keep = evaluate(problem, (0,) * len(problem.sizes))[1][cost]
    return low + share * (max(keep - low, 0.1 * abs(low)))


def assert_same_optimum(problem, limits, minimise="error", error_limit=None):
    ours = solve(problem, limits, minimise=minimise, error_limit=error_limit)
    truth = brute(problem, limits, minimise, error_limit)
    assert ours.feasible == truth.feasible
    assert (ours.error, ours.costs) == evaluate(problem, ours.choices)
    bounds = limits if error_limit is None else {**limits, "error": error_limit}
    over = max(excesses(problem, ours.choices, bounds).values(), default=0.0)
    if truth.feasible:
        assert over == 0
        value = ours.error if minimise == "error" else ours.costs[minimise]
        best = truth.error if minimise == "error" else truth.costs[minimise]
        assert value == pytest.approx(best, rel=CLOSE, abs=1e-15)
        assert ours.bound <= best + CLOSE * abs(best)
        assert ours.gap <= CLOSE
    else:
        assert ours.excess == over == pytest.approx(truth.excess, rel=CLOSE, abs=CLOSE)
        assert ours.bound <= truth.excess + CLOSE
        assert ours.gap <= 1e-6  # the excess is found to the solver's tolerance on a row; the point itself is exact
        assert set(ours.binding.split(", ")) <= set(bounds)
        assert ours.binding


@quick
@given(menus, st.floats(0, 1), st.floats(0, 1))
def test_least_error_under_two_limits_equals_brute_force(knobs, first, second):
    problem = menu_or_none(knobs)
    if problem:
        limits = {"latency": limit_at(problem, "latency", first), "size": limit_at(problem, "size", second)}
        assert_same_optimum(problem, limits)


@quick
@given(menus, st.sampled_from(["latency", "size"]), st.floats(0, 1), st.floats(0, 2))
def test_least_cost_under_an_error_limit_equals_brute_force(knobs, cost, share, error_limit):
    problem = menu_or_none(knobs)
    if problem:
        other = {"latency": "size", "size": "latency"}[cost]
        assert_same_optimum(problem, {other: limit_at(problem, other, share)}, cost, error_limit)


@quick
@given(menus, st.floats(-2, -0.01), st.floats(-1, 1), st.sampled_from(["error", "latency"]))
def test_nearest_point_equals_brute_force(knobs, first, second, minimise):
    problem = menu_or_none(knobs)
    if problem:
        limits = {"latency": limit_at(problem, "latency", first), "size": limit_at(problem, "size", second)}
        assert_same_optimum(problem, limits, minimise)


@quick
@given(menus, st.sampled_from(["latency", "size"]))
def test_minimum_is_the_least_over_all_combinations(knobs, cost):
    problem = menu_or_none(knobs)
    if problem:
        assert minimum(problem, cost) == pytest.approx(brute(problem, {}, cost).costs[cost], rel=CLOSE)


@pytest.mark.parametrize("seed", range(3))
def test_eight_variables_of_four_options_equal_brute_force(seed):
    problem = random_menu(seed, variables=8, options=4)
    if math.prod(problem.sizes) <= 20_000:
        assert_same_optimum(problem, {"latency": limit_at(problem, "latency", 0.4)})
    smaller = Problem((3,) * 8, random_menu_factors(seed))
    assert_same_optimum(smaller, {"latency": limit_at(smaller, "latency", 0.3)})


def random_menu_factors(seed):
    generator = np.random.default_rng(seed)
    chain = [(i, (i + 1) % 8, (i + 3) % 8) for i in range(8)]
    tables = [Factor(s, generator.random((3, 3, 3)), {"latency": 1e-5 * generator.random((3, 3, 3))}) for s in chain]
    return tuple(tables)


@quick
@given(menus)
def test_equal_problems_give_equal_choices(knobs):
    problem = menu_or_none(knobs)
    if problem:
        limits = {"latency": limit_at(problem, "latency", 0.3)}
        assert solve(problem, limits) == solve(random_menu(**knobs), limits)


def test_keep_is_chosen_when_the_limits_are_loose():
    # every option errs nothing, so only the rule "ties fall towards keep" decides
    problem = Problem((4,) * 5, tuple(Factor((i,), np.zeros(4), {"size": -np.arange(4.0)}) for i in range(5)))
    assert solve(problem, {"size": 1.0}).choices == (0,) * 5
    assert solve(problem, {}).choices == (0,) * 5


def test_keep_has_no_error_when_the_limits_are_loose():
    problem = random_menu(5, variables=6)
    unary = Problem(problem.sizes, tuple(f for f in problem.factors if len(f.variables) == 1), problem.base)
    solution = solve(unary, {"latency": 1.0})
    assert (solution.choices, solution.error, solution.gap) == ((0,) * 6, 0.0, 0.0)


def test_among_the_cheapest_the_least_error_is_chosen():
    free = Factor((0,), np.array([0.0, 3.0, 1.0, 2.0]), {"size": np.array([5.0, 1.0, 1.0, 1.0])})
    solution = solve(Problem((4,), (free,)), {}, minimise="size")
    assert (solution.choices, solution.costs["size"]) == ((2,), 1.0)


@quick
@given(menus)
def test_no_smaller_option_number_is_as_good(knobs):
    problem = menu_or_none({**knobs, "ties": True})
    if problem:
        limits = {"latency": limit_at(problem, "latency", 0.3)}
        solution = solve(problem, limits)
        for site, option in enumerate(solution.choices):
            for smaller in range(option):
                error, costs = evaluate(problem, (*solution.choices[:site], smaller, *solution.choices[site + 1 :]))
                assert error > solution.error or costs["latency"] > limits["latency"]


@pytest.mark.parametrize("interaction", [1e-3, 1e-6, 1e-9])
def test_a_weak_interaction_still_decides(interaction):
    """Both sites changed is best, though each site's mean and each single change speak against the first one."""
    table = 1 + interaction * np.array([[1.0, 2.0], [8.0, 0.0]])
    assert solve(Problem((2, 2), (Factor((0, 1), table),)), {}).choices == (1, 1)


@pytest.mark.parametrize("limit", [1.5, 0.5])
def test_a_table_in_which_no_single_change_helps_is_solved(limit):
    table = np.array([[5.0, 9.0], [9.0, 1.0]])
    problem = Problem((2, 2), (Factor((0, 1), table, {"size": table}),))
    for minimise in ("error", "size"):
        solution = solve(problem, {"size": limit}, minimise=minimise)
        assert (solution.choices, solution.feasible) == ((1, 1), limit > 1)


def test_a_limit_that_is_met_exactly_is_met():
    sites = [Factor((i,), np.array([1.0, 0.0]), {"s": np.array([0.0, 0.1 * (i + 1)])}) for i in range(2)]
    tenths = Problem((2, 2), tuple(sites))
    assert 0.1 + 0.2 > 0.3  # the sum is rounded upwards: a strict comparison would refuse it
    assert solve(tenths, {"s": 0.3}).choices == (1, 1)


@pytest.mark.parametrize("near", [1, 4, 8])
def test_a_limit_is_not_passed_by_less_than_the_solver_sees(near):
    """`near` sites offer an option 3e-9 of the limit too dear: HiGHS (1e-7 of the room) would take it, we may not."""
    dear = np.array([0.0, 1.0 + 3e-9 * near])
    factors = [Factor((i,), np.array([1.0, 0.5 - 0.01 * i]), {"s": dear}) for i in range(near)]
    problem = Problem((2,) * near, tuple(factors))
    solution = solve(problem, {"s": float(near)})
    assert solution.costs["s"] <= near * (1 + 1e-9)
    assert solution.error == pytest.approx(brute(problem, {"s": float(near)}).error, rel=CLOSE)


def test_many_near_ties_end_with_a_choice_that_holds_and_says_its_gap():
    """C(12, 6) = 924 combinations pass the limit by 2e-8: too many to cut off one by one."""
    dear = np.array([0.0, 1.0 + 2e-8])
    problem = Problem((2,) * 12, tuple(Factor((i,), np.array([1.0, 0.0]), {"s": dear}) for i in range(12)))
    solution = solve(problem, {"s": 6.0})
    assert solution.feasible
    assert solution.costs["s"] <= 6.0
    assert (solution.error, solution.bound) == pytest.approx((7.0, 6.0), abs=1e-6)
    assert solution.gap == pytest.approx(1 / 7, abs=1e-6)


def test_the_scale_of_a_cost_does_not_change_the_choice():
    problem = random_menu(11, variables=6, second=1.0)
    limit = limit_at(problem, "latency", 0.3)
    expected = solve(problem, {"latency": limit}).choices
    for scale in (1e-9, 1e-5, 1e9):  # nanoseconds in seconds, a menu in seconds, bytes
        factors = [Factor(f.variables, f.error, {"latency": scale * f.costs["latency"]}) for f in problem.factors]
        scaled = Problem(problem.sizes, tuple(factors), {"latency": scale * problem.base["latency"]})
        assert solve(scaled, {"latency": scale * limit}).choices == expected


def test_limits_that_need_not_be_passed_are_held_at_the_nearest_point():
    # latency cannot reach 1; size could stay within its limit at a higher error
    site = Factor((0,), np.array([0.0, 5.0]), {"latency": np.array([2.0, 2.0]), "size": np.array([15.0, 9.0])})
    nearest = solve(Problem((2,), (site,)), {"latency": 1.0, "size": 10.0})
    assert (nearest.feasible, nearest.binding, nearest.choices, nearest.excess) == (False, "latency", (1,), 1.0)


def test_limits_that_contradict_each_other_are_both_named():
    site = Factor((0,), np.zeros(3), {"a": np.array([1.0, 2.0, 4.0]), "b": np.array([4.0, 2.0, 1.0])})
    nearest = solve(Problem((3,), (site,)), {"a": 1.0, "b": 1.0})
    assert (nearest.choices, nearest.binding, nearest.excess) == ((1,), "a, b", 1.0)


def test_forbidden_combinations_are_never_chosen():
    both = np.array([[0.0, np.inf], [np.inf, 1.0]])
    cheap = [Factor((i,), np.zeros(2), {"size": np.array([1.0, 0.0])}) for i in range(2)]
    problem = Problem((2, 2), (Factor((0, 1), both), *cheap))
    assert solve(problem, {"size": 1.5}).choices == (1, 1)


def test_a_menu_without_an_allowed_combination_is_an_error():
    clash = (Factor((0,), np.array([0.0, np.inf])), Factor((0, 1), np.array([[np.inf, np.inf], [0.0, 0.0]]), {}))
    problem = Problem((2, 2), clash, {"size": 1.0})
    for limits in ({}, {"size": 2.0}, {"size": 0.5}):
        with pytest.raises(UsageError, match="forbidden"):
            solve(problem, limits)


def test_an_endless_limit_is_no_limit_and_an_unknown_cost_is_refused():
    problem = random_menu(3, variables=3)
    assert solve(problem, {"latency": math.inf}) == solve(problem, {})
    for bad in ({"watts": 1.0}, {"latency": math.nan}):
        with pytest.raises(BudgetError):
            solve(problem, bad)
    with pytest.raises(BudgetError, match="watts"):
        solve(problem, {}, minimise="watts")


@pytest.mark.parametrize(
    "build",
    [
        lambda: Factor((0, 0), np.zeros((2, 2))),
        lambda: Factor((0,), np.zeros((2, 2))),
        lambda: Factor((0,), np.array([0.0, np.nan])),
        lambda: Factor((0,), np.zeros(2), {"size": np.zeros(3)}),
        lambda: Factor((0,), np.zeros(2), {"size": np.array([0.0, np.inf])}),
        lambda: Factor((0,), np.zeros(2), {"error": np.zeros(2)}),
        lambda: Problem((2,), (Factor((1,), np.zeros(2)),)),
        lambda: Problem((3,), (Factor((0,), np.zeros(2)),)),
        lambda: Problem((0,), ()),
        lambda: Problem((2,), (), {"size": math.nan}),
        lambda: evaluate(Problem((2,), ()), (2,)),
        lambda: evaluate(Problem((2,), ()), ()),
    ],
)
def test_a_malformed_problem_is_refused_at_birth(build):
    with pytest.raises(FlyweightError):
        build()


@pytest.mark.parametrize("limit", [0.0, 1e-320, -1.0])
def test_a_limit_of_nothing_or_less_has_a_nearest_point(limit):
    problem = Problem((2,), (Factor((0,), np.array([0.0, 1.0]), {"size": np.array([3.0, 2.0])}),))
    nearest = solve(problem, {"size": limit})
    assert (nearest.choices, nearest.binding) == ((1,), "size")
    assert nearest.excess == pytest.approx(2.0 - limit, rel=1e-12)


def test_a_factor_does_not_follow_later_changes_of_its_table():
    table = np.zeros(2)
    factor = Factor((0,), table)
    table[0] = 9.0
    assert factor.error[0] == 0.0
    with pytest.raises(ValueError, match="read-only"):
        factor.error[0] = 1.0
