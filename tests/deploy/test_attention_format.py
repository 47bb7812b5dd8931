"""Guards against NaN leave the file of masked attention, and every runtime still answers what torch does."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flyweight.deploy import runtimes
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
