"""Advice before work: its numbers against independent counts, and what it says where nothing can be gained."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import flyweight as fw
import shortclock
from flyweight.deploy import runtimes
from flyweight.graph.operators import layers
from flyweight.graph.trace import trace
from flyweight.stages import advise as advising
from flyweight.stages.advise import Advice, Way
from flyweight.testing import small_network
from flyweight.types import from_json, to_json


@pytest.fixture(scope="module", autouse=True)
def _short_clock():
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in shortclock.places():
            patch.setattr(module, name, value)
        yield


@pytest.fixture(scope="module")
def given() -> tuple[nn.Module, torch.Tensor]:
    model, batches = small_network()
    return model, torch.cat([x for (x,) in batches])


@pytest.fixture(scope="module")
def found(given) -> Advice:
    model, x = given
    return fw.advise(model, calib=x, progress=False)


def test_every_method_is_measured_in_every_installed_runtime(found: Advice):
    assert {(one.method, one.runtime) for one in found.ways} == {
        (method, name) for method in ("channels", "int8") for name in runtimes.names()
    }
    assert next(iter(found.float_share)) == "onnxruntime"
    assert found.float_share["onnxruntime"] == 1.0
    assert all(one.latency > 0 and one.size > 0 for one in found.ways)
    assert from_json(to_json(found), Advice) == found


def test_what_it_counts_is_what_is_there(found: Advice, given):
    model, x = given
    macs = {name: one.macs for name, one in layers(trace(model, (x[:2],)).module).items()}
    assert found.largest == max(macs, key=lambda name: macs[name])
    assert found.largest_share == pytest.approx(macs[found.largest] / sum(macs.values()))
    assert found.open_macs == pytest.approx(1.0)  # all of this network's layers read or write channels that may go


def test_only_what_was_judged_has_a_divergence_and_test_items_follow_from_changed_answers(found: Advice):
    rounded = [one for one in found.ways if one.method == "int8"]
    assert len({(one.divergence, one.changed) for one in rounded}) == 1  # one graph, whatever runs it
    assert all(one.divergence is None for one in found.ways if one.method == "channels")
    changed = rounded[0].changed
    assert changed is not None
    # at p changed answers a paired drop has a standard error of sqrt(p / n) at most: as wide as one point at
    expected = math.ceil((1.96 / 0.01) ** 2 * max(changed, 1 / advising.LOOKED_AT))
    assert found.test_items == expected


def test_where_nothing_is_open_it_says_so(given):
    model, x = given
    found = fw.advise(model, calib=x, keep=["*"], progress=False)
    assert all(one.method == "channels" for one in found.ways)
    assert "int8" not in found.verdict


@pytest.mark.parametrize(
    ("ways", "plain", "verdict"),
    [
        ((Way("int8", "a", 0.3, 0.5),), {"a": 1.0}, "int8 in a takes 50%"),
        ((Way("int8", "a", 0.3, 0.5), Way("int8", "b", 0.3, 0.6)), {"a": 1.0, "b": 0.5}, "int8 in b"),
        ((Way("int8", "a", 0.3, 1.2),), {"a": 1.0, "b": 0.5}, "another runtime: b"),
        ((Way("int8", "a", 0.3, 1.2),), {"a": 1.0}, "smaller"),
        ((Way("int8", "a", 1.1, 1.2),), {"a": 1.0}, "nothing to gain here"),
        ((), {"a": 1.0}, "nothing to gain here"),
        ((Way("channels", "a", 1.0, 0.98),), {"a": 1.0}, "deeper cuts than to 75%"),
    ],
)
def test_the_verdict_is_what_the_numbers_say(ways, plain, verdict):
    assert verdict in advising._verdict(ways, plain)
