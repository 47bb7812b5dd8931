"""Zeros around a convolution's input as its own: the same answers with one operator less, and only where that is so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from flyweight.deploy import runtimes
from flyweight.deploy.formats.pads import merged_pads

ORT = runtimes.get("onnxruntime")


def model(
    widths: list[int],
    *,
    mode: str = "constant",
    value: float | None = None,
    own: list[int] | None = None,
    reader: str = "",
) -> onnx.ModelProto:
    """x [b, 2, 7, 7] -> Pad -> Conv 3x3 (-> and a second reader of the padded value)."""
    rng = np.random.default_rng(0)
    channels = 2 + widths[1] + widths[5]
    constants = {"widths": np.array(widths, np.int64), "w": rng.standard_normal((4, channels, 3, 3)).astype(np.float32)}
    inputs = ["x", "widths"]
    if value is not None:
        constants["value"] = np.array(value, np.float32)
        inputs += ["value"]
    nodes = [helper.make_node("Pad", inputs, ["padded"], mode=mode)]
    nodes += [helper.make_node("Conv", ["padded", "w"], ["y"], **({"pads": own} if own else {}))]
    outputs = ["y"]
    if reader:
        nodes += [helper.make_node(reader, ["padded"], ["z"])]
        outputs += ["z"]
    graph = helper.make_graph(
        nodes, "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 2, 7, 7])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", f"{name}1", f"{name}2", f"{name}3"]) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(made)
    return made


def answers(made: onnx.ModelProto, path: Path) -> list[np.ndarray]:
    onnx.save(made, path)
    x = np.random.default_rng(1).standard_normal((3, 2, 7, 7)).astype(np.float32) + 1
    return list(ORT.load(path, 1)({"x": x}).values())


def pads(made: onnx.ModelProto) -> int:
    return sum(node.op_type == "Pad" for node in made.graph.node)


ZEROS = [0, 0, 1, 2, 0, 0, 0, 1]  # before each axis, then behind each
CASES = {
    "other widths at each end": ({"widths": ZEROS}, 0),
    "a zero that is written": ({"widths": ZEROS, "value": 0.0}, 0),
    "beside the convolution's own": ({"widths": ZEROS, "own": [1, 1, 0, 2]}, 0),
    "for another reader too": ({"widths": ZEROS, "reader": "Relu"}, 1),
    "no zeros": ({"widths": ZEROS, "value": 1.5}, 1),
    "mirrored": ({"widths": ZEROS, "mode": "reflect"}, 1),
    "more channels": ({"widths": [0, 1, 1, 1, 0, 0, 1, 1]}, 1),
    "less at one end": ({"widths": [0, 0, -1, 1, 0, 0, 1, 1]}, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_answers_stay_and_what_can_be_merged_is(tmp_path: Path, name: str):
    settings, left = CASES[name]
    before, after = model(**settings), merged_pads(model(**settings))
    assert pads(before) == 1
    assert pads(after) == left
    conv = next(node for node in after.graph.node if node.op_type == "Conv")
    merges = left == 0 or "reader" in settings
    assert (conv.input[0] == "x") == merges
    for a, b in zip(answers(before, tmp_path / "a.onnx"), answers(after, tmp_path / "b.onnx"), strict=True):
        assert np.allclose(a, b, atol=1e-5)
