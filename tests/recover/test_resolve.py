"""The sequential re-solve mends what cutting broke, and touches nothing where nothing was cut."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flyweight.graph import flow
from flyweight.graph.operators import layers, matrix
from flyweight.graph.trace import trace
from flyweight.methods import channels, lowrank
from flyweight.recover import resolve as resolving
from flyweight.recover.normstats import rematch
from flyweight.recover.resolve import resolve
from flyweight.testing import Subject, small_network, subject

from ..graph.cases import seeded
from ..graph.nets import TiedNet, TwiceNet, net


@cache
def one() -> Subject:
    return subject(*small_network())


@cache
def cut() -> tuple[torch.fx.GraphModule, dict[str, list[int]]]:
    """Every group cut to half, norms matched; and the rows that each layer and norm still has."""
    steps = []
    for group in one().groups.values():
        gone = channels.order(one().graph, group, one().layers, one().stats)
        kept = channels.kept_channels(group, gone, group.size // 2)
        steps.append(channels.step(group, kept))
    graph = channels.restructure(one().graph, one().groups, one().layers, one().stats, steps)
    rows = channels.rows_left(one().graph, one().groups, one().layers, steps)
    rematch(graph, one().graph, rows, one().batches)
    return graph, rows


def test_the_outputs_come_nearer_on_the_calibration_data():
    graph, rows = cut()
    mended = resolve(graph, one().graph, rows, one().batches)
    rematch(mended, one().graph, rows, one().batches)
    before, after = one().judge(graph), one().judge(mended)
    assert after < 0.9 * before


def test_the_last_layer_is_a_ridge_regression_onto_the_original_outputs(monkeypatch: pytest.MonkeyPatch):
    """Closed form: with nothing behind it, its weights solve the normal equations of what it is really fed."""
    monkeypatch.setattr(resolving, "HELD_BACK", 1 << 40)  # no sample: then the least ridge
    graph, rows = cut()
    mended = resolve(graph, one().graph, rows, one().batches)
    fed: list[torch.Tensor] = []
    probe = copy.deepcopy(mended)
    probe.last.register_forward_pre_hook(lambda _, given: fed.append(given[0].detach().double()))
    with torch.no_grad():
        wanted = torch.cat([one().graph(*b) for b in one().batches]).double()
        for batch in one().batches:
            probe(*batch)
    x = torch.cat(fed)
    start = matrix(graph.last)
    centred, target = x - x.mean(0), wanted - wanted.mean(0)
    ridge = resolving.RIDGES[0] * float(centred.square().mean(0).mean())
    held = centred.T @ centred / len(x) + ridge * torch.eye(x.shape[1], dtype=x.dtype)
    expected = torch.linalg.solve(held, (target.T @ centred / len(x) + ridge * start).T).T
    # moments are summed in float32: 2^-24 * sqrt(rows) of their size, times a condition number of about 100
    assert torch.allclose(matrix(mended.last), expected, rtol=1e-3, atol=1e-4)
    bias = wanted.mean(0) - matrix(mended.last) @ x.mean(0)
    assert torch.allclose(mended.last.bias.detach().double(), bias, rtol=1e-4, atol=1e-5)


def test_where_nothing_was_cut_nothing_moves():
    def forward(self, x):
        y = F.max_pool2d(F.relu(self.b(F.relu(self.a(x)))), 2)
        return self.fc(F.relu(self.inner(y.flatten(1))))

    parts = {"a": nn.Conv2d(3, 6, 3), "b": nn.Conv2d(6, 8, 3, bias=False), "inner": nn.Linear(72, 12)}
    model = net(forward, **parts, fc=nn.Linear(12, 4)).eval()
    batches = [(torch.randn(200, 3, 10, 10),) for _ in range(2)]
    graph = trace(model, batches[0]).module
    mended = resolve(graph, graph, {}, batches)
    for name, layer in layers(graph).items():
        before, after = (g.get_submodule(name).state_dict() for g in (graph, mended))
        # the ridge holds directions that the inputs never show; float32 moments move the others by some 1e-5
        assert torch.allclose(after["weight"], before["weight"], atol=1e-4 * float(before["weight"].abs().max()))
        if layer.bias:
            assert torch.allclose(after["bias"], before["bias"], atol=1e-4)


def test_a_network_that_nobody_cut_hardly_moves_whatever_its_norms_say():
    graph = copy.deepcopy(one().graph)
    whole = (torch.cat([b[0] for b in one().batches]),)
    with torch.no_grad():
        expected, got = graph(*whole), resolve(graph, graph, {}, [whole])(*whole)
    # what patches are looked at differs from layer to layer, so moments differ by their rounding alone
    assert float((got - expected).square().mean().sqrt()) < 1e-3 * float(expected.std())


def test_neither_network_given_is_changed():
    graph, rows = cut()
    before = [copy.deepcopy(g.state_dict()) for g in (graph, one().graph)]
    told: list[int] = []
    resolve(graph, one().graph, rows, one().batches, advance=told.append)
    for now, then in zip((graph, one().graph), before, strict=True):
        assert all(torch.equal(tensor, then[key]) for key, tensor in now.state_dict().items())
    assert told == [1] * len(layers(graph))


def test_the_same_twice_and_any_batching_nearly_the_same():
    graph, rows = cut()
    first, again = (resolve(graph, one().graph, rows, one().batches) for _ in range(2))
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in first.state_dict().items())
    whole = (torch.cat([b[0] for b in one().batches]),)
    other = resolve(graph, one().graph, rows, [whole])
    for name in layers(graph):
        a, b = first.get_submodule(name).weight, other.get_submodule(name).weight
        assert torch.allclose(a, b, atol=2e-3 * float(a.detach().abs().max()))


def test_layers_with_too_few_rows_are_left_alone():
    graph, rows = cut()
    few = [(one().batches[0][0][:3],)]
    mended = resolve(graph, one().graph, rows, few)
    assert torch.equal(mended.inner.weight, graph.inner.weight)  # 3 rows for 16 columns
    assert torch.equal(mended.last.weight, graph.last.weight)


@pytest.mark.parametrize("make", [TiedNet, TwiceNet, lambda: tied_to_embedding()], ids=["tied", "twice", "embedding"])
def test_weights_that_serve_twice_are_not_fitted_to_one_use(make):
    """Fitting one of two layers on one tensor would undo the other."""
    model = seeded(make).eval()
    torch.manual_seed(1)
    batches = [(torch.randn(64, 6),)] if isinstance(model, TwiceNet) else [(torch.randint(0, 11, (64, 7)),)]
    original = trace(model, batches[0]).module
    damaged = copy.deepcopy(original)
    shared = {"inner"} if isinstance(model, TwiceNet) else {"b", "head"} if isinstance(model, TiedNet) else {"head"}
    with torch.no_grad():  # the layer in front is off, so that fitting would change what follows
        for name in ("fc", "first"):
            if hasattr(damaged, name):
                damaged.get_submodule(name).weight.mul_(0.7)
        if isinstance(model, TiedNet):
            damaged.a.bias.add_(0.3)
    mended = resolve(damaged, original, {}, batches)
    for name in shared:
        assert torch.equal(mended.get_submodule(name).weight, damaged.get_submodule(name).weight)


def tied_to_embedding() -> nn.Module:
    made = net(
        lambda self, ids: self.head(torch.tanh(self.first(self.embed(ids)))),
        embed=nn.Embedding(11, 6), first=nn.Linear(6, 6), head=nn.Linear(6, 11, bias=False),
    )  # fmt: skip
    made.head.weight = made.embed.weight
    return made


def test_a_second_input_flows_too():
    def forward(self, x, y):
        return self.fc(torch.relu(self.a(x)) + self.b(y))

    model = seeded(lambda: net(forward, a=nn.Linear(5, 8), b=nn.Linear(4, 8), fc=nn.Linear(8, 3))).eval()
    batches = [(torch.randn(64, 5), torch.randn(64, 4)) for _ in range(2)]
    graph = trace(model, batches[0]).module
    assert list(resolve(graph, graph, {}, batches).state_dict()) == list(graph.state_dict())
    mended = resolve(graph, graph, {}, batches)
    for name in ("a", "b", "fc"):
        assert torch.allclose(mended.get_submodule(name).weight, graph.get_submodule(name).weight, atol=1e-4)


def test_as_many_batches_are_used_as_fit(monkeypatch: pytest.MonkeyPatch):
    graph, rows = cut()
    monkeypatch.setattr(flow, "WORK_MACS", 1)
    little = resolve(graph, one().graph, rows, one().batches)
    only_first = resolve(graph, one().graph, rows, one().batches[:1])
    assert all(torch.equal(t, only_first.state_dict()[n]) for n, t in little.state_dict().items())


def test_batches_of_several_lengths_are_fitted_together_and_long_ones_count_for_more(monkeypatch: pytest.MonkeyPatch):
    model = net(lambda s, x: s.fc(F.relu(s.up(x))).mean(1), up=nn.Linear(4, 8), fc=nn.Linear(8, 3)).eval()
    graph = trace(model, (torch.randn(2, 4, 4),), {}, [((torch.randn(2, 8, 4),), {})]).module
    batches = [(torch.randn(20, length, 4),) for length in (4, 8, 4, 6)]
    moved = copy.deepcopy(graph)
    with torch.no_grad():
        moved.get_submodule("fc").weight.mul_(0.5)
    fitted = resolve(moved, graph, {}, batches)
    for (x,) in batches:
        assert (fitted(x) - graph(x)).abs().max() < 0.1 * (moved(x) - graph(x)).abs().max()
    # time for 60 samples as traced (both networks run `up`, 4 rows of 4 x 8): one of twice the length counts four times
    monkeypatch.setattr(flow, "WORK_MACS", 60 * 2 * 4 * 4 * 8)
    assert len(flow.affordable(graph, batches)[0]) == 1
    assert len(flow.affordable(graph, [batches[0]] * 9)[0]) == 3


def test_positions_that_all_samples_share_are_no_stream():
    def forward(self, x):
        positions = self.positions[:, : x.shape[1]]
        return self.fc(self.up(x) + positions).mean(1)

    model = net(forward, up=nn.Linear(4, 8), fc=nn.Linear(8, 3), positions=nn.Parameter(torch.randn(1, 9, 8))).eval()
    x = torch.randn(40, 5, 4)
    graph = trace(model, (x,)).module
    assert torch.allclose(resolve(graph, graph, {}, [(x,)])(x), graph(x), atol=1e-5)


def test_nodes_that_only_one_network_has_are_passed_over():
    """A first part that is new, and a branch that is gone: the layers behind are fitted all the same."""
    graph = copy.deepcopy(one().graph)
    step = lowrank.step("block.conv2", 2)
    graph = lowrank.restructure(graph, one().layers, one().stats, [step])
    (join,) = (n for n in graph.graph.nodes if n.target is torch.ops.aten.add.Tensor)
    join.replace_all_uses_with(join.args[0])
    graph.graph.eliminate_dead_code()
    assert len({n.name for n in one().graph.graph.nodes} - {n.name for n in graph.graph.nodes}) == 2
    graph.recompile()
    mended = resolve(graph, one().graph, {}, one().batches)
    assert torch.equal(mended.get_submodule("block.conv2_in").weight, graph.get_submodule("block.conv2_in").weight)
    moved = [name for name, t in mended.state_dict().items() if not torch.equal(t, graph.state_dict()[name])]
    assert {"block.conv2.bias", "last.bias"} & set(moved) or any(name.startswith("block.bn2") for name in moved)
    assert one().judge(mended) < one().judge(graph)


def test_groups_of_channels_are_fitted_one_by_one():
    """Closed form per group: what the second half of the channels is fed has no say in the first half's weights."""

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))

    model = seeded(lambda: net(forward, a=nn.Conv1d(4, 6, 1), b=nn.Conv1d(6, 4, 3, groups=2))).eval()
    batches = [(torch.randn(80, 4, 9),) for _ in range(2)]
    original = trace(model, batches[0]).module
    damaged = copy.deepcopy(original)
    with torch.no_grad():
        damaged.b.weight.mul_(0.5)
        damaged.b.weight[:2] += 0.1
    mended = resolve(damaged, original, {}, batches)
    weights = [g.b.weight.detach() for g in (mended, damaged, original)]
    # the inputs are exact, so only the ridge keeps it from the original: some hundredths of what was damaged
    assert float((weights[0] - weights[2]).abs().max()) < 0.1 * float((weights[1] - weights[2]).abs().max())
    half = copy.deepcopy(damaged)
    with torch.no_grad():
        half.b.weight[2:] = original.b.weight[2:]
    again = resolve(half, original, {}, batches)
    # float32 moments
    assert torch.allclose(again.b.weight[:2], mended.b.weight[:2], atol=1e-5)


