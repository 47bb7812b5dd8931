"""The distance to all other channels: those near the geometric median can be replaced by the rest."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flyweight.methods.criteria._context import Context, weights

__all__ = ["fpgm"]


def fpgm(context: Context) -> Float[Tensor, " channels"]:
    """Sum over layers and channels k of ||w_j - w_k||: w_j the weights of one layer that go with channel j.

    Needs no data. Small where others are like the channel, however large its weights. Source: He et al. 2019,
    arXiv:1811.00250, section 3.3, for the filter alone; here over coupled layers.
    """
    # in float64 the product form errs by 1e-8 of a channel's norm, and is many times faster
    return torch.stack([torch.cdist(w, w, compute_mode="use_mm_for_euclid_dist").sum(1) for w in weights(context)]).sum(
        0
    )
