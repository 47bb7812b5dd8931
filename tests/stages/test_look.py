"""`inspect`: what is said of layers and groups, and every number of the sensitivity against a direct measurement."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F

import flyweight as fw
from flyweight.data import roles
from flyweight.errors import DataError, UsageError
from flyweight.graph.axes import groups
from flyweight.graph.measure import measure
from flyweight.graph.operators import layers
from flyweight.graph.trace import trace
from flyweight.methods import channels, criteria
from flyweight.stages.look import Inspection
from flyweight.stages.sensitivity import agreement
from flyweight.testing import small_network
from flyweight.types import from_json, to_json


@pytest.fixture(scope="module")
def given() -> tuple[nn.Module, torch.Tensor]:
    model, batches = small_network()
    return model, torch.cat([x for (x,) in batches])


@pytest.fixture(scope="module")
def found(given) -> Inspection:
    model, x = given
    return fw.inspect(model, calib=x, sensitivity=True, progress=False)


@pytest.fixture(scope="module")
def parts(given):
    """The traced network with groups, statistics and the samples to judge on, made again by hand."""
    model, x = given
    graph = trace(model, (x[:32],)).module
    data = roles(model, calib=x, seed=0)
    present = layers(graph)
    stats = measure(graph, (batch.inputs for batch in data.calib), present)
    return graph, {g.name: g for g in groups(graph, (x[:2],))}, present, stats, data


def test_structure_alone_says_what_data_would_add(given):
    model, x = given
    plain = fw.inspect(model, example=x[:2], progress=False)
    assert not plain.notes
    asked = fw.inspect(model, example=x[:2], sensitivity=True, progress=False)
    assert [note.code for note in asked.notes] == ["inspect.no-data"]
    assert "--calib" in asked.notes[0].fix
    assert asked.groups == plain.groups
    assert all(not group.levels and not group.criteria for group in plain.groups)
    assert fw.inspect(model, calib=x, progress=False).groups == plain.groups  # its first batch is the example


def test_layers_are_the_modules_with_their_mass(given, found):
    model, _ = given
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert [layer.name for layer in found.layers] == list(modules)
    for layer in found.layers:
        weight = modules[layer.name].weight.detach().double()
        assert layer.shape == tuple(weight.shape)
        assert layer.parameters == weight.numel()
        assert layer.l1 == pytest.approx(float(weight.abs().sum()))
        assert layer.l2 == pytest.approx(float(weight.square().sum().sqrt()))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.macs == sum(layer.macs for layer in found.layers)


def test_groups_say_what_can_be_cut_and_why_not(found):
    verdicts = {group.name: group.frozen for group in found.groups}
    assert [name for name, why in verdicts.items() if not why] == ["first", "block.conv1", "block.conv2", "inner"]
    assert verdicts["last"] == "it is an output of the model"
    assert {group.name for group in found.groups if group.levels} == {n for n, why in verdicts.items() if not why}


def test_divergences_are_those_of_a_network_that_was_really_cut(found, parts):
    graph, known, present, stats, data = parts
    judged = [batch.inputs for batch in data.tune]
    assert found.samples == {"calib": data.calib.samples, "judged": data.tune.samples}
    for look in found.groups:
        if not look.levels:
            continue
        group = known[look.name]
        gone = channels.order(graph, group, present, stats)
        for level in look.levels:
            kept = channels.kept_channels(group, gone, level.channels)
            smaller = channels.restructure(graph, known, present, stats, [channels.step(group, kept)])
            with torch.no_grad():
                pairs = [(graph(*x).double().log_softmax(1), smaller(*x).double().log_softmax(1)) for x in judged]
            rises = torch.cat([F.kl_div(q, p, reduction="none", log_target=True).sum(1) for p, q in pairs])
            # float32 networks whose sums run in another order: divergences of 1e-6 and more to 1 %
            assert level.divergence == pytest.approx(float(rises.mean()), rel=0.01, abs=1e-9)


def test_levels_are_shares_of_the_channels_and_lose_more_and_more(found):
    for look in found.groups:
        counts = [level.channels for level in look.levels]
        assert counts == sorted(set(counts), reverse=True)
        assert all(0 < count < look.channels for count in counts)
        for reader in look.consumers if counts else ():
            shares = [level.errors[reader] for level in look.levels]
            assert shares == sorted(shares)
            assert all(0 <= share <= 1 for share in shares)
    by_size = {look.channels: [level.channels for level in look.levels] for look in found.groups if look.levels}
    assert by_size == {6: [5, 4, 3, 2], 8: [7, 6, 4, 2], 12: [10, 9, 6, 3]}


def test_dropped_by_hand(found, parts):
    """The plain choice by magnitude in the last layer: mean of the squared change over the samples, by running them."""
    graph, data = parts[0], parts[-1]
    scores = graph.inner.weight.square().sum(1) + graph.last.weight.square().sum(0)
    gone = scores.argsort()[:6]
    x = torch.cat([batch.inputs[0] for batch in data.calib])
    seen: list[torch.Tensor] = []
    probe = copy.deepcopy(graph)
    probe.last.register_forward_pre_hook(lambda _, given: seen.append(given[0].double()))
    with torch.no_grad():
        probe(x)
        weight = graph.last.weight.double()
        change = (seen[0][:, gone] @ weight[:, gone].T).square().sum(1).mean()
        power = (seen[0] @ weight.T).square().sum(1).mean()
    look = next(one for group in found.groups if group.name == "inner" for one in group.criteria if one.name == "l2")
    assert look.dropped == pytest.approx(float(change / power), rel=1e-5)  # moments of float32 rows


def test_every_criterion_is_weighed_or_says_why_not(found):
    for look in found.groups:
        if not look.levels:
            assert look.criteria == ()
            continue
        assert [one.name for one in look.criteria] == list(criteria.ALL)
        for one in look.criteria:
            if one.missing:
                assert (one.dropped, one.refitted, one.agreement) == (None, None, None)
                assert (one.name, look.name) in {("norm_scale", "first"), ("norm_scale", "inner")}
            else:
                assert one.refitted <= one.dropped
                assert -1 <= one.agreement <= 1
        by_name = {one.name: one for one in look.criteria}
        assert by_name["full"].agreement == 1
        assert by_name["full"].refitted <= by_name["random"].refitted
        half = next(level for level in look.levels if level.channels == look.channels // 2)
        assert by_name["full"].refitted == pytest.approx(sum(half.errors.values()) / len(half.errors), rel=1e-6)


def test_agreement_is_spearmans(found):
    draw = np.random.default_rng(0)
    for size in (2, 5, 40):
        a, b = (torch.from_numpy(draw.integers(0, 9, size).astype(float)) for _ in range(2))
        if len(set(a.tolist())) > 1 and len(set(b.tolist())) > 1:
            assert agreement(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert agreement(torch.ones(4), torch.arange(4.0)) == 0  # scipy warns and says NaN, which is no JSON
    assert list(found.agreement) == list(criteria.ALL)
    for a, row in found.agreement.items():
        assert row[a] == pytest.approx(1)
        assert all(found.agreement[b][a] == pytest.approx(value) for b, value in row.items())


def test_a_look_is_one_json_object_and_the_same_each_time(given, found):
    model, x = given
    before = copy.deepcopy(model.state_dict())
    again = fw.inspect(model, calib=x, sensitivity=True, progress=False)
    assert to_json(again) == to_json(found)
    assert from_json(to_json(found), Inspection) == found
    assert json.loads(to_json(found))["schema_version"] == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    other = fw.inspect(model, calib=x, sensitivity=True, seed=1, progress=False)
    assert to_json(other) != to_json(found)


def test_a_divergence_of_ones_own_counts(given):
    model, x = given

    def twice(expected, got):
        return 2 * (expected - got).square().sum(1)

    own = fw.inspect(model, calib=x, sensitivity=True, task="custom", divergence=twice, progress=False)
    assert own.task == "custom"
    assert all(level.divergence > 0 for group in own.groups for level in group.levels)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({}, UsageError, "what a call of the model looks like"),
        ({"example": torch.zeros(2, 5)}, DataError, "does not run on these inputs"),
        (
            {"calib": torch.zeros(40, 3, 10, 10), "task": "custom", "sensitivity": True},
            UsageError,
            "needs a divergence",
        ),
    ],
)
def test_mistakes_are_told(given, arguments, kind, words):
    with pytest.raises(kind, match=words) as caught:
        fw.inspect(given[0], **arguments, progress=False)
    assert caught.value.fix


def test_a_model_must_be_a_module():
    with pytest.raises(UsageError, match=r"not a torch\.nn\.Module"):
        fw.inspect(lambda x: x, example=torch.zeros(2, 3), progress=False)


def test_where_nothing_can_be_cut_it_is_said():
    found = fw.inspect(nn.Sequential(nn.Linear(4, 3)), calib=torch.randn(40, 4), sensitivity=True, progress=False)
    assert found.agreement == {}
    assert "inspect.nothing-open" in [note.code for note in found.notes]


class Gated(nn.Module):
    """The gate hears nothing but a constant, so the variance of what it says is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.b = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.b(h * torch.sigmoid(self.gate(torch.relu(h) * 0 + 1)))


