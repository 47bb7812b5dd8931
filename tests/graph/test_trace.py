"""Laws of trace: the graph is the model, made of real modules under the user's names, and nothing else was touched."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn import functional as F

from flyweight.graph.shapes import annotate, shapes
from flyweight.graph.trace import Traced, trace

from . import nets
from .nets import net

torch.set_num_threads(1)


def image(size: int, channels: int = 3) -> tuple[Tensor, ...]:
    return (torch.randn(2, channels, size, size),)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "tutorial": (nets.TutorialCNN, image(32)),
    "residual": (nets.ResidualNet, image(16)),
    "mlp": (nets.MLP, (torch.randn(2, 12),)),
    "tied": (nets.TiedNet, (torch.arange(14).view(2, 7) % 11,)),
    "dict": (nets.DictNet, (torch.randn(2, 4),)),
    "optional": (nets.OptionalNet, (torch.randn(2, 4), torch.randn(2, 5), torch.rand(2, 3))),
    "functional": (nets.FunctionalNet, image(10)),
    "twice": (nets.TwiceNet, (torch.randn(2, 6),)),
    "weight_norm": (nets.WeightNormNet, (torch.randn(2, 6),)),
    "norms": (nets.NormNet, image(8)),
    "conv1d": (nets.Conv1dNet, (torch.randn(2, 1, 32),)),
    "frozen_norm": (nets.FrozenNormNet, (torch.randn(2, 4),)),
}


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """A net whose norms have statistics of their own, so that a lost one is seen."""
    torch.manual_seed(0)
    model = make()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
        elif name.endswith("num_batches_tracked"):
            buffer.fill_(17)
    return model


@pytest.fixture(scope="module")
def traced() -> dict[str, tuple[nn.Module, Traced, tuple[Tensor, ...]]]:
    made = {}
    for name, (make, args) in CASES.items():
        model = seeded(make)
        made[name] = (model, trace(model, args, {}), args)
    return made


def leaves(output: object) -> list[Tensor]:
    found = [output] if isinstance(output, Tensor) else []
    for item in output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ():
        found += leaves(item)
    return found


def rows(args: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
    torch.manual_seed(count)
    return tuple(
        torch.randn(count, *a.shape[1:]) if a.is_floating_point() else torch.randint(0, 11, (count, *a.shape[1:]))
        for a in args
    )


def assert_equal(got: object, expected: object) -> None:
    assert type(got) is type(expected)
    pairs = list(zip(leaves(got), leaves(expected), strict=True))
    assert pairs
    for mine, theirs in pairs:
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", CASES)
def test_graph_equals_model_at_every_batch(name, traced):
    model, result, args = traced[name]
    for count in (1, 2, 7):  # bit-equal: the same kernels in the same order
        batch = rows(args, count)
        assert_equal(result.module(*batch), copy.deepcopy(model).eval()(*batch))


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_the_models(name, traced):
    model, result, args = traced[name]
    theirs, mine = copy.deepcopy(model).eval(), copy.deepcopy(result.module)
    for each in (theirs, mine):
        sum((leaf**2).sum() for leaf in leaves(each(*rows(args, 3)))).backward()
    expected = {key: p.grad for key, p in theirs.named_parameters()}
    got = {key: p.grad for key, p in mine.named_parameters()}
    assert got.keys() == expected.keys()
    for key, grad in expected.items():
        assert grad is not None
        assert torch.allclose(got[key], grad, rtol=1e-5, atol=1e-6), key  # sums over paths may come in another order


@pytest.mark.parametrize("name", CASES)
def test_state_dict_is_the_users(name, traced):
    model, result, _ = traced[name]
    expected, got = model.state_dict(), result.module.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    assert all(p.requires_grad for p in result.module.parameters())


@pytest.mark.parametrize("name", CASES)
def test_no_memory_is_shared_with_the_users_model(name, traced):
    model, result, _ = traced[name]
    theirs = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()}
    assert all(tensor.data_ptr() not in theirs for tensor in (*result.module.parameters(), *result.module.buffers()))


@pytest.mark.parametrize("name", CASES)
def test_nodes_are_pure_and_sizes_explicit(name, traced):
    _, result, _ = traced[name]
    for node in result.module.graph.nodes:
        assert node.op in ("placeholder", "call_module", "call_function", "get_attr", "output")
        if node.op == "call_function":
            pure = isinstance(node.target, OpOverload) and not node.target._schema.is_mutable
            assert pure or node.target in vars(operator).values()
            assert "aten.view" not in str(node.target) or -1 not in node.args[1]


def at_five(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 5)))


@pytest.mark.parametrize("name", CASES)
def test_traced_sizes_are_the_real_ones(name, traced):
    _, result, args = traced[name]
    real = shapes(result.module, rows(args, 5))
    for refreshed in (False, True):
        graph = copy.deepcopy(result.module)
        if refreshed:
            annotate(graph)
        for node in graph.graph.nodes:
            if node.name not in real or node.op == "output":
                continue
            value = node.meta["val"]
            assert tuple(at_five(size) for size in value.shape) == real[node.name], node.name


@pytest.mark.parametrize("name", ["tutorial", "residual", "functional", "tied"])
def test_it_exports_again(name, traced):
    _, result, args = traced[name]
    again = trace(result.module, args, {})
    assert_equal(again.module(*rows(args, 3)), result.module(*rows(args, 3)))
    assert [n.op for n in again.module.graph.nodes] == [n.op for n in result.module.graph.nodes]


def test_modules_are_real_and_under_the_users_names(traced):
    model, result, _ = traced["residual"]

    def standard(net: nn.Module) -> dict[str, type]:
        kinds = {path: type(part) for path, part in net.named_modules()}
        return {path: kind for path, kind in kinds.items() if kind in (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Linear)}

    assert len(standard(model)) == 16
    assert standard(result.module) == standard(model)
    norm, own = model.get_submodule("layers.1.down.1"), result.module.get_submodule("layers.1.down.1")
    assert (own.eps, own.momentum, int(own.num_batches_tracked)) == (norm.eps, norm.momentum, 17)


def test_settings_of_layers_survive():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(4, 8, (3, 1), stride=2, padding=(2, 0), dilation=2, groups=2),
        nn.Conv2d(8, 8, 3, padding="same"),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1, groups=2),
        nn.BatchNorm2d(6, eps=1e-3, momentum=None, affine=False),
        nn.GroupNorm(3, 6, eps=1e-4),
        nn.Hardtanh(-0.5, 2.0),
        nn.ReLU6(inplace=True),
        nn.LeakyReLU(0.3),
        nn.ELU(0.5),
        nn.GELU("tanh"),
        nn.MaxPool2d(3, stride=1, padding=1),
        nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False),
        nn.AdaptiveAvgPool2d((2, 1)),
        nn.Flatten(),
        nn.LayerNorm(12, bias=False),
        nn.Softplus(2.0),
        nn.AlphaDropout(0.2),
        nn.Linear(12, 3, bias=False),
        nn.Softmax(-1),
    ]
    model = nn.Sequential(*layers).eval()
    graph = trace(model, (torch.randn(1, 4, 20, 20),), {}).module
    x = torch.randn(5, 4, 20, 20)
    assert torch.equal(graph(x), model(x))
    assert {name: type(part) for name, part in graph.named_children()} == {
        name: type(part) for name, part in model.named_children()
    }
    assert graph.get_submodule("4").momentum is None
    assert graph.get_submodule("17").p == 0.2


def test_users_model_is_left_alone():
    model = seeded(nets.ResidualNet)
    calls = []
    model.fc.register_forward_hook(lambda *_: calls.append(1))
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    args = image(16)
    random = torch.get_rng_state()
    result = trace(model, args, {})
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [part.training for part in model.modules()] == modes
    assert calls == []  # the user's hooks saw nothing of ours
    model(*args)
    assert calls == [1]
    assert not result.module.fc._forward_hooks
    assert [note.code for note in result.notes] == ["trace.hooks"]


def test_train_and_eval_do_what_they_say():
    torch.manual_seed(0)
    model = nets.ResidualNet()
    graph = trace(model, image(16), {}).module
    batch = torch.randn(6, 3, 16, 16)
    assert not graph.training
    graph.train()
    model.train()
    assert torch.equal(graph(batch), model(batch))  # batch statistics
    assert torch.equal(graph.bn.running_mean, model.bn.running_mean)
    assert int(graph.bn.num_batches_tracked) == 1
    graph.eval()
    model.eval()
    assert torch.equal(graph(batch), model(batch))


@pytest.mark.parametrize("name", ["mlp", "functional"])
def test_dropout_drops_in_training_only(name, traced):
    _, result, args = traced[name]
    graph = copy.deepcopy(result.module)
    batch = rows(args, 4)
    assert torch.equal(graph(*batch), graph(*batch))
    graph.train()
    assert not torch.equal(graph(*batch), graph(*batch))
    assert any(isinstance(part, nn.Dropout) and part.p in (0.25, 0.5) for part in graph.modules())


def test_it_learns_in_a_plain_loop():
    torch.manual_seed(0)
    graph = trace(nets.TutorialCNN(), image(32), {}).module.train()
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8)
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.cross_entropy(graph(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def test_hooks_on_submodules_fire(traced):
    _, result, args = traced["residual"]
    graph = copy.deepcopy(result.module)
    seen = {}
    graph.layers.get_submodule("0").conv1.register_forward_hook(lambda m, i, o: seen.update(forward=o.shape))
    graph.get_submodule("layers.1.conv2").register_full_backward_hook(lambda m, i, o: seen.update(backward=o[0].shape))
    graph(*args).sum().backward()
    assert seen == {"forward": (2, 8, 16, 16), "backward": (2, 16, 8, 8)}


def test_positional_and_keyword_calls_agree(traced):
    _, result, args = traced["optional"]
    left, right, mask = args
    assert torch.equal(result.module(left, right, mask), result.module(mask=mask, right=right, left=left))


def test_optional_inputs_may_be_absent():
    model = nets.OptionalNet()
    left, right, mask = torch.randn(2, 4), torch.randn(2, 5), torch.rand(2, 3)
    plain = trace(model, (), {"right": right, "left": left, "mask": None})
    assert torch.equal(plain.module(left, right), model(left, right))
    skipped = trace(model, (left,), {"right": right, "scale": 3.0})
    assert torch.equal(skipped.module(left=left, right=right), model(left, right, scale=3.0))
    assert [(note.code, note.where) for note in skipped.notes] == [("trace.argument-fixed", "scale")]
    assert torch.equal(trace(model, (left, right, mask), {}).module(left, right, mask), model(left, right, mask))


def test_an_input_left_out_before_one_given_is_told():
    def forward(self, x, mask=None, scale=None):
        y = self.fc(x)
        return y if scale is None else y * scale

    result = trace(net(forward, fc=nn.Linear(4, 3)), (torch.randn(2, 4),), {"scale": torch.rand(2, 1)})
    assert [(note.code, note.where) for note in result.notes] == [("trace.call-order", "mask")]


def test_tied_weights_stay_tied(traced):
    _, result, args = traced["tied"]
    graph = copy.deepcopy(result.module)
    assert graph.embed.weight is graph.head.weight
    assert graph.a.weight is graph.b.weight
    graph(*args).sum().backward()
    torch.optim.SGD(graph.parameters(), lr=0.1).step()
    assert torch.equal(graph.embed.weight, graph.head.weight)


def test_a_module_called_twice_is_one_module(traced):
    _, result, _ = traced["twice"]
    assert [str(node.target) for node in result.module.graph.nodes if node.op == "call_module"] == [
        "inner",
        "inner",
        "fc",
    ]


def test_computed_weights_stay_calls_and_train(traced):
    _, result, _ = traced["weight_norm"]
    targets = {str(node.target) for node in result.module.graph.nodes}
    assert "aten.linear.default" in targets
    assert "b" in targets
    assert "a.parametrizations.weight.original0" in dict(result.module.named_parameters())


def test_what_no_output_needs_is_dropped_and_told():
    result = trace(nets.UnusedNet(), (torch.randn(2, 4),), {})
    assert list(result.module.state_dict()) == ["fc.weight", "fc.bias"]
    [note] = result.notes
    assert note.code == "trace.unused"
    assert "dead.weight" in note.text
    assert "unused.bias" in note.text


@dataclass
class Answer:
    logits: Tensor
    extra: Tensor | None = None


def test_output_classes_become_plain_containers():
    result = trace(net(lambda self, x: Answer(self.fc(x)), fc=nn.Linear(4, 3)), (torch.randn(2, 4),), {})
    output = result.module(torch.randn(5, 4))
    assert list(output) == ["logits"]
    assert [note.code for note in result.notes] == ["trace.output-type"]


def test_gradients_stop_where_no_grad_stopped_them():
    def forward(self, x):
        with torch.no_grad():
            features = self.backbone(x)
        return self.head(features)

    model = net(forward, backbone=nn.Linear(4, 5), head=nn.Linear(5, 2))
    graph = trace(model, (torch.randn(2, 4),), {}).module
    x = torch.randn(3, 4)
    assert torch.equal(graph(x), model(x))
    graph(x).sum().backward()
    assert graph.backbone.weight.grad is None
    assert graph.head.weight.grad is not None


def test_a_graph_moves_to_another_device_whole():
    def forward(self, x):
        made = torch.zeros(x.shape[0], 3) + torch.ones(3) + torch.arange(3) + torch.full((x.shape[0], 1), 2.0)
        return self.fc(x) + made + torch.tensor([1.0, 2.0, 3.0]) + torch.zeros_like(made)

    model = net(forward, fc=nn.Linear(4, 3))
    result = trace(model, (torch.randn(2, 4),), {})
    x = torch.randn(5, 4)
    assert torch.equal(result.module(x), model(x))
    assert list(result.module.state_dict()) == list(model.state_dict())
    moved = copy.deepcopy(result.module).to("meta")  # any tensor left on the CPU makes the addition fail
    assert moved(x.to("meta")).device.type == "meta"
    assert result.notes == ()


@pytest.mark.parametrize(("dtype", "word"), [(torch.float16, "float16"), (torch.float64, "float64")])
def test_other_number_formats_become_float32(dtype, word):
    model = nets.MLP().to(dtype)
    result = trace(model, (torch.randn(2, 12).to(dtype),), {})
    assert {p.dtype for p in result.module.parameters()} == {torch.float32}
    assert [note.code for note in result.notes] == ["trace.dtype"]
    assert word in result.notes[0].text
    assert next(model.parameters()).dtype is dtype


def test_state_between_calls_is_told():
    def forward(self, x):
        self.calls += 1
        return self.fc(x)

    model = net(forward, fc=nn.Linear(4, 3), calls=torch.zeros(()))
    result = trace(model, (torch.randn(2, 4),), {})
    assert "trace.state-dropped" in [note.code for note in result.notes]
    assert int(model.calls) == 0


def test_dropout_inside_attention_is_told():
    def forward(self, x):
        return self.attend(x, x, x, need_weights=False)[0]

    model = net(forward, attend=nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True))
    result = trace(model, (torch.randn(2, 5, 8),), {})
    assert [(note.code, note.where) for note in result.notes] == [("trace.dropout-lost", "attend")]


def test_rows_of_the_example_may_be_one_or_many():
    torch.manual_seed(0)
    model = nets.MLP().eval()
    for count in (1, 3, 64):
        graph = trace(model, (torch.randn(count, 12),), {}).module
        x = torch.randn(9, 12)
        assert torch.equal(graph(x), model(x))
