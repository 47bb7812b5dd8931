"""Sizes other than the batch are free where the examples differ in them, from the trace to the file of the runtime."""

from __future__ import annotations

import copy
import json

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flyweight.deploy.formats.onnx import export
from flyweight.errors import TraceError, UnsafeFileError
from flyweight.graph.axes import groups
from flyweight.graph.program import load, save
from flyweight.graph.surgery import cut
from flyweight.graph.trace import trace

from .nets import net

torch.set_num_threads(1)


def attention() -> nn.Module:
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        rows, steps, _ = x.shape
        q, k, v = (part(x).view(rows, -1, 4, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        share = (q @ k.transpose(-1, -2) + mask[:, None, None]).softmax(-1)
        y = (share @ v).transpose(1, 2).reshape(rows, steps, 16)
        return self.fc(F.relu(self.a(y)).mean(1))

    parts = {name: nn.Linear(6, 16) for name in "qkv"}
    return net(forward, **parts, a=nn.Linear(16, 12), fc=nn.Linear(12, 5)).eval()


def call(rows: int, steps: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, steps, 6), torch.randn(rows, steps)


LENGTHS = ((2, 1), (1, 6), (3, 9), (5, 17))  # rows, steps; only 6 and 9 are traced and proven


@pytest.fixture(scope="module")
def traced():
    torch.manual_seed(0)
    model = attention()
    return model, trace(model, call(4, 6), {}, [(call(2, 9), {})]).module


def placeholders(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "placeholder"]


def test_a_size_in_which_examples_differ_is_free(traced):
    model, graph = traced
    for rows, steps in LENGTHS:
        inputs = call(rows, steps)
        torch.testing.assert_close(graph(*inputs), model(*inputs), rtol=1e-5, atol=1e-6)
    # one name for one size: the mask is as long as the sequence
    assert [node.meta["free"] for node in placeholders(graph)] == [{0: "batch", 1: "size_1"}] * 2


def test_free_sizes_are_stored_and_known_again(traced):
    text, tensors = save(traced[1])
    assert [node["shape"] for node in json.loads(text)["nodes"][:2]] == [
        ["batch", "size_1=6", 6],
        ["batch", "size_1=6"],
    ]
    again = load(text, tensors)
    assert save(again)[0] == text
    x, mask = (node.meta["val"] for node in placeholders(again))
    assert x.shape[1].node.expr == mask.shape[1].node.expr
    assert x.shape[1].node.expr != x.shape[0].node.expr
    for inputs in (call(*shape) for shape in LENGTHS):
        assert torch.equal(again(*inputs), traced[1](*inputs))


def test_a_program_that_was_measured_on_two_rows_still_has_a_free_batch(traced):
    graph = copy.deepcopy(traced[1])
    for node in placeholders(graph):
        node.meta["val"] = torch.empty([2, *([6] * (node.meta["val"].ndim - 1))])  # as after fresh sizes of an example
    stored, wanted = (json.loads(save(one)[0])["nodes"][:2] for one in (graph, traced[1]))
    assert stored == wanted


@pytest.mark.parametrize("size", ["length", "size_1", "size_1=x", "batch=2", "size_1=-3", -1])
def test_other_sizes_are_refused(traced, size):
    text, tensors = save(traced[1])
    program = json.loads(text)
    program["nodes"][0]["shape"][1] = size
    with pytest.raises(UnsafeFileError):
        load(json.dumps(program), tensors)


def test_the_runtimes_file_takes_every_length_also_after_a_cut(traced, tmp_path):
    graph = copy.deepcopy(traced[1])
    found = [group for group in groups(graph, call(2, 6)) if not group.frozen]
    assert {(group.kind, group.size) for group in found} == {("heads", 4), ("channels", 12)}
    cut(graph, {group: list(range(group.size // 2)) for group in found})
    export(graph, call(2, 6), tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    assert [one.shape[:2] for one in session.get_inputs()] == [["batch", "seq"]] * 2
    for inputs in (call(*shape) for shape in LENGTHS):
        feed = {one.name: value.numpy() for one, value in zip(session.get_inputs(), inputs, strict=True)}
        with torch.no_grad():
            np.testing.assert_allclose(session.run(None, feed)[0], graph(*inputs), rtol=1e-4, atol=1e-5)


def test_a_length_that_forward_fixes_is_refused_where_examples_differ():
    recurrent = net(lambda self, x: self.rnn(x)[0][:, -1], rnn=nn.LSTM(4, 5, batch_first=True))
    with pytest.raises(TraceError, match="axis 1 of input `x`"):
        trace(recurrent, (torch.randn(2, 6, 4),), {}, [((torch.randn(2, 7, 4),), {})])


def test_examples_that_differ_in_more_than_sizes_are_refused():
    model = net(lambda self, x: self.fc(x).flatten(1).mean(1), fc=nn.Linear(4, 5))
    with pytest.raises(TraceError, match="differ in more than sizes"):
        trace(model, (torch.randn(2, 6, 4),), {}, [((torch.randn(2, 4),), {})])
