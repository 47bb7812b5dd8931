"""A node as rules see it, and what several rules need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from flyweight.graph.labels import FIXED, Labels, Walk, compact, numbers_along

__all__ = ["Call", "Result", "carried", "kept", "numbers_of", "on_dimension", "operator_name", "shape_of", "unknown"]

Result = Labels | list[Labels | None] | None


@dataclass(frozen=True, eq=False)
class Call:
    """One node as it ran: arguments by name as values, the same with labels in place of tensors, and what came out."""

    walk: Walk
    node: fx.Node
    name: str  # of the operator or the module's class
    args: Mapping[str, Any]
    labels: Mapping[str, Any]
    value: Any
    module: nn.Module | None = None

    @property
    def first(self) -> Labels | None:
        """The labels of the first argument."""
        found = next(iter(self.labels.values()), None)
        return found if isinstance(found, Labels) else None

    @property
    def owner(self) -> str:
        """The path of the module that is called."""
        return str(self.node.target)

    def all(self) -> list[Labels]:
        """All labels that come in."""
        return [one for one in torch.utils._pytree.tree_leaves(dict(self.labels)) if isinstance(one, Labels)]


def operator_name(node: fx.Node) -> str:
    """The operator without namespace and overload ("add"), or the function's name."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket).removeprefix("aten.")
    return getattr(target, "__name__", str(target))


def unknown(call: Call, reason: str = "") -> Result:
    """Freezes all that comes in; what comes out always stays."""
    for labels in call.all():
        call.walk.freeze(labels, reason or f"no rule for {call.name} at {call.node.name!r}")
    return None


def kept(call: Call, marks: Tensor, weak: bool) -> Labels | None:
    """Labels of a new value; a label that is left alone in it is frozen."""
    found = compact(marks, weak)
    if found is None and not weak and marks.numel() and int(marks.max()) != FIXED:
        call.walk.freeze(marks, f"{call.node.name!r} takes one channel out alone")
    if found is not None and not weak:
        call.walk.whole.append(found)
    return found


def shape_of(value: Any) -> tuple[int, ...]:
    """The sizes of a tensor, () of anything else."""
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def carried(call: Call, labels: Labels | None, free: Sequence[int] = ()) -> Result:
    """The labels on a value of the same rank, whose sizes may differ along `free` (and where nothing varies)."""
    if labels is None:
        return None
    shape = shape_of(call.value)
    if len(shape) != len(labels.shape) or any(d in free or shape[d] != labels.shape[d] for d in labels.varying):
        return unknown(call, f"{call.node.name!r} works along the channels")
    return Labels(labels.marks, shape, labels.weak)


def numbers_of(call: Call, labels: Labels, dim: int, name: str) -> Tensor | None:
    """One label an index of the channels; what varies along another dimension too is frozen."""
    dim %= len(labels.shape)
    other = [d for d in labels.varying if d != dim]
    if other and dim not in labels.varying:
        call.walk.freeze(labels, f"{name!r} does not read them as channels")
        return None
    if other:
        marks = call.walk.merge(labels.marks, other)
        labels = Labels(marks, labels.shape)
    return numbers_along(labels, dim)


def on_dimension(marks: Tensor, dim: int, rank: int, shape: tuple[int, ...]) -> Labels:
    """One label an index of `dim` as the labels of a value."""
    view = [1] * rank
    view[dim] = len(marks)
    return Labels(marks.reshape(view), shape)
