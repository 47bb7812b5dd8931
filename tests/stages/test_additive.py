"""Random mixes: drawn alike for one seed, and compared with the sums of their prices."""

from __future__ import annotations

import pytest

from flyweight.deploy.latency import Mix
from flyweight.search.problem import evaluate
from flyweight.stages.additive import additivity, mix_notes, mixes
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
