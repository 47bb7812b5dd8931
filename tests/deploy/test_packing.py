"""Integer weights of few bits: a smaller file, and in both runtimes the int8 network that it was before."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from flyweight.deploy import runtimes
from flyweight.deploy.formats.onnx import export, stored_name
from flyweight.deploy.formats.packing import packed_weights, unpacked_weights
from flyweight.graph.numbers import grid_bits, integer_layers
from flyweight.graph.operators import roundable
from flyweight.graph.trace import trace
from flyweight.methods import int8
from flyweight.numerics.packed import WIDTHS, integer_bytes, stored_bits
from flyweight.stages.deliver import prepared, with_numbers


def model_of(numbers: np.ndarray) -> onnx.ModelProto:
    """Nothing but the weights, read back as floats."""
    weight = numpy_helper.from_array(numbers, "w")
    one = numpy_helper.from_array(np.array(1, np.float32), "one")
    node = helper.make_node("DequantizeLinear", ["w", "one"], ["y"])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, list(numbers.shape))
    graph = helper.make_graph([node], "g", [], [out], [weight, one])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@given(st.sampled_from(WIDTHS), st.sampled_from([(97, 31), (8, 13, 3, 3), (3001,), (40, 40)]), st.integers(0, 99))
def test_packed_numbers_come_back_to_the_last_one(bits, shape, seed):
    """By the operators (in onnx's own reference) and by reading the parts; ends of the range included."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    numbers = np.random.default_rng(seed).integers(low, high + 1, shape).astype(np.int8)
    numbers.reshape(-1)[:2] = low, high
    whole = model_of(numbers)
    small = packed_weights(copy.deepcopy(whole), {"w": bits})
    onnx.checker.check_model(small, full_check=True)
    found = onnx.reference.ReferenceEvaluator(small).run(None, {})[0]
    np.testing.assert_array_equal(found, numbers.astype(np.float32))
    back = unpacked_weights(copy.deepcopy(small))
    tensors = {t.name: numpy_helper.to_array(t) for t in back.graph.initializer}
    np.testing.assert_array_equal(tensors["w"], numbers)
    assert set(tensors) == {"w", "one"}
    assert len(back.graph.node) == 1


@pytest.mark.parametrize("count", [10, 500, 900, 1500, 4096, 20_000, 300_000])
def test_fewer_bits_never_take_more_and_packing_never_makes_a_file_larger(count):
    sizes = []
    for bits in WIDTHS:
        numbers = np.random.default_rng(0).integers(-2, 2, (count,)).astype(np.int8)
        whole = model_of(numbers)
        before, small = whole.ByteSize(), packed_weights(whole, {"w": bits})
        parts = [t for t in small.graph.initializer if t.name.startswith("w/packed") or t.name == "w"]
        assert sum(len(t.raw_data) for t in parts) == integer_bytes(count, bits)
        assert small.ByteSize() <= before
        assert (small.ByteSize() == before) == (stored_bits(count, bits) == 8)
        sizes.append(small.ByteSize())
    assert sizes == sorted(sizes)


class Both(nn.Module):
    """Convolutions (one depthwise) and linear layers, wide enough to be packed; the last one is too small."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.c, self.f, self.g = nn.Conv2d(64, 33, 3, padding=1), nn.Linear(33 * 16, 31), nn.Linear(31, 10)

    def forward(self, x):
        x = self.c(self.b(self.a(x).relu()).relu()).relu()
        return self.g(self.f(nn.functional.max_pool2d(x, 2).flatten(1)).relu())


class Sequences(nn.Module):
    """Linear layers on sequences behind an embedding, all in int8."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.f, self.g = nn.Embedding(300, 64), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, ids):
        return self.g(self.f(self.words(ids)).relu())


def rounded(net: nn.Module, x: torch.Tensor, largest: int):
    graph = trace(net.eval(), (x[:2],)).module
    names = [*roundable(graph), *(n for n, m in graph.named_modules() if isinstance(m, nn.Embedding))]
    ready = prepared(graph, (x[:2],), names, lambda: ((part,) for part in x.split(16)))
    return with_numbers(ready, [int8.step(name, largest=largest) for name in names])[0]


@pytest.fixture(params=["images", "sequences"])
def subject(request):
    if request.param == "images":
        return Both(), torch.randn(48, 3, 8, 8)
    return Sequences(), torch.randint(300, (48, 7))


@pytest.mark.parametrize("largest", [1, 3, 7, 31])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_runtimes_compute_the_packed_file_as_the_plain_one_with_the_same_kernels(subject, largest, runtime, tmp_path):
    net, x = subject
    graph = rounded(net, x, largest)
    small, plain = tmp_path / "small.onnx", tmp_path / "plain.onnx"
    export(graph, (x[:2],), small)
    onnx.save(unpacked_weights(onnx.load(small)), plain)
    assert small.stat().st_size < plain.stat().st_size
    run = runtimes.get(runtime)
    (name,) = run.input_names(small)
    one, other = (run.load(path, 1)({name: x.numpy()}) for path in (small, plain))
    for key in other:
        np.testing.assert_array_equal(one[key], other[key])
    names = [stored_name(name) for name in integer_layers(graph)]
    assert run.conformance(small, names) == []
    kinds = [[op.op_type for op in run.executed_ops(path)] for path in (small, plain)]
    if runtime == "onnxruntime":  # OpenVINO lists constants too
        assert kinds[0] == kinds[1]


def test_what_is_packed_is_what_numpy_computes_in_integers(tmp_path):
    """An independent network: integers from the file's own bytes, sums in int64, one rounding a layer."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 80)), torch.randn(200, 96)
    graph = rounded(net, x, 7)
    path = tmp_path / "n.onnx"
    export(graph, (x[:2],), path)
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    assert "0.weight_integer" not in tensors
    low_and_high = tensors["0.weight_integer/packed_4"].astype(np.int64)
    halves = [low_and_high & 15, low_and_high >> 4]
    first = np.concatenate(halves).reshape(64, 96) - 8
    assert np.abs(first).max() == 7
    quantizers = [
        n.args[1:3] for n in graph.graph.nodes if n.target == torch.ops.aten.fake_quantize_per_tensor_affine.default
    ]
    (scale, zero), (middle, middle_zero) = quantizers[:2]
    steps = graph.meta["extra_tensors"]["0.weight_scale"].double().numpy()
    integers = np.clip(np.round(x.numpy() / np.float32(scale)) + zero, 0, 255) - zero
    bias = np.round(graph.get_submodule("0").bias.detach().double().numpy() / (steps * scale))
    hidden = (integers @ first.T + bias) * (steps * scale)
    stored = np.clip(np.round(hidden / middle) + middle_zero, middle_zero, 255)
    shown = copy.deepcopy(graph)
    node = [n for n in shown.graph.nodes if n.target == torch.ops.aten.fake_quantize_per_tensor_affine.default][1]
    next(n for n in shown.graph.nodes if n.op == "output").args = (node,)
    shown.recompile()
    with torch.no_grad():
        mine = np.round(shown(x).numpy() / middle) + middle_zero
    assert (np.abs(mine - stored) > 0).mean() < 1e-3  # a sum that lies between two integers may go either way
    assert np.abs(mine - stored).max() <= 1


def test_seven_bits_take_a_byte():
    assert [grid_bits(2 ** (bits - 1) - 1) for bits in WIDTHS] == [2, 3, 4, 5, 6, 8, 8]


def test_the_file_is_written_alike_each_time(subject, tmp_path):
    net, x = subject
    graph = rounded(net, x, 7)
    for name in ("a", "b"):
        export(graph, (x[:2],), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
