"""Channels read by convolutions with groups, by very wide ones, and by several layers at once."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from flyweight.graph.axes import groups
from flyweight.graph.measure import measure
from flyweight.graph.operators import layers, matrix
from flyweight.graph.surgery import prove
from flyweight.graph.trace import trace
from flyweight.methods import channels, int8
from flyweight.methods.pricing import Judge, ladder, outputs_of
from flyweight.numerics.kronecker import Kronecker
from flyweight.testing import Subject


class Mixed(nn.Module):
    """A grouped reader, a reader of 132 channels and 64 taps, and a concat: `last` reads two groups of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, 8, 3, padding=1)
        self.parts = nn.Conv1d(8, 6, 3, padding=1, groups=2)
        self.many = nn.Conv1d(3, 132, 1)
        self.wide = nn.Conv1d(132, 5, 64, padding=31)
        self.last = nn.Conv1d(11, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(x, (0, 1))
        here = torch.relu(self.parts(torch.relu(self.first(x)))[..., :-1])
        there = torch.relu(self.wide(torch.relu(self.many(x))))
        return self.last(torch.cat([here, there], 1)).mean(2)


@cache
def one() -> Subject:
    torch.manual_seed(0)
    model = Mixed().eval()
    smooth = nn.functional.avg_pool1d(torch.randn(64, 3, 84), 5, 1)
    graph = trace(model, (smooth[:2],)).module.double()
    batches = tuple((3 * x.double() + 0.5,) for x in smooth.split(16))
    present = layers(graph)
    example = (batches[0][0][:2],)
    found = {g.name: g for g in groups(graph, example) if not g.frozen and not prove(graph, g, example)}
    stats = measure(graph, batches, present, positions=1000)

    def squared(expected: object, got: object) -> Tensor:
        assert isinstance(expected, Tensor)
        assert isinstance(got, Tensor)
        return (expected - got).square().sum(1)

    return Subject(graph, example, batches, present, found, stats, Judge(batches, outputs_of(graph, batches), squared))


def measured_error(name: str, weights: Tensor, shift: Tensor) -> float:
    """The mean over all outputs of the squared change when one layer gets these weights: by running it, no moments."""
    module = one().graph.get_submodule(name)
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    one().graph(*(torch.cat(parts) for parts in zip(*one().batches, strict=True)))
    handle.remove()
    changed = copy.deepcopy(module)
    with torch.no_grad():
        changed.weight.copy_(weights.reshape(module.weight.shape))
        changed.bias.add_(shift)
        return float((changed(seen[0]) - module(seen[0])).square().sum(1).mean())


def test_every_group_is_open_and_read_as_expected():
    sizes = {name: (g.size, [(u.layer, u.block) for u in g.consumers]) for name, g in one().groups.items()}
    assert sizes["first"] == (4, [("parts", 3)])  # channel i goes from both parts
    assert sizes["many"] == (132, [("wide", 64)])
    assert sizes["wide"] == (5, [("last", 1)])
    assert one().stats.inputs["parts"].gram.shape == (2, 12, 12)
    assert isinstance(one().stats.inputs["wide"].gram, Kronecker)


@pytest.mark.parametrize("name", ["first", "wide"])
def test_the_quoted_error_is_the_error_of_the_layers_outputs(name: str):
    group = one().groups[name]
    gone = channels.order(one().graph, group, one().layers, one().stats)
    for level in range(1, group.size):
        kept = channels.kept_channels(group, gone, level)
        refits = channels.refit_readers(one().graph, group, one().layers, one().stats, kept)
        for reader, new in refits.items():
            # sums of thousands of doubles, in moments and in outputs
            assert new.error == pytest.approx(measured_error(reader, new.weights, new.shift), rel=1e-8)


@pytest.mark.parametrize("name", ["first", "many", "wide"])
def test_all_levels_at_once_are_the_levels_one_by_one(name: str):
    group = one().groups[name]
    gone = channels.order(one().graph, group, one().layers, one().stats)
    family = channels.families(one().graph, group, one().layers, one().stats, gone)
    for level in {1, group.size // 2, group.size - 1}:
        kept = channels.kept_channels(group, gone, level)
        alone = channels.refit_readers(one().graph, group, one().layers, one().stats, kept)
        for reader, new in alone.items():
            found = family[reader].refit(level)
            # two factorisations of matrices of condition number up to 1e5
            assert torch.allclose(found.weights, new.weights, rtol=1e-7, atol=1e-8)
            assert found.error == pytest.approx(new.error, rel=1e-7)


def test_the_product_compensates_real_errors_and_beats_dropping():
    """The moment in Kronecker form is an approximation: what it gains must be seen in outputs, not in its own terms."""
    group = one().groups["many"]
    gone = channels.order(one().graph, group, one().layers, one().stats)
    weights = matrix(one().graph.get_submodule("wide"))
    kept = channels.kept_channels(group, gone, 30)
    new = channels.refit_readers(one().graph, group, one().layers, one().stats, kept)["wide"]
    dropped = torch.where(new.weights != 0, weights, 0.0)
    plain = measured_error("wide", dropped, (weights - dropped) @ one().stats.inputs["wide"].mean)
    assert measured_error("wide", new.weights, new.shift) < 0.2 * plain


def test_a_layer_read_through_two_groups_is_refitted_once_on_what_remains():
    steps = []
    for name, keep in (("parts", 2), ("wide", 2)):
        group = one().groups[name]
        gone = channels.order(one().graph, group, one().layers, one().stats)
        steps.append(channels.step(group, channels.kept_channels(group, gone, keep)))
    smaller = channels.restructure(one().graph, one().groups, one().layers, one().stats, steps)
    kept = [*smaller_columns(steps[0], "parts"), *smaller_columns(steps[1], "wide")]
    assert smaller.last.weight.shape[1] == len(kept)
    expected = channels.refit(one().graph, one().layers["last"], one().stats.inputs["last"], sorted(kept))
    assert torch.allclose(matrix(smaller.last), expected.weights[:, sorted(kept)], rtol=1e-9)
    assert one().judge(smaller) < one().judge(lambda x: torch.zeros(len(x), 4, dtype=x.dtype))


def smaller_columns(step, name: str) -> list[int]:
    (use,) = one().groups[name].consumers
    return use.columns[step.setting["kept"]].flatten().tolist()


def test_ladders_of_every_form_rise():
    for group in one().groups.values():
        found = ladder(one().graph, group, one().layers, one().stats, channels.levels(group.size, count=4), one().judge)
        assert found.layer_errors[0] == 0
        assert list(found.layer_errors) == sorted(found.layer_errors)


@pytest.mark.parametrize("name", ["parts", "wide", "last"])
def test_compensated_rounding_errs_less_than_rounding_to_nearest(name: str):
    layer = one().layers[name]
    quoted, real = {}, {}
    for compensate in (True, False):
        graph = copy.deepcopy(one().graph)
        before = graph.get_submodule(name).bias.detach().clone()
        # a grid of 15 steps, so that there is something to make up for
        _, quoted[compensate] = int8.round_weights(graph, layer, one().stats, compensate, largest=7)
        module = graph.get_submodule(name)
        real[compensate] = measured_error(name, matrix(module), module.bias.detach() - before)
    assert real[True] < real[False]
    if name != "wide":  # whose moment is an approximation
        assert quoted[True] == pytest.approx(real[True], rel=1e-8)
