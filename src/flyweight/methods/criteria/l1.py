"""The sum of absolute weights."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flyweight.methods.criteria._context import Context, weights

__all__ = ["l1"]


def l1(context: Context) -> Float[Tensor, " channels"]:
    """The sum of |w| over all weights that go with a channel: rows that make it and columns that read it.

    Needs no data. Source: Li et al. 2017, arXiv:1608.08710, section 3.1, for the filter alone; here over coupled layers.
    """
    return torch.stack([part.abs().sum(1) for part in weights(context)]).sum(0)