def test_shares_stay_shares_where_a_layer_says_the_same_to_every_sample():
    torch.manual_seed(0)
    found = fw.inspect(Gated(), calib=torch.randn(200, 4), sensitivity=True, progress=False)
    looks = [one for group in found.groups for one in group.criteria if one.dropped is not None]
    assert all(one.dropped < 10 for one in looks)


def test_a_criterion_that_scores_all_channels_alike_says_so():
    """Fresh batch norms all have the scale 1: any order of the channels would do."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    found = fw.inspect(model, calib=torch.randn(64, 4), sensitivity=True, progress=False)
    (look,) = [one for group in found.groups for one in group.criteria if one.name == "norm_scale"]
    assert look.missing == "it gives every channel the same score"
    assert look.agreement is None
    assert "norm_scale" not in found.agreement


class TwoAnswers(nn.Module):
    """A mask, and a class that nobody looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.mask, self.cls = nn.Linear(4, 8), nn.Linear(8, 5), nn.Linear(8, 3)

    def forward(self, x):
        h = torch.relu(self.a(x))
        return {"mask": self.mask(h), "cls": self.cls(h)}


def test_outputs_that_nothing_judges_are_named():
    found = fw.inspect(TwoAnswers(), calib=torch.randn(64, 4), sensitivity=True, progress=False)
    (note,) = [note for note in found.notes if note.code == "data.outputs"]
    assert note.where == "cls"
    assert "(mask)" in note.text


class Severed(nn.Module):
    """The answer has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(torch.relu(self.a(x))).detach()


def test_without_gradients_taylor_alone_is_missing():
    torch.manual_seed(0)
    found = fw.inspect(Severed(), calib=torch.randn(200, 4), sensitivity=True, progress=False)
    assert "inspect.no-gradients" in [note.code for note in found.notes]
    (group,) = [one for one in found.groups if one.levels]
    assert {one.name for one in group.criteria if one.missing} == {"taylor", "norm_scale"}
    assert "taylor" not in found.agreement
