"""W + up down in the place of a weight W: few numbers that learn, and nothing changed before the first step.

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1. Their factor alpha / rank is left to the learning rate.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["LowRank"]


class LowRank(nn.Module):
    """W "out ..." -> W + up down: "out rank", "rank cols", where cols is all but the first axis. `up` is zero at first, `down` as
    nn.Linear's own first weights, drawn by `draw` (default: torch's own generator)."""

    def __init__(self, weight: Float[Tensor, "out ..."], rank: int, draw: torch.Generator | None = None) -> None:
        super().__init__()
        self.up = nn.Parameter(weight.new_zeros(len(weight), rank))
        down = torch.empty(rank, weight[0].numel(), dtype=weight.dtype)  # on the CPU, where generators are
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=draw)
        self.down = nn.Parameter(down.to(weight.device))

    def forward(self, weight: Float[Tensor, "out ..."]) -> Float[Tensor, "out ..."]:
        """The weight with the addition on."""
        return weight + (self.up @ self.down).reshape(weight.shape)
