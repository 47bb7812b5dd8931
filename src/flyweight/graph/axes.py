"""Which channels must be kept or cut together, and why others are left alone.

The graph runs once on an example while labels run beside it (`labels`, `rules`): every output channel of a layer gets a
label, operators move labels about and tie those that must go together. Channels of one group are interchangeable: each
holds as many entries of the same tensors as any other, so any choice of them leaves a regular network. Whatever no rule
knows stays whole, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from flyweight.graph.calls import Call, Result, operator_name, unknown
from flyweight.graph.functional import arguments_of
from flyweight.graph.labels import FIXED, LARGEST_LOOSE, Held, Labels, Walk
from flyweight.graph.operators import Layer, layers, module_of, sharers
from flyweight.graph.rules import FUNCTIONS, MODULES
from flyweight.graph.written import Sizes, Written, counted, note_sizes

__all__ = ["Group", "Literal", "Slice", "Use", "groups", "rows_of"]

Numbers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class Use:
    """A layer that reads a group's channels: `columns[c]` are the columns of its matrix that read channel c."""

    layer: str
    columns: Numbers  # [channels, block]

    @property
    def block(self) -> int:
        """Columns a channel."""
        return int(self.columns.shape[1])


@dataclass(frozen=True, eq=False)
class Slice:
    """A dimension that shrinks with a group: `entries[c]` are channel c's indices along `dim` of a tensor.

    `owner` is a module's path, or with `tensor` "" the path of a loose tensor. `role`: writes, reads or carries.
    """

    owner: str
    tensor: str
    dim: int
    role: str
    entries: Numbers  # [channels, block]


@dataclass(frozen=True, eq=False)
class Literal:
    """A number written into the graph: at `path` of the node's arguments; channel c takes `counts[c]` from it."""

    node: str
    path: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that may be cut one by one, each with all that hangs on it. `frozen`: why nothing may be cut, or ""."""

    name: str
    size: int
    kind: str  # "channels" or "heads"
    producers: tuple[str, ...]  # layers whose outputs are the channels
    consumers: tuple[Use, ...]  # layers that read them and can make up for lost ones
    slices: tuple[Slice, ...]
    literals: tuple[Literal, ...]
    frozen: str = ""


def rows_of(group: Group, layer: str) -> Numbers | None:
    """The output rows of `layer` that are the group's channels, [channels, block]; None if it writes none of them."""
    return next((s.entries for s in group.slices if s.owner == layer and s.role == "writes"), None)


def groups(graph: fx.GraphModule, example: Sequence[Any]) -> tuple[Group, ...]:
    """All groups in graph order, frozen ones included with the reason. `example`: the placeholders' values, any batch."""
    walker = _Walker(graph)
    with torch.no_grad():
        walker.run(*_small(example))
    for name, names in sharers(graph).items():
        for held in walker.walk.held.values():
            if held.owner == name:
                walker.walk.freeze(held.labels, f"weights are shared by {', '.join(names)}")
    return _assembled(graph, walker)


def _small(example: Sequence[Any]) -> list[Any]:
    """Two rows are enough, and one would be taken for a size that broadcasts."""
    rows = [x.shape[0] for x in example if isinstance(x, Tensor) and x.ndim]
    batch = rows[0] if rows else 1
    index = torch.arange(2) % batch
    return [x[index] if isinstance(x, Tensor) and x.ndim and x.shape[0] == batch else x for x in example]


