"""What of a network learns: norms and biases, low-rank additions to its matrices, or all. Cheap parts first, each from the last.

Source: norms and biases, Frantar Alistarh 2022, arXiv:2208.11580, section 6 (post-processing); low-rank additions:
`train.additions`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from flyweight.errors import UsageError
from flyweight.graph.operators import CONVOLUTIONS
from flyweight.train.additions import LowRank
from flyweight.train.descent import Descent

__all__ = ["LOWRANK", "NORMS", "PARTS", "WEIGHTS", "in_parts", "learning"]

PARTS = NORMS, LOWRANK, WEIGHTS = "norms", "lowrank", "weights"
MATRICES = (nn.Linear, *CONVOLUTIONS)


class _Added(nn.Module):
    """A layer with an addition to its weight."""

    def __init__(self, layer: nn.Module, rank: int, draw: torch.Generator) -> None:
        super().__init__()
        assert isinstance(layer.weight, Tensor)
        self.layer, self.addition = layer, LowRank(layer.weight.detach(), rank, draw)

    def forward(self, x: Tensor) -> Any:
        return functional_call(self.layer, {"weight": self.addition(self.layer.weight)}, (x,))

    def merged(self) -> nn.Module:
        """The layer, the addition in its weight."""
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        with torch.no_grad():
            weight.copy_(self.addition(weight))
        return self.layer


@contextlib.contextmanager
def learning(graph: fx.GraphModule, part: str, frozen: Collection[str], rank: int, seed: int) -> Iterator[None]:
    """Within, the `part` of `graph` requires gradients and nothing else does; `frozen` parameters never. Behind it additions are
    merged into their layers, which are the user's own again, and gradients are required as they were."""
    required = {name: p.requires_grad for name, p in graph.named_parameters()}
    added = {}
    for name, parameter in graph.named_parameters():
        parameter.requires_grad_(name not in frozen and (part == WEIGHTS or parameter.ndim <= 1))
    if part == LOWRANK:
        draw = torch.Generator().manual_seed(seed)
        added = {name: _Added(graph.get_submodule(name), rank, draw) for name in _matrices(graph, frozen, rank)}
    for name, one in added.items():
        graph.set_submodule(name, one)
    try:
        if not any(p.requires_grad for p in graph.parameters()):
            what = {NORMS: "norm or bias", LOWRANK: "norm, bias or matrix of its own"}.get(part, "weight")
            raise UsageError(
                f"the network has no {what} to learn", where=f"part {part}", fix="fw.distill(parts=…) without it"
            )
        yield
    finally:
        for name, one in added.items():
            graph.set_submodule(name, one.merged())
        for name, parameter in graph.named_parameters():
            parameter.requires_grad_(required[name])


def _matrices(graph: fx.GraphModule, frozen: Collection[str], rank: int) -> list[str]:
    """The layers that get an addition: of at least twice its rank both ways (others would get more numbers than they have), with
    a weight of their own."""
    owners: dict[int, int] = {}
    for _, parameter in graph.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found = []
    for name, layer in graph.named_modules():
        if isinstance(layer, MATRICES) and f"{name}.weight" not in frozen and owners[id(layer.weight)] == 1:
            narrow = min(len(layer.weight), layer.weight[0].numel())
            found += [name] if narrow >= 2 * rank else []
    return found


def in_parts(
    graph: fx.GraphModule,
    parts: Sequence[str],
    frozen: Collection[str],
    rank: int,
    seed: int,
    learn: Callable[[str], Descent],
) -> Descent:
    """What `learn(part)` makes of the graph, one part after the other; one record, as if it was one descent.

    Where a descent ends early, those behind it are left out.
    """
    whole: Descent | None = None
    for part in parts:
        with learning(graph, part, frozen, rank, seed):
            found = learn(part)
        whole = found if whole is None else _behind(whole, found)
        if found.stopped:
            break
    assert whole is not None
    return whole


def _behind(first: Descent, then: Descent) -> Descent:
    """Both as one: the second began with the best weights of the first."""
    best = len(first.judged) - 1 + then.best if then.best else first.best
    return replace(then, losses=first.losses + then.losses, judged=first.judged + then.judged[1:], best=best)
