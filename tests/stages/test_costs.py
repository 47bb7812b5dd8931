"""Times of layers out of noisy savings: what is believed lies between what was measured and what the work says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyweight.stages.costs import _believed, _saved_at, own_times

from .menus import SHAPE, bare, table

SHARE = st.floats(-0.5, 0.5)


@given(SHARE, st.floats(0, 0.5), st.floats(0, 1))
def test_what_is_believed_lies_between_and_nears_the_surer_one(measured: float, expected: float, spread: float):
    found = _believed(measured, expected, spread)
    assert min(measured, expected) - 1e-12 <= found <= max(measured, expected) + 1e-12
    assert _believed(measured, expected, 0.0) == measured  # a quiet clock is believed
    assert abs(_believed(measured, expected, 10 * spread) - expected) <= abs(found - expected) + 1e-12


def test_a_level_between_measured_ones_saves_in_proportion():
    known = {"8": {SHAPE: 0.1}, "4": {SHAPE: 0.3}}
    expected = {
        12: 0.0,
        10: 0.05,
        8: 0.1,
        6: 0.2,
        4: 0.3,
        2: 0.3,
    }  # below all that was measured: no more than the least
    assert {k: _saved_at(known, k, 12, SHAPE) for k in expected} == pytest.approx(expected)
    assert _saved_at({}, 4, 12, SHAPE) == 0.0


def test_without_scatter_times_are_the_plain_fit_and_with_much_of_it_they_follow_the_work():
    menu = bare()
    quiet = own_times(menu, table(), SHAPE, "float")
    loud = own_times(menu, table(spread={"float": {SHAPE: 1e3}}), SHAPE, "float")
    macs = np.array([one.macs for one in menu.layers.values()], dtype=float)
    expected = 0.96 * macs / (macs.sum() + menu.fixed_macs + sum(one.macs for one in menu.others))
    assert list(loud.values()) == pytest.approx(expected.tolist(), rel=1e-3)
    little = own_times(menu, table(spread={"float": {SHAPE: 1e-9}}), SHAPE, "float")
    # what the savings say about sums of layers stays; how a sum is shared out is what the work decides
    for lad in menu.ladders:
        members = {*lad.group.producers, *(use.layer for use in lad.group.consumers)}
        assert sum(little[n] for n in members) == pytest.approx(sum(quiet[n] for n in members), abs=1e-4)
