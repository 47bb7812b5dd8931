"""Masked attention in the form that runtimes make one kernel of.

The exporter guards every softmax behind a mask against rows in which all positions are masked, and puts zeros where NaN came
out. Runtimes that merge products, softmax and transpositions of attention (OpenVINO does) do not know the guard, and it never
acts: the exporter's masks are finite, so such rows become means where torch answers zero. Here they are found from the mask,
once for all layers that share it, and their answers are multiplied by zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper

__all__ = ["unguarded"]

FLOOR = np.float32(-1e30)  # what is masked is below it (finite or not); its exponential is zero


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
