"""A copy of the user's class with smaller layers computes what the graph computes, or the reason is told."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flyweight.errors import ModelError, UsageError
from flyweight.graph.program import load, save
from flyweight.graph.trace import trace
from flyweight.graph.transplant import transplanted

from . import cuts, nets


def assert_same(net: nn.Module, graph: nn.Module, *inputs: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(net(*inputs), graph(*inputs), rtol=1e-5, atol=1e-5)


def residual() -> tuple[nn.Module, torch.fx.GraphModule, Tensor]:
    """The residual net with the inner channels of both blocks cut, norms and all."""
    return copy.deepcopy(traced_residual())


@functools.cache
def traced_residual() -> tuple[nn.Module, torch.fx.GraphModule, Tensor]:
    """As `residual`, for nobody to write into."""
    net, x = nets.ResidualNet().eval(), torch.randn(2, 3, 16, 16)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):  # as after training: a fresh norm does next to nothing
            part.running_mean.normal_(std=0.3)
            part.running_var.uniform_(0.5, 2)
    graph = trace(net, (x,)).module
    for block, kept in (("layers.0", [0, 2, 5]), ("layers.1", list(range(0, 16, 2)))):
        cuts.rows(graph.get_submodule(f"{block}.conv1"), kept)
        cuts.rows(graph.get_submodule(f"{block}.bn1"), kept)
        cuts.columns(graph.get_submodule(f"{block}.conv2"), kept)
    return net, graph, x


def test_smaller_layers_stand_in_the_users_own_class():
    net, graph, _ = residual()
    before = copy.deepcopy(net.state_dict())
    made = transplanted(graph, net, None)
    assert type(made) is nets.ResidualNet
    assert type(made.layers[0]) is nets.Block
    assert_same(made, graph, torch.randn(5, 3, 16, 16))
    conv, norm = made.layers[0].conv1, made.layers[0].bn1
    assert (conv.out_channels, norm.num_features, made.layers[0].conv2.in_channels) == (3, 3, 3)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    assert not {p.data_ptr() for p in made.parameters()} & {
        p.data_ptr() for p in [*net.parameters(), *graph.parameters()]
    }


def test_what_goes_into_the_network_goes_into_its_copy():
    net, graph, x = residual()
    made = transplanted(graph, net.double(), None)
    assert made(x.double()).dtype == torch.float64


def test_the_state_dict_goes_round():
    net, graph, x = residual()
    made = transplanted(graph, net, None)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    missing, unexpected = made.load_state_dict(graph.state_dict(), strict=False)
    assert (missing, unexpected) == ([], [])
    assert_same(made, graph, x)


def test_it_trains_with_its_norms_and_keeps_what_was_frozen():
    net, graph, x = residual()
    net.fc.weight.requires_grad_(False)
    made = transplanted(graph, net, None).train()
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.05)
    target, losses = torch.randn(2, 10), []
    mean = made.layers[0].bn1.running_mean.clone()
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.mse_loss(made(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(made.layers[0].bn1.running_mean, mean)
    assert made.fc.weight.grad is None


def test_a_program_that_was_stored_serves_as_well():
    net, graph, x = residual()
    assert_same(transplanted(load(*save(graph)), net, None), graph, x)


def test_tied_weights_stay_tied():
    net, ids = nets.TiedNet().eval(), torch.randint(0, 11, (2, 7))
    graph = trace(net, (ids,)).module
    with torch.no_grad():
        graph.get_submodule("embed").weight.mul_(0.5)
    made = transplanted(graph, net, None)
    assert made.head.weight is made.embed.weight
    assert made.b.weight is made.a.weight
    assert torch.equal(made.embed.weight, net.embed.weight * 0.5)
    assert_same(made, graph, ids)


def test_a_tie_to_what_forward_never_reads_is_kept_too():
    class Unread(nets.TiedNet):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Linear(6, 11, bias=False)
            self.decoder.weight = self.embed.weight

    net = Unread().eval()
    graph = trace(net, (torch.randint(0, 11, (2, 7)),)).module
    assert "decoder.weight" not in graph.state_dict()
    made = transplanted(graph, net, None)
    assert made.decoder.weight is made.embed.weight is made.head.weight


class Attention(nn.Module):
    """Heads by attributes, as the usual libraries write them."""

    def __init__(self, width: int = 12, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_size, self.all_size = heads, width // heads, width
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q, k, v = self.qkv(x).split(self.all_size, dim=-1)
        q, k, v = (t.view(rows, length, self.num_heads, self.head_size).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(rows, length, self.all_size))


class Stack(nn.Module):
    """Three residual blocks of attention; each may keep other heads."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_numbers_of_heads_are_sought_in_attributes_block_by_block():
    net, x = Stack().eval(), torch.randn(2, 5, 12)
    net.blocks[1].num_heads, net.blocks[1].head_size = 6, 2
    graph = trace(net, (x,)).module
    assert cuts.sizes(graph, [4, 3], [2, 3]) == 6
    assert cuts.sizes(graph, [6, 2], [3, 2]) == 3
    assert cuts.sizes(graph, [5, 12], [5, 6]) == 3
    for node in graph.graph.nodes:
        if "split" in str(node.target):
            node.update_arg(1, 6)
    graph.recompile()
    for block in range(3):
        kept = [0, 1, 2, 6, 7, 8] if block != 1 else [2, 3, 4, 5, 10, 11]
        cuts.rows(graph.get_submodule(f"blocks.{block}.qkv"), [part * 12 + c for part in range(3) for c in kept])
        cuts.columns(graph.get_submodule(f"blocks.{block}.out"), kept)
    made = transplanted(graph, net, None)
    assert [(b.num_heads, b.head_size, b.all_size) for b in made.blocks] == [(2, 3, 6), (3, 2, 6), (2, 3, 6)]
    assert [b.num_heads for b in net.blocks] == [4, 6, 4]
    assert_same(made, graph, torch.randn(3, 5, 12))


