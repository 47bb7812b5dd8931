"""Packed files: every runtime computes what the graph does, and what is stored is small."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from flyweight.deploy import runtimes
from flyweight.deploy.formats.onnx import export
from flyweight.graph.operators import roundable, tables
from flyweight.graph.trace import trace
from flyweight.methods import stored
from flyweight.numerics.packed import WIDTHS, packed_bytes
from flyweight.stages.deliver import prepared, with_numbers


class Words(nn.Module):
    """An embedding, layers on sequences and not, with and without bias, sizes that no byte divides."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 128)
        self.mixed = nn.Linear(128, 130)
        self.narrow = nn.Linear(130, 33, bias=False)
        self.last = nn.Linear(33, 7)

    def forward(self, ids):
        return self.last(self.narrow(self.mixed(self.table(ids)).relu()).mean(1))


class Pictures(nn.Module):
    """Convolutions of every kind that is packed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 24, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.depth = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.wide = nn.Conv2d(24, 40, 3, padding="same", groups=2)
        self.line = nn.Conv1d(40, 12, 5, padding=2)

    def forward(self, x):
        x = self.wide(self.depth(self.norm(self.first(x)).relu())).relu()
        return self.line(x.flatten(2)).mean(2)


NETS = {
    "words": (Words, lambda rows: torch.randint(300, (rows, 9))),
    "pictures": (Pictures, lambda rows: torch.randn(rows, 3, 8, 8)),
}


def made(name: str, bits: int, path, chosen=None):
    torch.manual_seed(0)
    build, draw = NETS[name]
    x = draw(16)
    graph = trace(build().eval(), (x[:2],)).module
    every = [*roundable(graph), *tables(graph)]
    ready = prepared(graph, (x[:2],), (), lambda: iter([(x,)]), packed=roundable(graph))
    packed, _ = with_numbers(ready, [stored.step(n, bits) for n in (chosen or every)])
    export(packed, (x[:2],), path)
    return packed, x, every


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", NETS)
def test_every_runtime_computes_what_the_graph_does(name: str, bits: int, tmp_path):
    graph, x, _ = made(name, bits, tmp_path / "packed.onnx")
    with torch.no_grad():
        expected = graph(x).numpy()
    for runtime in ("onnxruntime", "openvino"):
        adapter = runtimes.get(runtime)
        (given,) = adapter.input_names(tmp_path / "packed.onnx")
        (answer,) = adapter.load(tmp_path / "packed.onnx", 1)({given: x.numpy()}).values()
        # the same weights to the last bit: what is left is the order of float sums
        assert np.allclose(answer, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_the_file_holds_the_bytes_counted(bits: int, tmp_path):
    graph, _, every = made("words", bits, tmp_path / "packed.onnx")
    model = onnx.load(tmp_path / "packed.onnx")
    found = {t.name: numpy_helper.to_array(t).nbytes for t in model.graph.initializer}
    biases = sum(size for name, size in found.items() if name.endswith(".bias_float"))
    counted = sum(packed_bytes(*graph.get_submodule(name).weight.shape, bits) for name in every)
    # beside them a few numbers a layer: shapes, units, powers of two
    assert 0 <= sum(found.values()) - biases - counted < 100 * len(every)


def test_floats_of_layers_are_made_once_when_the_file_is_loaded(tmp_path):
    made("words", 4, tmp_path / "packed.onnx", ["mixed", "last"])
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "run.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "packed.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = {node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node}
    assert kinds.isdisjoint({"Floor", "Cast", "Concat", "Sub"})
