"""Laws of the store: what is read back is what was written, and a file can break nothing."""

from __future__ import annotations

import copy
import importlib
import json
import math
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from flyweight.errors import ModelError, UnsafeFileError
from flyweight.graph.allowed import ATEN, operator_named
from flyweight.graph.encoding import decode, encode
from flyweight.graph.program import load, load_files, save, save_files
from flyweight.graph.trace import trace
from flyweight.types import Note

from . import nets

torch.set_num_threads(1)
torch.manual_seed(0)

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "tutorial": (nets.TutorialCNN, (torch.randn(2, 3, 32, 32),)),
    "residual": (nets.ResidualNet, (torch.randn(2, 3, 16, 16),)),
    "tied": (nets.TiedNet, (torch.arange(14).view(2, 7) % 11,)),
    "dict": (nets.DictNet, (torch.randn(2, 4),)),
    "optional": (nets.OptionalNet, (torch.randn(2, 4), torch.randn(2, 5), torch.rand(2, 3))),
    "functional": (nets.FunctionalNet, (torch.randn(2, 3, 10, 10),)),
    "weight_norm": (nets.WeightNormNet, (torch.randn(2, 6),)),
    "norms": (nets.NormNet, (torch.randn(2, 3, 8, 8),)),
    "conv1d": (nets.Conv1dNet, (torch.randn(2, 1, 32),)),
    "frozen_norm": (nets.FrozenNormNet, (torch.randn(2, 4),)),
}


@pytest.fixture(scope="module")
def graphs() -> dict[str, fx.GraphModule]:
    torch.manual_seed(0)
    return {name: trace(make(), args, {}).module for name, (make, args) in CASES.items()}


def leaves(output: object) -> list[Tensor]:
    found = [output] if isinstance(output, Tensor) else []
    for item in output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ():
        found += leaves(item)
    return found


@pytest.mark.parametrize("name", CASES)
def test_read_back_is_what_was_written(name, graphs):
    graph, args = graphs[name], CASES[name][1]
    text, tensors = save(graph)
    again = load(text, tensors)
    for mine, theirs in zip(leaves(again(*args)), leaves(graph(*args)), strict=True):
        assert torch.equal(mine, theirs)
    expected, got = graph.state_dict(), again.state_dict()
    assert list(got) == list(expected)
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in graph.named_parameters()]
    assert {path: type(part) for path, part in again.named_modules() if path} == {
        path: type(part) for path, part in graph.named_modules() if path
    }
    assert save(again)[0] == text
    assert not again.training


@pytest.mark.parametrize("name", ["residual", "tied", "frozen_norm"])
def test_sizes_are_known_again(name, graphs):
    graph = graphs[name]
    again = load(*save(graph))
    for mine, theirs in zip(again.graph.nodes, graph.graph.nodes, strict=True):
        if theirs.op == "output":
            continue
        sizes = [
            tuple(size if isinstance(size, int) else "batch" for size in node.meta["val"].shape)
            for node in (mine, theirs)
        ]
        assert sizes[0] == sizes[1], theirs.name


def test_tied_tensors_are_stored_once_and_tied_again(graphs):
    text, tensors = save(graphs["tied"])
    assert len(tensors) == 4
    again = load(text, tensors)
    assert again.embed.weight is again.head.weight
    assert again.a.weight is again.b.weight