def test_a_wrong_number_of_heads_is_no_answer_however_small_the_difference():
    """Two heads of three and one head of six differ by less than float32 can tell behind a factor of 1e-7."""

    class Faint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            return x + 1e-7 * self.attention(x)

    net, x = Faint().eval(), torch.randn(2, 5, 12)
    graph = trace(net, (x,)).module
    assert cuts.sizes(graph, [2, 6], [2, 3]) == 3
    assert cuts.sizes(graph, [5, 12], [5, 6]) == 1
    for node in graph.graph.nodes:
        if "split" in str(node.target):
            node.update_arg(1, 6)
    graph.recompile()
    kept = [0, 1, 2, 6, 7, 8]
    cuts.rows(graph.get_submodule("attention.qkv"), [part * 12 + c for part in range(3) for c in kept])
    cuts.columns(graph.get_submodule("attention.out"), kept)
    made = transplanted(graph, net, None).attention
    assert (made.num_heads, made.head_size, made.all_size) == (2, 3, 6)


def test_a_forward_that_insists_on_float32_is_compared_in_float32():
    class Insists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)) @ torch.eye(8))

    net = Insists().eval()
    graph = trace(net, (torch.randn(2, 4),)).module
    assert_same(transplanted(graph, net, None), graph, torch.randn(3, 4))


class RootMeanSquare(nn.Module):
    """A norm that goes to float32 and back to the type of its input, as in the usual language models."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4))
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        y = self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return x + self.b(torch.relu(self.a(y)))


def test_a_norm_that_computes_in_float32_is_no_difference():
    net = nn.Sequential(RootMeanSquare(), RootMeanSquare()).eval()
    graph = trace(net, (torch.randn(2, 4),)).module
    for block in "01":
        cuts.rows(graph.get_submodule(f"{block}.a"), [1, 2, 7])
        cuts.columns(graph.get_submodule(f"{block}.b"), [1, 2, 7])
    assert_same(transplanted(graph, net, None), graph, torch.randn(3, 4))


@pytest.mark.parametrize("heads", [4, 3])
def test_a_bert_with_fewer_heads_or_narrower_ones(heads):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    net = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=100)).eval()
    call = {"input_ids": torch.randint(0, 100, (2, 16)), "attention_mask": torch.ones(2, 16, dtype=torch.long)}
    graph = trace(net, (), call).module
    width = 36 // heads
    assert cuts.sizes(graph, [4, 12], [heads, width]) == 6
    cuts.sizes(graph, [4, 16, 12], [heads, 16, width])
    cuts.sizes(graph, [16, 48], [16, 36])
    kept = [h * 12 + i for h in range(heads) for i in range(width)]
    for block in range(2):
        for name in ("query", "key", "value"):
            cuts.rows(graph.get_submodule(f"encoder.layer.{block}.attention.self.{name}"), kept)
        cuts.columns(graph.get_submodule(f"encoder.layer.{block}.attention.output.dense"), kept)
    made = transplanted(graph, net, None)
    with torch.no_grad():
        expected, given = graph(**call), made(**call)
    for name, value in expected.items():
        torch.testing.assert_close(given[name], value)


class Literal(nn.Module):
    """A size that is written into forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(8 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).view(-1, 8 * 16))


def literal_cut() -> tuple[nn.Module, torch.fx.GraphModule, Tensor]:
    net, x = Literal().eval(), torch.randn(2, 3, 4, 4)
    graph = trace(net, (x,)).module
    cuts.rows(graph.get_submodule("conv"), [0, 1, 5, 6])
    cuts.columns(graph.get_submodule("fc"), [c * 16 + i for c in (0, 1, 5, 6) for i in range(16)])
    assert cuts.sizes(graph, [128], [64]) == 1
    return net, graph, x


