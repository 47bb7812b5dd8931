"""Low rank on the menu: its costs are those of the file, it never meets a cut, both parts follow the number format."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from flyweight.graph.numbers import INT8
from flyweight.graph.operators import layers
from flyweight.methods import int8, lowrank
from flyweight.recover.resolve import resolve
from flyweight.search.brute import brute
from flyweight.search.knapsack import solve
from flyweight.search.problem import evaluate
from flyweight.stages.deliver import Network, deliver
from flyweight.stages.price import Menu, Sizes, options, problem, steps
from flyweight.stages.ranks import meeting
from flyweight.stages.tell import decisions, layer_rows
from flyweight.testing.laws import bytes_in_file, macs_counted

from .menus import SHAPE, menu, one, table


@cache
def ranked() -> Menu:
    """The small network's menu with up to three ranks for each layer."""
    made = tuple(
        lowrank.ranks(one().graph, layer, one().stats, lowrank.levels(layer, count=3), one().judge)
        for layer in one().layers.values()
    )
    return replace(menu(), ranks=made, sizes=Sizes(1000, 30.0, 200.0))


def network() -> Network:
    return Network(one().graph, one().layers, one().groups, one().stats, one().example)


FIRST = 10  # four groups and six layers' formats come before


def chosen(seed: int) -> tuple[int, ...]:
    """A choice in which no layer is both cut and made two."""
    dice, built = random.Random(seed), problem(ranked(), None)
    choice = [dice.randrange(size) for size in built.sizes]
    for i, r in enumerate(ranked().ranks):
        for g, lad in enumerate(ranked().ladders):
            touched = {*lad.group.producers, *(u.layer for u in lad.group.consumers)}
            if r.layer in touched and choice[FIRST + i]:
                choice[g] = 0
    return tuple(choice)


def delivered(choice: tuple[int, ...]):
    done = [s for v, option in enumerate(choice) for s in steps(ranked(), v, option)]
    return deliver(network(), done, lambda: iter(one().batches))[0]


@pytest.mark.parametrize("seed", range(3))
def test_costs_of_any_choice_are_those_of_the_network_delivered(seed: int):
    choice = chosen(seed)
    error, costs = evaluate(problem(replace(ranked(), sizes=Sizes(0, 0.0)), None), choice)
    graph = delivered(choice)
    assert math.isfinite(error)
    assert costs["size"] == bytes_in_file(graph, one().example)
    if not any(choice[4:FIRST]):
        assert costs["macs"] == macs_counted(graph, one().example)


@pytest.mark.parametrize("seed", range(10))
def test_macs_of_any_float_choice_are_those_torch_counts(seed: int):
    choice = (*chosen(seed)[:4], *[0] * 6, *chosen(seed)[FIRST:])
    assert evaluate(problem(ranked(), None), choice)[1]["macs"] == macs_counted(delivered(choice), one().example)


def test_a_layer_is_made_two_or_cut():
    built = problem(ranked(), None)
    for i, r in enumerate(ranked().ranks):
        for g, lad in enumerate(ranked().ladders):
            touched = {*lad.group.producers, *(u.layer for u in lad.group.consumers)}
            choice = [0] * len(built.sizes)
            choice[FIRST + i], choice[g] = 1, 1
            assert math.isinf(evaluate(built, choice)[0]) == (r.layer in touched)


def test_the_search_finds_what_brute_force_finds():
    small = replace(ranked(), formats=ranked().formats[-1:], ladders=ranked().ladders[-2:])
    small = replace(small, ranks=ranked().ranks[-3:])
    built = problem(small, None)
    whole = evaluate(built, (0,) * len(built.sizes))[1]
    for share in (0.9, 0.7, 0.5):
        limits = {"macs": whole["macs"] * share, "size": whole["size"] * share}
        found, best = solve(built, limits), brute(built, limits)
        assert found.feasible == best.feasible
        assert found.error == pytest.approx(best.error, rel=1e-9)


