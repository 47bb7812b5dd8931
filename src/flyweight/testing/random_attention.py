"""Attention for random networks, in the spellings that people write."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flyweight.testing.random_parts import Maker

__all__ = ["ATTENTION"]


def by_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, token, channel) as (batch, head, token, channel of the head)."""
    return x.view(x.shape[0], x.shape[1], heads, x.shape[2] // heads).transpose(1, 2)


def together(x: Tensor) -> Tensor:
    """The inverse of `by_heads`."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def product(q: Tensor, k: Tensor, v: Tensor, kind: str) -> Tensor:
    """softmax(q k^T) v in one of three spellings."""
    if kind == "one operator":
        return F.scaled_dot_product_attention(q, k, v)
    if kind == "einsum":
        scores = torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k), -1)
        return torch.einsum("bhij,bhjd->bhid", scores, v)
    return torch.softmax(q @ k.transpose(-2, -1) / 1.5, -1) @ v


def kind_of(maker: Maker) -> str:
    """A spelling of attention, drawn."""
    return maker.dice.choice(["written out", "one operator", "einsum"])


def attended(maker: Maker, i: int) -> int:
    """Self-attention, or cross-attention with another value of tokens; rotated at times."""
    size, kind, heads = maker.shape(i)[-1], kind_of(maker), maker.dice.choice([1, 2, 3])
    j = maker.dice.choice(maker.of_rank(2))
    inner = heads * 2
    q = maker.own("q", nn.Linear(size, inner))
    k, v = (maker.own(n, nn.Linear(maker.shape(j)[-1], inner)) for n in "kv")
    o = maker.own("o", nn.Linear(inner, size))
    residual, rotated = maker.dice.random() < 0.7, i == j and maker.dice.random() < 0.3
    angles = maker.keep("angles", torch.randn(maker.shape(i)[0], 2)) if rotated else ""

    def turned(net: nn.Module, x: Tensor) -> Tensor:
        if not rotated:
            return x
        left, right = x.chunk(2, -1)
        angle = net.get_parameter(angles) if angles in net._parameters else net.get_buffer(angles)
        return x * angle.cos() + torch.cat([-right, left], -1) * angle.sin()

    def step(net: nn.Module, v_: list[Tensor]) -> Tensor:
        at = net.get_submodule
        parts = (by_heads(at(q)(v_[i]), heads), by_heads(at(k)(v_[j]), heads), by_heads(at(v)(v_[j]), heads))
        made: Tensor = at(o)(together(product(turned(net, parts[0]), turned(net, parts[1]), parts[2], kind)))
        return v_[i] + made if residual else made

    return maker.add(f"attention {kind} of {i} to {j}, {heads} heads", step)


def fused(maker: Maker, i: int) -> int:
    """Queries, keys and values out of one layer: chunks, or one view unbound."""
    size, kind, heads = maker.shape(i)[-1], kind_of(maker), maker.dice.choice([2, 3])
    qkv, o = maker.own("qkv", nn.Linear(size, 6 * heads)), maker.own("o", nn.Linear(2 * heads, size))
    unbound = maker.dice.random() < 0.5

    def step(net: nn.Module, v: list[Tensor]) -> Tensor:
        y = net.get_submodule(qkv)(v[i])
        if unbound:
            q, k, w = y.reshape(y.shape[0], y.shape[1], 3, heads, 2).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, w = (by_heads(p, heads) for p in y.chunk(3, -1))
        made: Tensor = net.get_submodule(o)(together(product(q, k, w, kind)))
        return v[i] + made

    return maker.add(f"fused attention {kind} of {i}, {heads} heads", step)


def shared(maker: Maker, i: int) -> int:
    """Grouped queries: a head of keys and values for two of queries; or one for all."""
    size, kind = maker.shape(i)[-1], maker.dice.choice(["written out", "one operator"])
    few, times = maker.dice.choice([(2, 2), (3, 2), (1, 3)])
    q, o = maker.own("q", nn.Linear(size, 2 * few * times)), maker.own("o", nn.Linear(2 * few * times, size))
    k, v = (maker.own(n, nn.Linear(size, 2 * few)) for n in "kv")
    spelling = maker.dice.choice(["interleaved", "expanded"]) if few > 1 or kind == "one operator" else "broadcast"

    def spread(x: Tensor) -> Tensor:
        if spelling == "interleaved":
            return x.repeat_interleave(times, 1)
        if spelling == "broadcast":
            return x
        wide = x[:, :, None].expand(-1, -1, times, -1, -1)
        return wide.reshape(x.shape[0], few * times, x.shape[2], 2)

    def step(net: nn.Module, v_: list[Tensor]) -> Tensor:
        at = net.get_submodule
        keys, values = (spread(by_heads(at(n)(v_[i]), few)) for n in (k, v))
        made: Tensor = at(o)(together(product(by_heads(at(q)(v_[i]), few * times), keys, values, kind)))
        return v_[i] + made

    return maker.add(f"shared keys {kind}, {spelling} of {i}, {few} by {times}", step)


ATTENTION = (attended, attended, fused, shared)
