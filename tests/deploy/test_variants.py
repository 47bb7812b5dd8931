"""A patched file has the nodes and the shapes of the file that really cutting and exporting would make."""

from __future__ import annotations

import copy
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from flyweight.deploy import runtimes
from flyweight.deploy.formats.onnx import export, stored_name
from flyweight.deploy.latency import touched, widths_of
from flyweight.deploy.variants import Width, patched, products, with_float_layer
from flyweight.graph.axes import Group, groups
from flyweight.graph.rewrite import refresh
from flyweight.graph.surgery import cut
from flyweight.stages.ranks import weights_of

from ..graph.cases import rows
from .int8_nets import NETS, delivered, ready

ORT = runtimes.get("onnxruntime")
FLOAT, INT8 = "float", "int8"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("variants")


@cache
def base(folder: Path, name: str, regime: str) -> onnx.ModelProto:
    """The net's file with every layer float, in int8, or in int8 but for one layer ("but a")."""
    path = folder / f"{name}-{regime}.onnx"
    kept = regime.partition("but ")[2]
    planned = [layer for layer in delivered(name).layers if layer != kept]
    graph = ready(name)[2].graph if regime == FLOAT else delivered(name, *(planned if kept else ())).graph
    export(graph, ready(name)[3], path)
    return onnx.load(path)


def group_of(name: str, key: str) -> Group:
    return next(g for g in groups(ready(name)[1], ready(name)[3]) if g.name == key)


def variant(folder: Path, name: str, regime: str, key: str, level: int) -> onnx.ModelProto:
    group = group_of(name, key)
    widths, whole = widths_of(delivered(name).layers, {key: level}, [group]), base(folder, name, regime)
    _, _, made, _, _ = ready(name)
    weights = {n: weights_of(made.graph, one) for n, one in delivered(name).layers.items() if one.sequences}
    turned = products(whole, weights)
    assert set(turned.values()) == set(weights)
    return patched(whole, {n: widths[n] for n in touched(group, delivered(name).layers)}, turned)


def shapes(model: onnx.ModelProto) -> Counter[tuple[int, ...]]:
    return Counter(tuple(t.dims) for t in model.graph.initializer if t.dims and t.data_type != TensorProto.INT64)


