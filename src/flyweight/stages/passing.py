"""Does a network keep the limits on quality? Measured on the data that choose, with room for the data that judge at the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, fx

from flyweight.audit.quality import measured
from flyweight.budget import is_quality
from flyweight.numerics.ragged import joined
from flyweight.stages.setup import Job
from flyweight.types import Interval, Limit

__all__ = ["passing"]

LEVEL, POWER = 1.960, 1.645  # normal quantiles: of intervals at 95 %, of passing once more with 95 % probability


def passing(job: Job) -> Callable[[fx.GraphModule], list[tuple[Limit, Interval]]]:
    """What measures every limit on quality for a graph, in eval mode; intervals are widened by what choosing takes."""
    wanted = [limit for limit in job.budget.limits if is_quality(limit)]
    stretch = _stretch(job.judged.samples, job.roles.test.samples if job.roles.test else job.judged.samples)
    batches = list(job.judged) if wanted else []

    def answers(graph: fx.GraphModule) -> tuple[Any, Tensor | None]:
        truths = [b.labels for b in batches] if job.judged.labelled else []
        with torch.no_grad():
            return joined([graph(*b.inputs) for b in batches], truths)

    original = cache(partial(answers, job.graph))  # at the first attempt: often there is none

    def judge(graph: fx.GraphModule) -> list[tuple[Limit, Interval]]:
        (before, labels), (after, _) = original(), answers(graph)
        found = [measured(limit, job.yardstick, before, after, labels) for limit in wanted]
        return [(limit, _widened(one, stretch)) for limit, one in zip(wanted, found, strict=True)]

    return judge


def _stretch(choosing: int, judging: int) -> float:
    """How much wider the interval of `choosing` samples must be for what it holds to hold on `judging` others as well.

    The cheapest of several combinations that pass is chosen for passing, and others judge it again. Their value lies about the
    true one, and that about the value seen here; so the limit must be LEVEL of their standard errors and POWER of those of the
    difference of both values away.
    """
    theirs = math.sqrt(choosing / judging)  # their standard error, in standard errors here
    return max(1.0, theirs + POWER / LEVEL * math.hypot(1.0, theirs))


def _widened(interval: Interval, factor: float) -> Interval:
    value = interval.value
    low, high = value - (value - interval.low) * factor, value + (interval.high - value) * factor
    return Interval(value, low, high, interval.level)
