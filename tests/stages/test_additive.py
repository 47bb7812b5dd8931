"""Random mixes: drawn alike for one seed, and compared with the sums of their prices."""

from __future__ import annotations

import pytest

from flyweight.deploy.latency import LatencyTable, Mix
from flyweight.search.problem import evaluate
from flyweight.stages.additive import COMMON, additivity, agreeing, mix_notes, mixes
from flyweight.stages.price import Market, problem

from . import menus

LEVELS = {"a": (8, 4), "b": (6,), "c": (3, 2, 1)}


def test_mixes_are_drawn_from_what_is_timed_and_alike_for_one_seed():
    layers = [f"l{i}" for i in range(9)]
    drawn = mixes(layers, LEVELS, 3)
    assert drawn == mixes(layers, LEVELS, 3)
    assert drawn != mixes(layers, LEVELS, 4)
    assert any(one.levels for one in drawn)
    assert any(one.in_float for one in drawn)
    for one in drawn:
        assert bool(one.levels) != bool(one.in_float)
        assert set(one.in_float) <= set(layers)
        assert all(level in LEVELS[name] for name, level in one.levels.items())
    assert {"a": 4, "b": 6, "c": 1} in [one.levels for one in drawn]


def test_a_mix_is_of_one_kind():
    with pytest.raises(ValueError, match="not both"):
        Mix({"a": 8}, ("l1",))


@pytest.mark.parametrize(("layers", "levels"), [((), {}), (("a",), {"a": (4,)})])
def test_of_one_thing_there_is_no_mix(layers, levels):
    assert mixes(layers, levels, 0) == ()


def market(**changes) -> tuple[Market, object]:
    table = menus.table(**changes)
    menu = menus.menu()
    return Market(menu, problem(menu, table)), table


def told(built: Market, mix: Mix) -> float:
    """The sum of the mix's prices, by hand: int8 but for the layers in float, widths by their levels."""
    menu, choices = built.menu, [0] * len(built.problem.sizes)
    for i, ladder in enumerate(menu.ladders):
        choices[i] = ladder.levels.index(mix.levels.get(ladder.group.name, ladder.group.size))
    for name, v in menu.format_index().items():
        choices[v] = int(name not in mix.in_float)
    return evaluate(built.problem, choices)[1][f"latency@{menus.SHAPE}"]


@pytest.mark.parametrize("off", [0.9, 0.97, 1.0, 1.04, 1.1])
def test_a_mix_is_compared_with_the_sum_of_its_prices_and_said_to_be_off_beyond_a_twentieth(off: float):
    built, table = market()
    widths = Mix(levels={lad.group.name: lad.levels[-1] for lad in built.menu.ladders})
    floats = Mix(in_float=tuple(built.menu.format_index())[:2])
    timed = [Mix(one.levels, one.in_float, {menus.SHAPE: off * told(built, one)}) for one in (widths, floats)]
    _, table = market(mixes=tuple(timed))
    assert [ratio for _, ratio in additivity(built, table)] == pytest.approx([off, off])
    notes = mix_notes(built, table)
    assert [note.code for note in notes] == (["latency.not-additive"] if abs(off - 1) > 0.05 else [])
    assert all(f"{off:.2f} times" in note.text for note in notes)


def test_mixes_of_another_menu_say_nothing():
    built, _ = market()
    name = built.menu.ladders[0].group.name
    _, table = market(mixes=(Mix({"gone": 3}, (), {menus.SHAPE: 9.0}), Mix({name: 10**6}, (), {menus.SHAPE: 9.0})))
    assert list(additivity(built, table)) == []
    assert mix_notes(built, table) == ()
    assert mix_notes(built, None) == ()


def times(factor: float, kept: dict) -> dict:
    """A table's prices, of whatever depth, times a factor."""
    return {k: times(factor, v) if isinstance(v, dict) else v * factor for k, v in kept.items()}


