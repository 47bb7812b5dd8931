"""The records of the report say what happened."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flyweight.deploy.clock import Timing, Timings
from flyweight.graph.axes import Group
from flyweight.graph.numbers import INT8
from flyweight.methods import channels, int8
from flyweight.search.problem import evaluate
from flyweight.stages.choose import steps_of
from flyweight.stages.deliver import prepared, with_numbers
from flyweight.stages.price import options, problem
from flyweight.stages.tell import SHOWN, decisions, forecasts, frontier_points, layer_rows, parameters
from flyweight.stages.weigh import COMPRESSED
from flyweight.testing.laws import macs_counted
from flyweight.types import Interval

from ..graph.cases import case
from .menus import SHAPE, menu, one, table


def solution(choices: tuple[int, ...], **changes):
    from flyweight.search.problem import Solution

    error, costs = evaluate(problem(menu(), table()), choices)
    return replace(Solution(choices, error, costs, error, 0.0, True), **changes)


CHOICES = (1, 0, 0, 2, 1, 0, 0, 1, 0, 0)


@pytest.fixture(scope="module")
def after():
    done = steps_of(menu(), solution(CHOICES))
    cut = [s for s in done if s.method == channels.NAME]
    rounded = [s for s in done if s.method == int8.NAME]
    graph = channels.restructure(one().graph, one().groups, one().layers, one().stats, cut)
    ready = prepared(graph, one().example, {s.target for s in rounded}, lambda: iter(one().batches))
    return with_numbers(ready, rounded)[0], {s.target: INT8 for s in rounded}


def test_parameters_are_counted_once():
    model, traced, _ = case("tied")
    assert parameters(traced.module) == sum(p.numel() for p in model.parameters()) == 11 * 6 + 6 * 6 + 6 + 6


def test_rows_add_up_to_the_whole(after):
    graph, rounded = after
    rows = layer_rows(one().graph, graph, one().layers, rounded)
    assert [r.name for r in rows] == list(one().layers)
    assert sum(r.macs_before for r in rows) == macs_counted(one().graph, one().example)
    assert sum(r.macs_after for r in rows) == macs_counted(graph, one().example)
    costs = evaluate(problem(menu(), None), CHOICES)[1]
    assert sum(r.weight_bytes_after for r in rows) == costs["size"]
    assert {r.name for r in rows if r.bits_after == 8} == set(rounded) == {"first", "block.side"}
    assert all(r.bits_before == 32 for r in rows)


def test_shapes_are_those_of_the_weights(after):
    graph, rounded = after
    for row in layer_rows(one().graph, graph, one().layers, rounded):
        assert row.shape_before == tuple(one().graph.get_submodule(row.name).weight.shape)
        assert row.shape_after == tuple(graph.get_submodule(row.name).weight.shape)
        assert row.kind == type(graph.get_submodule(row.name)).__name__


def test_histograms_hold_nearly_every_weight_of_changed_layers_only(after):
    graph, rounded = after
    for row in layer_rows(one().graph, graph, one().layers, rounded):
        for histogram, network in ((row.histogram_before, one().graph), (row.histogram_after, graph)):
            weight = network.get_submodule(row.name).weight.detach()
            if histogram is None:
                assert torch.equal(one().graph.get_submodule(row.name).weight, graph.get_submodule(row.name).weight)
                continue
            inside = int((weight.abs() <= histogram.high).sum())
            # the bins' ends are rounded to float32, so a weight on the last one may fall outside
            assert inside - 2 <= sum(histogram.counts) <= inside
            assert inside >= int(SHOWN * (weight.numel() - 1))
            assert -histogram.low == histogram.high <= float(weight.abs().max())
    same = layer_rows(one().graph, one().graph, one().layers, {})
    assert all(r.histogram_before is r.histogram_after is None for r in same)
    assert all(r.macs_before == r.macs_after and r.weight_bytes_before == r.weight_bytes_after for r in same)


def test_every_site_has_its_decision_and_reason():
    frozen = Group("odd", 4, "channels", ("odd",), (), (), (), "it is an output of the model")
    offered = options(menu(), problem(menu(), table()), table())
    made = decisions(menu(), solution(CHOICES), offered, [frozen], {"late": "a rule keeps it at 32 bits"})
    sites = {d.site.name: d for d in made}
    assert list(sites) == [*offered, "channels:odd", "numbers:late"]
    for (name, options_of), choice in zip(offered.items(), CHOICES, strict=True):
        assert sites[name].chosen == options_of[choice]
        assert sites[name].options == options_of
        assert ("keeping it" in sites[name].reason) == (choice == 0)
    cut = sites["channels:first"]
    assert cut.site.layers[0] == "first"
    assert set(cut.site.layers) == {"first", "block.conv1", "block.side"}
    assert f"{-cut.chosen.cost.macs:,} MACs" in cut.reason
    assert f"{-cut.chosen.cost.file_bytes:,} bytes" in cut.reason
    assert f"µs at {SHAPE}" in cut.reason
    assert sites["channels:odd"].reason == "left as it is: it is an output of the model"
    assert sites["channels:odd"].site.frozen
    assert "32 bits" in sites["numbers:late"].reason


def test_the_frontier_holds_the_chosen_point_once_in_order():
    points = [solution(c) for c in ((0,) * 10, CHOICES, (2, 1, 1, 3, 1, 1, 1, 1, 1, 1))]
    found = frontier_points(points, points[1], 10_000, 1_000_000, f"latency@{SHAPE}")
    assert [p.chosen for p in found].count(True) == 1
    assert len(found) == 3
    shares = [p.latency_share for p in found]
    assert shares == sorted(shares)
    best = next(p for p in found if p.chosen)
    assert best.size_share == points[1].costs["size"] / 10_000
    assert best.macs_share == points[1].costs["macs"] / 1_000_000
    assert best.error == points[1].error
    without = frontier_points(points[:1], points[1], 10_000, 1_000_000, "")
    assert [p.latency_share for p in without] == [None, None]
    assert [p.size_share for p in without] == sorted(p.size_share for p in without)


def timings(share: Interval) -> Timings:
    timing = Timing(0.001, 0.001, 0.001, 0.001, share, share, 10)
    return Timings("original", "onnxruntime", 1, 2, {COMPRESSED: {SHAPE: timing}}, {SHAPE: share}, "a machine")


@pytest.mark.parametrize(
    ("measured", "state"),
    [
        (Interval(1.0, 0.99, 1.01), "holds"),  # of what was predicted: see below
        (Interval(1.04, 1.03, 1.05), "holds"),  # within 5 %
        (Interval(1.2, 0.9, 1.5), "holds"),  # within the interval
        (Interval(1.2, 1.15, 1.25), "fails"),
        (Interval(0.8, 0.75, 0.85), "fails"),
    ],
)
def test_a_forecast_is_right_within_its_interval_or_5_percent(measured: Interval, state: str):
    chosen = solution(CHOICES)
    predicted = chosen.costs[f"latency@{SHAPE}"]
    scaled = Interval(*(v * predicted for v in (measured.value, measured.low, measured.high)))
    claims = {c.name: c for c in forecasts(chosen, timings(scaled), round(chosen.costs["size"]), None)}
    latency = claims[f"latency ({SHAPE})"]
    assert latency.state == state
    assert (latency.predicted, latency.measured, latency.kind) == (predicted, scaled.value, "forecast")
    assert claims["size"].state == "holds"
    assert set(claims) == {"size", f"latency ({SHAPE})"}


def test_divergence_is_forecast_where_it_was_measured():
    chosen = solution(CHOICES)
    exact = Interval(chosen.error, chosen.error, chosen.error)
    names = {c.name: c.state for c in forecasts(chosen, None, 1, exact)}
    assert names == {"size": "fails", "divergence": "holds"}
    assert "divergence" not in {c.name for c in forecasts(replace(chosen, error=float("inf")), None, 1, exact)}
