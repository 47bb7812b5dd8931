"""A hostile or damaged program is refused, with our error, before anything in it is called."""

from __future__ import annotations

import copy
import json
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from flyweight.errors import ModelError, UnsafeFileError
from flyweight.graph.allowed import ATEN, operator_named
from flyweight.graph.program import load, load_files, save, save_files
from flyweight.graph.trace import trace

from . import nets

torch.set_num_threads(1)
torch.manual_seed(0)


@pytest.fixture(scope="module")
def graphs() -> dict[str, fx.GraphModule]:
    made = {"dict": (nets.DictNet, (2, 4)), "functional": (nets.FunctionalNet, (2, 3, 10, 10))}
    return {name: trace(make(), (torch.randn(shape),), {}).module for name, (make, shape) in made.items()}


Damage = Callable[[dict[str, Any]], object]


def node(program: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in program["nodes"] if entry["name"] == name)


def setter(name: str, /, **values: object) -> Damage:
    return lambda program: node(program, name).update(values)


def without_sizes(damage: Damage) -> Damage:
    """The damage to a program that does not say what it takes, so that nothing is tried out when it is read."""

    def both(program: dict[str, Any]) -> None:
        node(program, "x").update(dtype="", shape=[])
        damage(program)

    return both


def renamed(path: str) -> Damage:
    """Layer `a` under another path everywhere: a program that is sound but for the name."""

    def rename(program: dict[str, Any]) -> None:
        node(program, "a").update(target=path)
        for entry in [*program["modules"], *program["tensors"]]:
            key = "path" if "path" in entry else "name"
            if entry[key] == "a" or entry[key].startswith("a."):
                entry[key] = path + entry[key][1:]

    return rename


DAMAGES: dict[str, Damage] = {
    "quotes in a path that is there": renamed('a"); print("owned'),
    "a backslash in a path": renamed("a\\"),
    "a new line in a path": renamed("a\nb"),
    "a private path that is there": renamed("__init__"),
    "a text, untried": without_sizes(setter("mul", args={"tuple": [{"node": "x"}, "2"]})),
    "a list, untried": without_sizes(setter("mul", args={"tuple": [{"node": "x"}, [2]]})),
    "too many, untried": without_sizes(setter("mul", args={"tuple": [{"node": "x"}, 2, 3]})),
    "too few, untried": without_sizes(setter("mul", args={"tuple": [{"node": "x"}]})),
    "unknown, untried": without_sizes(setter("mul", kwargs={"dict": [["alpha", 2]]})),
    "twice, untried": without_sizes(setter("mul", kwargs={"dict": [["other", 2]]})),
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
    owner = next((entry["path"] for entry in program["modules"] if entry["path"] != "b"), "a")
    tensors = {owner + key[1:] if key.startswith("a.") else key: value for key, value in tensors.items()}
    with pytest.raises(UnsafeFileError) as caught:
        load(hostile, tensors)
    assert len(str(caught.value)) < 1000


def test_a_sound_program_under_another_name_is_read(graphs):
    # the renaming above is refused for its names alone
    text, tensors = save(graphs["dict"])
    program = json.loads(text)
    renamed("any other-name")(program)
    tensors = {"any other-name" + key[1:] if key.startswith("a.") else key: value for key, value in tensors.items()}
    x = torch.randn(2, 4)
    assert torch.equal(load(json.dumps(program), tensors)(x)["logits"], graphs["dict"](x)["logits"])


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
