"""Sensitivities against autograd, row by row; and what a network must not have for them."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from flyweight.errors import UsageError
from flyweight.graph.measure import Sensed, Stats, from_tensors, to_tensors
from flyweight.graph.operators import input_rows, layers, output_rows
from flyweight.graph.sense import DRAWS, sense, sensible
from flyweight.graph.trace import trace
from flyweight.numerics.divergence import gauss_newton
from flyweight.testing import small_network, subject

EVERY = 10_000


@pytest.fixture(scope="module")
def one():
    return subject(*small_network())


def doubled(graph: fx.GraphModule) -> fx.GraphModule:
    return copy.deepcopy(graph).double()


def noise_of(shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    drawn = np.random.default_rng(seed).standard_normal((shape[0], DRAWS, *shape[1:]))
    return list(torch.from_numpy(drawn).unbind(1))


def by_hand(graph: fx.GraphModule, x: Tensor, task: str, name: str) -> tuple[Tensor, Tensor, Tensor, float]:
    """G, and mean, centred moment and Kish count of the weighted rows: one sample at a time, positions in their order."""
    outers, rows, weights = [], [], []
    seen: dict[str, Tensor] = {}
    probe = copy.deepcopy(graph)

    def hook(_: nn.Module, given: tuple[Tensor, ...], value: Tensor) -> Tensor:
        value.retain_grad()
        seen["x"], seen["y"] = given[0].detach(), value
        return value.clone()

    module = probe.get_submodule(name)
    module.register_forward_hook(hook)
    noises = noise_of(tuple(graph(x).shape))
    for i in range(len(x)):
        total = 0
        for noise in noises:
            gauss_newton(task, probe(x[i : i + 1]), noise[i : i + 1]).backward()
            slope = seen["y"].grad.movedim(1, -1).flatten(0, -2)
            outers += [g.outer(g) for g in slope]
            total = total + slope.square().sum(1)
        given = seen["x"]
        if given.ndim == 4:
            given = nn.functional.unfold(given, module.kernel_size, padding=module.padding)[0].T
        rows.append(given)
        weights.append(total)
    x, w = torch.cat(rows), torch.cat(weights)
    mean = (w @ x) / w.sum()
    gram = (x - mean).T @ ((x - mean) * w[:, None]) / w.sum()
    return torch.stack(outers).mean(0), mean, gram, float(w.sum() ** 2 / w.square().sum())


@pytest.mark.parametrize("task", ["classify", "embed", "regress", "custom"])
@pytest.mark.parametrize("name", ["block.conv1", "block.side", "last"])
def test_sensitivities_are_those_of_autograd_sample_by_sample(one, task: str, name: str):
    graph, x = doubled(one.graph), torch.cat([b[0] for b in one.batches])[:20].double()
    found = sense(graph, [(x[:13],), (x[13:],)], {name: one.layers[name]}, task, samples=20, positions=EVERY)[name]
    outputs, mean, gram, count = by_hand(graph, x, task, name)
    assert torch.allclose(found.outputs, outputs, rtol=1e-9, atol=1e-9 * float(outputs.abs().max()))
    assert torch.allclose(found.inputs.mean, mean, rtol=1e-9, atol=1e-12)
    assert torch.allclose(found.inputs.gram.double(), gram, rtol=1e-6, atol=1e-7)  # kept in float32
    assert found.inputs.count == round(count)


def test_the_same_whatever_the_batches_and_only_from_the_samples_asked_for(one):
    graph, x = doubled(one.graph), torch.cat([b[0] for b in one.batches])[:40].double()
    whole = sense(graph, [(x,)], one.layers, "classify", samples=31, positions=7)
    parts = sense(graph, [(p,) for p in x.split([3, 20, 17])], one.layers, "classify", samples=31, positions=7)
    cut = sense(graph, [(x[:31],)], one.layers, "classify", samples=31, positions=7)
    assert_alike(whole, parts)
    assert_alike(whole, cut)
    other = sense(graph, [(x,)], one.layers, "classify", samples=31, positions=7, seed=1)
    assert not torch.allclose(whole["last"].outputs, other["last"].outputs)


def assert_alike(a: Mapping[str, Sensed], b: Mapping[str, Sensed]) -> None:
    assert list(a) == list(b)
    for name, first in a.items():
        assert torch.allclose(first.outputs, b[name].outputs, rtol=1e-9, atol=1e-15)
        assert torch.allclose(first.inputs.mean, b[name].inputs.mean, rtol=1e-9, atol=1e-12)
        assert torch.allclose(first.inputs.gram, b[name].inputs.gram, rtol=1e-6, atol=1e-7)
        assert first.inputs.count == b[name].inputs.count


def test_the_graph_is_left_alone_and_the_same_call_gives_the_same_bits(one):
    before = {n: t.clone() for n, t in one.graph.state_dict().items()}
    flags = {n: p.requires_grad for n, p in one.graph.named_parameters()}
    first, second = (sense(one.graph, one.batches, one.layers, "classify", samples=64) for _ in range(2))
    assert all(torch.equal(first[n].outputs, second[n].outputs) for n in first)
    assert all(torch.equal(first[n].inputs.gram, second[n].inputs.gram) for n in first)
    assert all(torch.equal(t, before[n]) for n, t in one.graph.state_dict().items())
    assert all(p.requires_grad == flags[n] and p.grad is None for n, p in one.graph.named_parameters())


def test_sensitivities_survive_being_stored(one):
    found = sense(one.graph, one.batches, one.layers, "classify", samples=64)
    again = from_tensors(to_tensors(Stats(64, {}, {}, found))).sensed
    assert list(again) == list(found)
    assert all(torch.equal(again[n].outputs, found[n].outputs) for n in found)
    assert all(torch.equal(again[n].inputs.gram, found[n].inputs.gram) for n in found)
    assert all(again[n].inputs.count == found[n].inputs.count for n in found)


class Padded(nn.Module):
    """Every token for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x))) + 0 * attention_mask[..., None]


