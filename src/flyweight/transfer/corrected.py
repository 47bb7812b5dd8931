"""A frozen network and a small one beside it: f(x) + Δf(x), in one graph.

What it does      Adds the answers of a small corrector, the only part that learns, to those of a frozen source.
When to use       A compressed network that lacks a little, or a new task near the old one, while the source must stay what it
                  is: shipped already, shared by others, proven.
When not          The source may be trained: what `distill` gives back costs no second network.
Cost to run       The corrector's share of multiply-accumulates, 5 % by default, and its calls.
What it changes   The source's parameters require no gradient any more, and it stays in eval mode.
Example           both = fw.Corrected(small, fw.corrector_like(small, images[:2])); train(both.corrector.parameters())
Known problems    Outputs are added as they are: logits add up, probabilities do not. One tensor in and out of the sum. The mean
                  over tokens that a corrector of inner values reads knows of no mask.
Source            The residual form of He et al. 2015, arXiv:1512.03385, eq. 1, with the source as the shortcut; inner values of
                  a frozen network: Sung Cho Bansal 2022, arXiv:2206.06522 (ladder side-tuning).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, fx, nn

from flyweight.data import Batch
from flyweight.data.binding import bind_example
from flyweight.errors import ModelError, UsageError
from flyweight.graph.cost import total_macs
from flyweight.graph.heard import heard
from flyweight.graph.operators import CONVOLUTIONS, tables
from flyweight.graph.trace import own_copy, trace

__all__ = ["Corrected", "Images", "Inner", "Tokens", "Vectors", "corrector_like"]

WORD = 16  # numbers that a token becomes: looking them up multiplies nothing, but every one costs a table's column
WIDEST = 1024  # channels of a corrector, however much work is allowed
LAYERS = (nn.Linear, *CONVOLUTIONS)


class Corrected(nn.Module):
    """source(x) + corrector(x), for sources that give one tensor; only the corrector learns.

    Both are called with the same inputs, or a corrector with `reads`, names of the source's layers, with what flows into these.
    They must answer in one shape; ModelError says so where they do not.
    """

    def __init__(self, source: nn.Module, corrector: nn.Module) -> None:
        super().__init__()
        for name, part in (("source", source), ("corrector", corrector)):
            if not isinstance(part, nn.Module):
                raise UsageError(f"{name} is a {type(part).__name__}, not a torch.nn.Module", fix="give the module")
        if source is corrector:
            raise UsageError(
                "source and corrector are one module", why="the source is frozen", fix="corrector_like(source, …)"
            )
        self.source, self.corrector = source.requires_grad_(False), corrector
        self.source.eval()

    def train(self, mode: bool = True) -> Corrected:
        """Sets the mode of the corrector; the source keeps that of answering."""
        super().train(mode)
        self.source.eval()
        return self

    def forward(self, *inputs: Tensor) -> Tensor:
        """The sum of both answers."""
        names: Sequence[str] = getattr(self.corrector, "reads", ())
        with heard({name: self.source.get_submodule(name) for name in names}) as seen:
            answer = self.source(*inputs)
        change = self.corrector(*([seen[name][-1] for name in names] or inputs))
        _check_alike(answer, change)
        return answer + change  # type: ignore[no-any-return]


def _check_alike(answer: Any, change: Any) -> None:
    for name, value in (("source", answer), ("corrector", change)):
        if not isinstance(value, Tensor):
            raise ModelError(
                f"the {name} answers a {type(value).__name__}, not one tensor",
                fix="wrap it so that it gives the logits alone",
            )
    if answer.ndim != change.ndim or any(a != b for a, b in zip(answer.shape[1:], change.shape[1:], strict=True)):
        raise ModelError(
            f"the corrector answers {_shown(change)}, the source {_shown(answer)}",
            fix="give a corrector whose outputs have the source's shape: corrector_like(source, example) makes one",
        )


def _shown(value: Tensor) -> str:
    return "×".join(map(str, value.shape))


class Vectors(nn.Module):
    """Two layers for vectors "rows in"; zero before it has learned."""

    def __init__(self, inputs: int, hidden: int, shape: Sequence[int]) -> None:
        super().__init__()
        self.first, self.last, self.shape = nn.Linear(inputs, hidden), _zero(hidden, shape), tuple(shape)

    def forward(self, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows *shape"]:
        """The correction."""
        return _shaped(self.last(torch.relu(self.first(x))), self.shape)


class Images(nn.Module):
    """Three strided 3x3 convolutions, two of them depthwise with a pointwise one behind; the mean over places; a linear layer."""

    def __init__(self, channels: int, width: int, shape: Sequence[int]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, 2, 1)
        self.over1, self.mix1 = nn.Conv2d(width, width, 3, 2, 1, groups=width), nn.Conv2d(width, width, 1)
        self.over2, self.mix2 = nn.Conv2d(width, width, 3, 2, 1, groups=width), nn.Conv2d(width, 2 * width, 1)
        self.last, self.shape = _zero(2 * width, shape), tuple(shape)

    def forward(self, x: Float[Tensor, "rows channels height width"]) -> Float[Tensor, "rows *shape"]:
        """The correction."""
        x = torch.relu(self.stem(x))
        x = torch.relu(self.mix1(self.over1(x)))
        x = torch.relu(self.mix2(self.over2(x)))
        return _shaped(self.last(x.mean((2, 3))), self.shape)


class Tokens(nn.Module):
    """The mean of small word vectors (of real tokens, where a mask says which), then two layers."""

    def __init__(self, vocabulary: int, hidden: int, shape: Sequence[int]) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, WORD)
        self.first, self.last, self.shape = nn.Linear(WORD, hidden), _zero(hidden, shape), tuple(shape)

    def forward(self, tokens: Int64[Tensor, "rows length"], mask: Tensor | None = None) -> Float[Tensor, "rows *shape"]:
        """The correction."""
        words = self.words(tokens)
        if mask is None:
            mean = words.mean(1)
        else:
            real = mask[:, :, None].to(words.dtype)
            mean = (words * real).sum(1) / real.sum(1).clamp_min(1e-9)
        return _shaped(self.last(torch.relu(self.first(mean))), self.shape)


class Inner(nn.Module):
    """What flows into layers of the source, as means over places or tokens; brought to one scale; two layers.

    In train mode the scale is that of the batch, and is learned for answering, as by any batch norm.
    """

    def __init__(self, reads: Sequence[str], columns: int, hidden: int, shape: Sequence[int]) -> None:
        super().__init__()
        self.reads, self.shape = tuple(reads), tuple(shape)
        self.scale = nn.BatchNorm1d(columns, affine=False)
        self.first, self.last = nn.Linear(columns, hidden), _zero(hidden, shape)

    def forward(self, *values: Tensor) -> Float[Tensor, "rows *shape"]:
        """The correction, from one value "rows channels *places", "rows tokens channels" or "rows columns" a layer."""
        columns = torch.cat([_mean(value) for value in values], 1)
        return _shaped(self.last(torch.relu(self.first(self.scale(columns)))), self.shape)


def _mean(value: Tensor) -> Float[Tensor, "rows columns"]:
    if value.ndim == 3:
        return value.mean(1)
    return value if value.ndim == 2 else value.mean(tuple(range(2, value.ndim)))


def _zero(inputs: int, shape: Sequence[int]) -> nn.Linear:
    """A layer that answers 0: a fresh corrector changes nothing."""
    layer = nn.Linear(inputs, math.prod(shape))
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _shaped(rows: Tensor, shape: Sequence[int]) -> Tensor:
    return rows if len(shape) == 1 else rows.reshape(-1, *shape)


def corrector_like(source: nn.Module, example: Any, macs: float = 0.05, reads: str = "layers") -> nn.Module:
    """An untrained corrector for `source` that takes at most the share `macs` of its multiply-accumulates.

    `example`: one call (a tensor, a tuple, a dict or (args, kwargs)), samples in dimension 0. `reads` "layers": what flows into
    the source's convolutions and linear layers, as means over places, and two layers behind; it sees what the source sees, and
    corrects more (`benchmarks/delta.py pictures`). "inputs": the source's inputs alone, so that it stands beside any source of
    these: images "n c h w" get strided convolutions, vectors "n d" two layers, token numbers "n t" (and a mask beside them) the
    mean of word vectors and two layers. Each as wide as the share allows. It answers 0 until it has learned. Raises UsageError
    for a source that is not in float32, other inputs, outputs that are no vector a sample, or a share too small for any, and
    TraceError for a source that cannot become a graph.
    """
    if not isinstance(source, nn.Module):
        raise UsageError(f"the source is a {type(source).__name__}, not a torch.nn.Module", fix="give the model itself")
    if others := {p.dtype for p in source.parameters() if p.is_floating_point()} - {torch.float32}:
        fix = "source.float(), and an example of that type"
        raise UsageError(f"the source computes in {others.pop()}, a corrector learns in float32", fix=fix)
    if reads not in ("inputs", "layers"):
        raise UsageError(f"reads is {reads!r}", fix='"layers" (what flows into the source\'s layers) or "inputs"')
    if isinstance(macs, bool) or not isinstance(macs, (int, float)) or not 0 < macs < math.inf:
        raise UsageError(f"macs is {macs!r}", fix="a share of the source's multiply-accumulates, such as 0.05")
    call = bind_example(source, example)
    graph = trace(source, call.args, call.kwargs).module
    with torch.no_grad():
        answer = graph(*call.inputs)
    if not isinstance(answer, Tensor) or answer.ndim < 2:
        raise UsageError("the source does not answer one vector a sample", fix=OWN)
    shape = tuple(answer.shape[1:])
    build, work = _inner(source, call, shape) if reads == "layers" else _form(graph, call.inputs, shape)
    width, allowed = 0, macs * total_macs(graph)
    while width < WIDEST and work(width + 1) <= allowed:
        width += 1
    if not width:
        raise UsageError(
            f"a share of {macs:g} of the source allows {int(allowed):,} multiply-accumulates a sample; "
            f"the smallest corrector takes {work(1):,}",
            fix="allow a larger share: macs=...",
        )
    return build(width)


OWN = "write a corrector of your own, any module with the source's inputs and output shape, and give it to Corrected"


def _inner(
    source: nn.Module, call: Batch, shape: tuple[int, ...]
) -> tuple[Callable[[int], nn.Module], Callable[[int], int]]:
    """As `_form`, for what flows into layers of the source, in their last call, one row a sample."""
    own, _ = own_copy(source)
    layers = {name: part for name, part in own.named_modules() if isinstance(part, LAYERS)}
    with heard(layers) as seen, torch.no_grad():
        own(*call.args, **call.kwargs)
    last, rows = {name: values[-1] for name, values in seen.items()}, len(call.inputs[0])
    columns = {name: _mean(x).shape[1] for name, x in last.items() if x.ndim >= 2 and len(x) == rows}
    if not columns:
        raise UsageError(
            "no convolution or linear layer of the source reads one row a sample", fix='reads="inputs", or ' + OWN
        )
    total, outputs = sum(columns.values()), math.prod(shape)
    return lambda w: Inner(tuple(columns), total, w, shape), lambda w: w * (total + outputs)


def _form(
    graph: fx.GraphModule, inputs: Sequence[Tensor], shape: tuple[int, ...]
) -> tuple[Callable[[int], nn.Module], Callable[[int], int]]:
    """(the corrector of a width, its multiply-accumulates a sample)."""
    first, outputs = inputs[0], math.prod(shape)
    if len(inputs) == 1 and first.is_floating_point() and first.ndim == 2:
        columns = first.shape[1]
        return lambda w: Vectors(columns, w, shape), lambda w: w * (columns + outputs)
    if len(inputs) == 1 and first.is_floating_point() and first.ndim == 4:
        channels = first.shape[1]
        return lambda w: Images(channels, w, shape), lambda w: _image_macs(w, first.shape[1:], outputs)
    known = [table.num_embeddings for table in tables(graph).values()]
    masked = len(inputs) == 1 or (len(inputs) == 2 and inputs[1].shape == first.shape)
    if not first.is_floating_point() and first.ndim == 2 and masked and known:
        return lambda w: Tokens(max(known), w, shape), lambda w: w * (WORD + outputs)
    raise UsageError(
        f"there is no corrector for inputs {', '.join(_shown(x) for x in inputs)}",
        why="it knows images (n, c, h, w), vectors (n, d) and token numbers (n, t), with a mask or without",
        fix=OWN,
    )


def _image_macs(width: int, sizes: Sequence[int], outputs: int) -> int:
    """Multiply-accumulates of `Images` for one sample of sizes (channels, height, width)."""
    channels, *place = sizes
    positions = []
    for _ in range(3):
        place = [(side + 1) // 2 for side in place]
        positions.append(math.prod(place))
    stem, first, second = positions
    convolutions = 9 * channels * width * stem + (9 + width) * width * first + (9 + 2 * width) * width * second
    return convolutions + 2 * width * outputs
