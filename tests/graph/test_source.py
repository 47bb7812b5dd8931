"""The written file is plain PyTorch: it knows nothing of us, answers bit for bit, trains, and holds no foreign code."""

from __future__ import annotations

import ast
import copy
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn
from torch.nn import functional as F

from flyweight.errors import ModelError
from flyweight.face.digits import TutorialCNN
from flyweight.graph.construction import Tree
from flyweight.graph.program import title
from flyweight.graph.signature import tensors_in
from flyweight.graph.source import source
from flyweight.graph.spelling import WIDTH, layout, literal
from flyweight.graph.trace import trace

from . import cuts, nets

Example = tuple[nn.Module, dict[str, Tensor]]


def cut_residual() -> tuple[fx.GraphModule, dict[str, Tensor]]:
    inputs = {"x": torch.randn(4, 1, 28, 28)}
    graph = trace(nets.ResNet20().eval(), (), inputs).module
    cuts.rows(graph.get_submodule("layers.0.conv1"), [0, 3, 4])
    cuts.rows(graph.get_submodule("layers.0.bn1"), [0, 3, 4])
    cuts.columns(graph.get_submodule("layers.0.conv2"), [0, 3, 4])
    graph.get_submodule("conv").weight.requires_grad_(False)
    graph.get_submodule("fc").bias.requires_grad_(False)
    return graph, inputs


def rounded() -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """The demo's network with simulated rounding behind its inputs and layers."""
    inputs = {"x": torch.randn(4, 3, 32, 32)}
    graph = trace(TutorialCNN().eval(), (), inputs).module
    operator = torch.ops.aten.fake_quantize_per_tensor_affine.default
    for node in [node for node in graph.graph.nodes if node.op in ("placeholder", "call_module")]:
        with graph.graph.inserting_after(node):
            made = graph.graph.call_function(operator, (node, 0.1 / 3, 128, 0, 255))
        node.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)
    graph.recompile()
    return graph, inputs


def traced(net: nn.Module, **inputs: Tensor) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    return trace(net.eval(), (), inputs).module, inputs


def transformer() -> tuple[fx.GraphModule, dict[str, Tensor]]:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return traced(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), src=torch.randn(4, 5, 16))


def bert() -> tuple[fx.GraphModule, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    net = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=100))
    ids = torch.randint(0, 100, (4, 16))
    return traced(net, input_ids=ids, attention_mask=(torch.arange(16) < 12).expand(4, 16).long())


def odd_calls() -> tuple[fx.GraphModule, dict[str, Tensor]]:
    class Net(nn.Module):
        """Slices, indices, gates, sizes, comparisons: whatever has a spelling of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.scales = nn.ParameterList([torch.rand(8), torch.rand(8)])
            self.register_buffer("order", torch.tensor([3, 1, 2, 0]))

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)[:, :, 1:7:2]
            z = x[:, self.order, :3] * 2 - 1 / (1 + x[..., -3:].abs())
            y = torch.cat([y, z, 3 - z], dim=-1) + F.glu(x, -1).mean((1, 2), keepdim=True)
            a, b = F.gelu(y, approximate="tanh").chunk(2, -1)[0], F.elu(y, 0.5).split([4, 5], -1)[0]
            y = torch.where(a[..., :4] > b, a[..., :4], -b) ** 2
            y = F.pad(y, (1, 1), value=float("-inf")).clamp(-1.0, 1.0)
            picture = F.interpolate(y.unsqueeze(1), scale_factor=2.0, mode="bilinear", align_corners=False)
            picture = F.max_pool2d(F.interpolate(picture, size=(6, 6)), 2)
            y = picture.flatten(1) @ torch.ones(9, 8) * self.scales[0] / self.scales[1]
            y = torch.einsum("bi,bi->b", y, x.amax(1)).unsqueeze(1) + torch.linalg.vector_norm(y, dim=-1, keepdim=True)
            return y.expand(x.shape[0], 6).reshape(x.shape[0] * 2, 3).view(x.shape[0], -1).to(torch.float64).sigmoid()

    return traced(Net(), x=torch.randn(4, 4, 8))


def row() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


CASES: dict[str, Callable[[], tuple[fx.GraphModule, dict[str, Tensor]]]] = {
    "demo": lambda: traced(TutorialCNN(), x=torch.randn(4, 3, 32, 32)),
    "resnet": cut_residual,
    "int8": rounded,
    "transformer": transformer,
    "bert": bert,
    "odd": odd_calls,
    "tied": lambda: traced(nets.TiedNet(), ids=torch.randint(0, 11, (4, 7))),
    "dict": lambda: traced(nets.DictNet(), x=torch.randn(4, 4)),
    "by name": lambda: traced(nets.OptionalNet(), left=torch.randn(4, 4), mask=torch.rand(4, 3), right=torch.rand(4, 5)),
    "weight norm": lambda: traced(nets.WeightNormNet(), x=torch.randn(4, 6)),
    "sequential": lambda: traced(row(), input=torch.randn(4, 4)),
    "lstm": lambda: traced(Recurrent(), x=torch.randn(4, 5, 3)),
}  # fmt: skip


class Recurrent(nn.Module):
    """An LSTM, which stays a call."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x)[0][:, -1])