def test_padding_counts_for_nothing():
    torch.manual_seed(0)
    x, mask = torch.randn(6, 5, 4), torch.ones(6, 5)
    mask[:, 3:] = 0
    graph = trace(Padded().eval(), (x, mask)).module
    present = layers(graph)
    found = sense(graph, [(x, mask)], present, "embed", samples=6)
    x[:, 3:] = 1e3
    again = sense(graph, [(x, mask)], present, "embed", samples=6)
    assert torch.allclose(found["last"].outputs, again["last"].outputs)
    assert torch.allclose(found["last"].inputs.gram, again["last"].inputs.gram, atol=1e-6)


class Chosen(nn.Module):
    """Answers with numbers of classes: nothing has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x))).argmax(1).float()


def test_a_model_without_gradients_is_refused_by_name():
    graph = trace(Chosen().eval(), (torch.randn(3, 4),)).module
    with pytest.raises(UsageError, match="gradient"):
        sense(graph, [(torch.randn(3, 4),)], layers(graph), "regress", samples=3)


class Detached(nn.Module):
    """One branch that gradients do not come back to."""

    def __init__(self) -> None:
        super().__init__()
        self.side, self.last = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x) + (self.side(x) > 0).float()


def test_a_layer_that_nothing_comes_back_to_has_no_sensitivity():
    graph = trace(Detached().eval(), (torch.randn(3, 4),)).module
    assert list(sense(graph, [(torch.randn(3, 4),)], layers(graph), "regress", samples=3)) == ["last"]


def test_grouped_and_transposed_layers_stay_plain():
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ConvTranspose2d(8, 4, 1), nn.Conv2d(4, 4, 1)).eval()
    graph = trace(net, (torch.randn(2, 4, 6, 6),)).module
    assert [sensible(graph, one) for one in layers(graph).values()] == [False, False, True]


def test_positions_of_inputs_and_outputs_are_the_same():
    """A convolution that copies its middle tap: every output row is the middle of its input row."""
    conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight)
    x = torch.randn(5, 3, 6, 7)
    rows = input_rows(conv, x, 3, 11)
    assert torch.equal(output_rows(conv, conv(x), 3, 11), rows.view(-1, 3, 9)[:, :, 4])
