"""Two ways to weigh a cut: each is right somewhere, and what measures better is kept."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flyweight.graph.axes import Group, Use
from flyweight.graph.measure import Sensed, measure
from flyweight.graph.operators import layers
from flyweight.graph.sense import sense
from flyweight.methods import channels
from flyweight.methods.pricing import tried
from flyweight.stages import quote, weighing
from flyweight.stages.deliver import Network
from flyweight.stages.weighing import better, moments_of, sensitivities, together
from flyweight.testing import Subject, small_network, subject

LEVELS = (3, 2, 1)


class Ignoring(nn.Module):
    """The last layer reads the first of the reader's two outputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.reader, self.last = (nn.Linear(*size, bias=False) for size in ((4, 4), (4, 2), (2, 3)))
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(4))
            self.reader.weight.copy_(torch.tensor([[1.0, 0.5, 0.1, 0.2], [0.0, 0.0, 10.0, 20.0]]))
            self.last.weight.copy_(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.5, 0.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.reader(self.first(x)))


@pytest.fixture
def ignoring() -> Subject:
    x = torch.cat([torch.eye(4), -torch.eye(4)]).repeat(64, 1)  # no channel can stand in for another
    return subject(Ignoring().eval(), [(x,)])


def sensed_of(one: Subject) -> dict[str, Sensed]:
    return sense(one.graph, one.batches, one.layers, "regress", samples=512)


def network_of(one: Subject) -> Network:
    return Network(one.graph, one.layers, one.groups, one.stats, one.example)


def test_what_the_outputs_ignore_does_not_decide_what_goes(ignoring: Subject):
    """Channels do not correlate, so the loss of one is its weight's square in what counts: .01, .04, .25, 1."""
    group = ignoring.groups["first"]
    found = sensed_of(ignoring)
    sensitive = replace(ignoring.stats, sensed=found)
    assert channels.order(ignoring.graph, group, ignoring.layers, ignoring.stats) == (1, 0, 2)
    assert channels.order(ignoring.graph, group, ignoring.layers, sensitive) == (2, 3, 1)
    assert torch.allclose(found["reader"].outputs[1], torch.zeros(2).double())
    (lad,) = better(network_of(ignoring), found, [group], [LEVELS], ignoring.judge)
    assert lad.sensed
    assert lad.gone == (2, 3, 1)
    weight = (1.0 + 4.0 + 0.25) / 4  # of the last layer, and every channel is a quarter of the samples
    # shrinkage may move what is left by as much as its floor
    assert lad.errors[1] == pytest.approx(0.01 * weight, rel=0.01)
    assert lad.errors[2] == pytest.approx(0.05 * weight, rel=0.01)


def test_what_measures_worse_is_not_taken(ignoring: Subject):
    """A sensitivity that says the opposite: the plain way is tried as well, and stays."""
    group, found = ignoring.groups["first"], sensed_of(ignoring)
    wrong = {"reader": replace(found["reader"], outputs=torch.diag(torch.tensor([1e-6, 1.0])).double())}
    small = copy.deepcopy(ignoring.graph)
    with torch.no_grad():
        small.get_submodule("reader").weight[1] *= 0.001  # without the ignored row the plain way is right
    one = subject(small, list(ignoring.batches))
    (lad,) = better(network_of(one), wrong, [one.groups["first"]], [LEVELS], one.judge)
    assert not lad.sensed
    assert lad.gone == (2, 3, 1)
    assert group.size == 4


def test_the_way_taken_is_never_worse_at_the_level_measured():
    one = subject(*small_network())
    found = sense(one.graph, one.batches, one.layers, "classify", samples=64)
    taken = set()
    for some in together(list(one.groups.values())):
        offers = [channels.levels(group.size) for group in some]
        ladders = better(network_of(one), found, some, offers, one.judge)
        ways = {
            way: [tried(one.graph, g, one.layers, stats, o, one.judge) for g, o in zip(some, offers, strict=True)]
            for way, stats in ((False, one.stats), (True, replace(one.stats, sensed=found)))
        }
        sums = {way: sum(sum(t.found.values()) for t in trials) for way, trials in ways.items()}
        assert len({lad.sensed for lad in ladders}) == 1
        assert sums[ladders[0].sensed] == min(sums.values())
        assert [lad.gone for lad in ladders] == [t.gone for t in ways[ladders[0].sensed]]
        taken.add(ladders[0].sensed)
    assert taken == {False, True}  # or this test would say nothing about one of them


def test_a_sensitive_ladder_prices_what_its_steps_deliver(ignoring: Subject):
    """The price of a level is the divergence of the network that `restructure` makes of its step."""
    found = sensed_of(ignoring)
    network = network_of(ignoring)
    group = ignoring.groups["first"]
    (lad,) = better(network, found, [group], [LEVELS], ignoring.judge)
    stats = replace(network.stats, sensed=found)
    for level, error in zip(lad.levels[1:], lad.errors[1:], strict=True):
        step = channels.step(group, lad.kept(level), sensed=lad.sensed)
        assert step.setting["sensed"] is True
        made = channels.restructure(ignoring.graph, ignoring.groups, ignoring.layers, stats, [step])
        assert ignoring.judge(made) == pytest.approx(error, rel=1e-6)


