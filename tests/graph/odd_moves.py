"""Nets that join, split, deal out, pad and spread channels, each with the groups that a person finds in it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .nets import net
from .odd import HEAD, OUTPUT, PIXELS, TOKENS, VECTOR, Case, Found, beside, conv, dealt, image


def pooled(body: Callable[[nn.Module, Tensor], Tensor], width: int, /, **parts: object) -> Callable[[], nn.Module]:
    """A net that ends in a mean over the picture and a linear layer of `width` inputs."""
    return lambda: net(lambda self, x: self.fc(body(self, x).mean((2, 3))), **parts, fc=nn.Linear(width, 5))


def dense(self: nn.Module, x: Tensor) -> Tensor:
    y = self.stem(x)
    y = torch.cat([y, F.relu(self.one(y))], 1)
    return torch.cat([y, self.two(F.relu(self.bn(y)))], 1)


def flat_concat() -> nn.Module:
    def forward(self, x):
        return self.fc(torch.cat([self.a(x), self.b(x)], 1).flatten(1))

    return net(forward, a=conv(3, 2), b=conv(3, 3), fc=nn.Linear(5 * 16, 5))


def input_concat() -> nn.Module:
    def forward(self, x):
        return self.fc(torch.cat([self.a(x), x, self.b(x)], 1).mean((2, 3)))

    return net(forward, a=conv(3, 4), b=conv(3, 2), fc=nn.Linear(9, 5))


def concat_then_add(self: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([self.a(x), self.b(x)], 1) + self.c(x)


def concat_of_rows(self: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([self.a(x), self.b(x)], 2)  # one above the other


def split(self: nn.Module, x: Tensor) -> Tensor:
    left, right = torch.split(self.a(x), [3, 5], 1)
    return self.b(left) + self.c(right)


def halves(self: nn.Module, x: Tensor) -> Tensor:
    left, right = self.a(x).chunk(2, 1)
    return self.b(left) + self.c(right)


def halves_multiplied(self: nn.Module, x: Tensor) -> Tensor:
    left, right = self.a(x).chunk(2, 1)
    return left * torch.tanh(right)


def parts_of_four(self: nn.Module, x: Tensor) -> Tensor:
    first, second = torch.split(self.a(x), 4, 1)
    return first * second


def window(self: nn.Module, x: Tensor) -> Tensor:
    y = self.a(x)
    return self.b(y[:, 2:6]) + self.c(y)


def last_three(self: nn.Module, x: Tensor) -> Tensor:
    y = self.a(x)
    return self.b(y[:, -3:]) + self.c(y)


def every_second(self: nn.Module, x: Tensor) -> Tensor:
    return self.b(self.a(x)[:, ::2])


def one_alone(self: nn.Module, x: Tensor) -> Tensor:
    y = self.a(x)
    return self.b(y) + y[:, 3][:, None]


def first_token() -> nn.Module:
    return net(lambda self, x: self.fc(F.gelu(self.a(x))[:, 0]), a=nn.Linear(6, 8), fc=nn.Linear(8, 5))


def input_window() -> nn.Module:
    def forward(self, x):
        return self.fc((self.a(x[:, 1:]) + self.b(x[:, :2])).mean((2, 3)))

    return net(forward, a=conv(2, 4), b=conv(2, 4), fc=nn.Linear(4, 5))


def glu_tokens() -> nn.Module:
    return net(lambda self, x: self.fc(F.glu(self.a(x))), a=nn.Linear(6, 8), fc=nn.Linear(4, 5))


def glu_beside_input() -> nn.Module:
    """Two inputs before six channels: channel 4 gates 0 and 5 gates 1; 2 and 3 gate the inputs, which stay."""

    def forward(self, x):
        return self.fc(F.glu(torch.cat([x[..., :2], self.a(x)], -1)))

    return net(forward, a=nn.Linear(6, 6), fc=nn.Linear(4, 5))


def swiglu() -> nn.Module:
    return net(
        lambda self, x: self.down(F.silu(self.gate(x)) * self.up(x)),
        gate=nn.Linear(6, 9), up=nn.Linear(6, 9), down=nn.Linear(9, 5),
    )  # fmt: skip


def squeeze(self: nn.Module, x: Tensor) -> Tensor:
    y = self.a(x)
    s = self.out(F.relu(self.inner(F.adaptive_avg_pool2d(y, 1))))
    return y * torch.sigmoid(s)


def squeeze_linear(self: nn.Module, x: Tensor) -> Tensor:
    y = self.a(x)
    s = torch.sigmoid(self.out(F.relu(self.inner(y.mean((2, 3))))))
    return y * s.view(y.shape[0], 6, 1, 1)


def spatial_gate(self: nn.Module, x: Tensor) -> Tensor:
    return self.a(x) * torch.sigmoid(self.one(x))


def shuffled_by_hand(self: nn.Module, x: Tensor) -> Tensor:
    y = self.a(x)
    y = y.view(y.shape[0], 2, 3, 8, 8).transpose(1, 2).reshape(y.shape[0], 6, 8, 8)
    return self.b(y)


def regrouped(self: nn.Module, x: Tensor) -> Tensor:
    return self.b(F.relu(self.g(self.a(x))))


def upsampled(self: nn.Module, x: Tensor) -> Tensor:
    return self.b(self.up(self.a(x)))


def read_twice(self: nn.Module, x: Tensor) -> Tensor:
    y = self.a(x)
    return self.up(y).mean((2, 3), keepdim=True) + self.c(y)


def normed(self: nn.Module, x: Tensor) -> Tensor:
    return self.b(F.relu(self.norm(self.a(x))))


def shortcut_padded(self: nn.Module, x: Tensor) -> Tensor:
    y = self.a(x)
    return self.b(y) + F.pad(y, (0, 0, 0, 0, 2, 2))


def padded_channels(self: nn.Module, x: Tensor) -> Tensor:
    return self.b(F.pad(self.a(x), (0, 0, 0, 0, 1, 2)))


def padded_in_pairs() -> nn.Module:
    """The last pair is a channel and a zero: random network 975."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = F.pad(self.a(x), (0, 1))
        return self.fc(y.unflatten(-1, (2, 4)).mean(-2).mean(1)) + self.out((self.scale * y).mean(1))

    parts = {"a": nn.Linear(6, 7), "fc": nn.Linear(4, 5), "out": nn.Linear(8, 5)}
    return net(forward, **parts, scale=nn.Parameter(torch.rand(1, 8)))


