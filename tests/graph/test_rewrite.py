"""Rewrites say the same in other operators."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from flyweight.graph.axes import groups
from flyweight.graph.operators import sizes
from flyweight.graph.rewrite import flatten_views, pooled_means, refresh, sized_pools, without_dropout
from flyweight.graph.shapes import shapes
from flyweight.graph.surgery import cut
from flyweight.graph.trace import trace

from .cases import rows
from .nets import net
from .odd import subject

aten = torch.ops.aten
PIXELS = (torch.randn(2, 3, 6, 8),)


def traced(forward, **parts) -> fx.GraphModule:
    graph = trace(net(forward, **parts), PIXELS).module
    refresh(graph, PIXELS)
    return graph


def operators(graph: fx.GraphModule) -> list[object]:
    return [n.target for n in graph.graph.nodes if n.op == "call_function"]


MEANS = {
    "mean": lambda self, x: self.conv(x).mean((2, 3)),
    "mean of the last": lambda self, x: self.conv(x).mean((-1, -2)),
    "mean kept": lambda self, x: self.conv(x).mean((2, 3), keepdim=True),
    "adaptive": lambda self, x: F.adaptive_avg_pool2d(self.conv(x), 1).flatten(1),
    "adaptive module": lambda self, x: self.pool(self.conv(x)),
}


@pytest.mark.parametrize("name", MEANS)
def test_a_global_mean_becomes_average_pooling(name: str):
    graph = traced(MEANS[name], conv=nn.Conv2d(3, 4, 3), pool=nn.AdaptiveAvgPool2d((1, 1)))
    rewritten = copy.deepcopy(graph)
    pooled_means(rewritten)
    assert aten.adaptive_avg_pool2d.default in operators(rewritten)
    assert aten.mean.dim not in operators(rewritten)
    assert "pool" not in dict(rewritten.named_modules())  # what no node calls could not be stored
    for batch in (1, 5):
        (x,) = rows(PIXELS, batch)
        assert rewritten(x).shape == graph(x).shape
        # 48 values summed in another order: 48 * 2^-24
        assert torch.allclose(rewritten(x), graph(x), rtol=0, atol=3e-6)


@pytest.mark.parametrize("name", MEANS)
def test_pooling_takes_other_sizes_until_it_is_lowered(name: str):
    graph = traced(MEANS[name], conv=nn.Conv2d(3, 4, 3), pool=nn.AdaptiveAvgPool2d((1, 1)))
    rewritten, (larger,) = copy.deepcopy(graph), (torch.randn(2, 3, 12, 9),)
    pooled_means(rewritten)
    assert torch.allclose(rewritten(larger), graph(larger), rtol=0, atol=6e-6)
    sized_pools(rewritten)
    assert operators(rewritten).count(aten.avg_pool2d.default) == 1
    assert torch.allclose(rewritten(*PIXELS), graph(*PIXELS), rtol=0, atol=3e-6)


OTHERS = {
    "over channels": lambda self, x: self.conv(x).mean(1),
    "over one side": lambda self, x: self.conv(x).mean(3),
    "over channels and one side": lambda self, x: self.conv(x).mean((1, 2)),
    "two by two": lambda self, x: F.adaptive_avg_pool2d(self.conv(x), 2),
    "of vectors": lambda self, x: self.conv(x).flatten(2).mean(2),
    "sum": lambda self, x: self.conv(x).sum((2, 3)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_means_are_left_alone(name: str):
    graph = traced(OTHERS[name], conv=nn.Conv2d(3, 4, 3))
    before = graph.code
    pooled_means(graph)
    assert graph.code == before


def test_a_global_mean_over_free_sizes_is_left_alone():  # the pooling would hold the sizes of one example
    model = net(MEANS["mean"], conv=nn.Conv2d(3, 4, 3)).eval()
    graph = trace(model, (torch.randn(2, 3, 8, 8),), {}, [((torch.randn(2, 3, 9, 8),), {})]).module
    refresh(graph, (torch.randn(2, 3, 8, 8),))
    before = graph.code
    pooled_means(graph)
    assert graph.code == before


def test_reshapes_to_rows_become_flattens_and_others_stay():
    def forward(self, x):
        y = self.conv(x)
        return self.fc(y.view(y.shape[0], 96)) + y.reshape(y.shape[0], 4, 24).sum(1).view(y.shape[0], 4, 6).sum(2)

    graph = traced(forward, conv=nn.Conv2d(3, 4, 3), fc=nn.Linear(96, 4))
    (x,) = rows(PIXELS, 5)
    expected = graph(x)
    flatten_views(graph)
    kept = [n for n in graph.graph.nodes if n.target in (aten.view.default, aten.reshape.default)]
    assert len(kept) == 2
    assert operators(graph).count(aten.flatten.using_ints) == 1
    assert torch.equal(graph(x), expected)


def test_dropout_and_identity_go():
    def forward(self, x):
        return self.fc(F.dropout(self.drop(self.same(self.conv(x).mean((2, 3)))), 0.3, self.training))

    parts = {"conv": nn.Conv2d(3, 4, 3), "drop": nn.Dropout(0.5), "same": nn.Identity(), "fc": nn.Linear(4, 2)}
    graph = traced(forward, **parts)
    (x,) = rows(PIXELS, 5)
    expected = graph(x)
    without_dropout(graph)
    names = {type(graph.get_submodule(str(n.target))).__name__ for n in graph.graph.nodes if n.op == "call_module"}
    assert names == {"Conv2d", "Linear"}
    assert aten.dropout.default not in operators(graph)
    assert torch.equal(graph(x), expected)


def test_fresh_sizes_are_those_of_running_the_cut_network():
    graph, example, _ = subject("tutorial")
    smaller = copy.deepcopy(graph)
    cut(smaller, {g: range(g.size // 2) for g in groups(graph, example) if not g.frozen})
    refresh(smaller, example)
    measured = shapes(smaller, example)
    fresh = {n.name: tuple(int(s) for s in sizes(n)) for n in smaller.graph.nodes if sizes(n)}
    assert fresh == {name: shape for name, shape in measured.items() if name in fresh}
    assert len(fresh) >= 10
