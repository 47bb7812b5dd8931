"""Labels: which entries of which values live and die together.

A value's labels are an integer tensor of the value's shape: entries with one label can only be removed together, -1 marks
an entry that always stays. Shape operators run on labels as they run on values, so no rule has to say what a reshape, a
split or a concatenation does. `Labels` keeps dimensions along which nothing varies at size 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

__all__ = ["FIXED", "Held", "Labels", "Pending", "Walk", "broadcast", "compact", "numbers_along"]

FIXED = -1
LARGEST_LOOSE = 1 << 22  # entries of a loose tensor that get labels of their own


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels of one value: `marks` broadcasts to `shape`. `weak`: a constant, that follows what it is combined with."""

    marks: Tensor
    shape: tuple[int, ...]
    weak: bool = False

    @property
    def full(self) -> Tensor:
        """One label an entry, without copying what does not vary."""
        return self.marks.expand(self.shape)

    @property
    def varying(self) -> tuple[int, ...]:
        """The dimensions along which labels differ."""
        return tuple(d for d, size in enumerate(self.marks.shape) if size > 1)


def broadcast(*marks: Tensor) -> list[Tensor]:
    """Marks of one common shape."""
    shape = np.broadcast_shapes(*(tuple(one.shape) for one in marks))
    return [one.expand(shape) for one in marks]


def compact(marks: Tensor, weak: bool = False) -> Labels | None:
    """The labels of a value, from one label an entry; None if all of it stays."""
    shape = tuple(marks.shape)
    if marks.numel() == 0:
        return None
    for d in range(marks.ndim):
        if marks.shape[d] > 1:
            head = marks.narrow(d, 0, 1)
            if marks.stride(d) == 0 or bool((marks == head).all()):
                marks = head
    if marks.numel() == 1 or int(marks.max()) == FIXED:
        return None
    return Labels(marks.clone(), shape, weak)


@dataclass(frozen=True, eq=False)
class Held:
    """A dimension of a tensor in the network, one label an index. `role`: its layer writes, reads or carries them."""

    owner: str
    tensor: str
    dim: int
    role: str
    labels: Tensor


class Pending(NamedTuple):
    """A value combined with one whose labels are weak or unknown: what follows is decided once it is known along which
    dimension the first is cut."""

    labels: Labels
    other: Labels | None
    sizes: tuple[int, ...]  # of the other value, aligned with the first
    reason: str