def test_frozen_and_transient_tensors_stay_so():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)
            self.register_buffer("shift", torch.randn(3), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + self.shift

    graph = trace(Net(), (torch.randn(2, 4),), {}).module
    graph.fc.bias.requires_grad_(False)
    again = load(*save(graph))
    assert list(again.state_dict()) == ["fc.weight", "fc.bias"]
    assert [p.requires_grad for p in again.parameters()] == [True, False]
    x = torch.randn(3, 4)
    assert torch.equal(again(x), graph(x))


def test_equal_models_give_equal_bytes(tmp_path):
    written = []
    for name in ("a", "b"):
        torch.manual_seed(3)
        paths = save_files(trace(nets.ResidualNet(), (torch.randn(2, 3, 16, 16),), {}).module, tmp_path / name)
        written.append([path.read_bytes() for path in paths])
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["program.json", "weights.safetensors"]
    assert written[0] == written[1]


def test_a_process_without_the_users_class_loads_it(graphs, tmp_path):
    save_files(graphs["residual"], tmp_path)
    x = torch.randn(2, 3, 16, 16)
    (tmp_path / "x.json").write_text(json.dumps(x.flatten().tolist()))
    code = (
        "import json, sys, torch\n"
        "from pathlib import Path\n"
        "from flyweight.graph.program import load_files\n"
        "folder = Path(sys.argv[1])\n"
        "x = torch.tensor(json.loads((folder / 'x.json').read_text())).view(2, 3, 16, 16)\n"
        "graph = load_files(folder)\n"
        "assert not any('nets' in name for name in sys.modules)\n"
        "print(json.dumps(graph(x).flatten().tolist()))\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == graphs["residual"](x).flatten().tolist()


def test_what_the_graph_carries_goes_along(graphs):
    graph = copy.deepcopy(graphs["dict"])
    graph.meta["numbers"] = {"layers": {"a": {"bits": 8, "scale": 0.1}}}
    graph.meta["notes"] = (Note("a.code", "text", "here", "so"),)
    graph.meta["extra_tensors"] = {"a.scale": torch.rand(3), "zero": torch.zeros(3, dtype=torch.int8)}
    again = load(*save(graph))
    assert again.meta["numbers"] == graph.meta["numbers"]
    assert again.meta["notes"] == graph.meta["notes"]
    assert again.meta["extra_tensors"].keys() == graph.meta["extra_tensors"].keys()
    for name, tensor in graph.meta["extra_tensors"].items():
        assert torch.equal(again.meta["extra_tensors"][name], tensor)
        assert again.meta["extra_tensors"][name].dtype is tensor.dtype


def insert(graph: fx.GraphModule, *calls: Callable[[fx.Node], tuple[Any, tuple[Any, ...]]]) -> fx.GraphModule:
    """A copy of the graph with calls behind layer `a`."""
    made = copy.deepcopy(graph)
    layer = next(iter(made.graph.find_nodes(op="call_module", target="a")))
    users, last = list(layer.users), layer
    for call in calls:
        with made.graph.inserting_after(last):
            last = made.graph.call_function(*call(last))
    for user in users:
        user.replace_input_with(layer, last)
    made.recompile()
    return made


def test_simulated_numbers_are_stored_and_train(graphs):
    fake = torch.ops.aten.fake_quantize_per_tensor_affine.default
    graph = insert(graphs["dict"], lambda node: (fake, (node, 0.1, 3, -128, 127)))
    again = load(*save(graph))
    x = torch.randn(4, 4)
    assert torch.equal(again(x)["logits"], graph(x)["logits"])
    again(x)["logits"].sum().backward()
    assert again.a.weight.grad is not None


def test_lowered_numbers_are_stored(graphs):
    importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers the operators
    ops, scale = torch.ops.quantized_decomposed, (0.1, 3, -128, 127, torch.int8)
    graph = insert(
        graphs["dict"],
        lambda node: (ops.quantize_per_tensor.default, (node, *scale)),
        lambda node: (ops.dequantize_per_tensor.default, (node, *scale)),
    )
    x = torch.randn(4, 4)
    assert torch.equal(load(*save(graph))(x)["logits"], graph(x)["logits"])
    assert not torch.equal(graph(x)["logits"], graphs["dict"](x)["logits"])


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists = st.lists(inner, max_size=3)
    return lists | lists.map(tuple) | st.dictionaries(st.text(max_size=3), inner, max_size=2)


PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=5)
ARGUMENTS = st.recursive(PLAIN, containers, max_leaves=8)


def exact(value: Any) -> Any:
    """The value with its type and its floats' bits, so that == compares exactly."""
    if isinstance(value, float):
        return ("float", "nan" if math.isnan(value) else value.hex())
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, [exact(item) for item in value])
    if isinstance(value, dict):
        return {key: exact(item) for key, item in value.items()}
    return (type(value).__name__, value)


