"""Which channels must be kept or cut together, and why others are left alone.

Every value that flows through the graph may carry one *axis*: a run of channels along one of its dimensions, each channel
`block` neighbours wide (a flattened 8x8 map makes blocks of 64). Rules, one small function an operator, say what becomes
of it; adding two values couples their axes. What no rule knows freezes the axes that touch it, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from flyweight.graph.operators import CONVOLUTIONS, NORMS, module_of, sharers, sizes

__all__ = ["Group", "Literal", "Use", "groups"]


class Use(NamedTuple):
    """A layer or norm that holds `block` neighbouring columns (or entries) for each channel of a group."""

    layer: str
    block: int


class Literal(NamedTuple):
    """A size written into a reshape: argument `place` of the size list of `node` holds channels * block."""

    node: str
    place: int
    block: int


@dataclass(frozen=True)
class Group:
    """Channels that live and die together. `frozen`: why nothing may be cut, "" if something may."""

    name: str
    size: int
    producers: tuple[str, ...]  # layers whose output rows are the channels
    norms: tuple[Use, ...]
    consumers: tuple[Use, ...]  # layers whose input columns read the channels; block counts matrix columns
    literals: tuple[Literal, ...]
    frozen: str = ""


class Tag(NamedTuple):
    """The axis a value carries: `root` names it, it runs along `dim`, each channel is `block` entries."""

    root: int
    dim: int
    block: int


@dataclass
class _Axis:
    size: int
    producers: list[str] = field(default_factory=list)
    norms: list[Use] = field(default_factory=list)
    consumers: list[Use] = field(default_factory=list)
    literals: list[Literal] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


class _Walk:
    """The axes found so far: a union-find, alive only inside `groups`."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.parent: list[int] = []
        self.axes: dict[int, _Axis] = {}
        self.tags: dict[str, Tag | None] = {}
        self.written: dict[str, int] = {}  # layer -> root of its outputs
        self.read: dict[str, int] = {}  # layer or norm -> root of its inputs
        self.unknown: set[str] = set()  # layers and norms that read a value without an axis somewhere

    def new(self, size: int) -> int:
        root = len(self.parent)
        self.parent.append(root)
        self.axes[root] = _Axis(size)
        return root

    def find(self, root: int) -> int:
        while self.parent[root] != root:
            root = self.parent[root]
        return root

    def axis(self, root: int) -> _Axis:
        return self.axes[self.find(root)]

    def couple(self, a: int, b: int) -> None:
        a, b = sorted((self.find(a), self.find(b)))
        if a == b:
            return
        if self.axes[a].size != self.axes[b].size:
            for axis in (self.axes[a], self.axes[b]):
                axis.reasons.append("channels of different counts are read by one layer")
            return
        self.parent[b] = a
        kept, gone = self.axes[a], self.axes.pop(b)
        for name in ("producers", "norms", "consumers", "literals", "reasons"):
            getattr(kept, name).extend(getattr(gone, name))

    def freeze(self, tag: Tag | None, reason: str) -> None:
        if tag is not None:
            self.axis(tag.root).reasons.append(reason)

    def tag(self, argument: object) -> Tag | None:
        return self.tags.get(argument.name) if isinstance(argument, fx.Node) else None


Rule = Callable[[_Walk, fx.Node, Tag], Tag | None]


def groups(graph: fx.GraphModule) -> tuple[Group, ...]:
    """All groups of coupled channels in graph order, frozen ones included with the reason.

    Needs the sizes that tracing recorded (`node.meta["val"]`): call it on a traced graph before any surgery.
    """
    walk = _Walk(graph)
    for node in graph.graph.nodes:
        walk.tags[node.name] = _visit(walk, node)
    for name in sorted(walk.unknown & set(walk.read)):
        walk.axis(walk.read[name]).reasons.append(f"{name!r} also reads a value whose channels are not known")
    _freeze_shared_weights(walk)
    return tuple(_group(axis) for _, axis in sorted(walk.axes.items()) if axis.producers)


def _group(axis: _Axis) -> Group:
    reasons = list(dict.fromkeys(axis.reasons))
    if not axis.consumers and not reasons:
        reasons = ["no layer reads these channels"]
    return Group(
        name=axis.producers[0],
        size=axis.size,
        producers=tuple(dict.fromkeys(axis.producers)),
        norms=tuple(dict.fromkeys(axis.norms)),
        consumers=tuple(dict.fromkeys(axis.consumers)),
        literals=tuple(dict.fromkeys(axis.literals)),
        frozen="; ".join(reasons[:3]),
    )


