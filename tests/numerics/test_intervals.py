"""Intervals: against brute-force likelihoods, published figures, scipy, and seeded coverage simulations."""

import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from flyweight.errors import DataError, NumericsError
from flyweight.numerics.intervals import (
    MANY,
    holm,
    items_needed,
    items_to_decide,
    mcnemar_p,
    mean_interval,
    paired_difference,
    paired_proportions,
    proportion,
    resolution,
    scaled,
)
from flyweight.types import Interval

Z = stats.norm.ppf(0.975)


@pytest.mark.parametrize("items", [1, 7, 50, 400])
def test_wilson_equals_scipy(items):
    for successes in {0, 1, items // 2, items - 1, items}:
        ours = proportion(successes, items)
        theirs = stats.binomtest(successes, items).proportion_ci(method="wilson")
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
        assert ours.low < ours.high


def tango_statistic(worse: int, better: int, items: int, delta: float) -> float:
    """The score statistic with the constrained likelihood maximised numerically instead of by its formula."""

    def minus_log_likelihood(q: float) -> float:
        cells = ((worse, q + delta), (better, q), (items - worse - better, 1 - 2 * q - delta))
        return -sum(count * math.log(max(share, 1e-300)) for count, share in cells if count)

    best = optimize.minimize_scalar(
        minus_log_likelihood, bounds=(max(0.0, -delta), (1 - delta) / 2), method="bounded", options={"xatol": 1e-13}
    ).x
    return (worse - better - items * delta) / math.sqrt(items * (2 * best + delta - delta**2))


@pytest.mark.parametrize(("worse", "better", "items"), [(1, 0, 44), (5, 2, 60), (12, 2, 50), (3, 3, 30), (9, 40, 200)])
def test_the_ends_of_the_paired_interval_are_where_the_score_test_just_rejects(worse, better, items):
    found = paired_proportions(worse, better, items)
    # the bounded search leaves 1e-7 of the width in q; the statistic is smooth in it
    assert tango_statistic(worse, better, items, found.low) == pytest.approx(Z, rel=1e-4)
    assert tango_statistic(worse, better, items, found.high) == pytest.approx(-Z, rel=1e-4)


def test_without_any_change_the_paired_interval_has_its_known_width():
    # closed form for no discordant pair: z² / (n + z²), Tango 1998
    for items in (5, 44, 360, 10_000):
        found = paired_proportions(0, 0, items)
        assert found.value == 0.0
        assert (found.low, found.high) == pytest.approx((-(Z**2) / (items + Z**2), Z**2 / (items + Z**2)), abs=1e-9)


def test_the_paired_interval_ends_at_the_edges():
    assert paired_proportions(40, 0, 40).high == 1.0
    assert paired_proportions(0, 40, 40).low == -1.0


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 60))
def test_the_paired_interval_mirrors_and_holds_its_value(worse, better, rest):
    items = worse + better + rest
    one, other = paired_proportions(worse, better, items), paired_proportions(better, worse, items)
    assert one.low < one.value < one.high
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-9)
    assert -1 <= one.low < one.high <= 1


def coverage_of_pairs(drop: float, discordance: float, items: int) -> float:
    """Exact coverage: the sum of multinomial probabilities of the outcomes whose interval holds the truth."""
    worse_p, better_p = (discordance + drop) / 2, (discordance - drop) / 2
    covered = 0.0
    for worse in range(items + 1):
        for better in range(items + 1 - worse):
            chance = stats.multinomial.pmf(
                [worse, better, items - worse - better], items, [worse_p, better_p, 1 - discordance]
            )
            if chance > 1e-6:
                found = paired_proportions(worse, better, items)
                covered += chance * (found.low <= drop <= found.high)
    return covered


@pytest.mark.parametrize(("drop", "discordance"), [(0.0, 0.05), (0.0, 0.3), (0.05, 0.1), (0.2, 0.3), (0.02, 0.02)])
def test_the_paired_interval_covers_at_thirty_items(drop, discordance):
    assert coverage_of_pairs(drop, discordance, 30) >= 0.93


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("items", [15, 60])
def test_wilson_covers_on_average_near_p(share, items):
    # exact coverage oscillates with p (Brown, Cai, DasGupta 2001), so it is averaged over a neighbourhood of p
    shares = share + np.linspace(-0.015, 0.015, 21)
    outcomes = np.arange(items + 1)
    found = [proportion(int(k), items) for k in outcomes]
    low, high = np.array([f.low for f in found]), np.array([f.high for f in found])
    covered = [stats.binom.pmf(outcomes, items, p) @ ((low <= p) & (p <= high)) for p in shares]
    assert np.mean(covered) >= 0.93


