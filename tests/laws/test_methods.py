"""Our own methods keep every law; methods that break one are told which."""

from __future__ import annotations

import copy
from functools import cache

import msgspec
import pytest
import torch

from flyweight.methods import channels, int8
from flyweight.testing import CHANNELS, INT8, LOWRANK, Method, Subject, laws, small_network, subject
from flyweight.types import Cost

METHODS = {m.name: m for m in (CHANNELS, LOWRANK, INT8)}


@cache
def small() -> Subject:
    return subject(*small_network())


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_every_law(name: str, law):
    law(METHODS[name], small())


def test_the_small_network_has_every_kind_of_site():
    one = small()
    assert set(one.groups) == {"first", "block.conv1", "block.conv2", "inner"}
    assert {layer.kind for layer in one.layers.values()} == {"Conv2d", "Linear"}
    assert {bool(layer.norm) for layer in one.layers.values()} == {True, False}


def broken(law, method: Method, part: str) -> None:
    with pytest.raises(AssertionError, match=part):
        law(method, small())


def with_options(edit) -> Method:
    """channels, whose options are edited."""

    def propose(one):
        return {
            site: tuple(edit(i, o) for i, o in enumerate(offered)) for site, offered in CHANNELS.propose(one).items()
        }

    return CHANNELS._replace(name="edited", propose=propose)


def costlier(by: Cost):
    return lambda i, o: msgspec.structs.replace(
        o, cost=Cost(macs=o.cost.macs + by.macs * (i > 0), weight_bytes=o.cost.weight_bytes + by.weight_bytes * (i > 0))
    )


def test_a_keep_that_costs_is_told():
    broken(
        laws.keep_is_free, with_options(lambda i, o: msgspec.structs.replace(o, layer_error=o.layer_error + 1)), "keep"
    )


def test_a_wrong_count_of_macs_is_told():
    broken(laws.costs_are_exact, with_options(costlier(Cost(macs=1))), "MACs, counted")


def test_a_wrong_count_of_bytes_is_told():
    broken(laws.costs_are_exact, with_options(costlier(Cost(weight_bytes=4))), "bytes, stored")


def test_a_layer_error_off_by_a_ten_thousandth_is_told():
    edit = lambda i, o: msgspec.structs.replace(o, layer_error=o.layer_error * 1.0001)  # noqa: E731
    broken(laws.layer_errors_are_true, with_options(edit), "measured")


def test_a_limit_that_changes_something_is_told():
    worse = CHANNELS._replace(
        limit=lambda one, site: CHANNELS.apply(one, [channels.step(next(iter(one.groups.values())), [0])])
    )
    broken(laws.limit_is_the_original, worse, "limit")


def test_a_smaller_setting_that_costs_more_is_told():
    def propose(one):
        return {site: (offered[0], *reversed(offered[1:])) for site, offered in CHANNELS.propose(one).items()}

    broken(laws.smaller_never_costs_more, CHANNELS._replace(propose=propose), "costs more")


def test_a_method_that_works_on_the_network_itself_is_told():
    one = small()._replace(graph=copy.deepcopy(small().graph))

    def apply(own, steps):
        for name, layer in own.layers.items():
            int8.round_weights(own.graph, layer, own.stats)
            assert name
        return own.graph

    with pytest.raises(AssertionError, match="was changed"):
        laws.inputs_stay_unchanged(CHANNELS._replace(apply=apply), one)


def test_a_method_that_shares_memory_with_the_network_is_told():
    one = small()._replace(graph=copy.deepcopy(small().graph))

    def apply(own, steps):
        made = copy.deepcopy(own.graph)
        made.first.bias = own.graph.first.bias
        return made

    with pytest.raises(AssertionError, match="was changed"):
        laws.inputs_stay_unchanged(CHANNELS._replace(apply=apply), one)


def test_a_method_that_throws_dice_is_told():
    def apply(one, steps):
        made = CHANNELS.apply(one, steps)
        with torch.no_grad():
            made.last.bias.add_(torch.randn(()))
        return made

    broken(laws.nothing_is_left_to_chance, CHANNELS._replace(apply=apply), "two runs")
    broken(laws.replay_is_bit_identical, CHANNELS._replace(apply=apply), "replayed")


def test_plain_removal_and_plain_rounding_keep_the_error_law_too():
    def change(method, make):
        return method._replace(change=lambda one, steps: method.change(one, [make(one, s) for s in steps]))

    one = small()
    exact = laws.in_double(one)
    plain_channels = change(CHANNELS, lambda s, step: channels.step(s.groups[step.target], step.setting["kept"], False))
    for group in exact.groups.values():
        kept = list(range(group.size // 2))
        step = channels.step(group, kept, False)
        refits = channels.refit_readers(exact.graph, group, exact.layers, exact.stats, kept, False)
        measured, _ = laws._layer_change(*plain_channels.change(exact, [step]), exact.batches)
        assert sum(r.error for r in refits.values()) == pytest.approx(measured, rel=1e-6)
    for name in exact.layers:
        before, after = INT8.change(exact, [int8.step(name, False)])
        quoted = int8.round_weights(copy.deepcopy(before), laws.layers(before)[name], exact.stats, False)[1]
        measured, _ = laws._layer_change(before, after, exact.batches)
        assert quoted == pytest.approx(measured, rel=1e-6)
