"""Fixed point from end to end: every scale a power of two, and integers alone give the artifact's answers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import flyweight as fw
from flyweight.deploy import runtimes
from flyweight.deploy.integers import Executor
from flyweight.errors import UsageError


@pytest.fixture(scope="module")
def given():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(24 * 16, 5),
    ).eval()  # fmt: skip
    x = torch.randn(700, 3, 8, 8)
    return net, {"calib": x[:300], "tune": x[300:500], "test": x[500:]}


def test_an_artifact_in_fixed_point_is_what_integers_compute(given, tmp_path):
    net, roles = given
    made = fw.compress(
        net, **roles, budget="size<=40%, agreement>=80%", methods=["channels", "fixed"], task="classify",
        workdir=tmp_path / "o", progress=False, rules=[fw.rule("*", bits=8)],
    )  # fmt: skip
    labels = {option.label for site, option in made.plan.choices.items() if site.startswith("numbers:")}
    assert labels == {"fixed point"}
    model = onnx.load(made.folder / "model.onnx")
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    scales = [stored[n.input[1]] for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert scales
    assert all((np.frexp(scale)[0] == 0.5).all() for scale in scales)
    executor = Executor(made.folder / "model.onnx")
    feeds = {executor.inputs[0]: roles["test"].numpy()}
    (mine,) = executor.run(feeds).values()
    (theirs,) = runtimes.get("onnxruntime").load(made.folder / "model.onnx", 1)(feeds).values()
    assert np.array_equal(mine.floats().astype(np.float32), theirs)  # 384 columns: every sum is exact in floats
    assert max(executor.accumulators.values()) <= 32
    (note,) = [one for one in made.notes if one.code == "numbers.fixed-point"]
    assert str(max(executor.accumulators.values())) in note.text
    again = fw.apply(net, made.plan, **roles, workdir=tmp_path / "again", progress=False)
    assert (again.folder / "model.onnx").read_bytes() == (made.folder / "model.onnx").read_bytes()


def test_fixed_point_and_int8_exclude_each_other(given, tmp_path):
    net, roles = given
    with pytest.raises(UsageError, match="both int8 and fixed"):
        fw.compress(net, **roles, budget="size<=40%", methods=["int8", "fixed"], workdir=tmp_path / "o", progress=False)
