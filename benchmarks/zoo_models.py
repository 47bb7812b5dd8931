"""Small networks, each with one thing that graphs get wrong, and the axes that a person finds in them.

The tables are written by thinking about the network, never by running flyweight. A row is the name of a layer and

    16           so many of its output channels (rows) may be cut, each alone or with others of other layers
    "heads 4"    so many whole units of that kind may be cut
    "reason"     nothing may be cut, and the reason holds this text

The head `fc` answers for the model and is frozen in every table without being written there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LAYERS", "OUTPUT", "Case", "conv", "image", "net", "pooled", "sequence", "signal", "tokens", "vector"]

Inputs = Callable[[int], Any]
OUTPUT = "an output of the model"


class Case(NamedTuple):
    """A network, how to make `n` rows of its inputs (a tuple, or a dict by name), and what is true of it."""

    make: Callable[[], nn.Module]
    inputs: Inputs
    found: Mapping[str, int | str] = {}
    refused: str = ""  # a part of the error, for networks that no graph can hold
    budget: str = "macs<=70%"  # beside a wide limit on the divergence: weights are random
    note: str = ""  # the code of a Note that must be there


def net(forward: Callable[..., object], **parts: object) -> nn.Module:
    """A module with the given parts (tensors become buffers) and forward."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, part in parts.items():
                if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                    self.register_buffer(name, part)
                else:
                    setattr(self, name, part)

    Net.forward = forward  # type: ignore[method-assign,assignment]
    return Net()


def conv(inputs: int, outputs: int, kernel: int = 3, **more: Any) -> nn.Conv2d:
    """A 2d convolution that keeps the size."""
    return nn.Conv2d(inputs, outputs, kernel, **{"padding": kernel // 2, **more})


def image(channels: int = 3, size: int = 8) -> Inputs:
    """Random pictures."""
    return lambda rows: (torch.randn(rows, channels, size, size),)


def vector(size: int = 12) -> Inputs:
    """Random vectors."""
    return lambda rows: (torch.randn(rows, size),)


def sequence(steps: int = 6, size: int = 8) -> Inputs:
    """Random sequences of vectors."""
    return lambda rows: (torch.randn(rows, steps, size),)


def signal(channels: int = 1, steps: int = 32) -> Inputs:
    """Random signals, channels first."""
    return lambda rows: (torch.randn(rows, channels, steps),)


def tokens(steps: int = 6, words: int = 50) -> Inputs:
    """Random word numbers."""
    return lambda rows: (torch.randint(0, words, (rows, steps)),)


def pooled(self: Any, y: Tensor) -> Tensor:
    """The answer of a network of pictures or signals: the head on the mean over all positions."""
    return self.fc(y.flatten(2).mean(2))  # type: ignore[no-any-return]


# ---- convolutions ----


def grouped_conv() -> nn.Module:
    # thinned alike in every group, or by whole groups: four units either way
    def forward(self: Any, x: Tensor) -> Tensor:
        return pooled(self, self.b(F.relu(self.g(F.relu(self.a(x))))).relu())

    return net(forward, a=conv(3, 16), g=conv(16, 16, groups=4), b=conv(16, 32), fc=nn.Linear(32, 5))


def depthwise() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.dw1(F.relu(self.bn(self.stem(x))))))
        y = F.relu(self.bn2(self.pw(y)))
        return pooled(self, F.relu(self.dw2(y)))

    return net(
        forward, stem=conv(3, 16), bn=nn.BatchNorm2d(16), dw1=conv(16, 16, groups=16), bn1=nn.BatchNorm2d(16),
        pw=conv(16, 32, 1), bn2=nn.BatchNorm2d(32), dw2=conv(32, 32, groups=32), fc=nn.Linear(32, 5),
    )  # fmt: skip


def inverted_residual() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.relu6(self.stem(x))
        z = F.relu6(self.dw(F.relu6(self.expand(y))))
        return pooled(self, y + self.project(z))

    return net(
        forward, stem=conv(3, 16), expand=conv(16, 64, 1), dw=conv(64, 64, groups=64), project=conv(64, 16, 1),
        fc=nn.Linear(16, 5),
    )  # fmt: skip


def depth_multiplier() -> nn.Module:
    # a depthwise convolution with two filters a channel: its 32 outputs come in pairs
    def forward(self: Any, x: Tensor) -> Tensor:
        return pooled(self, F.relu(self.b(F.relu(self.dw(F.relu(self.a(x)))))))

    return net(forward, a=conv(3, 16), dw=conv(16, 32, groups=16), b=conv(32, 32), fc=nn.Linear(32, 5))


def transposed_1d() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.out(F.relu(self.mid(F.relu(self.up(F.relu(self.down(x))))))).flatten(1)

    return net(
        forward, down=nn.Conv1d(1, 16, 4, stride=2, padding=1), up=nn.ConvTranspose1d(16, 24, 4, stride=2, padding=1),
        mid=nn.Conv1d(24, 24, 3, padding=1), out=nn.Conv1d(24, 1, 1),
    )  # fmt: skip


