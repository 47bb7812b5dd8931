"""Products with a weight of the network's own become layers: found, cut, proven, and put back under the user's names."""

from __future__ import annotations

import types

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flyweight.errors import ModelError
from flyweight.graph import program
from flyweight.graph.axes import groups
from flyweight.graph.operators import layers
from flyweight.graph.surgery import cut, prove_all
from flyweight.graph.trace import trace
from flyweight.graph.transplant import transplanted

from .nets import net

TOKENS = torch.randn(2, 7, 6)


class Turned(nn.Module):
    """As Hugging Face's Conv1D: the weight lies "in out", rows are made of all tokens, the size is an attribute."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return rows.view(*x.size()[:-1], self.nf)


def own(forward: object, **tensors: Tensor) -> nn.Module:
    model = net(forward, fc=nn.Linear(16, 5))
    for key, tensor in tensors.items():
        model.register_parameter(key, nn.Parameter(tensor))
    return model.eval()


W, B = torch.randn(6, 16), torch.randn(16)
CASES = {  # the network, the layer's name, the user's name of its weight
    "Conv1D": (lambda: net(lambda self, x: self.fc(torch.relu(self.up(x))), up=Turned(6, 16), fc=nn.Linear(16, 5)).eval(),
               "up", "up.weight"),
    "x @ w": (lambda: own(lambda self, x: self.fc(torch.relu(x @ self.w)), w=W), "w", "w"),
    "x @ w + b": (lambda: own(lambda self, x: self.fc(torch.relu(x @ self.w + self.b)), w=W, b=B), "w", "w"),
    "b + x @ w": (lambda: own(lambda self, x: self.fc(torch.relu(self.b + x @ self.w)), w=W, b=B), "w", "w"),
    "linear": (lambda: own(lambda self, x: self.fc(torch.relu(F.linear(x, self.in_weight, self.b))), in_weight=W.T, b=B),
               "in_weight", "in_weight"),  # "in" is a word of Python
    "x @ w.T": (lambda: own(lambda self, x: self.fc(torch.relu(x @ self.w.T)), w=W.T), "w", "w"),
    "a list's": (lambda: net(lambda self, x: self.fc(torch.relu(x @ self.ws[0])), ws=nn.ParameterList([W]),
                             fc=nn.Linear(16, 5)).eval(), "ws.0", "ws.0"),
    "transpose": (lambda: own(lambda self, x: self.fc(torch.relu(x @ self.w.transpose(0, 1))), w=W.T), "w", "w"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_product_with_an_own_weight_is_a_layer(name: str):
    make, path, weight = CASES[name]
    torch.manual_seed(0)
    model = make()
    traced = trace(model, (TOKENS,))
    graph = traced.module
    layer = layers(graph)[path]
    assert (layer.columns, layer.outputs, layer.positions) == (6, 16, 7)
    assert layer.bias == ("b" in name or name in ("Conv1D", "linear"))
    assert graph.meta["renamed"][f"{path}.weight"][0] == weight
    assert "trace.loose-weights" not in [note.code for note in traced.notes]
    group = next(g for g in groups(graph, (TOKENS,)) if g.name == path)
    assert (group.size, group.frozen, [use.layer for use in group.consumers]) == (16, "", ["fc"])
    assert prove_all(graph, [group], (TOKENS,), 0) == {}
    again = program.load(*program.save(graph))
    assert again.meta["renamed"] == graph.meta["renamed"]
    cut(again, {group: [0, 3, 4, 9, 15]})
    made = transplanted(again, model, None)
    assert dict(made.named_parameters())[weight].shape.numel() == 6 * 5
    assert set(made.state_dict()) == set(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(made(TOKENS), again(TOKENS))


def test_a_weight_used_by_two_calls_stays_one():
    model = own(lambda self, x: self.fc(torch.relu(x @ self.w) * torch.sigmoid(torch.tanh(x) @ self.w)), w=W)
    graph = trace(model, (TOKENS,)).module
    assert len(layers(graph)["w"].nodes) == 2
    assert list(dict(graph.named_parameters())) == ["w.weight", "fc.weight", "fc.bias"]


def test_tied_weights_and_weights_of_torchs_layers_stay_what_they_are():
    def forward(self, x):
        return self.fc(x) @ self.fc.weight + x @ self.one @ self.other.T

    model = net(forward, fc=nn.Linear(6, 4), one=None, other=None)
    model.one = nn.Parameter(torch.randn(6, 6))
    model.other = model.one
    graph = trace(model.eval(), (TOKENS,)).module
    assert list(layers(graph)) == ["fc"]
    assert "renamed" not in graph.meta


def hidden(x: Tensor) -> Tensor:
    """Tokens that do not count; the first one does, or a row of scores would be all -inf."""
    return (x[:, :, 0] > 1) & (torch.arange(x.shape[1]) > 0)


LEFT_ALONE = {  # what looks like a layer and is none
    "one number as bias": lambda self, x: self.fc(torch.relu(torch.addmm(self.one, x.mean(1), self.w))),
    "one number in linear": lambda self, x: self.fc(torch.relu(F.linear(x, self.w.T.contiguous(), self.one))),
    "its own input": lambda self, x: self.fc(torch.relu((x @ (self.w @ self.w.t())) @ self.w)),
    "scaled": lambda self, x: self.fc(torch.addmm(self.b, x.mean(1), self.w, alpha=2.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_no_layer_stays_a_product(name: str):
    model = own(LEFT_ALONE[name], w=W, b=B, one=torch.randn(1))
    graph = trace(model, (TOKENS,)).module
    assert list(layers(graph)) == ["fc"]
    assert sum(p.numel() for p in graph.parameters()) <= sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(program.load(*program.save(graph))(TOKENS), model(TOKENS))


@pytest.mark.parametrize("name", ["forward", "type", "train", "graph", "code", "meta", "T_destination", "import"])
def test_a_layer_is_never_called_as_something_that_every_module_has(name: str):
    model = own(lambda self, x: self.fc(torch.relu(x @ getattr(self, f"{name}_weight"))), **{f"{name}_weight": W})
    assert list(layers(trace(model, (TOKENS,)).module)) == [f"{name}_weight", "fc"]


def test_two_views_of_one_product_are_one_call():
    def forward(self, x):
        rows, shape = torch.addmm(self.b, x.reshape(-1, 6), self.w), (*x.shape[:-1], 16)
        return self.fc(torch.relu(rows.view(shape)) * torch.sigmoid(rows.view(shape)))

    layer = layers(trace(own(forward, w=W, b=B), (TOKENS,)).module)["w"]
    assert (len(layer.nodes), layer.positions) == (1, 7)


def test_a_plain_tensor_beside_the_weight_goes_into_the_users_class_too():
    model = own(lambda self, x: self.fc(torch.relu(x @ self.w + self.c)), w=W)
    model.c = torch.randn(16)
    graph = trace(model, (TOKENS,)).module
    cut(graph, {next(g for g in groups(graph, (TOKENS,)) if g.name == "w"): [1, 2, 5]})
    made = transplanted(graph, model, None)
    assert made.c.shape == (3,)
    assert not isinstance(made.c, nn.Parameter)


class Homogeneous(nn.Module):
    """A bias as one more row, and a size that is not what torch's classes mean by it."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.weight = 6, nn.Parameter(torch.randn(7, 16))

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == self.in_features
        return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1) @ self.weight


