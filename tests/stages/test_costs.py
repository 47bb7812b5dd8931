"""Times of layers out of noisy savings: what is believed lies between what was measured and what the work says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyweight.search.problem import evaluate
from flyweight.stages.costs import _believed, _saved_at, float_extra, own_times
from flyweight.stages.price import problem

from .menus import SHAPE, bare, menu, table

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


def test_what_float_adds_among_int8_layers_shrinks_with_the_work_that_is_left():
    of, known = menu(), table(extra={name: {SHAPE: 0.02} for name in menu().layers})
    built, where = problem(of, known), menu().format_index()
    time = f"latency@{SHAPE}"
    for group, lad in enumerate(of.ladders):
        readers = [use.layer for use in lad.group.consumers]
        for name in readers:
            plan = [0] * len(of.ladders) + [1] * len(of.formats)
            added = []
            for level in (0, len(lad.levels) - 1):
                plan[group] = level
                int8, in_float = (
                    evaluate(built, [*plan[: where[name]], form, *plan[where[name] + 1 :]])[1] for form in (1, 0)
                )
                added.append(in_float[time] - int8[time])
            assert added[0] == pytest.approx(0.02)
            assert 0 < added[1] < added[0]


def test_float_layers_timed_one_by_one_take_together_what_the_whole_models_say():
    names = list(menu().layers)
    macs = {name: one.macs for name, one in menu().layers.items()}
    gained, timed = 0.96 - 0.5, names[: len(names) // 2]
    alone = {name: {SHAPE: 0.8 * gained * macs[name] / sum(macs.values())} for name in timed}
    known = table(extra=alone, fixed=tuple(names[len(timed) :]))
    told = sum(float_extra(menu(), known, name, SHAPE) for name in timed)
    untimed = gained * sum(macs[name] for name in known.fixed) / sum(macs.values())
    scale = told / sum(by[SHAPE] for by in alone.values())
    assert 1 < scale < 1.5
    assert told + scale * untimed == pytest.approx(gained)  # those not timed are taken to add what their work says
    assert float_extra(menu(), table(extra=alone), timed[0], SHAPE) == alone[timed[0]][SHAPE]
