"""Nets whose every layer is planned as int8, delivered once for all tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from flyweight.deploy.machine import largest_weight
from flyweight.graph.operators import Layer, roundable
from flyweight.graph.trace import trace
from flyweight.methods import int8
from flyweight.stages.deliver import Prepared, prepared, with_numbers

from ..graph.cases import seeded
from ..graph.nets import MLP, ResidualNet, net


def conv(inputs: int, outputs: int, kernel: int = 3, **more: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **more)


class SmallCNN(nn.Module):
    """Convolutions, maximum pooling, a written size, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 12)
        self.fc1, self.fc2 = nn.Linear(12 * 16, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.a(x)), 2)
        x = F.max_pool2d(F.relu(self.b(x)), 2)
        return self.fc2(F.relu(self.fc1(x.view(-1, 12 * 16))))


def two_convs(head: Callable[..., Tensor], **more: nn.Module) -> Callable[[], nn.Module]:
    return lambda: net(head, **{"a": conv(3, 16), "b": conv(16, 16), "fc": nn.Linear(16, 10), **more})


PIXELS, TALL = (torch.randn(4, 3, 8, 8),), (torch.randn(4, 3, 16, 16),)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "cnn": (SmallCNN, TALL),
    "residual": (ResidualNet, TALL),
    "mlp with dropout": (MLP, (torch.randn(4, 12),)),
    "average pooling": (
        two_convs(lambda s, x: s.fc(F.avg_pool2d(F.relu(s.b(F.relu(s.a(x)))), 8).flatten(1))), PIXELS),
    "adaptive pooling": (
        two_convs(lambda s, x: s.fc(s.pool(F.relu(s.b(F.relu(s.a(x))))).flatten(1)), pool=nn.AdaptiveAvgPool2d(1)),
        PIXELS),
    "relu6": (two_convs(lambda s, x: s.fc(F.relu6(s.b(s.r(s.a(3 * x)))).mean((2, 3))), r=nn.ReLU6()), PIXELS),
    "silu": (two_convs(lambda s, x: s.fc(F.silu(s.b(F.silu(s.a(x)))).mean((2, 3)))), PIXELS),
    "add without relu": (
        lambda: net(lambda s, x: s.fc((s.b(x) + s.a(x)).mean((2, 3))), a=conv(3, 16), b=conv(3, 16, 1),
                    fc=nn.Linear(16, 10)), PIXELS),
    "no biases": (
        lambda: net(lambda s, x: s.fc(F.relu(s.m(F.relu(s.a(x)).flatten(1)))), a=conv(3, 8, bias=False),
                    m=nn.Linear(512, 16, bias=False), fc=nn.Linear(16, 10, bias=False)), PIXELS),
    "one dimension": (
        lambda: net(lambda s, x: s.fc(F.max_pool1d(F.relu(s.b(F.relu(s.n(s.a(x))))), 2).flatten(1)),
                    a=nn.Conv1d(2, 8, 5, padding=2), n=nn.BatchNorm1d(8), b=nn.Conv1d(8, 8, 3, padding=1),
                    fc=nn.Linear(64, 10)), (torch.randn(4, 2, 16),)),
    "two readers of a convolution": (
        two_convs(lambda s, x: s.fc(both(s.b, s.a(x)).mean((2, 3)))), PIXELS),
    "tokens": (
        lambda: net(lambda s, x: s.fc((x + s.o(gated(s, torch.tanh(x)))).mean(1)), a=nn.Linear(16, 48),
                    b=nn.Linear(16, 48), o=nn.Linear(48, 16, bias=False), fc=nn.Linear(16, 10)),
        (torch.randn(4, 6, 16),)),
    "depthwise behind zeros": (
        two_convs(lambda s, x: s.fc(F.relu6(s.d(F.pad(F.relu6(s.b(F.pad(F.relu(s.a(x)), (2, 2, 2, 2)))), (0, 1, 0, 1))))
                                    .mean((2, 3))),
                  b=nn.Conv2d(16, 16, 5), d=nn.Conv2d(16, 16, 3, 2, groups=16)), PIXELS),
    "convolution at the end": (lambda: net(lambda s, x: s.b(F.relu(s.a(x))), a=conv(3, 16), b=conv(16, 4)), PIXELS),
}  # fmt: skip


def gated(s: nn.Module, y: Tensor) -> Tensor:
    """Two layers on sequences that read one value, which goes on in float as well."""
    return F.gelu(s.a(y)) * s.b(y) + y.mean(-1, keepdim=True)


def both(layer: nn.Module, y: Tensor) -> Tensor:
    return F.relu(layer(y)) + F.relu(y)


class Delivered(NamedTuple):
    """A net in int8 beside what it was made of."""

    model: nn.Module
    ready: Prepared
    graph: fx.GraphModule
    layers: dict[str, Layer]
    example: tuple[Tensor, ...]
    batches: list[tuple[Tensor, ...]]


@cache
def ready(name: str) -> tuple[nn.Module, fx.GraphModule, Prepared, tuple[Tensor, ...], list[tuple[Tensor, ...]]]:
    """The model, its graph, the graph prepared for int8, an example, calibration batches."""
    make, example = NETS[name]
    model = seeded(make).eval()
    graph = trace(model, example).module
    torch.manual_seed(1)
    batches = [tuple(torch.randn(16, *x.shape[1:]) for x in example) for _ in range(4)]
    return model, graph, prepared(graph, example, list(roundable(graph)), lambda: iter(batches)), example, batches


@cache
def delivered(name: str, *int8_layers: str) -> Delivered:
    """The net with the layers named in int8 (none named: all)."""
    model, graph, prepared_graph, example, batches = ready(name)
    present = roundable(graph)
    quantized, _ = with_numbers(
        prepared_graph, [int8.step(n, largest=largest_weight()) for n in int8_layers or present]
    )
    return Delivered(model, prepared_graph, quantized, present, example, batches)