def test_a_size_written_into_forward_is_refused_with_its_line():
    net, graph, _ = literal_cut()
    with pytest.raises(ModelError) as caught:
        transplanted(graph, net, None)
    # 64 columns for 128: half the rows come out, or the matrix does not fit; the line is that of the literal
    assert "test_transplant.py" in caught.value.where or "fc" in caught.value.where, str(caught.value)
    assert "save_source" in caught.value.fix


def test_another_function_under_the_same_names_is_refused():
    """Same shapes, other weights in forward: only running both can tell."""
    net, graph, _ = residual()

    class Louder(nets.ResidualNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1.01

    other = Louder().eval()
    other.load_state_dict(net.state_dict())
    with pytest.raises(ModelError, match="other outputs"):
        transplanted(graph, other, None)


@pytest.mark.parametrize("other", [nn.Sequential(nn.Conv2d(3, 4, 1)), nets.FunctionalNet(), nn.Bilinear(3, 4, 5)])
def test_another_network_is_refused(other):
    _, graph, _ = residual()
    with pytest.raises(UsageError, match=r"has no `|does not take x"):
        transplanted(graph, other, None)


def test_int8_is_refused_with_the_layers():
    net, graph, _ = residual()
    relu = next(node for node in graph.graph.nodes if str(node.target) == "relu")
    with graph.graph.inserting_after(relu):
        rounded = graph.graph.call_function(
            torch.ops.aten.fake_quantize_per_tensor_affine.default, (relu, 0.1, 0, 0, 255)
        )
    relu.replace_all_uses_with(rounded, delete_user_cb=lambda user: user is not rounded)
    graph.recompile()
    graph.meta["numbers"] = {"layers.0.conv1": {"bits": 8}}
    with pytest.raises(ModelError, match="int8") as caught:
        transplanted(graph, net, None)
    assert caught.value.where == "layers.0.conv1"


def test_a_norm_folded_into_its_layer_leaves_a_gap():
    net, graph, x = residual()
    conv, norm = graph.get_submodule("conv"), graph.get_submodule("bn")
    weight, bias = torch.nn.utils.fusion.fuse_conv_bn_weights(
        conv.weight, None, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    conv.weight, conv.bias = weight, bias
    node = next(node for node in graph.graph.nodes if node.target == "bn")
    node.replace_all_uses_with(node.args[0])
    graph.graph.erase_node(node)
    graph.delete_submodule("bn")
    graph.recompile()
    made = transplanted(graph, net, None)
    assert type(made.bn) is nn.Identity
    assert_same(made, graph, x)


def test_two_layers_in_the_place_of_one():
    net, x = nets.MLP().eval(), torch.randn(2, 12)
    graph = trace(net, (x,)).module
    path = next(str(n.target) for n in graph.graph.nodes if n.op == "call_module" and n.target == "body.3")
    u, s, v = torch.linalg.svd(graph.get_submodule(path).weight.detach(), full_matrices=False)
    down, up = nn.Linear(24, 5, bias=False), nn.Linear(5, 16)
    down.weight.data, up.weight.data = v[:5] * s[:5, None], u[:, :5].contiguous()
    up.bias = graph.get_submodule(path).bias
    node = next(n for n in graph.graph.nodes if n.target == path)
    holder = nn.Module()
    holder.add_module("down", down)
    holder.add_module("up", up)
    graph.get_submodule("body")._modules["3"] = holder
    with graph.graph.inserting_before(node):
        first = graph.graph.call_module(f"{path}.down", node.args)
        second = graph.graph.call_module(f"{path}.up", (first,))
    node.replace_all_uses_with(second)
    graph.graph.erase_node(node)
    graph.recompile()
    made = transplanted(graph, net, None)
    assert [type(part).__name__ for part in made.body[3]] == ["Linear", "Linear"]
    assert set(made.state_dict()) == set(graph.state_dict())
    assert_same(made, graph, torch.randn(4, 12))


def test_the_feed_forward_of_torchs_own_transformer():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    net, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(2, 5, 16)
    graph = trace(net, (x,)).module
    for index in range(2):
        cuts.rows(graph.get_submodule(f"layers.{index}.linear1"), list(range(0, 32, 3)))
        cuts.columns(graph.get_submodule(f"layers.{index}.linear2"), list(range(0, 32, 3)))
    made = transplanted(graph, net, None)
    assert_same(made, graph, x)  # torch's fast way
    torch.testing.assert_close(made(x), graph(x), rtol=1e-5, atol=1e-5)  # and the one with gradients


def test_calls_by_name_and_left_out_inputs():
    net = nets.OptionalNet().eval()
    call = {"left": torch.randn(2, 4), "mask": torch.randn(2, 3), "right": torch.randn(2, 5)}
    graph = trace(net, (), call).module
    made = transplanted(graph, net, None)
    with torch.no_grad():
        torch.testing.assert_close(made(**call), graph(**call))
    assert type(transplanted(graph, net, ((call["left"], call["right"]), {"mask": call["mask"]}))) is nets.OptionalNet
    with pytest.raises(UsageError, match="takes left, right, mask"):
        transplanted(graph, net, ((call["left"], call["right"]), {}))
