"""A random network in the making: values of the example, steps, parts under names."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "LARGEST",
    "PICTURE",
    "TOKENS",
    "VECTOR",
    "Draw",
    "Maker",
    "RandomNetwork",
    "axis",
    "bent",
    "channels_first",
    "mixed",
    "mixed_and_bent",
    "width",
]

Step = Callable[["RandomNetwork", list[Tensor]], Tensor]
PICTURE, TOKENS, VECTOR = 3, 2, 1  # dimensions beside the batch
LARGEST = 512  # numbers a sample and value: networks stay small


class RandomNetwork(nn.Module):
    """The steps in turn; the last values are the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.story: list[str] = []  # what was drawn, one line a value
        self.outputs = 1

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The outputs: logits of every sample, one tensor or two."""
        values = list(inputs)
        for step in self.steps:
            values.append(step(self, values))
        return values[-1] if self.outputs == 1 else tuple(values[-self.outputs :])

    def part(self, name: str, x: Tensor) -> Tensor:
        """What the part of that name makes of `x`."""
        made: Tensor = self.get_submodule(name)(x)
        return made

    def loose(self, name: str) -> Tensor:
        """A parameter or buffer of that name."""
        value = getattr(self, name)
        assert isinstance(value, Tensor)
        return value


class Maker:
    """A network in the making: what was drawn so far, and the values of the example."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)  # noqa: S311 - no secret
        self.network = RandomNetwork()
        self.values: list[Tensor] = []
        self.count = 0

    def name(self, kind: str) -> str:
        """A new name."""
        self.count += 1
        return f"{kind}{self.count}"

    def own(self, kind: str, part: nn.Module) -> str:
        """A new part's name. Norms get statistics and scales of their own, so that a lost one is seen."""
        for key, tensor in part.state_dict().items():
            if key.endswith("running_var") or (key == "weight" and tensor.ndim == 1):
                tensor.uniform_(0.5, 1.5)
            elif key.endswith("running_mean") or (key == "bias" and tensor.ndim == 1):
                tensor.normal_(0, 0.3)
        name = self.name(kind)
        self.network.add_module(name, part.eval())
        return name

    def keep(self, kind: str, value: Tensor) -> str:
        """The name of a new parameter, or of a buffer."""
        name = self.name(kind)
        if self.dice.random() < 0.7:
            self.network.register_parameter(name, nn.Parameter(value))
        else:
            self.network.register_buffer(name, value)
        return name

    def add(self, what: str, step: Step) -> int:
        """Runs a step on the example; gives the number of its value."""
        value = step(self.network, self.values)
        self.network.steps.append(step)
        self.values.append(value)
        self.network.story.append(f"{len(self.values) - 1}: {what} -> {tuple(value.shape[1:])}")
        return len(self.values) - 1

    def shape(self, i: int) -> tuple[int, ...]:
        """The sizes of a value without the batch."""
        return tuple(self.values[i].shape[1:])

    def of_rank(self, rank: int) -> list[int]:
        """The values with that many dimensions beside the batch."""
        return [i for i, value in enumerate(self.values) if value.ndim == rank + 1]


class Draw(NamedTuple):
    """A kind of step: for values of `rank` dimensions. `make` gives the number of the new value, None where none fits."""

    rank: int
    make: Callable[[Maker, int], int | None]


def activation(dice: random.Random) -> tuple[str, Callable[[Tensor], Tensor]]:
    """A function of every entry, by name."""
    known: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": F.relu,
        "gelu": F.gelu,
        "silu": F.silu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "leaky": lambda x: F.leaky_relu(x, 0.1),
        "hardswish": F.hardswish,
        "clamp": lambda x: torch.clamp(x, -0.8, 0.9),
        "scaled": lambda x: 2.0 * x - 0.3,
    }
    name = dice.choice(sorted(known))
    return name, known[name]


def channels_first(shape: tuple[int, ...]) -> bool:
    """Whether it is a picture, with its channels in front."""
    return len(shape) == PICTURE


def width(maker: Maker, i: int) -> int:
    """Channels of a value: first of a picture, last of tokens and vectors."""
    shape = maker.shape(i)
    return shape[0] if channels_first(shape) else shape[-1]


def axis(maker: Maker, i: int) -> int:
    """The dimension of the channels."""
    return 1 if channels_first(maker.shape(i)) else len(maker.shape(i))


def mixed(maker: Maker, i: int, outputs: int | None = None) -> int:
    """A convolution or linear layer over a value's channels."""
    dice, inputs = maker.dice, width(maker, i)
    outputs = outputs or dice.choice([2, 3, 4, 5, 6, 8])
    bias = dice.random() < 0.7
    if channels_first(maker.shape(i)):
        kernel = dice.choice([1, 3])
        name = maker.own("conv", nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias))
    else:
        name = maker.own("linear", nn.Linear(inputs, outputs, bias=bias))
    return maker.add(f"{name}({i})", lambda net, v: net.part(name, v[i]))


def mixed_and_bent(maker: Maker, i: int) -> int:
    """A layer and an activation."""
    return bent(maker, mixed(maker, i))


def bent(maker: Maker, i: int) -> int:
    """An activation."""
    name, function = activation(maker.dice)
    return maker.add(f"{name}({i})", lambda net, v: function(v[i]))
