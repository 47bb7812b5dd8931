"""Variants of an exported file with other widths, for the clock: patched in seconds, never delivered.

Time does not depend on what the weights are, so a variant keeps the first channels of each tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from flyweight.deploy.formats.onnx import stored_name
from flyweight.deploy.formats.proto import without_unread

__all__ = ["Width", "patched", "products", "with_float_layer"]


@dataclass(frozen=True)
class Width:
    """How much of a layer's weight to keep: the first `inputs` of its input channels (of each of its channel `groups`), the
    first `outputs` rows."""

    inputs: int
    outputs: int
    groups: int = 1


def products(model: onnx.ModelProto, weights: Mapping[str, NDArray[np.float32]]) -> dict[str, str]:
    """The tensors that hold the weights of linear layers on sequences, "in out", and whose they are: `weights` by layer, "out
    in". In float the exporter turns and renames them, so they are found by their values."""
    tensors = {t.name: t for t in model.graph.initializer}
    found = {stored_name(layer): layer for layer in weights if stored_name(layer) in tensors}
    for name in [n.input[1] for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in tensors]:
        values = numpy_helper.to_array(tensors[name])
        owner = next((layer for layer, weight in weights.items() if np.array_equal(values, weight.T)), None)
        if owner is not None:
            found[name] = owner
    return found


def patched(
    model: onnx.ModelProto, widths: Mapping[str, Width], turned: Mapping[str, str] | None = None
) -> onnx.ModelProto:
    """A copy of an exported `model` in which every layer named has the given width.

    Layers are found by the names of their weights, float ("conv.weight") or stored in integers, those in `turned` (see
    `products`) by theirs; what reads the weights through DequantizeLinear has its scales and zero points cut too, and what
    scales a product's input its factors. Reshapes to (batch, rest) take any width.
    """
    turned = turned or {}
    result = onnx.ModelProto()
    result.CopyFrom(model)
    tensors = {t.name: t for t in result.graph.initializer}
    new: dict[str, onnx.TensorProto] = {}
    owners = [_first_owner(node.input, widths, turned) for node in result.graph.node]
    reader = {node.input[0]: owner for node, owner in zip(result.graph.node, owners, strict=True) if owner}
    makers = {output: node for node in result.graph.node for output in node.output}
    read_back = {node.output[0]: owner for node, owner in zip(result.graph.node, owners, strict=True) if owner}
    for node, named in zip(result.graph.node, owners, strict=True):
        # a float layer among int8 ones reads its input with a scale for every channel, whose name says nothing
        owner = named or (reader.get(node.output[0]) if node.op_type == "DequantizeLinear" else None)
        whose = (named or read_back.get(node.input[1])) if node.op_type in ("Conv", "MatMul") else None
        if whose and widths[whose].groups > 1:
            _set_groups(node, widths[whose].groups)
        if whose and node.op_type == "MatMul":
            _cut_factors(node, widths[whose], makers, tensors, new)
        if owner is not None:
            _cut_inputs(node, owner, widths[owner], tensors, new, turned)
        elif node.op_type == "Reshape" and node.input[1] in tensors:
            _any_width(node, tensors, new)
    result.graph.initializer.extend(new.values())
    return without_unread(result)


def _first_owner(names: Iterable[str], widths: Mapping[str, Width], turned: Mapping[str, str]) -> str | None:
    return next((owner for name in names if (owner := _owner(name, widths, turned))), None)


def _owner(name: str, widths: Mapping[str, Width], turned: Mapping[str, str]) -> str | None:
    for layer in widths:
        own = (f"{layer}.weight", f"{layer}.bias", f"{layer}.bias_float", stored_name(layer))
        if name in own or name.startswith(f"{layer}.bias_integer"):
            return layer
    return turned[name] if turned.get(name) in widths else None


def _cut_factors(
    product: onnx.NodeProto,
    width: Width,
    makers: Mapping[str, onnx.NodeProto],
    tensors: Mapping[str, onnx.TensorProto],
    new: dict[str, onnx.TensorProto],
) -> None:
    """The factors by which outlier channels were moved from a product's input into its weights, one for each input."""
    maker = makers.get(product.input[0])
    while maker is not None and maker.op_type in ("QuantizeLinear", "DequantizeLinear"):
        maker = makers.get(maker.input[0])
    if maker is None or maker.op_type != "Mul":
        return
    for i, name in enumerate(maker.input):
        if name in tensors and len(tensors[name].dims) == 1 and tensors[name].dims[0] > width.inputs:
            fresh = f"{name}/{product.name}"
            new[fresh] = numpy_helper.from_array(numpy_helper.to_array(tensors[name])[: width.inputs], fresh)
            maker.input[i] = fresh


