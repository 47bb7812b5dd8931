"""Where quantizers go: each rule by a net that needs it. What a runtime makes of them is tested with the files."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from flyweight.deploy.placement import Slot, slots
from flyweight.graph.operators import on_sequences
from flyweight.graph.rewrite import refresh
from flyweight.graph.trace import trace

from ..graph.nets import net
from .int8_nets import NETS, conv, delivered, ready

PIXELS = (torch.randn(2, 3, 8, 8),)


def placed(
    forward, *planned: str, example=PIXELS, **parts: nn.Module
) -> list[tuple[str, str, float | None, float | None]]:
    """(kind of node, whose grid it shares, lowest, highest) of every slot."""
    graph = trace(net(forward, **parts).eval(), example).module
    refresh(graph, example)
    return [(named(graph, s.node), named(graph, s.like), s.low, s.high) for s in slots(graph, planned)]


def named(graph: fx.GraphModule, node: str) -> str:
    return (
        node
        if not node
        else next(str(n.target).replace("aten.", "").split(".")[0] for n in graph.graph.nodes if n.name == node)
    )


def test_a_layer_and_its_relu_have_one_quantizer_whose_lowest_value_is_zero():
    found = placed(lambda s, x: s.c(F.relu(s.a(x))), "a", "c", a=conv(3, 4), c=conv(4, 4))
    assert found == [("x", "", None, None), ("relu", "", 0.0, None), ("c", "", None, None)]


def test_only_what_int8_layers_read_and_write_is_stored():
    found = placed(lambda s, x: s.c(F.relu(s.a(x))), "c", a=conv(3, 4), c=conv(4, 4))
    assert found == [("relu", "", 0.0, None), ("c", "", None, None)]
    assert placed(lambda s, x: s.c(F.relu(s.a(x))), a=conv(3, 4), c=conv(4, 4)) == []


@pytest.mark.parametrize("relu6", [F.relu6, nn.ReLU6()], ids=["function", "module"])
def test_relu6_never_gets_more_than_its_range(relu6):
    parts = {"r": relu6} if isinstance(relu6, nn.Module) else {}
    found = placed(
        lambda s, x: s.c(relu6(s.a(x)) if not parts else s.r(s.a(x))), "a", "c", a=conv(3, 4), c=conv(4, 4), **parts
    )
    assert found[1][2:] == (0.0, 6.0)


def test_a_last_linear_layer_puts_out_float_and_a_last_convolution_does_not():
    linear = placed(lambda s, x: s.fc(x), "fc", example=(torch.randn(2, 6),), fc=nn.Linear(6, 4))
    assert [s[0] for s in linear] == ["x"]
    assert [s[0] for s in placed(lambda s, x: s.a(x), "a", a=conv(3, 4))] == ["x", "a"]


def test_what_only_moves_entries_keeps_the_grid_it_gets():
    found = placed(
        lambda s, x: s.fc(F.max_pool2d(F.relu(s.a(x)), 2).flatten(1)), "a", "fc", a=conv(3, 4), fc=nn.Linear(64, 4)
    )
    assert found == [
        ("x", "", None, None), ("relu", "", 0.0, None),
        ("max_pool2d", "relu", None, None), ("flatten", "relu", None, None),
    ]  # fmt: skip


def test_moving_entries_in_front_of_the_model_share_the_inputs_grid():
    found = placed(lambda s, x: s.a(F.max_pool2d(x, 2)), "a", a=conv(3, 4))
    assert found[:2] == [("x", "", None, None), ("max_pool2d", "x", None, None)]


def test_a_sum_is_stored_behind_its_relu_when_both_terms_are():
    def forward(s, x):
        y = F.relu(s.a(x))
        return s.fc(F.relu(s.c(y) + y))

    parts = {"a": conv(3, 4), "c": conv(4, 4), "fc": conv(4, 4)}
    kinds = [s[0] for s in placed(forward, "a", "c", **parts)]
    assert kinds == ["x", "relu", "c", "relu"]  # the convolution before the sum, and the sum's ReLU
    assert [s[0] for s in placed(forward, "a", **parts)] == ["x", "relu"]  # one term in float: a float sum


def test_average_pooling_between_stored_values_is_stored():
    parts = {"a": conv(3, 4), "fc": nn.Linear(4, 4)}

    def forward(s, x):
        return s.fc(F.avg_pool2d(F.relu(s.a(x)), 8).flatten(1))

    assert [s[0] for s in placed(forward, "a", "fc", **parts)] == ["x", "relu", "avg_pool2d", "flatten"]
    assert [s[0] for s in placed(forward, "a", **parts)] == ["x", "relu"]  # nobody reads it as integers


def test_a_smooth_activation_is_stored_on_both_sides():
    found = placed(lambda s, x: s.c(F.silu(s.a(x))), "a", "c", a=conv(3, 4), c=conv(4, 4))
    assert [s[0] for s in found] == ["x", "a", "silu", "c"]
    assert all(s[2] is None for s in found)


def test_a_relu_beside_another_reader_does_not_hide_the_layer():
    def forward(s, x):
        y = s.a(x)
        return s.c(F.relu(y)) + y

    found = placed(forward, "a", "c", a=conv(3, 4), c=conv(4, 4))
    assert [s[0] for s in found] == ["x", "a", "relu", "c", "add"]


@pytest.mark.parametrize("name", NETS)
def test_slots_of_some_layers_are_among_those_of_all(name: str):
    """What one layer alone needs measured, the statistics made for all of them hold."""
    _, _, prepared_graph, _, _ = ready(name)
    every = {s.node for s in slots(prepared_graph.graph, list(prepared_graph.layers))}
    for layer in prepared_graph.layers:
        assert {s.node for s in slots(prepared_graph.graph, [layer])} <= every
    assert every <= {*prepared_graph.stats.ranges, *prepared_graph.stats.rows}


def test_a_linear_layer_on_sequences_reads_integers_and_nobody_else_does():
    def forward(s, x):
        y = F.relu(s.up(x))
        return s.fc((s.left(y) * s.right(y) + y).mean(1))

    parts = {"up": nn.Linear(6, 8), "left": nn.Linear(8, 8), "right": nn.Linear(8, 8), "fc": nn.Linear(8, 4)}
    example = (torch.randn(2, 5, 6),)
    graph = trace(net(forward, **parts).eval(), example).module
    refresh(graph, example)
    found = slots(graph, ["left", "right", "fc"])
    assert [(named(graph, s.node), s.readers, s.low) for s in found] == [
        ("mean", (), None), ("relu", ("left", "right"), 0.0),
    ]  # fmt: skip
    assert not on_sequences(graph, next(n for n in graph.graph.nodes if n.target == "fc"))


@pytest.mark.parametrize("name", NETS)
def test_every_slot_has_one_quantizer_and_everybody_reads_it(name: str):
    graph = delivered(name).graph
    quantizers = [n for n in graph.graph.nodes if "fake_quantize" in str(n.target)]
    sources = [q.args[0] for q in quantizers]
    assert len(set(sources)) == len(sources) == len(slots(delivered(name).ready.graph, list(delivered(name).layers)))
    found = {s.node: s for s in slots(delivered(name).ready.graph, list(delivered(name).layers))}
    for quantizer, source in zip(quantizers, sources, strict=True):
        readers = found[source.name].readers
        assert set(source.users) == {quantizer} or readers
        assert not readers or {user.name for user in quantizer.users} == set(readers)
        _, scale, zero_point, low, high = quantizer.args
        assert scale > 0
        assert (low, high) == (0, 255)
        assert 0 <= zero_point <= 255


@pytest.mark.parametrize("name", ["residual", "relu6", "cnn", "average pooling"])
def test_grids_follow_the_slots(name: str):
    one = delivered(name)
    found = {s.node: s for s in slots(one.ready.graph, list(one.layers))}
    grids = {q.args[0].name: q.args[1:3] for q in one.graph.graph.nodes if "fake_quantize" in str(q.target)}
    assert set(grids) == set(found)
    for node, slot in found.items():
        scale, zero_point = grids[node]
        if slot.like:
            assert grids[node] == grids[slot.like]
        elif slot.low == 0.0:
            assert zero_point == 0
        if slot.high is not None:
            assert scale * 255 <= slot.high * (1 + 2**-23)


def test_a_slot_is_a_plain_record():
    assert Slot("a") == Slot("a", "", None, None)
