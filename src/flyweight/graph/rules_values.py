"""What operators without weights do to labels: they move entries, or compute element by element or along dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flyweight.graph.calls import Call, Result, carried, kept, numbers_of, shape_of, unknown
from flyweight.graph.labels import FIXED, Labels, Pending, broadcast

__all__ = [
    "along",
    "elementwise",
    "flatten",
    "glu",
    "joined",
    "moved",
    "padded",
    "picked",
    "reduced",
    "shuffled",
    "spatial",
    "unary",
]


# ---- operators that only move entries: run on labels


def moved(call: Call) -> Result:
    """Runs the operator itself on labels."""
    first = call.first
    if first is None:
        return None
    args = dict(call.args)
    name = next(iter(args))
    target = call.node.target
    assert callable(target)
    if call.name in ("view", "_unsafe_view") and isinstance(args.get("size"), (list, tuple)):
        return kept(call, first.full.reshape(args["size"]), first.weak)  # labels lie otherwise in memory
    found = target(**{**_by_schema(call), name: first.full})
    if isinstance(found, Tensor):
        return kept(call, found, first.weak)
    return [kept(call, one, first.weak) for one in found]


def _by_schema(call: Call) -> dict[str, Any]:
    target = call.node.target
    names = [a.name for a in target._schema.arguments] if isinstance(target, torch._ops.OpOverload) else []
    return {name: call.args[name] for name in names if name in call.args}


def flatten(call: Call) -> Result:
    """nn.Flatten."""
    first, module = call.first, call.module
    if first is None or not isinstance(module, nn.Flatten):
        return None
    return kept(call, first.full.flatten(module.start_dim, module.end_dim), first.weak)


def picked(call: Call) -> Result:
    """Operators whose numbers mean positions: along the channels they would mean others after a cut."""
    first = call.first
    if first is None or first.weak:
        return moved(call)
    rank = len(first.shape)
    dims = call.args.get("dim", call.args.get("dims", 0))
    along = {int(d) % rank for d in ([dims] if isinstance(dims, int) else dims)} & set(first.varying)
    if call.name == "select":
        along = set(first.varying) & along if len(first.varying) == 1 else set()
    if along and (call.name != "slice" or call.args.get("step", 1) != 1):
        return unknown(call, f"{call.node.name!r} picks channels by their position")
    return moved(call)


def shuffled(call: Call) -> Result:
    """Channels dealt out over groups: the same ones go from every group."""
    first = call.first
    if first is not None and 1 in first.varying:
        marks = numbers_of(call, first, 1, call.node.name)
        assert marks is not None  # they vary along the channels
        call.walk.merge(marks.reshape(int(call.args["groups"]), -1), [0])
    return moved(call)


def joined(call: Call) -> Result:
    """cat and stack: along the joined dimension labels follow one another, along others they must agree."""
    parts = list(call.labels["tensors"])
    values = list(call.args["tensors"])
    if not any(parts):
        return None
    dim = int(call.args.get("dim", 0))
    stacked = call.name == "stack"
    rank = values[0].ndim + stacked
    dim %= rank
    strong = next((p for p in parts if p is not None and not p.weak), None)
    weak = strong is None
    across = {d + (stacked and d >= dim) for p in parts if p is not None for d in p.varying} - {dim}
    reference = strong or next(p for p in parts if p is not None)
    marks = []
    for part, value in zip(parts, values, strict=True):
        full = torch.full((), FIXED).expand(value.shape) if part is None else part.full
        if part is None or (part.weak and not weak):
            full = (
                _follows(call, reference, part, value, dim if not stacked else -1)
                if across
                else (torch.full((), FIXED).expand(value.shape))
            )
        marks.append(full)
    joined = torch.stack(marks, dim) if stacked else torch.cat(marks, dim)
    if across and _agree(parts, dim, stacked):
        joined = call.walk.merge(_thin(joined, {dim, *across}), [dim]).expand(joined.shape)
    return kept(call, joined, weak)


def _agree(parts: Sequence[Labels | None], dim: int, stacked: bool) -> bool:
    """Whether no part varies along the joined dimension itself."""
    return stacked or all(part is None or dim not in part.varying for part in parts)


def _thin(marks: Tensor, dims: set[int]) -> Tensor:
    for d in range(marks.ndim):
        if d not in dims:
            marks = marks.narrow(d, 0, 1)
    return marks


def _follows(call: Call, reference: Labels, part: Labels | None, value: Tensor, dim: int) -> Tensor:
    """Labels of a constant or unknown part of a concatenation: those of the part beside it, if it can follow."""
    marks = reference.marks
    if dim >= 0 and dim in reference.varying:
        call.walk.freeze(reference, f"{call.node.name!r} joins them with a value whose channels are not known")
        return torch.full((), FIXED).expand(value.shape)
    reason = f"{call.node.name!r} joins them with a value whose channels are not known"
    shape = tuple(value.shape)
    here = Labels(marks, shape)
    call.walk.pending.append(Pending(here, part, shape, reason))
    return here.full


# ---- element by element


def elementwise(call: Call) -> Result:
    """The same function of every entry of several values: entries that meet live and die together."""
    shape = shape_of(call.value)
    values = {name: value for name, value in call.args.items() if isinstance(value, Tensor)}
    aligned: list[tuple[Labels | None, tuple[int, ...]]] = []
    for name, value in values.items():
        found = call.labels.get(name)
        own = (1,) * (len(shape) - value.ndim) + tuple(value.shape)
        if isinstance(found, Labels):
            marks = found.marks.reshape((1,) * (len(shape) - value.ndim) + tuple(found.marks.shape))
            found = Labels(marks, own, found.weak)
        aligned.append((found, own))
    strong = [(f, own) for f, own in aligned if f is not None and not f.weak]
    leading = strong or [(f, own) for f, own in aligned if f is not None]
    unknowns = any(f is None and any(size != 1 for size in own) for f, own in aligned)
    if not leading or (unknowns and not strong):  # a constant combined with what always stays is no constant any more
        return None
    base = broadcast(*(f.marks for f, _ in leading))
    result = base[0]
    for other in base[1:]:
        call.walk.join(result, other)
        mixed = (result == FIXED) != (other == FIXED)
        call.walk.freeze(torch.where(mixed, torch.maximum(result, other), FIXED), f"{call.node.name!r} needs all of it")
        result = torch.maximum(result, other)
    labels = Labels(result.contiguous(), shape, not strong)
    if strong:
        call.walk.whole.append(labels)
        reason = f"{call.node.name!r} combines it with a value whose channels are not known"
        for found, own in aligned:
            partner = found if found is None or found.weak else None
            if (found is None or found.weak) and any(size != 1 for size in own):
                call.walk.pending.append(Pending(labels, partner, own, reason))
    return labels


def unary(call: Call) -> Result:
    """A function of every entry; further values are bounds, looked at as in `_elementwise`."""
    if sum(isinstance(value, Tensor) for value in call.args.values()) > 1:
        return elementwise(call)
    return carried(call, call.first)


def glu(call: Call) -> Result:
    """The first half times the sigmoid of the second."""
    first = call.first
    if first is None:
        return None
    dim = int(call.args.get("dim", -1)) if call.module is None else int(call.module.dim)  # type: ignore[arg-type]
    a, b = first.full.chunk(2, dim)
    call.walk.pair(a, b, f"{call.node.name!r} pairs it with entries that always stay")
    return kept(call, a, first.weak)


# ---- along a dimension


def along(call: Call) -> Result:
    """softmax and its like: every entry of `dim` decides about all."""
    if call.first is None:
        return None
    dim = call.args.get("dim", -1) if call.module is None else call.module.dim
    if not isinstance(dim, int):
        return unknown(call)
    return carried(call, call.first, free=[dim % len(call.first.shape)])


def reduced(call: Call) -> Result:
    """A mean, sum or extreme over other dimensions; over the channels it would change with them."""
    first = call.first
    if first is None:
        return None
    dims = call.args.get("dim", call.args.get("dims"))
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return unknown(call, f"{call.node.name!r} reduces the channels too")
    rank = len(first.shape)
    gone = {int(d) % rank for d in ([dims] if isinstance(dims, int) else dims)}
    along, marks = sorted(gone & set(first.varying)), first.marks
    if along and not set(first.varying) - gone:
        return unknown(call, f"{call.node.name!r} reduces over the channels")
    if along:  # what is reduced goes with what it is reduced to
        marks = call.walk.merge(marks, along)
    keep = bool(call.args.get("keepdim", False))
    if not keep:
        for d in sorted(gone, reverse=True):
            marks = marks.squeeze(d)
    values = call.value if isinstance(call.value, (tuple, list)) else [call.value]
    found = [Labels(marks, shape_of(v), first.weak) for v in values]
    return list(found) if isinstance(call.value, (tuple, list)) else found[0]


def spatial(call: Call) -> Result:
    """Pooling and resizing of the dimensions behind the channels."""
    first = call.first
    if first is None:
        return None
    if len(first.shape) < 3:
        return unknown(call, f"{call.node.name!r} pools over the channels")
    free = range(2, len(first.shape))
    if isinstance(call.value, (tuple, list)):
        found = carried(Call(call.walk, call.node, call.name, call.args, call.labels, call.value[0]), first, free)
        return [found if isinstance(found, Labels) else None] * len(call.value)
    return carried(call, first, free)


def padded(call: Call) -> Result:
    """Padding: zeros beside channels always stay; elsewhere nothing changes."""
    first = call.first
    if first is None:
        return None
    widths = list(call.args.get("pad") or call.args.get("padding") or [])
    rank = len(first.shape)
    padded = {rank - 1 - i // 2 for i, w in enumerate(widths) if w != 0}
    if not padded & set(first.varying):
        return carried(call, first)
    if call.name not in ("constant_pad_nd", "pad") or call.args.get("mode", "constant") != "constant":
        return unknown(call, f"{call.node.name!r} repeats channels")
    inner = [w if (rank - 1 - i // 2) in first.varying else 0 for i, w in enumerate(widths)]
    marks = torch.nn.functional.pad(first.marks, inner, value=FIXED)
    labels = Labels(marks, shape_of(call.value), first.weak)
    if not first.weak:
        call.walk.whole.append(labels)
    return labels
