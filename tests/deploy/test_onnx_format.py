"""The file computes what the graph computes, in integers where planned, and says nothing about where it was made."""

from __future__ import annotations

import copy
import getpass
import hashlib
from functools import cache
from math import prod
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import nn

from flyweight.deploy import runtimes
from flyweight.deploy.answers import distance, tolerance
from flyweight.deploy.formats.onnx import export, output_names, stored_name
from flyweight.errors import ModelError
from flyweight.graph.cost import weight_bytes
from flyweight.graph.operators import layers
from flyweight.graph.rewrite import refresh
from flyweight.graph.surgery import fold_norms
from flyweight.graph.trace import trace
from flyweight.methods import int8
from flyweight.stages.deliver import prepared, with_numbers

from ..graph.cases import rows
from ..graph.nets import DictNet, net
from ..graph.odd import subject
from .int8_nets import NETS, delivered, ready

ORT = runtimes.get("onnxruntime")
RUNTIMES = [runtimes.get(name) for name in ("onnxruntime", "openvino")]
ITEM_BYTES = {TensorProto.FLOAT: 4, TensorProto.INT8: 1, TensorProto.INT32: 4, TensorProto.UINT8: 1}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@cache
def file_of(folder: Path, name: str, *int8_layers: str) -> Path:
    path = folder / ("-".join((name, *int8_layers)).replace(" ", "_") + ".onnx")
    one = delivered(name, *int8_layers)
    export(one.graph, one.example, path)
    return path


def answers(path: Path, feed: tuple[torch.Tensor, ...], runtime: runtimes.Runtime = ORT) -> list[torch.Tensor]:
    given = {name: x.numpy() for name, x in zip(runtime.input_names(path), feed, strict=True)}
    return [torch.from_numpy(value) for value in runtime.load(path, 1)(given).values()]


def stored_bytes(path: Path) -> int:
    """Bytes of all tensors in the file that belong to layers: sizes of reshapes and grids of values have no axis."""
    tensors = [t for t in onnx.load(path).graph.initializer if t.dims and t.data_type != TensorProto.INT64]
    return sum(prod(t.dims) * ITEM_BYTES[t.data_type] for t in tensors)


@pytest.mark.parametrize("name", NETS)
def test_the_file_runs_in_integers_answers_as_the_graph_and_weighs_what_was_quoted(folder: Path, name: str):
    """Three laws of one file, in one test: workers that run tests apart would each export it."""
    one, path = delivered(name), file_of(folder, name)
    for runtime in RUNTIMES:
        assert runtime.conformance(path, [stored_name(layer) for layer in one.layers]) == []
        for batch in (1, 5):
            feed = rows(one.example, batch)
            with torch.no_grad():
                expected = [one.graph(*feed)]
            allowed = tolerance(len(one.layers), len(one.layers), runtime.skips_roundings)
            allowed /= (
                1 if runtime.skips_roundings else 4
            )  # these nets are small: a quarter of what a delivery may be off
            assert distance(expected, answers(path, feed, runtime)) <= allowed, runtime.name
    assert stored_bytes(path) == sum(weight_bytes(i, i.inputs, i.outputs, 8) for i in one.layers.values())


def test_a_table_is_stored_in_integers_and_looked_up_row_by_row(folder: Path):
    model = net(lambda s, x: s.fc(s.words(x).mean(1)), words=nn.Embedding(50, 16), fc=nn.Linear(16, 4)).eval()
    ids = torch.randint(0, 50, (8, 6))
    graph = trace(model, (ids,)).module
    made, errors = with_numbers(prepared(graph, (ids,), ["words"], lambda: iter([(ids,)])), [int8.step("words")])
    table = made.get_submodule("words").weight
    change = (table - model.words.weight).detach()
    assert errors["words"] == pytest.approx(float(change.square().sum(1).mean()), rel=1e-5)
    # a half of a step of the widest row's grid, which the search for a scale may make half as fine by clipping
    assert float(change.abs().max()) <= float(model.words.weight.detach().abs().max()) / 2
    path = folder / "table.onnx"
    export(made, (ids,), path)
    assert ORT.conformance(path, [stored_name("words")]) == []
    with torch.no_grad():
        for batch in (1, 5):
            assert distance([made(ids[:batch])], answers(path, (ids[:batch],))) <= 1e-6
    assert stored_bytes(path) == 50 * 16 + 50 * 4 + 4 * (16 * 4 + 4)


def test_answers_on_a_grid_are_on_the_same_point_or_its_neighbour(folder: Path):
    one = delivered("convolution at the end")
    feed = rows(one.example, 5)
    (got,) = answers(file_of(folder, "convolution at the end"), feed)
    last = [n for n in one.graph.graph.nodes if "fake_quantize" in str(n.target)][-1]
    steps = (got - one.graph(*feed).detach()).abs() / last.args[1]
    assert float(steps.max()) <= 1.01  # the runtime adds in integers, the graph in floats
    assert float((steps > 0.01).float().mean()) <= 0.002


def test_quoted_bytes_of_a_float_file_are_those_stored(folder: Path):
    _, graph, prepared_graph, example, _ = ready("residual")
    path = folder / "float.onnx"
    export(prepared_graph.graph, example, path)
    assert stored_bytes(path) == sum(weight_bytes(one, one.inputs, one.outputs, 32) for one in layers(graph).values())


