"""A traced graph behaves like the model it came from, and the model does not notice."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flyweight.graph.trace import trace

from . import nets
from .cases import assert_equal, case, image, rows, seeded
from .nets import net


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
def test_dropout_drops_in_training_only(name):
    _, result, args = case(name)
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


def test_hooks_on_submodules_fire():
    _, result, args = case("residual")
    graph = copy.deepcopy(result.module)
    seen = {}
    graph.layers.get_submodule("0").conv1.register_forward_hook(lambda m, i, o: seen.update(forward=o.shape))
    graph.get_submodule("layers.1.conv2").register_full_backward_hook(lambda m, i, o: seen.update(backward=o[0].shape))
    graph(*args).sum().backward()
    assert seen == {"forward": (2, 8, 16, 16), "backward": (2, 16, 8, 8)}


def test_positional_and_keyword_calls_agree():
    _, result, args = case("optional")
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


def test_tied_weights_stay_tied():
    _, result, args = case("tied")
    graph = copy.deepcopy(result.module)
    assert graph.embed.weight is graph.head.weight
    assert graph.a.weight is graph.b.weight
    graph(*args).sum().backward()
    torch.optim.SGD(graph.parameters(), lr=0.1).step()
    assert torch.equal(graph.embed.weight, graph.head.weight)


def test_a_module_called_twice_is_one_module():
    _, result, _ = case("twice")
    assert [str(node.target) for node in result.module.graph.nodes if node.op == "call_module"] == [
        "inner",
        "inner",
        "fc",
    ]


def test_computed_weights_stay_calls_and_train():
    _, result, _ = case("weight_norm")
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


def test_tables_keep_their_type_beside_whole_number_inputs():
    def forward(self, ids):
        return self.table(ids).mean(1) + torch.zeros(ids.shape[0], 3) + torch.full((3,), 0.5)

    model = net(forward, table=nn.Embedding(9, 3))
    ids = torch.arange(8).view(2, 4)
    assert_equal(trace(model, (ids,), {}).module(ids), model(ids))


class OtherWeight(nn.Module):
    """A layer with a `weight` of the right shape that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.other = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.other)


def test_a_layer_keeps_the_weight_it_uses():
    model = nn.Sequential(OtherWeight())
    graph = trace(model, (torch.randn(2, 4),), {}).module
    x = torch.randn(5, 4)
    assert_equal(graph(x), model(x))
    assert list(graph.state_dict()) == ["0.other.weight"]  # not "0.weight": the model has another one


def test_counters_come_back_as_they_were():
    def forward(self, x):
        self.calls += 1
        return self.fc(x) + 0 * self.calls

    model = net(forward, fc=nn.Linear(4, 3), calls=torch.tensor(5.0))
    assert trace(model, (torch.randn(2, 4),), {}).module.calls == 5.0


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


def test_in_place_operators_mean_what_they_meant():
    def forward(self, x):
        y = self.fc(x)
        before = y * 2  # sees the old value
        y.relu_()  # nobody takes what it returns
        y.add_(1.0)
        after = y * 3
        y.mul_(y)
        return before, after, y

    model = net(forward, fc=nn.Linear(4, 3))
    graph = trace(model, (torch.randn(2, 4),), {}).module
    x = torch.randn(5, 4)
    assert_equal(graph(x), model(x))
