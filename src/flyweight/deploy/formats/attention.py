"""Attention in the form that runtimes make one kernel of.

The exporter turns keys by three operators, through a form that has batch and heads in one axis, and scales queries and keys
each by a root. Runtimes that merge products and softmax of attention know one scale, and take the turn of a product's second
factor into its kernel where it is one operator of its own: keys are turned as queries are, and then by their last two axes.

It also guards every softmax behind a mask against rows in which all positions are masked, and puts zeros where NaN came out.
Those runtimes do not know the guard either, and it never acts: the exporter's masks are finite, so such rows become means
where torch answers zero. Here they are found from the mask, once for all layers that share it, and their answers are
multiplied by zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from flyweight.deploy.formats.proto import without_unread

__all__ = ["turned_keys", "unguarded"]

FLOOR = np.float32(-1e30)  # what is masked is below it (finite or not); its exponential is zero


def turned_keys(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model, in place, in which keys are turned as queries are and then by one operator, and scores scaled by one."""
    graph = model.graph
    made = {output: node for node in graph.node for output in node.output}
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if len(tensor.dims) <= 1}
    for node in [node for node in graph.node if node.op_type == "Reshape"]:
        source = _turned_by_three(node, made, tensors)
        if source is not None:
            turn = onnx.helper.make_node(
                "Transpose", [source.output[0]], [node.output[0]], node.name, perm=[0, 1, 3, 2]
            )
            node.CopyFrom(turn)
    counts: dict[str, int] = {}
    for name in [name for node in graph.node for name in node.input]:
        counts[name] = counts.get(name, 0) + 1
    for product in [node for node in graph.node if node.op_type == "MatMul"]:
        queries, keys = (made.get(name) for name in product.input)
        scales = [_scale(one, tensors) for one in (queries, keys)]
        if queries is None or keys is None or None in scales or any(counts[name] > 1 for name in product.input):
            continue
        both = np.array(np.float64(scales[0]) * np.float64(scales[1]), dtype=np.float32)
        scores, bare, scale = product.output[0], f"{product.output[0]}/bare", f"{product.output[0]}/scale"
        graph.initializer.append(numpy_helper.from_array(both, scale))
        scaled = onnx.helper.make_node("Mul", [bare, scale], [scores], f"{product.name}/scaled")
        product.input[:] = [queries.input[0], keys.input[0]]
        product.output[0] = bare
        graph.node.insert(list(graph.node).index(product) + 1, scaled)
    return without_unread(model)


def _turned_by_three(
    last: onnx.NodeProto, made: Mapping[str, onnx.NodeProto], tensors: Mapping[str, np.ndarray]
) -> onnx.NodeProto | None:
    """The Transpose of four axes whose last two axes a Reshape to three, a Transpose and the Reshape `last` swap."""
    swap = made.get(last.input[0])
    first = made.get(swap.input[0]) if swap is not None and swap.op_type == "Transpose" else None
    source = made.get(first.input[0]) if first is not None and first.op_type == "Reshape" else None
    if swap is None or first is None or source is None or list(swap.attribute[0].ints) != [0, 2, 1]:
        return None
    if source.op_type != "Transpose" or len(source.attribute[0].ints) != 4:
        return None
    into, back = (made.get(node.input[1]) for node in (first, last))
    if into is None or back is None or (into.op_type, back.op_type) != ("Concat", "Concat"):
        return None
    # (-1, length, width), then (batch and heads, width, length), all out of the source's own shape
    whole = tensors.get(into.input[0])
    if whole is None or whole.tolist() != [-1] or list(into.input[1:]) != list(back.input[1:])[::-1]:
        return None
    parts = [
        _part_of_shape(made.get(name), source.output[0], made, tensors) for name in (*back.input[:1], *into.input[1:])
    ]
    return source if parts == [(0, 1), (2,), (3,)] else None


def _part_of_shape(
    node: onnx.NodeProto | None, value: str, made: Mapping[str, onnx.NodeProto], tensors: Mapping[str, np.ndarray]
) -> Sequence[int] | None:
    """Which of the four sizes of `value` a Slice of its Shape takes."""
    shape = made.get(node.input[0]) if node is not None and node.op_type == "Slice" else None
    if node is None or shape is None or shape.op_type != "Shape" or shape.input[0] != value:
        return None
    if any(a.name != "start" or a.i for a in shape.attribute) or len(node.input) > 3:
        return None
    if not all(name in tensors for name in node.input[1:3]):
        return None
    start, end = (int(tensors[name].reshape(-1)[0]) for name in node.input[1:3])
    return tuple(range(4))[start:end]


