"""Small exact rewrites of a graph, and fresh sizes after surgery."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from flyweight.graph.operators import module_of, sizes

__all__ = [
    "PART_OF",
    "flatten_views",
    "part_before",
    "pooled_means",
    "refresh",
    "sized_pools",
    "whole_pools",
    "without_dropout",
]

aten = torch.ops.aten
PART_OF = "part_of"  # in the meta of a call that does the first part of a layer's work: the name of that layer


def refresh(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
    """Writes the sizes that `inputs` give every node into `node.meta["val"]`, in place."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        FakeTensorProp(graph, mode).propagate(*inputs)


def part_before(graph: fx.GraphModule, layer: str) -> str:
    """The module that does the first part of a layer's work, "" where the layer is one (or was read from a file)."""
    return next((str(n.target) for n in graph.graph.nodes if n.meta.get(PART_OF) == layer), "")


def pooled_means(graph: fx.GraphModule) -> None:
    """Global means over both spatial dimensions become adaptive pooling and a flatten, in place.

    The same sums in another order; runtimes have integer kernels for pooling and none for a mean (TRAPS 3.4). Needs
    fresh sizes. Does nothing where sizes beside the batch are free: no runtime pools those in integers.
    """
    if _free(graph):
        return
    for node in list(graph.graph.nodes):
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or len(sizes(source)) != 4 or not _global_mean(graph, node):
            continue
        flat = len(sizes(node)) == 2
        with graph.graph.inserting_before(node):
            pool = graph.graph.call_function(aten.adaptive_avg_pool2d.default, (source, [1, 1]))
            pool.meta["val"] = source.meta["val"].mean((2, 3), keepdim=True)
            result = graph.graph.call_function(aten.flatten.using_ints, (pool, 1)) if flat else pool
            result.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(result)
        graph.graph.erase_node(node)
        if node.op == "call_module" and all(n.target != node.target for n in graph.graph.nodes):
            graph.delete_submodule(str(node.target))  # what no node calls cannot be stored
    graph.recompile()


def sized_pools(graph: fx.GraphModule) -> None:
    """Global adaptive pooling becomes average pooling of the traced size, in place: as a mean it would be exported."""
    for node in whole_pools(graph):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node.target, node.args = aten.avg_pool2d.default, (source, [int(s) for s in sizes(source)[2:]])
    graph.recompile()


def whole_pools(graph: fx.GraphModule) -> list[fx.Node]:
    """Adaptive pooling of a whole picture of fixed size, as `pooled_means` writes it."""
    nodes = [] if _free(graph) else list(graph.graph.nodes)
    return [n for n in nodes if n.target == aten.adaptive_avg_pool2d.default and _global_mean(graph, n)]


def _free(graph: fx.GraphModule) -> bool:
    """Whether sizes beside the batch are free."""
    return any(axis for node in graph.graph.nodes for axis in node.meta.get("free", {}))


def _global_mean(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = module_of(graph, node)
        return isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1))
    if node.target == aten.adaptive_avg_pool2d.default:
        return list(node.args[1]) == [1, 1]  # type: ignore[arg-type]
    return node.target == aten.mean.dim and sorted(int(d) % 4 for d in node.args[1]) == [2, 3]  # type: ignore[union-attr,arg-type]


def flatten_views(graph: fx.GraphModule) -> None:
    """Reshapes to (batch, everything else) become flattens, which hold no size, in place. Needs fresh sizes."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target not in (aten.view.default, aten.reshape.default):
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        before, after = sizes(source), sizes(node)
        if len(after) == 2 and len(before) >= 2 and before[0] == after[0]:
            node.target = aten.flatten.using_ints
            node.args = (source, 1)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def without_dropout(graph: fx.GraphModule) -> None:
    """Removes dropouts, which do nothing when a model is deployed, in place."""
    for node in list(graph.graph.nodes):
        module = module_of(graph, node)
        dropout = isinstance(module, nn.modules.dropout._DropoutNd) or node.target == aten.dropout.default
        if dropout or isinstance(module, nn.Identity):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()
