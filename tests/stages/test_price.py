"""The menu as a search problem: what it adds up is what really cutting and rounding gives."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from flyweight.graph.cost import weight_bytes
from flyweight.methods import channels, int8
from flyweight.search.problem import evaluate
from flyweight.stages.deliver import prepared, with_numbers
from flyweight.stages.price import Sizes, edges, markets, options, problem, steps
from flyweight.testing.laws import bytes_in_file, macs_counted

from ..graph.odd import subject as odd
from .menus import SHAPE, bare, menu, one, table

KEEP = (0,) * 10  # four groups and six layers


def test_the_menu_has_a_variable_for_each_decision():
    built = problem(menu(), None)
    assert built.sizes == (*(len(lad.levels) for lad in menu().ladders), *(2 for _ in menu().formats))
    assert len(built.sizes) == len(KEEP)


def test_keeping_everything_errs_nothing_and_costs_the_original():
    error, costs = evaluate(problem(menu(), None), KEEP)
    assert error == 0
    assert costs["macs"] == sum(layer.macs for layer in one().layers.values())
    assert costs["size"] == sum(weight_bytes(i, i.inputs, i.outputs, 32) for i in one().layers.values())


@pytest.mark.parametrize("seed", range(20))
def test_macs_of_any_choice_are_those_torch_counts_after_the_cut(seed: int):
    choice = chosen(seed)
    done = [s for v, option in enumerate(choice) for s in steps(menu(), v, option) if s.method == channels.NAME]
    graph = channels.restructure(one().graph, one().groups, one().layers, one().stats, done)
    assert evaluate(problem(menu(), None), choice)[1]["macs"] == macs_counted(graph, one().example)


@pytest.mark.parametrize("seed", [0, 1])
def test_bytes_of_any_choice_are_those_of_the_file(seed: int):
    choice = chosen(seed)
    done = [s for v, option in enumerate(choice) for s in steps(menu(), v, option)]
    cut = [s for s in done if s.method == channels.NAME]
    rounded = [s for s in done if s.method == int8.NAME]
    graph = channels.restructure(one().graph, one().groups, one().layers, one().stats, cut)
    ready = prepared(graph, one().example, {s.target for s in rounded}, lambda: iter(one().batches))
    file = with_numbers(ready, rounded)[0]
    assert evaluate(problem(menu(), None), choice)[1]["size"] == bytes_in_file(file, one().example)


def chosen(seed: int) -> tuple[int, ...]:
    dice = random.Random(seed)
    return tuple(dice.randrange(size) for size in problem(menu(), None).sizes)


@pytest.mark.parametrize("seed", range(5))
def test_errors_add_over_sites(seed: int):
    choice = chosen(seed)
    prices = [*(lad.errors for lad in menu().ladders), *((0.0, f.error) for f in menu().formats)]
    assert evaluate(problem(menu(), None), choice)[0] == pytest.approx(
        sum(p[c] for p, c in zip(prices, choice, strict=True))
    )


def test_where_removal_and_rounding_meet_the_surcharge_is_a_share_of_the_removal():
    name = "block.conv1"
    met = replace(menu(), combined={name: 0.5})
    v = [lad.group.name for lad in menu().ladders].index(name)
    reader = met.format_index()["block.conv2"]
    choice = list(KEEP)
    choice[v] = choice[reader] = 1
    plain, more = (evaluate(problem(m, None), choice)[0] for m in (menu(), met))
    assert more - plain == pytest.approx(0.5 * menu().ladders[v].errors[1])
    for alone in (v, reader):
        choice = list(KEEP)
        choice[alone] = 1
        assert evaluate(problem(met, None), choice)[0] == evaluate(problem(menu(), None), choice)[0]


def test_overheads_of_the_file_count_once_and_for_each_int8_layer():
    built = problem(replace(menu(), sizes=Sizes(1000, 30.5)), None)
    assert evaluate(built, KEEP)[1]["size"] == evaluate(problem(menu(), None), KEEP)[1]["size"] + 1000
    two = (*KEEP[:-2], 1, 1)
    assert evaluate(built, two)[1]["size"] == evaluate(problem(menu(), None), two)[1]["size"] + 1000 + 2 * 30.5


def test_a_rule_forbids_by_an_infinite_error():
    first = replace(menu().formats[0], allowed=(1,))
    built = problem(replace(menu(), formats=(first, *menu().formats[1:])), None)
    assert evaluate(built, KEEP)[0] == np.inf
    assert np.isfinite(evaluate(built, (0, 0, 0, 0, 1, 0, 0, 0, 0, 0))[0])


def test_options_say_what_each_choice_alone_changes():
    built = problem(replace(menu(), sizes=Sizes(1000, 30.5)), table())
    found = options(replace(menu(), sizes=Sizes(1000, 30.5)), built, table())
    assert set(found) == {
        *(f"channels:{g}" for g in one().groups), *(f"numbers:{n}" for n in one().layers)
    }  # fmt: skip
    base = evaluate(built, KEEP)[1]
    for v, (site, offered) in enumerate(found.items()):
        assert offered[0].label == "keep"
        for i, option in enumerate(offered):
            choice = [*KEEP[:v], i, *KEEP[v + 1 :]]
            costs = evaluate(built, choice)[1]
            assert option.site == site
            assert option.cost.macs == costs["macs"] - base["macs"]
            assert option.cost.file_bytes == round(costs["size"] - base["size"])
            seconds = (costs[f"latency@{SHAPE}"] - base[f"latency@{SHAPE}"]) * 0.002
            assert option.cost.latency_s[SHAPE] == pytest.approx(seconds, abs=1e-15)
            assert option.steps == steps(menu(), v, i)
        if site.startswith("numbers"):
            layer = one().layers[site.removeprefix("numbers:")]
            sizes = [weight_bytes(layer, layer.inputs, layer.outputs, bits) for bits in (32, 8)]
            assert offered[1].cost.weight_bytes == sizes[1] - sizes[0]  # the file's overhead is no weight


# ---- time


def latency(built, choice) -> float:
    return evaluate(built, choice)[1][f"latency@{SHAPE}"]


def test_without_a_table_time_has_no_price():
    assert set(evaluate(problem(menu(), None), KEEP)[1]) == {"size", "macs"}
    assert len(markets(menu(), None)) == 1


@pytest.mark.parametrize("spread", [0.0, 0.003, 0.1])  # of the clock: what is believed of each part must add up as well
def test_the_whole_models_take_what_was_measured(spread: float):
    scatter = {regime: {SHAPE: spread} for regime in ("float", "int8")} if spread else {}
    built = problem(menu(), table(spread=scatter))
    assert latency(built, KEEP) == pytest.approx(0.96)  # all float: the boundaries make it come out
    assert latency(built, (0, 0, 0, 0, *(1 for _ in menu().formats))) == pytest.approx(0.5)
    assert latency(problem(bare(), table(spread=scatter)), (0, 0, 0, 0)) == pytest.approx(0.96)


@pytest.mark.parametrize("v", range(4))
def test_a_group_cut_alone_saves_what_was_measured(v: int):
    numbers = tuple(1 for _ in menu().formats)
    for built, whole, share, rest in (
        (problem(bare(), table()), 0.96, 0.2, ()),
        (problem(menu(), table()), 0.5, 0.1, numbers),
    ):
        lad = menu().ladders[v]
        for i, level in enumerate(lad.levels):
            choice = (*(i if w == v else 0 for w in range(4)), *rest)
            assert latency(built, choice) == pytest.approx(whole - share * (1 - level / lad.group.size))


def test_two_cuts_of_one_layer_save_less_than_both_alone_and_time_is_never_negative():
    built = problem(bare(), table())
    together = 0.96 - latency(built, tuple(len(lad.levels) - 1 for lad in menu().ladders))
    singles = [
        0.96 - latency(built, tuple(len(menu().ladders[w].levels) - 1 if w == v else 0 for w in range(4)))
        for v in range(4)
    ]
    assert max(singles) < together < sum(singles)
    assert min(singles) > 0
    assert latency(built, tuple(len(lad.levels) - 1 for lad in menu().ladders)) > 0


def test_a_level_between_measured_ones_saves_what_the_next_wider_saves():
    lad = menu().ladders[0]
    wide = {**table().saved["float"], lad.group.name: {str(lad.levels[1]): {SHAPE: 0.07}}}
    built = problem(bare(), table(saved={**table().saved, "float": wide}))
    assert latency(built, (1, 0, 0, 0)) == pytest.approx(0.96 - 0.07)
    assert latency(built, (2, 0, 0, 0)) == pytest.approx(0.96 - 0.07)  # not measured: no more than that


def test_there_is_a_market_without_int8_unless_a_rule_demands_it():
    whole, floats = markets(menu(), table())
    assert len(whole.problem.sizes) == 10
    assert len(floats.problem.sizes) == 4
    demanded = replace(menu(), formats=(replace(menu().formats[0], allowed=(1,)), *menu().formats[1:]))
    assert len(markets(demanded, table())) == 1
    assert len(markets(bare(), table())) == 1


def test_neighbours_in_float_spare_in_proportion_to_the_less_of_what_they_add():
    """The all-float model comes out right, and a layer that adds nothing brings its neighbour nothing."""
    names = [f.layer for f in menu().formats]
    alone = {name: 0.0 if name == "last" else 0.1 * (i + 1) for i, name in enumerate(names)}
    built = problem(menu(), table(extra={name: {SHAPE: added} for name, added in alone.items()}))

    def with_float(*chosen: str) -> float:
        return latency(built, (*(0,) * 4, *(int(name not in chosen) for name in names)))

    assert with_float(*names) == pytest.approx(0.96)
    assert with_float("inner", "last") == pytest.approx(0.5 + alone["inner"])
    spared = {pair: sum(alone[n] for n in pair) - (with_float(*pair) - 0.5) for pair in menu().neighbours}
    ratios = [by / min(alone[n] for n in pair) for pair, by in spared.items() if "last" not in pair]
    assert ratios == pytest.approx([ratios[0]] * 5)


def test_where_float_layers_add_nothing_alone_the_all_float_model_comes_out_right_all_the_same():
    built = problem(menu(), table(extra={f.layer: {SHAPE: 0.0} for f in menu().formats}))
    assert latency(built, KEEP) == pytest.approx(0.96)


def test_edges_are_the_layers_that_meet_without_another_between():
    assert set(menu().neighbours) == {
        ("first", "block.conv1"), ("first", "block.side"), ("block.conv1", "block.conv2"),
        ("block.conv2", "inner"), ("block.side", "inner"), ("inner", "last"),
    }  # fmt: skip
    graph, _, _ = odd("known after unknown")
    from flyweight.graph.operators import layers

    assert set(edges(graph, layers(graph))) == {("inner", "inner"), ("inner", "fc")}
