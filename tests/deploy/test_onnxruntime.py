"""The adapter against nets whose fate in ONNX Runtime is known, each built node by node."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from flyweight.deploy import runtimes
from flyweight.deploy.machine import largest_weight
from flyweight.deploy.runtimes import onnxruntime as adapter
from flyweight.errors import ModelError, RuntimeMissing, UsageError


def qdq_conv(path: Path, *, activation=np.uint8, zero_point=0, scale=0.05, op="Relu", quantize_output=True) -> Path:
    """x -> q/dq -> Conv(int8 weight, int32 bias) -> Relu or Clip(0, 6) -> q/dq -> y"""
    rng = np.random.default_rng(0)
    weight_scale = (rng.random(16) * 0.01 + 0.01).astype(np.float32)
    constants = {
        "xs": np.float32(0.02), "xz": activation(0), "ys": np.float32(scale), "yz": activation(zero_point),
        "conv.weight_q": rng.integers(-127, 128, (16, 3, 3, 3)).astype(np.int8), "ws": weight_scale,
        "wz": np.zeros(16, np.int8), "conv.bias_q": rng.integers(-9, 9, 16).astype(np.int32),
        "bs": weight_scale * np.float32(0.02), "bz": np.zeros(16, np.int32), "lo": np.float32(0), "hi": np.float32(6),
    }  # fmt: skip
    node = helper.make_node
    nodes = [
        node("QuantizeLinear", ["x", "xs", "xz"], ["xq"], "q_in"),
        node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"], "dq_in"),
        node("DequantizeLinear", ["conv.weight_q", "ws", "wz"], ["w"], "dq_w", axis=0),
        node("DequantizeLinear", ["conv.bias_q", "bs", "bz"], ["b"], "dq_b", axis=0),
        node("Conv", ["xd", "w", "b"], ["conv"], "node_conv", pads=[1, 1, 1, 1]),
        node(op, ["conv"] if op == "Relu" else ["conv", "lo", "hi"], ["act"], "node_act"),
    ]
    if quantize_output:
        nodes += [node("QuantizeLinear", ["act", "ys", "yz"], ["yq"], "q_out")]
        nodes += [node("DequantizeLinear", ["yq", "ys", "yz"], ["y"], "dq_out")]
    else:
        nodes[-1].output[0] = "y"
    return save(path, nodes, constants, ["b", 3, 8, 8], ["b", 16, 8, 8])


def qdq_linear(path: Path, *, transpose: bool, bias: bool, quantize_input=True) -> Path:
    """x [rows, 32] (or [batch, tokens, 32]) -> q/dq -> MatMul with an int8 weight"""
    rng = np.random.default_rng(0)
    constants = {
        "xs": np.float32(0.02), "xz": np.uint8(128), "wz": np.int8(0), "ws": np.float32(0.01),
        "fc.weight_q": rng.integers(-largest_weight(), largest_weight() + 1, (16, 32) if transpose else (32, 16)).astype(np.int8),
        "fc.bias": rng.random(16).astype(np.float32),
    }  # fmt: skip
    node, source, weight = helper.make_node, "x", "w"
    nodes = [node("DequantizeLinear", ["fc.weight_q", "ws", "wz"], ["w"], "dq_w")]
    if quantize_input:
        nodes += [node("QuantizeLinear", ["x", "xs", "xz"], ["xq"], "q_in")]
        nodes += [node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"], "dq_in")]
        source = "xd"
    if transpose:
        nodes += [node("Transpose", ["w"], ["wt"], "node_t", perm=[1, 0])]
        weight = "wt"
    nodes += [node("MatMul", [source, weight], ["mm" if bias else "y"], "node_fc")]
    nodes += [node("Add", ["mm", "fc.bias"], ["y"], "node_add")] if bias else []
    rank_2 = bias and not transpose
    batch = ["b"] if rank_2 else ["b", "t"]
    return save(path, nodes, constants, [*batch, 32], [*batch, 16])


def save(path: Path, nodes, constants, shape_in, shape_out) -> Path:
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape_in)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape_out)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items() if name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def executed(path: Path) -> set[str]:
    return {op.op_type for op in adapter.executed_ops(path)}


EVERY_NAME = ["conv.weight_q", "node_conv", "conv"]


@pytest.mark.parametrize(
    "settings",
    [{}, {"op": "Clip", "scale": 6 / 255}, {"op": "Clip", "scale": 5 / 255}],
    ids=["relu", "relu6", "relu6 narrower"],
)
def test_a_rightly_placed_conv_conforms_by_every_name(tmp_path, settings):
    path = qdq_conv(tmp_path / "net.onnx", **settings)
    assert "QLinearConv" in executed(path)  # the ground truth, independent of the rule under test
    assert adapter.conformance(path, [*EVERY_NAME, "node_act"]) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"activation": np.int8},
        {"zero_point": 3},
        {"op": "Clip", "scale": 6.12 / 255},
        {"quantize_output": False},
    ],
    ids=["signed symmetric after relu", "zero point above the minimum", "relu6 too wide", "no output quantizer"],
)
def test_a_conv_that_fell_back_to_float_is_named_by_every_name(tmp_path, settings):
    path = qdq_conv(tmp_path / "net.onnx", **settings)
    assert "FusedConv" in executed(path)
    assert "QLinearConv" not in executed(path)
    assert adapter.conformance(path, EVERY_NAME) == EVERY_NAME


def test_a_weight_renamed_by_a_folded_transpose_is_found(tmp_path):
    path = qdq_linear(tmp_path / "net.onnx", transpose=True, bias=True)
    assert "MatMulIntegerToFloat" in executed(path)
    assert not any("fc.weight_q" in op.inputs for op in adapter.executed_ops(path))  # the case is the one meant
    assert adapter.conformance(path, ["fc.weight_q", "node_fc"]) == []


def test_rank_2_with_a_float_bias_is_the_silent_float_gemm(tmp_path):
    path = qdq_linear(tmp_path / "net.onnx", transpose=False, bias=True)
    assert "Gemm" in executed(path)
    assert adapter.conformance(path, ["fc.weight_q", "node_fc"]) == ["fc.weight_q", "node_fc"]


def test_a_weight_that_is_only_stored_in_int8_does_not_conform_under_gemm(tmp_path):
    rng = np.random.default_rng(0)
    constants = {
        "w_q": rng.integers(-127, 128, (16, 32)).astype(np.int8), "ws": np.float32(0.01), "wz": np.int8(0),
    }  # fmt: skip
    nodes = [
        helper.make_node("DequantizeLinear", ["w_q", "ws", "wz"], ["w"], "dq"),
        helper.make_node("Gemm", ["x", "w"], ["y"], "node_fc", transB=1),
    ]
    path = save(tmp_path / "net.onnx", nodes, constants, ["b", 32], ["b", 16])
    assert adapter.conformance(path, ["w_q"]) == ["w_q"]


def pooled(path: Path, op: str) -> Path:
    """x -> q/dq -> op -> q/dq -> y: an operator without weights between quantizers"""
    constants = {"s": np.float32(0.02), "z": np.uint8(0)}
    attributes = {"kernel_shape": [2, 2], "strides": [2, 2]} if op == "MaxPool" else {}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"], "q_in"),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"], "dq_in"),
        helper.make_node(op, ["xd"] * (2 if op == "Add" else 1), ["p"], "node_op", **attributes),
        helper.make_node("QuantizeLinear", ["p", "s", "z"], ["pq"], "q_out"),
        helper.make_node("DequantizeLinear", ["pq", "s", "z"], ["y"], "dq_out"),
    ]
    side = 4 if op == "MaxPool" else 8
    return save(path, nodes, constants, ["b", 3, 8, 8], ["b", 3, side, side])


@pytest.mark.parametrize("op", ["Add", "MaxPool", "Sigmoid"])
def test_operators_without_weights_are_judged_by_their_node(tmp_path, op):
    assert adapter.conformance(pooled(tmp_path / "net.onnx", op), ["node_op", "p"]) == []


@pytest.mark.parametrize("op", ["Elu", "Softplus"])
def test_operators_without_an_integer_kernel_are_named(tmp_path, op):
    assert adapter.conformance(pooled(tmp_path / "net.onnx", op), ["node_op", "p"]) == ["node_op", "p"]


def test_an_unknown_planned_name_is_refused(tmp_path):
    with pytest.raises(UsageError, match="conv9"):
        adapter.conformance(qdq_conv(tmp_path / "net.onnx"), ["conv9.weight_q"])


def test_the_loaded_model_equals_integer_arithmetic_done_by_hand(tmp_path):
    path = qdq_linear(tmp_path / "net.onnx", transpose=False, bias=False)
    constants = {entry.name: numpy_helper.to_array(entry) for entry in onnx.load(path).graph.initializer}
    codes = np.random.default_rng(1).integers(0, 256, (2, 5, 32))
    x = ((codes - 128) * np.float64(0.02)).astype(np.float32)  # on the grid, so rounding is no matter
    expected = (codes - 128) @ constants["fc.weight_q"].astype(np.int64) * (0.02 * 0.01)
    got = adapter.load(path, 1)({"x": x})
    assert set(got) == {"y"}
    # sums stay below 32 * 128 * 127 < 2^24, exact in float32: what is left is the rounding of two scales and a product
    np.testing.assert_allclose(got["y"], expected, rtol=4 * np.finfo(np.float32).eps, atol=1e-7)
    assert adapter.input_names(path) == ("x",)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_what_was_asked_for(tmp_path, threads):
    path = qdq_conv(tmp_path / "net.onnx")
    session = adapter._session(path, threads)
    assert session.get_session_options().intra_op_num_threads == threads


def test_a_damaged_a_missing_and_a_wrongly_fed_model_are_told_apart(tmp_path):
    path = tmp_path / "net.onnx"
    with pytest.raises(UsageError, match="no model file"):
        adapter.load(path, 1)
    path.write_bytes(b"not a model")
    with pytest.raises(ModelError, match="cannot load"):
        adapter.load(path, 1)
    predict = adapter.load(qdq_conv(path), 1)
    with pytest.raises(ModelError, match="could not run") as caught:
        predict({"x": np.zeros((1, 5, 8, 8), np.float32)})
    assert str(path) in str(caught.value)


def test_the_folder_is_the_registry():
    assert "onnxruntime" in runtimes.names()
    assert runtimes.get("onnxruntime") is adapter.RUNTIME
    with pytest.raises(UsageError, match="onnxruntime"):
        runtimes.get("no-such-runtime")


def test_a_runtime_that_is_not_installed_names_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # how Python itself marks a module as not importable
    with pytest.raises(RuntimeMissing, match="pip install"):
        runtimes.get("onnxruntime")


@pytest.mark.parametrize(
    ("version", "refused"), [("1.9.3", True), ("1.23.2", True), ("1.24", False), ("1.24.0rc1", False), ("2.0", False)]
)
def test_a_runtime_that_is_too_old_names_the_install_line(monkeypatch, version, refused):
    monkeypatch.setattr(metadata, "version", {"onnxruntime": version}.__getitem__)
    if not refused:
        assert runtimes.get("onnxruntime") is adapter.RUNTIME
        return
    with pytest.raises(RuntimeMissing, match="too old here") as caught:
        runtimes.get("onnxruntime")
    assert "pip install 'onnxruntime>=1.24'" in caught.value.fix
    assert version in caught.value.what


def test_the_oldest_versions_are_those_that_the_project_asks_for():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for name in runtimes.names():
        runtime = runtimes.known(name)
        assert f'"{runtime.package}>={runtime.oldest}"' in text


def test_asking_for_a_runtime_imports_neither_torch_nor_the_runtime():
    code = (
        "import sys; from flyweight.deploy import clock, clock_worker, folder, machine, runtimes;"
        "runtimes.get('onnxruntime');"
        "print(sorted({'torch', 'onnxruntime', 'onnx', 'matplotlib'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_preferred_multiple_follows_the_vector_width():
    from flyweight.deploy import machine

    assert adapter.preferred_multiple() == (16 if "avx512f" in machine.flags() else 8)
