"""Statistics of the data: what one big batch would give, in memory that does not grow."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flyweight.graph.measure import LOOKS, fingerprint, from_tensors, measure, to_tensors
from flyweight.graph.operators import input_rows, layers
from flyweight.graph.trace import trace

from .cases import rows
from .odd import subject

SPLITS = [[12], [1, 11], [5, 3, 4], [2] * 6]


def watched(graph: torch.fx.GraphModule, name: str, feed: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """What a layer is given, seen by a hook."""
    seen: list[torch.Tensor] = []
    probe = copy.deepcopy(graph)
    probe.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    probe(*feed)
    return seen


@pytest.mark.parametrize("name", ["layers.0.conv2", "layers.1.conv1", "layers.1.down.0", "fc"])
def test_moments_of_every_position_are_those_of_unfold(name: str):
    graph, example, _ = subject("residual")
    graph = copy.deepcopy(graph).double()
    feed = tuple(x.double() for x in rows(example, 6))
    module = graph.get_submodule(name)
    (x,) = watched(graph, name, feed)
    if x.ndim == 4:
        x = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).transpose(1, 2)
    expected = x.reshape(-1, x.shape[-1])
    stats = measure(graph, [feed], {name: layers(graph)[name]}, positions=10_000)
    found = stats.inputs[name]
    assert found.count == len(expected)
    assert torch.allclose(found.mean, expected.mean(0), rtol=1e-12, atol=1e-13)
    assert torch.allclose(found.gram, torch.cov(expected.T, correction=0), rtol=1e-10, atol=1e-12)
    assert torch.allclose(found.raw, expected.T @ expected / len(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("split", SPLITS[1:])
@pytest.mark.parametrize("name", ["residual", "chain 1d", "shared reader"])
def test_streaming_equals_one_batch(name: str, split: list[int]):
    graph, example, _ = subject(name)
    graph = copy.deepcopy(graph).double()
    feed = tuple(x.double() for x in rows(example, 12))
    parts = list(zip(*(x.split(split) for x in feed), strict=True))
    present, nodes = layers(graph), [n.name for n in graph.graph.nodes if n.op == "call_module"]
    whole = measure(graph, [feed], present, nodes, positions=5)
    streamed = measure(graph, parts, present, nodes, positions=5)
    assert streamed.samples == whole.samples == 12
    for layer, moments in whole.inputs.items():
        assert streamed.inputs[layer].count == moments.count
        # the same rows in doubles, merged in another order
        assert torch.allclose(streamed.inputs[layer].mean, moments.mean, rtol=1e-12, atol=1e-13)
        assert torch.allclose(streamed.inputs[layer].gram, moments.gram, rtol=1e-10, atol=1e-12)
    for node, histogram in whole.ranges.items():
        assert streamed.ranges[node].reach == histogram.reach
        # a value on the edge of a bin may fall to either side: batches of other sizes run other kernels
        assert float((streamed.ranges[node].counts - histogram.counts).abs().sum()) <= 1e-4 * histogram.counts.sum()
        assert streamed.ranges[node].low == pytest.approx(histogram.low, rel=1e-12)


def test_a_subsampled_convolution_sees_exactly_the_rows_named():
    graph, example, _ = subject("residual")
    feed = rows(example, 12)
    name = "layers.1.conv1"
    (x,) = watched(graph, name, feed)
    expected = input_rows(graph.get_submodule(name), x, 0, 5).double()
    assert len(expected) == 12 * 5
    parts = [(part,) for part in feed[0].split([5, 3, 4])]
    found = measure(graph, parts, {name: layers(graph)[name]}, positions=5).inputs[name]
    # float32 values of another batch size and float32 products: 2^-24 * sqrt(rows)
    assert torch.allclose(found.mean, expected.mean(0), atol=1e-6)
    assert torch.allclose(found.gram, torch.cov(expected.T, correction=0), atol=1e-5)


def test_ranges_hold_the_true_ends_and_every_value():
    graph, example, _ = subject("residual")
    feed = rows(example, 8)
    values = watched(graph, "fc", feed)[0]
    histogram = measure(graph, [(part,) for part in feed[0].split(3)], {}, ["mean"]).ranges["mean"]
    assert histogram.low == pytest.approx(float(values.min()), rel=1e-5)
    assert histogram.high == pytest.approx(float(values.max()), rel=1e-5)
    assert int(histogram.counts.sum()) == values.numel()


def test_a_histogram_of_a_part_does_not_depend_on_batches_and_keeps_the_true_ends(monkeypatch):
    graph, example, _ = subject("residual")
    monkeypatch.setattr("flyweight.graph.measure.COUNTED", 16)  # of more numbers of each sample
    feed, name = rows(example, 12), next(n.name for n in graph.graph.nodes if n.op == "call_module")
    found = [
        measure(graph, list(zip(*(x.split(split) for x in feed), strict=True)), {}, [name]).ranges[name]
        for split in SPLITS
    ]
    assert all(torch.equal(one.counts, found[0].counts) for one in found)
    assert {(one.low, one.high) for one in found} == {(found[0].low, found[0].high)}
    monkeypatch.undo()
    whole = measure(graph, [feed], {}, [name]).ranges[name]
    assert (found[0].low, found[0].high) == (whole.low, whole.high)
    assert 0 < float(found[0].counts.sum()) < float(whole.counts.sum())


def test_progress_counts_samples_and_only_what_is_asked_for_is_measured():
    graph, example, _ = subject("mlp")
    told: list[int] = []
    stats = measure(graph, [rows(example, 3), rows(example, 4)], {}, ["body_1"], advance=told.append)
    assert told == [3, 4]
    assert stats.samples == 7
    assert not stats.inputs
    assert set(stats.ranges) == {"body_1"}


def test_measuring_leaves_the_graph_as_it_was():
    graph, example, _ = subject("residual")
    before = {name: tensor.clone() for name, tensor in graph.state_dict().items()}
    measure(graph, [rows(example, 4)], layers(graph))
    assert all(torch.equal(tensor, before[name]) for name, tensor in graph.state_dict().items())


def test_statistics_come_back_from_tensors_bit_by_bit(tmp_path):
    from safetensors.torch import load, save

    graph, example, _ = subject("residual")
    stats = measure(graph, [rows(example, 4)], layers(graph), ["relu_4", "layers_1_relu_1"])
    again = from_tensors(load(save(to_tensors(stats))))
    assert fingerprint(again) == fingerprint(stats)
    assert again.samples == stats.samples
    assert set(again.inputs) == set(stats.inputs)
    assert set(again.ranges) == {"relu_4", "layers_1_relu_1"}
    for name, moments in stats.inputs.items():
        assert again.inputs[name].count == moments.count
        assert torch.equal(again.inputs[name].gram, moments.gram)
        assert torch.equal(again.inputs[name].mean, moments.mean)
    for name, histogram in stats.ranges.items():
        assert (again.ranges[name].reach, again.ranges[name].low, again.ranges[name].high) == (
            histogram.reach, histogram.low, histogram.high
        )  # fmt: skip


def test_the_fingerprint_knows_every_number_and_only_them():
    graph, example, _ = subject("mlp")
    feed = rows(example, 4)
    present = layers(graph)
    stats = measure(graph, [feed], present)
    assert fingerprint(measure(graph, [feed], present)) == fingerprint(stats)
    stats.inputs["body.6"].gram[3, 2] += 1e-12
    assert fingerprint(measure(graph, [feed], present)) != fingerprint(stats)
    other = tuple(x.clone() for x in feed)
    other[0][0, 0] += 1e-3
    assert fingerprint(measure(graph, [other], present)) != fingerprint(measure(graph, [feed], present))


MEMORY = """
import json, resource, sys
import torch
from torch import fx, nn
from flyweight.graph.measure import measure
from flyweight.graph.operators import layers
from flyweight.graph.rewrite import refresh

