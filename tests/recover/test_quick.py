"""The quick form of a network is the same function of the same parameters, with the same slopes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn

from flyweight.graph.trace import trace
from flyweight.recover import quick as module
from flyweight.recover.parts import LOWRANK, learning
from flyweight.recover.quick import quick

from ..graph.cases import seeded


class Odd(nn.Module):
    """Norms with and without a scale, biases, groups, a channel shuffle by views, a convolution that two read, a bare norm."""

    def __init__(self) -> None:
        super().__init__()
        self.bare = nn.BatchNorm2d(3)
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.grouped, self.plain_norm = nn.Conv2d(8, 8, 3, groups=2, bias=False), nn.BatchNorm2d(8, affine=False)
        self.depth, self.depth_norm = (
            nn.Conv2d(8, 8, 3, padding="same", padding_mode="circular", groups=8),
            nn.BatchNorm2d(8),
        )
        self.shared, self.shared_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.along, self.along_norm = nn.Conv1d(8, 4, 3), nn.BatchNorm1d(4)
        self.head = nn.Linear(4 + 8 * 7 * 7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(self.bare(x))))
        x = self.plain_norm(self.grouped(x))
        n, c, h, w = x.shape
        flat = x.view(n, -1)
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        y = self.depth_norm(self.depth(x)).tanh()
        z = self.shared(y)
        x = self.shared_norm(z) * z.sigmoid()
        line = self.along_norm(self.along(x.view(n, c, h * w))).mean(2)
        return self.head(torch.cat([line, flat], 1))


def graph_of(net: nn.Module, *sizes: int) -> tuple[fx.GraphModule, Tensor]:
    """In double precision, with norms that do something."""
    for part in seeded(lambda: net).modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.affine:
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
    x = torch.randn(*sizes)
    return trace(net.eval(), (x,)).module.double(), x.double()


def slopes(graph: fx.GraphModule, answers: Tensor) -> dict[str, Tensor]:
    graph.zero_grad()
    answers.square().sum().backward()
    return {name: p.grad.clone() for name, p in graph.named_parameters() if p.grad is not None}


def test_answers_and_slopes_are_those_of_the_network():
    graph, x = graph_of(Odd(), 6, 3, 9, 9)
    before = {name: p.detach().clone() for name, p in graph.named_parameters()}
    answers, wanted = graph(x), slopes(graph, graph(x))
    form = quick(graph, (x,))
    assert form is not graph
    torch.testing.assert_close(form(x), answers, rtol=1e-12, atol=1e-12)
    found = slopes(graph, form(x))
    assert set(found) == set(wanted) == set(before)
    for name, slope in wanted.items():  # sums in another order: some hundred roundings of 1e-16 of the largest term
        torch.testing.assert_close(found[name], slope, rtol=1e-10, atol=1e-10)
    for name, p in graph.named_parameters():
        assert torch.equal(p, before[name])
        assert p.is_contiguous()


def test_only_a_norm_that_keeps_its_statistics_and_alone_reads_a_convolution_is_folded():
    graph, x = graph_of(Odd(), 6, 3, 9, 9)
    form = quick(graph, (x,))
    left = [
        str(n.target)
        for n in form.graph.nodes
        if n.op == "call_module" and isinstance(form.get_submodule(n.target), module.NORMS)
    ]
    assert left == ["bare", "shared_norm"]
    graph.get_submodule("stem_norm").train()
    assert sum("norm" in str(n.target) for n in quick(graph, (x,)).graph.nodes) == 2


def test_additions_learn_through_it_too():
    graph, x = graph_of(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)), 4, 3, 8, 8)
    with learning(graph, LOWRANK, (), 2, 0):
        wanted = slopes(graph, graph(x))
        found = slopes(graph, quick(graph, (x,))(x))
    assert set(found) == set(wanted)
    assert all(torch.allclose(found[name], slope, rtol=1e-10, atol=1e-10) for name, slope in wanted.items())


def test_what_would_answer_otherwise_or_not_at_all_is_left(monkeypatch: pytest.MonkeyPatch):
    graph, x = graph_of(Odd(), 6, 3, 9, 9)
    graph, x = graph.float(), x.float()  # in double precision convolutions keep no layout
    monkeypatch.setattr(module, "VIEWS", ())  # what is seen as one row does not lie in a row there
    assert quick(graph, (x,)) is graph
    monkeypatch.undo()
    other = copy.deepcopy(graph)
    other.get_submodule("head").weight.data.mul_(1.1)
    monkeypatch.setattr(module, "_form", lambda graph: other)
    assert quick(graph, (x,)) is graph


def test_a_network_without_pictures_is_left():
    graph, x = graph_of(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), 5, 4)
    assert quick(graph, (x,)) is graph
