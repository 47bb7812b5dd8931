"""Batch norm statistics of a compressed network: its norms say what the original's say about the same data."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from flyweight.graph.operators import NORMS

__all__ = ["matched", "rematch"]

Moments = tuple[Tensor, Tensor]  # mean and variance, each [channels]


def rematch(
    graph: fx.GraphModule,
    original: fx.GraphModule,
    kept: Mapping[str, Sequence[int]],
    batches: Iterable[tuple[Tensor, ...]],
) -> int:
    """Sets every running mean and variance of `graph`, in place; returns how many norms.

    Each channel behind a norm gets the mean and variance that it has in `original` on the same batches. On the training
    data this is the usual re-estimation (METHODS 2.13; Li et al. 2017, arXiv:1603.04779); on data of another spread that
    would stretch every channel to unit variance, and change even a network that nobody cut. `kept` maps a norm to the
    channels it still has (missing: all). Every batch counts alike. Source: the correction of Jordan et al. 2023,
    arXiv:2211.08403 (REPAIR), written into the running statistics.
    """
    norms = {name: m for name, m in graph.named_modules() if isinstance(m, NORMS) and m.running_mean is not None}
    if not norms:
        return 0
    matches = {name: _Match(norm, original.get_submodule(name), kept.get(name)) for name, norm in norms.items()}
    try:
        with torch.no_grad():
            for batch in batches:
                original(*batch)
                graph(*batch)
    finally:
        for match in matches.values():
            match.finish()
    return len(norms)


class _Match:
    """One norm beside the original's: listens to both, and sets the one for each batch before it is run."""

    def __init__(self, mine: Any, theirs: Any, kept: Sequence[int] | None) -> None:
        self.mine = mine
        index = slice(None) if kept is None else list(kept)
        self.index = index
        self.stated = theirs.running_mean[index].clone(), theirs.running_var[index].clone()
        self.before = mine.running_mean.clone(), mine.running_var.clone()
        self.waiting: deque[Moments] = deque()  # of the original's calls in this batch
        self.sums: list[Tensor] = []
        self.calls = 0
        self.hooks = (theirs.register_forward_pre_hook(self._hear), mine.register_forward_pre_hook(self._answer))

    def _hear(self, _: Any, given: tuple[Tensor, ...]) -> None:
        mean, variance = _moments(given[0])
        self.waiting.append((mean[self.index], variance[self.index]))

    def _answer(self, _: Any, given: tuple[Tensor, ...]) -> None:
        theirs, mine = self.waiting.popleft(), _moments(given[0])
        found = [*theirs, *mine]
        self.sums = [a + b for a, b in zip(self.sums, found, strict=True)] if self.calls else found
        self.calls += 1
        self._set(matched(self.stated, theirs, mine, self.mine.eps))

    def _set(self, values: Moments) -> None:
        self.mine.running_mean.copy_(values[0])
        self.mine.running_var.copy_(values[1])

    def finish(self) -> None:
        """The averages over all calls; without one, what was there before."""
        for hook in self.hooks:
            hook.remove()
        if not self.calls:
            self._set(self.before)
            return
        a, b, c, d = (total / self.calls for total in self.sums)
        self._set(matched(self.stated, (a, b), (c, d), self.mine.eps))


def _moments(x: Tensor) -> Moments:
    rows = x.reshape(len(x), x.shape[1], -1)
    mean = rows.mean(2).mean(0)
    lengths = torch.linalg.vector_norm(rows - mean[:, None], dim=2)  # much faster on a CPU than var_mean
    return mean.double(), lengths.double().square().sum(0) / (x.numel() // x.shape[1])


def matched(stated: Moments, theirs: Moments, mine: Moments, eps: float) -> Moments:
    """The statistics with which data of moments `mine` leave a norm as data of moments `theirs` leave one with `stated`."""
    mean, variance = (x.double() for x in stated)
    ratio = (mine[1] + eps) / (theirs[1] + eps)
    return mine[0] - (theirs[0] - mean) * ratio.sqrt(), (variance + eps) * ratio - eps
