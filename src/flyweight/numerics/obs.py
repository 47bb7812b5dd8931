"""The second-order core: what to remove or round, and how the rest makes up for it.

One layer is y = W x + b with rows of W as outputs; G = E[x x^T] (centred where the bias absorbs the mean). Every function
here minimises tr(D G D^T), D = W - W', over what its caller allows. Errors are per row of W, so callers may weigh rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flyweight.errors import NumericsError

__all__ = ["Consumer", "Removal", "damped", "inverse_factor", "polish", "removal_order", "row_errors", "sweep"]

Snap = Callable[[Tensor, int], Tensor]


def row_errors(change: Float[Tensor, "out in"], gram: Float[Tensor, "in in"]) -> Float[Tensor, " out"]:
    """The error d^T G d of each row d of `change`: the mean over inputs of (d x)^2."""
    return ((change @ gram) * change).sum(1)


def damped(gram: Float[Tensor, "in in"], share: float) -> Float[Tensor, "in in"]:
    """`gram` + share * mean(diagonal) * I; columns never seen get a unit diagonal, so they are left as they are."""
    diagonal = gram.diagonal()
    result = gram.clone()
    ridge = share * float(diagonal.mean())
    result.diagonal().copy_(torch.where(diagonal <= 0, torch.ones_like(diagonal), diagonal + ridge))
    return result


def inverse_factor(gram: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """Upper triangular U with inverse(G) = U^T U, without forming the inverse.

    Flipping both axes turns the lower Cholesky factor of the flipped G into the reversed factor wanted here. Raises
    NumericsError if G is not positive definite (damp it). Source: Frantar et al. 2022, arXiv:2210.17323, step 3.
    """
    factor, bad = torch.linalg.cholesky_ex(gram.flip(0, 1))
    if int(bad) != 0:
        raise NumericsError(f"a second moment of {gram.shape[0]} inputs is not positive definite at column {int(bad)}")
    identity = torch.eye(gram.shape[0], dtype=gram.dtype)
    result: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
    return result.flip(0, 1)


def sweep(
    weight: Float[Tensor, "out in"], factor: Float[Tensor, "in in"], snap: Snap, block: int = 128
) -> tuple[Float[Tensor, "out in"], Float[Tensor, " out"]]:
    """The weights snapped column by column, each column's error made up for by the columns after it, and the row errors.

    `snap(column, index)` returns the allowed values nearest to `column` (rows). The errors returned equal
    d^T G d for the G that `factor` (`inverse_factor`) was made of. Columns run in the order given: sort them before.
    Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1; the identity of the errors: METHODS 2.1.
    """
    weight, result = weight.clone(), torch.empty_like(weight)
    errors = torch.zeros(weight.shape[0], dtype=weight.dtype)
    width = weight.shape[1]
    for start in range(0, width, block):
        stop = min(start + block, width)
        scaled = torch.empty(weight.shape[0], stop - start, dtype=weight.dtype)
        for j in range(start, stop):
            result[:, j] = snap(weight[:, j], j)
            e = (weight[:, j] - result[:, j]) / factor[j, j]
            weight[:, j:stop] -= torch.outer(e, factor[j, j:stop])
            scaled[:, j - start] = e
        weight[:, stop:] -= scaled @ factor[start:stop, stop:]
        errors += scaled.square().sum(1)
    return result, errors


def polish(
    weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"], kept: Sequence[int]
) -> Float[Tensor, "out kept"]:
    """The best weights on the `kept` columns alone: W G[:, K] (G[K, K])^-1, in the precision of the arguments.

    Equal to the greedy removal's weights in exact arithmetic, without its drift. Source: Hassibi & Stork 1993, eq. 5,
    for a set of columns.
    """
    index = torch.as_tensor(kept, dtype=torch.long)
    factor, bad = torch.linalg.cholesky_ex(gram[index][:, index])
    if int(bad) != 0:
        raise NumericsError(f"a second moment of {len(index)} kept inputs is not positive definite")
    return torch.cholesky_solve(gram[:, index].T @ weight.T, factor).T


@dataclass(frozen=True, eq=False)
class Consumer:
    """One layer that reads the channels of a group: channel j is columns [j * block, (j + 1) * block) of `weight`.

    `importance` turns this layer's squared error into the common currency of the group.
    """

    weight: Float[Tensor, "out in"]
    gram: Float[Tensor, "in in"]
    block: int
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
    channels = consumers[0].weight.shape[1] // consumers[0].block
    states = [_State(c) for c in consumers]
    alive = torch.ones(channels, dtype=torch.bool)
    order: list[int] = []
    rises: list[float] = []
    while int(alive.sum()) > least:
        scores = torch.stack([s.scores(alive) for s in states]).sum(0)
        chosen = start[len(order)] if len(order) < len(start) else int(scores.argmin())
        order.append(chosen)
        rises.append(float(scores[chosen]))
        alive[chosen] = False
        for state in states:
            state.remove(chosen)
    return Removal(tuple(order), tuple(rises))


class _State:
    """Weights and inverse of one consumer during the sweep: the only mutable thing, and it never leaves this file."""

    def __init__(self, consumer: Consumer) -> None:
        self.block, self.importance = consumer.block, consumer.importance
        self.weight = consumer.weight.to(torch.float64).clone()
        factor, bad = torch.linalg.cholesky_ex(consumer.gram.to(torch.float64))
        if int(bad) != 0:
            raise NumericsError(
                f"a second moment of {len(factor)} inputs is not positive definite at column {int(bad)}"
            )
        self.inverse = torch.cholesky_inverse(factor)

    def scores(self, alive: Tensor) -> Tensor:
        s, c = self.block, self.weight.shape[1] // self.block
        blocks = self.inverse.reshape(c, s, c, s).diagonal(dim1=0, dim2=2).permute(2, 0, 1)[alive]
        columns = self.weight.reshape(-1, c, s).permute(1, 2, 0)[alive]
        solved = torch.linalg.solve(blocks, columns)
        result = torch.full((c,), float("inf"), dtype=torch.float64)
        result[alive] = (solved * columns).sum((1, 2)) * self.importance
        return result

    def remove(self, channel: int) -> None:
        chosen = slice(channel * self.block, (channel + 1) * self.block)
        rows = torch.linalg.solve(self.inverse[chosen, chosen], self.inverse[chosen, :])
        self.weight.addmm_(self.weight[:, chosen].clone(), rows, alpha=-1)
        self.inverse.addmm_(self.inverse[:, chosen].clone(), rows, alpha=-1)
        self.weight[:, chosen] = 0
        self.inverse[chosen, :] = 0
        self.inverse[:, chosen] = 0
        self.inverse[chosen, chosen] = torch.eye(self.block, dtype=torch.float64)
