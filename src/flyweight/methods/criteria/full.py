"""The full second-order sweep: what flyweight itself removes by."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flyweight.errors import UsageError
from flyweight.methods.channels import order
from flyweight.methods.criteria._context import Context

__all__ = ["full"]


def full(context: Context) -> Float[Tensor, " channels"]:
    """The turn in which a channel goes when each goes that costs its readers least after they are refitted: 0, 1, …

    A turn and no error, because what a channel costs depends on which went before. Needs second moments. Source:
    Hassibi, Stork 1993, "Second order derivatives for network pruning", eq. 5, for columns of channels as in Kurtic,
    Frantar, Alistarh 2023, arXiv:2302.04089, eq. 2-3.
    """
    if context.stats is None:
        raise UsageError("there are no statistics to score by", fix="measure some calibration data")
    turns = torch.full((context.group.size,), float(context.group.size - 1), dtype=torch.float64)
    gone = list(order(context.graph, context.group, context.layers, context.stats))
    turns[gone] = torch.arange(len(gone), dtype=torch.float64)
    return turns
