"""The frontier is a part of the true Pareto set, with both ends; a small one comes whole."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyweight.errors import UsageError
from flyweight.search import Factor, Line, Problem, brute_frontier, evaluate, frontier, minimum, solve

from .menus import network_menu, random_menu

CLOSE = 4e-9  # as in test_exact


def pairs(points, cost):
    return [(point.costs[cost], point.error) for point in points]


def assert_close(ours, truth):
    assert np.array(ours) == pytest.approx(np.array(truth), rel=CLOSE, abs=1e-12)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from(["latency", "size"]), st.booleans(), st.booleans())
def test_frontier_with_enough_points_is_the_pareto_set(seed, variables, cost, ties, holes):
    problem = random_menu(seed, variables=variables, options=3, ties=ties, holes=holes)
    try:
        truth = brute_frontier(problem, cost)
        points = frontier(problem, cost, points=200)
    except UsageError:
        return
    if not truth:
        assert points == ()
        return
    assert_close(pairs(points, cost), truth)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from(["latency", "size"]), st.integers(2, 6))
def test_a_short_frontier_is_part_of_the_pareto_set_and_has_both_ends(seed, cost, wanted):
    problem = random_menu(seed, variables=5)
    truth = brute_frontier(problem, cost)
    points = frontier(problem, cost, points=wanted)
    ours = pairs(points, cost)
    assert len(ours) == min(wanted, len(truth))
    assert_close([ours[0], ours[-1]], [truth[0], truth[-1]])
    for point in ours:
        assert min(max(abs(point[0] / t[0] - 1), abs(point[1] - t[1])) for t in truth) <= CLOSE
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(ours))
    assert all(evaluate(problem, p.choices) == (p.error, p.costs) and p.gap <= CLOSE for p in points)


def test_other_limits_hold_at_every_point():
    problem = random_menu(2, variables=5)
    limit = (minimum(problem, "size") + evaluate(problem, (0,) * 5)[1]["size"]) / 2
    points = frontier(problem, "latency", limits={"size": limit}, points=8)
    assert points
    assert all(point.costs["size"] <= limit * (1 + 1e-9) for point in points)
    assert frontier(problem, "latency", limits={"size": 1.0}) == ()


def test_a_frontier_of_one_choice_is_one_point():
    problem = Problem((3,), (Factor((0,), np.array([0.0, 1.0, 2.0]), {"size": np.array([1.0, 1.0, 3.0])}),))
    assert [point.choices for point in frontier(problem, "size")] == [(0,)]


def test_of_two_points_with_equal_error_only_the_cheaper_is_shown():
    site = Factor((0,), np.array([0.0, 1.0, 1.0, 2.0]), {"size": np.array([9.0, 5.0, 3.0, 1.0])})
    assert [point.choices for point in frontier(Problem((4,), (site,)), "size", points=3)] == [(3,), (2,), (0,)]


def test_a_cost_that_is_zero_or_negative_has_a_frontier_too():
    problem = Problem((3,), (Factor((0,), np.array([0.0, 1.0, 2.0]), {"size": np.array([0.0, -1.0, -2.0])}),))
    assert [point.choices for point in frontier(problem, "size")] == [(2,), (1,), (0,)]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from(["latency", "size"]), st.integers(2, 6), st.booleans())
def test_a_line_has_the_least_error_of_all_problems_below_ceilings_of_even_ratios(seed, cost, wanted, ties):
    problems = [random_menu(seed + turn, variables=3 + turn, ties=ties) for turn in range(2)]
    line = Line(problems, cost, points=wanted, limits=[{}, {}])
    every = [point for problem in problems for point in brute_frontier(problem, cost)]
    low, high = min(c for c, _ in every), min(every, key=lambda point: (point[1], point[0]))[0]
    assert len(line) == wanted
    for i in np.random.default_rng(seed).permutation(wanted).tolist():  # in any order
        share = i / (wanted - 1)
        ceiling = low * (high / low) ** share if low > 0 else low + (high - low) * share
        best = min((e, c) for c, e in every if c <= ceiling + CLOSE * abs(ceiling))
        which, point = line.at(i)
        assert_close([point.error, point.costs[cost]], best)
        assert evaluate(problems[which], point.choices) == (point.error, point.costs)


def test_a_line_leaves_out_what_cannot_hold_its_limits():
    problems = [random_menu(seed, variables=5) for seed in (3, 2)]
    limit = (minimum(problems[1], "size") + evaluate(problems[1], (0,) * 5)[1]["size"]) / 2
    line = Line(problems, "latency", points=5, limits=[{"size": 1.0}, {"size": limit}])
    assert [line.at(i)[0] for i in range(len(line))] == [1] * 5
    assert all(line.at(i)[1].costs["size"] <= limit * (1 + 1e-9) for i in range(5))
    assert len(Line(problems, "latency", points=5, limits=[{"size": 1.0}] * 2)) == 0


def test_a_line_of_one_choice_is_one_point():
    problem = Problem((3,), (Factor((0,), np.array([0.0, 1.0, 2.0]), {"size": np.array([1.0, 1.0, 3.0])}),))
    line = Line([problem], "size", points=9, limits=[{}])
    assert (len(line), line.at(0)[1].choices) == (1, (0,))


def test_a_real_network_is_solved_exactly_in_seconds():
    """40 sites of 10 widths, 50 layers over (10, 10, 2): 1 to 4 s on a quiet core; the bound leaves room."""
    problem = network_menu(0, widths=40, formats=50)
    keep = evaluate(problem, (0,) * 90)[1]
    begin = time.monotonic()
    solution = solve(problem, {"latency": 0.5 * keep["latency"]}, time_limit_s=60)
    assert time.monotonic() - begin < 30
    assert solution.feasible
    assert solution.gap <= 1e-9
    assert solution.costs["latency"] <= 0.5 * keep["latency"] * (1 + 1e-9)


def test_when_the_time_is_over_the_answer_holds_the_limits_and_says_its_gap():
    problem = network_menu(1, widths=20, formats=25)
    keep = evaluate(problem, (0,) * 45)[1]
    limit = {"latency": 0.5 * keep["latency"]}
    hasty, exact = solve(problem, limit, time_limit_s=0), solve(problem, limit)
    assert hasty.feasible
    assert hasty.costs["latency"] <= limit["latency"] * (1 + 1e-9)
    assert hasty.bound <= exact.error <= hasty.error
    assert hasty.gap == pytest.approx((hasty.error - hasty.bound) / hasty.error)
    points = frontier(problem, "latency", points=50, time_limit_s=0.0)
    assert len(points) >= 2
    assert points[0].costs["latency"] < points[-1].costs["latency"]


def test_when_the_time_is_over_an_unproven_miss_says_that_it_is_unproven():
    """Limits that the exact search holds and no descent comes to; with no time nobody can know."""
    problem = random_menu(42, variables=6, options=4, holes=True)
    limits = {}
    for cost in ("latency", "size"):
        least = minimum(problem, cost)
        limits[cost] = least + 0.15 * max(problem.base[cost] - least, 0.1 * abs(least))
    hasty = solve(problem, limits, time_limit_s=0)
    assert not hasty.feasible
    assert hasty.excess > 0
    assert (hasty.bound, hasty.gap) == (0.0, 1.0)
    assert solve(problem, limits).feasible
