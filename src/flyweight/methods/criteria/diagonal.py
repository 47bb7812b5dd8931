"""The error of a layer if its inputs were independent."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flyweight.methods.channels import gram_of
from flyweight.methods.criteria._context import Context, per_channel, readers
from flyweight.numerics import forms

__all__ = ["diagonal"]


def diagonal(context: Context) -> Float[Tensor, " channels"]:
    """The sum of w_ri^2 * G_ii over the columns i that read a channel and their rows r, as a share of the reader's power.

    G is the second moment that `full` uses, of which only the diagonal is read, so the two differ by correlations alone.
    If G is diagonal, the scores of the channels removed add up to the exact error of dropping them (and no choice is
    better). Needs second moments. Source: LeCun, Denker, Solla 1989, "Optimal brain damage", section 2 (h_kk u_k^2 / 2),
    with the layer's squared error as the loss (they: the network's).
    """
    parts = []
    for reader in readers(context):
        power = forms.diagonal(gram_of(reader.layer, reader.moments)).clamp(min=0).double()
        weighed = reader.weights.square() * reader.by_input(power)
        parts.append(per_channel(weighed, reader.columns).sum(1) / reader.power)
    return torch.stack(parts).sum(0)
