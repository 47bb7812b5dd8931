"""A patched file has the operators and the shapes of the file that really making a layer two and exporting gives."""

from __future__ import annotations

import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from flyweight.deploy.formats.onnx import export
from flyweight.deploy.machine import largest_weight
from flyweight.deploy.splits import with_split_layer
from flyweight.graph.surgery import folded
from flyweight.methods import int8, lowrank
from flyweight.stages.deliver import prepared, with_numbers
from flyweight.testing import Subject, subject


class Net(nn.Module):
    """A convolution with a norm, one with stride, a layer called twice, linear on sequences and on rows."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        nn.init.normal_(self.norm.bias)  # a bias of zeros is left out of the file
        self.b = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.tokens = nn.Linear(24, 20)
        self.twice = nn.Linear(20, 20)
        self.rows = nn.Linear(20, 12)
        self.last = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.norm(self.a(x)))))
        x = torch.relu(self.tokens(x.flatten(2).transpose(1, 2)))
        x = self.twice(torch.relu(self.twice(x))).mean(1)
        return self.last(torch.relu(self.rows(x)))


RANK = 4
INTEGER = ("a", "b", "rows", "last")


@cache
def one() -> Subject:
    torch.manual_seed(0)
    return subject(Net().eval(), [(torch.randn(16, 3, 8, 8),)])


def written(folder: Path, names: tuple[str, ...], split: str = "") -> onnx.ModelProto:
    """The exported model with the layers `names` in int8 and, really, one layer made two."""
    graph = one().graph
    if split:
        graph = lowrank.restructure(graph, one().layers, one().stats, [lowrank.step(split, RANK)])
    wanted = [*names, *([f"{split}_in"] if split in names else [])]
    ready = prepared(graph, one().example, wanted, lambda: iter(one().batches))
    made = (
        with_numbers(ready, [int8.step(name, largest=largest_weight()) for name in wanted])[0]
        if wanted
        else ready.graph
    )
    export(made, one().example, folder / "x.onnx")
    return onnx.load(folder / "x.onnx")


@cache
def plain(names: tuple[str, ...]) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        return written(Path(folder), names)


def weight(layer: str) -> np.ndarray:
    return folded(one().graph, one().layers[layer])[0].detach().flatten(1).numpy()


def shapes(model: onnx.ModelProto) -> Counter:
    """Of everything but sizes and the grids of single values."""
    found = [t for t in model.graph.initializer if t.dims and t.data_type != TensorProto.INT64]
    return Counter((tuple(t.dims), t.data_type) for t in found)


@pytest.mark.parametrize(
    ("layer", "names"),
    [("a", ()), ("tokens", ()), ("twice", ()), ("rows", ()), ("b", INTEGER), ("rows", INTEGER), ("tokens", INTEGER)],
    ids=lambda value: value if isinstance(value, str) else "int8" if value else "float",
)
def test_the_variant_is_the_real_thing_but_for_its_numbers(tmp_path: Path, names: tuple[str, ...], layer: str):
    base = plain(names)
    before = base.SerializeToString()
    made = with_split_layer(base, layer, RANK, weight(layer))
    assert made is not None
    assert base.SerializeToString() == before
    real = written(tmp_path, names, layer)
    assert Counter(n.op_type for n in made.graph.node) == Counter(n.op_type for n in real.graph.node)
    assert shapes(made) == shapes(real)
    onnx.checker.check_model(made, full_check=True)
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    (answers,) = session.run(None, {session.get_inputs()[0].name: np.zeros((3, 3, 8, 8), np.float32)})
    assert answers.shape == (3, 5)
    assert np.isfinite(answers).all()


def test_a_layer_that_the_file_does_not_have_has_no_variant():
    base = plain(())
    assert with_split_layer(base, "other", RANK, np.ones((7, 7), np.float32)) is None
    assert with_split_layer(base, "tokens", RANK, weight("tokens") + 1) is None