class _Walker(fx.Interpreter):
    """Runs values and labels side by side."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.graph_module = graph
        self.walk = Walk()
        self.labels: dict[fx.Node, Result] = {}
        self.sizes = Sizes(self.walk)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.labels[n] = self._visit(n, value)
        return value

    def _visit(self, node: fx.Node, value: Any) -> Result:
        if node.op == "placeholder":
            return None
        if node.op == "get_attr":
            return self._loose(str(node.target), value)
        if node.op == "output":
            for source in node.all_input_nodes:
                for labels in _flat(self.labels[source]):
                    self.walk.freeze(labels, "it is an output of the model")
            return None
        if operator_name(node) == "getitem":
            origin, index = node.args[0], node.args[1]
            parts = self.labels[origin] if isinstance(origin, fx.Node) else None
            return parts[index] if isinstance(parts, list) and isinstance(index, int) else None
        call = self._call(node, value)
        if not isinstance(value, Tensor) and not isinstance(value, (tuple, list)):
            return None  # a size: it is read from values, whatever they are
        module = call.module
        rule = MODULES.get(type(module)) if module is not None else FUNCTIONS.get(call.name)
        if rule is None:
            unknown(call)
            return None
        found = rule(call)
        note_sizes(self.sizes, call, found)
        return found

    def _loose(self, target: str, value: Any) -> Labels | None:
        usable = isinstance(value, Tensor) and value.is_floating_point() and 1 < value.numel() <= LARGEST_LOOSE
        if not usable:
            return None
        if target not in self.walk.loose:
            marks = self.walk.fresh(value.numel()).reshape(value.shape)
            self.walk.loose[target] = Labels(marks, tuple(value.shape), weak=True)
        return self.walk.loose[target]

    def _call(self, node: fx.Node, value: Any) -> Call:
        if isinstance(node.target, torch._ops.OpOverload):
            arguments = arguments_of(node)
        else:
            arguments = {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
        values = {k: fx.map_arg(a, lambda n: self.env[n]) for k, a in arguments.items()}
        labels = {k: _labels(a, self.labels) for k, a in arguments.items()}
        module = module_of(self.graph_module, node)
        name = type(module).__name__ if module is not None else operator_name(node)
        return Call(self.walk, node, name, values, labels, value, module)


def _flat(found: Result) -> list[Labels]:
    return [one for one in (found if isinstance(found, list) else [found]) if one is not None]


def _labels(argument: Any, known: Mapping[fx.Node, Result]) -> Any:
    if isinstance(argument, fx.Node):
        return known[argument]
    if isinstance(argument, (list, tuple)):
        return [_labels(one, known) for one in argument]
    return None


# ---- from labels to groups


@dataclass
class _Channel:
    """A class of labels: what it holds of which tensor, and why it may not go."""

    entries: dict[int, list[int]] = field(default_factory=dict)  # number of the slice -> indices
    reasons: list[str] = field(default_factory=list)
    heads: bool = False


def _assembled(graph: fx.GraphModule, walker: _Walker) -> tuple[Group, ...]:
    walk = walker.walk
    roots = walk.settled()
    held = list(walk.held.values())
    known = np.append(roots, FIXED)  # what always stays is the last one, also where there is nothing else
    lines = [known[h.labels.numpy()] for h in held]
    written = [line for h, line in zip(held, lines, strict=True) if h.role == "writes"]
    channels = {int(root): _Channel() for line in written for root in line if root != FIXED}
    for one, line in _loose_held(walk, roots, channels):
        held.append(one)
        lines.append(line)
    for i, line in enumerate(lines):
        for index, root in enumerate(line.tolist()):
            if root in channels:
                channels[root].entries.setdefault(i, []).append(index)
    numbers = counted(walker.sizes, roots, channels)
    for labels, reason in walk.reasons:
        for root in np.unique(roots[labels]).tolist():
            if root in channels and reason not in channels[root].reasons:
                channels[root].reasons.append(reason)
    for labels in walk.heads:
        for root in np.unique(roots[labels]).tolist():
            if root in channels:
                channels[root].heads = True
    return _grouped(graph, held, channels, numbers)


def _loose_held(walk: Walk, roots: Numbers, channels: Mapping[int, _Channel]) -> list[tuple[Held, Numbers]]:
    """The loose tensors that shrink, each with the classes along the dimension that does."""
    live = torch.zeros(len(roots) + 1, dtype=torch.bool)
    live[list(channels)] = True
    found = []
    for target, labels in walk.loose.items():
        marks = torch.from_numpy(roots).long()[labels.full]
        marks = torch.where(live[marks], marks, FIXED)
        dim = _cut_dimension(marks)
        if dim is not None:
            line = marks.movedim(dim, 0).reshape(marks.shape[dim], -1).max(1).values
            found.append((Held(target, "", dim, "carries", line), line.numpy()))
    return found


def _cut_dimension(marks: Tensor) -> int | None:
    """The dimension along which a loose tensor shrinks: every index holds at most one class."""
    if int(marks.max()) == FIXED:
        return None
    best, most = None, 0
    for d in range(marks.ndim):
        slabs = marks.movedim(d, 0).reshape(marks.shape[d], -1)
        high = slabs.max(1).values
        alike = (slabs == FIXED) | (slabs == high[:, None])
        count = len(np.unique(high[high != FIXED].numpy()))
        if bool(alike.all()) and count > most:
            best, most = d, count
    return best


def _grouped(
    graph: fx.GraphModule,
    held: Sequence[Held],
    channels: Mapping[int, _Channel],
    numbers: Sequence[tuple[Written, Mapping[int, int]]],
) -> tuple[Group, ...]:
    alike: dict[tuple[Any, ...], list[int]] = {}
    for root, channel in channels.items():
        shape = tuple((i, len(indices)) for i, indices in channel.entries.items())
        alike.setdefault((shape, tuple(channel.reasons)), []).append(root)
    present = layers(graph)
    taken: dict[str, int] = {}
    made = []
    for (_, reasons), roots in alike.items():
        found = _group(held, [channels[r] for r in roots], reasons, present)
        literals = tuple(
            Literal(w.node, w.path, tuple(counts.get(r, 0) for r in roots))
            for w, counts in numbers
            if any(counts.get(r, 0) for r in roots)
        )
        number = taken[found["name"]] = taken.get(found["name"], -1) + 1
        name = f"{found.pop('name')}[{number}]" if number else found.pop("name")
        made.append(Group(name=name, size=len(roots), literals=literals, **found))
    return tuple(made)


def _group(
    held: Sequence[Held], channels: Sequence[_Channel], reasons: Sequence[str], present: Mapping[str, Layer]
) -> dict[str, Any]:
    slices = []
    for i in channels[0].entries:
        h = held[i]
        entries = np.array([c.entries[i] for c in channels], dtype=np.int64)
        slices.append(Slice(h.owner, h.tensor, h.dim, h.role, entries))
    readers = [s for s in slices if s.role == "reads"]
    consumers = tuple(_use(s, present[s.owner]) for s in readers if s.owner in present)
    frozen = list(reasons)
    if not frozen and len(channels) == 1:
        frozen = ["it is one channel alone"]
    if not frozen and not readers:
        frozen = ["no layer reads these channels"]
    if not frozen and not consumers:
        frozen = ["no layer that reads these channels could make up for lost ones"]
    producers = tuple(dict.fromkeys(s.owner for s in slices if s.role == "writes"))
    return {
        "name": producers[0],
        "kind": "heads" if any(c.heads for c in channels) else "channels",
        "producers": producers,
        "consumers": consumers,
        "slices": tuple(slices),
        "frozen": "; ".join(frozen[:3]),
    }


def _use(one: Slice, layer: Layer) -> Use:
    """The columns of the layer's matrix: an input channel has as many as the kernel has taps."""
    columns = one.entries[:, :, None] * layer.taps + np.arange(layer.taps)
    return Use(one.owner, columns.reshape(len(columns), -1))
