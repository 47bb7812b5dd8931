"""Squared weights as a share of what would be left."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flyweight.methods.criteria._context import Context
from flyweight.methods.criteria.l2 import l2

__all__ = ["lamp"]


def lamp(context: Context) -> Float[Tensor, " channels"]:
    """s_j / sum of s_k over all k with s_k >= s_j (equal ones: later numbers), s the score of `l2`.

    Needs no data. Inside one group the order is that of `l2`; between groups it makes scores comparable: the largest
    channel of each scores 1, so no group is emptied. Source: Lee et al. 2021, arXiv:2010.07611, the LAMP score of
    section 2, by channels instead of weights.
    """
    power = l2(context)
    order = power.argsort(stable=True)
    left = power[order].flip(0).cumsum(0).flip(0)
    result = torch.empty_like(power)
    result[order] = torch.where(left > 0, power[order] / left, 0.0)
    return result
