"""Chance: what every criterion has to beat."""

from __future__ import annotations

import zlib

import torch
from jaxtyping import Float
from torch import Tensor

from flyweight.methods.criteria._context import Context

__all__ = ["random"]


def random(context: Context) -> Float[Tensor, " channels"]:
    """A uniform draw from [0, 1) for each channel, the same for the same seed and name of the group.

    Source: Mittal et al. 2018, arXiv:1801.10447, who find it a strong baseline once a network is trained on.
    """
    # the name takes part, so that groups of one size do not lose the same channels
    seed = zlib.crc32(f"{context.seed} {context.group.name}".encode())
    return torch.rand(context.group.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