def test_sizes_of_the_users_own_class_stay_the_users():
    model = net(lambda self, x: self.fc(torch.relu(self.up(x))), up=Homogeneous(), fc=nn.Linear(16, 5)).eval()
    assert transplanted(trace(model, (TOKENS,)).module, model, None).up.in_features == 6


def test_a_forward_of_the_users_on_torchs_attention_is_the_users():
    def mine(self, x):
        return 2 * nn.MultiheadAttention.forward(self, x, x, x)[0] + 1

    model = net(lambda self, x: self.fc(self.a(x)), a=nn.MultiheadAttention(8, 2, batch_first=True), fc=nn.Linear(8, 3))
    model.a.forward = types.MethodType(mine, model.a)
    x = torch.randn(5, 7, 8)
    with torch.no_grad():
        torch.testing.assert_close(trace(model.eval(), (x,)).module(x), model(x))


def test_cross_attention_is_looked_at():
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True).eval()
    example = (torch.randn(4, 7, 8), torch.randn(4, 5, 8))
    found = [group.name for group in groups(trace(model, example).module, example) if not group.frozen]
    own_heads = [f"{side}.layers.0.self_attn.in_proj" for side in ("encoder", "decoder")]
    assert found == [own_heads[0], "encoder.layers.0.linear1", own_heads[1], "decoder.layers.0.linear1"]


