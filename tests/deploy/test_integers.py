"""Fixed point: the integer executor answers what ONNX Runtime does, to the last bit where sums fit a float."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from flyweight.deploy import runtimes
from flyweight.deploy.formats.onnx import export
from flyweight.deploy.integers import Executor, Fixed, _nearest
from flyweight.deploy.machine import largest_weight
from flyweight.errors import ModelError
from flyweight.graph.operators import roundable
from flyweight.graph.trace import trace
from flyweight.methods import int8
from flyweight.stages.deliver import prepared, with_numbers

NAMES = ("cnn", "residual", "depthwise", "branches", "wide")


def net(name: str):
    """A convolutional network, its file in fixed point, its input."""
    torch.manual_seed(0)
    parts = {
        "cnn": lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 4, 10), nn.ReLU(),
            nn.Linear(10, 4),
        ),
        "residual": Residual,
        "depthwise": lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU6(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU6(),
            nn.Conv2d(16, 24, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4),
        ),
        "branches": Branches,
        "wide": lambda: nn.Sequential(nn.Conv2d(3, 96, 3, padding=1), nn.ReLU(), nn.Conv2d(96, 8, 3, padding=1), nn.ReLU(),
                                      nn.Flatten(), nn.Linear(8 * 64, 4)),
    }  # fmt: skip
    return parts[name]().eval(), torch.randn(64, 3, 8, 8)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        x = self.first(x).relu()
        x = (x + self.inner(x)).relu()
        return self.last(x.mean((2, 3)))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.last = nn.Conv2d(10, 4, 3)

    def forward(self, x):
        return self.last(torch.cat([self.a(x).relu(), self.b(x).relu()], 1)).flatten(1)


def made(name: str, path):
    model, x = net(name)
    graph = trace(model, (x[:2],)).module
    names = list(roundable(graph))
    ready = prepared(graph, (x[:2],), names, lambda: iter([(x,)]))
    fixed, _ = with_numbers(ready, [int8.step(n, fixed=True, largest=largest_weight()) for n in names])
    export(fixed, (x[:2],), path)
    return fixed, x


@pytest.mark.parametrize("name", NAMES)
def test_integers_answer_what_the_runtime_does(name: str, tmp_path):
    graph, x = made(name, tmp_path / "fixed.onnx")
    executor = Executor(tmp_path / "fixed.onnx")
    (mine,) = executor.run({executor.inputs[0]: x.numpy()}).values()
    adapter = runtimes.get("onnxruntime")
    (theirs,) = adapter.load(tmp_path / "fixed.onnx", 1)({executor.inputs[0]: x.numpy()}).values()
    step = 2.0**mine.finest
    apart = np.abs(mine.floats() - theirs)
    # one step of a stored value moves the last layer's sums by at most its largest weight: a few of the outputs' spread
    near = 2e-2 * np.abs(theirs).max()
    assert (apart > step).mean() <= (1e-3 if name == "wide" else 0), (name, apart.max())
    assert apart.max() <= near
    with torch.no_grad():
        assert np.abs(graph(x).numpy() - theirs).max() <= near


@pytest.mark.parametrize("name", NAMES)
def test_accumulators_hold_every_sum(name: str, tmp_path):
    _, x = made(name, tmp_path / "fixed.onnx")
    executor = Executor(tmp_path / "fixed.onnx")
    seen: dict[str, int] = {}
    before = executor._product

    def watched(node, given):
        result = before(node, given)
        seen[node.name] = int(np.abs(result.integers).max()).bit_length() + 1
        return result

    executor._product = watched
    executor.run({executor.inputs[0]: (50 * x).numpy()})  # inputs that saturate
    assert seen
    assert all(seen[name] <= executor.accumulators[name] <= 32 for name in seen)


def pooled(path, kind: str, **settings):
    """A file of one operator between a stored value of zero point 128 and its floats."""
    made = onnx.helper.make_node
    nodes = [
        made("QuantizeLinear", ["input", "scale", "zero"], ["stored"]),
        made("DequantizeLinear", ["stored", "scale", "zero"], ["read"]),
        made("DequantizeLinear", ["integers", "scale"], ["weight"]),
        made(kind, ["read", "weight"] if kind == "Gemm" else ["read"], ["output"], "one", **settings),
    ]
    value = onnx.helper.make_tensor_value_info
    shapes = [[4, 9], None] if kind == "Gemm" else [[2, 3, 9, 9], None]
    graph = onnx.helper.make_graph(
        nodes, "g",
        [value("input", onnx.TensorProto.FLOAT, shapes[0])], [value("output", onnx.TensorProto.FLOAT, shapes[1])],
        [onnx.numpy_helper.from_array(np.array(0.5, np.float32), "scale"),
         onnx.numpy_helper.from_array(np.array(128, np.uint8), "zero"),
         onnx.numpy_helper.from_array(np.ones((9, 4), np.int8), "integers")],
    )  # fmt: skip
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
    return {"input": np.random.default_rng(0).normal(0, 20, shapes[0]).astype(np.float32)}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("MaxPool", {"kernel_shape": [3, 2]}),
        ("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 1], "pads": [1, 0, 1, 1], "dilations": [2, 3]}),
        ("AveragePool", {"kernel_shape": [3, 2], "strides": [2, 3]}),
        ("AveragePool", {"kernel_shape": [3, 2], "count_include_pad": 1}),
    ],
)
def test_windows_are_the_runtimes(kind, settings, tmp_path):
    feeds = pooled(tmp_path / "one.onnx", kind, **settings)
    (mine,) = Executor(tmp_path / "one.onnx").run(feeds).values()
    (theirs,) = runtimes.get("onnxruntime").load(tmp_path / "one.onnx", 1)(feeds).values()
    np.testing.assert_allclose(mine.floats(), theirs, rtol=1e-6)  # the runtime's mean is a float32


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
        ("MaxPool", {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"}),
        ("AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
        ("Gemm", {"alpha": 2.0}),
        ("Gemm", {"transA": 1}),
        ("Softmax", {}),
    ],
)
def test_settings_that_nothing_computes_are_refused(kind, settings, tmp_path):
    feeds = pooled(tmp_path / "one.onnx", kind, **settings)
    with pytest.raises(ModelError, match=r"has no fixed-point form|a mean over zeros") as error:
        Executor(tmp_path / "one.onnx").run(feeds)
    assert error.value.where == "one"


def test_rounding_is_to_the_nearest_with_ties_to_even():
    integers = np.arange(-40, 41)
    for exponent, divisor in ((3, 1), (2, 3), (0, 7), (-2, 5)):
        value = Fixed(integers, np.array(0), divisor)
        expected = [round(Fraction(int(i), divisor) / Fraction(2) ** exponent) for i in integers]
        assert _nearest(value, exponent).tolist() == expected  # Python's round of a fraction: ties to even


def test_what_is_no_fixed_point_is_refused(tmp_path):
    model, x = net("cnn")
    graph = trace(model, (x[:2],)).module
    export(graph, (x[:2],), tmp_path / "float.onnx")
    with pytest.raises(ModelError, match="a product of what"):
        Executor(tmp_path / "float.onnx").run({"input": x.numpy()})
