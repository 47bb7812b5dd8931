"""Low rank: two layers that compute what the best layer of that rank does, everywhere a layer may stand."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from flyweight.deploy.formats.onnx import export
from flyweight.graph.cost import weight_bytes
from flyweight.graph.measure import measure
from flyweight.graph.operators import Layer, layers, matrix
from flyweight.graph.program import load, save
from flyweight.graph.rewrite import refresh
from flyweight.graph.trace import trace
from flyweight.methods import int8, lowrank
from flyweight.methods.channels import gram_of
from flyweight.methods.pricing import Judge
from flyweight.numerics.moments import Moments, add_rows, empty_moments
from flyweight.numerics.obs import row_errors
from flyweight.stages.deliver import prepared, with_numbers
from flyweight.testing import LOWRANK, Subject, laws, small_network, subject
from flyweight.testing.subject import in_double
from flyweight.types import Step


def factored(one: Subject, name: str, rank: int) -> lowrank.Factored:
    layer, moments = one.layers[name], one.stats.inputs[name]
    return lowrank.factor(one.graph, layer, moments, lowrank.principal(one.graph, layer, moments), rank)


@functools.cache
def small() -> Subject:
    return subject(*small_network())


apply, change = LOWRANK.apply, LOWRANK.change


def test_every_kind_of_layer_is_on_the_menu_of_the_small_network():
    assert set(LOWRANK.propose(small())) == {f"rank:{name}" for name in small().layers}


# ---- what it is ----


def test_the_layer_and_its_two_parts_compute_the_same():
    """The values alone changed, or two modules: one function."""
    one = in_double(small())
    for name, layer in one.layers.items():
        steps = [lowrank.step(name, rank) for rank in lowrank.levels(layer)]
        for step in steps:
            for batch in one.batches[:1]:
                torch.testing.assert_close(change(one, [step])[1](*batch), apply(one, [step])(*batch))


def test_the_error_is_the_sum_of_the_powers_left_out():
    """With rows without number nothing is shrunk; else it is no less, and by the square of a small turn more."""
    one = in_double(small())
    for name, layer in one.layers.items():
        seen = one.stats.inputs[name]
        weights = matrix(one.graph.get_submodule(name))
        powers = torch.linalg.eigvalsh(weights @ gram_of(layer, seen) @ weights.T).flip(0)
        for rank in lowrank.levels(layer):
            best = float(powers[rank:].sum())
            many = seen.count >= 20 * layer.columns
            for count, above in ((10**12, 1 + 1e-6), (seen.count, 1.01 if many else float("inf"))):
                moments = Moments(count, seen.mean, seen.gram)
                found = lowrank.principal(one.graph, layer, moments)
                quoted = lowrank.factor(one.graph, layer, moments, found, rank).error
                assert best * (1 - 1e-6) <= quoted <= best * above, (name, rank, count)


def test_an_input_never_seen_weighs_nothing():
    """However large its weights are: it must not turn the directions away from what is seen."""
    net = nn.Sequential(nn.Linear(6, 5)).double()
    with torch.no_grad():
        net[0].weight[:, 3] = torch.tensor([1e3, -1e3, 0, 1e3, 0])
    graph = trace(net, (torch.randn(4, 6, dtype=torch.float64),)).module
    ((name, layer),) = layers(graph).items()
    rows = torch.randn(500, 6, dtype=torch.float64)
    rows[:, 3] = 2.0
    moments = add_rows(empty_moments(6), rows)
    weights = matrix(graph.get_submodule(name))
    best = torch.linalg.eigvalsh(weights @ moments.gram @ weights.T).flip(0)
    new = lowrank.factor(graph, layer, moments, lowrank.principal(graph, layer, moments), 2)
    assert new.error == pytest.approx(float(best[2:].sum()), rel=1e-2)


def test_directions_of_few_rows_hold_on_other_rows():
    """With fewer rows than inputs, shrunk moments lose less on new rows than the rows' own components do."""
    draw = torch.Generator().manual_seed(0)
    columns, rows = 96, 24
    spread = torch.arange(1, columns + 1, dtype=torch.float64) ** -0.5
    turn = torch.linalg.qr(torch.randn(columns, columns, generator=draw, dtype=torch.float64))[0] * spread
    net = nn.Sequential(nn.Linear(columns, 48)).double()
    graph = trace(net, (torch.randn(4, columns, dtype=torch.float64),)).module
    ((name, layer),) = layers(graph).items()
    seen = torch.randn(rows, columns, generator=draw, dtype=torch.float64) @ turn.T
    moments = add_rows(empty_moments(columns), seen)
    truth = turn @ turn.T
    weights = matrix(graph.get_submodule(name))
    found = lowrank.principal(graph, layer, moments)
    bare = torch.linalg.eigh(weights @ moments.gram @ weights.T)[1].flip(1)
    for rank in (16, 24):
        new = lowrank.factor(graph, layer, moments, found, rank)
        ours = float(row_errors(weights - new.second @ new.first, truth).sum())
        kept = bare[:, :rank] @ bare[:, :rank].T
        plain = float(row_errors(weights - kept @ weights, truth).sum())
        assert ours < 0.9 * plain


