"""Rounding to int8: grids, weights, biases, quantizers that pass gradients."""

from __future__ import annotations

import copy

import onnx
import pytest
import torch

from flyweight.deploy.formats.onnx import export
from flyweight.deploy.placement import slots
from flyweight.graph.operators import matrix
from flyweight.graph.trace import trace
from flyweight.methods import channels, int8
from flyweight.methods.pricing import Judge, outputs_of
from flyweight.stages.deliver import Network, Prepared, deliver, prepared, quantized_values, with_numbers
from flyweight.testing import Subject, small_network, subject
from flyweight.testing.subject import in_double

from ..deploy import int8_nets as nets


@pytest.fixture(scope="module")
def one() -> Subject:
    return subject(*small_network())


def made_ready(one: Subject) -> Prepared:
    return prepared(one.graph, one.example, list(one.layers), lambda: iter(one.batches), one.stats)


@pytest.fixture(scope="module")
def exact(one: Subject) -> Prepared:
    return made_ready(in_double(one))


@pytest.fixture(scope="module")
def ready(one: Subject) -> Prepared:
    return made_ready(one)


@pytest.mark.parametrize("compensate", [True, False])
def test_weights_are_integers_times_the_scale_of_their_row(exact: Prepared, compensate: bool):
    for name, layer in exact.layers.items():
        graph = copy.deepcopy(exact.graph)
        scale, _ = int8.round_weights(graph, layer, exact.stats, compensate)
        integers = matrix(graph.get_submodule(name)) / scale.double()[:, None]
        assert torch.allclose(integers, integers.round(), atol=1e-9)
        assert float(integers.abs().max()) <= 127 + 1e-9
        assert scale.dtype == torch.float32


def test_plain_rounding_is_to_the_nearest_of_the_largest_weight(exact: Prepared):
    for name, layer in exact.layers.items():
        graph = copy.deepcopy(exact.graph)
        before = matrix(graph.get_submodule(name))
        scale, _ = int8.round_weights(graph, layer, exact.stats, compensate=False)
        assert torch.allclose(scale.double(), before.abs().amax(1) / 127, rtol=1e-6)
        away = (matrix(graph.get_submodule(name)) - before).abs() / scale.double()[:, None]
        assert float(away.max()) <= 0.5 + 1e-5


def test_a_step_says_its_largest_weight_and_what_is_made_of_it_keeps_to_it(ready: Prepared):
    for largest, told in ((63, {"bits": 8, "largest": 63}), (127, {"bits": 8})):
        made = int8.step("block.conv2", largest=largest)
        assert made.setting == told
        graph, _ = with_numbers(ready, [made])
        scale = graph.meta["extra_tensors"]["block.conv2.weight_scale"].double()
        integers = (matrix(graph.get_submodule("block.conv2")) / scale[:, None]).round().abs().amax(1)
        assert bool((integers <= largest).all())
        assert float(integers.max()) > largest // 2


def test_compensation_errs_less_and_keeps_the_mean(exact: Prepared):
    for name, layer in exact.layers.items():
        graph, plain = copy.deepcopy(exact.graph), copy.deepcopy(exact.graph)
        _, error = int8.round_weights(graph, layer, exact.stats)
        _, plain_error = int8.round_weights(plain, layer, exact.stats, compensate=False)
        assert 0 < error < plain_error
        mean = exact.stats.inputs[name].mean
        before, after = (g.get_submodule(name) for g in (exact.graph, graph))
        expected = matrix(before) @ mean + before.bias.detach()
        assert torch.allclose(matrix(after) @ mean + after.bias.detach(), expected, rtol=1e-9, atol=1e-9)


def test_more_integers_err_less_down_to_nothing(exact: Prepared):
    for layer in exact.layers.values():
        errors = []
        for largest in (7, 63, 127, 1 << 12, 1 << 24):
            errors.append(int8.round_weights(copy.deepcopy(exact.graph), layer, exact.stats, largest=largest)[1])
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 1e-9 * errors[0]


