"""Memory of graphs that nobody needs any more."""

from __future__ import annotations

import gc

from torch import fx

__all__ = ["tidy"]

LARGE_BYTES = 16_000_000  # of parameters: below it looking for dead graphs takes longer than they are worth


def tidy(graph: fx.GraphModule) -> None:
    """Frees the dead copies of `graph`, if it is large: graphs refer to themselves, so they wait for Python's collector,
    which counts objects and not the hundred megabytes that each holds."""
    if sum(p.numel() * p.element_size() for p in graph.parameters()) >= LARGE_BYTES:
        gc.collect()
