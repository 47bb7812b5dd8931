"""Packed weights in a file: how their floats are computed from bytes, in operators that every runtime has.

Of constants a runtime computes this once, when it loads the file; of an embedding only the rows that are looked up are
unpacked. All of it is exact in float32: bytes are small integers, and dividing by powers of two rounds nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from flyweight.graph.operators import matrix
from flyweight.numerics.packed import Scales, integers, packed, planes

__all__ = ["is_packed", "unpacked_rows", "unpacked_weight"]

aten = torch.ops.aten


PACKED = "weight_packed"  # in the names of packed tensors in the file


def is_packed(tensor: str) -> bool:
    """Whether a tensor of a file, by its name, is a part of packed weights."""
    return tensor.rpartition(".")[2].startswith(PACKED)


def unpacked_weight(graph: fx.GraphModule, name: str, module: nn.Module, grid: Scales, bits: int) -> fx.Node:
    """Nodes that compute a layer's weight from packed buffers, in its own shape (inserted where the graph inserts)."""
    weight = matrix(module)
    tensors = _stored(graph, name, weight, grid, bits)
    found = _unpacked(graph, tensors, weight.shape[1], grid.ratios.shape[1], grid.unit, bits)
    shape = module.weight.shape
    assert isinstance(shape, torch.Size)
    if len(shape) == 2:
        return found
    return graph.graph.call_function(aten.reshape.default, (found, list(shape)))


def unpacked_rows(
    graph: fx.GraphModule, name: str, module: nn.Embedding, index: fx.Node, grid: Scales, bits: int
) -> fx.Node:
    """Nodes that look up packed rows and compute their floats."""
    tensors = _stored(graph, name, module.weight.detach(), grid, bits)
    rows = [graph.graph.call_function(aten.embedding.default, (one, index)) for one in tensors]
    return _unpacked(graph, rows, module.weight.shape[1], grid.ratios.shape[1], grid.unit, bits)


def _stored(graph: fx.GraphModule, name: str, weight: Tensor, grid: Scales, bits: int) -> list[fx.Node]:
    """The packed parts, high ones first, then the ratios."""
    parts = packed(integers(weight, grid, bits), bits)
    named = {f"{name}.{PACKED}_{width}": part for width, part in zip(planes(bits), parts, strict=True)}
    named[f"{name}.{PACKED}_ratios"] = grid.ratios
    found = []
    for full, tensor in named.items():
        owner, _, leaf = full.rpartition(".")
        graph.get_submodule(owner).register_buffer(leaf, tensor)
        found.append(graph.graph.get_attr(full))
    return found


def _unpacked(
    graph: fx.GraphModule, stored: list[fx.Node], columns: int, groups: int, unit: float, bits: int
) -> fx.Node:
    """Floats "… columns" from the packed parts and ratios "… groups"."""

    def call(operator: Any, *arguments: Any) -> fx.Node:
        return graph.graph.call_function(operator, arguments)

    *parts, ratios = stored
    left, total = bits, None
    for width, part in zip(planes(bits), parts, strict=True):
        left -= width
        rest, pieces = call(aten.to.dtype, part, torch.float32), []
        for place in range(8 // width - 1, 0, -1):
            unit_of = float(2 ** (width * place))
            top = call(aten.floor.default, call(aten.mul.Tensor, rest, 1 / unit_of))
            rest = call(aten.sub.Tensor, rest, call(aten.mul.Tensor, top, unit_of))
            pieces.append(top)
        pieces.append(rest)
        whole = call(aten.cat.default, pieces[::-1], -1) if len(pieces) > 1 else rest
        if columns % (8 // width):
            whole = call(aten.slice.Tensor, whole, -1, 0, columns)
        whole = call(aten.mul.Tensor, whole, float(2**left)) if left else whole
        total = whole if total is None else call(aten.add.Tensor, total, whole)
    assert total is not None
    numbers = call(aten.sub.Tensor, total, float(2 ** (bits - 1)))
    scale = call(aten.mul.Tensor, call(aten.to.dtype, ratios, torch.float32), unit)
    if groups == 1:
        return call(aten.mul.Tensor, numbers, scale)
    grouped = call(aten.unflatten.int, numbers, -1, [groups, columns // groups])
    scaled = call(aten.mul.Tensor, grouped, call(aten.unsqueeze.default, scale, -1))
    return call(aten.flatten.using_ints, scaled, -2, -1)