def transposed_2d() -> nn.Module:
    def forward(self: Any, z: Tensor) -> Tensor:
        y = F.relu(self.lin2(F.relu(self.lin(z)))).view(-1, 16, 4, 4)
        y = F.relu(self.bn(self.up1(y)))
        return torch.tanh(self.out(F.relu(self.mid(y))))

    return net(
        forward, lin=nn.Linear(12, 32), lin2=nn.Linear(32, 16 * 16), bn=nn.BatchNorm2d(24),
        up1=nn.ConvTranspose2d(16, 24, 4, stride=2, padding=1), mid=conv(24, 24), out=conv(24, 3),
    )  # fmt: skip


def transposed_3d() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return pooled(self, F.relu(self.b(F.relu(self.up(F.relu(self.a(x)))))))

    return net(
        forward, a=nn.Conv3d(1, 16, 2, stride=2), up=nn.ConvTranspose3d(16, 16, 2, stride=2),
        b=nn.Conv3d(16, 16, 3, padding=1), fc=nn.Linear(16, 5),
    )  # fmt: skip


def causal_1d() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.relu(self.inp(F.pad(x, (2, 0))))
        z = F.relu(self.a(F.pad(y, (4, 0))))
        return pooled(self, y + self.b(F.pad(z, (8, 0))))

    return net(
        forward, inp=nn.Conv1d(1, 16, 3), a=nn.Conv1d(16, 32, 3, dilation=2), b=nn.Conv1d(32, 16, 3, dilation=4),
        fc=nn.Linear(16, 5),
    )  # fmt: skip


def conv_3d() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return pooled(self, F.relu(self.b(F.max_pool3d(F.relu(self.bn(self.a(x))), 2))))

    return net(
        forward, a=nn.Conv3d(1, 16, 3, padding=1), bn=nn.BatchNorm3d(16), b=nn.Conv3d(16, 24, 3, padding=1),
        fc=nn.Linear(24, 5),
    )  # fmt: skip


def odd_padding() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return pooled(self, F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))))

    return net(
        forward, a=conv(3, 16, padding="same"), b=conv(16, 16, padding_mode="reflect"), c=conv(16, 24),
        fc=nn.Linear(24, 5),
    )  # fmt: skip


# ---- norms ----


def norm_net(norm: nn.Module) -> Callable[[], nn.Module]:
    """A convolution, the norm, and another convolution that reads it."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return pooled(self, F.relu(self.b(F.relu(self.norm(self.a(x))))))

    return lambda: net(forward, a=conv(3, 16), norm=norm, b=conv(16, 32), fc=nn.Linear(32, 5))


def norm_after_relu() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.max_pool2d(self.bn1(F.relu(self.a(x))), 2)
        return pooled(self, self.bn2(F.relu(self.b(y))))

    return net(
        forward, a=conv(3, 16), bn1=nn.BatchNorm2d(16), b=conv(16, 24), bn2=nn.BatchNorm2d(24), fc=nn.Linear(24, 5)
    )


class OwnRMSNorm(nn.Module):
    """The root-mean-square norm as language models write it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x / rms(x) * weight."""
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rms_net(norm: Callable[[int], nn.Module]) -> Callable[[], nn.Module]:
    """A language model's feed-forward block between root-mean-square norms."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.inp(x)
        z = self.norm(y)
        y = y + self.down(F.silu(self.gate(z)) * self.up(z))
        return self.fc(self.last(y).mean(1))  # type: ignore[no-any-return]

    return lambda: net(
        forward, inp=nn.Linear(8, 16), norm=norm(16), gate=nn.Linear(16, 48, bias=False),
        up=nn.Linear(16, 48, bias=False), down=nn.Linear(48, 16, bias=False), last=norm(16), fc=nn.Linear(16, 5),
    )  # fmt: skip


def convnext() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.stem(x)
        z = self.norm(self.dw(y).permute(0, 2, 3, 1))
        z = self.gamma * self.pw2(F.gelu(self.pw1(z)))
        return pooled(self, y + z.permute(0, 3, 1, 2))

    return net(
        forward, stem=nn.Conv2d(3, 16, 2, stride=2), dw=conv(16, 16, 3, groups=16), norm=nn.LayerNorm(16),
        pw1=nn.Linear(16, 64), pw2=nn.Linear(64, 16), gamma=nn.Parameter(torch.rand(16)), fc=nn.Linear(16, 5),
    )  # fmt: skip


# ---- gates and arithmetic ----


def glu() -> nn.Module:
    return net(lambda self, x: self.fc(F.glu(self.lin(x), 1)), lin=nn.Linear(12, 64), fc=nn.Linear(32, 5))