@dataclass
class Walk:
    """What has been found so far; alive only inside `axes.groups`."""

    count: int = 0
    pairs: list[np.ndarray] = field(default_factory=list)
    reasons: list[tuple[np.ndarray, str]] = field(default_factory=list)
    held: dict[tuple[str, str, int, str], Held] = field(default_factory=dict)
    loose: dict[str, Labels] = field(default_factory=dict)
    pending: list[Pending] = field(default_factory=list)
    whole: list[Labels] = field(default_factory=list)  # values that must stay rectangular whatever is cut
    heads: list[np.ndarray] = field(default_factory=list)  # labels of what attention multiplies one by one

    def fresh(self, size: int) -> Tensor:
        """New labels."""
        self.count += size
        return torch.arange(self.count - size, self.count)

    def join(self, a: Tensor, b: Tensor) -> None:
        """Ties labels entry by entry; what always stays ties nothing."""
        a, b = broadcast(a, b)
        both = (a != FIXED) & (b != FIXED) & (a != b)
        if bool(both.any()):
            found = torch.stack([a[both], b[both]], 1)
            self.pairs.append(np.unique(found.numpy(), axis=0))

    def pair(self, a: Tensor, b: Tensor, reason: str) -> None:
        """As `join`; what meets an entry that always stays, stays too, for the `reason`."""
        self.join(a, b)
        self.freeze(torch.where(b == FIXED, a, FIXED), reason)
        self.freeze(torch.where(a == FIXED, b, FIXED), reason)

    def merge(self, marks: Tensor, dims: Sequence[int]) -> Tensor:
        """Ties all labels that differ only along `dims`; gives the first of each, `dims` at size 1."""
        head = marks
        for d in dims:
            head = head.narrow(d, 0, 1)
        self.join(marks, head)
        mixed = (marks == FIXED) & (head != FIXED)
        if bool(mixed.any()):
            self.freeze(head.expand_as(marks)[mixed], "some entries of it always stay")
        mixed = (marks != FIXED) & (head == FIXED)
        if bool(mixed.any()):
            self.freeze(marks[mixed], "some entries of it always stay")
        return head

    def freeze(self, marks: Tensor | Labels | None, reason: str) -> None:
        """Nothing with these labels may be cut."""
        if isinstance(marks, Labels):
            marks = marks.marks
        if marks is not None and bool((marks != FIXED).any()):
            self.reasons.append((np.unique(marks[marks != FIXED].numpy()), reason))

    def hold(self, owner: str, tensor: str, dim: int, role: str, labels: Tensor) -> None:
        """The tensor's dimension has these labels; every use of it must agree."""
        key = (owner, tensor, dim, role)
        if key not in self.held:
            self.held[key] = Held(owner, tensor, dim, role, labels.clone())
            return
        self.pair(self.held[key].labels, labels, f"{owner!r} also reads channels that always stay")

    def roots(self) -> np.ndarray:
        """For every label the number of its class, by order of first appearance."""
        if not self.pairs:
            return np.arange(self.count)
        pairs = np.concatenate(self.pairs)
        ones = np.ones(len(pairs), dtype=np.int8)
        matrix = coo_matrix((ones, (pairs[:, 0], pairs[:, 1])), shape=(self.count, self.count))
        _, classes = connected_components(matrix, directed=False)
        return np.asarray(classes, dtype=np.int64)

    def settled(self) -> np.ndarray:
        """The classes once every value is rectangular and everything pending is decided."""
        found = self.roots()
        for _ in range(32):
            before, roots = found, torch.from_numpy(found).long()
            for labels in self.whole:
                self._make_rectangular(labels, roots)
            found = self.roots()
            if not np.array_equal(found, before):  # pairs alone say nothing: what meets entries that stay is tied anew
                continue
            waiting, self.pending = self.pending, []
            for one in waiting:
                self._decide(one, roots)
            found = self.roots()
            if np.array_equal(found, before):
                break
        return found

    def _make_rectangular(self, labels: Labels, roots: Tensor) -> None:
        now = seen(labels, roots)
        if now is None:
            classes = torch.where(labels.marks == FIXED, FIXED, roots[labels.marks.clamp(min=0)])
            self.freeze(labels.marks[classes != FIXED], "without them nothing would be left of a value")
            return
        if len(now.varying) < 2:
            return
        original = labels.marks
        best = max(now.varying, key=lambda d: _classes_left(now.marks, d))
        self.merge(original, [d for d in labels.varying if d != best])

    def _decide(self, one: Pending, roots: Tensor) -> None:
        now = seen(one.labels, roots)
        if now is None:
            return
        cut = [d for d in now.varying if one.sizes[d] != 1]
        if not cut:
            return
        if one.other is None:
            self.freeze(one.labels, one.reason)
            return
        head = one.labels.marks
        for d in range(head.ndim):
            if d not in cut:
                head = head.narrow(d, 0, 1)
        other = one.other.full.reshape(one.sizes)
        self.join(other, head.expand(one.sizes) if head.ndim else head)
        if bool((other == FIXED).any()):
            self.freeze(one.labels, one.reason)


def seen(labels: Labels, roots: Tensor) -> Labels | None:
    """The same labels by class."""
    marks = torch.where(labels.marks == FIXED, FIXED, roots[labels.marks.clamp(min=0)])
    return compact(marks.expand(labels.shape), labels.weak)


def _classes_left(marks: Tensor, dim: int) -> int:
    """How many classes remain if all that shares an index of `dim` is tied."""
    slabs = marks.movedim(dim, 0).flatten(1)
    numbers, inverse = np.unique(slabs.numpy(), return_inverse=True)
    rows = torch.arange(len(slabs))[:, None].expand_as(slabs).flatten().numpy()
    edges = coo_matrix(
        (np.ones(len(rows), dtype=np.int8), (rows, len(slabs) + inverse.flatten())),
        shape=(len(slabs) + len(numbers),) * 2,
    )
    return int(connected_components(edges, directed=False)[0])


def numbers_along(labels: Labels, dim: int) -> Tensor:
    """One label an index of `dim`, where labels vary along nothing else."""
    marks = labels.marks
    for d in range(marks.ndim):
        if d != dim % marks.ndim:
            marks = marks.narrow(d, 0, 1)
    return marks.reshape(-1).expand(labels.shape[dim])
