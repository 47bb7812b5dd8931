"""Small networks that every test of the graph uses; each holds one thing that graphs get wrong."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm


class TutorialCNN(nn.Module):
    """The CNN of the tutorials for 3x32x32 pictures, with its `view` corrected."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1 = nn.Linear(64 * 8 * 8, 128)
        self.fc2 = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, 64 * 8 * 8)
        return self.fc2(F.relu(self.fc1(x)))


class BrokenTutorialCNN(nn.Module):
    """The same with the tutorial's wrong literal: 9 rows become 16 in silence."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1 = nn.Linear(64 * 6 * 6, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, 64 * 6 * 6)
        return self.fc2(F.relu(self.fc1(x)))


class BrokenView(nn.Module):
    """A `view` whose literal divides what it should not: every row becomes two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(4 * 8 * 8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).view(-1, 4 * 8 * 8))


class Block(nn.Module):
    """A basic residual block; `down` is a 1x1 convolution with BatchNorm where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.down: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.down is None else self.down(x)))


class ResidualNet(nn.Module):
    """Two residual blocks on 3x16x16 with one shared ReLU module in each block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.layers = nn.Sequential(Block(8, 8), Block(8, 16, 2))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.relu(self.bn(self.conv(x))))
        return self.fc(x.mean((2, 3)))


class ResNet20(nn.Module):
    """ResNet-20 (widths 16/32/64) under the names of the project's Fashion-MNIST weights; one channel in."""

    def __init__(self, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        widths = [16] * 4 + [32] * 3 + [64] * 3
        self.layers = nn.Sequential(*[Block(a, b, 1 if a == b else 2) for a, b in pairwise(widths)])
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(F.relu(self.bn(self.conv(x))))
        return self.fc(x.mean((2, 3)))


class MLP(nn.Module):
    """A sequence of linear layers with dropout between."""

    def __init__(self, sizes: tuple[int, ...] = (12, 24, 16, 5)) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for a, b in pairwise(sizes):
            parts += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(0.25)]
        self.body = nn.Sequential(*parts[:-2])

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class TiedNet(nn.Module):
    """An embedding and a linear head on one Parameter, and two linears that share theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.b.weight = self.a.weight
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.b(torch.tanh(self.a(self.embed(ids)))))


class DictNet(nn.Module):
    """Outputs in a dict that holds a tuple and None."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)
        self.b = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, object]:
        return {"logits": self.a(x), "pair": (self.b(x), x * 2), "nothing": None}


class OptionalNet(nn.Module):
    """Two inputs and an optional third."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 3)
        self.right = nn.Linear(5, 3)

    def forward(self, left: Tensor, right: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
        y = self.left(left) + self.right(right)
        if mask is not None:
            y = y * mask
        return y * scale


class FunctionalNet(nn.Module):
    """Dropout, in-place activations and in-place addition as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.bn = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        x += 0.5
        x = F.dropout(F.relu_(x), 0.5, self.training)
        x = F.adaptive_avg_pool2d(x, 1)
        return self.fc(torch.flatten(x, 1))


class TwiceNet(nn.Module):
    """One linear layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.gelu(self.inner(F.gelu(self.inner(x)))))


class WeightNormNet(nn.Module):
    """A weight that is computed in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a = weight_norm(nn.Linear(6, 8))
        self.b = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


class NormNet(nn.Module):
    """GroupNorm and LayerNorm, with the smooth activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.group = nn.GroupNorm(2, 8)
        self.act = nn.SiLU()
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.hard = nn.Hardswish()
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 4)
        self.soft = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.hard(self.depth(self.act(self.group(self.conv(x)))))
        return self.soft(self.fc(self.norm(x.flatten(2).transpose(1, 2))).mean(1))


class Conv1dNet(nn.Module):
    """One-dimensional convolutions, BatchNorm1d, pooling and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(1, 4, 5, padding=2)
        self.bn = nn.BatchNorm1d(4)
        self.pool = nn.MaxPool1d(2)
        self.up = nn.ConvTranspose1d(4, 4, 2, stride=2)
        self.avg = nn.AdaptiveAvgPool1d(1)
        self.flat = nn.Flatten()
        self.fc = nn.Linear(4, 2)
        self.act = nn.LeakyReLU(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.pool(self.act(self.bn(self.conv1(x)))))
        return self.fc(self.flat(self.avg(x)))


class MixingNet(nn.Module):
    """Rows that influence each other."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x - x.mean(0))


class ControlFlowNet(nn.Module):
    """A branch on a value, which cannot be exported."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.fc(x)
        return -self.fc(x)


class UnusedNet(nn.Module):
    """A layer that forward never calls, and one whose result is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.unused = nn.Linear(4, 7)
        self.dead = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.dead(x)
        return self.fc(x)


class FrozenNormNet(nn.Module):
    """Functional batch_norm on loose tensors, and a loose parameter and buffer."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))
        self.register_buffer("scale", torch.full((4,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, self.gain, None, self.training) * self.scale


def net(forward: Callable[..., object], **parts: object) -> nn.Module:
    """A module with the given parts and forward."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, part in parts.items():
                if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                    self.register_buffer(name, part)
                else:
                    setattr(self, name, part)

    Net.forward = forward
    return Net()