def test_the_error_is_that_of_a_rounding_noise_of_a_twelfth_squared_step(exact: Prepared):
    """Plain rounding, closed form: scale^2 / 12 for each weight, times the raw power of its input."""
    name, layer = "block.conv2", exact.layers["block.conv2"]  # the constant that is lost belongs to it
    graph = copy.deepcopy(exact.graph)
    scale, error = int8.round_weights(graph, layer, exact.stats, compensate=False)
    moments = exact.stats.inputs[name]
    foreseen = float((scale.double().square() / 12).sum() * moments.raw.diagonal().sum())
    # correlated inputs make the sum of some 600 such terms scatter: a factor of two either way is far off already
    assert 0.5 * foreseen < error < 2 * foreseen


def test_everything_stored_lies_on_its_grid(one: Subject, ready: Prepared):
    graph, errors = with_numbers(ready, [int8.step(n) for n in one.layers])
    assert set(errors) == set(one.layers)
    assert set(graph.meta["numbers"]) == set(one.layers)
    scales = graph.meta["extra_tensors"]
    inputs = {n.target: n.args[0] for n in graph.graph.nodes if n.op == "call_module"}
    for name in one.layers:
        module, scale = graph.get_submodule(name), scales[f"{name}.weight_scale"]
        integers = module.weight.detach() / scale.reshape(-1, *[1] * (module.weight.ndim - 1))
        assert torch.allclose(integers, integers.round(), atol=1e-3)  # float32: 127 * 2^-23
        unit = scale.double() * inputs[name].args[1]
        biases = module.bias.detach().double() / unit
        assert torch.allclose(biases, biases.round(), atol=1e-2)


def test_only_the_layers_named_are_rounded(one: Subject, ready: Prepared):
    graph, _ = with_numbers(ready, [int8.step("block.conv2")])
    for name in one.layers:
        same = torch.equal(graph.get_submodule(name).weight, ready.graph.get_submodule(name).weight)
        assert same == (name != "block.conv2")
    assert set(graph.meta["numbers"]) == {"block.conv2"}


def test_gradients_pass_through(one: Subject, ready: Prepared):
    graph, _ = with_numbers(ready, [int8.step(n) for n in one.layers])
    graph(*one.batches[0]).square().sum().backward()
    for name in one.layers:
        gradient = graph.get_submodule(name).weight.grad
        assert float(gradient.abs().max()) > 0
        assert bool(torch.isfinite(gradient).all())


def test_int8_answers_are_near_the_originals(one: Subject, ready: Prepared):
    graph, _ = with_numbers(ready, [int8.step(n) for n in one.layers])
    expected = torch.cat([one.graph(*b) for b in one.batches]).detach()
    got = torch.cat([graph(*b) for b in one.batches]).detach()
    # seven layers, each about 1/100 of its spread off (8 bits, clipped ranges): their root sum is .03
    assert float((got - expected).square().mean().sqrt()) < 0.05 * float(expected.std())
    assert not torch.equal(got, expected)


def test_grids_clip_to_what_is_known(ready: Prepared):
    found = slots(ready.graph, list(ready.layers))
    grids = int8.grids(ready.graph, found, ready.stats)
    tight = [s.__class__(s.node, s.like, s.low, 1e-3 if not s.like else None) for s in found]
    clipped = int8.grids(ready.graph, tight, ready.stats)
    for slot in found:
        assert grids[slot.node] == grids[slot.like or slot.node]
        assert clipped[slot.node].scale * 255 <= 1e-3 * (1 + 2**-20)


def test_the_graph_prepared_is_not_changed(one: Subject, ready: Prepared):
    before, code = {n: t.clone() for n, t in ready.graph.state_dict().items()}, ready.graph.code
    with_numbers(ready, [int8.step(n) for n in one.layers])
    assert ready.graph.code == code
    assert all(torch.equal(t, before[n]) for n, t in ready.graph.state_dict().items())


