"""The scale of the batch norms."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flyweight.errors import UsageError
from flyweight.methods.criteria._context import Context, norm_weights

__all__ = ["norm_scale"]


def norm_scale(context: Context) -> Float[Tensor, " channels"]:
    """The sum of |gamma| over the batch norms that the channel passes.

    Needs no data. Meant for networks trained with an L1 penalty on gamma; without it scales of different layers say
    little. Raises UsageError if no norm with a scale lies on the group. Source: Liu et al. 2017, arXiv:1708.06519,
    section 3.3.
    """
    found = [part.abs().sum(1) for part in norm_weights(context)]
    if not found:
        raise UsageError("no batch norm scales these channels", where=context.group.name)
    return torch.stack(found).sum(0)
