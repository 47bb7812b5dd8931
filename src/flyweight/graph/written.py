"""Numbers written into a graph that count channels: sizes of views and splits, bounds of slices, positions."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from flyweight.graph.calls import Call, Result
from flyweight.graph.labels import FIXED, Labels, Walk, seen

__all__ = ["Sizes", "Written", "counted", "note_sizes"]

Numbers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class Written:
    """A number in the graph that counts the entries of `labels` along `dim`; `first` and `stop` bound them."""

    node: str
    path: tuple[int, ...]
    labels: Labels
    dim: int
    first: int = 0
    stop: int | None = None
    sign: int = 1


@dataclass
class Sizes:
    """What has been found so far. `even`: pieces of one call that must shrink alike."""

    walk: Walk
    written: list[Written] = field(default_factory=list)
    even: list[tuple[str, list[Labels | None], int]] = field(default_factory=list)


def note_sizes(sizes: Sizes, call: Call, found: Result) -> None:
    """Remembers the numbers written into a call that count channels."""
    rule = RULES.get(call.name)
    if rule is not None and call.module is None and call.first is not None:
        rule(sizes, call, found)


def _list_of_sizes(sizes: Sizes, call: Call, found: Result, place: int = 1, offset: int = 0) -> None:
    listed = call.node.args[place] if len(call.node.args) > place else None
    if not isinstance(found, Labels) or not isinstance(listed, (list, tuple)):
        return
    for i, size in enumerate(listed):
        if isinstance(size, fx.Node):
            sizes.written.append(Written(call.node.name, (), found, i + offset))
        elif isinstance(size, int) and size != -1:
            sizes.written.append(Written(call.node.name, (place, i), found, i + offset))


def _unflattened(sizes: Sizes, call: Call, found: Result) -> None:
    _list_of_sizes(sizes, call, found, 2, int(call.args["dim"]) % len(call.first.shape))  # type: ignore[union-attr]


def _pieces(sizes: Sizes, call: Call, found: Result) -> None:
    parts = found if isinstance(found, list) else []
    dim = int(call.args.get("dim", 0))
    listed = call.node.args[1] if len(call.node.args) > 1 else None
    if isinstance(listed, (list, tuple)):
        for i, part in enumerate(parts):
            if part is not None and isinstance(listed[i], int):
                sizes.written.append(Written(call.node.name, (1, i), part, dim % len(part.shape)))
        return
    known = [p for p in parts if p is not None]
    if len(known) == len(parts) and len({p.shape for p in parts if p is not None}) == 1:
        for part in known[1:]:  # equal pieces stay equal: what goes from one goes from all
            sizes.walk.join(known[0].full, part.full)
    sizes.even.append((call.node.name, list(parts), dim))
    if "split" in call.name and parts and parts[0] is not None:
        sizes.written.append(Written(call.node.name, (1,), parts[0], dim % len(parts[0].shape)))


def _bounds(sizes: Sizes, call: Call, found: Result) -> None:
    first = call.first
    assert first is not None
    dim = int(call.args["dim"]) % len(first.shape)
    size = first.shape[dim]
    for place, name in ((2, "start"), (3, "end")):
        if len(call.node.args) <= place:
            continue
        bound = call.node.args[place]
        if isinstance(bound, fx.Node):
            sizes.written.append(Written(call.node.name, (), first, dim))
        elif isinstance(bound, int) and not (bound >= size and name == "end"):
            if bound >= 0:
                sizes.written.append(Written(call.node.name, (place,), first, dim, 0, bound))
            else:
                sizes.written.append(Written(call.node.name, (place,), first, dim, size + bound, None, -1))


def _narrowed(sizes: Sizes, call: Call, found: Result) -> None:
    first, start, length = call.first, call.args["start"], call.args["length"]
    assert first is not None
    dim = int(call.args["dim"]) % len(first.shape)
    if isinstance(start, int):
        sizes.written.append(Written(call.node.name, (2,), first, dim, 0, start))
        sizes.written.append(Written(call.node.name, (3,), first, dim, start, start + length))


def _index(sizes: Sizes, call: Call, found: Result) -> None:
    first, index = call.first, call.node.args[2]
    assert first is not None
    if isinstance(index, int):
        sizes.written.append(Written(call.node.name, (2,), first, int(call.args["dim"]) % len(first.shape), 0, index))


RULES: Mapping[str, Callable[[Sizes, Call, Result], None]] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "expand", "broadcast_to"), _list_of_sizes),
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split", "chunk", "unsafe_chunk"), _pieces),
    "unflatten": _unflattened,
    "slice": _bounds,
    "select": _index,
    "narrow": _narrowed,
}


def counted(sizes: Sizes, roots: Numbers, channels: Container[int]) -> list[tuple[Written, dict[int, int]]]:
    """How much every channel takes from each written number; numbers that cannot be rewritten freeze."""
    classes = torch.from_numpy(roots).long()
    found = []
    for one in sizes.written:
        line = _line(one.labels, one.dim, classes)
        if line is None:
            continue
        if not one.path:
            sizes.walk.freeze(one.labels, f"{one.node!r} holds a size that is computed")
            continue
        part = line[one.first : one.stop]
        classes_seen, times = np.unique(part.numpy(), return_counts=True)
        counts = dict(zip(classes_seen.tolist(), (one.sign * times).tolist(), strict=True))
        found.append((one, {r: n for r, n in counts.items() if r in channels}))
    for name, parts, dim in sizes.even:
        lines = [None if p is None else _line(p, dim % len(p.shape), classes) for p in parts]
        known = [line for line in lines if line is not None]
        bags = {tuple(line.sort().values.tolist()) for line in known}
        if known and (len(bags) > 1 or len(known) < len(lines)):
            for p in parts:
                sizes.walk.freeze(p, f"the pieces of {name!r} must stay equal")
    return found


def _line(labels: Labels, dim: int, classes: Tensor) -> Tensor | None:
    """The classes along `dim`, if that is where the value shrinks. Entries that stay may stand beside others."""
    now = seen(labels, classes)
    if now is None or dim not in now.varying:
        return None
    slabs = now.marks.movedim(dim, 0).reshape(now.shape[dim], -1)
    line = slabs.max(1).values
    alike = (slabs == line[:, None]) | (slabs == FIXED)
    return line.expand(now.shape[dim]) if bool(alike.all()) else None