# In a process where flyweight cannot be imported: every written file answers, keeps its names and trains.
STRANGER = """
import importlib, json, sys
import torch
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "flyweight":
            raise ImportError("flyweight is not here")
sys.meta_path.insert(0, Wall())
def leaves(value, name="output"):
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from leaves(item, f"{name}[{index}]")
told = {}
for name in sys.argv[1:]:
    net = importlib.import_module(name).load()
    # copies: sums depend on where in memory a matrix begins
    inputs = {key: value.clone() for key, value in load_file(f"{name}.in").items()}
    with torch.no_grad():
        first = dict(leaves(net(**inputs)))
    save_file({key: value.contiguous() for key, value in first.items()}, f"{name}.out")
    told[name] = {"training": net.training, "state": sorted(net.state_dict()), "losses": []}
    told[name]["grad"] = sorted(key for key, p in net.named_parameters(remove_duplicate=False) if p.requires_grad)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.002)
    floats = {key: value for key, value in first.items() if value.is_floating_point()}
    aims = {key: value + torch.arange(value.numel()).sin().reshape(value.shape) for key, value in floats.items()}
    net.train()
    for part in net.modules():
        if isinstance(part, torch.nn.modules.dropout._DropoutNd):
            part.eval()
    for step in range(8):
        optimizer.zero_grad()
        loss = sum(((value - aims[key]) ** 2).mean() for key, value in leaves(net(**inputs)) if value.requires_grad)
        loss.backward()
        optimizer.step()
        told[name]["losses"].append(loss.item())
    told[name]["moved"] = any(not torch.equal(a, first[k]) for k, a in leaves(net(**inputs)))
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the file of every case, its weights, its inputs and what the graph answers."""
    folder = tmp_path_factory.mktemp("written")
    for name, make in CASES.items():
        torch.manual_seed(1)
        try:
            graph, inputs = make()
        except pytest.skip.Exception:
            continue
        write(folder, name.replace(" ", "_"), graph, inputs)
    return folder


def write(folder: Path, name: str, graph: fx.GraphModule, inputs: Mapping[str, Tensor]) -> None:
    text, tensors = source(graph, name)
    (folder / f"{name}.py").write_text(text, encoding="utf-8")
    save_file(tensors, folder / f"{name}.safetensors")
    save_file({key: value.contiguous() for key, value in inputs.items()}, folder / f"{name}.in")
    with torch.no_grad():
        expected = {key: value.contiguous() for key, value in tensors_in(graph(**inputs))}
    save_file(expected, folder / f"{name}.expected")
    parameters = sorted(key for key, p in graph.named_parameters(remove_duplicate=False) if p.requires_grad)
    (folder / f"{name}.json").write_text(json.dumps([sorted(graph.state_dict()), parameters]))


@pytest.fixture(scope="module")
def strangers(written: Path) -> dict[str, Any]:
    """What a process without flyweight tells of every file."""
    names = sorted(path.stem for path in written.glob("*.py"))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", STRANGER, *names],
        cwd=written, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def there(name: str, written: Path) -> str:
    word = name.replace(" ", "_")
    if not (written / f"{word}.py").exists():
        pytest.skip("transformers is not installed")
    return word


@pytest.mark.parametrize("name", CASES)
def test_a_process_without_flyweight_gets_the_same_bits(name, written, strangers):
    word = there(name, written)
    assert not strangers[word]["training"]
    expected, given = load_file(written / f"{word}.expected"), load_file(written / f"{word}.out")
    assert expected.keys() == given.keys()
    for key, value in expected.items():
        assert value.dtype == given[key].dtype
        assert torch.equal(value, given[key]), key


@pytest.mark.parametrize("name", CASES)
def test_it_trains(name, written, strangers):
    losses = strangers[there(name, written)]["losses"]
    assert losses[-1] < losses[0]
    assert strangers[there(name, written)]["moved"]


@pytest.mark.parametrize("name", CASES)
def test_names_of_tensors_are_the_users(name, written, strangers):
    word = there(name, written)
    state, parameters = json.loads((written / f"{word}.json").read_text())
    more = set(strangers[word]["state"]) - set(state)
    assert set(state) <= set(strangers[word]["state"])
    # tables that the trace made are buffers now: never weights
    assert not more & set(parameters)
    assert strangers[word]["grad"] == parameters


