"""Where ONNX Runtime wants its quantizers, so that a layer planned as int8 really runs as int8.

The rules (each violation is silent: the layer runs in float, slower than before):
1. the input and the output of a convolution are both stored in 8 bits; the last linear layer may put out float;
2. behind a layer and its ReLU sits one quantizer, whose zero point is 0; ReLU6 never gets a range above 6;
3. pooling by maximum, flattening and reshaping keep their input's grid;
4. an addition runs in integers when both terms and the sum (after its ReLU) are stored in 8 bits;
5. average pooling runs in integers between two stored values; a mean does not (rewritten before);
6. a linear layer on sequences (rank 3 and more) reads integers and gives float: only its own input is stored, others
   go on reading the float value;
7. zeros around a convolution's input belong to the convolution (the file says so): no quantizer behind them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx, nn

from flyweight.graph.operators import module_of, on_sequences, value_read
from flyweight.graph.ranges import RELUS, known_range, operator_of
from flyweight.graph.rewrite import whole_pools

__all__ = ["Slot", "readers_on_sequences", "slots"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Slot:
    """A value stored in 8 bits: the output of `node`. `like` names the node whose grid it shares."""

    node: str
    like: str = ""
    low: float | None = None  # known lowest value
    high: float | None = None  # known highest value
    readers: tuple[str, ...] = ()  # the nodes that read the stored value, where others read the float one; (): all


def slots(graph: fx.GraphModule, int8_layers: Collection[str]) -> tuple[Slot, ...]:
    """The values to store in 8 bits when the layers named run in int8, in graph order: whole ones, then single inputs."""
    stored: set[fx.Node] = set()
    nodes = list(graph.graph.nodes)
    called = [n for n in nodes if n.op == "call_module" and n.target in int8_layers and not on_sequences(graph, n)]
    planned = [n for n in called if not isinstance(module_of(graph, n), nn.Embedding)]  # whose input is no value
    for node in planned:
        stored.add(_origin(graph, value_read(graph, node)))
        end = _behind_relu(graph, node)
        if not _only_output(end) or not isinstance(module_of(graph, node), nn.Linear):
            stored.add(end)
    whole = set(whole_pools(graph))
    for node in nodes:  # graph order: the terms are decided before the sum
        pool = (
            node in whole or node.target == aten.avg_pool2d.default or isinstance(module_of(graph, node), nn.AvgPool2d)
        )
        pool = pool and any(_origin(graph, n.args[0]) is node for n in planned)
        if (_is_sum(node) or pool) and all(_origin(graph, a) in stored for a in node.all_input_nodes):
            stored.add(_behind_relu(graph, node))
    found = [slot for node in nodes if (slot := _slot(graph, node, stored)) is not None]
    whole_values = {slot.node for slot in found}
    readers = readers_on_sequences(graph, int8_layers)
    for node in nodes:
        if node.name in readers and node.name not in whole_values:
            found.append(Slot(node.name, "", *known_range(graph, node), tuple(readers[node.name])))
    return tuple(found)


def readers_on_sequences(graph: fx.GraphModule, int8_layers: Collection[str]) -> dict[str, list[str]]:
    """The values that linear layers on sequences read, by node, with the calls that read them."""
    found: dict[str, list[str]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module" and node.target in int8_layers and on_sequences(graph, node):
            found.setdefault(node.all_input_nodes[0].name, []).append(node.name)
    return found


def _slot(graph: fx.GraphModule, node: fx.Node, stored: Collection[fx.Node]) -> Slot | None:
    if node in stored:
        low, high = known_range(graph, node)
        return Slot(node.name, "", low, high)
    origin = _origin(graph, node)
    return Slot(node.name, origin.name) if origin is not node and origin in stored and not _only_output(node) else None


SAME_GRID = ("MaxPool2d", "MaxPool1d", "MaxPool3d", "Flatten", "aten.max_pool2d", "aten.max_pool1d", "aten.flatten",
             "aten.view", "aten.reshape", "aten.contiguous", "aten.clone")  # fmt: skip


def _is_sum(node: fx.Node) -> bool:
    return node.target == aten.add.Tensor and len(node.all_input_nodes) == 2


def _only_output(node: fx.Node) -> bool:
    return all(user.op == "output" for user in node.users)


def _behind_relu(graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The ReLU that alone reads `node`, else `node`."""
    users = list(node.users)
    return users[0] if len(users) == 1 and operator_of(graph, users[0]) in RELUS else node


def _origin(graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Where a value got its grid: back through operators that only move entries."""
    while operator_of(graph, node) in SAME_GRID:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node