class Residual(nn.Module):
    """A stream that a cut has hurt, and a linear layer behind it that adds to it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 24), nn.Linear(24, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.b(torch.relu(self.a(x)))
        return x + self.d(torch.relu(self.c(x)))


def test_a_layer_mends_what_its_stream_has_lost():
    torch.manual_seed(0)
    model = Residual().eval()
    batches = [(torch.randn(256, 6),) for _ in range(4)]
    graph = trace(model, batches[0]).module
    hurt = copy.deepcopy(graph)
    with torch.no_grad():
        hurt.a.weight[4:], hurt.a.bias[4:] = 0, 0
    alone = copy.deepcopy(hurt)
    for name in ("b",):  # all that a fit of the layer that was hurt itself can do
        alone.b.load_state_dict(resolve(hurt, graph, {}, batches).get_submodule(name).state_dict())
    mended = resolve(hurt, graph, {}, batches)
    x = torch.randn(2000, 6)
    with torch.no_grad():
        errors = [float((g(x) - graph(x)).square().mean()) for g in (alone, mended)]
    assert errors[1] < 0.8 * errors[0]


def test_a_fit_that_held_back_samples_refuse_is_not_made():
    """Outputs that have nothing to do with the inputs: weights fitted to noise, where the old ones are right."""
    torch.manual_seed(1)
    start, x = torch.randn(1, 3, 40, dtype=torch.float64), torch.randn(64, 40, dtype=torch.float64)
    y = x @ start[0].T + 8 * torch.randn(64, 3, dtype=torch.float64)
    parts = [
        ((x[s].T @ x[s])[None], (y[s].T @ x[s])[None], y[s].square().sum(0)[None]) for s in (slice(48), slice(48, 64))
    ]
    assert resolving._best_share(start, *parts) in (None, 10.0)
    clean = x @ torch.randn(3, 40, dtype=torch.float64).T
    right = [
        ((x[s].T @ x[s])[None], (clean[s].T @ x[s])[None], clean[s].square().sum(0)[None])
        for s in (slice(48), slice(48, 64))
    ]
    assert resolving._best_share(start, *right) == resolving.RIDGES[0]


def test_padding_is_left_out():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(x))) * mask[..., None]

    torch.manual_seed(2)
    mask = (torch.arange(5) < torch.randint(1, 6, (64, 1))).float()
    x = torch.randn(64, 5, 4)
    graph = trace(Tokens().eval(), (x, mask)).module
    hurt = copy.deepcopy(graph)
    with torch.no_grad():
        hurt.a.weight[2:] = 0
    noise = torch.where(mask[..., None] == 1, x, 50 * torch.randn(64, 5, 4))
    first, second = (resolve(hurt, graph, {}, [(value, mask)]) for value in (x, noise))
    assert torch.equal(first.b.weight, second.b.weight)


def test_patches_give_eight_rows_a_column_and_no_more_than_plenty():
    """Closed form, for a convolution of 9 x 4 = 36 columns."""
    (layer,) = layers(trace(nn.Sequential(nn.Conv2d(4, 3, 3)), (torch.randn(2, 4, 6, 6),)).module).values()
    assert layer.columns == 36
    counts = {1: 256, 2: 36 * 8 // 2, 36: 32, 36 * 32: 512 // 32, 36 * 512: 1, 10**9: 1}
    assert {samples: resolving._looks(layer, samples) for samples in counts} == counts