def test_ranks_by_hand():
    wide = Layer("x", "Linear", ("x",), outputs=64, inputs=64, taps=1, positions=1, bias=True)
    assert lowrank.levels(wide) == (30, 24, 18, 12, 6)
    assert lowrank.levels(wide, 8) == (24, 16, 8)
    assert lowrank.levels(wide, 16) == (16,)
    assert lowrank.levels(wide, 32) == ()
    thin = Layer("x", "Conv2d", ("x",), outputs=8, inputs=1, taps=1, positions=9, bias=True)
    assert lowrank.levels(thin) == ()


def test_layers_that_cannot_become_two_say_why():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(20, 8)
            self.body = nn.Linear(8, 8)
            self.thin = nn.Linear(8, 1)
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.words.weight

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.body(self.words(x))
            return self.head(h), self.thin(h)

    graph = trace(Net().eval(), (torch.randint(0, 20, (2, 5)),)).module
    found = lowrank.refused(graph, layers(graph))
    assert set(found) == {"head", "thin"}
    assert "shared" in found["head"]
    assert "words" in found["head"]
    assert "more weights" in found["thin"]


# ---- where it stands ----


class Everywhere(nn.Module):
    """Convolutions of every kind of setting, a layer called twice, names that are taken, linear on a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 12, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2))
        self.a_in = nn.BatchNorm2d(12)
        self.same = nn.Conv2d(12, 12, 3, padding="same", bias=False)
        self.line = nn.Conv1d(12, 10, 5, stride=2, padding=2)
        self.solid = nn.Conv3d(1, 6, 3, padding=1)
        self.twice = nn.Linear(10, 10)
        self.parts = nn.ModuleList([nn.Linear(10, 9, bias=False), nn.Linear(9, 7)])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a_in(self.a(x)))
        x = torch.relu(self.same(x))
        x = x + self.solid(x[:, None]).mean(1)
        x = torch.relu(self.line(x.flatten(2))).transpose(1, 2)
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        for part in self.parts:
            x = part(x)
        return x


NAMES = ("a", "same", "line", "solid", "twice", "parts.0", "parts.1")


@functools.cache
def everywhere() -> Subject:
    torch.manual_seed(1)
    batches = [(torch.randn(8, 3, 8, 8),) for _ in range(2)]
    graph = trace(Everywhere().eval(), batches[0]).module
    present = layers(graph)
    stats = measure(graph, batches, present)
    judge = Judge(batches, [graph(*b) for b in batches], lambda a, b: (a - b).flatten(1).square().sum(1))
    return Subject(graph, batches[0], tuple(batches), present, {}, stats, judge)


def ranks_of(one: Subject, rank: int) -> list[Step]:
    return [lowrank.step(name, rank) for name in NAMES]


def test_full_rank_is_the_original_everywhere():
    one = everywhere()
    assert set(NAMES) == set(one.layers)
    whole = [lowrank.step(n, min(one.layers[n].outputs, one.layers[n].columns)) for n in NAMES]
    for batch in one.batches:
        torch.testing.assert_close(apply(one, whole)(*batch), one.graph(*batch), rtol=1e-4, atol=1e-5)


def test_names_stay_and_new_ones_are_free():
    one = everywhere()
    made = apply(one, ranks_of(one, 2))
    assert isinstance(made.a_in, nn.BatchNorm2d)  # the user's own
    assert isinstance(made.a_in_1, nn.Conv2d)
    assert type(made.parts) is nn.Module
    assert isinstance(made.get_submodule("parts.0_in"), nn.Linear)
    assert set(one.graph.state_dict()) <= set(made.state_dict())
    nodes = {n.name: str(n.target) for n in made.graph.nodes}
    assert all(nodes[n.name] == str(n.target) for n in one.graph.graph.nodes)
    assert (made.a_in_1.stride, made.a_in_1.padding, made.a_in_1.dilation) == ((2, 1), (1, 2), (1, 2))
    assert made.a.kernel_size == made.a.stride == made.a.dilation == (1, 1)
    assert made.same_in.padding == "same"
    assert made.same_in.bias is None
    assert made.same.bias is None
    assert made.solid.kernel_size == (1, 1, 1)
    assert made.line.padding == (0,)


def test_sizes_written_on_nodes_are_those_of_a_run():
    one = everywhere()
    made = apply(one, ranks_of(one, 2))
    written = {n.name: tuple(n.meta["val"].shape[1:]) for n in made.graph.nodes if n.op == "call_module"}
    refresh(made, one.example)
    assert written == {n.name: tuple(n.meta["val"].shape[1:]) for n in made.graph.nodes if n.op == "call_module"}


def test_the_records_of_the_parts_are_those_of_the_new_graph():
    """So every cost counted from them is the new network's."""
    one = everywhere()
    found = layers(apply(one, ranks_of(one, 2)))
    for name in NAMES:
        first, second = lowrank.factored_layers(one.layers[name], 2)
        new = "a_in_1" if name == "a" else f"{name}_in"
        for mine, theirs in ((first, found[new]), (second, found[name])):
            for key in ("kind", "outputs", "inputs", "taps", "positions", "bias", "norm"):
                assert getattr(mine, key) == getattr(theirs, key), (name, key)