@pytest.mark.parametrize("name", ["residual", "tokens", "depthwise behind zeros"])
def test_judging_from_the_first_changed_value_on_is_judging_the_whole(name: str):
    _, _, made, _, batches = nets.ready(name)
    judge = Judge(batches, outputs_of(made.graph, batches), lambda a, b: (a - b).flatten(1).square().sum(1))
    for layer in made.layers:
        graph, _ = with_numbers(made, [int8.step(layer)])
        behind = judge.behind(made.graph, [layer], quantized_values(made, [layer]))
        assert behind(graph) == judge(graph)


def test_a_rough_network_has_the_operators_and_the_shapes_of_the_delivered_one(tmp_path):
    one = subject(*small_network())
    network = Network(one.graph, one.layers, one.groups, one.stats, one.example)
    group = next(iter(one.groups.values()))
    steps = [channels.step(group, list(range(group.size // 2 + 1))), *(int8.step(name) for name in one.layers)]
    files = []
    for rough in (False, True):
        graph, _ = deliver(network, steps, lambda: iter(one.batches), rough=rough)
        files.append(tmp_path / f"{rough}.onnx")
        export(graph, one.example, files[-1])
    made = [onnx.load(file).graph for file in files]
    delivered, rough = ([node.op_type for node in graph.node] for graph in made)
    assert delivered == rough
    shapes = [sorted((t.name, t.data_type, tuple(t.dims)) for t in graph.initializer) for graph in made]
    assert shapes[0] == shapes[1]
    assert files[0].stat().st_size == files[1].stat().st_size
    assert files[0].read_bytes() != files[1].read_bytes()


def test_the_bias_of_a_row_of_zeros_stays():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)).eval()
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = 0.3
    rows = [(40 * torch.randn(64, 6),) for _ in range(4)]  # on a grid with steps of about a whole
    made = prepared(trace(model, rows[0]).module, rows[0], ["0", "2"], lambda: iter(rows))
    graph, _ = with_numbers(made, [int8.step("0"), int8.step("2")])
    assert graph.get_submodule("0").bias[1].item() == pytest.approx(0.3, rel=0.05)


def test_folding_is_noted():
    one = subject(*small_network())
    network = Network(one.graph, one.layers, one.groups, one.stats, one.example)
    graph, notes = deliver(network, [int8.step("inner")], lambda: iter(one.batches))
    assert [n.code for n in notes] == ["numbers.norms-folded"]
    assert "block.bn1" in notes[0].where
    untouched, none = deliver(network, [], lambda: iter(one.batches))
    assert none == ()
    assert untouched is not one.graph
    assert set(graph.state_dict()) != set(untouched.state_dict()) == set(one.graph.state_dict())


@pytest.mark.parametrize("fixed", [False, True])
def test_rows_of_tiny_weights_keep_their_biases(fixed: bool):
    """A norm whose scale has died leaves such rows: weights of nearly nothing, a bias that carries all they say."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3)).eval()
    with torch.no_grad():
        net[0].weight[:3] *= 1e-12
        net[0].bias[:3] = torch.tensor([1.0, 2.0, -3.0])
    x = torch.randn(64, 8)
    graph = trace(net, (x[:2],)).module
    made, _ = with_numbers(
        prepared(graph, (x[:2],), ["0", "2"], lambda: iter([(x,)])), [int8.step(n, fixed=fixed) for n in ("0", "2")]
    )
    kept = made.get_submodule("0").bias.detach()[:3]
    assert torch.allclose(kept, torch.tensor([1.0, 2.0, -3.0]), rtol=1e-4)
    with torch.no_grad():
        apart = float((made(x) - net(x)).norm() / net(x).norm())
    assert apart < (0.1 if fixed else 0.03)  # a per cent is what eight bits cost this net with ordinary weights
