"""The second-order core: what to remove or round, and how the rest makes up for it.

One layer is y = W x + b with rows of W as outputs; G = E[x x^T] (centred where the bias absorbs the mean). Every function
here minimises tr(D G D^T), D = W - W', over what its caller allows. Errors are per row of W, so callers may weigh rows.
Leading dimensions ("...") are independent problems of equal size, as the groups of a grouped convolution are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from flyweight.errors import NumericsError

__all__ = [
    "Consumer",
    "Nest",
    "Removal",
    "contiguous",
    "damped",
    "inverse_factor",
    "lower_factor",
    "nest_weights",
    "nested",
    "polish",
    "removal_order",
    "row_errors",
    "sweep",
]

PANEL = 1024  # columns of a wide matrix that are worked on at once

Snap = Callable[[Tensor, int], Tensor]


def row_errors(change: Float[Tensor, "... out in"], gram: Float[Tensor, "... in in"]) -> Float[Tensor, "... out"]:
    """The error d^T G d of each row d of `change`: the mean over inputs of (d x)^2."""
    if gram.dtype == change.dtype:
        return ((change @ gram) * change).sum(-1)
    # kept in float32, summed in float64: what compensation leaves lies where G is small beside its largest eigenvalue
    result = torch.zeros(change.shape[:-1], dtype=change.dtype)
    for start in range(0, gram.shape[-1], PANEL):
        own = slice(start, start + PANEL)
        result += ((change @ gram[..., own].to(change.dtype)) * change[..., own]).sum(-1)
    return result


def damped(gram: Float[Tensor, "in in"], share: float) -> Float[Tensor, "in in"]:
    """`gram` + share * mean(diagonal) * I; columns never seen get a unit diagonal, so they are left as they are."""
    diagonal = gram.diagonal()
    result = gram.clone()
    ridge = share * float(diagonal.mean())
    result.diagonal().copy_(torch.where(diagonal <= 0, torch.ones_like(diagonal), diagonal + ridge))
    return result


def lower_factor(gram: Float[Tensor, "... in in"]) -> Float[Tensor, "... in in"]:
    """Lower triangular L with G = L L^T. Raises NumericsError if G is not positive definite (shrink or damp it)."""
    factor: Tensor
    factor, bad = torch.linalg.cholesky_ex(gram)
    if bool(bad.any()):
        raise NumericsError(
            f"a second moment of {gram.shape[-1]} inputs is not positive definite at column {int(bad.max())}"
        )
    return factor


def inverse_factor(gram: Float[Tensor, "... in in"]) -> Float[Tensor, "... in in"]:
    """Upper triangular U with inverse(G) = U^T U, without forming the inverse.

    Flipping both axes turns the lower Cholesky factor of the flipped G into the reversed factor wanted here. Raises
    NumericsError if G is not positive definite (damp it). Source: Frantar et al. 2022, arXiv:2210.17323, step 3.
    """
    factor = lower_factor(gram.flip(-2, -1))
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype)
    result: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
    return result.flip(-2, -1)


def sweep(
    weight: Float[Tensor, "... out in"], factor: Float[Tensor, "... in in"], snap: Snap, block: int = 128
) -> tuple[Float[Tensor, "... out in"], Float[Tensor, "... out"]]:
    """The weights snapped column by column, each column's error made up for by the columns after it, and the row errors.

    `snap(column, index)` returns the allowed values nearest to `column` (rows). The errors returned equal
    d^T G d for the G that `factor` (`inverse_factor`) was made of. Columns run in the order given: sort them before.
    Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1; the identity of the errors: METHODS 2.1.
    """
    rest = weight.mT.clone(memory_format=torch.contiguous_format)  # columns lie together: they are what is worked on
    result = torch.empty_like(rest)
    errors = torch.zeros(weight.shape[:-1], dtype=weight.dtype)
    width = weight.shape[-1]
    for start in range(0, width, block):
        stop = min(start + block, width)
        part, scaled = rest[..., start:stop, :], torch.empty_like(rest[..., start:stop, :])
        for j in range(stop - start):
            column = start + j
            result[..., column, :] = snap(part[..., j, :], column)
            e = (part[..., j, :] - result[..., column, :]) / factor[..., column, column, None]
            part[..., j:, :] -= factor[..., column, column:stop, None] * e[..., None, :]
            scaled[..., j, :] = e
        rest[..., stop:, :] -= factor[..., start:stop, stop:].mT @ scaled
        errors += scaled.square().sum(-2)
    return result.mT.contiguous(), errors


def polish(
    weight: Float[Tensor, "... out in"], gram: Float[Tensor, "... in in"], kept: Sequence[int]
) -> Float[Tensor, "... out keptin"]:
    """The best weights when only the columns `kept` remain: W G[:, K] (G[K, K])^-1.

    Raises NumericsError if G on the kept columns is not positive definite. Source: METHODS 2.3, final polish.
    """
    index = torch.as_tensor(kept, dtype=torch.int64)
    seen = gram[..., index]
    factor = lower_factor(seen[..., index, :].to(weight.dtype))
    return torch.cholesky_solve((weight.to(seen.dtype) @ seen).to(weight.dtype).mT, factor).mT


@dataclass(frozen=True, eq=False)
class Nest:
    """The best weights for every beginning of one order of columns, out of one factorisation.

    With the columns in that order and G = L L^T, the best weights on the first k are (W L)[:, :k] L[:k, :k]^-1 and their
    error is the sum of squares of (W L)[:, k:].
    """

    order: Int64[Tensor, " in"]
    factor: Float[Tensor, "... in in"]  # L
    projected: Float[Tensor, "... out in"]  # W L

    def errors(self, count: int) -> Float[Tensor, "... out"]:
        """The error of each row with the first `count` columns."""
        return self.projected[..., count:].square().sum(-1)


def nested(weight: Float[Tensor, "... out in"], gram: Float[Tensor, "... in in"], order: Int64[Tensor, " in"]) -> Nest:
    """The family of polished weights along `order` (columns that stay longest come first); raises as `polish`.

    In the moment's precision where that is enough: prices need fewer digits than the weights that are delivered.
    """
    factor = _enough(gram[..., order, :][..., order])
    return Nest(order, factor, weight.to(factor.dtype)[..., order] @ factor)


def _enough(gram: Float[Tensor, "... in in"]) -> Float[Tensor, "... in in"]:
    """The lower factor in the moment's precision, or in float64 where that breaks down."""
    try:
        return lower_factor(gram)
    except NumericsError:
        return lower_factor(gram.to(torch.float64))