ATTENTION = {
    "self": lambda self, x: self.fc(self.a(x, x, x, need_weights=False)[0]),
    "weights thrown away": lambda self, x: self.fc(self.a(x, x, x)[0]),
    "weights returned": lambda self, x: self.a(x, x, x),
    "weights by head": lambda self, x: self.a(x, x, x, average_attn_weights=False)[1],
    "mask": lambda self, x: self.fc(self.a(x, x, x, attn_mask=self.mask)[0]),
    "mask, no weights": lambda self, x: self.fc(self.a(x, x, x, attn_mask=self.mask, need_weights=False)[0]),
    "numbers as mask": lambda self, x: self.fc(self.a(x, x, x, attn_mask=self.mask * -2.0)[0]),
    "causal": lambda self, x: self.fc(self.a(x, x, x, attn_mask=self.mask, is_causal=True, need_weights=False)[0]),
    "padding": lambda self, x: self.fc(self.a(x, x, x, key_padding_mask=hidden(x))[0]),
    "both": lambda self, x: self.fc(self.a(x, x, x, key_padding_mask=hidden(x), attn_mask=self.mask)[0]),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("batch_first", [True, False])
def test_heads_of_torchs_attention_are_found_and_the_numbers_are_torchs(name: str, batch_first: bool):
    def forward(self, x):
        if batch_first:
            return ATTENTION[name](self, x)
        swapped = x.transpose(0, 1)
        given = {"key_padding_mask": hidden(x)} if name in ("padding", "both") else {}
        given |= {"attn_mask": self.mask} if name in ("mask", "both") else {}
        return self.fc(self.a(swapped, swapped, swapped, **given)[0]).transpose(0, 1)

    mask = torch.ones(7, 7).triu(1).bool()
    model = net(forward, a=nn.MultiheadAttention(8, 4, batch_first=batch_first), fc=nn.Linear(8, 3), mask=mask).eval()
    x = torch.randn(5, 7, 8)
    graph = trace(model, (x,)).module  # which proves the outputs equal at several batch sizes
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-5)
    found = {g.name: g for g in groups(graph, (x,))}
    assert (found["a.in_proj"].kind, found["a.in_proj"].size) == ("heads", 4)
    if not found["a.in_proj"].frozen:
        assert prove_all(graph, [found["a.in_proj"]], (x,), 0) == {}
    assert bool(found["a.in_proj"].frozen) == (batch_first and name in ("weights returned", "weights by head"))


@pytest.mark.parametrize("settings", [{"add_zero_attn": True}, {"kdim": 4, "vdim": 4}, {"add_bias_kv": True}])
def test_attention_that_is_not_plain_takes_torchs_own_way(settings: dict):
    other = settings.get("kdim", 8)

    def forward(self, x):
        return self.fc(self.a(x, x[:, :, :other], x[:, :, :other])[0])

    model = net(forward, a=nn.MultiheadAttention(8, 4, batch_first=True, **settings), fc=nn.Linear(8, 3)).eval()
    x = torch.randn(5, 7, 8)
    graph = trace(model, (x,)).module
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_network_with_cut_heads_does_not_go_into_torchs_class():
    model = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True).eval()
    graph = trace(model, (torch.randn(2, 7, 8),)).module
    heads = next(g for g in groups(graph, (torch.randn(2, 7, 8),)) if g.kind == "heads")
    assert torch.equal(
        dict(transplanted(graph, model, None).state_dict())["self_attn.in_proj_weight"], model.self_attn.in_proj_weight
    )
    cut(graph, {heads: [0, 2, 3]})
    with pytest.raises(ModelError, match=r"1 nn\.MultiheadAttention lost heads"):
        transplanted(graph, model, None)