def test_it_is_stored_and_read_again():
    one = everywhere()
    made = apply(one, ranks_of(one, 3))
    back = load(*save(made))
    assert list(back.state_dict())
    assert set(back.state_dict()) == set(made.state_dict())
    assert torch.equal(back(*one.example), made(*one.example))


def test_it_runs_in_the_runtime_with_another_batch(tmp_path: Path):
    one = everywhere()
    made = apply(one, ranks_of(one, 3))
    export(made, one.example, tmp_path / "x.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(5, 3, 8, 8)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(got, made(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_both_parts_train_and_the_network_given_does_not_move():
    one = everywhere()
    before = copy.deepcopy(one.graph.state_dict())
    made = apply(one, ranks_of(one, 3)).train()
    optimizer = torch.optim.SGD(made.parameters(), 0.01)
    target = one.graph(*one.example).detach()
    seen = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (made(*one.example) - target).square().mean()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < seen[0]
    assert all(p.grad is not None and bool(p.grad.any()) for p in made.parameters())
    assert all(torch.equal(before[k], v) for k, v in one.graph.state_dict().items())


def test_frozen_weights_stay_frozen_and_kept_precision():
    one = in_double(small())
    for parameter in one.graph.parameters():
        parameter.requires_grad_(False)
    made = apply(one, [lowrank.step("inner", 3)])
    assert not any(p.requires_grad for p in made.parameters())
    assert {p.dtype for p in made.parameters()} == {torch.float64}


def test_nothing_random_is_drawn():
    one = small()
    before = torch.get_rng_state()
    apply(one, [lowrank.step("inner", 3)])
    assert torch.equal(torch.get_rng_state(), before)


def test_both_parts_go_to_int8():
    """Both factors rounded: close to the float pair, and the file holds integers for both."""
    one = small()
    made = apply(one, [lowrank.step("inner", 5), lowrank.step("block.conv2", 6)])
    names = ["inner", "inner_in", "block.conv2", "block.conv2_in"]
    ready = prepared(made, one.example, names, lambda: iter(one.batches))
    rounded, _ = with_numbers(ready, [int8.step(n) for n in names])
    for batch in one.batches:
        with torch.no_grad():
            expected, got = made(*batch), rounded(*batch)
        assert float((expected - got).abs().max()) < 0.05 * float(expected.abs().max())
    smaller = laws.bytes_in_file(made, one.example) - laws.bytes_in_file(rounded, one.example)
    float_bytes = int8_bytes = 0
    for name, rank in (("inner", 5), ("block.conv2", 6)):
        for part in lowrank.factored_layers(one.layers[name], rank):
            float_bytes += weight_bytes(part, part.inputs, part.outputs, 32)
            int8_bytes += weight_bytes(part, part.inputs, part.outputs, 8)
    assert smaller == float_bytes - int8_bytes


def test_prices_rise_as_ranks_fall():
    one = small()
    for name in ("inner", "block.conv2"):
        priced = lowrank.ranks(one.graph, one.layers[name], one.stats, lowrank.levels(one.layers[name]), one.judge)
        assert priced.levels[0] == min(one.layers[name].outputs, one.layers[name].columns)
        assert priced.errors[0] == priced.layer_errors[0] == 0
        assert list(priced.errors) == sorted(priced.errors)
        assert list(priced.layer_errors) == sorted(priced.layer_errors)
        last = apply(one, [lowrank.step(name, priced.levels[-1])])
        assert priced.errors[-1] == pytest.approx(one.judge(last), rel=1e-3)


def test_a_mean_that_is_lost_is_given_back():
    """Outputs keep their mean where a bias or a norm can take it."""
    one = in_double(small())
    for name in ("first", "block.conv2"):
        layer, moments = one.layers[name], one.stats.inputs[name]
        assert isinstance(moments, Moments)
        new = factored(one, name, 1)
        before = matrix(one.graph.get_submodule(name)) @ moments.mean
        after = new.second @ new.first @ moments.mean + new.shift
        torch.testing.assert_close(after, before)
        assert lowrank.channels.absorbs(layer)
