"""Batches wait where few numbers are alive; what a layer is shown does not depend on where that is."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flyweight.graph import flow
from flyweight.graph.flow import Flow, affordable, chunked, split, thinned
from flyweight.graph.operators import layers
from flyweight.graph.trace import trace
from flyweight.recover.resolve import resolve

from .nets import net

MOST = (0, 10, 40, 100, math.inf)  # numbers of a sample that may wait


def wide() -> nn.Module:
    """A stream of 8 beside something of 64, with an operator that writes into what it is given."""

    def forward(self, x):
        x = self.first(x)
        y = F.hardswish(self.up(x), inplace=True)  # twice is not once
        return self.last(x + self.down(y))

    parts = {"first": nn.Linear(6, 8), "up": nn.Linear(8, 64), "down": nn.Linear(64, 8), "last": nn.Linear(8, 3)}
    return net(forward, **parts).eval()


def world() -> tuple[torch.fx.GraphModule, list[tuple[torch.Tensor, ...]]]:
    rows = [(torch.randn(count, 6),) for count in (7, 4, 9)]
    return trace(wide(), rows[0]).module, rows


@pytest.mark.parametrize("most", MOST)
def test_every_layer_is_shown_what_a_plain_run_feeds_it(most: float):
    graph, rows = world()
    fed: dict[str, list[torch.Tensor]] = {name: [] for name in layers(graph)}
    probe = copy.deepcopy(graph)
    for name in fed:
        probe.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: fed[name].append(x[0].clone()))
    walk = Flow(graph, rows, most)
    with torch.no_grad():
        for x in rows:
            probe(*x)
        for node in [n for n in graph.graph.nodes if n.op == "call_module" and n.target in fed]:
            walk.reach(node)
            for _ in range(2):  # a second look finds what the first did
                shown = [values[node.args[0]] for values in walk.look(node)]
                assert all(torch.equal(a, b) for a, b in zip(shown, fed[str(node.target)], strict=True))


@pytest.mark.parametrize("most", MOST)
def test_no_more_waits_than_may(most: float):
    graph, rows = world()
    walk = Flow(graph, rows, most)
    with torch.no_grad():
        for node in graph.graph.nodes:
            if node.op != "output":
                walk.reach(node)
                inputs = {n for n in graph.graph.nodes if n.op == "placeholder"}
                for values, (x,) in zip(walk.waiting, rows, strict=True):
                    waiting = sum(v.numel() for n, v in values.items() if n not in inputs)
                    assert waiting <= most * len(x)


def test_a_network_is_fitted_alike_however_little_may_wait(monkeypatch: pytest.MonkeyPatch):
    graph, _ = world()
    rows = [(torch.randn(64, 6),) for _ in range(6)]
    worse = copy.deepcopy(graph)
    with torch.no_grad():
        worse.get_submodule("down").weight[:, ::2] = 0
    found = []
    for memory in (1, 6 * 64 * 2 * 4 * 20, 1e9):
        monkeypatch.setattr(flow, "MEMORY_BYTES", memory)
        found.append(resolve(worse, graph, {}, rows).state_dict())
    assert all(torch.equal(t, other[name]) for name, t in found[0].items() for other in found[1:])


def test_recomputing_is_paid_for_in_samples(monkeypatch: pytest.MonkeyPatch):
    """Closed form: with nothing kept every layer's look runs all layers before it; with all kept each runs once."""
    graph, _ = world()
    rows = [(torch.randn(10, 6),)] * 100
    macs = [6 * 8, 8 * 64, 64 * 8]  # the last layer is never run
    once, again = sum(macs), sum(sum(macs[:i]) for i in range(1, 4))
    for memory, work in ((1e9, once), (0, again)):
        monkeypatch.setattr(flow, "MEMORY_BYTES", memory)
        monkeypatch.setattr(flow, "WORK_MACS", 2 * 70 * work)
        assert sum(len(x) for (x,) in affordable(graph, rows)[0]) == 70


@pytest.mark.parametrize("at_once", [1, 200, 100_000])
def test_chunks_are_the_same_samples_few_enough_at_once(monkeypatch, at_once: int):
    graph, rows = world()
    monkeypatch.setattr(flow, "AT_ONCE", at_once)
    parts = list(chunked(graph, rows))
    assert torch.equal(torch.cat([x for (x,) in parts]), torch.cat([x for (x,) in rows]))
    assert all(len(x) <= max(1, at_once // 72) for (x,) in parts)  # the stream and the wide part: 8 + 64
    assert len(parts) == sum(math.ceil(len(x) / max(1, at_once // 72)) for (x,) in rows)


def test_what_has_no_rows_goes_with_every_part():
    x, table = torch.arange(5), torch.randn(3, 2)
    parts = list(split((x, table), 2))
    assert [part[0].tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    assert all(part[1] is table for part in parts)


@pytest.mark.parametrize("every", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("sizes", [[20], [7, 4, 9], [1] * 20])
def test_every_nth_sample_is_taken_however_they_are_batched(every: int, sizes: list[int]):
    x, table = torch.arange(20), torch.randn(30, 2)
    parts = list(thinned(((part, table) for part in x.split(sizes)), every))
    assert torch.cat([part for part, _ in parts]).tolist() == list(range(0, 20, every))
    assert all(len(part) and beside is table for part, beside in parts)