def unet(self: nn.Module, x: Tensor) -> Tensor:
    y = F.relu(self.a(x))
    z = F.relu(self.b(F.max_pool2d(y, 2)))
    return self.c(torch.cat([F.interpolate(z, scale_factor=2.0), y], 1))


def stacked_tokens() -> nn.Module:
    return net(
        lambda self, x: self.fc(torch.stack([self.a(x), self.b(x)], 1)).mean(1),
        a=nn.Linear(6, 8), b=nn.Linear(6, 8), fc=nn.Linear(8, 5),
    )  # fmt: skip


def stacked_behind() -> nn.Module:
    return net(
        lambda self, x: self.fc(torch.stack([self.a(x), self.b(x)], 2).flatten(1)),
        a=nn.Linear(6, 4), b=nn.Linear(6, 4), fc=nn.Linear(8, 5),
    )  # fmt: skip


def expanded() -> nn.Module:
    def forward(self, x, y):
        told = self.a(y)[:, None].expand(y.shape[0], 3, 8)
        return self.fc(self.b(x) + told).mean(1)

    return net(forward, a=nn.Linear(6, 8), b=nn.Linear(6, 8), fc=nn.Linear(8, 5))


def repeated(self: nn.Module, x: Tensor) -> Tensor:
    return self.b(self.a(x).repeat(1, 2, 1, 1))


def scaled_stream(self: nn.Module, x: Tensor) -> Tensor:
    y = self.a(x)
    return y + self.gamma * self.c(F.gelu(self.b(y)))


def constant_on_unknown() -> nn.Module:
    """A table added to the input is part of the input from then on, not a constant that follows what it meets."""

    def forward(self, x):
        y = x + self.table
        return self.fc(y + self.b(F.gelu(self.a(y))))

    return net(forward, a=nn.Linear(6, 9), b=nn.Linear(9, 6), fc=nn.Linear(6, 5), table=torch.rand(1, 6))


def token_before_unknown() -> nn.Module:
    def forward(self, x):
        y = torch.cat([self.token.expand(x.shape[0], 1, 6), x], 1)
        return self.fc(y + self.b(y)).mean(1)

    return net(forward, b=nn.Linear(6, 6), fc=nn.Linear(6, 5), token=torch.rand(1, 1, 6))


