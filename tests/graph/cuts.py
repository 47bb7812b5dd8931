"""Cuts by hand: rows and columns of layers, and the sizes written into a graph. Nothing of the package's own surgery."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx, nn


def rows(part: nn.Module, kept: Sequence[int]) -> None:
    """Keeps some outputs of a layer, or some channels of a norm."""
    index = torch.as_tensor(kept)
    for name in ("weight", "bias", "running_mean", "running_var"):
        old = getattr(part, name, None)
        if old is not None:
            new = old.detach()[index].clone()
            setattr(part, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
    for name in ("out_channels", "out_features", "num_features"):
        if hasattr(part, name):
            setattr(part, name, len(kept))


def columns(part: nn.Module, kept: Sequence[int]) -> None:
    """Keeps some inputs of a layer."""
    part.weight = nn.Parameter(part.weight.detach()[:, torch.as_tensor(kept)].clone())
    for name in ("in_channels", "in_features"):
        if hasattr(part, name):
            setattr(part, name, len(kept))


def sizes(graph: fx.GraphModule, old: Sequence[object], new: Sequence[object]) -> int:
    """Rewrites the end of every list of sizes that ends in `old`; gives how many there were."""
    count = 0
    for node in graph.graph.nodes:
        written = node.args[1] if node.op == "call_function" and len(node.args) > 1 else None
        if isinstance(written, (list, tuple)) and list(written)[-len(old) :] == list(old):
            node.update_arg(1, [*written[: -len(old)], *new])
            count += 1
    graph.recompile()
    return count
