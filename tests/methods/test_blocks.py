"""A block left out is the user's class without that line; its power is what a hook on the branch sees."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from flyweight.graph.trace import trace
from flyweight.methods.blocks import blocks, prices, restructure, step
from flyweight.methods.pricing import Judge, outputs_of


class Branch(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(width, 9), nn.LayerNorm(9), nn.Linear(9, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.norm(self.a(x))))


class Stream(nn.Module):
    """Two blocks on one stream, a sum of two values that is no block, and a block that turns the stream's width."""

    def __init__(self, without: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.without = without
        self.one, self.two, self.wide = Branch(6), Branch(6), nn.Linear(6, 8)
        self.side, self.three = nn.Linear(6, 8), Branch(8)
        self.left, self.right = nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x if "one" in self.without else x + self.one(x)
        x = x if "two" in self.without else x + self.two(x)
        x = self.wide(x) if "side" in self.without else self.side(x) + self.wide(x)
        x = x if "three" in self.without else self.three(x) + x
        return self.left(x) + self.right(torch.relu(x)).abs()


def network(without: frozenset[str] = frozenset()) -> Stream:
    torch.manual_seed(0)
    return Stream(without).eval()


X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))


def traced():
    return trace(network(), (X[:2],)).module


def test_blocks_are_those_a_person_finds():
    found = {block.name: block.layers for block in blocks(traced())}
    assert found["one.b"] == ("one.a", "one.b")
    assert found["two.b"] == ("two.a", "two.b")
    assert found["three.b"] == ("three.a", "three.b")


@pytest.mark.parametrize("gone", [{"one"}, {"two"}, {"three"}, {"one", "two"}, {"one", "two", "three"}])
def test_a_network_without_blocks_is_the_class_without_those_lines(gone: set[str]):
    graph = traced()
    chosen = [step(block) for block in blocks(graph) if block.name.split(".")[0] in gone]
    smaller = restructure(graph, chosen)
    expected = network(frozenset(gone))
    assert torch.equal(smaller(X), expected(X))
    assert not any(name.split(".")[0] in gone for name in smaller.state_dict())


def test_the_original_stays():
    graph = traced()
    before = copy.deepcopy(graph)
    restructure(graph, [step(block) for block in blocks(graph)])
    assert torch.equal(graph(X), before(X))
    assert set(graph.state_dict()) == set(before.state_dict())


def test_power_and_divergence_are_those_of_the_class():
    graph, model = traced(), network()
    judge = Judge([(X[:5],), (X[5:],)], outputs_of(graph, [(X[:5],), (X[5:],)]), lambda a, b: (a - b).square().sum(1))
    seen: list[Tensor] = []
    model.two.register_forward_hook(lambda _, __, out: seen.append(out.detach()))
    original = model(X)
    price = next(p for p in prices(graph, blocks(graph), judge) if p.block.name == "two.b")
    power = float(seen[0].double().square().sum() / len(X))
    divergence = float((original - network(frozenset({"two"}))(X)).detach().square().sum(1).mean())
    assert price.layer_error == pytest.approx(power, rel=1e-6)  # sums of float32 values in float64
    assert price.error == pytest.approx(divergence, rel=1e-4)  # float32 runs in another order