def _cut_inputs(
    node: onnx.NodeProto,
    layer: str,
    width: Width,
    tensors: Mapping[str, onnx.TensorProto],
    new: dict[str, onnx.TensorProto],
    turned: Mapping[str, str],
) -> None:
    """Cuts every stored tensor that a layer's node (or the DequantizeLinear of its weight, bias or input) reads."""
    of_input = node.op_type == "DequantizeLinear" and node.input[0] not in tensors
    for i, name in enumerate(node.input):
        if name not in tensors:
            continue
        values = numpy_helper.to_array(tensors[name])
        if values.ndim == 0 or (values.size == 1 and node.op_type != "DequantizeLinear"):
            continue
        if name in turned:
            cut = values[: width.inputs, : width.outputs]
        else:
            cut = values[: width.inputs * width.groups if of_input else width.outputs]
            cut = cut[:, : width.inputs] if values.ndim > 1 else cut
        # named by layer: equal tensors of several layers may be stored once
        fresh = f"{name}/{layer}"
        new[fresh] = numpy_helper.from_array(np.ascontiguousarray(cut), fresh)
        node.input[i] = fresh


def _set_groups(node: onnx.NodeProto, groups: int) -> None:
    next(a for a in node.attribute if a.name == "group").i = groups


def _any_width(node: onnx.NodeProto, tensors: Mapping[str, onnx.TensorProto], new: dict[str, onnx.TensorProto]) -> None:
    shape = numpy_helper.to_array(tensors[node.input[1]])
    if shape.shape == (2,) and shape[0] in (-1, 0):
        fresh = f"{node.input[1]}/any"
        new[fresh] = numpy_helper.from_array(np.array([0, -1], dtype=np.int64), fresh)
        node.input[1] = fresh
        kept = [a for a in node.attribute if a.name != "allowzero"]  # 0 is to mean "as it was"
        del node.attribute[:]
        node.attribute.extend(kept)


def with_float_layer(model: onnx.ModelProto, layer: str) -> onnx.ModelProto:
    """A copy of an int8 `model` in which one layer reads float weights and so runs in float, all else as it was."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    tensors = {t.name: t for t in result.graph.initializer}
    for node in [n for n in result.graph.node if n.op_type == "DequantizeLinear"]:
        name = node.input[0]
        if name != stored_name(layer) and not name.startswith(f"{layer}.bias_integer"):
            continue
        integers, scale = (numpy_helper.to_array(tensors[i]) for i in node.input[:2])
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        by = [-1 if i == axis else 1 for i in range(integers.ndim)]
        values = integers.astype(np.float32) * scale.reshape(by)
        result.graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
        if name == stored_name(layer) and axis == 1:
            _read_in_float(result, node.output[0])
        elif name == stored_name(layer):
            _read_by_channel(result, tensors, node.output[0])
        result.graph.node.remove(node)
    return result


def _read_in_float(model: onnx.ModelProto, weight: str) -> None:
    """A linear layer on sequences reads what was quantized for it alone."""
    makers = {output: node for node in model.graph.node for output in node.output}
    layer = next(n for n in model.graph.node if weight in n.input)
    read = makers.get(layer.input[0])
    stored = makers.get(read.input[0]) if read is not None and read.op_type == "DequantizeLinear" else None
    if stored is not None and stored.op_type == "QuantizeLinear":
        layer.input[0] = stored.input[0]


def _read_by_channel(model: onnx.ModelProto, tensors: Mapping[str, onnx.TensorProto], weight: str) -> None:
    """Repeats the scale of the layer's input, as the exporter does, lest the runtime rounds the float weights."""
    layer = next(n for n in model.graph.node if weight in n.input)
    at, read = next((i, n) for i, n in enumerate(model.graph.node) if layer.input[0] in n.output)
    if read.op_type != "DequantizeLinear":
        return
    inputs = next(t.dims[1] for t in model.graph.initializer if t.name == weight)
    channels = inputs * next((a.i for a in layer.attribute if a.name == "group"), 1)
    own = onnx.NodeProto()
    own.CopyFrom(read)
    own.name, own.output[0] = f"{read.name}/{layer.name}", f"{read.output[0]}/{layer.name}"
    for i in (1, 2):
        values = numpy_helper.to_array(tensors[read.input[i]])
        own.input[i] = f"{own.output[0]}/{i}"
        repeated = np.full(channels, values.reshape(-1)[0], dtype=values.dtype)
        model.graph.initializer.append(numpy_helper.from_array(repeated, own.input[i]))
    del own.attribute[:]
    own.attribute.append(onnx.helper.make_attribute("axis", 1))
    layer.input[0] = own.output[0]
    model.graph.node.insert(at + 1, own)