def _scale(node: onnx.NodeProto | None, tensors: Mapping[str, np.ndarray]) -> float | None:
    """The number that a Mul multiplies its first input by."""
    known = tensors.get(node.input[1]) if node is not None and node.op_type == "Mul" else None
    return float(known.reshape(-1)[0]) if known is not None and known.size == 1 else None


def unguarded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model, in place, without guards against NaN behind masked softmaxes."""
    graph = model.graph
    made = {output: node for node in graph.node for output in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    answers = {value.name for value in graph.output}
    masks: dict[tuple[str, ...], tuple[str, str]] = {}  # what makes a mask -> the finite mask, the rows that count
    for guard in [node for node in graph.node if node.op_type == "Where"]:
        softmax = _guarded(guard, made)
        products = readers.get(guard.output[0], [])
        only = all(n.op_type == "MatMul" and n.input[0] == guard.output[0] for n in products)
        if softmax is None or not products or not only or guard.output[0] in answers:
            continue
        total = made.get(softmax.input[0])
        place = _mask_of(total, made) if total is not None else None
        if total is None or place is None or len(readers[total.output[0]]) > 1:
            continue
        maker = made[total.input[place]]
        if tuple(maker.input) not in masks:
            masks[tuple(maker.input)] = _finite(graph, maker)
        total.input[place], alive = masks[tuple(maker.input)]
        for product in products:
            product.input[0] = softmax.output[0]
            _multiplied(graph, product, alive)
        graph.node.remove(made[guard.input[0]])
        graph.node.remove(guard)
    return model


def _guarded(node: onnx.NodeProto, made: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """The softmax over the last axis that a Where guards, if it is such a guard."""
    test, softmax = made.get(node.input[0]), made.get(node.input[2])
    if test is None or softmax is None or test.op_type != "IsNaN" or softmax.op_type != "Softmax":
        return None
    axis = next((a.i for a in softmax.attribute if a.name == "axis"), -1)
    return softmax if test.input[0] == node.input[2] and axis == -1 else None


def _mask_of(total: onnx.NodeProto, made: Mapping[str, onnx.NodeProto]) -> int | None:
    """Which term of the softmax's argument is the mask: the one that a Where makes."""
    chosen = [name in made and made[name].op_type == "Where" for name in total.input] if total.op_type == "Add" else []
    return chosen.index(True) if sorted(chosen) == [False, True] else None


def _finite(graph: onnx.GraphProto, maker: onnx.NodeProto) -> tuple[str, str]:
    """Adds the mask without infinities, and a one for every row in which something is not masked, a zero for others."""
    mask = maker.output[0]
    names = {part: f"{mask}/{part}" for part in ("floor", "axis", "finite", "largest", "some", "alive")}
    constants = {"floor": np.array(FLOOR), "axis": np.array([-1], dtype=np.int64)}
    graph.initializer.extend(numpy_helper.from_array(value, names[part]) for part, value in constants.items())
    new = [
        onnx.helper.make_node("Max", [mask, names["floor"]], [names["finite"]], names["finite"]),
        onnx.helper.make_node("ReduceMax", [mask, names["axis"]], [names["largest"]], names["largest"], keepdims=1),
        onnx.helper.make_node("Greater", [names["largest"], names["floor"]], [names["some"]], names["some"]),
        onnx.helper.make_node("Cast", [names["some"]], [names["alive"]], names["alive"], to=onnx.TensorProto.FLOAT),
    ]
    at = list(graph.node).index(maker) + 1
    for node in reversed(new):
        graph.node.insert(at, node)
    return names["finite"], names["alive"]


def _multiplied(graph: onnx.GraphProto, product: onnx.NodeProto, alive: str) -> None:
    name, bare = product.output[0], f"{product.output[0]}/every"
    product.output[0] = bare
    node = onnx.helper.make_node("Mul", [bare, alive], [name], f"{product.name}/alive")
    graph.node.insert(list(graph.node).index(product) + 1, node)