def _visit(walk: _Walk, node: fx.Node) -> Tag | None:
    if node.op == "placeholder":
        return None
    if node.op == "output":
        for source in node.all_input_nodes:
            walk.freeze(walk.tag(source), "it is an output of the model")
        return None
    module = module_of(walk.graph, node)
    if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
        return _linear_operator(walk, node, module)
    tagged = [walk.tag(source) for source in node.all_input_nodes]
    first = walk.tag(node.args[0]) if node.args else None
    if isinstance(module, NORMS) and first is None:
        walk.unknown.add(str(node.target))
    if not any(tagged):
        return None
    rule = MODULE_RULES.get(type(module)) if module is not None else FUNCTION_RULES.get(_operator(node))
    if rule is None or first is None:
        what = type(module).__name__ if module is not None else _operator(node)
        return _frozen(walk, node, f"no rule for {what} at {node.name!r}")
    return rule(walk, node, first)


def _frozen(walk: _Walk, node: fx.Node, reason: str) -> Tag | None:
    """Freezes every axis that comes in; the value itself carries none."""
    for source in node.all_input_nodes:
        walk.freeze(walk.tag(source), reason)
    return None


def _operator(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket).removeprefix("aten.")
    return getattr(target, "__name__", str(target))


def _linear_operator(walk: _Walk, node: fx.Node, module: nn.Module) -> Tag | None:
    """A weight matrix: reads one axis, starts another."""
    name = str(node.target)
    weight = module.weight
    assert isinstance(weight, Tensor)
    source, rank = walk.tag(node.args[0]), len(sizes(node))
    linear = isinstance(module, nn.Linear)
    if not linear and module.groups != 1:
        walk.freeze(source, f"{name!r} is a grouped convolution, whose rule comes with a later version")
        return None
    dim = rank - 1 if linear else 1
    if source is not None and (source.dim != dim or (source.block != 1 and not linear)):
        walk.freeze(source, f"{name!r} does not read them as channels")
        source = None
    if source is None:
        walk.unknown.add(name)
    else:
        walk.axis(source.root).consumers.append(Use(name, source.block * math.prod(weight.shape[2:])))
        _read(walk, name, source)
    if name not in walk.written:
        walk.written[name] = walk.new(weight.shape[0])
        walk.axis(walk.written[name]).producers.append(name)
    return Tag(walk.written[name], dim, 1)


def _read(walk: _Walk, name: str, tag: Tag) -> None:
    """All values that one layer or norm reads have the same channels."""
    if name in walk.read:
        walk.couple(walk.read[name], tag.root)
    walk.read[name] = tag.root


def _freeze_shared_weights(walk: _Walk) -> None:
    """Layers and norms whose tensors something else reads too."""
    for name, names in sharers(walk.graph).items():
        for roots in (walk.written, walk.read):
            if name in roots:
                walk.axis(roots[name]).reasons.append(f"weights are shared by {', '.join(names)}")


# ---- rules: one small function an operator; they return what the node's own value carries


def _pointwise(walk: _Walk, node: fx.Node, tag: Tag) -> Tag | None:
    """The same function of every entry; bounds that are values of their own may have channels."""
    if len(node.all_input_nodes) > 1:
        return _frozen(walk, node, f"no rule for {_operator(node)} of several values at {node.name!r}")
    return tag


def _norm(walk: _Walk, node: fx.Node, tag: Tag) -> Tag | None:
    if tag.dim != 1:
        return _frozen(walk, node, f"{node.target!r} normalises another dimension")
    walk.axis(tag.root).norms.append(Use(str(node.target), tag.block))
    _read(walk, str(node.target), tag)
    return tag


def _spatial(walk: _Walk, node: fx.Node, tag: Tag) -> Tag | None:
    """Pooling over the dimensions behind the channels."""
    if tag.dim != 1 or len(sizes(node)) < 3:
        return _frozen(walk, node, f"{node.name!r} pools over the channels")
    return tag


