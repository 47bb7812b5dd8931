"""Nets in which channels meet something odd, each with the groups that a person finds in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flyweight.graph.trace import trace

from .cases import case, seeded
from .nets import net

Entries = int | list[list[int]]


class Found(NamedTuple):
    """A group as a person writes it.

    Entries of channel c: of an int b those that lie side by side, from c * b on; else as listed, channel by channel.
    """

    size: int
    producers: str | Mapping[str, Entries]  # rows of layers; by name alone: a row a channel
    consumers: Mapping[str, Entries] = {}  # columns of the layers' matrices
    carries: Mapping[str, Entries] = {}  # of norms, depthwise convolutions, loose tensors
    literals: tuple[int | tuple[int, ...], ...] = ()  # what a channel takes from each number written, in graph order
    frozen: str = ""  # a part of the reason
    kind: str = "channels"
    reads: Mapping[str, Entries] = {}  # inputs of readers that cannot make up for lost ones


def listed(entries: Entries, size: int) -> list[list[int]]:
    """The entries channel by channel."""
    return beside(size, entries) if isinstance(entries, int) else entries


def beside(size: int, block: int = 1, start: int = 0) -> list[list[int]]:
    """Channels side by side, the first at `start`."""
    return [list(range(start + c * block, start + (c + 1) * block)) for c in range(size)]


def dealt(size: int, block: int, step: int) -> list[list[int]]:
    """Channel c is c, c + step, c + 2 step …"""
    return [[c + i * step for i in range(block)] for c in range(size)]


def image(size: int = 8) -> Tensor:
    return torch.randn(2, 3, size, size)


def conv(inputs: int, outputs: int, kernel: int = 3, **more: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **more)


Case = tuple[Callable[[], nn.Module], tuple[Tensor, ...], dict[str, Found]]

OUTPUT = "an output of the model"
HEAD = Found(5, "fc", frozen=OUTPUT)


def concat() -> nn.Module:
    def forward(self, x):
        return self.fc(torch.cat([self.a(x), self.b(x)], 1).mean((2, 3)))

    return net(forward, a=conv(3, 4), b=conv(3, 6), fc=nn.Linear(10, 5))


def grouped() -> nn.Module:
    def forward(self, x):
        return self.fc(self.c(F.relu(self.depth(self.a(x)))).mean((2, 3)))

    return net(forward, a=conv(3, 4), depth=conv(4, 4, groups=4), c=conv(4, 6), fc=nn.Linear(6, 5))


def tied_to_embedding() -> nn.Module:
    made = net(
        lambda self, ids: self.head(torch.tanh(self.a(self.embed(ids)))),
        embed=nn.Embedding(11, 6), a=nn.Linear(6, 6), head=nn.Linear(6, 11, bias=False),
    )  # fmt: skip
    made.head.weight = made.embed.weight
    return made


def tied_bias() -> nn.Module:
    made = net(
        lambda self, x: self.fc(F.relu(self.b(F.relu(self.a(x))))),
        a=nn.Linear(6, 8), b=nn.Linear(8, 8), fc=nn.Linear(8, 5),
    )  # fmt: skip
    made.b.bias = made.a.bias
    return made


def loose_use() -> nn.Module:
    return net(
        lambda self, x: self.fc(F.relu(self.a(x))) + self.fc.weight.sum(),
        a=nn.Linear(6, 8),
        fc=nn.Linear(8, 5),
    )


def known_after_unknown() -> nn.Module:
    return net(
        lambda self, x: self.fc(F.gelu(self.inner(F.gelu(self.inner(x))))), inner=nn.Linear(6, 6), fc=nn.Linear(6, 5)
    )


def unknown_after_known() -> nn.Module:
    return net(
        lambda self, x, y: self.fc(self.inner(self.a(x)) + self.inner(y)),
        a=nn.Linear(6, 7), inner=nn.Linear(7, 4), fc=nn.Linear(4, 5),
    )  # fmt: skip


def shared_reader() -> nn.Module:
    def forward(self, x):
        y = F.relu(self.b(F.max_pool2d(F.relu(self.a(x)), 2)))
        return self.fc(self.c(F.relu(self.a(x))).mean((2, 3)) + self.c(y).mean((2, 3)))

    return net(forward, a=conv(3, 4), b=conv(4, 4), c=conv(4, 6), fc=nn.Linear(6, 5))


def shared_norm() -> nn.Module:
    def forward(self, x):
        return self.fc(self.c(self.bn(self.a(x))).mean((2, 3)) + self.d(self.bn(self.b(x))).mean((2, 3)))

    return net(
        forward, a=conv(3, 4), b=conv(3, 4), bn=nn.BatchNorm2d(4), c=conv(4, 6), d=conv(4, 6), fc=nn.Linear(6, 5)
    )


def norm_after_flatten() -> nn.Module:
    def forward(self, x):
        return self.fc(F.relu(self.bn(torch.flatten(self.a(x), 1))))

    return net(forward, a=conv(3, 4), bn=nn.BatchNorm1d(4 * 16), fc=nn.Linear(4 * 16, 5))


def baked_view() -> nn.Module:
    def forward(self, x):
        y = self.a(x)
        return self.fc(F.relu(y.view(y.size(0), 64)))

    return net(forward, a=conv(3, 4), fc=nn.Linear(64, 5))


def split_heads() -> nn.Module:
    def forward(self, x):
        y = self.a(x)
        return self.fc(y.view(y.shape[0], y.shape[1], 2, 4).mean(2))

    return net(forward, a=nn.Linear(6, 8), fc=nn.Linear(4, 5))


def joined_from_the_left() -> nn.Module:
    def forward(self, x):
        y = self.a(x)  # batch token channel
        return self.fc(y.reshape(y.shape[0], -1))

    return net(forward, a=nn.Linear(6, 8), fc=nn.Linear(3 * 8, 5))


def broadcast_add() -> nn.Module:
    def forward(self, x):
        y = self.a(x)
        return self.fc((y + y.mean((2, 3), keepdim=True)).mean((2, 3)))

    return net(forward, a=conv(3, 4), fc=nn.Linear(4, 5))


def gate() -> nn.Module:
    def forward(self, x):
        y = self.a(x)
        return self.fc((y * torch.sigmoid(self.b(y.mean((2, 3), keepdim=True)))).mean((2, 3)))

    return net(forward, a=conv(3, 4), b=conv(4, 4, 1), fc=nn.Linear(4, 5))


def mean_of_channels() -> nn.Module:
    def forward(self, x):
        y = F.relu(self.a(x))
        return self.fc(self.b(y).mean((2, 3))) + y.mean(1).mean((1, 2))[:, None]

    return net(forward, a=conv(3, 4), b=conv(4, 6), fc=nn.Linear(6, 5))


def inner_output() -> nn.Module:
    def forward(self, x):
        y = F.relu(self.a(x))
        return {"features": y, "logits": self.fc(self.b(y).mean((2, 3)))}

    return net(forward, a=conv(3, 4), b=conv(4, 6), fc=nn.Linear(6, 5))


def chain_1d() -> nn.Module:
    def forward(self, x):
        y = F.max_pool1d(F.relu(self.bn(self.a(x))), 2)
        return self.fc(torch.flatten(self.b(y), 1))

    return net(
        forward, a=nn.Conv1d(2, 6, 5, padding=2), bn=nn.BatchNorm1d(6), b=nn.Conv1d(6, 4, 3), fc=nn.Linear(4 * 6, 5)
    )


def tokens() -> nn.Module:
    return net(
        lambda self, x: self.fc(F.gelu(self.b(F.gelu(self.a(x)))).mean(1)),
        a=nn.Linear(6, 8), b=nn.Linear(8, 7), fc=nn.Linear(7, 5),
    )  # fmt: skip


def pooled_channels() -> nn.Module:
    return net(lambda self, x: self.fc(F.avg_pool1d(self.a(x), 2)), a=nn.Linear(6, 8), fc=nn.Linear(4, 5))


def norm_of_tokens() -> nn.Module:
    return net(lambda self, x: self.fc(self.bn(self.a(x))), a=nn.Linear(6, 8), bn=nn.BatchNorm1d(3), fc=nn.Linear(8, 5))


def tensor_bound() -> nn.Module:
    return net(
        lambda self, x: self.fc(torch.clamp(self.a(x), min=self.low)),
        a=nn.Linear(6, 8), low=torch.linspace(-1, 1, 8), fc=nn.Linear(8, 5),
    )  # fmt: skip


def numbers_only() -> nn.Module:
    return net(
        lambda self, x: self.fc(F.relu((2.0 * self.a(x) - 0.5) / 3.0 + 1.0)), a=nn.Linear(6, 8), fc=nn.Linear(8, 5)
    )


def transposed_read() -> nn.Module:
    return net(lambda self, x: self.fc(self.a(x).flatten(2)).mean(1), a=conv(3, 4), fc=nn.Linear(64, 5))


def nobody_reads() -> nn.Module:
    return net(lambda self, x: self.fc(x) + self.a(x).sum(1, keepdim=True), a=nn.Linear(6, 8), fc=nn.Linear(6, 5))


def residual_1x1() -> nn.Module:
    def forward(self, x):
        y = F.relu(self.bn(self.a(x)))
        y = F.relu(self.side(y) + self.c(F.relu(self.b(y))))
        return self.fc(F.adaptive_avg_pool2d(y, 1).flatten(1))

    return net(
        forward, a=conv(3, 4), bn=nn.BatchNorm2d(4), b=conv(4, 6), c=conv(6, 8), side=conv(4, 8, 1), fc=nn.Linear(8, 5)
    )


def cube() -> nn.Module:
    return net(
        lambda self, x: self.fc(F.relu(self.b(F.max_pool3d(F.relu(self.a(x)), 2))).flatten(1)),
        a=nn.Conv3d(1, 4, 3, padding=1), b=nn.Conv3d(4, 3, 2), fc=nn.Linear(3, 5),
    )  # fmt: skip


VECTOR, TOKENS, PIXELS = torch.randn(2, 6), torch.randn(2, 3, 6), image()
MIXED = "also reads channels that always stay"
UNREAD = "could make up for lost ones"

ODD: dict[str, Case] = {
    "concat": (concat, (PIXELS,), {
        "a": Found(4, "a", {"fc": 1}), "b": Found(6, "b", {"fc": beside(6, 1, 4)}), "fc": HEAD}),
    "grouped": (grouped, (PIXELS,), {
        "a": Found(4, "a", {"c": 9}, {"depth": 1}), "c": Found(6, "c", {"fc": 1}), "fc": HEAD}),
    "tied to embedding": (tied_to_embedding, (torch.arange(14).view(2, 7) % 11,), {
        "embed": Found(6, "embed", frozen="shared by"), "a": Found(6, "a", frozen="shared by"),
        "head": Found(11, "head", frozen=OUTPUT)}),
    "tied bias": (tied_bias, (VECTOR,), {
        "a": Found(8, "a", frozen="shared by"), "b": Found(8, "b", frozen="shared by"), "fc": HEAD}),
    "loose use": (loose_use, (VECTOR,), {
        "a": Found(8, "a", frozen="shared by fc, the value"), "fc": Found(5, "fc", frozen="shared by fc, the value")}),
    "known after unknown": (known_after_unknown, (VECTOR,), {"inner": Found(6, "inner", frozen=MIXED), "fc": HEAD}),
    "unknown after known": (unknown_after_known, (VECTOR, torch.randn(2, 7)), {
        "a": Found(7, "a", frozen=MIXED), "inner": Found(4, "inner", {"fc": 1}), "fc": HEAD}),
    "shared reader": (shared_reader, (PIXELS,), {
        "a": Found(4, "a b", {"b": 9, "c": 9}), "c": Found(6, "c", {"fc": 1}), "fc": HEAD}),
    "shared norm": (shared_norm, (PIXELS,), {
        "a": Found(4, "a b", {"c": 9, "d": 9}, {"bn": 1}), "c": Found(6, "c d", {"fc": 1}), "fc": HEAD}),
    "norm after flatten": (norm_after_flatten, (image(4),), {
        "a": Found(4, "a", {"fc": 16}, {"bn": 16}), "fc": HEAD}),
    "baked view": (baked_view, (image(4),), {"a": Found(4, "a", {"fc": 16}, literals=(16,)), "fc": HEAD}),
    "split heads": (split_heads, (TOKENS,), {
        "a": Found(4, {"a": dealt(4, 2, 4)}, {"fc": 1}, literals=(1,)), "fc": HEAD}),
    "joined from the left": (joined_from_the_left, (TOKENS,), {
        "a": Found(8, "a", {"fc": dealt(8, 3, 8)}, literals=(3,)), "fc": HEAD}),
    "broadcast add": (broadcast_add, (PIXELS,), {"a": Found(4, "a", {"fc": 1}), "fc": HEAD}),
    "gate": (gate, (PIXELS,), {"a": Found(4, "a b", {"b": 1, "fc": 1}), "fc": HEAD}),
    "mean of channels": (mean_of_channels, (PIXELS,), {
        "a": Found(4, "a", frozen="reduces over the channels"), "b": Found(6, "b", {"fc": 1}), "fc": HEAD}),
    "inner output": (inner_output, (PIXELS,), {
        "a": Found(4, "a", frozen=OUTPUT), "b": Found(6, "b", {"fc": 1}), "fc": HEAD}),
    "chain 1d": (chain_1d, (torch.randn(2, 2, 16),), {
        "a": Found(6, "a", {"b": 3}, {"bn": 1}), "b": Found(4, "b", {"fc": 6}), "fc": HEAD}),
    "tokens": (tokens, (TOKENS,), {
        "a": Found(8, "a", {"b": 1}), "b": Found(7, "b", {"fc": 1}), "fc": HEAD}),
    "pooled channels": (pooled_channels, (TOKENS,), {
        "a": Found(8, "a", frozen="works along the channels"), "fc": HEAD}),
    "norm of tokens": (norm_of_tokens, (TOKENS,), {
        "a": Found(8, "a", frozen="does not read them as channels"), "fc": HEAD}),
    "tensor bound": (tensor_bound, (VECTOR,), {"a": Found(8, "a", {"fc": 1}, {"low": 1}), "fc": HEAD}),
    "numbers only": (numbers_only, (VECTOR,), {"a": Found(8, "a", {"fc": 1}), "fc": HEAD}),
    "transposed read": (transposed_read, (PIXELS,), {
        "a": Found(4, "a", frozen="does not read them as channels"), "fc": HEAD}),
    "nobody reads": (nobody_reads, (VECTOR,), {"fc": HEAD, "a": Found(8, "a", frozen="reduces over the channels")}),
    "residual 1x1": (residual_1x1, (PIXELS,), {
        "a": Found(4, "a", {"side": 1, "b": 9}, {"bn": 1}), "side": Found(8, "side c", {"fc": 1}),
        "b": Found(6, "b", {"c": 9}), "fc": HEAD}),
    "cube": (cube, (torch.randn(2, 1, 4, 4, 4),), {
        "a": Found(4, "a", {"b": 8}), "b": Found(3, "b", {"fc": 1}), "fc": HEAD}),
}  # fmt: skip

TUTORIAL = {
    "conv1": Found(32, "conv1", {"conv2": 9}), "conv2": Found(64, "conv2", {"fc1": 64}, literals=(64,)),
    "fc1": Found(128, "fc1", {"fc2": 1}), "fc2": Found(10, "fc2", frozen=OUTPUT),
}  # fmt: skip
RESIDUAL = {
    "conv": Found(8, "conv layers.0.conv2", {"layers.0.conv1": 9, "layers.1.conv1": 9, "layers.1.down.0": 1},
                  {"bn": 1, "layers.0.bn2": 1}),
    "layers.0.conv1": Found(8, "layers.0.conv1", {"layers.0.conv2": 9}, {"layers.0.bn1": 1}),
    "layers.1.conv1": Found(16, "layers.1.conv1", {"layers.1.conv2": 9}, {"layers.1.bn1": 1}),
    "layers.1.conv2": Found(16, "layers.1.conv2 layers.1.down.0", {"fc": 1}, {"layers.1.bn2": 1, "layers.1.down.1": 1}),
    "fc": Found(10, "fc", frozen=OUTPUT),
}  # fmt: skip
PLAIN: dict[str, dict[str, Found]] = {
    "tutorial": TUTORIAL,
    "residual": RESIDUAL,
    "mlp": {
        "body.0": Found(24, "body.0", {"body.3": 1}), "body.3": Found(16, "body.3", {"body.6": 1}),
        "body.6": Found(5, "body.6", frozen=OUTPUT)},
    "tied": {
        "embed": Found(6, "embed", frozen="shared by"), "a": Found(6, "a", frozen="shared by a, b"),
        "b": Found(6, "b", frozen="shared by"), "head": Found(11, "head", frozen=OUTPUT)},
    "dict": {"a": Found(3, "a", frozen=OUTPUT), "b": Found(2, "b", frozen=OUTPUT)},
    "optional": {"left": Found(3, "left right", frozen="with a value whose channels are not known")},
    "functional": {"conv": Found(6, "conv", {"fc": 1}, {"bn": 1}), "fc": Found(4, "fc", frozen=OUTPUT)},
    "twice": {"inner": Found(6, "inner", frozen=MIXED), "fc": Found(3, "fc", frozen=OUTPUT)},
    "weight_norm": {"b": Found(3, "b", frozen=OUTPUT)},
    "norms": {  # two groups of four in the GroupNorm; then a LayerNorm over all of them
        "conv": Found(2, "conv", frozen="normalises over the channels"),
        "fc": Found(4, "fc", frozen="works along the channels")},
    "conv1d": {"conv1": Found(4, "conv1", {"up": 1}, {"bn": 1}), "up": Found(4, "up", {"fc": 1}),
               "fc": Found(2, "fc", frozen=OUTPUT)},
    "frozen_norm": {},
}  # fmt: skip


@cache
def cases() -> dict[str, Case]:
    """Every odd net of this file and its neighbours, by name."""
    from .odd_heads import HEADS
    from .odd_moves import MOVES

    return {**ODD, **MOVES, **HEADS}


@cache
def subject(name: str) -> tuple[torch.fx.GraphModule, tuple[Tensor, ...], dict[str, Found]]:
    """The traced graph (do not change it), its example and the groups written by hand."""
    if name in PLAIN:
        _, traced, args = case(name)
        return traced.module, args, PLAIN[name]
    make, args, expected = cases()[name]
    return trace(seeded(make), args).module, args, expected
