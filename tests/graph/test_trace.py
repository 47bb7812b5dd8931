"""Laws of trace: the graph is the model, made of real modules under the user's names."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
from torch import fx, nn
from torch._ops import OpOverload

from flyweight.graph.functional import functionalise
from flyweight.graph.shapes import annotate, shapes
from flyweight.graph.trace import trace

from .cases import CASES, assert_equal, case, leaves, rows


@pytest.mark.parametrize("name", CASES)
def test_graph_equals_model_at_every_batch(name):
    model, result, args = case(name)
    for count in (1, 2, 7):  # bit-equal: the same kernels in the same order
        batch = rows(args, count)
        assert_equal(result.module(*batch), copy.deepcopy(model).eval()(*batch))


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_the_models(name):
    model, result, args = case(name)
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
def test_state_dict_is_the_users(name):
    model, result, _ = case(name)
    expected, got = model.state_dict(), result.module.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    assert all(p.requires_grad for p in result.module.parameters())


@pytest.mark.parametrize("name", CASES)
def test_no_memory_is_shared_with_the_users_model(name):
    model, result, _ = case(name)
    theirs = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()}
    assert all(tensor.data_ptr() not in theirs for tensor in (*result.module.parameters(), *result.module.buffers()))


@pytest.mark.parametrize("name", CASES)
def test_nodes_are_pure_and_sizes_explicit(name):
    _, result, _ = case(name)
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
def test_traced_sizes_are_the_real_ones(name):
    _, result, args = case(name)
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
def test_it_exports_again(name):
    _, result, args = case(name)
    again = trace(result.module, args, {})
    assert_equal(again.module(*rows(args, 3)), result.module(*rows(args, 3)))
    assert [n.op for n in again.module.graph.nodes] == [n.op for n in result.module.graph.nodes]


def test_modules_are_real_and_under_the_users_names():
    model, result, _ = case("residual")

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


def test_functionalise_moves_later_uses_to_the_new_value():
    # torch.export writes `relu_(a); add(relu_, …)` itself; a graph made elsewhere may still read `a` afterwards
    graph = fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_function(torch.ops.aten.mul.Tensor, (x, -1.0))
    before = graph.call_function(torch.ops.aten.add.Tensor, (a, 1.0))
    graph.call_function(torch.ops.aten.relu_.default, (a,))
    graph.output((before, graph.call_function(torch.ops.aten.add.Tensor, (a, 2.0))))
    x_value = torch.tensor([-3.0, 5.0])
    expected = fx.GraphModule(nn.Module(), graph)(x_value)
    functionalise(graph)
    assert_equal(fx.GraphModule(nn.Module(), graph)(x_value), expected)
    assert torch.equal(expected[1], torch.tensor([5.0, 2.0]))
