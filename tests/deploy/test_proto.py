"""What the passes over a file share."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from flyweight.deploy.formats.proto import without_unread


def model(nodes: list[onnx.NodeProto], tensors: list[str]) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    kept = [numpy_helper.from_array(np.ones(2, np.float32), name) for name in tensors]
    graph = helper.make_graph(
        nodes, "net", [value("x", TensorProto.FLOAT, [2]), value("which", TensorProto.BOOL, [])],
        [value("y", TensorProto.FLOAT, [2])], kept,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def names(made: onnx.ModelProto) -> tuple[list[str], list[str]]:
    return [node.output[0] for node in made.graph.node], [tensor.name for tensor in made.graph.initializer]


def test_what_no_answer_comes_from_goes_with_all_that_leads_to_it_alone():
    made = model(
        [
            helper.make_node("Add", ["x", "of_dead"], ["dead"]),
            helper.make_node("Relu", ["dead"], ["deader"]),
            helper.make_node("Add", ["x", "kept"], ["y"]),
        ],
        ["of_dead", "kept", "stray"],
    )
    assert names(without_unread(made)) == (["y"], ["kept"])


def test_what_only_a_branch_reads_stays():
    value = helper.make_tensor_value_info("out", TensorProto.FLOAT, [2])

    def branch(reads: str) -> onnx.GraphProto:
        return helper.make_graph([helper.make_node("Add", [reads, "inner"], ["out"])], reads, [], [value])

    choose = helper.make_node("If", ["which"], ["y"], then_branch=branch("a"), else_branch=branch("x"))
    made = model([helper.make_node("Relu", ["x"], ["a"]), choose], ["inner", "stray"])
    onnx.checker.check_model(without_unread(made), full_check=True)
    assert names(made) == (["a", "y"], ["inner"])
