"""Scores by which channels go: one file, one criterion, one function of the file's name; the folder is the registry.

    from flyweight.methods import criteria
    scores = criteria.ALL["taylor"](criteria.Context(graph, group, layers, stats, contributions))

Every criterion takes a `Context` and gives one float64 score per channel of the group; the lowest goes first. It raises
UsageError where it has nothing to score by (no norm, no statistics). Files whose names begin with `_` are what they share.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping

from torch import Tensor

from flyweight.methods.criteria._context import Context
from flyweight.methods.criteria._contributions import contributions

__all__ = ["ALL", "Context", "Criterion", "contributions", "gone"]

Criterion = Callable[[Context], Tensor]


def _found() -> dict[str, Criterion]:
    names = sorted(one.name for one in pkgutil.iter_modules(__path__) if not one.name.startswith("_"))
    return {name: getattr(importlib.import_module(f"{__name__}.{name}"), name) for name in names}


ALL: Mapping[str, Criterion] = _found()


def gone(scores: Tensor) -> tuple[int, ...]:
    """The channels in the order they go: lowest score first, equal ones by number; the last one, which stays, is left out."""
    return tuple(scores.argsort(stable=True).tolist()[:-1])
