"""What is known of a value's range before any data: what a ReLU gives."""

from __future__ import annotations

import torch
from torch import fx

from flyweight.graph.operators import module_of

__all__ = ["RELUS", "known_range", "operator_of"]

RELUS = {"ReLU": None, "aten.relu": None, "ReLU6": 6.0, "aten.relu6": 6.0}


def operator_of(graph: fx.GraphModule, node: fx.Node) -> str:
    """The class of the module that a node calls, or its operator without the overload ("aten.relu"); "" of other nodes."""
    module = module_of(graph, node)
    if module is not None:
        return type(module).__name__
    return str(node.target.overloadpacket) if isinstance(node.target, torch._ops.OpOverload) else ""


def known_range(graph: fx.GraphModule, node: fx.Node) -> tuple[float | None, float | None]:
    """The lowest and the highest value that a node can have, None where it is not known."""
    name = operator_of(graph, node)
    return (0.0, RELUS[name]) if name in RELUS else (None, None)