def nest_weights(nest: Nest, count: int) -> Float[Tensor, "... out keptin"]:
    """What `polish` gives for the first `count` columns of the order, in that order."""
    kept = nest.factor[..., :count, :count]
    result: Tensor = torch.linalg.solve_triangular(kept, nest.projected[..., :count], upper=False, left=False)
    return result


def contiguous(channels: int, block: int) -> Int64[Tensor, "channels block"]:
    """The columns of channels that lie side by side: channel j is [j * block, (j + 1) * block)."""
    return torch.arange(channels * block).reshape(channels, block)


@dataclass(frozen=True, eq=False)
class Consumer:
    """One layer that reads the channels of a group: channel j is the columns `columns[j]` of `weight`.

    -1 stands for a column that is not here (of a layer whose second moment is known in blocks). Columns that no channel
    owns stay. `importance` turns this layer's squared error into the common currency of the group.
    """

    weight: Float[Tensor, "out in"]
    gram: Float[Tensor, "in in"]
    columns: Int64[Tensor, "channels block"]
    importance: float = 1.0


@dataclass(frozen=True)
class Removal:
    """Channels in the order they go, and the rise of the group's error by each (in the importance-weighted sum)."""

    order: tuple[int, ...]
    rises: tuple[float, ...]


def removal_order(consumers: Sequence[Consumer], least: int = 1, start: Sequence[int] = ()) -> Removal:
    """The greedy order in which a group's channels are removed, all consumers compensating, until `least` remain.

    Score of channel j: sum over consumers of importance * tr(W_S B W_S^T), B = ([G^-1]_SS)^-1: the exact rise of the
    error. `start` names channels that go first, unscored. Source: Kurtic, Frantar, Alistarh 2023, arXiv:2302.04089, eq. 2-3.
    """
    states = [_State(c) for c in consumers]
    alive = torch.ones(len(consumers[0].columns), dtype=torch.bool)
    order: list[int] = []
    rises: list[float] = []
    while int(alive.sum()) > least:
        scores = torch.stack([s.scores() for s in states]).sum(0)
        scores[~alive] = float("inf")
        chosen = start[len(order)] if len(order) < len(start) else int(scores.argmin())
        order.append(chosen)
        rises.append(float(scores[chosen]))
        alive[chosen] = False
        for state in states:
            state.remove(chosen)
    return Removal(tuple(order), tuple(rises))


