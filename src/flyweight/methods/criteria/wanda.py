"""Weights times the size of what they multiply."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flyweight.methods.criteria._context import Context, per_channel, readers
from flyweight.numerics import forms

__all__ = ["wanda"]


def wanda(context: Context) -> Float[Tensor, " channels"]:
    """The sum of |w_ri| * sqrt(E x_i^2) over the columns i that read a channel, their rows r and all readers.

    Needs second moments. Source: Sun et al. 2023, arXiv:2306.11695, eq. 1, for single weights; here summed by channel.
    """
    parts = []
    for reader in readers(context):
        size = (forms.diagonal(reader.moments.gram) + reader.moments.mean.square()).clamp(min=0).sqrt()
        parts.append(per_channel(reader.weights.abs() * reader.by_input(size), reader.columns).sum(1))
    return torch.stack(parts).sum(0)