def operators(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


CUTS = {
    "cnn": [("a", 5), ("b", 4), ("fc1", 7)],
    "depthwise behind zeros": [("a", 5), ("b", 6)],
    "tokens": [("a", 7)],
    "residual": [("conv", 4), ("layers.0.conv1", 3), ("layers.1.conv1", 8), ("layers.1.conv2", 5)],
}


@pytest.mark.parametrize("regime", [FLOAT, INT8])
@pytest.mark.parametrize("name", CUTS)
def test_a_variant_has_the_nodes_of_its_base_and_runs(folder: Path, name: str, regime: str):
    whole = base(folder, name, regime)
    for key, level in CUTS[name]:
        part = variant(folder, name, regime, key, level)
        assert operators(part) == operators(whole)
        assert weight_count(part) < weight_count(whole)
        path = folder / "variant.onnx"
        onnx.save(part, path)
        for batch in (1, 3):
            feed = {n: x.numpy() for n, x in zip(ORT.input_names(path), rows(NETS[name][1], batch), strict=True)}
            (answer,) = ORT.load(path, 1)(feed).values()
            assert answer.shape == (batch, 10)
            assert np.isfinite(answer).all()
        if regime == INT8:
            assert ORT.conformance(path, [stored_name(layer) for layer in stored(part)]) == []


def weight_count(model: onnx.ModelProto) -> int:
    return sum(int(np.prod(shape)) * count for shape, count in shapes(model).items())


def stored(model: onnx.ModelProto) -> list[str]:
    """Layers whose weights a variant did not rename."""
    names = {t.name for t in model.graph.initializer}
    return [n.removesuffix(".weight_integer") for n in names if n.endswith(".weight_integer")]


@pytest.mark.parametrize(
    ("name", "key", "level"),
    [("cnn", "b", 4), ("residual", "conv", 4), ("depthwise behind zeros", "b", 6), ("tokens", "a", 7)],
)
def test_a_variant_has_the_shapes_of_a_real_cut(folder: Path, name: str, key: str, level: int):
    _, _, prepared_graph, example, _ = ready(name)
    smaller = copy.deepcopy(prepared_graph.graph)
    group = next(g for g in groups(prepared_graph.graph, example) if g.name == key)  # after folding: no norms
    cut(smaller, {group: range(level)})
    refresh(smaller, example)
    export(smaller, example, folder / "cut.onnx")
    really, part = onnx.load(folder / "cut.onnx"), variant(folder, name, FLOAT, key, level)
    assert operators(part) == operators(really)
    assert shapes(part) == shapes(really)


def test_widths_follow_the_groups():
    layers, group = delivered("cnn").layers, group_of("cnn", "b")
    found = widths_of(layers, {"b": 4}, [group, group_of("cnn", "fc1")])
    assert found["b"] == Width(8, 4)
    assert found["fc1"] == Width(4 * 16, 16)  # 16 positions a channel
    assert found["a"] == Width(3, 8)
    both = widths_of(layers, {"b": 4, "fc1": 2}, [group, group_of("cnn", "fc1")])
    assert both["fc1"] == Width(64, 2)
    assert both["fc2"] == Width(2, 10)


def test_the_base_is_not_touched(folder: Path):
    whole = base(folder, "cnn", FLOAT)
    before = whole.SerializeToString(deterministic=True)
    variant(folder, "cnn", FLOAT, "a", 3)
    with_float_layer(base(folder, "cnn", INT8), "b")
    assert whole.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("cnn", "b"),
        ("cnn", "fc1"),
        ("residual", "layers.0.conv2"),
        ("tokens", "b"),
        ("tokens", "o"),
        ("depthwise behind zeros", "d"),
        ("depthwise behind zeros", "b"),
    ],
)
def test_one_layer_alone_runs_in_float(folder: Path, name: str, layer: str):
    whole = base(folder, name, INT8)
    path = folder / "one-float.onnx"
    onnx.save(with_float_layer(whole, layer), path)
    others = [n for n in delivered(name).layers if n != layer]
    assert ORT.conformance(path, [stored_name(n) for n in others]) == []
    executed = {op.op_type for op in ORT.executed_ops(path)}
    assert executed & {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}
    example = NETS[name][1]
    feed = {n: x.numpy() for n, x in zip(ORT.input_names(path), rows(example, 3), strict=True)}
    onnx.save(whole, folder / "whole.onnx")
    ((one,), (all_int8,)) = (ORT.load(p, 1)(feed).values() for p in (path, folder / "whole.onnx"))
    # the same integers read as floats: only where sums are rounded differs
    assert float(np.abs(one - all_int8).max()) <= 0.05 * float(np.abs(all_int8).max())
    tensors = {t.name for t in onnx.load(path).graph.initializer}
    weights = [numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer if len(t.dims) > 1]
    assert sum(w.dtype == np.float32 for w in weights) == 1
    assert tensors


@pytest.mark.parametrize(
    ("name", "kept", "key", "level"),
    [("cnn", "b", "a", 5), ("cnn", "fc1", "b", 4), ("depthwise behind zeros", "d", "b", 6)],
)
def test_variants_of_a_file_with_float_layers_among_int8_ones_run(
    folder: Path, name: str, kept: str, key: str, level: int
):
    path = folder / "mixed.onnx"
    onnx.save(variant(folder, name, f"but {kept}", key, level), path)
    feed = {n: x.numpy() for n, x in zip(ORT.input_names(path), rows(NETS[name][1], 3), strict=True)}
    (answer,) = ORT.load(path, 1)(feed).values()
    assert np.isfinite(answer).all()


def test_rows_of_torch_are_rows_of_the_variant(folder: Path):
    """The first channels are the ones kept: the variant answers what the graph cut to them answers."""
    _, _, prepared_graph, example, _ = ready("cnn")
    smaller = copy.deepcopy(prepared_graph.graph)
    group = next(g for g in groups(prepared_graph.graph, example) if g.name == "b")
    cut(smaller, {group: range(4)})
    path = folder / "first.onnx"
    onnx.save(variant(folder, "cnn", FLOAT, "fc1", 16), path)  # every channel: nothing cut
    feed = rows(example, 3)
    with torch.no_grad():
        (same,) = ORT.load(path, 1)({"x": feed[0].numpy()}).values()
        np.testing.assert_allclose(same, prepared_graph.graph(*feed).numpy(), rtol=1e-4, atol=1e-5)
        onnx.save(variant(folder, "cnn", FLOAT, "b", 4), path)
        # fc1's columns are channel by channel, so the first 4 channels are its first 64 columns
        (fewer,) = ORT.load(path, 1)({"x": feed[0].numpy()}).values()
        np.testing.assert_allclose(fewer, smaller(*feed).numpy(), rtol=1e-4, atol=1e-5)
