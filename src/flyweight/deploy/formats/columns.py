"""Values one column wide, "batch channels length 1", laid on their side: "batch channels 1 length".

The numbers are the same, and in the same order. Kernels of runtimes work along rows: over a column a convolution takes
longer, as benchmarks/columns.py measures (networks on sound or sensors are often written that way).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from flyweight.deploy.formats.proto import attributes, without_unread

__all__ = ["laid"]

ON_ITS_SIDE = (0, 1, 3, 2)
ALIKE = {
    "Abs", "BatchNormalization", "Cast", "Clip", "Elu", "Erf", "Exp", "GlobalAveragePool", "GlobalMaxPool", "HardSigmoid",
    "HardSwish", "Identity", "InstanceNormalization", "LeakyRelu", "Log", "Mish", "Neg", "Reciprocal", "Relu", "Selu", "Sigmoid",
    "Softplus", "Sqrt", "Tanh",
}  # fmt: skip
BROADCAST = {"Add", "Div", "Max", "Min", "Mul", "PRelu", "Sub"}
WINDOWS = {"AveragePool", "Conv", "ConvTranspose", "MaxPool"}
PAIRS = ("kernel_shape", "strides", "dilations", "output_padding")  # of a window: one number for each direction
Shape = tuple[int | None, ...]


def laid(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model, in place, with parts that convolve columns laid on their side, and one cheap Transpose where values come
    into such a part or leave it. Unchanged where there are none."""
    weights = {t.name: tuple(t.dims) for t in model.graph.initializer}
    if not any(n.op_type == "Conv" and len(_stored(model, n.input[1], weights) or ()) == 4 for n in model.graph.node):
        return model
    part = _part(model, _shapes(model), weights)
    if part:
        _Turning(model, part).turn()
    return model


def _shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    inferred = onnx.shape_inference.infer_shapes(model).graph
    return {
        value.name: tuple(d.dim_value if d.HasField("dim_value") else None for d in value.type.tensor_type.shape.dim)
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }


def _stored(model: onnx.ModelProto, name: str, known: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """The dims of a constant, read through DequantizeLinear or as it is; None of anything else."""
    if name in known:
        return known[name]
    reader = next((n for n in model.graph.node if name in n.output), None)
    return known.get(reader.input[0]) if reader is not None and reader.op_type == "DequantizeLinear" else None


def _part(model: onnx.ModelProto, shapes: Mapping[str, Shape], weights: Mapping[str, tuple[int, ...]]) -> set[int]:
    """The nodes (by number) to be laid on their side: those that can be, and hang together with a convolution of a column."""
    nodes = list(model.graph.node)
    able = {i for i, node in enumerate(nodes) if _able(model, node, shapes, weights)}
    makers = {name: i for i in able for name in nodes[i].output}
    beside: dict[int, set[int]] = {i: set() for i in able}
    for i in able:
        for name in nodes[i].input:
            if name in makers:
                beside[i].add(makers[name])
                beside[makers[name]].add(i)
    part: set[int] = set()
    waiting = [i for i in able if nodes[i].op_type == "Conv" and _tall(model, nodes[i], weights)]
    while waiting:
        i = waiting.pop()
        if i not in part:
            part.add(i)
            waiting += beside[i]
    return part


def _tall(model: onnx.ModelProto, node: onnx.NodeProto, weights: Mapping[str, tuple[int, ...]]) -> bool:
    dims = _stored(model, node.input[1], weights)
    return dims is not None and dims[2] > 1


def _able(
    model: onnx.ModelProto, node: onnx.NodeProto, shapes: Mapping[str, Shape], weights: Mapping[str, tuple[int, ...]]
) -> bool:
    """Whether a node computes the same of a value on its side."""

    def column(name: str) -> bool:
        return len(shapes.get(name, ())) == 4 and shapes[name][3] == 1 and name not in weights

    def flat(name: str) -> bool:
        """A constant that is the same in both directions."""
        dims = weights.get(name)
        return dims is not None and all(size == 1 for size in dims[-2:]) and len(dims) <= 4

    if len(node.output) != 1 or not column(node.output[0]):
        return False
    given = attributes(node)
    match node.op_type:
        case kind if kind in BROADCAST:
            return all(column(name) or flat(name) for name in node.input)
        case "Concat":
            return given["axis"] in (0, 1) and all(map(column, node.input))
        case "QuantizeLinear" | "DequantizeLinear":
            scalar = not weights.get(node.input[1], (2,)) or given.get("axis", 1) == 1
            return scalar and column(node.input[0]) and not given.get("block_size")
        case "Pad":
            known = len(node.input) < 4 and node.input[1] in weights
            return known and column(node.input[0])
        case "Conv" | "ConvTranspose":
            stored = len(_stored(model, node.input[1], weights) or ()) == 4
            return stored and column(node.input[0]) and "output_shape" not in given
        case kind:
            return (kind in ALIKE or kind in WINDOWS) and column(node.input[0])


class _Turning:
    """The change of one model. Values keep their names outside of the part, and have others within."""

    def __init__(self, model: onnx.ModelProto, part: set[int]) -> None:
        self.model = model
        self.tensors = {t.name: onnx.TensorProto.FromString(t.SerializeToString()) for t in model.graph.initializer}
        self.nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
        self.part = part
        self.turned = {name for i in part for name in self.nodes[i].output}  # that the part makes

    def turn(self) -> None:
        entered: set[str] = set()
        made: list[onnx.NodeProto] = []
        for i, node in enumerate(self.nodes):
            if i not in self.part:
                made.append(self._composed(node))
                continue
            entering = {name: None for name in self._values(node) if name not in self.turned | entered}
            entered |= entering.keys()
            made += [_transpose(name, _within(name)) for name in entering]
            answer = node.output[0]
            made += [*self._turned(node), _transpose(_within(answer), answer)]  # back, where something outside reads it
        graph = self.model.graph
        del graph.node[:], graph.initializer[:]
        graph.node.extend(made)
        graph.initializer.extend(self.tensors.values())
        without_unread(self.model)

    def _values(self, node: onnx.NodeProto) -> Iterator[str]:
        """What a node reads on its side: not its weights, scales and other constants."""
        every = node.op_type in BROADCAST or node.op_type == "Concat"
        for name in node.input if every else node.input[:1]:
            if name not in self.tensors:
                yield name

    def _composed(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """A node outside; a Transpose reads what the part makes as it lies there."""
        if node.op_type == "Transpose" and node.input[0] in self.turned:
            (turns,) = node.attribute
            perm = [ON_ITS_SIDE[axis] for axis in turns.ints]
            del turns.ints[:]
            turns.ints.extend(perm)
            node.input[0] = _within(node.input[0])
        return node

    def _turned(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """A node of the part, on its side, and what it needs before it."""
        before: list[onnx.NodeProto] = []
        values = set(self._values(node))
        if node.op_type in ("Conv", "ConvTranspose"):
            before = self._turned_weight(node)
        elif node.op_type == "Pad":
            node.input[1] = self._turned_pads(node.input[1])
        if node.op_type in WINDOWS:
            _swap(node)
        for i, name in enumerate(node.input):
            if name in values:
                node.input[i] = _within(name)
        node.output[0] = _within(node.output[0])
        return [*before, node]

    def _turned_weight(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """The stored weight on its side if no other node reads it, else a Transpose, which runtimes compute once."""
        name = node.input[1]
        stored, readers = name, [n for n in self.nodes if name in n.input]
        if name not in self.tensors:
            read = next(n for n in self.nodes if name in n.output)
            stored = read.input[0]
            readers += [n for n in self.nodes if stored in n.input and n is not read]
        if len(readers) == 1:
            self.tensors[stored] = _on_its_side(self.tensors[stored])
            return []
        node.input[1] = f"{name}/{node.output[0]}"
        return [_transpose(name, node.input[1])]

    def _turned_pads(self, name: str) -> str:
        widths = numpy_helper.to_array(self.tensors[name]).reshape(2, 4)
        fresh = _within(name)
        turned = np.ascontiguousarray(widths[:, ON_ITS_SIDE]).reshape(-1)
        self.tensors[fresh] = numpy_helper.from_array(turned, fresh)
        return fresh


def _within(name: str) -> str:
    return f"{name}/laid"


def _transpose(source: str, result: str) -> onnx.NodeProto:
    return onnx.helper.make_node("Transpose", [source], [result], name=f"{result}/turn", perm=ON_ITS_SIDE)


def _on_its_side(tensor: onnx.TensorProto) -> onnx.TensorProto:
    turned = np.ascontiguousarray(numpy_helper.to_array(tensor).transpose(ON_ITS_SIDE))
    return numpy_helper.from_array(turned, tensor.name)


def _swap(node: onnx.NodeProto) -> None:
    """The two directions of a window's settings."""
    for one in node.attribute:
        if one.name in PAIRS:
            _set(one, one.ints[::-1])
        elif one.name == "pads":
            top, left, bottom, right = one.ints
            _set(one, [left, top, right, bottom])


def _set(attribute: onnx.AttributeProto, values: Sequence[int]) -> None:
    values = list(values)
    del attribute.ints[:]
    attribute.ints.extend(values)
