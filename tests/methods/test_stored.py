"""Packed weights of layers: errors as they are told, no worse than rounding to the nearest, on the grid to the last bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flyweight.graph.measure import measure
from flyweight.graph.numbers import Form, integer_layers, number_forms
from flyweight.graph.operators import layers
from flyweight.graph.trace import trace
from flyweight.methods import stored
from flyweight.numerics.packed import WIDTHS, integers, values


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.first = nn.Linear(16, 24)
        self.conv = nn.Conv1d(24, 8, 3, padding=1)
        self.last = nn.Linear(8, 4, bias=False)

    def forward(self, x):
        x = self.first(self.table(x)).relu().transpose(1, 2)
        return self.last(self.conv(x).relu().mean(2))


@pytest.fixture(scope="module")
def given():
    torch.manual_seed(0)
    graph = trace(Net(), (torch.randint(20, (2, 6)),)).module
    batches = [(torch.randint(20, (64, 6)),) for _ in range(4)]
    return graph, batches, measure(graph, batches, layers(graph))


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_error_told_is_the_error_of_the_outputs_and_no_worse_than_the_nearest(given, bits: int):
    graph, batches, stats = given
    inputs = torch.cat([graph.table(x) for (x,) in batches]).detach()
    found = {}
    for compensate in (True, False):
        after = copy.deepcopy(graph)
        errors = stored.apply(after, layers(after), [stored.step("first", bits, compensate)], stats)
        apart = (after.first(inputs) - graph.first(inputs)).detach().double()
        assert float(apart.square().sum(-1).mean()) == pytest.approx(errors["first"], rel=1e-3)
        found[compensate] = errors["first"]
    assert found[True] <= found[False] * 1.001


@pytest.mark.parametrize("bits", WIDTHS)
def test_weights_lie_on_the_grid_that_is_recorded(given, bits: int):
    graph, _, stats = given
    after = copy.deepcopy(graph)
    names = ("table", "first", "conv", "last")
    stored.apply(after, layers(after), [stored.step(name, bits) for name in names], stats)
    assert number_forms(after) == {name: Form(bits, packed=True) for name in names}
    assert integer_layers(after) == []
    for name in names:
        grid = stored.scales_of(after.meta["extra_tensors"], name)
        rows = after.get_submodule(name).weight.detach().flatten(1)
        assert torch.equal(values(integers(rows, grid, bits), grid), rows)


def test_more_bits_err_less(given):
    graph, _, stats = given
    for name in ("table", "conv"):
        errors = [
            stored.apply(copy.deepcopy(graph), layers(graph), [stored.step(name, b)], stats)[name] for b in WIDTHS
        ]
        assert errors == sorted(errors, reverse=True)
        # a bit more halves the steps: the error falls by about four, five times over from 3 bits on
        assert errors[1] / errors[6] > 2**8
