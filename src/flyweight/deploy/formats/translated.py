"""Layers in operators that torch's exporter can write as they stand, so that it need not decompose the program (`exporter`)."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from flyweight.graph.operators import module_of

__all__ = ["translated"]

aten = torch.ops.aten
ALIASES = {aten.__and__.Tensor: aten.bitwise_and.Tensor, aten.__or__.Tensor: aten.bitwise_or.Tensor}
MEANS: dict[Any, int] = {  # and over how many axes, where what is asked for is one number
    nn.AdaptiveAvgPool1d: 1,
    nn.AdaptiveAvgPool2d: 2,
    aten.adaptive_avg_pool1d.default: 1,
    aten.adaptive_avg_pool2d.default: 2,
}
CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device)


def translated(graph: fx.GraphModule) -> None:
    """Batch normalization by running statistics, averages over all of a picture or a sequence, casts and masks, in place: as what
    torch decomposes them into."""
    for node in list(graph.graph.nodes):
        module: Any = module_of(graph, node)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            _normalized(graph, node, module)
        elif (axes := MEANS.get(type(module) if module else node.target)) and _is_one(node, module):
            _averaged(graph, node, axes)
        elif node.target in ALIASES:
            node.target = ALIASES[node.target]
        elif node.target in CASTS:
            arguments = {one.name: given for one, given in zip(node.target._schema.arguments, node.args, strict=False)}
            kind = (arguments | node.kwargs).get("dtype") or node.meta["val"].dtype
            node.target, node.args, node.kwargs = aten._to_copy.default, node.args[:1], {"dtype": kind}
    graph.recompile()


def _is_one(node: fx.Node, module: Any) -> bool:
    """Whether pooling is asked for one number of every channel."""
    size = module.output_size if module else node.args[1]
    return all(one == 1 for one in (size if isinstance(size, (tuple, list)) else [size]))


def _normalized(graph: fx.GraphModule, node: fx.Node, module: Any) -> None:
    with graph.graph.inserting_before(node):
        parts = [
            None if getattr(module, name) is None else graph.graph.get_attr(f"{node.target}.{name}")
            for name in ("weight", "bias", "running_mean", "running_var")
        ]
        # inference reads no momentum, but the operator asks for one, and a module's may be None
        arguments = (node.args[0], *parts, module.momentum or 0.0, module.eps)
        made = graph.graph.call_function(aten._native_batch_norm_legit_no_training.default, arguments)
        value = graph.graph.call_function(operator.getitem, (made, 0))
    node.replace_all_uses_with(value)
    graph.graph.erase_node(node)


def _averaged(graph: fx.GraphModule, node: fx.Node, axes: int) -> None:
    with graph.graph.inserting_before(node):
        value = graph.graph.call_function(aten.mean.dim, (node.args[0], [-1, -2][:axes], True))
    node.replace_all_uses_with(value)
    graph.graph.erase_node(node)
