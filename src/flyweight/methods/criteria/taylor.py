"""The first-order change of the loss."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flyweight.errors import UsageError
from flyweight.methods.criteria._context import Context, inputs_of

__all__ = ["taylor"]


def taylor(context: Context) -> Float[Tensor, " channels"]:
    """The mean over samples of |sum of w * dL/dw| over the columns that read a channel, all readers in one sum.

    The sum is the slope of the sample's loss L along the channel's removal, and equals sum of a * dL/da over its
    activations a. Needs `contributions` (labels, or the model's own answers). Source: Molchanov et al. 2017,
    arXiv:1611.06440, eq. 8, without their division by the number of positions (it is the slope itself that is
    comparable) and over all readers of coupled channels.
    """
    if context.contributions is None:
        raise UsageError("there are no gradients to score by", fix="give `contributions` of some calibration data")
    slopes: list[Tensor] = []
    for use in context.group.consumers:
        found = context.contributions[use.layer]
        slopes.append(found[:, inputs_of(use, context)].sum(2))
    return torch.stack(slopes).sum(0).abs().mean(0)
