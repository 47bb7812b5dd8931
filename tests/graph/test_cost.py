"""Quoted multiply-accumulates and bytes against counts by other means."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flyweight.graph.axes import groups
from flyweight.graph.cost import layer_macs, weight_bytes
from flyweight.graph.operators import Layer, layers
from flyweight.graph.rewrite import refresh
from flyweight.graph.surgery import cut

from .cases import rows
from .odd import subject

NETS = ["tutorial", "residual", "mlp", "twice", "shared reader", "chain 1d", "tokens", "cube", "residual 1x1"]


def counted(graph: torch.fx.GraphModule, feed: tuple[torch.Tensor, ...]) -> int:
    """Multiply-accumulates by torch's own counter of floating point operations (two each)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        graph(*feed)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", NETS)
def test_macs_are_those_that_torch_counts(name: str):
    graph, example, _ = subject(name)
    feed = rows(example, 3)
    assert 3 * sum(layer.macs for layer in layers(graph).values()) == counted(graph, feed)


@pytest.mark.parametrize("name", ["tutorial", "residual", "shared reader", "chain 1d", "tokens", "residual 1x1"])
def test_macs_quoted_before_a_cut_are_those_counted_after_it(name: str):
    graph, example, _ = subject(name)
    before = layers(graph)
    kept = {g: list(range(0, g.size, 2)) for g in groups(graph, example) if not g.frozen}
    width = {n: [one.inputs, one.outputs] for n, one in before.items()}
    for group, channels in kept.items():
        for producer in group.producers:
            width[producer][1] = len(channels)
        for use in group.consumers:
            width[use.layer][0] = len(channels) * use.block // before[use.layer].taps
    smaller = copy.deepcopy(graph)
    cut(smaller, kept)
    refresh(smaller, example)
    assert sum(layer_macs(before[n], *pair) for n, pair in width.items()) == counted(smaller, rows(example, 1))
    assert {n: one.macs for n, one in layers(smaller).items()} == {
        n: layer_macs(before[n], *pair) for n, pair in width.items()
    }


@pytest.mark.parametrize(
    ("kind", "bias", "norm", "bits", "expected"),
    [
        ("Conv2d", True, "", 32, 4 * 54 + 4 * 6),
        ("Conv2d", False, "", 32, 4 * 54),
        ("Conv2d", False, "bn", 32, 4 * 54 + 4 * 6),  # the norm becomes a bias
        ("Conv2d", True, "bn", 32, 4 * 54 + 4 * 6),
        ("Conv2d", True, "", 8, 54 + 6 * 4 + 6 * (4 + 4)),
        ("Conv2d", False, "", 8, 54 + 6 * 4),
        ("Conv2d", False, "bn", 8, 54 + 6 * 4 + 6 * (4 + 4)),
        ("Linear", True, "", 8, 54 + 6 * (4 + 1) + 6 * 4),  # at 49 positions: its bias stays float
        ("Linear", False, "", 8, 54 + 6 * (4 + 1)),
    ],
)
def test_bytes_by_hand(kind: str, bias: bool, norm: str, bits: int, expected: int):
    layer = Layer("layer", kind, ("layer",), 20, 10, 3, 49, bias, norm)
    assert weight_bytes(layer, inputs=3, outputs=6, bits=bits) == expected
