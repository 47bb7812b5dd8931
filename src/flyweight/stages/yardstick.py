"""How a run judges answers: the task, the metric, the divergence; tried on one batch before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from flyweight import budget as budgets
from flyweight.audit.quality import Yardstick, measured
from flyweight.data import Roles, first_batch
from flyweight.errors import DataError, UsageError
from flyweight.numerics import divergence as div
from flyweight.numerics.ragged import joined
from flyweight.types import Budget, Note

if TYPE_CHECKING:
    from flyweight.stages.setup import Settings

__all__ = ["try_limits", "unjudged", "yardstick_of"]


def yardstick_of(graph: fx.GraphModule, found: Roles, settings: Settings) -> tuple[Yardstick, str]:
    """How answers are judged, and why so. Raises UsageError for a custom task without its divergence."""
    judged = found.tune or found.calib
    batch = first_batch(judged)
    with torch.no_grad():
        outputs = graph(*batch.inputs)
    task, reason = div.infer_task(outputs, batch.labels)
    if settings.task != "auto":
        task, reason = settings.task, "as asked"
    if task == "custom" and settings.divergence is None:
        raise UsageError("task custom needs a divergence", fix="give divergence=fn(reference_outputs, outputs)")
    if settings.divergence is not None:
        div.check_divergence(settings.divergence, outputs)
    metric = settings.metric or (div.default_metric(task) if judged.labelled else None)
    lower = settings.better == "lower" or (isinstance(metric, str) and budgets.METRICS.get(metric) == "lower")
    variance = None
    if task == "regress":
        (every,) = joined([graph(*b.inputs) for b in judged])
        variance = div.reference_variance(every)
    return Yardstick(task, metric, lower, settings.divergence, variance), reason


def unjudged(outputs: object, settings: Settings) -> tuple[Note, ...]:
    """A Note naming the outputs that no divergence looks at, where there are several and the user gave none."""
    names = div.other_outputs(outputs) if settings.divergence is None else []
    if not names:
        return ()
    text = f"only one of {len(names) + 1} outputs is judged, {div.main_output(outputs)[1]}; others may change freely"
    fix = "pass divergence=fn(reference_outputs, outputs) that looks at all of them: one number a sample, 0 if equal"
    return (Note("data.outputs", text, where=", ".join(names), fix=fix),)


def try_limits(graph: fx.GraphModule, found: Roles, yardstick: Yardstick, budget: Budget, metric: object) -> None:
    """Asks for the metric and every limit on quality on one batch: what cannot be judged is said before the work."""
    wanted = [limit for limit in budget.limits if budgets.is_quality(limit)]
    if metric is not None and not any(role.labelled for role in (found.tune, found.test) if role):
        raise DataError("a metric was given, but no labels", fix="give tune= and test= with labels, or leave it out")
    for role in (found.tune or found.calib, *([found.test] if found.test else ())):
        batch = first_batch(role)
        rows = torch.arange(max(2, batch.rows)) % batch.rows
        with torch.no_grad():
            outputs = graph(*(x[rows] if len(x) == batch.rows else x for x in batch.inputs))
        labels = None if batch.labels is None else batch.labels[rows]
        if yardstick.metric is not None and labels is not None:
            yardstick.scores(outputs, labels)
        for limit in wanted:
            measured(limit, yardstick, outputs, outputs, labels)
