"""Networks of the zoo in which channels are joined, split, shuffled and reshaped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo_models import OUTPUT, Case, conv, image, net, pooled, vector

__all__ = ["SHAPES"]


# ---- concatenations, splits, shuffles ----


def inception() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = torch.cat([F.relu(self.a(x)), F.relu(self.b(x)), F.max_pool2d(x, 3, 1, 1)], 1)
        return pooled(self, F.relu(self.bn(self.c(y))))

    return net(forward, a=conv(3, 8), b=conv(3, 16, 5), c=conv(27, 24), bn=nn.BatchNorm2d(24), fc=nn.Linear(24, 5))


def densenet() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = torch.cat([y, self.conv1(F.relu(self.bn1(y)))], 1)
        y = torch.cat([y, self.conv2(F.relu(self.bn2(y)))], 1)
        return pooled(self, F.relu(self.bn3(self.transition(F.relu(self.bn(y))))))

    return net(
        forward, stem=conv(3, 16), bn1=nn.BatchNorm2d(16), conv1=conv(16, 8), bn2=nn.BatchNorm2d(24),
        conv2=conv(24, 8), bn=nn.BatchNorm2d(32), transition=conv(32, 16, 1), bn3=nn.BatchNorm2d(16),
        fc=nn.Linear(16, 5),
    )  # fmt: skip


def stacked() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = torch.stack([F.relu(self.a(x)), torch.tanh(self.b(x))], 1).amax(1)
        return self.fc(F.relu(self.c(y)))  # type: ignore[no-any-return]

    return net(forward, a=nn.Linear(12, 32), b=nn.Linear(12, 32), c=nn.Linear(32, 32), fc=nn.Linear(32, 5))


def split_branches() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        left, right = F.relu(self.a(x)).split([8, 16], 1)
        return pooled(self, F.relu(self.c(torch.cat([left, F.relu(self.b(right))], 1))))

    return net(forward, a=conv(3, 24), b=conv(16, 16), c=conv(24, 24), fc=nn.Linear(24, 5))


def slices() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        return pooled(self, F.relu(self.b(y[:, :8])) + F.relu(self.c(y[:, 8:])))

    return net(forward, a=conv(3, 24), b=conv(8, 16), c=conv(16, 16), fc=nn.Linear(16, 5))


def shufflenet() -> nn.Module:
    # halves stay halves: channel i goes with i + 8, and with the shuffled partner that `b` writes
    def forward(self: Any, x: Tensor) -> Tensor:
        left, right = F.relu(self.stem(x)).chunk(2, 1)
        y = torch.cat([left, F.relu(self.b(F.relu(self.a(right))))], 1)
        rows, channels, height, width = y.shape
        y = y.view(rows, 2, channels // 2, height, width).transpose(1, 2).reshape(rows, channels, height, width)
        return pooled(self, F.relu(self.c(y)))

    return net(forward, stem=conv(3, 16), a=conv(8, 16), b=conv(16, 8), c=conv(16, 24), fc=nn.Linear(24, 5))


def channel_shuffle() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return pooled(self, F.relu(self.b(self.shuffle(F.relu(self.a(x))))))

    return net(forward, a=conv(3, 16), shuffle=nn.ChannelShuffle(2), b=conv(16, 32), fc=nn.Linear(32, 5))


def one_channel() -> nn.Module:
    # channel 0 of `a` has a role of its own
    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        return pooled(self, F.relu(self.c(F.relu(self.b(y))))) * torch.sigmoid(y[:, 0].mean((1, 2)))[:, None]

    return net(forward, a=conv(3, 8), b=conv(8, 32), c=conv(32, 16), fc=nn.Linear(16, 5))


# ---- shapes ----


def flattened() -> nn.Module:
    return net(
        lambda self, x: self.fc(F.relu(self.lin(F.max_pool2d(F.relu(self.a(x)), 2).view(x.shape[0], -1)))),
        a=conv(3, 16), lin=nn.Linear(16 * 16, 32), fc=nn.Linear(32, 5),
    )  # fmt: skip


def channels_last() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.relu(self.a(x)).permute(0, 2, 3, 1)
        return self.fc(F.gelu(self.lin2(F.gelu(self.lin(y)))).mean((1, 2)))  # type: ignore[no-any-return]

    return net(forward, a=conv(3, 16), lin=nn.Linear(16, 32), lin2=nn.Linear(32, 24), fc=nn.Linear(24, 5))


def expanded() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.relu(self.lin(x)).unsqueeze(2).expand(-1, -1, 8)
        return pooled(self, F.relu(self.b(F.relu(self.a(y + self.place)))))

    return net(
        forward, lin=nn.Linear(12, 16), place=nn.Parameter(torch.randn(8)), a=nn.Conv1d(16, 24, 3, padding=1),
        b=nn.Conv1d(24, 16, 3, padding=1), fc=nn.Linear(16, 5),
    )  # fmt: skip


def unet() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        top = F.relu(self.down1(x))
        low = F.relu(self.down2(F.max_pool2d(top, 2)))
        up = F.interpolate(low, scale_factor=2, mode="bilinear", align_corners=False)
        return self.out(F.relu(self.up(torch.cat([top, up], 1))))  # type: ignore[no-any-return]

    return net(forward, down1=conv(3, 16), down2=conv(16, 32), up=conv(48, 16), out=conv(16, 2, 1))


def unet_nearest() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        top = F.relu(self.down1(x))
        low = F.relu(self.down2(F.avg_pool2d(top, 2)))
        return self.out(F.relu(self.up(top + F.interpolate(low, size=top.shape[2:]))))  # type: ignore[no-any-return]

    return net(forward, down1=conv(3, 16), down2=conv(16, 16), up=conv(16, 24), out=conv(24, 2, 1))


def pixel_shuffle() -> nn.Module:
    # four neighbouring channels of `b` become one
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.out(F.relu(self.c(F.pixel_shuffle(self.b(F.relu(self.a(x))), 2))))  # type: ignore[no-any-return]

    return net(forward, a=conv(3, 16), b=conv(16, 32), c=conv(8, 16), out=conv(16, 3, 1))


def pixel_unshuffle() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return pooled(self, F.relu(self.b(F.pixel_unshuffle(F.relu(self.a(x)), 2))))

    return net(forward, a=conv(3, 8), b=conv(32, 24), fc=nn.Linear(24, 5))


def padded_shortcut() -> nn.Module:
    # the shortcut of the first ResNets: zeros before and behind, so 8 of b's 16 channels go with the stem's
    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.relu(self.stem(x))
        short = F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return pooled(self, F.relu(self.c(F.relu(short + self.b(F.relu(self.a(y)))))))

    return net(forward, stem=conv(3, 8), a=conv(8, 24, stride=2), b=conv(24, 16), c=conv(16, 16), fc=nn.Linear(16, 5))


def softmax_channels() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        share = self.a(x).softmax(1)
        return pooled(self, F.relu(self.c(F.relu(self.b(share)))))

    return net(forward, a=conv(3, 8), b=conv(8, 32), c=conv(32, 16), fc=nn.Linear(16, 5))


def softmax_places() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        where = self.score(y).flatten(2).softmax(-1)
        return self.fc(F.relu(self.lin((y.flatten(2) * where).sum(2))))  # type: ignore[no-any-return]

    return net(forward, a=conv(3, 16), score=conv(16, 1, 1), lin=nn.Linear(16, 24), fc=nn.Linear(24, 5))


SHAPES: dict[str, Case] = {
    "inception": Case(inception, image(), {"a": 8, "b": 16, "c": 24}),
    "densenet": Case(densenet, image(), {"stem": 16, "conv1": 8, "conv2": 8, "transition": 16}),
    "stack": Case(stacked, vector(), {"a": 32, "c": 32}),
    "split": Case(split_branches, image(), {"a": 24, "b": 16, "c": 24}),
    "slice": Case(slices, image(), {"a": 24, "b": 16}),
    "shufflenet": Case(shufflenet, image(), {"stem": 8, "a": 16, "c": 24}),
    "channel shuffle": Case(channel_shuffle, image(), {"a": 8, "b": 32}),
    "one channel": Case(one_channel, image(), {"a": "select", "b": 32, "c": 16}),
    "flatten": Case(flattened, image(), {"a": 16, "lin": 32}),
    "channels last": Case(channels_last, image(), {"a": 16, "lin": 32, "lin2": 24}),
    "expand": Case(expanded, vector(), {"lin": 16, "a": 24, "b": 16}),
    "unet": Case(unet, image(), {"down1": 16, "down2": 32, "up": 16, "out": OUTPUT}),
    "unet nearest": Case(unet_nearest, image(), {"down1": 16, "up": 24, "out": OUTPUT}),
    "pixel shuffle": Case(pixel_shuffle, image(), {"a": 16, "b": 8, "c": 16, "out": OUTPUT}),
    "pixel unshuffle": Case(pixel_unshuffle, image(), {"a": 8, "b": 24}),
    "padded shortcut": Case(padded_shortcut, image(), {"stem": 8, "a": 24, "b": 8, "c": 16}),
    "softmax of channels": Case(softmax_channels, image(), {"a": "softmax", "b": 32, "c": 16}),
    "softmax of places": Case(softmax_places, image(), {"a": 16, "lin": 24}),
}
