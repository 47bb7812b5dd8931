"""What a law is checked on: a traced network with its statistics, and a method as four functions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from flyweight.graph.axes import Group, groups
from flyweight.graph.measure import Stats, measure
from flyweight.graph.operators import Layer, layers
from flyweight.graph.surgery import prove
from flyweight.graph.trace import trace
from flyweight.methods.pricing import Judge, outputs_of
from flyweight.types import Option, Step

__all__ = ["Batch", "Method", "Subject", "in_double", "small_network", "subject", "with_stats"]

Batch = tuple[Tensor, ...]
EVERY_POSITION = 1 << 20


class Subject(NamedTuple):
    """A network in eval mode, the calibration batches and what was measured on them (all positions of all samples)."""

    graph: fx.GraphModule
    example: Batch
    batches: tuple[Batch, ...]
    layers: Mapping[str, Layer]
    groups: Mapping[str, Group]  # open and proven
    stats: Stats
    judge: Judge


class Method(NamedTuple):
    """A method as its laws see it.

    `propose`: options by site, the first of each "keep", then milder to harder. `apply`: the network that steps make.
    `change`: the network before and after the steps, values alone changed (nothing cut, nothing inserted), so that
    layer errors can be measured. `limit`: the network at the setting of a site that must change nothing.
    """

    name: str
    propose: Callable[[Subject], Mapping[str, Sequence[Option]]]
    apply: Callable[[Subject, Sequence[Step]], fx.GraphModule]
    change: Callable[[Subject, Sequence[Step]], tuple[fx.GraphModule, fx.GraphModule]]
    limit: Callable[[Subject, str], fx.GraphModule]


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.side = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(inner + self.side(x))


class _SmallNetwork(nn.Module):
    """What methods meet: convolutions with bias and with a norm, a residual sum, pooling, a flatten, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.block = _Block(6, 8)
        self.inner = nn.Linear(8 * 4, 12)
        self.last = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.first(x)), 2)
        x = nn.functional.max_pool2d(self.block(x), 2)
        logits: Tensor = self.last(torch.relu(self.inner(torch.flatten(x, 1))))
        return logits


def small_network(seed: int = 0) -> tuple[nn.Module, tuple[Batch, ...]]:
    """A network and batches small enough for every law in seconds, with correlated inputs and norms of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _SmallNetwork()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
        smooth = nn.functional.avg_pool2d(torch.randn(64, 3, 10, 10), 3, 1)  # neighbours are alike, as in pictures
        batches = tuple((x,) for x in torch.split(3 * smooth + 0.5, 16))
        model.train()
        with torch.no_grad():
            for batch in batches * 8:
                model(*batch)
    return model.eval(), batches


def subject(model: nn.Module, batches: Sequence[Batch]) -> Subject:
    """The model traced and measured on `batches` (tuples of inputs). Raises as `trace` does."""
    graph = trace(model, batches[0]).module
    example = tuple(x[:2] for x in batches[0])
    found = {g.name: g for g in groups(graph, example) if not g.frozen and not prove(graph, g, example)}
    return _measured(graph, example, tuple(batches), found)


def _measured(graph: fx.GraphModule, example: Batch, batches: tuple[Batch, ...], found: Mapping[str, Group]) -> Subject:
    present = layers(graph)
    stats = measure(graph, batches, present, positions=EVERY_POSITION)
    judge = Judge(batches, outputs_of(graph, batches), _squared)
    return Subject(graph, example, batches, present, found, stats, judge)


def _squared(expected: object, got: object) -> Tensor:
    """A divergence for any network: the squared change of the outputs, one number a sample."""
    pairs = zip(*(torch.utils._pytree.tree_leaves(value) for value in (expected, got)), strict=True)
    return torch.stack([(a - b).flatten(1).square().sum(1) for a, b in pairs]).sum(0)


def in_double(one: Subject) -> Subject:
    """The same in float64, measured anew: where a law is about arithmetic and not about rounding."""
    graph = copy.deepcopy(one.graph).double()
    batches = tuple(_doubled(batch) for batch in one.batches)
    return _measured(graph, _doubled(one.example), batches, one.groups)


def _doubled(batch: Batch) -> Batch:
    return tuple(x.double() if x.is_floating_point() else x for x in batch)


def with_stats(one: Subject, stats: Stats) -> Subject:
    """The same network with other statistics."""
    return one._replace(stats=stats)
