"""The steps that random networks are drawn from: pictures (rank 3), tokens (rank 2) and vectors (rank 1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flyweight.testing.random_attention import ATTENTION
from flyweight.testing.random_kinds import (
    along_tokens,
    as_picture,
    as_tokens,
    flattened,
    one_token,
    perceptron,
    pooled,
    told,
    with_token,
)
from flyweight.testing.random_parts import (
    LARGEST,
    PICTURE,
    TOKENS,
    VECTOR,
    Draw,
    Maker,
    axis,
    bent,
    channels_first,
    mixed,
    mixed_and_bent,
    width,
)

__all__ = ["DRAWS", "closed", "opened"]


def again(maker: Maker, i: int) -> int | None:
    """A layer that is there already, called once more."""
    fitting = [
        n for n, m in maker.network.named_children()
        if isinstance(m, nn.Conv2d if channels_first(maker.shape(i)) else nn.Linear)
        and m.weight.shape[1] * getattr(m, "groups", 1) == width(maker, i)
    ]  # fmt: skip
    if not fitting:
        return None
    name = maker.dice.choice(fitting)
    return maker.add(f"{name} again({i})", lambda net, v: net.part(name, v[i]))


def grouped(maker: Maker, i: int) -> int | None:
    """A convolution with channel groups; as many as channels: a depthwise one."""
    inputs = width(maker, i)
    parts = [g for g in (2, 3, 4, inputs) if inputs % g == 0 and g > 1]
    if not parts:
        return None
    count = maker.dice.choice(parts)
    outputs = count * maker.dice.choice([1, 1, 2])
    name = maker.own("grouped", nn.Conv2d(inputs, outputs, 3, padding=1, groups=count))
    return maker.add(f"{name}({i}) in {count}", lambda net, v: net.part(name, v[i]))


def grown(maker: Maker, i: int) -> int | None:
    """A transposed convolution."""
    if 4 * math.prod(maker.shape(i)) > LARGEST:
        return None
    name = maker.own("up", nn.ConvTranspose2d(width(maker, i), maker.dice.choice([2, 4, 5]), 2, stride=2))
    return maker.add(f"{name}({i})", lambda net, v: net.part(name, v[i]))


def normed(maker: Maker, i: int) -> int:
    """A norm with statistics or scales of its own."""
    count, dice = width(maker, i), maker.dice
    parts: list[nn.Module] = [nn.BatchNorm2d(count), nn.BatchNorm2d(count), nn.InstanceNorm2d(count, affine=True)]
    parts += [nn.GroupNorm(g, count) for g in (1, 2, 3, count) if count % g == 0]
    if not channels_first(maker.shape(i)):
        parts = [nn.LayerNorm(count)]
        if len(maker.shape(i)) == VECTOR:
            parts.append(nn.BatchNorm1d(count))
    if min(maker.shape(i)[1:], default=2) < 2:  # InstanceNorm of one pixel is no statistic
        parts = [p for p in parts if not isinstance(p, nn.InstanceNorm2d)]
    name = maker.own("norm", dice.choice(parts))
    return maker.add(
        f"{type(maker.network.get_submodule(name)).__name__} {name}({i})", lambda net, v: net.part(name, v[i])
    )


def sloped(maker: Maker, i: int) -> int:
    """A PReLU."""
    name = maker.own("slope", nn.PReLU(maker.dice.choice([1, maker.shape(i)[0]])))
    return maker.add(f"prelu {name}({i})", lambda net, v: net.part(name, v[i]))


def scaled(maker: Maker, i: int) -> int:
    """A loose tensor, a number a channel (or for every place), times or plus the value."""
    shape = [1] * len(maker.shape(i))
    at = axis(maker, i) - 1
    shape[at] = width(maker, i)
    if maker.dice.random() < 0.3:
        shape = list(maker.shape(i))
    if maker.dice.random() < 0.4:
        shape = [1, *shape]
    name, plus = maker.keep("loose", torch.rand(shape) + 0.5), maker.dice.random() < 0.5
    return maker.add(
        f"{name} {'+' if plus else '*'} {i}", lambda net, v: v[i] + net.loose(name) if plus else net.loose(name) * v[i]
    )


def smaller(maker: Maker, i: int) -> int | None:
    """Pooling."""
    if min(maker.shape(i)[1:]) < 4:
        return None
    best = maker.dice.random() < 0.5
    return maker.add(f"pool({i})", lambda net, v: F.max_pool2d(v[i], 2) if best else F.avg_pool2d(v[i], 2))


def larger(maker: Maker, i: int) -> int | None:
    """Interpolation."""
    if 4 * math.prod(maker.shape(i)) > LARGEST:
        return None
    return maker.add(f"interpolate({i})", lambda net, v: F.interpolate(v[i], scale_factor=2.0))


def combined(maker: Maker, i: int) -> int | None:
    """Two values of one shape, entry by entry; where there is none, a layer makes one."""
    alike = [j for j in range(len(maker.values)) if maker.shape(j) == maker.shape(i) and j != i]
    j = maker.dice.choice(alike) if alike and maker.dice.random() < 0.6 else mixed(maker, i, width(maker, i))
    kind = maker.dice.choice(["+", "-", "gate", "max", "where"])

    def step(net: nn.Module, v: list[Tensor]) -> Tensor:
        if kind == "gate":
            return v[i] * torch.sigmoid(v[j])
        if kind == "max":
            return torch.maximum(v[i], v[j])
        if kind == "where":
            return torch.where(v[i] > 0, v[i], 0.5 * v[j])
        return v[i] + v[j] if kind == "+" else v[i] - v[j]

    return maker.add(f"{i} {kind} {j}", step)


def joined(maker: Maker, i: int) -> int | None:
    """A concatenation with another value (of a layer, if none fits) along any dimension."""
    rank = len(maker.shape(i))
    dim = maker.dice.choice([axis(maker, i), axis(maker, i), maker.dice.randint(1, rank)])
    fits = [
        j for j in range(len(maker.values))
        if len(maker.shape(j)) == rank
        and all(a == b for d, (a, b) in enumerate(zip(maker.shape(i), maker.shape(j), strict=True), 1) if d != dim)
    ]  # fmt: skip
    j = maker.dice.choice(fits) if maker.dice.random() < 0.7 else mixed(maker, i, width(maker, i))
    if math.prod(maker.shape(i)) + math.prod(maker.shape(j)) > LARGEST:
        return None
    order = [i, j] if maker.dice.random() < 0.5 else [j, i]
    return maker.add(f"cat{order} along {dim}", lambda net, v: torch.cat([v[k] for k in order], dim))


def stacked(maker: Maker, i: int) -> int | None:
    """Two values of one shape side by side in a new dimension, then flattened into one that was."""
    alike = [j for j in range(len(maker.values)) if maker.shape(j) == maker.shape(i)]
    if 2 * math.prod(maker.shape(i)) > LARGEST:
        return None
    j, rank = maker.dice.choice(alike), len(maker.shape(i))
    dim = maker.dice.randint(1, rank)
    return maker.add(f"stack({i}, {j}) at {dim}", lambda net, v: torch.stack([v[i], v[j]], dim).flatten(dim, dim + 1))


def split(maker: Maker, i: int) -> int | None:
    """Two pieces, both values of their own; or combined at once where they are equal."""
    count, at, dice = width(maker, i), axis(maker, i), maker.dice
    if count < 2:
        return None
    kind = dice.choice(["sizes", "chunk", "each"])
    first = dice.randint(1, count - 1) if kind == "sizes" else -(-count // 2)
    kind = "sizes" if first * 2 != count and kind == "each" else kind

    def pieces(x: Tensor) -> tuple[Tensor, ...]:
        if kind == "chunk":
            return tuple(x.chunk(2, at))
        return tuple(torch.split(x, [first, count - first] if kind == "sizes" else first, at))

    if first * 2 == count and dice.random() < 0.6:
        return maker.add(
            f"halves {kind} of {i} multiplied", lambda net, v: pieces(v[i])[0] * torch.tanh(pieces(v[i])[1])
        )
    maker.add(f"first {first} {kind} of {i}", lambda net, v: pieces(v[i])[0])
    return maker.add(f"the rest of {i}", lambda net, v: pieces(v[i])[1])


def window(maker: Maker, i: int) -> int | None:
    """A slice of the channels or of another dimension."""
    dim = maker.dice.choice([axis(maker, i), maker.dice.randint(1, len(maker.shape(i)))])
    size = maker.shape(i)[dim - 1]
    if size < 2:
        return None
    start = maker.dice.randint(0, size - 1)
    stop = maker.dice.choice([maker.dice.randint(start + 1, size), size])
    begin = start - size if maker.dice.random() < 0.3 else start
    index = (slice(None),) * dim + (slice(begin, None if stop == size else stop),)
    return maker.add(f"{i}[{begin}:{stop}] along {dim}", lambda net, v: v[i][index])


def glued(maker: Maker, i: int) -> int | None:
    """A gated linear unit."""
    if width(maker, i) % 2:
        return None
    at = axis(maker, i)
    return maker.add(f"glu({i})", lambda net, v: F.glu(v[i], at))


def shuffled(maker: Maker, i: int) -> int | None:
    """Channels dealt out over groups."""
    count = width(maker, i)
    parts = [g for g in (2, 3, 4) if count % g == 0]
    if not parts:
        return None
    g, (_, high, wide) = maker.dice.choice(parts), maker.shape(i)
    if maker.dice.random() < 0.5:
        return maker.add(f"shuffle({i}) in {g}", lambda net, v: F.channel_shuffle(v[i], g))
    return maker.add(
        f"shuffle by hand({i}) in {g}",
        lambda net, v: v[i].view(-1, g, count // g, high, wide).transpose(1, 2).reshape(-1, count, high, wide),
    )


def pixels(maker: Maker, i: int) -> int | None:
    """Pixel shuffle."""
    count, high, wide = maker.shape(i)
    if count % 4 == 0:
        return maker.add(f"pixel shuffle({i})", lambda net, v: F.pixel_shuffle(v[i], 2))
    if high % 2 == 0 and wide % 2 == 0:
        return maker.add(f"pixel unshuffle({i})", lambda net, v: F.pixel_unshuffle(v[i], 2))
    return None


def squeezed(maker: Maker, i: int) -> int:
    """Squeeze and excite: the picture times gates computed from its means."""
    count, inner = width(maker, i), maker.dice.choice([2, 3])
    down, up = maker.own("down", nn.Linear(count, inner)), maker.own("raise", nn.Linear(inner, count))
    return maker.add(
        f"squeeze({i})",
        lambda net, v: v[i] * torch.sigmoid(net.part(up, F.relu(net.part(down, v[i].mean((2, 3))))))[:, :, None, None],
    )


def padded(maker: Maker, i: int) -> int | None:
    """Zeros beside the channels or around the picture."""
    if 2 * math.prod(maker.shape(i)) > LARGEST:
        return None
    sides = maker.dice.choice([(1, 1), (0, 0, 1, 1), (0, 0, 0, 0, 1, 2)])
    if not channels_first(maker.shape(i)):
        sides = maker.dice.choice([(1, 2), (0, 1)])
    return maker.add(f"pad({i}, {sides})", lambda net, v: F.pad(v[i], sides))


def repeated(maker: Maker, i: int) -> int | None:
    """Channels repeated."""
    if 2 * math.prod(maker.shape(i)) > LARGEST:
        return None
    at = axis(maker, i)
    times = [2 if d == at else 1 for d in range(len(maker.shape(i)) + 1)]
    apart = maker.dice.random() < 0.5
    return maker.add(f"repeat({i})", lambda net, v: v[i].repeat_interleave(2, at) if apart else v[i].repeat(*times))


def reversed_(maker: Maker, i: int) -> int:
    """Channels in reverse."""
    at, kind = axis(maker, i), maker.dice.choice(["flip", "roll", "alone"])

    def step(net: nn.Module, v: list[Tensor]) -> Tensor:
        if kind == "alone":
            return v[i] + v[i].select(at, 0).unsqueeze(at)
        return v[i].flip(at) if kind == "flip" else v[i].roll(1, at)

    return maker.add(f"{kind}({i})", step)


def averaged(maker: Maker, i: int) -> int:
    """A mean over some dimensions, the channels too at times; broadcast back at times."""
    rank = len(maker.shape(i))
    dims = maker.dice.choice([(axis(maker, i),), tuple(d for d in range(1, rank + 1) if d != axis(maker, i)) or (1,)])
    return maker.add(f"{i} - mean({dims})", lambda net, v: v[i] - v[i].mean(dims, keepdim=True))


def parted(maker: Maker, i: int) -> int | None:
    """Channels viewed as parts, a mean or softmax over one side, and back."""
    count = width(maker, i)
    if channels_first(maker.shape(i)) or count % 2:
        return None
    side, soft = maker.dice.choice([-1, -2]), maker.dice.random() < 0.5

    def parts(x: Tensor) -> Tensor:
        made: Tensor = x.unflatten(-1, (2, count // 2))  # type: ignore[no-untyped-call]
        return made

    if soft:
        return maker.add(
            f"softmax over part {side} of {i}",
            lambda net, v: torch.softmax(parts(v[i]), side).flatten(-2),
        )
    return maker.add(f"mean over part {side} of {i}", lambda net, v: parts(v[i]).mean(side))


def opened(maker: Maker) -> None:
    """A first layer behind every input."""
    for i in range(len(maker.values)):
        mixed_and_bent(maker, i)


def closed(maker: Maker, inputs: int, classes: int) -> None:
    """Heads over the values that nothing has read yet, summed; sometimes a second output."""
    newest = list(range(inputs, len(maker.values)))[-3:]
    heads = []
    for i in newest:
        j = i if len(maker.shape(i)) == VECTOR else pooled(maker, i)
        heads.append(mixed(maker, j, classes))
    total = maker.add(f"sum{heads}", lambda net, v: torch.stack([v[h] for h in heads]).sum(0))
    if maker.dice.random() < 0.2:
        maker.add("twice", lambda net, v: 2 * v[total])
        maker.network.outputs = 2


ANY = (mixed_and_bent, bent, normed, scaled, combined, joined, stacked, split, window, glued, padded, repeated)
PICTURES = (
    mixed_and_bent, mixed_and_bent, grouped, grouped, grown, sloped, smaller, larger, shuffled, pixels, squeezed,
    as_tokens, pooled, flattened, told,
)  # fmt: skip
DRAWS: tuple[Draw, ...] = (
    *(Draw(rank, make) for rank in (PICTURE, TOKENS, VECTOR) for make in (*ANY, again, reversed_, averaged)),
    *(Draw(PICTURE, make) for make in PICTURES),
    *(Draw(TOKENS, make) for make in (mixed_and_bent, parted, pooled, flattened, one_token, with_token, told)),
    *(Draw(TOKENS, make) for make in (along_tokens, perceptron, perceptron, *ATTENTION)),
    *(Draw(VECTOR, make) for make in (mixed_and_bent, parted, as_picture, perceptron)),
)