def table_read_twice() -> nn.Module:
    """The scale of the channels is also summed: it cannot shrink."""

    def forward(self, x):
        return self.fc(self.a(x) * self.scale) + self.scale.cumsum(0)[:5]

    return net(forward, a=nn.Linear(6, 8), fc=nn.Linear(8, 5), scale=torch.rand(8))


def softmax_gate() -> nn.Module:
    return net(lambda self, x: self.fc(torch.softmax(self.a(x), -1)), a=nn.Linear(6, 8), fc=nn.Linear(8, 5))


def chosen_by_index() -> nn.Module:
    return net(
        lambda self, x: self.fc(self.a(x)[:, self.order]), a=nn.Linear(6, 8), fc=nn.Linear(8, 5),
        order=torch.tensor([7, 1, 0, 2, 6, 3, 5, 4]),
    )  # fmt: skip


def masked_channels() -> nn.Module:
    return net(
        lambda self, x: self.fc(torch.where(self.mask, self.a(x), torch.zeros_like(self.a(x)))),
        a=nn.Linear(6, 4), fc=nn.Linear(4, 5), mask=torch.tensor([True, False, True, True]),
    )  # fmt: skip


def recurrent() -> nn.Module:
    def forward(self, x):
        y, _ = self.cell(self.a(x))
        return self.fc(y[:, -1])

    return net(forward, a=nn.Linear(6, 8), cell=nn.GRU(8, 4, batch_first=True), fc=nn.Linear(4, 5))


def two_heights() -> nn.Module:
    """What the channel is differs from use to use: rows for one reader, columns for the other."""

    def forward(self, x):
        y = self.a(x)  # batch token channel
        return self.b(y).mean(1) + self.c(y.transpose(1, 2)).mean(1)

    return net(forward, a=nn.Linear(6, 4), b=nn.Linear(4, 5), c=nn.Linear(3, 5))


SCALE = nn.Parameter(torch.rand(4, 1, 1))
PAIRS = [[0, 3], [1, 4], [2, 5]]  # of six channels in two groups: the same one of each
INTERLEAVED = [[i * 9 + t for i in pair for t in range(9)] for pair in PAIRS]

