"""Laws of the store: what is read back is what was written, and a file can break nothing."""

from __future__ import annotations

import copy
import importlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from flyweight.graph.encoding import decode, encode
from flyweight.graph.program import load, save, save_files
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