def group_of(name: str, *readers: str) -> Group:
    one = subject(*small_network()).groups["inner"]
    return replace(one, name=name, consumers=tuple(Use(r, np.zeros((one.size, 1), dtype=np.int64)) for r in readers))


def test_groups_that_share_a_reader_decide_together():
    found = [
        group_of("a", "x"),
        group_of("b", "y"),
        group_of("c", "z", "x"),
        group_of("d", "w"),
        group_of("e", "y", "z"),
    ]
    assert [[g.name for g in some] for some in together(found)] == [["a", "b", "c", "e"], ["d"]]
    assert together([]) == []


def test_a_group_with_a_reader_of_unknown_sensitivity_stays_plain(ignoring: Subject):
    (lad,) = better(network_of(ignoring), {}, [ignoring.groups["first"]], [LEVELS], ignoring.judge)
    assert not lad.sensed


def test_rounding_and_ranks_do_not_see_sensitivities(ignoring: Subject):
    """`inputs` stays what was measured, whatever cuts are made up for with."""
    stats = replace(ignoring.stats, sensed=sensed_of(ignoring))
    assert stats.inputs is ignoring.stats.inputs
    assert torch.equal(stats.for_cuts("reader").gram, stats.sensed["reader"].inputs.gram.double())
    assert set(stats.sensed) == set(layers(ignoring.graph))


class Shelf(dict):
    """A store in memory that says what was asked of it."""

    def save(self, name: str, payload: bytes) -> None:
        self[name] = payload

    def load(self, name: str) -> bytes | None:
        return self.get(name)


def job_of(one: Subject) -> SimpleNamespace:
    """What `sensitivities` looks at in a job."""
    return SimpleNamespace(
        graph=one.graph,
        calib=lambda: iter(one.batches),
        roles=SimpleNamespace(calib=SimpleNamespace(samples=sum(len(b[0]) for b in one.batches))),
        yardstick=SimpleNamespace(task="regress"),
        settings=SimpleNamespace(seed=0),
    )


def test_sensitivities_kept_are_those_measured(ignoring: Subject):
    shelf, groups = Shelf(), list(ignoring.groups.values())
    stages = []

    def stage(name: str, total: int):
        stages.append(name)
        return lambda count: None

    first, notes = sensitivities(job_of(ignoring), ignoring.layers, groups, shelf, stage)
    again, _ = sensitivities(job_of(ignoring), ignoring.layers, groups, shelf, stage)
    assert not notes
    assert stages == ["measure sensitivity"]  # once
    assert set(first) == {use.layer for g in groups for use in g.consumers}
    for name, one in first.items():
        assert torch.equal(one.outputs, again[name].outputs)
        assert torch.equal(one.inputs.gram, again[name].inputs.gram)
        assert torch.equal(one.inputs.mean, again[name].inputs.mean)
        assert one.inputs.count == again[name].inputs.count


class Deciding(nn.Module):
    """Answers 0 or 1, with nothing to slide down on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.last(torch.relu(self.first(x))) > 0).float()


def test_a_model_without_gradients_is_cut_the_plain_way_and_says_so():
    one, shelf = subject(Deciding().eval(), [(torch.randn(32, 4),)]), Shelf()
    found, notes = sensitivities(
        job_of(one), one.layers, list(one.groups.values()), shelf, lambda *_: lambda count: None
    )
    assert not found
    assert not shelf
    assert [note.code for note in notes] == ["measure.no-gradients"]
    assert "gradient" in notes[0].text


@pytest.mark.parametrize(("macs", "every"), [(math.inf, 1), (0, 4)])
def test_moments_are_those_of_samples_spread_over_calib(macs: float, every: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weighing, "MEASURE_MACS", macs)
    monkeypatch.setattr(weighing, "LEAST_MEASURED", 16)
    told, x = [], torch.randn(61, 4)
    one = subject(Ignoring().eval(), [(x,)])
    calib = SimpleNamespace(samples=len(x))
    job = SimpleNamespace(
        graph=one.graph, calib=lambda: [(part,) for part in x.split(7)], roles=SimpleNamespace(calib=calib)
    )
    found = moments_of(job, one.layers, lambda name, total: told.append(total) or told.append)
    expected = measure(one.graph, [(x[::every],)], one.layers, samples=len(x[::every]))
    assert found.samples == told[0] == sum(told[1:]) == len(x[::every])
    for name, moments in expected.inputs.items():
        # the same rows in another order of merging, in doubles
        assert torch.allclose(found.inputs[name].gram, moments.gram, rtol=1e-9, atol=1e-11)
    said = [
        note.text for note in quote._samples_notes(job, SimpleNamespace(stats=found)) if note.code == "measure.part"
    ]
    assert len(said) == (every > 1)
    assert all(f"on {found.samples} of the {len(x)} calibration samples" in text for text in said)