def timed(widths: float, floats: float, **changes) -> LatencyTable:
    """A table whose mixes took what savings and what float adds, times these factors, say of them."""
    menu, plain = menus.menu(), menus.table(**changes)
    true = menus.table(**changes, saved=times(widths, plain.saved), extra=times(floats, plain.extra))
    built = Market(menu, problem(menu, true))
    least = {lad.group.name: lad.levels[-1] for lad in menu.ladders}
    told_of = [Mix(levels=least), Mix(in_float=tuple(plain.extra)), Mix(in_float=tuple(plain.extra)[:2])]
    shown = tuple(Mix(m.levels, m.in_float, {menus.SHAPE: told(built, m)}) for m in told_of)
    return menus.table(**changes, mixes=shown)


def factors(table, before) -> tuple[float, float]:
    """What all savings, and all that float layers add, were multiplied by: alike for all of them."""
    group, layer = next(iter(before.saved["int8"])), next(iter(before.extra))
    level = next(iter(before.saved["int8"][group]))
    widths = table.saved["int8"][group][level][menus.SHAPE] / before.saved["int8"][group][level][menus.SHAPE]
    floats = table.extra[layer][menus.SHAPE] / before.extra[layer][menus.SHAPE]
    for name, by in before.saved["int8"].items():
        assert table.saved["int8"][name] == {k: pytest.approx(times(widths, v)) for k, v in by.items()}
    assert {**table.saved, "int8": None} == {**before.saved, "int8": None}  # mixes are of int8
    assert table.extra == {k: pytest.approx(times(floats, v)) for k, v in before.extra.items()}
    return widths, floats


@pytest.mark.parametrize("fixed", [(), ("gone",)])
def test_mixes_that_add_up_change_no_price(fixed):
    table = timed(1.0, 1.0, fixed=fixed)
    assert factors(agreeing(table, menus.menu()), table) == pytest.approx((1.0, 1.0), abs=1e-9)


def test_without_mixes_that_are_known_no_price_changes():
    plain = menus.table(fixed=("gone",))
    assert agreeing(plain, menus.menu()) is plain
    strange = menus.table(fixed=("gone",), mixes=(Mix({"gone": 3}, (), {menus.SHAPE: 9.0}),))
    assert factors(agreeing(strange, menus.menu()), strange) == pytest.approx((1.0, 1.0), abs=1e-9)


@pytest.mark.parametrize(("widths", "floats"), [(1.15, 0.9), (0.9, 1.2), (1.1, 1.0), (1.0, 0.85)])
def test_prices_move_towards_what_mixes_say_and_not_beyond(widths: float, floats: float):
    table = timed(widths, floats, fixed=("gone",))
    after = agreeing(table, menus.menu())
    for moved, there in zip(factors(after, table), (widths, floats), strict=True):
        assert min(1.0, there) - 0.01 <= moved <= max(1.0, there) + 0.01
    menu = menus.menu()
    built = Market(menu, problem(menu, after))
    was = [abs(ratio - 1) for _, ratio in additivity(Market(menu, problem(menu, table)), table)]
    now = [abs(ratio - 1) for _, ratio in additivity(built, after)]
    assert sum(now) < sum(was) / 2


def test_one_mix_far_off_moves_prices_by_little_more_than_the_prior_allows():
    """Of a ridge the answer is at most what the data ask for; mixes of 1 % beat the prior, those of noise do not."""
    table = timed(1.3, 1.0, fixed=("gone",), spread={"int8": {menus.SHAPE: 5.0}})
    widths, floats = factors(agreeing(table, menus.menu()), table)
    assert (widths, floats) == pytest.approx((1.0, 1.0), abs=COMMON[0] ** 2)


def test_what_all_float_models_set_stays_as_it_was_timed():
    table = timed(1.0, 1.2)
    assert factors(agreeing(table, menus.menu()), table)[1] == 1.0
