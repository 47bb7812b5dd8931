"""OpenVINO: what it runs in integers, sizes that change, and what it cannot load. The laws of files run over it elsewhere."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from flyweight.deploy import runtimes
from flyweight.deploy.answers import distance, tolerance
from flyweight.deploy.clock import compare
from flyweight.deploy.formats.onnx import stored_name
from flyweight.deploy.runtimes import openvino as adapter
from flyweight.errors import ModelError, UsageError
from flyweight.graph.trace import trace

from ..graph.cases import rows
from .int8_nets import delivered
from .test_onnx_format import export
from .test_onnxruntime import qdq_linear


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    one = delivered("depthwise behind zeros")
    path = tmp_path_factory.mktemp("files") / "net.onnx"
    export(one.graph, one.example, path)
    return path


def test_each_set_of_sizes_is_answered_and_those_beyond_the_cache_too(file):
    one, predict = delivered("depthwise behind zeros"), adapter.load(file, 1)
    x = rows(one.example, 12)[0].numpy()
    (whole,) = predict({"x": x}).values()
    for batch in range(1, adapter.MOST_SIZES + 4):  # the cache holds fewer
        (got,) = predict({"x": x[:batch]}).values()
        assert got.shape == (batch, 10)
        # the same kernels on the same rows; those for other sizes may add in another order
        assert np.allclose(got, whole[:batch], atol=1e-2 * np.abs(whole).max())


def test_integers_that_are_only_stored_do_not_conform(tmp_path):
    path = qdq_linear(tmp_path / "stored.onnx", transpose=True, bias=True, quantize_input=False)
    assert adapter.conformance(path, ["fc.weight_q"]) == ["fc.weight_q"]


def test_an_unknown_planned_name_is_refused(file):
    with pytest.raises(UsageError, match="nothing"):
        adapter.conformance(file, ["nothing"])
    assert adapter.conformance(file, [stored_name("d")]) == []


def test_bfloat16_answers_nearly_what_float_does_and_not_exactly(tmp_path):
    one = delivered("residual")
    path = tmp_path / "float.onnx"
    export(one.ready.graph, one.example, path)
    feed = {"x": rows(one.example, 8)[0].numpy()}
    (exact,), (rough,) = (runtimes.get(name).load(path, 1)(feed).values() for name in ("openvino", "openvino_bf16"))
    off = float(np.abs(exact - rough).max() / np.abs(exact).max())
    assert off < 0.05  # eight bits of a mantissa, a dozen layers
    assert off > 1e-6 or "avx512_bf16" not in runtimes.openvino.flags()


@pytest.mark.parametrize("depth", [1, 12, 40])
def test_what_bfloat16_rounds_is_within_the_tolerance_and_a_wrong_layer_is_not(depth: int, tmp_path):
    torch.manual_seed(depth)
    made = [part for _ in range(depth) for part in (nn.Linear(64, 64), nn.ReLU())]
    for layer in made[::2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # that the answers' spread stays what it is
    graph, x = trace(nn.Sequential(*made).eval(), (torch.randn(2, 64),)).module, torch.randn(64, 64)
    export(graph, (x[:2],), tmp_path / "net.onnx")
    (got,) = runtimes.get("openvino_bf16").load(tmp_path / "net.onnx", 1)({"input": x.numpy()}).values()
    allowed = tolerance(0, depth, roundoff=runtimes.get("openvino_bf16").roundoff)
    with torch.no_grad():
        off = distance([graph(x)], [torch.from_numpy(got)])
        assert off <= allowed
        assert off > tolerance(0, depth) or "avx512_bf16" not in runtimes.openvino.flags()
        graph.get_submodule("0").weight.mul_(1 - 2 * allowed)
        assert distance([graph(x)], [torch.from_numpy(got)]) > allowed


def test_times_of_two_runtimes_are_taken_in_the_same_blocks(file, tmp_path):
    one = delivered("depthwise behind zeros")
    np.savez(tmp_path / "feed.npz", x=rows(one.example, 1)[0].numpy())
    found = compare(
        {"a": file, "b": file}, {"batch=1": tmp_path / "feed.npz"}, reference="a", others={"b": "openvino"},
        processes=2, block_runs=5, blocks=2,
    )  # fmt: skip
    assert found.times["b"]["batch=1"].latency_s > 0
    with pytest.raises(UsageError, match="no-such"):
        compare({"a": file, "b": file}, {"x": file}, reference="a", others={"b": "no-such"})


def test_a_damaged_a_missing_and_a_wrongly_fed_model_are_told_apart(file, tmp_path):
    with pytest.raises(UsageError, match="no model file"):
        adapter.load(tmp_path / "missing.onnx", 1)
    (tmp_path / "damaged.onnx").write_bytes(file.read_bytes()[:200])
    with pytest.raises(ModelError, match="cannot load"):
        adapter.load(tmp_path / "damaged.onnx", 1)
    with pytest.raises(ModelError, match="could not run"):
        adapter.load(file, 1)({"x": np.zeros((1, 7, 8, 8), np.float32)})


def test_a_model_compiled_before_answers_and_executes_as_one_compiled_anew(
    file, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    """The clock times what it finds kept: it must be the same model."""
    feeds = {"x": rows(delivered("depthwise behind zeros").example, 2)[0].numpy()}

    def executed() -> list[tuple[str, ...]]:  # what the runtime names itself is numbered on and on
        numbered = re.compile(r"_\d{3,}")
        return [
            (op.op_type, *sorted(numbered.sub("", name) for name in op.inputs)) for op in adapter.executed_ops(file)
        ]

    (plain,), before = adapter.load(file, 1)(feeds).values(), executed()
    core = adapter._core.__wrapped__()
    monkeypatch.setattr(adapter, "_core", lambda: core)
    adapter.keep_compiled(tmp_path)
    for _ in range(2):  # written, then read
        (answers,) = adapter.load(file, 1)(feeds).values()
        assert np.array_equal(answers, plain)
        assert executed() == before
    assert any(tmp_path.iterdir())