PENDING = 128  # columns of changes that wait before they are worked into the inverse: a matrix product, not many sweeps


class _State:
    """Weights and inverse of one consumer during the sweep: the only mutable thing, and it never leaves this file.

    Only the channels' own columns of both matter. Of `inverse`, which is symmetric, only what lies on and right of the
    diagonal is kept up; it lacks the changes that wait: it is inverse - rows^T solved of all of them. Half of the channels
    gone, the matrices are made smaller.
    """

    def __init__(self, consumer: Consumer) -> None:
        present = (consumer.columns >= 0).any(1).nonzero()[:, 0]
        columns = consumer.columns[present]
        self.block, self.importance = columns.shape[1], consumer.importance
        self.channels, self.names = len(consumer.columns), present.tolist()
        self.place = {name: i for i, name in enumerate(self.names)}
        self.gone: set[int] = set()
        self.inverse, self.weight = _own_parts(consumer, columns.flatten())
        self.blocks = _diagonal_blocks(self.inverse, self.block)
        self.rows = self.solved = self.inverse[:0]

    def scores(self) -> Tensor:
        """The rise of the error by each channel; 0 for those that this consumer does not read."""
        shape = (len(self.names), self.block, -1)
        weight = self.weight.view(*shape)
        if self.block == 1:
            values = weight.square().sum((1, 2)) / self.blocks[:, 0, 0]
        else:
            factor, _ = torch.linalg.cholesky_ex(self.blocks)
            half = torch.linalg.solve_triangular(factor, weight, upper=False)
            values = half.square().sum((1, 2))
        result = torch.zeros(self.channels, dtype=values.dtype)
        result[self.names] = values * self.importance
        return result

    def remove(self, channel: int) -> None:
        if channel not in self.place:
            return
        i = self.place.pop(channel)
        own = slice(i * self.block, (i + 1) * self.block)
        above, beside = self.inverse[: own.start, own].T, self.inverse[own, own.start :]
        rows = torch.cat([above, beside], 1) - self.rows[:, own].T @ self.solved
        solved = torch.linalg.solve(self.blocks[i], rows)
        self.weight.addmm_(solved.T, self.weight[own].clone(), alpha=-1)
        shape = (self.block, len(self.names), self.block)
        self.blocks.baddbmm_(rows.view(shape).permute(1, 2, 0), solved.view(shape).transpose(0, 1), alpha=-1)
        self.blocks[i] = torch.eye(self.block, dtype=rows.dtype)  # so that the dead need no special case
        self.weight[own] = 0
        self.gone.add(i)
        self.rows, self.solved = torch.cat([self.rows, rows]), torch.cat([self.solved, solved])
        if len(self.rows) >= PENDING:
            self.settle()

    def settle(self) -> None:
        for start in range(0, len(self.inverse), PANEL):
            panel, end = self.inverse[start : start + PANEL, start:], start + PANEL
            panel.addmm_(self.rows[:, start:end].T, self.solved[:, start:], alpha=-1)
        if 2 * len(self.gone) >= len(self.names):
            left = [i for i in range(len(self.names)) if i not in self.gone]
            index = (torch.tensor(left)[:, None] * self.block + torch.arange(self.block)).flatten()
            self.inverse, self.weight = self.inverse[index][:, index], self.weight[index]
            self.blocks, self.names, self.gone = self.blocks[left], [self.names[i] for i in left], set()
            self.place = {name: i for i, name in enumerate(self.names)}
        self.rows = self.solved = self.inverse[:0]


def _own_parts(consumer: Consumer, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse "own own" and weight "own rows" of the columns that channels own; -1 gives a column of no effect.

    In the moment's precision where that is enough: an order needs fewer digits than weights do. Of more outputs than
    columns only a root of W^T W is kept: no score sees more of W.
    """
    inverse = torch.cholesky_inverse(_enough(consumer.gram))
    weight = consumer.weight.to(inverse.dtype)
    weight = torch.linalg.qr(weight, mode="r").R if len(weight) > weight.shape[1] else weight
    absent = columns < 0
    every = torch.equal(columns, torch.arange(len(inverse)))
    own = inverse if every else inverse[columns][:, columns]
    rows = weight.T.contiguous() if every else weight.T[columns]
    if bool(absent.any()):
        own[absent], own[:, absent], rows[absent] = 0, 0, 0
        own[absent, absent] = 1
    return own, rows


def _diagonal_blocks(square: Tensor, block: int) -> Tensor:
    count = len(square) // block
    return square.view(count, block, count, block).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()
