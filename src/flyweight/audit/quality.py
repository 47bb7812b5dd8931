"""The measured value of every quality limit, with its interval, in the limit's own unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flyweight.audit.behaviour import worst_class_drop
from flyweight.errors import BudgetError
from flyweight.numerics import divergence as div
from flyweight.numerics.intervals import mean_interval, paired_difference, proportion, scaled
from flyweight.numerics.ragged import Ragged, pieces
from flyweight.types import Interval, Limit

__all__ = ["Yardstick", "measured"]


@dataclass(frozen=True, eq=False)
class Yardstick:
    """How answers are judged: the task's divergence (or the user's) and the metric, if labels allow one."""

    task: str
    metric: str | Callable[..., Any] | None
    lower_is_better: bool = False
    divergence: Callable[..., Any] | None = None
    variance: float | None = None

    @property
    def metric_name(self) -> str:
        """The metric's name, "" if there is none."""
        return self.metric if isinstance(self.metric, str) else getattr(self.metric, "__name__", "") or ""

    def divergences(self, reference: Any, outputs: Any) -> Tensor:
        """The divergence of every sample."""
        return div.divergence(self.task, reference, outputs, variance=self.variance, fn=self.divergence)

    def scores(self, outputs: Any, labels: Tensor | Ragged) -> Tensor:
        """The metric of every sample."""
        assert self.metric is not None
        return div.quality(self.task, outputs, labels, self.metric)


def measured(
    limit: Limit, yardstick: Yardstick, reference: Any, outputs: Any, labels: Tensor | Ragged | None
) -> Interval:
    """The quantity of a quality limit on these samples, with its 95 % interval.

    Raises BudgetError where labels are missing for it.
    """
    quantity = limit.quantity
    if quantity == "divergence":
        return mean_interval(yardstick.divergences(reference, outputs))
    if quantity == "agreement":
        before, after = (
            torch.cat([div.main_output(piece)[0].argmax(1) for piece in pieces(answers)])
            for answers in (reference, outputs)
        )
        same = before == after
        return proportion(int(same.sum()), len(same))
    if labels is None or yardstick.metric is None:
        raise BudgetError(
            f"{quantity} needs labels, and the data that choose and test have none",
            fix="give tune= and test= with labels, or limit agreement or divergence instead",
        )
    if quantity == "worst_class_drop":
        return scaled(worst_class_drop(reference, outputs, labels), 100)
    before, after = yardstick.scores(reference, labels), yardstick.scores(outputs, labels)
    if quantity == "drop":
        pair = (after, before) if yardstick.lower_is_better else (before, after)
        change = paired_difference(*pair)
        return scaled(change, 100)
    return mean_interval(after)
