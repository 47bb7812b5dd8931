"""How answers moved between the original and the compressed model, sample by sample and class by class."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flyweight.errors import DataError
from flyweight.numerics.divergence import class_numbers, divergence, main_output
from flyweight.numerics.intervals import holm, mcnemar_p, mean_interval, paired_proportions, proportion
from flyweight.numerics.ragged import Ragged, pieces
from flyweight.types import Behaviour, ClassRow, Interval

__all__ = ["behaviour", "worst_class_drop"]


def behaviour(
    reference_outputs: Any,
    outputs: Any,
    labels: Tensor | Ragged | None,
    task: str,
    *,
    class_names: Sequence[str] | None = None,
    fn: Callable[..., Any] | None = None,
    level: float = 0.95,
) -> Behaviour:
    """What changed on the given samples, from the outputs of all of them (batches joined).

    Every task: the mean divergence with its interval and the 95th percentile. classify: agreement of the answers
    (Wilson). classify with labels: flips between right and wrong, and per class the recall before and after with the
    exact McNemar test, Holm-corrected over the classes that occur. An answer of NaN agrees with nothing and is wrong.
    `fn` is the user's divergence. Raises DataError for fewer than two samples or labels that do not fit, and what
    `divergence` raises.
    """
    values = divergence(task, reference_outputs, outputs, fn=fn).detach().numpy()
    found = Behaviour(
        items=len(values),
        divergence=mean_interval(values, level),
        # a broken answer diverges infinitely, and JSON knows no infinity
        divergence_p95=float(min(np.quantile(values, 0.95, method="higher"), sys.float_info.max)),
    )
    if task != "classify":
        return found
    before, after = _answers(reference_outputs), _answers(outputs)
    agreement = proportion(int((before == after).sum()), len(before), level)
    if labels is None:
        return Behaviour(found.items, found.divergence, found.divergence_p95, agreement)
    truth = _truth(labels, reference_outputs)
    was, now = before == truth, after == truth
    return Behaviour(
        items=found.items,
        divergence=found.divergence,
        divergence_p95=found.divergence_p95,
        agreement=agreement,
        right_to_wrong=int((was & ~now).sum()),
        wrong_to_right=int((~was & now).sum()),
        wrong_to_other_wrong=int((~was & ~now & (before != after)).sum()),
        classes=_class_rows(truth, was, now, class_names),
    )


def worst_class_drop(reference_outputs: Any, outputs: Any, labels: Tensor | Ragged, level: float = 0.95) -> Interval:
    """The largest drop of a class's recall, as a fraction, with an interval that holds for all classes at once.

    Per class Tango's paired interval at level 1 - (1 - level) / classes (Bonferroni); the largest value, lower and
    upper end over the classes that occur. With few items a class it is wide: it then says that nobody knows.
    """
    truth = _truth(labels, reference_outputs)
    was, now = _answers(reference_outputs) == truth, _answers(outputs) == truth
    present = sorted(set(truth.tolist()))
    each = 1 - (1 - level) / len(present)
    drops = [
        paired_proportions(int((was & ~now)[of].sum()), int((~was & now)[of].sum()), int(of.sum()), each)
        for of in (truth == number for number in present)
    ]
    value, low, high = (max(getattr(drop, end) for drop in drops) for end in ("value", "low", "high"))
    return Interval(value, low, high, level)


def _class_rows(truth: Tensor, was: Tensor, now: Tensor, names: Sequence[str] | None) -> tuple[ClassRow, ...]:
    present = [int(number) for number in sorted(set(truth.tolist()))]
    if names is not None and present[-1] >= len(names):
        raise DataError(f"{len(names)} class names are too few for class {present[-1]}", fix="give one name per class")
    members = [truth == number for number in present]
    p_values = holm([mcnemar_p(int((was & ~now)[of].sum()), int((~was & now)[of].sum())) for of in members])
    return tuple(
        ClassRow(
            name=str(number) if names is None else str(names[number]),
            items=int(of.sum()),
            recall_before=float(was[of].double().mean()),
            recall_after=float(now[of].double().mean()),
            p_value=p_value,
        )
        for number, of, p_value in zip(present, members, p_values, strict=True)
    )


def _answers(outputs: Any) -> Tensor:
    """The class that each row answers; -1 for a row with NaN, which would otherwise count as the largest score."""
    found = [main_output(piece)[0].detach() for piece in pieces(outputs)]
    return torch.cat([torch.where(scores.isnan().any(1), -1, scores.argmax(1)) for scores in found])


def _truth(labels: Tensor | Ragged, outputs: Any) -> Tensor:
    if isinstance(labels, Ragged):
        return torch.cat([_truth(*pair) for pair in zip(labels.pieces, outputs.pieces, strict=True)])
    scores = main_output(outputs)[0]
    if len(labels) != len(scores):
        raise DataError(f"{len(labels)} labels cannot be compared with {len(scores)} outputs")
    return class_numbers(labels, scores)
