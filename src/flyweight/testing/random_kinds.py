"""Steps of random networks from one kind of value to another: pictures, tokens, vectors; and blocks of tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flyweight.testing.random_parts import (
    LARGEST,
    VECTOR,
    Maker,
    channels_first,
    mixed,
    width,
)

__all__ = [
    "along_tokens",
    "as_picture",
    "as_tokens",
    "flattened",
    "one_token",
    "perceptron",
    "pooled",
    "told",
    "with_token",
]


def as_tokens(maker: Maker, i: int) -> int:
    """The pixels of a picture as tokens."""
    return maker.add(f"tokens({i})", lambda net, v: v[i].flatten(2).transpose(1, 2))


def pooled(maker: Maker, i: int) -> int:
    """The mean over places."""
    dims = (2, 3) if channels_first(maker.shape(i)) else (1,)
    return maker.add(f"mean({i})", lambda net, v: v[i].mean(dims))


def flattened(maker: Maker, i: int) -> int | None:
    """All numbers of a sample as one vector."""
    if math.prod(maker.shape(i)) > LARGEST // 4:
        return None
    size, kind = math.prod(maker.shape(i)), maker.dice.choice(["flatten", "view", "reshape"])

    def step(net: nn.Module, v: list[Tensor]) -> Tensor:
        if kind == "flatten":
            return v[i].flatten(1)
        return v[i].reshape(-1, size) if kind == "view" else v[i].reshape(v[i].shape[0], -1)

    return maker.add(f"{kind}({i})", step)


def one_token(maker: Maker, i: int) -> int:
    """The first token."""
    return maker.add(f"token 0 of {i}", lambda net, v: v[i][:, 0])


def with_token(maker: Maker, i: int) -> int:
    """A learned token in front."""
    name = maker.keep("token", torch.randn(1, 1, width(maker, i)))
    return maker.add(
        f"{name} before {i}", lambda net, v: torch.cat([net.loose(name).expand(v[i].shape[0], -1, -1), v[i]], 1)
    )


def told(maker: Maker, i: int) -> int | None:
    """A vector, through a layer, added to or multiplied with every place of a picture or token."""
    vectors = maker.of_rank(VECTOR)
    if not vectors:
        return None
    j = mixed(maker, maker.dice.choice(vectors), width(maker, i))
    first, times = channels_first(maker.shape(i)), maker.dice.random() < 0.5

    def step(net: nn.Module, v: list[Tensor]) -> Tensor:
        wide = v[j][:, :, None, None] if first else v[j][:, None].expand(-1, v[i].shape[1], -1)
        return v[i] * wide if times else v[i] + wide

    return maker.add(f"{i} told {j}", step)


def as_picture(maker: Maker, i: int) -> int | None:
    """A vector as a picture of 2 by 2."""
    size = width(maker, i)
    if size % 4:
        return None
    return maker.add(f"picture({i})", lambda net, v: v[i].view(-1, size // 4, 2, 2))


def along_tokens(maker: Maker, i: int) -> int:
    """A convolution along the tokens."""
    name = maker.own("conv1d", nn.Conv1d(width(maker, i), maker.dice.choice([4, 6]), 3, padding=1))
    return maker.add(f"{name}({i})", lambda net, v: net.part(name, v[i].transpose(1, 2)).transpose(1, 2))


def perceptron(maker: Maker, i: int) -> int:
    """The feed-forward half of a transformer block: plain or gated, with its residual sum."""
    count, inner = width(maker, i), maker.dice.choice([5, 8])
    up, down = maker.own("up", nn.Linear(count, inner)), maker.own("down", nn.Linear(inner, count))
    if maker.dice.random() < 0.5:
        return maker.add(f"mlp({i})", lambda net, v: v[i] + net.part(down, F.gelu(net.part(up, v[i]))))
    gate = maker.own("gate", nn.Linear(count, inner))
    return maker.add(
        f"gated mlp({i})", lambda net, v: v[i] + net.part(down, F.silu(net.part(gate, v[i])) * net.part(up, v[i]))
    )