def _sum(walk: _Walk, node: fx.Node, tag: Tag) -> Tag | None:
    """Adding a number keeps the axis; adding a value of the same shape couples the two axes."""
    other = node.args[1]
    if not isinstance(other, fx.Node):
        return tag
    second = walk.tag(other)
    left, right = node.args[0], other
    assert isinstance(left, fx.Node)
    if second is None or second[1:] != tag[1:] or sizes(left)[1:] != sizes(right)[1:]:
        return _frozen(walk, node, f"{node.name!r} adds a value whose channels are not known")
    walk.couple(tag.root, second.root)
    return tag


def _number_only(walk: _Walk, node: fx.Node, tag: Tag) -> Tag | None:
    """Multiplying by a number keeps the axis."""
    if isinstance(node.args[1], fx.Node):
        return _frozen(walk, node, f"no rule for {_operator(node)} of two values at {node.name!r}")
    return tag


def _mean(walk: _Walk, node: fx.Node, tag: Tag) -> Tag | None:
    """A mean over other dimensions; over the channels it would change its divisor."""
    dims, keep = _argument(node, 1, "dim"), bool(_argument(node, 2, "keepdim"))
    source = node.args[0]
    assert isinstance(source, fx.Node)
    rank = len(sizes(source))
    if not isinstance(dims, (list, tuple)) or tag.dim in {int(d) % rank for d in dims}:
        return _frozen(walk, node, f"{node.name!r} averages over the channels")
    gone = 0 if keep else sum(int(d) % rank < tag.dim for d in dims)
    return Tag(tag.root, tag.dim - gone, tag.block)


def _view(walk: _Walk, node: fx.Node, tag: Tag) -> Tag | None:
    """A reshape that keeps each channel's entries together, whole, and in order."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = sizes(source), sizes(node)
    place = _place(before, after, tag.dim)
    if place is None:
        return _frozen(walk, node, f"{node.name!r} takes the channels apart")
    dim, factor = place
    block = tag.block * factor
    written = node.args[1] if len(node.args) > 1 else None
    if isinstance(written, (list, tuple)) and isinstance(written[dim], int):
        if written[dim] != after[dim]:
            return _frozen(walk, node, f"{node.name!r} holds a size that cannot be rewritten")
        walk.axis(tag.root).literals.append(Literal(node.name, dim, block))
    return Tag(tag.root, dim, block)


def _place(
    before: tuple[int | torch.SymInt, ...], after: tuple[int | torch.SymInt, ...], dim: int
) -> tuple[int, int] | None:
    """Where dimension `dim` of `before` lies in `after`, and how many entries each of its indices became there."""
    if not before or not after or str(before[0]) != str(after[0]) or dim == 0:
        return None
    if not all(isinstance(size, int) for size in (*before[1:], *after[1:])):
        return None
    old, new = [0, *(int(s) for s in before[1:])], [0, *(int(s) for s in after[1:])]
    ahead, behind = math.prod(old[1:dim]), math.prod(old[dim + 1 :])
    for e in range(1, len(new)):
        rest = math.prod(new[e + 1 :])
        if math.prod(new[1:e]) == ahead and behind % rest == 0 and new[e] == old[dim] * (behind // rest):
            return e, behind // rest
    return None


def _argument(node: fx.Node, index: int, name: str) -> object:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name)


POINTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU,
    nn.Softplus, nn.Mish, nn.Hardsigmoid, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity,
)  # fmt: skip
POOL_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
POINTWISE_FUNCTIONS = (
    "relu", "relu6", "gelu", "silu", "hardswish", "hardtanh", "sigmoid", "tanh", "leaky_relu", "elu", "softplus", "mish",
    "hardsigmoid", "clamp", "clamp_min", "dropout", "feature_dropout", "contiguous", "clone", "detach", "abs", "neg",
    "exp", "to", "alias",
)  # fmt: skip
POOL_FUNCTIONS = (
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
)  # fmt: skip

MODULE_RULES: Mapping[type[nn.Module] | None, Rule] = {
    **dict.fromkeys(POINTWISE_MODULES, _pointwise),
    **dict.fromkeys(POOL_MODULES, _spatial),
    **dict.fromkeys(NORMS, _norm),
    nn.Flatten: _view,
}
FUNCTION_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(POINTWISE_FUNCTIONS, _pointwise),
    **dict.fromkeys(POOL_FUNCTIONS, _spatial),
    **dict.fromkeys(("add", "sub"), _sum),
    **dict.fromkeys(("mul", "div"), _number_only),
    **dict.fromkeys(("view", "reshape", "flatten", "_unsafe_view"), _view),
    "mean": _mean,
}