@given(ARGUMENTS)
def test_arguments_survive_exactly(value):
    assert exact(decode(json.loads(json.dumps(encode(value))), {})) == exact(value)


@pytest.mark.parametrize(
    "value",
    [torch.float32, torch.int8, torch.device("cuda:1"), torch.strided, torch.channels_last, slice(0, None, 2), ...],
)
def test_torch_words_survive(value):
    assert decode(json.loads(json.dumps(encode(value))), {}) == value


# ---- hostile and damaged files ----

Damage = Callable[[dict[str, Any]], object]


def node(program: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in program["nodes"] if entry["name"] == name)


def setter(name: str, /, **values: object) -> Damage:
    return lambda program: node(program, name).update(values)


DAMAGES: dict[str, Damage] = {
    "an operator that reads files": setter("mul", target="aten.from_file.default"),
    "an operator that writes": setter("mul", target="aten.mul_.Tensor"),
    "an operator with an out argument": setter("mul", target="aten.mul.out"),
    "a function of the system": setter("mul", target="os.system"),
    "an attribute of an operator": setter("mul", target="aten.mul.__class__"),
    "attrgetter": setter("mul", target="operator.attrgetter"),
    "a method call": setter("mul", op="call_method", target="backward"),
    "a text where a number belongs": setter("mul", args={"tuple": [{"node": "x"}, "2"]}),
    "too many arguments": setter("mul", args={"tuple": [{"node": "x"}, 2, 3]}),
    "too few arguments": setter("mul", args={"tuple": [{"node": "x"}]}),
    "an unknown argument": setter("mul", kwargs={"dict": [["out", {"node": "x"}]]}),
    "an unknown kind": setter("mul", args={"tuple": [{"node": "x"}, {"eval": "1"}]}),
    "a node that comes later": setter("mul", args={"tuple": [{"node": "b"}, {"node": "mul"}]}),
    "a number too large": setter("mul", args={"tuple": [{"node": "x"}, 2**64]}),
    "a text made long by a number": setter("mul", target="operator.mul", args={"tuple": ["a", 10**12]}),
    "code as a node's name": setter("mul", name="mul = __import__('os')\nmul"),
    "code as an input": setter("x", target="x=__import__('os').system('true')"),
    "a word of Python as a name": setter("x", target="lambda"),
    "self as an input": setter("x", target="self"),
    "quotes in a path": setter("a", target='a"); __import__("os").system("true'),
    "a private path": setter("a", target="__class__"),
    "a module that is not there": setter("a", target="c"),
    "an operation that is not there": setter("a", op="exec"),
    "a module of another kind": lambda p: p["modules"][0].update(type="Sequential"),
    "a module that is no module": lambda p: p["modules"][0].update(type="Parameter"),
    "a private module": lambda p: p["modules"][0].update(type="__init__"),
    "an argument of no module": lambda p: p["modules"][0]["args"].update(device={"device": "cpu"}),
    "a module twice": lambda p: p["modules"].append(p["modules"][0]),
    "a huge module": lambda p: p["modules"][0]["args"].update(out_features=2**40),
    "a tensor of another shape": lambda p: p["tensors"][0].update(shape=[4, 3]),
    "a tensor of another type": lambda p: p["tensors"][0].update(dtype="float64"),
    "a tensor in no place": lambda p: p["tensors"][0].update(name="a.forward"),
    "a tensor in the place of a module": lambda p: p["tensors"][0].update(name="a"),
    "a tensor missing": lambda p: p["tensors"].pop(),
    "a tied tensor that is not there": lambda p: p["tensors"][0].update(same_as="z"),
    "an unknown field": lambda p: p.update(code="print(1)"),
    "no output": lambda p: p["nodes"].pop(),
    "two outputs": lambda p: p["nodes"].append({**p["nodes"][-1], "name": "again"}),
    "no schema version": lambda p: p.pop("schema_version"),
    "another schema version": lambda p: p.update(schema_version=0),
    "a class name with code": lambda p: p.update(name="A:\n import os"),
    "sizes that do not fit": setter("x", shape=["batch", 5]),
    "deep nesting": lambda p: node(p, "mul").update(args=nested(100_000)),
}


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth  # spliced into the text below, since json itself would not write it


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_program_is_refused(name, graphs):
    text, tensors = save(graphs["dict"])
    program = json.loads(text)
    DAMAGES[name](program)
    hostile = json.dumps(program)
    if name == "deep nesting":
        hostile = hostile.replace('"' + nested(100_000) + '"', nested(100_000))
    with pytest.raises(UnsafeFileError) as caught:
        load(hostile, tensors)
    assert len(str(caught.value)) < 1000


