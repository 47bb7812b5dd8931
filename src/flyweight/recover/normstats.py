"""Batch norm statistics of the network as it is now."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from flyweight.graph.operators import NORMS

__all__ = ["reestimate"]


def reestimate(graph: fx.GraphModule, batches: Iterable[tuple[Tensor, ...]]) -> int:
    """Replaces every running mean and variance by the average over `batches`, in place; returns how many norms.

    Each batch counts alike (momentum = None), everything else stays in eval mode. Source: METHODS 2.13; Li et al. 2017,
    arXiv:1603.04779.
    """
    norms = [m for m in graph.modules() if isinstance(m, NORMS) and m.running_mean is not None]
    if not norms:
        return 0
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        with torch.no_grad():
            for batch in batches:
                graph(*batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
    return len(norms)
