"""Prices of options: divergences measured where they are measured, a rising curve between."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flyweight.graph.axes import groups
from flyweight.graph.operators import layers
from flyweight.graph.trace import trace
from flyweight.methods import channels, pricing
from flyweight.methods.pricing import Judge, by_magnitude, fitted, ladder, outputs_of
from flyweight.testing import Subject, small_network, subject

from ..graph.nets import TiedNet


@pytest.fixture(scope="module")
def one() -> Subject:
    return subject(*small_network())


def test_a_judge_takes_the_mean_over_samples_whatever_the_batches():
    batches = [(torch.ones(3, 2),), (torch.full((1, 2), 5.0),)]
    judge = Judge(batches, outputs_of(lambda x: x, batches), lambda a, b: (a - b).square().sum(1))
    assert judge(lambda x: x) == 0
    assert judge(lambda x: 2 * x) == pytest.approx((3 * 2 + 50) / 4)


@pytest.mark.parametrize("waiting", [0, 4_000, 200_000_000])
def test_a_judge_that_begins_behind_finds_what_a_whole_run_finds(one: Subject, monkeypatch, waiting: int):
    """Wherever the batches may wait, in whatever order it is asked."""
    monkeypatch.setattr(pricing, "WAITING_BYTES", waiting)
    for name in [*one.layers, *reversed(one.layers)]:
        changed = copy.deepcopy(one.graph)
        with torch.no_grad():
            changed.get_submodule(name).weight.mul_(0.7)
        assert one.judge.behind(one.graph, [name])(changed) == one.judge(changed) > 0


@pytest.mark.parametrize("name", ["head", "b", "a"])
def test_a_tensor_that_an_earlier_module_shares_is_changed_there_too(name: str):
    batches = [(torch.randint(0, 11, (4, 5)),)]
    graph = trace(TiedNet().eval(), batches[0]).module
    judge = Judge(batches, outputs_of(graph, batches), lambda a, b: (a - b).square().flatten(1).sum(1))
    changed = copy.deepcopy(graph)
    with torch.no_grad():
        changed.get_submodule(name).weight.mul_(0.7)
    assert judge.behind(graph, [name])(changed) == judge(changed) > 0


def test_a_ladder_begins_with_keep_and_rises(one: Subject):
    for group in one.groups.values():
        found = ladder(one.graph, group, one.layers, one.stats, channels.levels(group.size), one.judge)
        assert found.levels[0] == group.size
        assert list(found.levels) == sorted(found.levels, reverse=True)
        assert found.layer_errors[0] == found.errors[0] == 0
        assert len(found.levels) == len(found.layer_errors) == len(found.errors)
        assert all(b >= a for a, b in itertools.pairwise(found.errors)) or not _monotone(found.layer_errors)
        assert found.kept(group.size) == list(range(group.size))
        assert all(len(found.kept(level)) == level for level in found.levels)
        nested = [set(found.kept(level)) for level in found.levels]
        assert all(b < a for a, b in itertools.pairwise(nested))


def _monotone(values) -> bool:
    return all(b >= a for a, b in itertools.pairwise(values))


def test_measured_levels_are_priced_by_what_they_do_to_the_outputs(one: Subject):
    group = one.groups["block.conv1"]
    levels = (6, 4, 2)
    found = ladder(one.graph, group, one.layers, one.stats, levels, one.judge, measured=3)
    for level, layer_error, error in zip(found.levels[1:], found.layer_errors[1:], found.errors[1:], strict=True):
        changed = copy.deepcopy(one.graph)
        refits = channels.refit_readers(one.graph, group, one.layers, one.stats, found.kept(level))
        for name, new in refits.items():
            channels.apply(changed, one.layers[name], new)
        # one factorisation for all levels against one a level: the same doubles in another order
        assert layer_error == pytest.approx(sum(r.error for r in refits.values()), rel=1e-9)
        assert error == pytest.approx(one.judge(changed), rel=1e-6)


def test_pricing_leaves_the_network_alone_and_says_the_same_twice(one: Subject):
    before = {n: t.clone() for n, t in one.graph.state_dict().items()}
    group = one.groups["inner"]
    first, second = (ladder(one.graph, group, one.layers, one.stats, (8, 4), one.judge) for _ in range(2))
    assert (first.gone, first.errors, first.layer_errors) == (second.gone, second.errors, second.layer_errors)
    assert all(torch.equal(t, before[n]) for n, t in one.graph.state_dict().items())


def test_without_compensation_the_smallest_rows_go_first_and_it_costs_more(one: Subject):
    group = one.groups["block.conv2"]  # written by two layers
    rows = sum(one.graph.get_submodule(p).weight.detach().double().flatten(1).square().sum(1) for p in group.producers)
    plain = ladder(one.graph, group, one.layers, one.stats, (6, 4), one.judge, compensate=False)
    assert list(plain.gone) == rows.argsort().tolist()[:-1] == list(by_magnitude(one.graph, group))
    best = ladder(one.graph, group, one.layers, one.stats, (6, 4), one.judge)
    assert all(a < b for a, b in zip(best.layer_errors[1:], plain.layer_errors[1:], strict=True))


def test_the_curve_passes_through_what_was_measured():
    found = {0.0: 0.0, 0.1: 0.02, 0.3: 0.05, 2.0: 1.0}
    curve = fitted(found)
    for error, divergence in found.items():
        assert curve(error) == pytest.approx(divergence, rel=1e-9)


def test_between_two_points_the_curve_is_straight_in_logarithms():
    curve = fitted({0.1: 0.01, 0.9: 0.81})  # divergence = error squared
    assert curve(0.3) == pytest.approx(0.09)


def test_outside_the_power_stays_between_reason():
    steep, flat = fitted({0.1: 1e-6, 0.2: 1.0}), fitted({0.1: 0.9, 0.2: 1.0})
    assert steep(0.4) == pytest.approx(2**1.5)
    assert steep(0.05) == pytest.approx(1e-6 / 2**1.5)
    assert flat(0.4) == pytest.approx(2**0.7)
    assert flat(0.05) == pytest.approx(0.9 / 2**0.7)


def test_one_point_is_a_line_through_zero_and_none_is_nothing():
    assert fitted({0.5: 0.1})(1.0) == pytest.approx(0.2)
    assert fitted({0.0: 0.0})(3.0) == 0
    assert fitted({0.0: 0.0, 0.5: 0.1})(0.0) == 0


@given(
    st.lists(st.tuples(st.floats(1e-9, 1e3), st.floats(0, 1e3)), min_size=1, max_size=6),
    st.lists(st.floats(0, 1e4), min_size=2, max_size=8),
)
def test_the_curve_never_falls_and_is_finite_whatever_was_measured(points, asked):
    curve = fitted(dict(points))
    values = [curve(e) for e in sorted(asked)]
    assert all(math.isfinite(v) and v >= 0 for v in values)
    assert all(b >= a * (1 - 1e-9) for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("kind", ["small", "tied"])
def test_a_trial_shares_what_it_does_not_touch_and_touches_nothing_that_it_shares(one: Subject, kind: str):
    """A whole copy for every price would be a model's size each; tied tensors count as touched under every name."""
    example = (torch.randint(0, 11, (2, 6)),)
    graph = one.graph if kind == "small" else trace(TiedNet().eval(), example).module
    found = one.groups.values() if kind == "small" else [g for g in groups(graph, example) if g.consumers]
    assert found
    for group in found:
        changed = pricing._copy(graph, group, layers(graph))
        own = {n for use in group.consumers for n in (use.layer, layers(graph)[use.layer].norm)}
        touched = {id(t) for name, t in _named(graph) if name.rpartition(".")[0] in own}
        before = {name: t.clone() for name, t in _named(graph)}
        for (name, tensor), (_, known) in zip(_named(changed), _named(graph), strict=True):
            assert (tensor is known) == (id(known) not in touched), name
            if tensor is not known:
                tensor.data.add_(1)
        assert all(torch.equal(t, before[name]) for name, t in _named(graph))


def _named(graph: torch.fx.GraphModule) -> list[tuple[str, torch.Tensor]]:
    return [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)]
