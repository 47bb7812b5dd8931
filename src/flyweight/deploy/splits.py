"""Variants of an exported file in which one layer is two of a lower rank, for the clock: patched, never delivered.

Time does not depend on what the weights are, so both parts hold weights of the layer in another shape.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from flyweight.deploy.formats.onnx import stored_name
from flyweight.deploy.formats.proto import without_unread
from flyweight.deploy.variants import products

__all__ = ["with_split_layer"]

Array = NDArray[Any]


def with_split_layer(model: onnx.ModelProto, layer: str, rank: int, weight: Array) -> onnx.ModelProto | None:
    """A copy of an exported `model` in which one layer is two; None if no node of the file computes that layer.

    The layer is found by the name of its weights, float or integer; a linear layer on sequences, whose weights the
    exporter turns and renames, by their values: `weight`, "out in".
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    tensors = {t.name: t for t in result.graph.initializer}
    makers = {output: node for node in result.graph.node for output in node.output}
    turned = products(result, {layer: weight})
    nodes: list[onnx.NodeProto] = []
    fresh: dict[str, onnx.TensorProto] = {}  # by name: a layer that is called twice has its weights once
    count = len(result.graph.node)
    for node in result.graph.node:
        name = _weights_of(node, layer, turned, makers)
        if not name:
            nodes.append(node)
            continue
        integer = makers.get(name)
        weights = _shapes(node, numpy_helper.to_array(tensors[integer.input[0] if integer else name]), rank)
        for made, stored in _parts(node, integer, weights, f"/{layer}/{len(nodes)}", tensors, makers):
            nodes.append(made)
            fresh |= {tensor.name: tensor for tensor in stored}
    if len(nodes) == count:
        return None
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]  # deleting frees those in the graph
    del result.graph.node[:]
    result.graph.node.extend(kept)
    result.graph.initializer.extend(fresh.values())
    return without_unread(result)


def _weights_of(
    node: onnx.NodeProto,
    layer: str,
    turned: Collection[str],
    makers: Mapping[str, onnx.NodeProto],
) -> str:
    """The name under which a node reads the layer's weights, "" if it is not that layer."""
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return ""
    name = node.input[1]
    maker = makers.get(name)
    if maker is not None:
        integer = maker.op_type == "DequantizeLinear" and maker.input[0] == stored_name(layer)
        return str(name) if integer else ""
    return str(name) if name == f"{layer}.weight" or name in turned else ""


def _shapes(node: onnx.NodeProto, values: Array, rank: int) -> tuple[Array, Array]:
    """Weights for the two parts, in the layout that the node reads."""
    if node.op_type == "MatMul":  # "in out"
        return values[:, :rank], np.resize(values, (rank, values.shape[1]))
    return values[:rank], np.resize(values, (values.shape[0], rank, *[1] * (values.ndim - 2)))


def _parts(
    node: onnx.NodeProto,
    integer: onnx.NodeProto | None,
    weights: tuple[Array, Array],
    mark: str,
    tensors: Mapping[str, onnx.TensorProto],
    makers: Mapping[str, onnx.NodeProto],
) -> Iterator[tuple[onnx.NodeProto, list[onnx.TensorProto]]]:
    """The nodes that replace `node`, in order, each with the tensors that it brings."""
    read = []
    for name, values in zip(("first", "second"), weights, strict=True):
        if integer is None:
            read.append(f"{name}{mark.rpartition('/')[0]}")
            continue
        made, stored = _dequantized(integer, values, f"{name}{mark}", tensors)
        read.append(made.output[0])
        yield made, stored
    plain = [] if integer is not None else [_stored(v, n) for v, n in zip(weights, read, strict=True)]
    middle = f"middle{mark}"
    yield _node(node, [node.input[0], read[0]], middle, f"{node.name}/first"), plain
    if integer is not None:  # the value between is stored in 8 bits, on whatever grid
        grid = makers[node.input[0]].input[1:]
        for kind, output in (("QuantizeLinear", f"quantized{mark}"), ("DequantizeLinear", f"dequantized{mark}")):
            yield onnx.helper.make_node(kind, [middle, *grid], [output], name=output), []
            middle = output
    last = _node(node, [middle, read[1], *node.input[2:]], node.output[0], f"{node.name}/second")
    if node.op_type == "Conv":
        del last.attribute[:]
        last.attribute.append(onnx.helper.make_attribute("kernel_shape", [1] * (weights[1].ndim - 2)))
    yield last, []


def _node(like: onnx.NodeProto, inputs: Sequence[str], output: str, name: str) -> onnx.NodeProto:
    """A node as `like` with other inputs and another output."""
    made = onnx.NodeProto()
    made.CopyFrom(like)
    made.name = name
    del made.input[:], made.output[:]
    made.input.extend(inputs)
    made.output.append(output)
    return made


def _dequantized(
    like: onnx.NodeProto, values: Array, name: str, tensors: Mapping[str, onnx.TensorProto]
) -> tuple[onnx.NodeProto, list[onnx.TensorProto]]:
    """A DequantizeLinear of integer `values` with as many scales (and zero points) as they have outputs."""
    made = onnx.NodeProto()
    made.CopyFrom(like)
    made.name = made.output[0] = f"{name}/float"
    stored = [_stored(values, name)]
    axis = next((a.i for a in like.attribute if a.name == "axis"), 1)
    for i, old in enumerate(like.input[1:]):
        stored.append(_stored(numpy_helper.to_array(tensors[old])[: values.shape[axis]], f"{name}/{i}"))
    del made.input[:]
    made.input.extend(t.name for t in stored)
    return made, stored


def _stored(values: Array, name: str) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(values), name)
