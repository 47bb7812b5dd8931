"""The sum of squared weights."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flyweight.methods.criteria._context import Context, weights

__all__ = ["l2"]


def l2(context: Context) -> Float[Tensor, " channels"]:
    """The sum of w^2 over all weights that go with a channel: rows that make it and columns that read it.

    Needs no data. The order is that of the group's L2 norm. Source: Fang et al. 2023, arXiv:2301.12900, section 3.3,
    without their sharpening during training.
    """
    return torch.stack([part.square().sum(1) for part in weights(context)]).sum(0)
