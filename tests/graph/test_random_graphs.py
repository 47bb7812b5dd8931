"""The law of every cut on networks that nobody thought of: what is gone might as well be zero."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flyweight.graph.axes import groups
from flyweight.graph.trace import trace
from flyweight.testing import cuts
from flyweight.testing.cuts import check_cuts
from flyweight.testing.random_networks import random_network

from .odd import subject

SEEDS = range(5000, 5100)  # benchmarks/random_graphs.py runs many more
IN_ONNX = set(SEEDS[::50])


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_gone_might_as_well_be_zero(seed: int):
    network, example = random_network(seed, size=6)
    graph = trace(network, example).module
    verdict = check_cuts(graph, example, seed, onnx=seed in IN_ONNX, stored=seed % 10 == 0)
    assert verdict.faults == (), "\n".join(network.story)


def test_the_same_seed_is_the_same_network():
    (one, x), (same, y), (other, _) = random_network(3), random_network(3), random_network(4)
    assert one.story == same.story != other.story
    assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one(*x), same(*y), strict=True))  # of tuples, or row by row


def test_drawing_leaves_the_random_numbers_alone():
    torch.manual_seed(5)
    random_network(3)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))


def test_a_wrong_group_is_a_fault(monkeypatch: pytest.MonkeyPatch):
    """The check is not blind: a slice shifted by one channel is found by the masks, whatever the proof says."""
    graph, example, _ = subject("concat")

    def shifted(*args):
        return tuple(
            replace(g, slices=tuple(
                replace(s, entries=(s.entries + 1) % 10) if s.owner == "fc" and not g.frozen else s for s in g.slices))
            for g in groups(*args)
        )  # fmt: skip

    assert check_cuts(graph, example).faults == ()
    monkeypatch.setattr(cuts, "groups", shifted)
    assert any("cutting is not zeroing" in fault for fault in check_cuts(graph, example).faults)