def swiglu_chunk() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, -1)
        return self.fc(self.w3(F.silu(a) * b).mean(1))  # type: ignore[no-any-return]

    return net(forward, w12=nn.Linear(8, 64), w3=nn.Linear(32, 16), fc=nn.Linear(16, 5))


def squeeze_excite() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        gate = torch.sigmoid(self.up(F.relu(self.down(y.mean((2, 3), keepdim=True)))))
        return pooled(self, F.relu(self.b(y * gate)))

    return net(forward, a=conv(3, 16), down=conv(16, 8, 1), up=conv(8, 16, 1), b=conv(16, 24), fc=nn.Linear(24, 5))


def squeeze_excite_linear() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        gate = F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(y, 1).flatten(1)))))
        return pooled(self, F.relu(self.b(y * gate.view(-1, 16, 1, 1))))

    return net(forward, a=conv(3, 16), down=nn.Linear(16, 8), up=nn.Linear(8, 16), b=conv(16, 24), fc=nn.Linear(24, 5))


def channel_scale() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.a(x) * self.scale[None, :, None, None] + self.shift
        return pooled(self, F.relu(self.b(F.relu(y))))

    return net(
        forward, a=conv(3, 16), scale=nn.Parameter(torch.rand(16)), shift=nn.Parameter(torch.rand(16, 1, 1)),
        b=conv(16, 24), fc=nn.Linear(24, 5),
    )  # fmt: skip


def prelu() -> nn.Module:
    return net(
        lambda self, x: pooled(self, self.act2(self.b(self.act1(self.a(x))))),
        a=conv(3, 16), act1=nn.PReLU(16), b=conv(16, 24), act2=nn.PReLU(), fc=nn.Linear(24, 5),
    )  # fmt: skip


def spatial_gate() -> nn.Module:
    # the mean and the maximum over the channels tie all of `a` together
    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        gate = torch.sigmoid(self.g(torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)))
        return pooled(self, F.relu(self.c(F.relu(self.b(y * gate)))))

    return net(forward, a=conv(3, 8), g=conv(2, 1), b=conv(8, 32), c=conv(32, 16), fc=nn.Linear(16, 5))


LAYERS: dict[str, Case] = {
    "grouped conv": Case(grouped_conv, image(), {"a": 4, "g": 4, "b": 32}),
    "depthwise": Case(depthwise, image(), {"stem": 16, "pw": 32}),
    "inverted residual": Case(inverted_residual, image(), {"stem": 16, "expand": 64}),
    "depth multiplier": Case(depth_multiplier, image(), {"a": 16, "b": 32}),
    "transposed 1d": Case(transposed_1d, signal(), {"down": 16, "up": 24, "mid": 24}),
    "transposed 2d": Case(transposed_2d, vector(), {"lin": 32, "lin2": 16, "up1": 24, "mid": 24, "out": OUTPUT}),
    "transposed 3d": Case(transposed_3d, lambda n: (torch.randn(n, 1, 4, 4, 4),), {"a": 16, "up": 16, "b": 16}),
    "causal 1d": Case(causal_1d, signal(), {"inp": 16, "a": 32}),
    "conv 3d": Case(conv_3d, lambda n: (torch.randn(n, 1, 4, 6, 6),), {"a": 16, "b": 24}),
    "odd padding": Case(odd_padding, image(), {"a": 16, "b": 16, "c": 24}),
    "batch norm after relu": Case(norm_after_relu, image(), {"a": 16, "b": 24}),
    "group norm": Case(norm_net(nn.GroupNorm(4, 16)), image(), {"a": 4, "b": 32}),
    "group norm of all": Case(norm_net(nn.GroupNorm(1, 16)), image(), {"a": "norm", "b": 32}),
    "instance norm": Case(norm_net(nn.InstanceNorm2d(16)), image(), {"a": 16, "b": 32}),
    "instance norm affine": Case(norm_net(nn.InstanceNorm2d(16, affine=True)), image(), {"a": 16, "b": 32}),
    "rms norm": Case(rms_net(OwnRMSNorm), sequence(), {"inp": "mean", "gate": 48}),
    "torch rms norm": Case(rms_net(nn.RMSNorm), sequence(), {"inp": "norm", "gate": 48}),
    "convnext": Case(convnext, image(), {"stem": "norm", "pw1": 64}),
    "glu": Case(glu, vector(), {"lin": 32}),
    "swiglu chunk": Case(swiglu_chunk, sequence(), {"w12": 32, "w3": 16}),
    "squeeze-excite": Case(squeeze_excite, image(), {"a": 16, "down": 8, "b": 24}),
    "squeeze-excite linear": Case(squeeze_excite_linear, image(), {"a": 16, "down": 8, "b": 24}),
    "channel scale": Case(channel_scale, image(), {"a": 16, "b": 24}),
    "prelu": Case(prelu, image(), {"a": 16, "b": 24}),
    "spatial gate": Case(spatial_gate, image(), {"a": "over the channels", "b": 32, "c": 16}),
}