MOVES: dict[str, Case] = {
    "dense block": (
        pooled(dense, 10, stem=conv(3, 4), one=conv(4, 3), bn=nn.BatchNorm2d(7), two=conv(7, 3)), (PIXELS,), {
            "stem": Found(4, "stem", {"one": 9, "two": 9, "fc": 1}, {"bn": 1}),
            "one": Found(3, "one", {"two": beside(3, 9, 36), "fc": beside(3, 1, 4)}, {"bn": beside(3, 1, 4)}),
            "two": Found(3, "two", {"fc": beside(3, 1, 7)}), "fc": HEAD}),
    "flat concat": (flat_concat, (image(4),), {
        "a": Found(2, "a", {"fc": 16}), "b": Found(3, "b", {"fc": beside(3, 16, 32)}), "fc": HEAD}),
    "input concat": (input_concat, (PIXELS,), {
        "a": Found(4, "a", {"fc": 1}), "b": Found(2, "b", {"fc": beside(2, 1, 7)}), "fc": HEAD}),
    "concat then add": (pooled(concat_then_add, 7, a=conv(3, 3), b=conv(3, 4), c=conv(3, 7)), (PIXELS,), {
        "a": Found(3, {"a": 1, "c": 1}, {"fc": 1}),
        "b": Found(4, {"b": 1, "c": beside(4, 1, 3)}, {"fc": beside(4, 1, 3)}), "fc": HEAD}),
    "concat of rows": (pooled(concat_of_rows, 4, a=conv(3, 4), b=conv(3, 4)), (PIXELS,), {
        "a": Found(4, "a b", {"fc": 1}), "fc": HEAD}),
    "split": (pooled(split, 4, a=conv(3, 8), b=conv(3, 4), c=conv(5, 4)), (PIXELS,), {
        "a": Found(3, "a", {"b": 9}, literals=(1,)), "a[1]": Found(5, {"a": beside(5, 1, 3)}, {"c": 9}, literals=(1,)),
        "b": Found(4, "b c", {"fc": 1}), "fc": HEAD}),
    "halves": (pooled(halves, 4, a=conv(3, 8), b=conv(4, 4), c=conv(4, 4)), (PIXELS,), {
        "a": Found(4, {"a": [[0, 4], [1, 5], [2, 6], [3, 7]]}, {"b": 9, "c": 9}), "b": Found(4, "b c", {"fc": 1}),
        "fc": HEAD}),
    "halves multiplied": (pooled(halves_multiplied, 4, a=conv(3, 8)), (PIXELS,), {
        "a": Found(4, {"a": [[0, 4], [1, 5], [2, 6], [3, 7]]}, {"fc": 1}), "fc": HEAD}),
    "parts of four": (pooled(parts_of_four, 4, a=conv(3, 8)), (PIXELS,), {
        "a": Found(4, {"a": [[0, 4], [1, 5], [2, 6], [3, 7]]}, {"fc": 1}, literals=(1,)), "fc": HEAD}),
    "window": (pooled(window, 4, a=conv(3, 8), b=conv(4, 4), c=conv(8, 4)), (PIXELS,), {
        "a": Found(4, {"a": [[0], [1], [6], [7]]}, {"c": [[9 * c + t for t in range(9)] for c in (0, 1, 6, 7)]},
                   literals=((1, 1, 0, 0), (1, 1, 0, 0))),
        "a[1]": Found(4, {"a": beside(4, 1, 2)}, {"b": 9, "c": beside(4, 9, 18)}, literals=(1,)),
        "b": Found(4, "b c", {"fc": 1}), "fc": HEAD}),
    "last three": (pooled(last_three, 4, a=conv(3, 8), b=conv(3, 4), c=conv(8, 4)), (PIXELS,), {
        "a": Found(5, "a", {"c": 9}),
        "a[1]": Found(3, {"a": beside(3, 1, 5)}, {"b": 9, "c": beside(3, 9, 45)}, literals=(-1,)),
        "b": Found(4, "b c", {"fc": 1}), "fc": HEAD}),
    "every second": (pooled(every_second, 4, a=conv(3, 8), b=conv(4, 4)), (PIXELS,), {
        "a": Found(8, "a", frozen="picks channels by their position"), "b": Found(4, "b", {"fc": 1}), "fc": HEAD}),
    "one alone": (pooled(one_alone, 4, a=conv(3, 8), b=conv(8, 4)), (PIXELS,), {
        "a": Found(8, "a", frozen="picks channels by their position"), "b": Found(4, "b", {"fc": 1}), "fc": HEAD}),
    "first token": (first_token, (TOKENS,), {"a": Found(8, "a", {"fc": 1}), "fc": HEAD}),
    "input window": (input_window, (PIXELS,), {"a": Found(4, "a b", {"fc": 1}), "fc": HEAD}),
    "glu": (glu_tokens, (TOKENS,), {
        "a": Found(4, {"a": [[0, 4], [1, 5], [2, 6], [3, 7]]}, {"fc": 1}), "fc": HEAD}),
    "glu beside input": (glu_beside_input, (TOKENS,), {
        "a": Found(2, {"a": [[0, 4], [1, 5]]}, {"fc": [[2], [3]]}), "a[1]": Found(2, {"a": [2, 3]}, frozen="always stay"),
        "fc": HEAD}),
    "swiglu": (swiglu, (TOKENS,), {
        "gate": Found(9, "gate up", {"down": 1}), "down": Found(5, "down", frozen=OUTPUT)}),
    "squeeze": (
        pooled(squeeze, 6, a=conv(3, 6), inner=conv(6, 3, 1), out=conv(3, 6, 1)), (PIXELS,), {
            "a": Found(6, "a out", {"inner": 1, "fc": 1}), "inner": Found(3, "inner", {"out": 1}), "fc": HEAD}),
    "squeeze linear": (
        pooled(squeeze_linear, 6, a=conv(3, 6), inner=nn.Linear(6, 3), out=nn.Linear(3, 6)), (PIXELS,), {
            "a": Found(6, "a out", {"inner": 1, "fc": 1}, literals=(1,)), "inner": Found(3, "inner", {"out": 1}),
            "fc": HEAD}),
    "spatial gate": (pooled(spatial_gate, 6, a=conv(3, 6), one=conv(3, 1)), (PIXELS,), {
        "a": Found(6, "a", {"fc": 1}), "one": Found(1, "one", frozen="one channel alone"), "fc": HEAD}),
    "shuffled by hand": (pooled(shuffled_by_hand, 4, a=conv(3, 6), b=conv(6, 4)), (PIXELS,), {
        "a": Found(3, {"a": PAIRS}, {"b": 18}, literals=(1, 2)), "b": Found(4, "b", {"fc": 1}), "fc": HEAD}),
    "channel shuffle": (
        pooled(lambda s, x: s.b(F.channel_shuffle(s.a(x), 2)), 4, a=conv(3, 6), b=conv(6, 4)), (PIXELS,), {
            "a": Found(3, {"a": PAIRS}, {"b": 18}), "b": Found(4, "b", {"fc": 1}), "fc": HEAD}),
    "pixel shuffle, then channels dealt out": (  # labels of a pixel shuffle stand at every pixel: random network 376
        pooled(lambda s, x: s.b(F.channel_shuffle(F.pixel_shuffle(s.a(x), 2), 2)), 4, a=conv(3, 16), b=conv(4, 4)),
        (PIXELS,), {
            "a": Found(2, {"a": [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]}, {"b": 18}),
            "b": Found(4, "b", {"fc": 1}), "fc": HEAD}),
    "pixel shuffle": (
        pooled(lambda s, x: s.b(F.pixel_shuffle(s.a(x), 2)), 4, a=conv(3, 8), b=conv(2, 4)), (PIXELS,), {
            "a": Found(2, {"a": 4}, {"b": 9}), "b": Found(4, "b", {"fc": 1}), "fc": HEAD}),
    "pixel unshuffle": (
        pooled(lambda s, x: s.b(F.pixel_unshuffle(s.a(x), 2)), 4, a=conv(3, 3), b=conv(12, 4)), (PIXELS,), {
            "a": Found(3, "a", {"b": 36}), "b": Found(4, "b", {"fc": 1}), "fc": HEAD}),
    "groups of two": (pooled(regrouped, 4, a=conv(3, 4), g=conv(4, 6, groups=2), b=conv(6, 4)), (PIXELS,), {
        "a": Found(2, {"a": [[0, 2], [1, 3]]}, {"g": 9}), "g": Found(3, {"g": PAIRS}, {"b": INTERLEAVED}),
        "b": Found(4, "b", {"fc": 1}), "fc": HEAD}),
    "one output a group": (pooled(regrouped, 4, a=conv(3, 6), g=conv(6, 3, groups=3), b=conv(3, 4)), (PIXELS,), {
        "a": Found(2, {"a": [[0, 2, 4], [1, 3, 5]]}, {"g": 9}), "g": Found(3, "g", frozen="one output in each"),
        "b": Found(4, "b", {"fc": 1}), "fc": HEAD}),
    "depth multiplied": (pooled(regrouped, 4, a=conv(3, 4), g=conv(4, 8, groups=4), b=conv(8, 4)), (PIXELS,), {
        "a": Found(4, "a", {"b": 18}, {"g": 2}), "b": Found(4, "b", {"fc": 1}), "fc": HEAD}),
    "transposed": (
        pooled(upsampled, 4, a=conv(3, 4), up=nn.ConvTranspose2d(4, 6, 2, stride=2), b=conv(6, 4)), (PIXELS,), {
            "a": Found(4, "a", {"up": 1}), "up": Found(6, "up", {"b": 9}), "b": Found(4, "b", {"fc": 1}),
            "fc": HEAD}),
    "transposed beside": (
        pooled(read_twice, 4, a=conv(3, 6), up=nn.ConvTranspose2d(6, 4, 2, stride=2), c=conv(6, 4)), (PIXELS,), {
            "a": Found(6, "a", {"c": 9, "up": 1}), "up": Found(4, "up c", {"fc": 1}), "fc": HEAD}),
    "group norm": (pooled(normed, 4, a=conv(3, 8), norm=nn.GroupNorm(4, 8), b=conv(8, 4)), (PIXELS,), {
        "a": Found(4, {"a": 2}, {"b": 18}, {"norm": 2}), "b": Found(4, "b", {"fc": 1}), "fc": HEAD}),
    "norm of one group": (pooled(normed, 4, a=conv(3, 8), norm=nn.GroupNorm(1, 8), b=conv(8, 4)), (PIXELS,), {
        "a": Found(8, "a", frozen="normalises over the channels"), "b": Found(4, "b", {"fc": 1}), "fc": HEAD}),
    "instance norm": (
        pooled(normed, 4, a=conv(3, 6), norm=nn.InstanceNorm2d(6, affine=True), b=conv(6, 4)), (PIXELS,), {
            "a": Found(6, "a", {"b": 9}, {"norm.weight": 1, "norm.bias": 1}), "b": Found(4, "b", {"fc": 1}),
            "fc": HEAD}),
    "slopes": (pooled(normed, 4, a=conv(3, 6), norm=nn.PReLU(6), b=conv(6, 4)), (PIXELS,), {
        "a": Found(6, "a", {"b": 9}, {"norm.weight": 1}), "b": Found(4, "b", {"fc": 1}), "fc": HEAD}),
    "one slope": (pooled(normed, 4, a=conv(3, 6), norm=nn.PReLU(), b=conv(6, 4)), (PIXELS,), {
        "a": Found(6, "a", {"b": 9}), "b": Found(4, "b", {"fc": 1}), "fc": HEAD}),
    "shortcut padded": (pooled(shortcut_padded, 8, a=conv(3, 4), b=conv(4, 8)), (PIXELS,), {
        "a": Found(4, {"a": 1, "b": beside(4, 1, 2)}, {"b": 9, "fc": beside(4, 1, 2)}),
        "b": Found(4, "b", frozen="needs all of it"), "fc": HEAD}),
    "padded channels": (pooled(padded_channels, 4, a=conv(3, 5), b=conv(8, 4)), (PIXELS,), {
        "a": Found(5, "a", {"b": beside(5, 9, 9)}), "b": Found(4, "b", {"fc": 1}), "fc": HEAD}),
    "padded in pairs": (padded_in_pairs, (TOKENS,), {
        "a": Found(3, {"a": dealt(3, 2, 4)}, {"fc": 1, "out": dealt(3, 2, 4)}, {"scale": dealt(3, 2, 4)}, literals=(1,)),
        "a[1]": Found(1, {"a": [[3]]}, {"fc": [[3]], "out": [[3]]}, {"scale": [[3]]}, literals=(1,), frozen="always stay"),
        "fc": Found(5, "fc out", frozen=OUTPUT)}),
    "unet": (pooled(unet, 4, a=conv(3, 4), b=conv(4, 6), c=conv(10, 4)), (PIXELS,), {
        "a": Found(4, "a", {"b": 9, "c": beside(4, 9, 54)}), "b": Found(6, "b", {"c": 9}),
        "c": Found(4, "c", {"fc": 1}), "fc": HEAD}),
    "stacked tokens": (stacked_tokens, (VECTOR,), {"a": Found(8, "a b", {"fc": 1}), "fc": HEAD}),
    "stacked behind": (stacked_behind, (VECTOR,), {"a": Found(4, "a b", {"fc": 2}), "fc": HEAD}),
    "expanded": (expanded, (TOKENS, VECTOR), {"a": Found(8, "a b", {"fc": 1}, literals=(1,)), "fc": HEAD}),
    "repeated": (pooled(repeated, 4, a=conv(3, 3), b=conv(6, 4)), (PIXELS,), {
        "a": Found(3, "a", {"b": INTERLEAVED}), "b": Found(4, "b", {"fc": 1}), "fc": HEAD}),
    "scaled stream": (
        pooled(scaled_stream, 4, a=conv(3, 4), b=conv(4, 9, 1), c=conv(9, 4, 1), gamma=SCALE), (PIXELS,), {
            "a": Found(4, "a c", {"b": 1, "fc": 1}, {"gamma": 1}), "b": Found(9, "b", {"c": 1}), "fc": HEAD}),
    "constant on unknown": (constant_on_unknown, (VECTOR,), {
        "a": Found(9, "a", {"b": 1}), "b": Found(6, "b", frozen="whose channels are not known"), "fc": HEAD}),
    "token before unknown": (token_before_unknown, (TOKENS,), {
        "b": Found(6, "b", frozen="whose channels are not known"), "fc": HEAD}),
    "table read twice": (table_read_twice, (VECTOR,), {
        "a": Found(8, "a", frozen="works along the channels"), "fc": HEAD}),
    "softmax gate": (softmax_gate, (VECTOR,), {"a": Found(8, "a", frozen="works along the channels"), "fc": HEAD}),
    "chosen by index": (chosen_by_index, (VECTOR,), {"a": Found(8, "a", frozen="no rule for index"), "fc": HEAD}),
    "masked channels": (masked_channels, (VECTOR,), {
        "a": Found(4, "a", frozen="with a value whose channels are not known"), "fc": HEAD}),
    "recurrent": (recurrent, (TOKENS,), {"a": Found(8, "a", frozen="no rule for"), "fc": HEAD}),
    "two heights": (two_heights, (TOKENS,), {
        "a": Found(4, "a", frozen="does not read them as channels"), "b": Found(5, "b c", frozen=OUTPUT)}),
}  # fmt: skip