def test_a_newer_program_says_so(graphs):
    text, tensors = save(graphs["dict"])
    with pytest.raises(UnsafeFileError, match="newer flyweight"):
        load(text.replace('"schema_version": 1', '"schema_version": 2'), tensors)


def test_tensors_too_many_or_too_few_are_refused(graphs):
    text, tensors = save(graphs["dict"])
    with pytest.raises(UnsafeFileError, match="does not name"):
        load(text, tensors | {"c.weight": torch.zeros(1)})
    with pytest.raises(UnsafeFileError):
        load(text, {key: value for key, value in tensors.items() if key != "a.bias"})


def test_damaged_text_loads_or_is_refused_and_nothing_else(graphs):
    text, tensors = save(graphs["functional"])
    choose = random.Random(0)
    refused = 0
    for _ in range(150):
        raw = bytearray(text.encode())
        for _ in range(choose.choice((1, 1, 2, 8))):
            raw[choose.randrange(len(raw))] = choose.choice(b'{}[]",:0123456789aexn_.')
        try:
            load(bytes(raw), dict(tensors))
        except UnsafeFileError:
            refused += 1
    assert refused > 75  # most bytes matter


def test_files_that_are_something_else_are_refused(graphs, tmp_path):
    with pytest.raises(UnsafeFileError, match=r"program\.json is missing"):
        load_files(tmp_path)
    program, weights = save_files(graphs["dict"], tmp_path)
    whole = weights.read_bytes()
    for broken in (whole[:-9], b"", pickle.dumps({"a": 1}), b"\xff" * 64):
        weights.write_bytes(broken)
        with pytest.raises(UnsafeFileError):
            load_files(tmp_path)
    weights.write_bytes(whole)
    load_files(tmp_path)
    for broken in (program.read_bytes()[:-9], b"", pickle.dumps({"a": 1}), b"\xff\xfe", b"[]", b"null"):
        program.write_bytes(broken)
        with pytest.raises(UnsafeFileError):
            load_files(tmp_path)


def test_every_listed_operator_is_there_and_pure():
    for name in ATEN:
        packet = getattr(torch.ops.aten, name)
        overloads = [operator_named(f"aten.{name}.{overload}") for overload in packet.overloads()]
        assert any(found is not None for found in overloads), name
        assert not any(found._schema.is_mutable for found in overloads if found is not None)


UNLISTED = "aten.from_file.default aten.save.default aten.mul mul a.b.c aten..default prim.device.default torch.load"


@pytest.mark.parametrize("name", ["", "operator.attrgetter", "aten.mul.__class__", *UNLISTED.split()])
def test_unlisted_operators_are_not_found(name):
    assert operator_named(name) is None


def test_what_cannot_be_written_is_refused_when_written(graphs):
    graph = copy.deepcopy(graphs["dict"])
    graph.a = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ModelError, match="Sequential"):
        save(graph)
    graph = copy.deepcopy(graphs["dict"])
    next(iter(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor))).target = torch.mul
    with pytest.raises(ModelError, match="not on the list"):
        save(graph)


def test_a_write_that_fails_leaves_no_part_behind(graphs, tmp_path):
    (tmp_path / "weights.safetensors").mkdir()  # nothing can be put in its place
    with pytest.raises(OSError):
        save_files(graphs["dict"], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["program.json", "weights.safetensors"]
