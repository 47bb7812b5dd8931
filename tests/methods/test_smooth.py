"""Factors between values and weights: the network stays what it was, and its rounding errors fall."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from flyweight.deploy.placement import readers_on_sequences
from flyweight.graph.trace import trace
from flyweight.methods import int8
from flyweight.methods.smooth import WORTH, factors, migrated, migrations, node_name
from flyweight.numerics.moments import add_rows, empty_moments
from flyweight.stages.deliver import Prepared, prepared, with_numbers

from ..graph.nets import net

NAMES = ["a", "b", "o"]


def spread(width: int, factor: float) -> Tensor:
    """Two channels are `factor` times as large as the others."""
    result = torch.ones(width)
    result[[1, 5]] = factor
    return result


@cache
def subject(factor: float) -> tuple[fx.GraphModule, Prepared, tuple[Tensor], Tensor]:
    """Layers on sequences behind a norm with outlier channels; rows to compare on, and the answers in float."""

    def forward(self, x):
        y = self.norm(x)
        return self.fc((y + self.o(F.gelu(self.a(y)) * torch.sigmoid(self.b(y)))).mean(1))

    torch.manual_seed(0)
    parts = {"a": nn.Linear(16, 48), "b": nn.Linear(16, 48), "o": nn.Linear(48, 16), "fc": nn.Linear(16, 5)}
    model = net(forward, norm=nn.LayerNorm(16), **parts).eval()
    with torch.no_grad():
        model.norm.weight.mul_(spread(16, factor))
        for name in ("a", "b"):
            parts[name].weight.div_(spread(16, factor))
        parts["fc"].weight.div_(spread(16, factor))
    x = torch.randn(96, 6, 16)
    graph = trace(model, (x[:4],)).module
    ready = prepared(graph, (x[:4],), set(NAMES), lambda: iter([(x[:64],)]))
    return graph, ready, (x[64:],), graph(x[64:]).detach()


def lost(factor: float, ready: Prepared) -> float:
    _, _, rows, answers = subject(factor)
    graph, _ = with_numbers(ready, [int8.step(name) for name in NAMES])
    with torch.no_grad():
        return float((graph(*rows) - answers).square().mean())


def test_a_network_with_factors_computes_what_it_did():
    graph, ready, rows, answers = subject(30.0)
    assert ready.migrations[0].readers == ("a", "b")  # one product for both
    changed: fx.GraphModule = copy.deepcopy(ready.graph)
    stats = migrated(changed, ready.stats, ready.migrations, NAMES)
    torch.testing.assert_close(changed(*rows), answers)
    for name in ("a", "b"):  # and its statistics are those of what is read now
        source = next(n for n in changed.graph.nodes if n.target == name).args[0]
        assert source.name == node_name(ready.migrations[0].source)
        seen = add_rows(empty_moments(16), values(changed, source.name, rows).flatten(0, 1))
        assert torch.allclose(stats.inputs[name].gram.diagonal(), seen.gram.diagonal(), rtol=0.3)  # of other rows
    assert set(dict(graph.named_modules())) == set(dict(changed.named_modules()))


def values(graph: fx.GraphModule, name: str, rows: tuple[Tensor, ...]) -> Tensor:
    found: list[Tensor] = []

    class Run(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if n.name == name:
                found.append(value)
            return value

    Run(graph).run(*rows)
    return found[0].detach()


def test_outlier_channels_cost_much_less_with_factors():
    _, ready, _, _ = subject(30.0)
    bare = Prepared(ready.graph, ready.layers, ready.stats)
    assert lost(30.0, ready) < 0.1 * lost(30.0, bare)


def test_channels_that_are_alike_get_no_product():
    assert ("a", "b") not in [one.readers for one in subject(1.0)[1].migrations]


def test_only_layers_in_int8_read_the_product():
    _, ready, rows, answers = subject(30.0)
    graph, _ = with_numbers(ready, [int8.step("b")])
    users = {name: next(n for n in graph.graph.nodes if n.target == name).args[0] for name in ("a", "b")}
    assert "fake_quantize" in str(users["b"].target)
    assert users["a"].name == ready.migrations[0].source
    assert torch.equal(graph.get_submodule("a").weight, ready.graph.get_submodule("a").weight)
    with torch.no_grad():
        assert float((graph(*rows) - answers).abs().max()) < 0.1 * float(answers.abs().max())


@pytest.mark.parametrize("factor", [1.0, 10.0, 100.0])
def test_the_predicted_share_is_that_of_a_simulation(factor: float):
    """Values and weights rounded to nearest on grids of their full ranges: with factors, without."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(20_000, 16, dtype=torch.float64, generator=generator) * spread(16, factor)
    weight = torch.randn(24, 16, dtype=torch.float64, generator=generator)
    scale, share = factors(weight, rows, rows.square().mean(0))

    def rounded(by: Tensor) -> float:
        step = float((rows * by).max() - (rows * by).min()) / 255
        turned = weight / by
        steps = turned.abs().amax(1, keepdim=True) / 127
        found = ((rows * by / step).round() * step) @ ((turned / steps).round() * steps).T
        return float((found - rows @ weight.T).square().sum(1).mean())

    # rounding errors of a finite grid are nearly uniform: the model holds to a quarter
    assert rounded(scale) / rounded(torch.ones(16, dtype=torch.float64)) == pytest.approx(share, rel=0.25)
    assert share <= 1
    assert (share < WORTH) == (factor > 1)


def test_channels_never_seen_have_finite_factors():
    rows = torch.randn(50, 4, dtype=torch.float64)
    rows[:, 2] = 0
    weight = torch.randn(3, 4, dtype=torch.float64)
    weight[:, 1] = 0
    for seen in (rows, torch.zeros(5, 4)):
        scale, share = factors(weight, seen, seen.square().mean(0))
        assert bool(scale.isfinite().all())
        assert bool((scale > 0).all())
        assert 0 <= share <= 1


def test_migrations_name_values_and_calls():
    _, ready, _, _ = subject(30.0)
    calls = readers_on_sequences(ready.graph, NAMES)
    assert list(calls.values()) == [["a", "b"], ["o"]]
    found = migrations(ready.graph, calls, ready.stats)
    assert [one.source for one in found] == [one.source for one in ready.migrations]
