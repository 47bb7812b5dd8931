"""What the passes over an exported file share: a node's attributes, and leaving out what nothing reads."""

from __future__ import annotations

from typing import Any

import onnx

__all__ = ["attributes", "without_unread"]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes of a node by name."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def without_unread(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model, in place, without nodes and tensors that no answer comes from. Its nodes must be in order."""
    graph = model.graph
    read = {value.name for value in graph.output}
    for i in reversed(range(len(graph.node))):
        if read.isdisjoint(graph.node[i].output):
            del graph.node[i]
        else:
            read |= _reads(graph.node[i])
    for i in reversed(range(len(graph.initializer))):
        if graph.initializer[i].name not in read:
            del graph.initializer[i]
    return model


def _reads(node: onnx.NodeProto) -> set[str]:
    """What a node reads, and what the graphs in its attributes do (branches, bodies of loops)."""
    inner = [one for a in node.attribute for graph in (a.g, *a.graphs) for one in graph.node]
    return set(filter(None, node.input)).union(*map(_reads, inner))