torch.set_num_threads(1)
net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(3136, 10))
graph = fx.symbolic_trace(net)
refresh(graph, (torch.randn(2, 3, 16, 16),))
batches = lambda count: ((torch.randn(32, 3, 16, 16),) for _ in range(count))
present = layers(graph)
del present["4"]  # a moment of 3136 columns would only take time here
nodes = [n.name for n in graph.graph.nodes if n.op == "call_module"]
peaks = []
for count in (6, 60):
    measure(graph, batches(count), present, nodes)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(json.dumps(peaks))
"""


def test_peak_memory_at_ten_times_the_batches_is_within_5_percent():
    # One value of one layer in one batch is 0.5 MB: keeping any of them for 54 more batches would be seen.
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    ended = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, check=True, env=environment)
    few, many = json.loads(ended.stdout)
    assert many <= 1.05 * few


def test_kept_rows_are_those_of_the_value_and_do_not_depend_on_batches():
    graph = trace(Tokens(), (torch.randn(2, 12, 4),)).module
    x = torch.randn(20, 12, 4)
    node = next(n.name for n in graph.graph.nodes if n.target == "first")
    found = [measure(graph, [(part,) for part in x.split(size)], {}, rows=[node]).rows[node] for size in (1, 7, 20)]
    assert all(torch.equal(one, found[0]) for one in found)
    every = {tuple(row) for row in graph.first(x).detach().flatten(0, 1).tolist()}
    assert {tuple(row) for row in found[0].tolist()} <= every
    assert len({tuple(row) for row in found[0].tolist()}) == len(x) * LOOKS  # places differ within a sample


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.first(x))


def test_padding_is_not_among_the_kept_rows():
    class Masked(Tokens):
        def forward(self, x, attention_mask):
            return self.last(self.first(x)) * attention_mask[..., None]

    x, mask = torch.randn(30, 12, 4), torch.ones(30, 12)
    x[:, 5:], mask[:, 5:] = 100.0, 0
    graph = trace(Masked(), (x[:2], mask[:2])).module
    node = next(n.name for n in graph.graph.nodes if n.target == "first")
    kept = measure(graph, [(x, mask)], {}, rows=[node]).rows[node]
    real = {tuple(row) for row in graph.first(x[:, :5]).detach().flatten(0, 1).tolist()}
    assert len(kept) > 0
    assert {tuple(row) for row in kept.tolist()} <= real