SAMPLERS = {
    "normal": (lambda rng, shape: rng.normal(3, 1, shape), 3.0),
    "exponential": (lambda rng, shape: rng.exponential(1, shape), 1.0),
    "squared normal": (lambda rng, shape: rng.chisquare(1, shape), 1.0),  # what a small KL looks like
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("items", [20, 60])
def test_the_mean_interval_covers_skewed_numbers(name, items):
    draw, truth = SAMPLERS[name]
    found = [mean_interval(row) for row in draw(np.random.default_rng(0), (2000, items))]
    # 2,000 draws: the standard error of a coverage of .95 is .005
    assert np.mean([f.low <= truth <= f.high for f in found]) >= 0.925


def test_symmetric_numbers_get_student_t():
    numbers = np.array([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0]) + 10
    found = mean_interval(numbers)
    assert (found.low, found.high) == pytest.approx(
        stats.t.interval(0.95, 5, loc=numbers.mean(), scale=stats.sem(numbers)), abs=1e-9
    )


def test_skewness_moves_the_interval_towards_the_tail():
    numbers = np.random.default_rng(1).exponential(1, 40)
    low, high = stats.t.interval(0.95, 39, loc=numbers.mean(), scale=stats.sem(numbers))
    found = mean_interval(numbers)
    assert found.low > low
    assert found.high > high
    assert mean_interval(-numbers) == scaled(found, -1.0)


def test_outcomes_that_are_all_right_still_have_width():
    assert mean_interval([1.0] * 30) == proportion(30, 30)
    assert mean_interval([1.0, 0.0, 1.0, 1.0]) == proportion(3, 4)
    assert mean_interval([0.0] * 30) == Interval(0.0, 0.0, 0.0)
    assert mean_interval([0.25] * 30) == Interval(0.25, 0.25, 0.25)


def test_numbers_that_are_no_numbers_are_refused():
    with pytest.raises(DataError, match="1 samples"):
        mean_interval([1.0])
    with pytest.raises(NumericsError, match="NaN") as caught:
        mean_interval([1.0, math.nan])
    assert caught.value.where == "sample 1"
    with pytest.raises(DataError, match="paired"):
        paired_difference([1, 0], [1, 0, 1])
    with pytest.raises(DataError, match="no items"):
        proportion(0, 0)
    assert mean_interval([0.1, math.inf]).low == sys.float_info.max  # a JSON number, and larger than any limit


def test_paired_outcomes_count_changes_and_a_drop_is_positive():
    before, after = [1] * 50 + [0] * 10, [1] * 44 + [0] * 6 + [1] * 2 + [0] * 8
    assert paired_difference(before, after) == paired_proportions(6, 2, 60)
    assert paired_difference(before, after).value == pytest.approx(4 / 60)


def test_paired_real_numbers_cancel_what_both_share():
    rng = np.random.default_rng(0)
    before = rng.normal(0, 100, 50)
    after = before - 1 + rng.normal(0, 0.1, 50)
    found = paired_difference(before, after)
    assert found.low < 1 < found.high
    assert found.high - found.low < 0.1


def test_nearly_unchanged_real_numbers_do_not_promise_too_much():
    before = np.random.default_rng(0).uniform(0, 1, 360)
    unchanged = paired_difference(before, before)
    assert unchanged.value == 0.0
    # as wide as what the score interval says for 360 unchanged 0/1 outcomes, within a factor of 1.5
    assert 0.7 < unchanged.high / paired_proportions(0, 0, 360).high < 1.5
    one_changed = before.copy()
    one_changed[0] += 0.5
    assert paired_difference(before, one_changed).low < unchanged.low


@pytest.mark.parametrize(("worse", "better"), [(0, 0), (1, 0), (5, 0), (6, 1), (10, 10), (30, 12)])
def test_mcnemar_equals_the_binomial_test(worse, better):
    reference = stats.binomtest(worse, worse + better).pvalue if worse + better else 1.0
    assert mcnemar_p(worse, better) == pytest.approx(reference, abs=1e-12)
    assert mcnemar_p(worse, better) == mcnemar_p(better, worse)


def test_holm_on_a_worked_example():
    # sorted .01 .02 .03 .04 -> 4*.01, 3*.02, 2*.03, 1*.04, made monotone
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx((0.06, 0.04, 0.06, 0.06))
    assert holm([]) == ()
    assert holm([0.7, 0.9]) == (1.0, 1.0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values):
    level = 0.05
    rejected = set()
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[index] * (len(p_values) - rank) > level:
            break
        rejected.add(index)
    assert {i for i, p in enumerate(holm(p_values)) if p <= level} == rejected


def test_the_number_of_items_is_the_smallest_that_decides():
    assert 365 <= items_needed(0.01, 0.0) <= 385  # rule of z²: z² / 0.01 - z² = 380
    for limit, discordance, difference in [(0.01, 0.01, 0.0), (0.005, 0.02, 0.002), (0.01, 0.05, 0.03)]:
        items = items_needed(limit, discordance, difference)
        worse, better = (discordance + difference) / 2, (discordance - difference) / 2

        def undecided(count: int, worse: float = worse, better: float = better, limit: float = limit) -> bool:
            found = paired_proportions(worse * count, better * count, count)
            return found.low <= limit < found.high

        assert not undecided(items)
        assert undecided(items - 1)
    assert items_needed(0.01, 0.02, 0.01) == MANY
    # for many items the normal approximation z² ψ / limit² holds
    assert items_needed(0.001, 0.05) == pytest.approx(Z**2 * 0.05 / 0.001**2, rel=0.05)


@settings(max_examples=20)
@given(st.integers(50, 5000), st.floats(0.001, 0.2))
def test_resolution_and_items_needed_are_inverse(items, discordance):
    assert items_needed(resolution(items, discordance) * (1 + 1e-9), discordance) <= items


def test_widths_shrink_with_the_root_of_the_items():
    for limit in (0.6, 0.4):  # 401 if 0.1 is a little less than 0.1
        assert items_to_decide(Interval(0.5, 0.3, 0.7), limit, 100) in {400, 401}
    assert items_to_decide(Interval(0.5, 0.3, 0.7), 0.9, 100) == 100
    assert items_to_decide(Interval(0.5, 0.3, 0.7), 0.5, 100) == MANY


def test_units_change_without_changing_the_level():
    assert scaled(Interval(0.01, 0.0, 0.02, 0.9), 100) == Interval(1.0, 0.0, 2.0, 0.9)
    assert scaled(Interval(0.01, 0.0, 0.02), -1) == Interval(-0.01, -0.02, 0.0)