@pytest.mark.parametrize("name", ["residual", "mlp with dropout"])
def test_layers_kept_in_float_keep_their_weights(folder: Path, name: str):
    kept = list(delivered(name).layers)[1]
    planned = [layer for layer in delivered(name).layers if layer != kept]
    path = file_of(folder, name, *planned)
    assert ORT.conformance(path, [stored_name(layer) for layer in planned]) == []
    one = delivered(name, *planned)
    feed = rows(one.example, 5)
    with torch.no_grad():
        assert distance([one.graph(*feed)], answers(path, feed)) <= tolerance(len(planned), len(one.layers)) / 4
    # in integers it would have been somebody else's rounding: its float weights are in the file
    weights = one.graph.get_submodule(kept).weight.detach().numpy()
    names = {t.name: t for t in onnx.load(path).graph.initializer}
    assert np.array_equal(onnx.numpy_helper.to_array(names[f"{kept}.weight"]), weights)
    before = set(np.unique(weights))
    assert len(before) > 256  # which int8 could not hold in one grid


def test_nothing_local_is_inside(folder: Path):
    import flyweight

    for name in ("residual", "cnn"):
        content = file_of(folder, name).read_bytes()
        homes = [Path.cwd(), Path.home(), Path(torch.__file__).parent, Path(flyweight.__file__).parent]
        secrets = [str(home) for home in homes]
        secrets += ["site-packages", ".py", "Traceback", 'File "', "stack_trace", "nets", "forward"]
        secrets += [getpass.getuser()] if len(getpass.getuser()) > 3 else []
        assert [s for s in secrets if len(s) > 1 and s.encode() in content] == []
        model = onnx.load_from_string(content)
        assert not model.metadata_props
        assert not model.graph.value_info
        assert model.producer_name == "flyweight"
        onnx.checker.check_model(model, full_check=True)


def test_the_same_graph_gives_the_same_bytes(folder: Path):
    one = delivered("residual")
    again = folder / "again.onnx"
    export(copy.deepcopy(one.graph), one.example, again)
    assert hashlib.sha256(again.read_bytes()).hexdigest() == sha(file_of(folder, "residual"))


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_exporting_leaves_the_graph_as_it_was(folder: Path):
    one = delivered("cnn")
    before, code = {n: t.clone() for n, t in one.graph.state_dict().items()}, one.graph.code
    export(one.graph, one.example, folder / "twice.onnx")
    assert one.graph.code == code
    assert all(torch.equal(t, before[n]) for n, t in one.graph.state_dict().items())
    assert set(before) == set(one.graph.state_dict())


def test_an_operator_without_an_onnx_form_is_named():
    def forward(self, x):
        return torch.matrix_exp(self.fc(x).reshape(x.shape[0], 3, 3))

    graph = trace(net(forward, fc=nn.Linear(4, 9)), (torch.randn(2, 4),)).module
    path = Path("never.onnx")
    with pytest.raises(ModelError, match="no ONNX form") as caught:
        export(graph, (torch.randn(2, 4),), path)
    assert "matrix_exp" in caught.value.why
    assert "test_onnx_format.py" in caught.value.where  # the user's own line
    assert "\x1b" not in str(caught.value)
    assert caught.value.fix
    assert not path.exists()


def test_outputs_have_the_users_names_however_nested(folder: Path):
    x = torch.randn(3, 4)
    model = DictNet().eval()
    graph = trace(model, (x,)).module
    path = folder / "dict.onnx"
    export(graph, (x,), path)
    assert output_names(graph) == ["logits", "pair_0", "pair_1"]
    got = ORT.load(path, 1)({"x": x.numpy()})
    assert set(got) == set(output_names(graph))
    expected = model(x)
    for name, value in zip(output_names(graph), [expected["logits"], *expected["pair"]], strict=True):
        assert distance([value.detach()], [torch.from_numpy(got[name])]) <= tolerance(0, 1)


@pytest.mark.parametrize(
    ("forward", "names"),
    [
        (lambda s, x: s.a(x), ["output"]),
        (lambda s, x: (s.a(x),), ["output"]),
        (lambda s, x: (s.a(x), None), ["output"]),
        (lambda s, x: (s.a(x), s.b(x)), ["output_0", "output_1"]),
        (lambda s, x: {"deep": {"a": s.a(x)}, "b": s.b(x)}, ["deep_a", "b"]),
    ],
)
def test_names_of_outputs_without_names(forward, names: list[str]):
    graph = trace(net(forward, a=nn.Linear(4, 3), b=nn.Linear(4, 2)), (torch.randn(2, 4),)).module
    assert output_names(graph) == names


def test_a_norm_that_stays_is_exported_too(folder: Path):
    graph, example, _ = subject("norm after flatten")
    path = folder / "norm.onnx"
    export(graph, example, path)
    feed = rows(example, 5)
    with torch.no_grad():
        assert distance([graph(*feed)], answers(path, feed)) <= tolerance(0, 3)


def test_folding_before_the_export_changes_no_answer(folder: Path):
    graph, example, _ = subject("residual 1x1")
    folded = copy.deepcopy(graph)
    fold_norms(folded, {one.name: one.norm for one in layers(folded).values() if one.norm})
    refresh(folded, example)
    path = folder / "folded.onnx"
    export(folded, example, path)
    feed = rows(example, 5)
    with torch.no_grad():
        assert distance([graph(*feed)], answers(path, feed)) <= tolerance(0, 6)