def test_sizes_count_the_new_layer_and_its_format():
    built = problem(ranked(), None)
    bare = problem(replace(ranked(), sizes=Sizes(0, 0.0)), None)
    choice = [0] * len(built.sizes)
    choice[FIRST] = 1
    assert evaluate(built, choice)[1]["size"] - evaluate(bare, choice)[1]["size"] == 1200
    choice[4] = 1  # the same layer in int8: two layers of it
    assert evaluate(built, choice)[1]["size"] - evaluate(bare, choice)[1]["size"] == 1260
    found = options(ranked(), built, None)
    alone = options(replace(ranked(), sizes=Sizes(0, 0.0)), bare, None)
    for site, rows in found.items():
        assert [o.cost.weight_bytes for o in rows] == [o.cost.weight_bytes for o in alone[site]]


def test_options_say_their_rank():
    rows = options(ranked(), problem(ranked(), None), None)["rank:inner"]
    assert [o.label for o in rows] == ["keep", "rank 6 of 12", "rank 3 of 12"]
    assert rows[1].steps == (lowrank.step("inner", 6),)
    assert rows[0].steps == ()
    assert rows[0].cost.macs == 0
    assert rows[1].layer_error == ranked().ranks[4].layer_errors[1]


def test_time_is_what_the_table_says_of_the_rank():
    split = {
        regime: {r.layer: {str(k): {SHAPE: 0.01 * k} for k in r.levels[1:]} for r in ranked().ranks}
        for regime in ("float", "int8")
    }
    made = table(split=split)
    built = problem(ranked(), made)
    keep = [0] * len(built.sizes)
    _, before = evaluate(built, keep)
    keep[FIRST + 4] = 2
    _, after = evaluate(built, keep)
    assert before[f"latency@{SHAPE}"] - after[f"latency@{SHAPE}"] == pytest.approx(0.03)


def test_both_parts_follow_the_format_and_rows_tell_of_both():
    choice = [0] * (FIRST + 6)
    choice[FIRST + 4], choice[4 + 4] = 1, 1  # inner, in int8
    graph = delivered(tuple(choice))
    assert set(graph.meta["numbers"]) == {"inner", "inner_in"}
    row = next(r for r in layer_rows(one().graph, graph, one().layers, {"inner": INT8}) if r.name == "inner")
    weights = 6 * 32 + 12 * 6
    # int8 weights; for each output a scale and a zero point, for the last ones an int32 bias with a scale
    assert row.weight_bytes_after == weights + 5 * 6 + 13 * 12
    assert row.macs_after == weights


def test_decisions_name_the_rank_as_a_site():
    built = problem(ranked(), None)
    solution = solve(built, {"macs": 0.8 * evaluate(built, (0,) * len(built.sizes))[1]["macs"]})
    made = decisions(ranked(), solution, options(ranked(), built, None), (), {})
    sites = [d.site for d in made if d.site.kind == "rank"]
    assert [s.name for s in sites] == [f"rank:{name}" for name in one().layers]
    assert all(s.layers == (s.name.removeprefix("rank:"),) for s in sites)


def test_layers_of_lower_rank_are_fitted_again_on_what_reaches_them():
    """Sequential re-solve gives the second part the least squares on the features that the first part hands it."""
    names = ("block.conv2", "inner")
    done = [lowrank.step(name, max(1, lowrank.levels(one().layers[name])[-1])) for name in names]
    plain = lowrank.restructure(one().graph, one().layers, one().stats, done)
    fitted = deliver(network(), done, lambda: iter(one().batches))[0]
    assert set(layers(fitted)) == {*one().layers, *(f"{n}_in" for n in names)}
    assert one().judge(fitted) < one().judge(plain)
    again = resolve(plain, one().graph, {}, one().batches)
    assert not torch.equal(again.get_submodule("inner").weight, plain.get_submodule("inner").weight)


def test_the_meeting_of_rank_and_rounding_is_what_was_measured():
    r = ranked().ranks[4]
    middle = len(r.levels) // 2
    share = meeting(network(), r, 0.0, one().judge, lambda: iter(one().batches), int8.step)
    assert -0.5 <= share <= 2.0
    more = meeting(network(), r, r.errors[middle] / 4, one().judge, lambda: iter(one().batches), int8.step)
    assert more == pytest.approx(max(-0.5, share - 0.25), abs=1e-6)
    built = problem(replace(ranked(), meetings={r.layer: 0.5}), None)
    choice = np.zeros(len(built.sizes), dtype=int)
    choice[FIRST + 4], choice[4 + 4] = middle, 1
    alone = r.errors[middle] + ranked().formats[4].error
    assert evaluate(built, tuple(choice))[0] == pytest.approx(alone + 0.5 * r.errors[middle])