@pytest.mark.parametrize("name", CASES)
def test_the_file_is_formatted_and_says_no_word_of_us(name, written):
    path = written / f"{there(name, written)}.py"
    text = path.read_text()
    compile(text, str(path), "exec")
    modules = {a.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)}
    assert modules <= {"pathlib", "torch", "safetensors.torch", "torch.nn"}
    ruff = Path(sys.executable).with_name("ruff")
    found = str(ruff) if ruff.exists() else shutil.which("ruff")
    if found is None:
        pytest.skip("ruff is not installed")
    done = subprocess.run([found, "format", "--isolated", "--diff", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    done = subprocess.run([found, "check", "--isolated", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["demo", "resnet", "transformer", "bert", "odd", "dict"])
def test_calls_are_spelled_in_plain_torch(name, written):
    assert "torch.ops" not in (written / f"{there(name, written)}.py").read_text()


def test_rounding_is_written_out(written):
    text = (written / "int8.py").read_text()
    assert text.count("torch.fake_quantize_per_tensor_affine(") == 7
    assert repr(0.1 / 3) in text


def test_a_copy_of_a_graph_still_has_the_name_of_the_users_class():
    assert "class Sequential(nn.Module):" in source(copy.deepcopy(small()))[0]


def test_the_demos_file_reads_like_this(written):
    lines = [line.strip() for line in (written / "demo.py").read_text().splitlines()]
    body = lines[lines.index("def forward(self, x: Tensor) -> Tensor:") + 1 :]
    assert body[1:4] == ["x = self.conv1(x)", "x = F.relu(x)", "x = self.pool(x)"]
    assert "self.conv1 = nn.Conv2d(3, 32, 3, padding=1)" in lines
    assert "self.fc2 = nn.Linear(128, 10)" in lines


# ---- what a model may not do ----


def assert_refused_or_harmless(graph: fx.GraphModule) -> None:
    """Nothing but the words that an honest file has."""
    try:
        text, _ = source(graph)
    except ModelError:
        return
    calls = {ast.unparse(n.func) for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)}
    roots = {call.split(".")[0].split("(")[0].split("[")[0] for call in calls}
    assert roots <= {
        "self",
        "super",
        "nn",
        "torch",
        "F",
        "x",
        "y",
        "load_model",
        "Path",
        "net",
        "getattr",
        "Linear",
    } | {title(graph), "Net"}
    assert "boom" not in {n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name)}


HOSTILE = [
    'a"]; boom(); x["', "a'); boom(); ('", "a\n        boom()", "a\\", "a]", "a#boom()", "boom()", "{boom()}", "__class__",
    "é", "lambda", "0", "a b", "x;boom()", "keys", "forward",
]  # fmt: skip


@functools.cache
def small() -> fx.GraphModule:
    return traced(nn.Sequential(nn.Linear(3, 3)), input=torch.randn(2, 3))[0]


@pytest.mark.parametrize("word", HOSTILE)
@pytest.mark.parametrize("place", ["module", "container", "parameter", "buffer", "input", "key", "class", "text"])
def test_no_name_becomes_code(place, word):
    graph = copy.deepcopy(small())
    call = next(node for node in graph.graph.nodes if node.op == "call_module")
    output = next(iter(graph.graph.find_nodes(op="output")))
    if place in ("module", "container"):
        part = graph._modules.pop("0")
        holder = nn.Module()
        holder._modules["deep" if place == "container" else word] = part
        graph._modules[word if place == "container" else "deep"] = holder
        call.target = f"{word}.deep" if place == "container" else f"deep.{word}"
    elif place in ("parameter", "buffer"):
        (graph._parameters if place == "parameter" else graph._buffers)[word] = nn.Parameter(torch.ones(3))
    elif place == "input":
        next(iter(graph.graph.find_nodes(op="placeholder"))).target = word
    elif place == "key":
        output.args = ({word: call, 1: {word: (call, None)}},)
    elif place == "class":
        graph = type(word, (fx.GraphModule,), {})(graph, graph.graph)
        graph.meta["title"] = word
    else:
        with graph.graph.inserting_before(output):
            output.args = (
                graph.graph.call_function(torch.ops.aten.div.Tensor_mode, (call, 2), {"rounding_mode": word}),
            )
    assert_refused_or_harmless(graph)


@pytest.mark.parametrize("word", HOSTILE)
def test_a_literal_text_is_that_text(word):
    assert ast.literal_eval(literal(word)) == word


@pytest.mark.parametrize("value", [0.1 + 0.2, 1e-45, -0.0, 1e300, float("inf"), float("-inf"), 2**70, -3, True, None])
def test_numbers_are_exact(value):
    read = eval(literal(value), {"__builtins__": {"float": float}})  # ours, in a test
    assert repr(read) == repr(value)


def test_names_that_are_no_words_are_reached_all_the_same():
    tree = Tree({"": ("0", "body"), "body": ("0", "3"), "body.0": ("lambda", "conv")}, frozenset())
    assert tree.at("0") == 'getattr(self, "0")'
    assert tree.at("body.3") == 'self.body["3"]'
    assert tree.at("body.0.lambda") == 'self.body["0"]["lambda"]'


def test_no_line_is_longer_than_it_must_be():
    parts = [f"argument_{index}" for index in range(12)]
    assert max(map(len, layout(8, "x = f(", parts, ")"))) <= WIDTH
    assert layout(8, "x = f(", parts[:2], ")") == ["        x = f(argument_0, argument_1)"]
