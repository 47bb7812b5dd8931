"""Which rows of a batch of sequences are padding, so that nothing is fitted to them."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

__all__ = ["kept_tokens", "mask_input", "real_rows"]


def mask_input(graph: fx.GraphModule) -> int | None:
    """The number of the input that says which tokens are real, None if no input does: its name holds "mask"."""
    names = [str(n.target) for n in graph.graph.nodes if n.op == "placeholder"]
    found = [i for i, name in enumerate(names) if "mask" in name.lower()]
    return found[0] if len(found) == 1 else None


def kept_tokens(mask: object) -> Tensor | None:
    """Which tokens are real, [samples, tokens]; None unless `mask` is a matrix of zeros and ones (1: real)."""
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.is_complex():
        return None
    ones = mask == 1
    return ones if bool((ones | (mask == 0)).all()) and bool(ones.any()) else None


def real_rows(module: nn.Module, x: Tensor, kept: Tensor | None) -> Tensor | None:
    """Which of the rows that a linear layer makes of `x` ("samples tokens in") are real; None: all of them."""
    if kept is None or not isinstance(module, nn.Linear) or x.ndim != 3 or x.shape[:2] != kept.shape:
        return None
    return kept.reshape(-1).to(torch.bool)
