"""Guards against NaN leave the file of masked attention, and every runtime still answers what torch does."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flyweight.deploy import runtimes
from flyweight.deploy.formats.attention import turned_keys
from flyweight.deploy.formats.onnx import export
from flyweight.graph.trace import trace


class Attends(nn.Module):
    """Two layers that share a mask, in the forms that masks take."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.parts = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))

    def forward(self, x, real):
        mask = {
            "keys": lambda: real.bool()[:, None, None, :].expand(-1, 1, x.shape[1], -1),
            "pairs": lambda: real.bool()[:, None, None, :] & real.bool()[:, None, :, None],
        }[self.kind]()
        for part in self.parts:
            q, k, v = (y.unflatten(2, (2, 8)).transpose(1, 2) for y in part(x).chunk(3, 2))
            x = x + F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        return x


def given(kind: str):
    torch.manual_seed(0)
    graph = trace(Attends(kind).eval(), (torch.randn(3, 5, 16), torch.ones(3, 5))).module
    x, real = torch.randn(4, 5, 16), torch.ones(4, 5)
    real[1, 3:] = 0
    real[2] = 0  # nothing to attend to at all
    return graph, (x, real)


@pytest.mark.parametrize("kind", ["keys", "pairs"])
def test_answers_stay_and_guards_go(kind: str, tmp_path):
    graph, inputs = given(kind)
    export(graph, tuple(x[:3] for x in inputs), tmp_path / "one.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "one.onnx").graph.node]
    assert "IsNaN" not in kinds
    assert kinds.count("ReduceMax") == 1  # one look at the mask for both layers
    with torch.no_grad():
        expected = graph(*inputs).numpy()
    assert np.isfinite(expected).all()
    for name in ("onnxruntime", "openvino"):
        adapter = runtimes.get(name)
        feeds = dict(zip(adapter.input_names(tmp_path / "one.onnx"), (x.numpy() for x in inputs), strict=True))
        (answer,) = adapter.load(tmp_path / "one.onnx", 1)(feeds).values()
        assert np.allclose(answer, expected, atol=1e-5)


def test_weights_that_are_given_back_keep_their_guard(tmp_path):
    class Told(nn.Module):
        def forward(self, x, real):
            mask = torch.zeros_like(real).masked_fill(real == 0, float("-inf"))[:, None]
            weights = (x @ x.transpose(1, 2) + mask).softmax(-1)
            weights = torch.where(weights.isnan(), torch.zeros(()), weights)
            return weights @ x, weights

    x, real = torch.randn(4, 5, 16), torch.ones(4, 5)
    real[2] = 0
    graph = trace(Told(), (x[:2], real[:2])).module
    export(graph, (x[:2], real[:2]), tmp_path / "one.onnx")
    assert "IsNaN" in [node.op_type for node in onnx.load(tmp_path / "one.onnx").graph.node]
    adapter = runtimes.get("onnxruntime")
    feeds = dict(zip(adapter.input_names(tmp_path / "one.onnx"), (x.numpy(), real.numpy()), strict=True))
    for answer, expected in zip(adapter.load(tmp_path / "one.onnx", 1)(feeds).values(), graph(x, real), strict=True):
        assert np.allclose(answer, expected.numpy(), atol=1e-5)


class Crosses(nn.Module):
    """Queries of one sequence and keys of another, of a length of their own; no mask."""

    def __init__(self, scale: float | None) -> None:
        super().__init__()
        self.scale = scale
        self.q, self.kv = nn.Linear(16, 16), nn.Linear(6, 32)

    def forward(self, x, y):
        k, v = (z.unflatten(2, (4, 4)).transpose(1, 2) for z in self.kv(y).chunk(2, 2))
        q = self.q(x).unflatten(2, (4, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_keys_are_turned_as_queries_are_and_scores_scaled_by_one(scale: float | None, tmp_path):
    torch.manual_seed(0)
    model = Crosses(scale).eval()
    calls = [(torch.randn(3, rows, 16), torch.randn(3, 4, 6)) for rows in (5, 9)]
    graph = trace(model, calls[0], {}, [(calls[1], {})]).module
    export(graph, calls[0], tmp_path / "one.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "one.onnx").graph.node]
    assert kinds.count("Transpose") == 5  # queries, keys as they are and then by their last two axes, values, answers
    assert kinds.count("Mul") == 1
    x, y = torch.randn(2, 7, 16), torch.randn(2, 4, 6)
    for name in ("onnxruntime", "openvino"):
        adapter = runtimes.get(name)
        feeds = dict(zip(adapter.input_names(tmp_path / "one.onnx"), (x.numpy(), y.numpy()), strict=True))
        (answer,) = adapter.load(tmp_path / "one.onnx", 1)(feeds).values()
        np.testing.assert_allclose(answer, model(x, y).detach().numpy(), atol=1e-5)


def test_keys_that_something_else_reads_stay_for_it(tmp_path):
    """The turned keys are an answer as well, in the form that the exporter gave them."""
    made = onnx.helper.make_node
    sizes = {"whole": [-1], "low": [-9], "two": [-2], "one": [-1], "high": [9]}
    nodes = [
        made("Transpose", ["x"], ["k"], perm=[0, 2, 1, 3]), made("Shape", ["k"], ["s"]),
        made("Slice", ["s", "low", "two"], ["first"]), made("Slice", ["s", "two", "one"], ["length"]),
        made("Slice", ["s", "one", "high"], ["width"]), made("Concat", ["whole", "length", "width"], ["into"], axis=0),
        made("Concat", ["first", "width", "length"], ["back"], axis=0), made("Reshape", ["k", "into"], ["three"]),
        made("Transpose", ["three"], ["swapped"], perm=[0, 2, 1]), made("Reshape", ["swapped", "back"], ["turned"]),
    ]  # fmt: skip
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes, "keys", [onnx.helper.make_tensor_value_info("x", kind, ["b", 5, 2, 3])],
        [onnx.helper.make_tensor_value_info(name, kind, None) for name in ("turned", "three")],
        [onnx.numpy_helper.from_array(np.array(value, dtype=np.int64), name) for name, value in sizes.items()],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    x = np.random.default_rng(0).standard_normal((4, 5, 2, 3)).astype(np.float32)
    onnx.save(model, tmp_path / "before.onnx")
    after = turned_keys(onnx.load(tmp_path / "before.onnx"))
    onnx.save(after, tmp_path / "after.onnx")
    assert sum(node.op_type == "Reshape" for node in after.graph.node) == 1  # for the other answer
    load = runtimes.get("onnxruntime").load
    before, now = (load(tmp_path / f"{name}.onnx", 1)({"x": x}) for name in ("before", "after"))
    for name in ("turned", "three"):
        np.testing.assert_array_equal(now[name], before[name])
